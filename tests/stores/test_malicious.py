# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A hostile host before each store: whatever it sends, no object appears but its own, and what is there stays."""

from __future__ import annotations

import base64
import copy
import gzip
import json
import shutil
import tracemalloc
import typing as t
from pathlib import Path

import places
import pytest
from conftest import MakePlace
from places import Place

from ansible_collections.integrity.ima.plugins.module_utils import _rotation, _upload
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, StoreError
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._shard import digest
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Store
from ansible_collections.integrity.ima.plugins.module_utils._verifier import verify
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import test_rotation as lies

WAYS = (("directory", False), ("sftp", False), ("s3", False), ("s3", True))
T = t.TypeVar("T")
Change = t.Callable[[int, support.Json], t.Any]


class Arena:
    """A store in which another host's history and a fleet document lie, and a host that is about to lie."""

    def __init__(self, directory: Path, place: Place, direct: bool) -> None:
        self.directory, self.place, self.direct = directory, place, direct
        self.victim = support.Host(directory / "victim", name="victim", shard_records=100)
        self.victim.grow(49)
        self.old = self.recording(self.victim)
        self.host = support.Host(directory / "h", shard_records=100)
        self.host.grow(199)
        self.store: Store = place.open()
        support.write_fleet(t.cast(t.Any, self.store), 1, {"victim": None})
        self.before = place.files()
        self.canned: list[support.Json] = []

    def recording(self, host: support.Host) -> list[support.Json]:
        """Rotate honestly; return the answers."""
        answers = []

        def note(number: int, answer: support.Json) -> support.Json:
            answers.append(copy.deepcopy(answer))
            return answer

        options: t.Any = {"chunk_bytes": 1 << 20}
        host.rotation(self.place.open(), call=support.Wire(host, note, **options), direct=self.direct, **options).run()
        return answers

    def lie(self, call: t.Any, **options: t.Any) -> ImaError:
        """Rotate with that; it must fail by a reason, and only evidence may have come."""
        chosen: t.Any = {"chunk_bytes": 1 << 20, "direct": self.direct, **options}
        with pytest.raises(ImaError) as caught:
            self.host.rotation(self.store, call=call, **chosen).run()
        assert caught.value.reason and len(str(caught.value)) < 5000 and "X-Amz" not in str(caught.value)
        return caught.value

    def told(self, change: Change, **options: t.Any) -> ImaError:
        """Rotate with every answer changed."""
        return self.lie(support.Wire(self.host, change, chunk_bytes=options.get("chunk_bytes", 1 << 20)), **options)

    def said(self, change: Change) -> ImaError:
        """As :meth:`told`, with one honest first answer for all lies: each begins where the one before it did."""
        if not self.canned:
            self.canned.append(self.host.answer(self.first_round(), chunk_bytes=1 << 20))
        return self.lie(lambda one_round: change(1, copy.deepcopy(self.canned[0])))

    def first_round(self) -> support.Json:
        """What the controller asks first."""
        return {"have": None, "part": None, "export": True, "nonce": None, "direct": self.direct}

    def some(self, lies_: t.Sequence[T]) -> t.Sequence[T]:
        """All of them where the code that judges differs, a sample in the other stores."""
        return lies_ if self.direct or self.place.kind == "directory" else lies_[::4]

    def unharmed(self, *, own: bool = False) -> dict[str, bytes]:
        """Everything that was there is, unaltered; ``own``: the host may have new objects below its own name."""
        after = self.place.files()
        assert {name: after.get(name) for name in self.before} == self.before
        new = {name: data for name, data in after.items() if name not in self.before}
        assert all(name.startswith("hosts/h/") for name in new) and (own or not new), sorted(new)
        assert not any(part in ("..", ".", "") for name in after for part in name.split("/"))
        return new

    def ends_well(self) -> None:
        """The host, honest again, delivers everything."""
        result = self.host.rotate(self.place.open(), direct=self.direct, chunk_bytes=1 << 20)
        self.unharmed(own=True)
        assert places.stored(self.place.files()) == self.host.recorded() and self.host.live() == 0 and result["claim"]


@pytest.fixture(params=WAYS, ids=["directory", "sftp", "s3", "s3-direct"])
def arena(tmp_path: Path, make_place: MakePlace, request: pytest.FixtureRequest) -> Arena:
    kind, direct = request.param
    return Arena(tmp_path, make_place(kind), direct)


