# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every fault of a history in a store, and the verdict, reason and place that it must get."""

from __future__ import annotations

import calendar
import gzip
import hashlib
import json
import os
import shutil
import time
import tracemalloc
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, StoreError
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._shard import anchor_content, anchor_name, digest
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import (
    Unfit,
    Verdict,
    claims_of,
    verify,
    verify_fleet,
    worst,
)
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support


@pytest.fixture(name="origin", scope="module")
def _origin(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store with two hosts, three rotations of each with an anchor; ``h`` (see SHAPE) was booted before the last."""
    directory = tmp_path_factory.mktemp("origin")
    store = support.new_store(directory / "store")
    hosts = [support.Host(directory / "h"), support.Host(directory / "i", name="i", file_hash="sha512")]
    for number in (1, 2, 3):
        for host in hosts:
            host.grow(20 if number == 1 else 6)
        results = {host.name: host.rotate(store, anchor=True) for host in hosts}
        support.write_fleet(store, number, results)
        if number == 2:
            _emulated.reboot(hosts[0].kernel)
    shutil.rmtree(directory / "h")
    shutil.rmtree(directory / "i")
    return str(directory / "store")


@pytest.fixture(name="store")
def _store(origin: str, tmp_path: Path) -> DirectoryStore:
    shutil.copytree(origin, tmp_path / "store")
    return DirectoryStore(str(tmp_path / "store"))


def judged(store: DirectoryStore, host: str = "h", *, claims: bool = True, **options: t.Any) -> Verdict:
    return verify(store, host, claims_of(store)[host] if claims else (), **options)


def broken(store: DirectoryStore, reason: str, sequence: int | None, index: int | None, **options: t.Any) -> Verdict:
    """The verdict must be this one, and the other host's must not change."""
    verdict = judged(store, **options)
    found = (verdict.verdict, verdict.reason, verdict.sequence, verdict.index)
    assert found == ("broken", reason, sequence, index), verdict.message
    assert verdict.message
    assert judged(store, "i").verdict == "consistent"
    return verdict


def remove(store: DirectoryStore, number: int, *which: str) -> None:
    shard, manifest = support.paths(store, support.take(store)[number - 1])
    for name in which:
        os.unlink({"shard": shard, "manifest": manifest}[name])


def without_claims(store: DirectoryStore) -> None:
    shutil.rmtree(os.path.join(store.directory, "fleet"))


def edit(path: str, change: t.Callable[[bytes], bytes]) -> None:
    data = Path(path).read_bytes()
    assert change(data) != data
    Path(path).write_bytes(change(data))


def test_the_history_that_all_these_tests_break(store: DirectoryStore) -> None:
    shape = [(s.manifest["sequence"], s.manifest["first"], s.manifest["count"]) for s in support.take(store)]
    assert shape == SHAPE
    verdict = judged(store)
    assert (verdict.verdict, verdict.reason, verdict.message, verdict.sound) == ("consistent", "", "", True)
    assert len(verdict.warnings) == 1 and "never exported" in verdict.warnings[0], "the tail before the reboot is said"
    assert (verdict.shards, verdict.boots, verdict.emulated) == (len(SHAPE), 2, True)
    assert verdict.records == sum(count for _sequence, _first, count in SHAPE)
    assert (verdict.index, verdict.sequence) == (None, None)
    newest = support.take(store)[-1].manifest
    assert verdict.pcrs == newest["pcrs_end"] and verdict.boot_id == newest["boot_id"]
    assert verdict.aggregate_digest == digest(canonical(newest))
    assert [anchor["index"] for s in support.take(store) for anchor in s.manifest["anchors"]] == [21]


# sequence, first, count
SHAPE = [(1, 0, 7), (2, 7, 7), (3, 14, 7), (4, 21, 7), (5, 0, 7)]


# -- missing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 2, 4, 5])
def test_a_missing_shard(store: DirectoryStore, number: int) -> None:
    first = SHAPE[number - 1][1]
    boot = support.take(store)[number - 1].manifest["boot_id"]
    remove(store, number, "shard")
    assert broken(store, "missing_shard", number, first).boot_id == boot


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_missing_manifest(store: DirectoryStore, number: int) -> None:
    remove(store, number, "manifest")
    broken(store, "missing_manifest", number, SHAPE[number - 1][1])


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_shard_missing_with_its_manifest(store: DirectoryStore, number: int) -> None:
    boot = support.take(store)[number - 1].manifest["boot_id"]
    remove(store, number, "shard", "manifest")
    verdict = broken(store, "missing_shard", number, SHAPE[number - 1][1])
    assert verdict.boot_id == boot


def test_two_neighbours_missing(store: DirectoryStore) -> None:
    remove(store, 2, "shard", "manifest")
    history = support.take(store)
    for path in support.paths(store, history[1]):
        os.unlink(path)
    broken(store, "missing_shard", 2, 7)


def test_the_newest_missing_is_found_by_what_the_fleet_said(store: DirectoryStore) -> None:
    remove(store, 5, "shard", "manifest")
    broken(store, "missing_shard", 5, 7)
    assert judged(store, claims=False).verdict == "consistent", "without the claim nobody can know"


def test_the_newest_manifest_missing_is_found_by_what_the_fleet_said(store: DirectoryStore) -> None:
    remove(store, 5, "manifest")
    broken(store, "missing_shard", 5, 7)
    assert "interrupted" in judged(store, claims=False).warnings[0]


def test_everything_missing(store: DirectoryStore) -> None:
    shutil.rmtree(support.base(store))
    broken(store, "no_shard", None, None)
    assert verify(store, "never-seen", ()).reason == "no_shard"


def test_a_whole_boot_missing(store: DirectoryStore) -> None:
    boot = support.take(store)[0].manifest["boot_id"]
    shutil.rmtree(os.path.join(support.base(store), boot))
    broken(store, "missing_shard", 1, 0)


# -- edited ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 3, 5])
@pytest.mark.parametrize("position", [0, 10, 60, -5, -1])
def test_a_flipped_bit_in_a_shard(store: DirectoryStore, number: int, position: int) -> None:
    path = support.paths(store, support.take(store)[number - 1])[0]
    data = bytearray(Path(path).read_bytes())
    data[position] ^= 1
    Path(path).write_bytes(bytes(data))
    broken(store, "edited_shard", number, SHAPE[number - 1][1])


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: b"",
        lambda data: data + b"\0",
        lambda data: data + data,
        lambda data: gzip.compress(gzip.decompress(data), 1),
        lambda data: gzip.compress(gzip.decompress(data)[:-1]),
        lambda data: gzip.compress(bytes(len(gzip.decompress(data)))),
        lambda data: gzip.compress(bytes(32 << 20)),
    ],
    ids=["short", "cut", "empty", "tail", "twice", "recompressed", "one-byte-less", "zeros", "bomb"],
)
def test_other_bytes_in_a_shard(store: DirectoryStore, change: t.Callable[[bytes], bytes]) -> None:
    edit(support.paths(store, support.take(store)[2])[0], change)
    broken(store, "edited_shard", 3, 14)
    tracemalloc.start()
    judged(store, claims=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_reading_the_fleet_documents_takes_no_more_memory_than_they_need(store: DirectoryStore) -> None:
    tracemalloc.start()
    claims_of(store)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20


def test_a_record_changed_and_recompressed(store: DirectoryStore) -> None:
    sealed = support.take(store)[1]
    records = sealed.records
    records[3] = support.altered(records[3])
    Path(support.paths(store, sealed)[0]).write_bytes(gzip.compress(b"".join(records), 6, mtime=0))
    broken(store, "edited_shard", 2, 7)


def manifest_path(store: DirectoryStore, number: int) -> str:
    return support.paths(store, support.take(store)[number - 1])[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda data: json.dumps(json.loads(data), indent=2).encode(),
        lambda data: data + b"\n",
        lambda data: data.replace(b'"flavour"', b'"Flavour"'),
        lambda data: data.replace(b'"emulated":true', b'"emulated":1'),
        lambda data: data.replace(b'"version":1', b'"version":2'),
        lambda data: data.replace(b'"version":1', b'"version":1,"version":1'),
        lambda data: data.replace(b'"count":7', b'"count":7.0'),
        lambda data: data[:-1],
        lambda data: b"",
        lambda data: b"\xff" * 100,
        lambda data: b"[" * 500000,
        lambda data: data + b" " * (1 << 20),
    ],
    ids=["pretty", "newline", "key", "type", "newer", "twice", "float", "cut", "empty", "not-ascii", "deep", "huge"],
)
@pytest.mark.parametrize("number", [2, 5])
def test_an_edited_manifest(store: DirectoryStore, number: int, change: t.Callable[[bytes], bytes]) -> None:
    edit(manifest_path(store, number), change)
    broken(store, "edited_manifest", number, SHAPE[number - 1][1])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("release", "9.9.9"),
        ("violations", 1),
        ("time", "2020-01-01T00:00:00Z"),
        ("emulated", False),
        ("stored_sha256", "0" * 64),
        ("sha256", "0" * 64),
        ("reset_count", None),
        ("padded", ["sha256"]),
    ],
)
@pytest.mark.parametrize("number", [2, 5])
def test_a_value_changed_in_canonical_form(store: DirectoryStore, number: int, key: str, value: t.Any) -> None:
    """In the middle the next manifest knows the digest; of the newest only the fleet document does."""
    sealed = support.take(store)[number - 1]
    sealed.manifest[key] = value
    Path(manifest_path(store, number)).write_bytes(canonical(sealed.manifest))
    verdict = judged(store)
    assert (verdict.verdict, verdict.sequence) == ("broken", number)
    assert verdict.reason in ("edited_manifest", "edited_shard", "pcr_mismatch")
    assert number == 5 or verdict.reason == "edited_manifest"


