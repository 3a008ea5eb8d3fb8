# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The spool, where the mutation check found that no other test looks (tests/mutation)."""

from __future__ import annotations

import functools
import json
import os
import types
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._schema import LIMIT, canonical
from ansible_collections.integrity.ima.plugins.module_utils._shard import plain_of
from ansible_collections.integrity.ima.plugins.module_utils._spool import FORMAT, Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import Host, oracle, parse, reason_of
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils.test_encryption import recipient

NOW = "2026-11-21T00:00:00Z"


class Stopped(Exception):
    """Instead of a death."""


def stopped_at(host: Host, monkeypatch: pytest.MonkeyPatch, ending: str) -> Path:
    """Export, and end before the manifest with this ending gets its name; return the orphan."""
    real = Spool._seal_manifest
    orphans = []

    def seal(self: Spool, manifest: dict[str, t.Any]) -> None:
        name = f"{manifest['sequence']:08}-{manifest['first']}-{manifest['count']}"
        if name.endswith(ending):
            orphans.append(Path(self.shards, manifest["boot_id"], name + ".ima.gz"))
            raise Stopped
        real(self, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "_seal_manifest", seal)
        with pytest.raises(Stopped):
            host.export()
    assert orphans[0].exists()
    return orphans[0]


def recovered(host: Host) -> list[str]:
    return host.locked(lambda cycle: cycle.spool.recover())


def synced(host: Host, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Recover; return the directories whose names were made durable, in order."""
    real, seen = _durable.sync_directory, []

    def sync(path: str) -> None:
        seen.append(os.path.relpath(path, host.spool))
        real(path)

    with monkeypatch.context() as patch:
        patch.setattr(_durable, "sync_directory", sync)
        recovered(host)
    return seen


def test_the_spools_own_name_is_durable_before_anything_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever made it (mkdir, a role) may not have seen to that. Once is enough."""
    host = Host(tmp_path, count=3)
    assert synced(host, monkeypatch)[0] == ".."
    assert ".." not in synced(host, monkeypatch)


# --- opening ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("more", "fits"), [(0, True), (1, False)], ids=["as much", "one byte more"])
def test_the_room_may_be_used_to_the_last_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: int, fits: bool
) -> None:
    found = types.SimpleNamespace(f_bavail=3, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: found)
    spool = Spool(str(tmp_path))
    if fits:
        spool.require_room(3 * 4096 + more)
    else:
        error = reason_of(lambda: spool.require_room(3 * 4096 + more))
        assert (error.reason, error.details["needed"], error.details["free"]) == ("no_space", 12289, 12288)


def test_the_format_file_is_the_protocols(tmp_path: Path) -> None:
    """Other programs compare it byte for byte: docs/PROTOCOL.md."""
    host = Host(tmp_path)
    recovered(host)
    assert Path(host.spool, "format.json").read_bytes() == b'{"format":"integrity.ima spool","version":1}'


def test_a_format_file_whose_run_died_is_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path)
    Path(host.spool, "format.json").write_bytes(FORMAT)
    # Its name, then that of shards, then that of anchors.
    assert synced(host, monkeypatch) == [".", ".", "."]
    assert synced(host, monkeypatch) == [".", "."]


def test_the_names_of_the_newest_shard_are_made_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, count=3)
    host.export()
    head = Spool(host.spool).head
    assert head is not None
    assert synced(host, monkeypatch)[-2:] == [f"shards/{head.boot_id}", "shards"]


def test_the_names_of_an_adopted_shard_are_durable_before_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = Host(tmp_path, count=3)
    boot = stopped_at(host, monkeypatch, "-4").parent
    real, seen = Spool._seal_manifest, []

    def seal(self: Spool, manifest: dict[str, t.Any]) -> None:
        seen.extend(before)
        real(self, manifest)

    before: list[str] = []
    monkeypatch.setattr(_durable, "sync_directory", lambda path: before.append(os.path.relpath(path, host.spool)))
    monkeypatch.setattr(Spool, "_seal_manifest", seal)
    assert recovered(host) == ["sealed shard 1, which a dead run had made durable"]
    assert seen[-2:] == [f"shards/{boot.name}", "shards"]


def test_all_temporary_files_are_counted(tmp_path: Path) -> None:
    host = Host(tmp_path, count=3)
    host.export()
    boot = next(Path(host.spool, "shards").iterdir())
    places = [Path(host.spool), Path(host.spool, "anchors"), boot, boot]
    for number, place in enumerate(places):
        (place / f".{number}.0123abcd.tmp").write_bytes(b"x")
    assert recovered(host) == ["removed 4 temporary files"]
    assert not list(Path(host.spool).rglob("*.tmp"))