@pytest.fixture
def direct(tmp_path: Path, make_place: MakePlace) -> Arena:
    return Arena(tmp_path, make_place("s3"), True)


def reasons(arena: Arena, changes: t.Mapping[str, Change]) -> dict[str, str]:
    return {name: arena.said(change).reason for name, change in changes.items()}


# -- names, sizes, values ---------------------------------------------------------------------------------------------


def test_names_that_lead_elsewhere(arena: Arena) -> None:
    paths = ["../victim", "/etc/passwd", "..", ".", "a/b", "a\0b", "%2e%2e", "%00", "evidence", "victim", "h\n", "H"]
    paths = list(arena.some(paths))
    names = {path: lies.manifest_with(name=path) for path in paths}
    assert set(reasons(arena, names).values()) <= {"host_name", "schema"}
    boots = {path: lies.manifest_with(boot_id=path) for path in paths}
    assert set(reasons(arena, boots).values()) == {"schema"}
    arena.unharmed()
    arena.ends_well()


def test_values_types_and_sizes_that_no_module_gives(arena: Arena) -> None:
    changes = {
        f"{key}-{number}": lies.setting(**{key: value}) for number, (key, value) in enumerate(arena.some(lies.WRONG))
    }
    assert set(reasons(arena, changes).values()) == {"bad_answer"}
    for members, reason in arena.some(lies.VALUES):
        assert arena.said(lies.manifest_with(**members)).reason == reason, members
    for text in ("", "null", "[" * 100000, '{"a":1,"a":1}', '{"version":NaN}', "{} "):
        assert arena.said(lies.setting(manifests=[text])).reason in ("not_json", "schema")
    huge = lies.manifest_with(stored_size=(4 << 30) + 1)
    assert arena.said(huge).reason == "too_large"
    arena.unharmed()
    arena.ends_well()


# -- bombs and other bytes --------------------------------------------------------------------------------------------


def test_a_bomb(arena: Arena) -> None:
    """A few KiB that unpack to 64 MiB. Directly delivered it is the host's own object, and breaks its own history."""
    bomb = gzip.compress(bytes(64 << 20), 9, mtime=0)
    made = lies.forged(arena.host, b"", bomb, size=40000, count=100)
    if not arena.direct:
        tracemalloc.start()
        assert arena.told(made).reason == "shard_altered"
        assert tracemalloc.get_traced_memory()[1] < 8 << 20, "memory is bounded"
        tracemalloc.stop()
        assert arena.store.unfinished("h") is None
        arena.unharmed()
        arena.ends_well()
        return
    path = arena.directory / "bomb"
    path.write_bytes(bomb)
    sent: list[str] = []

    def call(one_round: support.Json) -> support.Json:
        answer = made(1, arena.host.answer(dict(one_round, uploads=[], urls=[]), chunk_bytes=1 << 20))
        for order in one_round.get("uploads", []):
            document = arena.directory / "document"
            document.write_text(answer["manifests"][0])
            for what, file in (("shard", path), ("document", document)):
                if order[what]:
                    _upload.put(one_round["urls"][order[what]["url"]], order[what]["headers"], str(file))
                    sent.append(what)
            answer.update(manifests=[], pending=0, uploaded=order["sequence"])
        return t.cast(support.Json, answer)

    rotation = arena.host.rotation(arena.store, call=call, direct=True, chunk_bytes=1 << 20)
    rotation.run()
    assert sent == ["shard", "document"]
    arena.unharmed(own=True)
    tracemalloc.start()
    verdict = verify(arena.place.open(), "h", ())
    assert tracemalloc.get_traced_memory()[1] < 24 << 20, "memory is bounded"
    tracemalloc.stop()
    assert (verdict.verdict, verdict.index) == ("broken", 0)
    assert verify(arena.place.open(), "victim", ()).verdict == "consistent"