HOSTILE = [
    ({"boot_id": "../../../../../etc"}, "edited_manifest"),
    ({"boot_id": "/etc/passwd"}, "edited_manifest"),
    ({"machine_id": "../x"}, "edited_manifest"),
    ({"name": "../../etc/passwd"}, "foreign_manifest"),
    ({"name": "/etc/passwd"}, "foreign_manifest"),
    ({"release": "../../x"}, "edited_manifest"),
    ({"count": 1 << 40}, "edited_manifest"),
    ({"count": 10**30}, "edited_manifest"),
    ({"size": 1 << 53}, "edited_manifest"),
    ({"first": 1 << 53}, "swapped_manifest"),
    ({"sequence": 99999999}, "swapped_manifest"),
    ({"sequence": "2"}, "edited_manifest"),
    ({"pcrs_end": []}, "edited_manifest"),
    ({"pcrs_end": {"10": {"md5": "00"}}}, "edited_manifest"),
    ({"anchors": [{"index": 0, "sequence": 1, "sha256": 5}]}, "edited_manifest"),
    ({"faults": "none"}, "edited_manifest"),
    ({"padded": ["sha1"]}, "edited_manifest"),
]


@pytest.mark.parametrize(("members", "reason"), HOSTILE, ids=[str(number) for number in range(len(HOSTILE))])
def test_a_hostile_manifest(store: DirectoryStore, members: support.Json, reason: str) -> None:
    sealed = support.take(store)[1]
    path = manifest_path(store, 2)
    Path(path).write_bytes(canonical(dict(sealed.manifest, **members)))
    verdict = judged(store)
    assert (verdict.verdict, verdict.reason, verdict.sequence, verdict.index) == ("broken", reason, 2, 7)
    assert len(verdict.message) < 3000


