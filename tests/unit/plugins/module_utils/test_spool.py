# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The spool: what a dead run leaves at every stage, damage that must be named, ranges of records, acknowledgements."""

from __future__ import annotations

import base64
import gzip
import json
import os
import shutil
import typing as t
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import (
    ImaError,
    ManifestError,
    SpoolError,
    WriteError,
)
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._shard import Entry, ShardReader, parse_manifest, parse_name
from ansible_collections.integrity.ima.plugins.module_utils._spool import FORMAT, Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import Host, oracle, parse, reason_of

NOW = "2026-11-21T00:00:00Z"


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def filled(tmp_path: Path, **arguments: t.Any) -> Host:
    """A host with shards of 3, 3, 3 and 1 records, the kernel holding all of them."""
    host = Host(tmp_path, "delete_n", "never", count=9, **dict({"shard_records": 3}, **arguments))
    host.export()
    return host


def path_of(host: Host, number: int, suffix: str = "") -> Path:
    """A file of the shard of that number, counted from 0."""
    entry = Spool(host.spool).entries[number]
    return Path(host.spool, "shards", entry.stem + suffix)


class Stopped(Exception):
    """Instead of a death."""


def stopped_at(host: Host, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    """Export, and end before the first file with this ending gets its name."""
    real = _durable.NewFile.publish

    def publish(self: _durable.NewFile) -> bool:
        if self.path.endswith(ending):
            raise Stopped
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(_durable.NewFile, "publish", publish)
        with pytest.raises(Stopped):
            host.export()


# --- opening ----------------------------------------------------------------------------------------------------------


def test_missing_directory(tmp_path: Path) -> None:
    spool = Spool(str(tmp_path / "no"))
    for work in (spool.check, spool.recover):
        error = reason_of(work)
        assert (error.reason, error.details["path"]) == ("spool_missing", str(tmp_path / "no"))
    assert not (tmp_path / "no").exists()


def test_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "lock").write_bytes(b"")
    spool = Spool(str(tmp_path))
    assert spool.check() is False
    assert sorted(os.listdir(tmp_path)) == ["lock"]
    assert spool.recover() == []
    assert spool.check() is True
    assert sorted(os.listdir(tmp_path)) == ["anchors", "format.json", "lock", "shards"]
    assert Spool(str(tmp_path)).recover() == []
    assert (spool.entries, spool.head, spool.epoch) == ([], None, [])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "spool_foreign"),
        (b"{}", "spool_foreign"),
        (FORMAT[:-4], "newer_version"),
        (FORMAT.replace(b"1", b"2"), "newer_version"),
        (FORMAT.replace(b"spool", b"store"), "spool_foreign"),
        (None, "spool_foreign"),
    ],
    ids=["empty", "other", "torn", "newer", "store", "gone"],
)
def test_another_format(tmp_path: Path, content: bytes | None, reason: str) -> None:
    host = filled(tmp_path)
    path = Path(host.spool, "format.json")
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    files = host.files()
    for work in (Spool(host.spool).check, Spool(host.spool).recover, host.export):
        assert reason_of(work).reason == reason
    assert host.files() == files


def test_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")
    assert reason_of(Spool(str(tmp_path)).recover).reason == "spool_foreign"
    assert os.listdir(tmp_path) == ["letter.txt"]


# --- what a dead run left ---------------------------------------------------------------------------------------------


def test_an_orphan_that_the_journal_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, count=9)
    stopped_at(host, monkeypatch, "-7.json")
    assert host.spans() == []
    notes = host.locked(lambda cycle: cycle.spool.recover())
    assert notes[-1] == "sealed shard 1, which a dead run had made durable"
    assert host.spans() == [(1, 0, 7)]
    oracle(host)
    assert host.locked(lambda cycle: cycle.spool.recover()) == []
    host.run()
    assert host.spans() == [(1, 0, 7), (2, 7, 3)]
    oracle(host)