# --- shards without a manifest ----------------------------------------------------------------------------------------


def test_the_second_shard_is_adopted_behind_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, count=9)
    stopped_at(host, monkeypatch, "-7-3")
    assert host.spans() == [(1, 0, 7)]
    assert recovered(host) == ["sealed shard 2, which a dead run had made durable"]
    assert host.spans() == [(1, 0, 7), (2, 7, 3)]
    oracle(host)


def test_an_orphan_under_another_name_than_the_journals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bytes are those that the journal describes, the name is not."""
    host = Host(tmp_path, count=9)
    orphan = stopped_at(host, monkeypatch, "-7")
    orphan.rename(orphan.with_name("00000001-0-8.ima.gz"))
    assert recovered(host) == ["set aside a shard without manifest (" + orphan.parent.name + "/00000001-0-8)"]
    assert host.spans() == []
    host.export()
    assert host.spans() == [(1, 0, 7), (2, 7, 3)]
    oracle(host)


def test_an_orphan_that_does_not_continue_the_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its journal came back with it, but another shard took its number meanwhile."""
    host = Host(tmp_path, count=9)
    orphan = stopped_at(host, monkeypatch, "-7")
    data, journal = orphan.read_bytes(), Path(host.spool, "journal.json").read_bytes()
    orphan.unlink()
    host.reboot()
    host.export()
    orphan.write_bytes(data)
    host.journal(journal)
    spans = host.spans()
    assert recovered(host) == [f"set aside a shard without manifest ({orphan.parent.name}/00000001-0-7)"]
    assert host.spans() == spans == [(1, 0, 1)]
    oracle(host)


def test_orphans_are_set_aside_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, count=3)
    host.export()
    boot = next(Path(host.spool, "shards").iterdir())
    for sequence in (5, 3, 9, 7):
        (boot / f"{sequence:08}-4-1.ima.gz").write_bytes(b"x")
    real = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(real(path), reverse=True))
    stems = [note.rpartition("/")[2] for note in recovered(host)]
    assert stems == [f"{sequence:08}-4-1)" for sequence in (3, 5, 7, 9)]