# -- in other places -------------------------------------------------------------------------------------------------


def swap(one: str, other: str) -> None:
    first, second = Path(one).read_bytes(), Path(other).read_bytes()
    Path(one).write_bytes(second)
    Path(other).write_bytes(first)


def test_swapped_shards(store: DirectoryStore) -> None:
    history = support.take(store)
    swap(support.paths(store, history[1])[0], support.paths(store, history[2])[0])
    verdict = broken(store, "swapped_shard", 2, 7)
    assert "shard 3" in verdict.message


def test_swapped_shards_that_are_read_in_pieces(tmp_path: Path) -> None:
    """What their first record is says nothing of the host before it is known that the file is the sealed one."""
    host, store = support.Host(tmp_path / "h", shard_records=1000), support.new_store(tmp_path / "store")
    host.grow(1999)
    host.rotate(store)
    history = support.take(store)
    assert all(len(sealed.raw) > 1 << 16 for sealed in history)
    swap(*(support.paths(store, sealed)[0] for sealed in history))
    verdict = verify(store, "h", ())
    assert (verdict.reason, verdict.sequence, verdict.index) == ("swapped_shard", 1, 0)


def test_swapped_manifests(store: DirectoryStore) -> None:
    swap(manifest_path(store, 2), manifest_path(store, 3))
    broken(store, "swapped_manifest", 2, 7)


def test_a_shard_copied_under_the_next_sequence(store: DirectoryStore) -> None:
    for path in support.paths(store, support.take(store)[4]):
        shutil.copy(path, path.replace("00000005", "00000006"))
    broken(store, "swapped_manifest", 6, 0)