@pytest.mark.parametrize("journal", [None, b"", b'{"base":0', b"[]"], ids=["gone", "empty", "torn", "foreign"])
def test_an_orphan_that_nobody_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: bytes | None) -> None:
    host = Host(tmp_path, count=9)
    stopped_at(host, monkeypatch, "-7.json")
    host.journal(journal)
    host.grow(1)
    done = host.export()
    assert any("set aside" in note for note in done.notes)
    oracle(host)
    assert host.spans() == [(1, 0, 7), (2, 7, 4)]
    broken = [name for name in host.files() if ".broken" in name]
    assert len(broken) == 1
    assert host.export().notes == []


def test_an_orphan_with_other_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the name that the journal says, and not the bytes."""
    host = Host(tmp_path, count=9)
    stopped_at(host, monkeypatch, "-7.json")
    (orphan,) = Path(host.spool).rglob("*.ima.gz")
    data = bytearray(orphan.read_bytes())
    data[-1] ^= 1
    orphan.write_bytes(data)
    host.export()
    oracle(host)
    assert len(list(Path(host.spool).rglob("*.broken"))) == 1


def test_an_orphan_of_the_last_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The host went down between shard and manifest: the records are there, and stay part of the history."""
    host = Host(tmp_path, count=9)
    stopped_at(host, monkeypatch, "-7.json")
    host.reboot()
    host.run()
    assert host.spans() == [(1, 0, 7), (2, 0, 1)]
    oracle(host)


@pytest.mark.parametrize("ending", [".ima.gz", "-7.json", "format.json"])
def test_temporary_files_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    host = Host(tmp_path, count=9)
    with monkeypatch.context() as patch:
        patch.setattr(_durable.NewFile, "discard", lambda self: None)
        stopped_at(host, monkeypatch, ending)
    assert any(name.endswith(".tmp") for name in host.files())
    host.run()
    assert not any(name.endswith(".tmp") for name in host.files())
    oracle(host)


def test_the_generation_follows(tmp_path: Path) -> None:
    host = filled(tmp_path)
    for content in (b"2\n", b"torn", None):
        path = Path(host.spool, "generation")
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        host.export()
        assert path.read_bytes() == b"4\n"


# --- damage that is named ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1, 2], ids=["first", "second", "third"])
def test_a_missing_pair(tmp_path: Path, number: int) -> None:
    host = filled(tmp_path)
    for path in [path_of(host, number, suffix) for suffix in (".json", ".ima.gz")]:
        path.unlink()
    files, held = host.files(), host.held()
    error = reason_of(host.export)
    assert error.reason == "spool_gap"
    assert error.details["sequence"] in (number + 1, number + 2)
    assert (host.files(), host.held()) == (files, held)


def test_a_missing_manifest(tmp_path: Path) -> None:
    host = filled(tmp_path)
    path_of(host, 1, ".json").unlink()
    assert reason_of(host.export).reason == "spool_gap"
    assert len(list(Path(host.spool).rglob("*.ima.gz*"))) == 4


def test_a_missing_shard(tmp_path: Path) -> None:
    host = filled(tmp_path)
    path_of(host, 2, ".ima.gz").unlink()
    error = reason_of(host.export)
    assert (error.reason, error.details["sequence"], error.details["index"]) == ("shard_missing", 3, 6)


def test_a_fork(tmp_path: Path) -> None:
    host = filled(tmp_path)
    stem = path_of(host, 1)
    for suffix in (".json", ".ima.gz"):
        shutil.copy(str(stem) + suffix, str(stem.parent / "00000002-3-4") + suffix)
    error = reason_of(host.export)
    assert (error.reason, error.details["sequence"]) == ("spool_fork", 2)


def test_another_boots_shards_cannot_slip_in(tmp_path: Path) -> None:
    host = filled(tmp_path)
    other = Path(host.spool, "shards", "00000000-0000-0000-0000-000000000000")
    other.mkdir()
    stem = path_of(host, 3)
    for suffix in (".json", ".ima.gz"):
        shutil.copy(str(stem) + suffix, str(other / "00000005-10-1") + suffix)
    assert reason_of(host.export).reason == "manifest_name"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"null", b"[]", b"{}"])
def test_a_torn_manifest(tmp_path: Path, content: bytes) -> None:
    host = filled(tmp_path)
    path_of(host, 3, ".json").write_bytes(content)
    with pytest.raises(ManifestError) as caught:
        host.export()
    assert caught.value.reason in ("not_json", "schema")
    assert str(path_of(host, 3, ".json")) in str(caught.value)


