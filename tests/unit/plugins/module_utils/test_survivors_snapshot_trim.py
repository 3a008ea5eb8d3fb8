# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Retention, trimming and the way of the records to the replay, where the mutation check found that no other test looks
(tests/mutation).
"""

from __future__ import annotations

import os
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _snapshot
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import (
    Host,
    oracle,
    parse,
    reason_of,
)

NOW = _snapshot.seconds_of("2026-03-02T00:00:00Z")


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def observed(host: Host) -> list[t.Any]:
    spool = Spool(host.spool)
    return [spool.manifest(entry)["observed"] for entry in spool.entries]


# --- what retention lets go -------------------------------------------------------------------------------------------


def retain(host: Host, **limits: int) -> None:
    with open(host.conf, "a", encoding="utf-8") as file:
        file.write("[retention]\n" + "".join(f"{key} = {value}\n" for key, value in limits.items()))


def prunable(host: Host) -> list[int]:
    return [entry.sequence for entry in host.cycle().prunable(NOW)]


def test_a_shard_goes_as_soon_as_its_last_record_left_the_kernel(tmp_path: Path) -> None:
    host = Host(tmp_path, count=20)
    host.export()
    host.acknowledge()
    retain(host, keep_bytes=0)
    assert (host.trim(6), prunable(host)) == (6, [])
    assert (host.trim(7), prunable(host)) == (1, [1])
    assert (host.trim(), prunable(host)) == (14, [1, 2])


def test_a_shard_without_the_stores_word_keeps_those_behind_it(tmp_path: Path) -> None:
    """What goes is a beginning of the history: the files are removed up to the last of them."""
    host = Host(tmp_path, count=20)
    host.run()
    retain(host, keep_bytes=0)
    spool = Spool(host.spool)
    spool.acknowledge(spool.entries[1], "test", "", "2026-01-01T00:00:00Z")
    assert prunable(host) == []
    spool.acknowledge(spool.entries[0], "test", "", "2026-01-01T00:00:00Z")
    assert prunable(host) == [1, 2]


def test_a_shard_within_the_limits_keeps_those_behind_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock was wrong when the first one was sealed, and set back before the second."""
    times = iter(["2026-03-01T00:00:00Z", "2026-01-01T00:00:00Z", "2026-03-01T00:00:00Z"])
    host = Host(tmp_path, count=20)
    with monkeypatch.context() as patch:
        patch.setattr(_snapshot, "utc_now", lambda: next(times))
        host.run()
    host.acknowledge()
    retain(host, keep_days=30)
    assert prunable(host) == []


def test_a_place_that_is_proven_lets_go_though_equal_records_lie_before_it(tmp_path: Path) -> None:
    """The list holds violations only, and would fit from the first of them on."""
    host = Host(tmp_path, count=2)
    host.violation(11)
    host.export()
    host.acknowledge()
    assert host.trim(8) == 8
    host.violation(6)
    retain(host, keep_bytes=0)
    assert prunable(host) == [1]
    assert host.export().base == 8
    oracle(host)


# --- trimming ---------------------------------------------------------------------------------------------------------


def test_where_only_a_staged_list_is_deleted_no_number_is(tmp_path: Path) -> None:
    """Booted with ima_flush_htable, and nothing is staged yet."""
    host = Host(tmp_path, "staged", "never", count=9, flush_htable=True)
    host.export()
    host.configure(trim_after="local")
    held = host.held()
    assert host.trim() == 0
    error = reason_of(lambda: host.trim(5))
    assert (error.reason, error.details["index"]) == ("staged_whole", 5)
    assert host.held() == held


def test_a_staged_list_that_ends_before_the_number_is_not_deleted(tmp_path: Path) -> None:
    host = Host(tmp_path, "staged", count=4)
    host.export()
    host.grow(3)
    host.export()
    assert host.spans() == [(1, 0, 5), (2, 5, 3)]
    held = host.held()
    for target in (4, 6, 8):
        error = reason_of(lambda target=target: host.trim(target))
        assert (error.reason, error.details["index"]) == ("staged_whole", target)
    assert host.held() == held
    assert (host.trim(5), len(parse(host.held()))) == (5, 3)
    oracle(host)