def test_a_shard_twice_under_one_sequence(store: DirectoryStore) -> None:
    for path in support.paths(store, support.take(store)[1]):
        shutil.copy(path, path.replace("00000002-7-7", "00000002-8-7"))
    verdict = broken(store, "repeated_shard", 2, 8)
    assert "sequence 2" in verdict.message


def test_a_second_shard_file_without_manifest(store: DirectoryStore) -> None:
    path = support.paths(store, support.take(store)[1])[0]
    shutil.copy(path, path.replace("00000002-7-7", "00000002-7-6"))
    broken(store, "repeated_shard", 2, 7)


def test_a_foreign_hosts_shard_under_our_name(store: DirectoryStore) -> None:
    ours, theirs = support.take(store)[1], support.take(store, "i")[1]
    shutil.copy(support.paths(store, theirs, "i")[0], support.paths(store, ours)[0])
    broken(store, "edited_shard", 2, 7)


def test_a_foreign_hosts_manifest_under_our_name(store: DirectoryStore) -> None:
    theirs = support.take(store, "i")[1]
    theirs.manifest["boot_id"] = support.take(store)[1].manifest["boot_id"]
    Path(manifest_path(store, 2)).write_bytes(canonical(theirs.manifest))
    broken(store, "foreign_manifest", 2, 7)


def test_a_foreign_hosts_whole_history(store: DirectoryStore) -> None:
    shutil.rmtree(support.base(store))
    shutil.copytree(support.base(store, "i"), support.base(store))
    broken(store, "foreign_manifest", 1, 0)


def test_another_machine_goes_on(store: DirectoryStore) -> None:
    history = support.take(store)
    for sealed in history[2:]:
        sealed.manifest["machine_id"] = "0" * 32
    support.forge(store, history)
    broken(store, "machine_changed", 3, 14, claims=False)


# -- forged with everything re-hashed --------------------------------------------------------------------------------


def test_a_record_altered_and_all_but_the_pcrs_re_hashed(store: DirectoryStore) -> None:
    history = support.take(store)
    records = history[1].records
    records[3] = support.altered(records[3])
    history[1].raw = b"".join(records)
    support.forge(store, history, pcrs=False)
    broken(store, "pcr_mismatch", 2, 7, claims=False)


def test_a_record_altered_without_its_template_digest(store: DirectoryStore) -> None:
    history = support.take(store)
    raw = bytearray(history[1].raw)
    raw[-3] ^= 1
    history[1].raw = bytes(raw)
    support.forge(store, history, pcrs=False)
    broken(store, "bad_record", 2, 13, claims=False)


@pytest.mark.parametrize("number", [1, 2, 5])
def test_everything_re_hashed_up_to_the_newest_manifest(store: DirectoryStore, number: int) -> None:
    """Only what the controller wrote down at the rotations knows better."""
    history = support.take(store)
    records = history[number - 1].records
    records[-1] = support.altered(records[-1])
    history[number - 1].raw = b"".join(records)
    for sealed in history[number - 1 :]:
        sealed.manifest["anchors"] = []
    support.forge(store, history)
    assert judged(store, claims=False).verdict == "consistent"
    verdict = judged(store)
    assert (verdict.verdict, verdict.reason) == ("broken", "edited_manifest")
    assert "edited" in verdict.message and verdict.sequence == (5 if number == 5 else 3)


def test_an_early_rewrite_breaks_the_anchor(store: DirectoryStore) -> None:
    history = support.take(store)
    records = history[0].records
    records[-1] = support.altered(records[-1])
    history[0].raw = b"".join(records)
    support.forge(store, history)
    broken(store, "anchor", 4, 21, claims=False)


def test_a_record_removed_and_everything_re_hashed(store: DirectoryStore) -> None:
    history = support.take(store)
    history[1].raw = b"".join(history[1].records[:-1])
    history[1].manifest["count"] = 6
    support.forge(store, history)
    broken(store, "chain", 3, 14, claims=False)


def test_a_count_that_is_not_the_number_of_records(store: DirectoryStore) -> None:
    history = support.take(store)
    history[4].raw = b"".join(history[4].records[:-1])
    support.forge(store, history)
    broken(store, "count", 5, 0, claims=False)


def test_reordered_records(store: DirectoryStore) -> None:
    history = support.take(store)
    records = history[1].records
    records[0], records[1] = records[1], records[0]
    history[1].raw = b"".join(records)
    support.forge(store, history, pcrs=False)
    broken(store, "pcr_mismatch", 2, 7, claims=False)