def test_a_manifest_of_a_newer_version(tmp_path: Path) -> None:
    host = filled(tmp_path)
    path = path_of(host, 3, ".json")
    manifest = dict(json.loads(path.read_bytes()), version=2)
    path.write_bytes(canonical(manifest))
    assert reason_of(host.export).reason == "newer_version"


@pytest.mark.parametrize("number", [0, 3])
def test_an_altered_shard(tmp_path: Path, number: int) -> None:
    host = filled(tmp_path)
    path = path_of(host, number, ".ima.gz")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    error = reason_of(lambda: b"".join(Spool(host.spool).raw_from(0)))
    assert error.reason == "shard_altered"
    assert (error.details["sequence"], error.details["index"]) == (number + 1, 3 * number)
    host.configure(trim_after="local")
    held = host.held()
    assert reason_of(host.run).reason == "shard_altered"
    assert host.held() == held


BENDS: dict[str, t.Callable[[bytes], bytes]] = {
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "longer": lambda data: data + b"\0",
    "two members": lambda data: data + gzip.compress(b"x"),
    "other level": lambda data: gzip.compress(gzip.decompress(data), 1),
    "not gzip": lambda data: b"x" * len(data),
    "a bomb": lambda data: gzip.compress(bytes(20 << 20)),
}


@pytest.mark.parametrize("bend", BENDS)
def test_reading_an_altered_shard(tmp_path: Path, bend: str) -> None:
    host = filled(tmp_path)
    path = path_of(host, 1, ".ima.gz")
    path.write_bytes(BENDS[bend](path.read_bytes()))
    error = reason_of(lambda: b"".join(Spool(host.spool).raw_from(0)))
    assert (error.reason, error.details["index"]) == ("shard_altered", 3)


def test_a_bomb_is_not_unpacked(tmp_path: Path) -> None:
    host = filled(tmp_path)
    path = path_of(host, 1, ".ima.gz")
    path.write_bytes(gzip.compress(bytes(20 << 20)))
    spool = Spool(host.spool)
    entry = spool.entries[1]
    given = 0
    with open(path, "rb") as file:
        reader = ShardReader(file, spool.manifest(entry), "it")
        with pytest.raises(ManifestError):
            while True:
                given += len(reader.read(1000)) or 1 << 40
    assert given <= 4096


# --- names ------------------------------------------------------------------------------------------------------------


BOOT = "01234567-89ab-cdef-0123-456789abcdef"


@pytest.mark.parametrize(
    "name",
    [
        "00000001-0-1.json.broken",
        "00000001-0-1.ack",
        "0000001-0-1.json",
        "000000001-0-1.json",
        "00000000-0-1.json",
        "00000001-00-1.json",
        "00000001-0-0.json",
        "00000001-0-01.json",
        "00000001--1-1.json",
        "00000001-0-1.json\n",
        "00000001-0-1.ima",
        ".00000001-0-1.json.1234.tmp",
        "\u0660\u0660\u0660\u0660\u0660\u0660\u0660\u0661-0-1.json",
        "00000001-99999999999999999-1.json",
    ],
)
def test_names_that_are_none(name: str) -> None:
    assert parse_name(BOOT, name) is None


@pytest.mark.parametrize("boot", ["", "..", BOOT.upper(), BOOT + "\n", BOOT[:-1], "/" + BOOT])
def test_boots_that_are_none(boot: str) -> None:
    assert parse_name(boot, "00000001-0-1.json") is None


@given(st.integers(1, 99999999), st.integers(0, 10**15), st.integers(1, 10**12))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_names_go_there_and_back(sequence: int, first: int, count: int) -> None:
    entry = Entry(sequence, first, count, BOOT)
    for name, suffix in ((entry.shard, ".ima.gz"), (entry.manifest, ".json")):
        assert parse_name(*name.split("/")) == (entry, suffix)


