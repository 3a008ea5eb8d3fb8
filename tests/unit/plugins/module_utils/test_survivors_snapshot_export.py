# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The cycle's place and its export, where the mutation check found that no other test looks (tests/mutation)."""

from __future__ import annotations

import hashlib
import os
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _shard
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import Cycle
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import Host, oracle, reason_of

BANKS = ["sha1", "sha256"]


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def manifests(host: Host) -> list[dict[str, t.Any]]:
    spool = Spool(host.spool)
    return [spool.manifest(entry) for entry in spool.entries]


def section(host: Host, text: str) -> None:
    """Add a section to the config."""
    with open(host.conf, "a", encoding="utf-8") as file:
        file.write(text)


# --- finding the place ------------------------------------------------------------------------------------------------


def test_a_broken_record_of_a_list_that_was_carried_over_is_named_by_its_index(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "never", count=4)
    host.export()
    host.kexec(True)
    host.grow(1)
    path = Path(host.kernel, host.state().recorded)
    data = bytearray(path.read_bytes())
    data[host.state().size - 3] ^= 1
    path.write_bytes(data)
    error = reason_of(host.export)
    assert (error.reason, error.details["index"]) == ("digest_mismatch", 6)


def test_a_piece_of_a_first_list_that_leads_nowhere_is_sealed_with_its_fault(tmp_path: Path) -> None:
    """It begins a boot: no record of it can have been trimmed."""
    host = Host(tmp_path)
    _emulated.kexec(host.kernel, False)
    host.grow(9)
    done = host.export(limit=1)
    assert (done.records, done.more) == (7, True)
    assert host.faults() == [("pcr_mismatch", 0, True)]


def test_a_boot_that_begins_at_zero_is_no_kexec_though_no_counter_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_emulated.EmulatedFiles, "reset_count", lambda self: None)
    host = Host(tmp_path, "delete_n", "never", count=9)
    host.export()
    host.reboot()
    host.grow(2)
    host.export()
    assert (host.spans()[-1], host.faults()) == ((3, 0, 3), [])
    oracle(host)


def test_what_is_measured_again_after_a_kexec_is_not_what_was_sealed_before(tmp_path: Path) -> None:
    """The new list looks like the sealed one, and goes on behind it: the kernel holds nothing of the old one."""
    host = Host(tmp_path, "delete_n", "central", shard_records=2)
    files = [{"path": path, "content": path} for path in ("/a", "/b", "/c")]
    _emulated.feed(host.kernel, records=files)
    host.export()
    host.acknowledge()
    assert host.trim() == 4
    sealed = host.sealed()
    host.kexec(False)
    _emulated.feed(host.kernel, records=files)
    assert host.held() == sealed
    section(host, "[retention]\nkeep_shards = 1\n")
    assert host.cycle().prunable(0.0) == Spool(host.spool).entries[:1]


def test_a_survey_notes_the_boot_it_was_made_in(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)
    host.run()
    host.reboot()
    assert host.locked(lambda cycle: cycle.survey()).base == 0
    journal = Spool(host.spool).journal()
    assert (journal["boot_id"], journal["base"]) == (host.state().boot_id, 0)


# --- export -----------------------------------------------------------------------------------------------------------


def test_the_journal_tells_where_the_live_list_begins(tmp_path: Path) -> None:
    """On the staged flavour: behind what is staged; the cut, where it does not reach so far."""
    host = Host(tmp_path, "staged", count=9)
    host.export()
    assert Spool(host.spool).journal()["live"] == 10
    host.grow(3)
    assert host.export().cut == 13
    assert Spool(host.spool).journal()["live"] == 10
    host = Host(tmp_path / "piece", "staged", count=9)
    with host.config().lists().writer(staged=True) as file:
        host.config().lists().stage(file)
    host.grow(3)
    assert host.export(limit=1).cut == 7
    assert Spool(host.spool).journal()["live"] == 7