def test_reordered_boots(store: DirectoryStore) -> None:
    history = support.take(store)
    support.forge(store, history[4:] + history[:4])
    verdict = judged(store)
    assert (verdict.verdict, verdict.reason) == ("broken", "anchor"), "its anchor names a shard that is not before it"
    for sealed in history:
        sealed.manifest["anchors"] = []
    support.forge(store, history[4:] + history[:4])
    verdict = judged(store)
    assert (verdict.verdict, verdict.reason) == ("broken", "edited_manifest")


def test_a_second_history_of_the_same_name(store: DirectoryStore) -> None:
    """All of it again from sequence 1, in another boot, as after a wiped spool."""
    history = support.take(store)
    boot = "13b0692a-94e1-4061-890d-87c47d9ca675"
    again = [support.Sealed(dict(sealed.manifest, boot_id=boot), sealed.raw) for sealed in history[:2]]
    support.link(again)
    for sealed in again:
        support.put(store, sealed)
    verdict = judged(store)
    assert (verdict.verdict, verdict.reason) == ("broken", "repeated_shard")


def test_the_middle_of_a_boot_as_its_beginning(store: DirectoryStore) -> None:
    history = support.take(store)[4:]
    history[0].raw = b"".join(history[0].records[1:])
    history[0].manifest["count"] = 6
    support.forge(store, history)
    broken(store, "no_boot_aggregate", 1, 0, claims=False)


def test_a_boot_that_does_not_begin_at_zero(store: DirectoryStore) -> None:
    history = support.take(store)
    support.forge(store, history)
    history[4].manifest["pcrs_start"] = history[3].manifest["pcrs_end"]
    Path(manifest_path(store, 5)).write_bytes(canonical(history[4].manifest))
    broken(store, "chain", 5, 0, claims=False)


def test_violations_that_do_not_add_up(store: DirectoryStore) -> None:
    history = support.take(store)
    history[4].manifest["violations"] = 2
    support.forge(store, history)
    broken(store, "pcr_mismatch", 5, 0, claims=False)


def test_a_history_without_any_pcr_is_not_consistent(store: DirectoryStore) -> None:
    """A manifest that names no bank replays to what it says, whatever the records are."""
    history = support.take(store)[4:]
    history[0].manifest.update(pcrs_start={"10": {}}, pcrs_end={"10": {}}, observed=None)
    support.forge(store, history, pcrs=False)
    assert judged(store, claims=False).verdict == "broken"


# -- what the host says of itself ------------------------------------------------------------------------------------


def fault(reason: str, boot_id: str, index: int, lost: bool = True) -> support.Json:
    where = {"boot_id": boot_id, "found": boot_id, "index": index}
    return {"reason": reason, "lost": lost, "message": "it happened", **where}


@pytest.mark.parametrize("reason", ["kexec", "foreign_trim", "pcr_mismatch"])
def test_a_fault_in_a_manifest(store: DirectoryStore, reason: str) -> None:
    history = support.take(store)
    boot = history[3].manifest["boot_id"]
    history[4].manifest["faults"] = [fault(reason, boot, 28)]
    support.forge(store, history)
    verdict = broken(store, reason, 5, 28, claims=False)
    assert verdict.boot_id == boot and "it happened" in verdict.message


def test_a_fault_that_lost_nothing_is_a_warning(store: DirectoryStore) -> None:
    history = support.take(store)
    history[4].manifest["faults"] = [fault("foreign_trim", history[4].manifest["boot_id"], 3, lost=False)]
    support.forge(store, history)
    verdict = judged(store, claims=False)
    assert verdict.verdict == "consistent" and "foreign_trim at index 3" in verdict.warnings[0]


def test_a_new_list_without_a_reset_and_without_a_fault(store: DirectoryStore) -> None:
    history = support.take(store)
    history[4].manifest["reset_count"] = history[3].manifest["reset_count"]
    support.forge(store, history)
    verdict = broken(store, "kexec", 5, 28, claims=False)
    assert verdict.boot_id == history[3].manifest["boot_id"]


def test_a_fault_of_the_walk_does_not_hide_an_edited_shard(store: DirectoryStore) -> None:
    history = support.take(store)
    history[4].manifest["faults"] = [fault("kexec", history[3].manifest["boot_id"], 28)]
    support.forge(store, history)
    edit(support.paths(store, history[2])[0], lambda data: data[:-1])
    broken(store, "edited_shard", 3, 14, claims=False)