@pytest.mark.parametrize("flavour", ["delete_n", "staged"])
def test_an_intention_says_whose_it_is(tmp_path: Path, flavour: str) -> None:
    """The journal was lost, and then the kernel's answer: still it is known who deleted."""
    host = Host(tmp_path, flavour, count=9)
    host.export()
    host.journal(None)
    _emulated.lost_reply(host.kernel)
    assert reason_of(host.trim).reason == "delete_unknown"
    assert Spool(host.spool).journal()["boot_id"] == host.state().boot_id
    host.grow(2)
    assert host.export().base == 10
    assert host.faults() == []
    oracle(host)


# --- small parts ------------------------------------------------------------------------------------------------------


def test_a_record_ends_where_it_ends_whatever_piece_it_ends_in() -> None:
    pieces = _snapshot._Pieces(iter([b"abc", b"defghijk", b"l"]))
    assert [pieces.exactly(2), pieces.exactly(3), pieces.exactly(7)] == [b"ab", b"cde", b"fghijkl"]


def test_no_piece_is_taken_before_it_is_needed() -> None:
    """It may be of the next shard, of which nothing is to be compared."""
    rest = iter([b"abc", b"def"])
    assert _snapshot._Pieces(rest).exactly(3) == b"abc"
    assert next(rest) == b"def"


# --- up to a named record, and where the TPM's values were reached ----------------------------------------------------


def test_a_name_that_no_record_has_stops_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)
    done = host.export(stop=b"/not/there")
    assert (done.records, done.cut, done.more) == (10, 10, False)
    assert observed(host) == [None, {"pcrs": host.state().pcrs, "index": 10}]


def test_a_bank_that_the_tpm_does_not_have_is_replayed_all_the_same(tmp_path: Path) -> None:
    host = Host(tmp_path, count=3, banks=["sha256"])
    host.export()
    spool = Spool(host.spool)
    (entry,) = spool.entries
    assert sorted(spool.manifest(entry)["pcrs_end"]["10"]) == ["sha1", "sha256"]
    assert observed(host) == [{"pcrs": host.state().pcrs, "index": 4}]
    oracle(host)


def test_the_values_are_reached_when_those_of_all_pcrs_hold(tmp_path: Path) -> None:
    host = Host(tmp_path, count=3)
    _emulated.feed(host.kernel, records=[{"path": "/eleven", "content": "x", "pcr": 11}])
    host.export()
    host.grow(1)
    _emulated.feed(host.kernel, records=[{"path": "/eleven/too", "content": "y", "pcr": 11}])
    host.export()
    assert sorted(host.state().pcrs) == ["10", "11"]
    assert observed(host)[-1] == {"pcrs": host.state().pcrs, "index": 7}


@pytest.mark.parametrize("when", ["first export", "later"])
def test_a_tpm_that_goes_away_while_it_is_asked_accuses_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Its banks are still named, and none of its PCRs is there any more: that says nothing about the list."""
    host = Host(tmp_path, count=3)
    if when == "later":
        host.export()
        host.grow(2)
    with monkeypatch.context() as patch:
        patch.setattr(_emulated.EmulatedFiles, "pcr", lambda self, bank, index: None)
        assert host.cycle().observe() is None
        host.export()
    assert observed(host)[-1] is None
    assert (host.faults(), host.cycle().blocked()) == ([], None)
    oracle(host)


# --- a hole that is found while an anchor is looked for ---------------------------------------------------------------


def trimmed_by_others(host: Host) -> None:
    """A new boot, whose first record somebody deletes before it was exported."""
    host.reboot()
    _emulated.foreign_trim(host.kernel, 1)
    host.grow(1)


@pytest.mark.parametrize("there", [False, True], ids=["new anchor", "anchor of before"])
def test_a_hole_that_is_found_for_an_anchor_outlives_a_reboot(tmp_path: Path, there: bool) -> None:
    host = Host(tmp_path, count=3)
    host.run()
    if there:
        host.anchor()
    trimmed_by_others(host)
    assert reason_of(host.anchor).reason == "foreign_trim"
    assert [fault["reason"] for fault in Spool(host.spool).journal()["faults"]] == ["foreign_trim"]
    host.reboot()
    host.export()
    assert [fault[0] for fault in host.faults()] == ["foreign_trim"]


def test_looking_for_an_anchor_writes_nothing(tmp_path: Path) -> None:
    """Check mode does it."""
    host = Host(tmp_path, count=3)
    host.run()
    name = host.anchor().name
    trimmed_by_others(host)
    before = host.files()
    assert reason_of(lambda: host.cycle().find_anchor(name)).reason == "foreign_trim"
    assert host.files() == before
