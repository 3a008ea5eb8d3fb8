# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One contract: what a store promises holds in a directory, on a real SFTP server and on a real S3 server."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import os
import tracemalloc
import typing as t
from pathlib import Path

import places
import pytest
from conftest import KINDS, MakePlace
from places import Place

from ansible_collections.integrity.ima.plugins.module_utils import _host as host_side
from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils import _protocol
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, ManifestError
from ansible_collections.integrity.ima.plugins.module_utils._retention import prune
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._shard import digest
from ansible_collections.integrity.ima.plugins.module_utils._stitch import stitch
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Store
from ansible_collections.integrity.ima.plugins.module_utils._store._objects import hashed
from ansible_collections.integrity.ima.plugins.module_utils._verifier import claims_of, verify, verify_fleet
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils.test_tpm import SoftTpm

FORMAT = b'{"format":"integrity.ima store","version":1}'
NAMES = ("web 1/ä", "..", "db-2")  # a path is none of what a host is called


class Died(BaseException):
    """The controller's process is gone."""


def reason_of(function: t.Callable[[], t.Any]) -> str:
    with pytest.raises(ImaError) as caught:
        function()
    return str(caught.value.reason)


def fleet(directory: Path) -> list[support.Host]:
    """One host of each flavour, under names that are none of a file system's."""
    return [
        support.Host(directory / str(number), name=name, flavour=flavour, shard_records=100)
        for number, (name, flavour) in enumerate(zip(NAMES, support.FLAVOURS))
    ]


# -- whole rotations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "direct"), [("directory", False), ("sftp", False), ("s3", False), ("s3", True)])
def test_three_hosts_rotate_into_it_and_all_of_it_verifies(
    tmp_path: Path, make_place: MakePlace, kind: str, direct: bool
) -> None:
    place, hosts = make_place(kind), fleet(tmp_path / "hosts")
    results = {}
    for host in hosts:
        host.grow(130)
        result = results[host.name] = places.rotate(host, place, direct=direct)
        assert (result["changed"], result["claim"]["pcrs"], result["exported"]) == (True, host.pcrs(), 131)
        assert (result["trimmed"], host.live()) == ((0, 131) if host.flavour == "export_only" else (131, 0))
    support.write_fleet(t.cast(t.Any, place.open()), 1, results)
    files, store = place.files(), place.open()
    for host in hosts:
        before = support.tree(host.directory)
        again = places.rotate(host, place, direct=direct)
        assert (again["changed"], again["rounds"]) == (False, 1) and support.tree(host.directory) == before

        assert store_bytes(store, host.name) == host.recorded()
    assert place.files() == files, "rotating again changes nothing"
    assert store.hosts() == sorted(NAMES) and len(store.runs()) == 1
    verdicts = verify_fleet(store, None, 3600, ())
    assert (verdicts["verdict"], verdicts["counts"]["consistent"]) == ("consistent", 3)
    names = {name.split("/")[1] for name in files if name.startswith("hosts/")}
    assert names == {"web%201%2F%C3%A4", "%2E.", "db-2"}


def store_bytes(store: Store, name: str) -> bytes:
    """A host's records, as the store gives them."""
    found = b""
    for entry in store.entries(name):
        with store.open_shard(name, entry) as file:
            found += support.gzip.decompress(file.read())
    return found


def test_the_same_hosts_make_the_same_tree_in_every_store(tmp_path: Path, make_place: MakePlace) -> None:
    """Moving from one store to another is a copy: names and bytes are read here by three programs of their own."""
    hosts = fleet(tmp_path / "hosts")
    ways = [(make_place(kind), direct) for kind, direct in (*((kind, False) for kind in KINDS), ("s3", True))]
    for grown in (130, 40):
        for host in hosts:
            host.grow(grown)
        for place, direct in ways:
            for host in hosts:
                places.rotate(host, place, direct=direct)
    trees = [place.tree() for place, _direct in ways]
    assert len(trees[0]) >= 3 * 3 * 2 + 1 and "format.json" in trees[0]
    assert trees[1] == trees[0] and trees[2] == trees[0] and trees[3] == trees[0]


def test_a_copy_of_a_store_goes_on_as_the_store(tmp_path: Path, make_place: MakePlace) -> None:
    host = support.Host(tmp_path / "h")
    host.grow(20)
    now = make_place("directory")
    places.delivered(host, now)
    for kind in ("sftp", "s3"):
        if kind == "sftp":
            after = make_place(kind)
            copy_by_sftp(now, after)
        else:
            after = make_place(kind)
            for name, data in now.files().items():
                after.write(name, data)
        assert after.tree() == now.tree()
        host.grow(5)
        assert places.delivered(host, after)["delivered"] == 1
        now = after
    assert verify(now.open(), "h", ()).verdict == "consistent"