# -- anchors ---------------------------------------------------------------------------------------------------------


def test_an_anchor_is_recognised_by_content(store: DirectoryStore) -> None:
    history = support.take(store)
    head = digest(canonical(history[2].manifest))
    record, order = next(ml.read(_once(history[3].raw))), ml.SHA1.byte_order
    assert ml.event_name(record, order).endswith(b"/" + anchor_name(history[2].manifest, head).encode())
    assert ml.file_digest(record, order)[1] == hashlib.sha256(anchor_content(history[2].manifest, head)).digest()


def _once(data: bytes) -> t.Callable[[int], bytes]:
    pieces = iter([data])
    return lambda size: next(pieces, b"")


@pytest.mark.parametrize(
    ("anchor", "index"),
    [
        ({"index": 22, "sequence": 3, "sha256": "0" * 64}, 22),
        ({"index": 21, "sequence": 2, "sha256": "0" * 64}, 21),
        ({"index": 21, "sequence": 4, "sha256": "0" * 64}, 21),
        ({"index": 21, "sequence": 5, "sha256": "0" * 64}, 21),
        ({"index": 27000, "sequence": 3, "sha256": "0" * 64}, 21),
        ({"index": 0, "sequence": 3, "sha256": "0" * 64}, 21),
    ],
)
def test_an_edited_anchor(store: DirectoryStore, anchor: support.Json, index: int) -> None:
    history = support.take(store)
    history[3].manifest["anchors"] = [anchor]
    support.forge(store, history)
    broken(store, "anchor", 4, index, claims=False)


@pytest.mark.parametrize("algorithm", [b"foo:", b"shake_128:", b"verity:sha256:", b"\xff\xfe:", b":"])
def test_an_anchors_record_with_a_hash_that_nobody_knows(store: DirectoryStore, algorithm: bytes) -> None:
    """The host chooses every byte of a record."""
    history = support.take(store)
    records = history[3].records
    record = next(ml.read(_once(records[0])))
    values = ml.fields(record, ml.SHA1.byte_order)
    values[0] = algorithm + b"\0" + bytes(32)
    records[0] = ml.encode(10, record.template, values, ml.SHA1)
    history[3].raw = b"".join(records)
    support.forge(store, history)
    assert judged(store, claims=False).reason in ("anchor", "bad_record")


# -- what the fleet documents say ------------------------------------------------------------------------------------


def said(reason: str, **where: t.Any) -> support.Json:
    return {"claim": dict({"status": "missing", "reason": reason, "message": "so it said"}, **where)}


@pytest.mark.parametrize("reason", ["foreign_trim", "equivocation", "machine_changed", "store_diverged", "spool_gap"])
def test_a_rotation_that_found_a_fault(store: DirectoryStore, reason: str) -> None:
    boot = support.take(store)[4].manifest["boot_id"]
    support.write_fleet(store, 4, {"h": said(reason, index=7, boot_id=boot)})
    verdict = broken(store, reason, None, 7)
    assert verdict.boot_id == boot and verdict.message == "so it said"


def test_a_later_good_rotation_ends_the_warning(store: DirectoryStore) -> None:
    run = store.runs()[2]
    claim = store.run(run)["hosts"]["h"]
    support.write_fleet(store, 4, {"h": said("unreachable")})
    assert "unreachable" in judged(store).warnings[-1]
    support.write_fleet(store, 5, {"h": {"claim": claim}})
    assert all("unreachable" not in warning for warning in judged(store).warnings)


@pytest.mark.parametrize("reason", ["unreachable", "failed", "locked", "list_busy", "no_space", "not_run"])
def test_a_host_that_was_missing_is_consistent_with_a_warning(store: DirectoryStore, reason: str) -> None:
    support.write_fleet(store, 4, {"h": said(reason)})
    verdict = judged(store)
    assert verdict.verdict == "consistent" and reason in verdict.warnings[-1]


@pytest.mark.parametrize(("key", "value"), [("pcrs", {"10": {"sha1": "0" * 40}}), ("index", 6)])
def test_a_claim_that_does_not_fit(store: DirectoryStore, key: str, value: t.Any) -> None:
    claim = dict(store.run(store.runs()[2])["hosts"]["h"], **{key: value})
    support.write_fleet(store, 4, {"h": {"claim": claim}})
    broken(store, "claim_mismatch", 5, claim["index"])