def test_chunks_that_are_not_the_shards(make_place: MakePlace, tmp_path: Path) -> None:
    for kind in ("directory", "sftp", "s3"):
        arena = Arena(tmp_path / kind, make_place(kind), False)
        changes: dict[str, Change] = {
            "zeros": lies.resized(lambda data: bytes(len(data))),
            "twice": lies.resized(lambda data: data + data),
            "offset": lies.first_chunk(offset=1),
            "far": lies.first_chunk(offset=1 << 40),
            "sequence": lies.first_chunk(sequence=2),
            "text": lies.first_chunk(data="%%%%"),
            "none": lies.setting(chunks=[]),
        }
        if kind == "directory":
            changes["huge"] = lies.setting(chunks=[{"sequence": 1, "offset": 0, "data": "A" * ((32 << 20) + 4)}])
        assert set(reasons(arena, changes).values()) == {"bad_answer", "shard_altered"}
        arena.unharmed()
        arena.ends_well()


# -- other histories


def test_another_hosts_manifests_and_bytes(arena: Arena) -> None:
    stolen = next(answer for answer in arena.old if answer["manifests"])
    assert arena.told(lambda number, answer: copy.deepcopy(stolen)).reason == "host_name"
    arena.unharmed()
    arena.ends_well()


def test_a_replay_of_old_answers(arena: Arena) -> None:
    old = [answer for answer in arena.recording(arena.host) if answer["manifests"]]
    arena.host.grow(50)
    arena.before = arena.place.files()
    for answer in old:
        assert arena.told(lambda number, _real, answer=answer: copy.deepcopy(answer)).reason in ("chain", "bad_answer")
    arena.unharmed()
    arena.ends_well()


def first_bytes(sequence: int) -> support.Json:
    """The chunk that an answer through the controller needs beside a manifest."""
    return {"sequence": sequence, "offset": 0, "data": base64.b64encode(bytes(_rotation.LEAST_CHUNK)).decode()}


def test_equivocation_is_kept_as_evidence_once(arena: Arena) -> None:
    arena.recording(arena.host)
    arena.before = arena.place.files()
    store = arena.place.open()
    manifest = dict(store.manifest("h", store.entries("h")[-1]), violations=1)
    data = canonical(manifest)
    made = lies.setting(manifests=[data.decode()], chunks=[first_bytes(manifest["sequence"])], pending=1)
    for _twice in range(2):
        assert arena.told(made).reason == "equivocation"
    new = arena.unharmed(own=True)
    assert new == {f"hosts/h/evidence/{digest(data)}.json": data}
    assert arena.place.open().evidence("h") == [f"{digest(data)}.json"]


# -- time and room