def test_foreign_files_do_not_matter(tmp_path: Path) -> None:
    host = filled(tmp_path)
    boot = path_of(host, 0).parent
    (boot / "notes.txt").write_text("x")
    (boot.parent / "not-a-boot").mkdir()
    (boot.parent / "not-a-boot" / "00000009-0-1.json").write_text("x")
    (boot.parent / "stray").write_text("x")
    os.symlink(boot, boot.parent / "89abcdef-0000-0000-0000-000000000000")
    host.export()
    assert len(host.spans()) == 4
    oracle(host)


# --- ranges -----------------------------------------------------------------------------------------------------------


@pytest.fixture(name="long", scope="module")
def _long(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[tuple[str, list[bytes]]]:
    host = Host(tmp_path_factory.mktemp("long"), "export_only", count=30, shard_records=4)
    host.violation(3)
    host.run()
    host.kexec(True)
    host.grow(5)
    host.run()
    yield host.spool, [record.raw for record in parse(host.truth())]


@given(st.data())
@settings(max_examples=150, deadline=None, derandomize=True)
def test_raw_from(long: tuple[str, list[bytes]], data: st.DataObject) -> None:
    directory, raws = long
    index = data.draw(st.integers(0, len(raws) + 3))
    end = data.draw(st.none() | st.integers(0, len(raws) + 3))
    assert b"".join(Spool(directory).raw_from(index, end)) == b"".join(raws[index:end])


def test_raw_from_only_knows_the_newest_epoch(tmp_path: Path) -> None:
    host = filled(tmp_path)
    host.reboot()
    host.grow(4)
    host.export()
    assert b"".join(Spool(host.spool).raw_from(0)) == host.truth()
    assert [entry.first for entry in Spool(host.spool).epoch] == [0, 3]


def test_chunk(tmp_path: Path) -> None:
    host = filled(tmp_path)
    spool = Spool(host.spool)
    entry = spool.entries[0]
    whole = path_of(host, 0, ".ima.gz").read_bytes()
    size = len(whole)
    for offset, length in ((0, size), (0, 10), (7, 10), (size - 3, 10), (size, 10), (size + 9, 10), (5, 0)):
        chunk = spool.chunk(entry, offset, length)
        assert (chunk["sequence"], chunk["offset"]) == (1, offset)
        assert base64.b64decode(chunk["data"], validate=True) == whole[offset : offset + length]


# --- sealing ----------------------------------------------------------------------------------------------------------


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    """Whenever, wherever, however often: nothing but the records is in a shard's file."""
    host = filled(tmp_path / "a")
    shutil.copytree(host.kernel, tmp_path / "b" / "ima")
    first = {name: digest for name, digest in host.files().items() if name.endswith(".gz")}
    shutil.rmtree(host.spool)
    os.mkdir(host.spool)
    host.export()
    assert {name: digest for name, digest in host.files().items() if name.endswith(".gz")} == first


def test_a_name_that_holds_other_bytes(tmp_path: Path) -> None:
    """Two histories claim one name: the one that was there stays."""
    host = filled(tmp_path)
    spool = Spool(host.spool)
    entry = spool.entries[0]
    manifest = spool.manifest(entry)
    shard = spool.new_shard(entry.boot_id)
    shard.add(b"something else")
    shard.close()
    before = {name: digest for name, digest in host.files().items() if name.startswith("shards") and "tmp" not in name}
    with pytest.raises(WriteError) as caught:
        spool.seal(shard, manifest)
    shard.discard()
    assert caught.value.reason == "exists_different"
    assert {name: digest for name, digest in host.files().items() if name.startswith("shards")} == before
    host.export()
    oracle(host)


def test_a_manifest_must_fit_its_schema(tmp_path: Path) -> None:
    host = filled(tmp_path)
    spool = Spool(host.spool)
    manifest = spool.manifest(spool.entries[-1])
    for change in (
        {"count": 10**9, "size": 33},
        {"size": 10**9},
        {"pcrs_start": {}},
    ):
        with pytest.raises(ManifestError) as caught:
            parse_manifest(canonical(dict(manifest, **change)), "it")
        assert caught.value.reason == "manifest_values"


# --- acknowledgements -------------------------------------------------------------------------------------------------


def test_acknowledgement(tmp_path: Path) -> None:
    host = filled(tmp_path)
    spool = Spool(host.spool)
    entry = spool.entries[0]
    assert spool.acknowledgement(entry) is None
    assert spool.acknowledge(entry, "store", "", NOW) is True
    assert spool.acknowledge(entry, "store", "", NOW) is False
    word = spool.acknowledgement(entry)
    assert word == {
        "version": 1,
        "sequence": 1,
        "manifest": spool.digest(entry),
        "store": "store",
        "verdict": "",
        "time": NOW,
    }
    assert [spool.allowed(entry, policy) for policy in ("local", "central", "verified", "never")] == [1, 1, 0, 0]
    assert spool.acknowledge(entry, "store", "consistent", NOW) is True
    assert spool.acknowledge(entry, "store", "", NOW) is False
    assert [spool.allowed(entry, policy) for policy in ("local", "central", "verified", "never")] == [1, 1, 1, 0]
    assert not spool.allowed(spool.entries[1], "central")


@pytest.mark.parametrize("how", ["empty", "torn", "other manifest", "copied", "newer", "not canonical"])
def test_a_word_on_something_else_counts_as_none(tmp_path: Path, how: str) -> None:
    host = filled(tmp_path)
    spool = Spool(host.spool)
    entry = spool.entries[0]
    spool.acknowledge(entry, "store", "attested", NOW)
    path = path_of(host, 0, ".ack")
    data = path.read_bytes()
    word = json.loads(data)
    path.write_bytes(
        {
            "empty": b"",
            "torn": data[:-5],
            "other manifest": canonical(dict(word, manifest="0" * 64)),
            "copied": data,
            "newer": canonical(dict(word, version=2)),
            "not canonical": data + b"\n",
        }[how]
    )
    if how == "copied":
        path.rename(path_of(host, 1, ".ack"))
        entry = spool.entries[1]
    assert spool.acknowledgement(entry) is None
    assert not spool.allowed(entry, "central")
    host.configure(trim_after="central")
    assert host.run()[1] == 0
    assert spool.acknowledge(entry, "store", "", NOW) is True


def test_a_word_on_a_manifest_that_changed(tmp_path: Path) -> None:
    host = filled(tmp_path)
    spool = Spool(host.spool)
    entry = spool.entries[3]
    spool.acknowledge(entry, "store", "", NOW)
    path = path_of(host, 3, ".json")
    path.write_bytes(canonical(dict(json.loads(path.read_bytes()), name="another")))
    assert Spool(host.spool).acknowledgement(entry) is None


# --- the journal ------------------------------------------------------------------------------------------------------


def test_journal(tmp_path: Path) -> None:
    host = filled(tmp_path)
    spool = Spool(host.spool)
    path = Path(host.spool, "journal.json")
    before = path.stat().st_ino
    spool.write_journal(base=0)
    assert path.stat().st_ino == before, "nothing changed, nothing is written"
    spool.write_journal(base=5)
    assert spool.journal()["base"] == 5
    path.write_bytes(b"torn")
    assert spool.journal()["base"] == 0
    spool.write_journal(base=7)
    assert spool.journal()["base"] == 7


@pytest.mark.parametrize("depth", [10, 300, 900, 960, 990, 20000])
def test_a_deep_journal_is_none(tmp_path: Path, depth: int) -> None:
    host = filled(tmp_path)
    seal = b'{"a":' * depth + b"1" + b"}" * depth
    host.journal(b'{"base":3,"boot_id":null,"faults":[],"seal":' + seal + b',"trim":null,"version":1}')
    assert Spool(host.spool).journal()["base"] == 0


def test_unreadable(tmp_path: Path) -> None:
    host = filled(tmp_path)
    path = Path(host.spool, "journal.json")
    path.unlink()
    path.mkdir()
    error = reason_of(Spool(host.spool).journal)
    assert (error.reason, error.details["path"]) == ("read_failed", str(path))


def test_errors_are_of_the_library(tmp_path: Path) -> None:
    assert issubclass(SpoolError, ImaError) and issubclass(ManifestError, ImaError)
    host = filled(tmp_path)
    head = Spool(host.spool).head
    assert head is not None
    path_of(host, 3, ".json").unlink()
    with pytest.raises(SpoolError) as caught:
        Spool(host.spool).manifest_bytes(head)
    assert caught.value.reason == "manifest_missing"