def copy_by_sftp(source: Place, sink: Place) -> None:
    """As ``sftp``'s command ``put -r`` would do it."""
    store = t.cast(t.Any, sink.open())._objects
    made = store._connection()
    for name, data in source.files().items():
        parts = name.split("/")[:-1]
        for depth in range(len(parts)):
            with contextlib.suppress(OSError):
                made.mkdir(f"{store._root}/{'/'.join(parts[: depth + 1])}")
        sink.write(name, data)


def test_a_long_backlog_and_small_chunks(tmp_path: Path, place: Place) -> None:
    host = support.Host(tmp_path / "h", shard_records=40)
    host.grow(199)
    for direct in place.modes:
        result = places.rotate(host, place, direct=direct, chunk_bytes=4096)
        assert result["delivered"] == (5 if not direct else 2)
        host.grow(80)
    assert places.nothing_lost(host, place.files()) >= 200


# -- write-once -------------------------------------------------------------------------------------------------------


def first_of(store: Store) -> tuple[t.Any, bytes, bytes]:
    """The first shard's entry, the bytes of its manifest, and its own."""
    entry = store.entries("h")[0]
    with store.open_shard("h", entry) as file:
        return entry, store.manifest_bytes("h", entry), file.read()


def test_nothing_that_is_there_is_written_over(place: Place, host: support.Host) -> None:
    places.rotate(host, place)
    store, before = place.open(), place.files()
    support.write_fleet(t.cast(t.Any, store), 1, {"h": None})
    before = place.files()
    entry, data, stored = first_of(store)
    manifest = store.manifest("h", entry)
    sealed = support.Sealed(dict(manifest), support.gzip.decompress(stored))
    other = support.Sealed(dict(manifest), b"".join([*sealed.records[:-1], support.altered(sealed.records[-1])]))
    support.describe(other)

    def deliver(one: support.Sealed) -> None:
        with store.delivering("h"):
            store.receive("h", digest(canonical(one.manifest)), 0, support.zipped(one.raw))
            store.finish("h", one.manifest)

    assert reason_of(lambda: deliver(other)) == "exists_different"
    assert reason_of(lambda: deliver(support.Sealed(dict(manifest, violations=1), sealed.raw))) == "exists_different"
    run = store.runs()[0]
    assert reason_of(lambda: store.write_run(dict(store.run(run), time="2020-01-01T00:00:00Z"))) == "exists_different"
    assert place.files() == before
    deliver(sealed)  # the same bytes are no other
    assert store.put_run(run, before[f"fleet/{run}.json"]) is None
    assert place.files() == before


def test_what_does_not_fit_its_manifest_is_not_published(
    place: Place, make_place: MakePlace, host: support.Host
) -> None:
    source = make_place("directory")
    places.rotate(host, source)
    manifest = source.open().manifest("h", source.open().entries("h")[0])
    store = place.open()
    with store.delivering("h"):
        store.receive("h", digest(canonical(manifest)), 0, b"x" * manifest["stored_size"])
        with pytest.raises(ManifestError) as caught:
            store.finish("h", manifest)
        assert caught.value.reason == "shard_altered" and store.unfinished("h") is None
    assert set(place.files()) == {"format.json"}


# -- what is there ----------------------------------------------------------------------------------------------------


def test_names_entries_and_head(place: Place, host: support.Host) -> None:
    store = place.open()
    assert (store.hosts(), store.runs(), store.head("h"), store.entries("h"), store.quotes("h")) == (
        [],
        [],
        None,
        [],
        [],
    )
    assert (store.identity("h"), store.evidence("h"), store.names("h")) == (None, [], (set(), []))
    result = places.rotate(host, place)
    store = place.open()
    assert store.hosts() == ["h"] and place.files()["format.json"] == FORMAT
    assert [(entry.sequence, entry.first, entry.count) for entry in store.entries("h")] == [(1, 0, 100), (2, 100, 100)]
    head = store.head("h")
    assert head is not None and head.digest == result["aggregate_digest"]
    known, other = store.names("h")
    assert (len(known), other) == (4, [])
    assert store.has("h", store.entries("h")[1], head.digest)
    assert not store.has("h", store.entries("h")[1], "0" * 64)
    assert not store.has("h", dataclasses.replace(store.entries("h")[1], sequence=3), head.digest)