@pytest.mark.parametrize(
    ("count", "more", "index"), [(13, False, 14), (14, True, None), (6, False, 7)], ids=["exact", "more", "less"]
)
def test_whether_more_is_waiting(tmp_path: Path, count: int, more: bool, index: int | None) -> None:
    """And if not, the end of the list was seen, and with it what the TPM has."""
    host = Host(tmp_path, count=count)
    assert host.export(limit=2).more is more
    observed = manifests(host)[-1]["observed"]
    assert observed == (None if index is None else {"pcrs": host.state().pcrs, "index": index})


@pytest.mark.parametrize("banks", [BANKS, []], ids=["tpm", "none"])
def test_a_piece_behind_what_was_trimmed(tmp_path: Path, banks: list[str]) -> None:
    host = Host(tmp_path, count=4, banks=banks)
    host.run()
    host.grow(8)
    done = host.export(limit=1)
    assert (done.base, done.cut, done.more) == (5, 12, True)


def test_a_list_without_its_first_new_records_is_noted(tmp_path: Path) -> None:
    host = Host(tmp_path, count=4)
    host.run()
    host.grow(5)
    _emulated.foreign_trim(host.kernel, 3)
    assert reason_of(host.export).reason == "foreign_trim"
    noted = Spool(host.spool).journal()["faults"]
    assert [(each["reason"], each["index"], each["lost"]) for each in noted] == [("foreign_trim", 5, True)]


def test_a_bank_that_comes_later_is_not_replayed_from_the_middle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, count=3)
    host.export()
    monkeypatch.setattr(_emulated.EmulatedFiles, "tpm_banks", lambda self: [*BANKS, "sha384"])
    host.grow(2)
    host.export()
    assert manifests(host)[-1]["pcrs_end"] == host.state().pcrs
    assert sorted(host.state().pcrs["10"]) == BANKS


def test_what_the_stitched_lists_say_is_noted_each_time_and_warned_of_once(tmp_path: Path) -> None:
    host = Host(tmp_path, count=3)
    section(host, f"[stitched]\ndirectory = {tmp_path}/missing\n")

    def twice(cycle: Cycle) -> tuple[list[str], list[str], list[str]]:
        return cycle.export().notes, cycle.export().notes, cycle.warnings

    first, second, warnings = host.locked(twice)
    assert len(first) == 1 and "not brought up to the cut" in first[0]
    assert first == second == warnings


def test_what_is_stored_is_encrypted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To every recipient; the manifest is about these bytes, and the readable ones lie beside them."""
    asked: list[list[str]] = []

    def encrypt(path: str, recipients: list[str], write: t.Callable[[bytes], None]) -> None:
        asked.append(recipients)
        write(b"secret " + Path(path).read_bytes()[::-1])

    monkeypatch.setattr(_shard, "encrypt", encrypt)
    host = Host(tmp_path, count=3)
    certificates = [str(tmp_path / "keys" / name) for name in ("a.pem", "b.pem")]
    (tmp_path / "keys").mkdir()
    for name in certificates:
        Path(name).touch()
    section(host, f"[encryption]\nrecipients = {tmp_path}/keys\n")
    host.export()
    spool = Spool(host.spool)
    (entry,), (manifest,) = spool.entries, manifests(host)
    path = os.path.join(spool.shards, entry.shard)
    stored, plain = Path(path).read_bytes(), Path(_shard.plain_of(path)).read_bytes()
    assert (asked, stored) == ([certificates], b"secret " + plain[::-1])
    assert (manifest["encryption"], manifest["stored_size"]) == ("cms", len(stored))
    assert manifest["stored_sha256"] == hashlib.sha256(stored).hexdigest()
    oracle(host)


# --- anchors ----------------------------------------------------------------------------------------------------------


def test_an_anchor_that_is_in_the_list_is_not_measured_again(tmp_path: Path) -> None:
    """A kernel after a kexec does not know what it carried over, and would record it once more."""
    host = Host(tmp_path, "delete_n", "never", count=3)
    host.export()
    made = host.anchor()
    assert (made.index, made.made) == (4, True)
    host.kexec(True)
    held = host.held()
    again = host.anchor()
    assert (again.name, again.index, again.made) == (made.name, 4, False)
    assert host.held() == held