def fleet_path(store: DirectoryStore, number: int = 1) -> str:
    return os.path.join(store.directory, "fleet", store.runs()[number - 1] + ".json")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda data: data + b"\n", "not_canonical"),
        (lambda data: json.dumps(json.loads(data), indent=1, sort_keys=True).encode(), "not_canonical"),
        (lambda data: data[:-1], "not_json"),
        (lambda data: b"", "not_json"),
        (lambda data: data.replace(b'"version":1', b'"version":2'), "newer_version"),
        (lambda data: data.replace(b'"status":"present"', b'"status":"perfect"'), "schema"),
        (lambda data: data.replace(b'"emulated":true', b'"emulated":1'), "schema"),
    ],
    ids=["newline", "pretty", "cut", "empty", "newer", "status", "type"],
)
def test_a_fleet_document_that_is_not_ours(
    store: DirectoryStore, change: t.Callable[[bytes], bytes], reason: str
) -> None:
    edit(fleet_path(store), change)
    with pytest.raises(StoreError) as caught:
        verify_fleet(store, None, 0, ["broken"])
    assert caught.value.reason == reason and store.runs()[0] in str(caught.value)


def test_a_renamed_fleet_document(store: DirectoryStore) -> None:
    path = fleet_path(store)
    os.rename(path, path.replace("00000001", "000000aa"))
    with pytest.raises(StoreError) as caught:
        verify_fleet(store, None, 0, ["broken"])
    assert caught.value.reason == "fleet_document"


def test_an_edited_claim_in_a_fleet_document(store: DirectoryStore) -> None:
    document = store.run(store.runs()[0])
    document["hosts"]["h"]["aggregate_digest"] = "0" * 64
    Path(fleet_path(store)).write_bytes(canonical(document))
    broken(store, "edited_manifest", 3, 21)


@pytest.mark.parametrize("kind", ["symlink", "directory"])
def test_a_fleet_document_that_is_no_file(store: DirectoryStore, tmp_path: Path, kind: str) -> None:
    path = fleet_path(store)
    os.rename(path, tmp_path / "elsewhere")
    if kind == "symlink":
        os.symlink(tmp_path / "elsewhere", path)
    else:
        os.mkdir(path)
    with pytest.raises(ImaError):
        verify_fleet(store, None, 0, ["broken"])


# -- stale, and whole fleets -----------------------------------------------------------------------------------------


def test_stale(store: DirectoryStore) -> None:
    seen = judged(store).seen
    assert seen == store.run(store.runs()[2])["time"]
    now = float(_seconds(seen))
    assert judged(store, max_age=100, now=now + 100).verdict == "consistent"
    verdict = judged(store, max_age=100, now=now + 101)
    assert (verdict.verdict, verdict.reason) == ("stale", "stale") and seen in verdict.message
    assert judged(store, max_age=0, now=now + 10**9).verdict == "consistent"


def _seconds(text: str) -> int:
    return calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ"))


def test_the_controllers_clock_goes_before_the_hosts(store: DirectoryStore) -> None:
    history = support.take(store)
    history[4].manifest["time"] = "2099-01-01T00:00:00Z"
    support.forge(store, history)
    assert judged(store, claims=False).seen == "", "a time in the future does not count"
    assert any("future" in warning for warning in judged(store, claims=False).warnings)
    assert judged(store).seen == store.run(store.runs()[2])["time"]


@pytest.mark.parametrize("when", ["9999-99-99T99:99:99Z", "2026-02-31T00:00:00Z", "0000-00-00T00:00:00Z"])
def test_a_time_that_is_none_is_stale(store: DirectoryStore, when: str) -> None:
    history = support.take(store)
    history[4].manifest["time"] = when
    support.forge(store, history)
    assert judged(store, claims=False, max_age=10).verdict == "stale"


def test_broken_goes_before_stale(store: DirectoryStore) -> None:
    remove(store, 2, "shard")
    assert judged(store, max_age=1, now=1e11).verdict == "broken"


def test_a_fleet(store: DirectoryStore) -> None:
    result = verify_fleet(store, None, 0, ["broken", "stale"])
    assert result["verdict"] == "consistent" and sorted(result["hosts"]) == ["h", "i"]
    assert result["counts"] == {"attested": 0, "consistent": 2, "stale": 0, "broken": 0}
    assert result["changed"] is False
    assert list(verify_fleet(store, ["i", "h"], 0, [])["hosts"]) == ["h", "i"], "in the same order each time"
    json.dumps(result)
    with pytest.raises(Unfit) as caught:
        verify_fleet(store, None, 0, ["consistent"])
    assert caught.value.reason == "consistent" and "2 of 2" in str(caught.value)