def test_foreign_names_are_told_and_harm_nothing(place: Place, host: support.Host) -> None:
    places.rotate(host, place)
    boot = place.open().entries("h")[0].boot_id
    foreign = [f"{boot}/00000003-200-1.ima.gz.old", f"{boot}/notes.txt", "README", f"{boot}/00000009-1-1.JSON"]
    for name in foreign:
        place.write(f"hosts/h/{name}", b"foreign")
    store = place.open()
    assert store.names("h")[1] == sorted(foreign) and len(store.entries("h")) == 2
    verdict = verify(store, "h", ())
    assert verdict.verdict == "consistent" and any("4 names" in warning for warning in verdict.warnings)
    host.grow(3)
    assert places.rotate(host, place)["delivered"] == 1


def test_a_place_that_holds_something_else_is_refused(make_place: MakePlace) -> None:
    for kind in KINDS:
        for content, reason in (
            (b'{"format":"integrity.ima store","version":2}', "newer_version"),
            (b"", "store_foreign"),
        ):
            place = make_place(kind)
            place.write("format.json", content)
            assert reason_of(place.open) == reason
        place = make_place(kind)
        place.write("holiday.jpg", b"")
        assert reason_of(place.open) == "store_foreign"


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_another_fork_begins_meanwhile_is_one(
    tmp_path: Path, make_place: MakePlace, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the question for the format and the one for anything else, the first rotation of another host ends."""
    place, host = make_place(kind), support.Host(tmp_path / "h")
    objects = type(t.cast(t.Any, place.open())._objects)
    real, begun = objects.read, t.cast("list[str]", [])

    def read(self: t.Any, name: str, limit: int) -> bytes:
        try:
            return t.cast(bytes, real(self, name, limit))
        except FileNotFoundError:
            if not begun:
                begun.append(name)
                places.rotate(host, place)
            raise

    monkeypatch.setattr(objects, "read", read)
    store = place.open()
    assert begun == ["format.json"] and len(store.entries("h")) == 1


# -- deliveries that were cut off -------------------------------------------------------------------------------------


def test_an_unfinished_delivery_is_gone_on_with(place: Place, big_host: support.Host) -> None:
    def dies_at_third(number: int, answer: t.Any) -> t.Any:
        if number == 3:
            raise Died
        return answer

    with pytest.raises(Died):
        big_host.rotation(place.open(), call=support.Wire(big_host, dies_at_third)).run()
    assert set(place.files()) == {"format.json"} and big_host.live() == 3000
    unfinished = place.open().unfinished("h")
    assert unfinished is not None and unfinished[1] == 2 * support.CHUNK
    big_host.sent = 0
    places.delivered(big_host, place)
    entry = place.open().entries("h")[0]
    assert big_host.sent == len(place.files()[f"hosts/h/{entry.shard}"]) - 2 * support.CHUNK


def test_two_rotations_of_one_host_do_not_overlap(place: Place, host: support.Host) -> None:
    store = place.open()
    with store.delivering("h"):
        assert reason_of(lambda: places.rotate(host, place)) == "store_busy"
    places.delivered(host, place)


# -- beside the shards ------------------------------------------------------------------------------------------------


def test_identity_and_quotes_make_a_history_attested(tmp_path: Path, place: Place, host: support.Host) -> None:
    store = place.open()
    tpm = SoftTpm(host, t.cast(t.Any, store))
    tpm.enroll()
    places.rotate(host, place)
    quote = tpm.quote()
    store.put_quote("h", quote)
    files = place.files()
    store.put_quote("h", quote)
    assert place.files() == files and len(store.quotes("h")) == 1
    assert {"hosts/h/identity.json"} <= set(files)
    verdict = verify(place.open(), "h", ())
    assert (verdict.verdict, verdict.attested_to, verdict.quotes) == ("attested", 200, 1)
    identity = dict(store.identity("h") or {}, time="2020-01-01T00:00:00Z")
    assert reason_of(lambda: store.put_identity("h", canonical(identity))) == "exists_different"
    assert place.files() == files


def test_evidence_is_kept_once_and_under_its_own_digest(place: Place, host: support.Host) -> None:
    places.rotate(host, place)
    store, before = place.open(), place.files()
    data = b'{"another":"manifest"}'
    name = f"evidence/{hashlib.sha256(data).hexdigest()}.json"
    assert [store.keep_evidence("h", data) for _twice in range(2)] == [name, name]
    assert store.evidence("h") == [name.partition("/")[2]] and store.names("h")[1] == []
    assert place.files() == dict(before, **{f"hosts/h/{name}": data})


def test_runs_are_listed_in_order_and_give_the_verifier_its_claims(place: Place, host: support.Host) -> None:
    result = places.rotate(host, place)
    store = place.open()
    for number in (2, 1):
        support.write_fleet(t.cast(t.Any, store), number, {"h": result})
    assert [run[:17] for run in store.runs()] == ["20260102T030401Z-"[:17], "20260102T030402Z-"[:17]]
    assert verify(store, "h", claims_of(store)["h"]).verdict == "consistent"
    assert reason_of(lambda: store.run("20260102T030409Z-00000009")) == "fleet_document"


def test_the_whole_list_is_stitched_from_it(tmp_path: Path, place: Place, host: support.Host) -> None:
    places.rotate(host, place)
    binary, text = str(tmp_path / "binary"), str(tmp_path / "ascii")
    result = stitch(place.open(), "h", "", binary, text, False)
    assert (result["records"], result["pcrs"], result["changed"]) == (200, host.pcrs(), True)
    assert Path(binary).read_bytes() == host.recorded()
    records = ml.read(io.BytesIO(host.recorded()).read)
    assert Path(text).read_bytes() == b"".join(ml.to_ascii(record, ml.SHA1.byte_order) for record in records)


# -- damage -----------------------------------------------------------------------------------------------------------

DAMAGE: list[tuple[str, t.Callable[[bytes], bytes], str]] = [
    ("flipped", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "edited_shard"),
    ("shorter", lambda data: data[:-1], "edited_shard"),
    ("longer", lambda data: data + b"x", "edited_shard"),
    ("empty", lambda data: b"", "edited_shard"),
]


def test_damage_is_confirmed_by_no_store_and_named_by_the_verifier(place: Place, host: support.Host) -> None:
    """Somebody with an account on the server itself: versions and locks are the server's answer to that."""
    places.rotate(host, place)
    store = place.open()
    entry, data, stored = first_of(store)
    assert store.confirms("h", entry, digest(data))
    for _name, change, reason in DAMAGE:
        place.write(f"hosts/h/{entry.shard}", change(stored))
        assert not place.open().confirms("h", entry, digest(data))
        verdict = verify(place.open(), "h", ())
        assert (verdict.verdict, verdict.reason, verdict.index) == ("broken", reason, 0)
        place.write(f"hosts/h/{entry.shard}", stored)
    assert place.open().confirms("h", entry, digest(data)) and verify(place.open(), "h", ()).verdict == "consistent"
    place.write(f"hosts/h/{entry.manifest}", data.replace(b'"violations":0', b'"violations":1'))
    assert not place.open().confirms("h", entry, digest(data))


def test_a_shard_is_read_and_confirmed_in_little_memory(place: Place) -> None:
    """What the store has is hashed while it comes, however fast it comes."""
    data = os.urandom(24 << 20)
    place.write("big", data)
    place.write("format.json", FORMAT)
    store = t.cast(t.Any, place.open())._objects
    tracemalloc.start()
    assert store.confirms("big", len(data), hashlib.sha256(data).hexdigest())
    with store.open("big") as file:
        assert hashed(file) == (len(data), hashlib.sha256(data).hexdigest())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20


def test_nothing_is_pruned_that_the_store_does_not_confirm_now(place: Place, host: support.Host) -> None:
    host.grow(200)
    places.rotate(host, place)
    with open(host.config, "a", encoding="utf-8") as file:
        file.write("[retention]\nkeep_shards=1\n")
    store = place.open()
    entry, _data, stored = first_of(store)

    def call(one_round: support.Json) -> support.Json:
        return host_side.prune(_protocol.load(host.config), one_round["confirmed"], False, one_round["after"])

    def held() -> list[str]:
        directory = os.path.join(host.spool, "shards", entry.boot_id)
        return sorted(name for name in os.listdir(directory) if name.endswith(".gz"))

    before = held()
    place.write(f"hosts/h/{entry.shard}", stored[:-1] + bytes([stored[-1] ^ 1]))
    assert reason_of(lambda: prune(place.open(), "h", call, False)) == "not_confirmed" and held() == before
    place.write(f"hosts/h/{entry.shard}", stored)
    assert prune(place.open(), "h", call, True)["pruned"] == 3 and held() == before
    assert prune(place.open(), "h", call, False) == {"changed": True, "pruned": 3, "kept": 1}
    assert held() == before[-1:]
    assert prune(place.open(), "h", call, False)["changed"] is False
    host.grow(5)
    assert places.rotate(host, place)["delivered"] == 1 and verify(place.open(), "h", ()).verdict == "consistent"