@pytest.mark.parametrize("how", ["gone", "altered", "whole"])
def test_an_encrypted_orphan_needs_its_plain_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The records leave the kernel on the strength of what can be read here."""
    host = Host(tmp_path, count=3)
    recipient(tmp_path, "audit")
    with open(host.conf, "a", encoding="utf-8") as file:
        file.write(f"[encryption]\nrecipients = {tmp_path}/recipients\n")
    orphan = stopped_at(host, monkeypatch, "-4")
    plain = Path(plain_of(str(orphan)))
    if how == "gone":
        plain.unlink()
    elif how == "altered":
        data = bytearray(plain.read_bytes())
        data[len(data) // 2] ^= 1
        plain.write_bytes(data)
    note, *more = recovered(host)
    assert note.startswith("sealed shard 1" if how == "whole" else "set aside a shard")
    assert [each[:29] for each in more] == (["set aside the readable file o"] if how == "altered" else [])
    assert host.spans() == ([(1, 0, 4)] if how == "whole" else [])


# --- the chain --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["00000004-6-1", "00000003-7-1"], ids=["sequence", "index"])
def test_a_gap_in_the_numbers_or_in_the_indexes_alone(tmp_path: Path, name: str) -> None:
    """Shards 1 and 2 hold records 0 to 5; the third one is renamed."""
    host = Host(tmp_path, "delete_n", "never", count=6, shard_records=3)
    host.export()
    assert host.spans() == [(1, 0, 3), (2, 3, 3), (3, 6, 1)]
    last = Spool(host.spool).entries[-1]
    for suffix in (".json", ".ima.gz"):
        old = Path(host.spool, "shards", last.stem + suffix)
        old.rename(old.with_name(name + suffix))
    error = reason_of(lambda: Spool(host.spool).entries)
    assert (error.reason, error.details["boot_id"]) == ("spool_gap", last.boot_id)
    assert error.details["sequence"] == int(name[:8])


# --- what was pruned --------------------------------------------------------------------------------------------------


def pruned_host(tmp_path: Path) -> Host:
    """Shards of 3, 3, 3 and 1 records; the files of the first two were pruned."""
    host = Host(tmp_path, "delete_n", "never", count=9, shard_records=3)
    host.export()
    spool = Spool(host.spool)
    assert host.locked(lambda cycle: cycle.spool.prune(spool.entries[1], "test", NOW)) == 2
    assert Spool(host.spool).pruned == 2
    return host


def test_an_empty_spool_holds_from_zero(tmp_path: Path) -> None:
    assert (Spool(str(tmp_path)).held_from, Spool(str(tmp_path)).pruned) == (0, 0)


def test_up_to_the_last_pruned_shard_the_reason_is_pruned(tmp_path: Path) -> None:
    host = pruned_host(tmp_path)
    spool = Spool(host.spool)
    assert spool.held_from == 6
    for entry in spool.entries[:2]:
        error = reason_of(functools.partial(spool.path, entry))
        assert (error.reason, error.details["sequence"]) == ("pruned", entry.sequence)
        assert (error.details["index"], error.details["boot_id"]) == (entry.first, entry.boot_id)


def test_a_pruned_shard_that_was_put_back_is_read(tmp_path: Path) -> None:
    host = pruned_host(tmp_path)
    entry = Spool(host.spool).entries[1]
    path = os.path.join(host.spool, "shards", entry.shard)
    Path(path).write_bytes(b"x")
    assert Spool(host.spool).path(entry) == path
    assert reason_of(lambda: Spool(host.spool).path(Spool(host.spool).entries[0])).reason == "pruned"


def test_a_file_that_goes_while_it_is_read_was_not_pruned(tmp_path: Path) -> None:
    spool = Spool(pruned_host(tmp_path).spool)
    entry = spool.entries[2]
    os.unlink(spool.path(entry))
    assert reason_of(lambda: spool.reader(entry)).reason == "write_failed"


@pytest.mark.parametrize(
    "changes", [{"manifest": "0" * 64}, {"sequence": 9}], ids=["another manifest", "no such shard"]
)
def test_a_statement_about_another_chain_excuses_nothing(tmp_path: Path, changes: dict[str, t.Any]) -> None:
    host = pruned_host(tmp_path)
    path = Path(host.spool, "pruned.json")
    path.write_bytes(canonical(dict(json.loads(path.read_bytes()), **changes)))
    error = reason_of(lambda: Spool(host.spool).entries)
    assert (error.reason, error.details["sequence"]) == ("shard_missing", 1)


def test_only_the_shards_that_hold_the_records_are_read(tmp_path: Path) -> None:
    """The neighbours on both sides are not there any more."""
    host = pruned_host(tmp_path)
    spool = Spool(host.spool)
    os.unlink(spool.path(spool.entries[3]))
    raws = [record.raw for record in parse(host.truth())]
    assert b"".join(spool.raw_from(6, 9)) == b"".join(raws[6:9])
    assert b"".join(spool.raw_from(7, 8)) == raws[7]


def test_pruning_again_states_nothing_anew_and_finds_nothing_left_over(tmp_path: Path) -> None:
    host = pruned_host(tmp_path)
    path = Path(host.spool, "pruned.json")
    before = (path.stat().st_ino, path.read_bytes())
    spool = Spool(host.spool)
    assert spool.left_over() == []
    assert host.locked(lambda cycle: cycle.spool.prune(spool.entries[1], "another", "2027-01-01T00:00:00Z")) == 0
    assert (path.stat().st_ino, path.read_bytes()) == before


# --- the store's word, the journal ------------------------------------------------------------------------------------


def test_a_verdict_is_recorded_once(tmp_path: Path) -> None:
    host = Host(tmp_path, count=3)
    host.export()
    spool = Spool(host.spool)
    (entry,) = spool.entries
    assert [spool.acknowledge(entry, "test", "consistent", NOW) for _time in range(2)] == [True, False]


def test_a_journal_with_a_manifest_that_does_not_hold_is_none(tmp_path: Path) -> None:
    """It fits the schema, but its numbers contradict each other."""
    host = Host(tmp_path, count=3)
    host.export()
    spool = Spool(host.spool)
    manifest = spool.manifest(spool.entries[0])
    spool.write_journal(base=2, seal=manifest)
    assert (spool.journal()["base"], spool.journal()["seal"]) == (2, manifest)
    spool.write_journal(seal=dict(manifest, count=10**9))
    assert (spool.journal()["base"], spool.journal()["seal"]) == (0, None)


def test_a_file_that_is_too_long_is_seen_to_be(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(bytes(LIMIT + 9))
    found = Spool._small(str(path))
    assert found is not None and len(found) > LIMIT