def test_a_host_that_never_ends(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """More is promised for ever; with nothing behind it the rotation ends long before the bound on rounds."""
    arena.recording(arena.host)
    arena.before = arena.place.files()
    monkeypatch.setattr(_rotation, "MOST_ROUNDS", 40)
    for members in ({"more": True}, {"pending": 5}, {"more": True, "pending": 1, "chunks": [], "manifests": []}):
        assert arena.told(lies.setting(**members)).reason in ("too_many_rounds", "bad_answer")
    arena.unharmed()
    arena.ends_well()


def test_tiny_progress_is_bounded_in_rounds(
    make_place: MakePlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rotation, "MOST_ROUNDS", 3)
    for kind in ("directory", "sftp", "s3"):
        arena = Arena(tmp_path / kind, make_place(kind), False)

        def less(number: int, answer: support.Json) -> support.Json:
            if answer["chunks"]:
                data = base64.b64decode(answer["chunks"][0]["data"])[: _rotation.LEAST_CHUNK]
                answer["chunks"] = [dict(answer["chunks"][0], data=base64.b64encode(data).decode())]
            return answer

        assert arena.told(less).reason == "too_many_rounds"
        arena.before.update(arena.unharmed(own=True))
    tiny = lies.resized(lambda data: data[:1])
    assert arena.told(tiny).reason == "bad_answer", "less than the least is no progress"
    arena.unharmed()


def test_a_quota(arena: Arena) -> None:
    assert arena.told(lambda number, answer: answer, most_bytes=1000).reason == "quota"
    arena.unharmed()
    arena.ends_well()


# -- addresses that were signed ---------------------------------------------------------------------------------------


class Uploader:
    """A host that has addresses, and does with them what a test wants instead of uploading."""

    def __init__(self, arena: Arena, act: t.Callable[[support.Json, t.Callable[[str], t.Any]], t.Any]) -> None:
        self.arena, self.act, self.acted = arena, act, 0
        self.said: list[str] = []

    def __call__(self, one_round: support.Json) -> support.Json:
        orders = one_round.get("uploads", [])
        answer = self.arena.host.answer(dict(one_round, uploads=[], urls=[]), chunk_bytes=1 << 20)
        for order in orders:
            self.acted += 1
            self.act(order, lambda what, order=order: one_round["urls"][order[what]["url"]])
            answer["uploaded"] = order["sequence"]
        return answer


def file_of(arena: Arena, sequence: int, suffix: str) -> str:
    return str(next(Path(arena.host.spool, "shards").rglob(f"{sequence:08d}-*{suffix}")))


def test_uploads_that_are_claimed_and_not_done(direct: Arena) -> None:
    host = Uploader(direct, lambda order, url: None)
    assert direct.lie(host).reason == "bad_answer" and host.acted
    direct.unharmed()
    direct.ends_well()


def test_other_bytes_at_a_signed_address(direct: Arena) -> None:
    refused: list[str] = []

    def act(order: support.Json, url: t.Callable[[str], str]) -> None:
        for what in ("shard", "document"):
            size = int(order[what]["headers"]["content-length"])
            other = direct.directory / "other"
            other.write_bytes(b"x" * size)
            with pytest.raises(StoreError) as caught:
                _upload.put(url(what), order[what]["headers"], str(other))
            refused.append(caught.value.reason)

    assert direct.lie(Uploader(direct, act)).reason == "bad_answer"
    assert refused and set(refused) == {"checksum_refused"}
    direct.unharmed()
    direct.ends_well()


def test_a_signed_address_used_twice_and_for_other_names(direct: Arena) -> None:
    seen: list[str] = []

    def act(order: support.Json, url: t.Callable[[str], str]) -> None:
        path = file_of(direct, order["sequence"], ".ima.gz")
        for address in (url("shard"), url("shard"), url("shard").replace("/hosts/h/", "/hosts/victim/")):
            try:
                _upload.put(address, order["shard"]["headers"], path)
                seen.append("done")
            except StoreError as error:
                seen.append(error.reason)

    assert direct.lie(Uploader(direct, act)).reason == "bad_answer"
    assert seen[:3] == ["done", "exists", "store_denied"]
    direct.unharmed(own=True)
    direct.ends_well()


def test_a_manifest_without_its_shard_counts_for_nothing(direct: Arena) -> None:
    def act(order: support.Json, url: t.Callable[[str], str]) -> None:
        _upload.put(url("document"), order["document"]["headers"], file_of(direct, order["sequence"], ".json"))

    assert direct.lie(Uploader(direct, act)).reason == "bad_answer"
    assert direct.unharmed(own=True) and direct.place.open().head("h") is None and direct.host.live() == 200
    direct.ends_well()


def test_an_upload_after_the_rotation_ended_is_what_was_signed_and_no_more(direct: Arena) -> None:
    kept: list[tuple[str, dict[str, str], str]] = []

    def act(order: support.Json, url: t.Callable[[str], str]) -> None:
        kept.append((url("shard"), order["shard"]["headers"], file_of(direct, order["sequence"], ".ima.gz")))

    assert direct.lie(Uploader(direct, act)).reason == "bad_answer"
    for address, headers, path in kept:
        _upload.put(address, headers, path)
    assert direct.unharmed(own=True)
    direct.ends_well()


def test_endless_shards_are_signed_for_up_to_the_quota(direct: Arena) -> None:
    """Each is the next one by its manifest, and each address counts before it is given."""
    assert direct.told(lambda number, answer: answer, most_bytes=7000).reason == "quota"
    assert len(direct.unharmed(own=True)) <= 2
    direct.ends_well()


def test_the_spool_of_another_machine_under_the_name(arena: Arena) -> None:
    arena.recording(arena.host)
    arena.before = arena.place.files()
    shutil.rmtree(arena.host.spool)
    Path(arena.host.spool).mkdir()
    manifest = json.loads(arena.old[0]["manifests"][0])
    assert manifest["name"] == "victim"
    manifest["name"] = "h"
    forged = lies.setting(manifests=[canonical(manifest).decode()], pending=1, chunks=[first_bytes(1)])
    with pytest.raises(ImaError) as caught:
        arena.host.rotation(
            arena.store, call=lambda one_round: forged(1, dict(arena.old[0])), direct=arena.direct
        ).run()
    assert caught.value.reason == "equivocation"
    assert all("/evidence/" in name for name in arena.unharmed(own=True))