def test_a_fleet_with_a_broken_a_stale_and_a_missing_host(store: DirectoryStore) -> None:
    support.write_fleet(store, 4, {"i": said("unreachable"), "lost": said("unreachable")})
    remove(store, 2, "shard")
    with pytest.raises(Unfit) as caught:
        verify_fleet(store, None, 1, ["broken"])
    details = caught.value.result()
    assert details["reason"] == "missing_shard" and details["verdict"] == "broken"
    assert {host: found["verdict"] for host, found in details["hosts"].items()}["lost"] == "broken"
    assert details["counts"]["broken"] == 2 and details["hosts"]["lost"]["reason"] == "no_shard"
    assert verify_fleet(store, None, 0, [])["verdict"] == "broken", "whoever does not want to fail gets the verdicts"
    assert list(verify_fleet(store, ["i"], 0, ["broken"])["hosts"]) == ["i"]
    with pytest.raises(Unfit) as caught:
        verify_fleet(store, ["nobody"], 0, ["broken"])
    assert caught.value.reason == "no_shard"


def test_stale_hosts_fail_only_when_asked(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 4e9)
    result = verify_fleet(store, None, 3600, ["broken"])
    assert result["verdict"] == "stale" and result["counts"]["stale"] == 2
    with pytest.raises(Unfit) as caught:
        verify_fleet(store, None, 3600, ["stale"])
    assert caught.value.reason == "stale"


def test_an_empty_store(tmp_path: Path) -> None:
    """It may be a mount point whose store is not mounted: that is no good verdict."""
    with pytest.raises(ImaError) as caught:
        verify_fleet(DirectoryStore(str(tmp_path)), None, 0, ["broken"])
    assert caught.value.reason == "no_hosts"


def test_the_worst() -> None:
    assert worst(["attested", "stale", "consistent"]) == "stale" and worst(["stale", "broken"]) == "broken"
    assert worst(["attested"]) == "attested"


def test_verifying_changes_nothing(store: DirectoryStore) -> None:
    before = support.tree(store.directory)
    verify_fleet(store, None, 10, [])
    assert support.tree(store.directory) == before


# -- shards that the store's lifecycle removed ---------------------------------------------------------------------


def keep_for(store: DirectoryStore, days: int) -> None:
    support.write(os.path.join(store.directory, "retention.json"), canonical({"version": 1, "shard_days": days}))


def old(monkeypatch: pytest.MonkeyPatch, days: int) -> None:
    now = time.time() + days * 86400
    monkeypatch.setattr(time, "time", lambda: now)


def test_expired_shards_are_counted_and_not_missed(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    keep_for(store, 30)
    paths = [support.paths(store, sealed)[0] for sealed in support.take(store)[:2]]
    for path in paths:
        os.unlink(path)
    assert judged(store, claims=False).reason == "missing_shard", "they are not old yet"
    assert store.head("h") is None
    old(monkeypatch, 31)
    verdict = judged(store, claims=False)
    assert (verdict.verdict, verdict.expired) == ("consistent", 2)
    assert any("2 shards expired" in said for said in verdict.warnings)
    assert store.head("h") is not None and store.expired("h") == 2


def test_what_a_lifecycle_removed_in_a_store_with_versions_was_not_somebody(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_for(store, 30)
    old(monkeypatch, 31)
    for sealed in support.take(store)[:2]:
        os.unlink(support.paths(store, sealed)[0])
    gone, other = [entry.shard for entry in store.entries("h")[:2]], store.entries("h")[2].shard
    seen = dict.fromkeys(gone, False)
    monkeypatch.setattr(DirectoryStore, "rewritten", lambda self, host: seen)
    assert not any("somebody" in said for said in judged(store, claims=False).warnings)
    seen[other] = False
    assert any("somebody removed 1 objects" in said for said in judged(store, claims=False).warnings)
    seen[gone[0]] = True
    assert judged(store, claims=False).reason == "rewritten"


def test_a_hole_behind_a_shard_that_is_there_never_expired(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep_for(store, 30)
    old(monkeypatch, 31)
    remove(store, 2, "shard")
    assert judged(store, claims=False).reason == "missing_shard" and store.expired("h") == 0


def test_nothing_expires_in_a_store_that_says_nothing_of_it(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old(monkeypatch, 10000)
    remove(store, 1, "shard")
    assert judged(store, claims=False).reason == "missing_shard"
