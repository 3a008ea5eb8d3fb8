# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Pruning: only what retention lets go, the store confirms now and the kernel does not hold; and life goes on after."""

from __future__ import annotations

import calendar
import contextlib
import copy
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
import types
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _host, _retention, _snapshot
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._rotation import Rotation
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._store import _base
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import verify
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import (
    FLAVOURS,
    TRIMMING,
    Host,
    oracle,
    parse,
    reason_of,
)

Json = t.Dict[str, t.Any]
DAY = 86400
START = calendar.timegm((2026, 3, 1, 12, 0, 0))


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the disk is not the matter here, and a slow disk would make these tests slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(name="clock", autouse=True)
def _clock(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The time of host and store, for manifests and for retention."""
    clock = types.SimpleNamespace(now=float(START))
    for module in (_host, _base):
        monkeypatch.setattr(module, "time", types.SimpleNamespace(time=lambda: clock.now))
    for module in (_snapshot, _host):
        monkeypatch.setattr(module, "utc_now", lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(int(clock.now))))
    return clock


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> DirectoryStore:
    return new_store(tmp_path / "store")


def new_store(path: Path) -> DirectoryStore:
    path.mkdir()
    return DirectoryStore(str(path))


# --- rotations and prunings in one process ----------------------------------------------------------------------------


def answered(work: t.Callable[[], Json]) -> Json:
    """The module's answer, through JSON."""
    try:
        return t.cast(Json, json.loads(json.dumps(work())))
    except ImaError as error:
        return dict(error.result(), failed=True)


def rotate(host: Host, store: DirectoryStore) -> Json:
    options = {"anchor": False, "chunk_bytes": 1 << 20}

    def call(one_round: Json) -> Json:
        return answered(lambda: _host.rotate(host.config(), dict(copy.deepcopy(one_round), **options), False))

    rotation = Rotation(store, "host", call, options)
    rotation.run()
    return rotation.result()


def on_host(host: Host, check: bool = False) -> t.Callable[[Json], Json]:
    """The module ima_prune on the host."""
    return lambda one_round: answered(
        lambda: _host.prune(host.config(), one_round["confirmed"], check, one_round["after"])
    )


def prune(host: Host, store: DirectoryStore, check: bool = False) -> Json:
    return _retention.prune(store, "host", on_host(host, check), check)


def retain(host: Host, **limits: int) -> None:
    """Write limits into the config."""
    host.configure()
    with open(host.conf, "a", encoding="utf-8") as file:
        file.write("[retention]\n" + "".join(f"{key} = {value}\n" for key, value in limits.items()))


def delivered(root: Path, store: DirectoryStore, flavour: str = "delete_n", policy: str = "central") -> Host:
    """A host with five shards of ten records; the store has all, and what the policy lets go is out of the kernel."""
    host = Host(root / "host", flavour, policy, count=49, shard_records=10)
    assert rotate(host, store)["delivered"] == 5
    return host


def held(host: Host) -> list[int]:
    """The sequences of the shards whose files are on the host."""
    names = [name for _folder, _folders, names in os.walk(f"{host.spool}/shards") for name in names]
    return sorted(int(name[:8]) for name in names if name.endswith(".ima.gz"))


def all_manifests(host: Host) -> list[int]:
    return [entry.sequence for entry in Spool(host.spool).entries]


def tree(directory: str) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in Path(directory).rglob("*")
        if path.is_file()
    }


def put_back(host: Host, store: DirectoryStore, sequence: int = 0) -> list[str]:
    """Copy pruned shards from the store to where they were; return their paths."""
    done = []
    for entry in store.entries("host"):
        path = f"{host.spool}/shards/{entry.shard}"
        if not os.path.exists(path) and sequence in (0, entry.sequence):
            shutil.copyfile(f"{store.directory}/hosts/host/{entry.shard}", path)
            done.append(path)
    return done


def whole(host: Host, store: DirectoryStore) -> None:
    """The oracle, with what was pruned taken from the store for its time."""
    files = tree(host.spool)
    back = put_back(host, store)
    oracle(host)
    for path in back:
        os.unlink(path)
    assert tree(host.spool) == files


# --- the limits -------------------------------------------------------------------------------------------------------


def test_without_limits_nothing_goes(tmp_path: Path, store: DirectoryStore) -> None:
    host = delivered(tmp_path, store)
    before = tree(str(tmp_path))
    assert prune(host, store) == {"changed": False, "pruned": 0, "kept": 5}
    assert tree(str(tmp_path)) == before


@pytest.mark.parametrize(
    ("days", "left"), [(41, [1, 2, 3, 4, 5]), (40, [1, 2, 3, 4, 5]), (39, [2, 3, 4, 5]), (20, [3, 4, 5]), (0, [5])]
)
def test_by_age(
    tmp_path: Path, store: DirectoryStore, clock: types.SimpleNamespace, days: int, left: list[int]
) -> None:
    """Shards of the days 0, 10, 20, 30 and 40; on day 40 exactly those go that are older than the limit."""
    host = Host(tmp_path / "host", "delete_n", "central", count=9, shard_records=100)
    for number in range(5):
        clock.now = START + number * 10 * DAY
        host.grow(10)
        rotate(host, store)
    retain(host, keep_days=days)
    assert prune(host, store) == {"changed": len(left) < 5, "pruned": 5 - len(left), "kept": len(left)}
    assert held(host) == left and all_manifests(host) == [1, 2, 3, 4, 5]
    whole(host, store)


def test_age_is_measured_to_the_second(tmp_path: Path, store: DirectoryStore, clock: types.SimpleNamespace) -> None:
    host = delivered(tmp_path, store)
    retain(host, keep_days=7)
    clock.now = START + 7 * DAY
    assert prune(host, store)["pruned"] == 0
    clock.now += 1
    assert prune(host, store)["pruned"] == 4


def test_a_clock_that_went_back_prunes_nothing(
    tmp_path: Path, store: DirectoryStore, clock: types.SimpleNamespace
) -> None:
    host = delivered(tmp_path, store)
    retain(host, keep_days=0)
    clock.now = START - 365 * DAY
    assert prune(host, store)["pruned"] == 0 and held(host) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("count", [1, 2, 4, 5, 100000000])
def test_by_number(tmp_path: Path, store: DirectoryStore, count: int) -> None:
    host = delivered(tmp_path, store)
    retain(host, keep_shards=count)
    assert prune(host, store)["kept"] == min(count, 5)
    assert held(host) == [1, 2, 3, 4, 5][-count:]
    whole(host, store)


@pytest.mark.parametrize(("more", "left"), [(-1, [4, 5]), (0, [3, 4, 5]), (1, [3, 4, 5])])
def test_by_bytes(tmp_path: Path, store: DirectoryStore, more: int, left: list[int]) -> None:
    host = delivered(tmp_path, store)
    spool = Spool(host.spool)
    retain(host, keep_bytes=sum(os.path.getsize(spool.path(entry)) for entry in spool.entries[2:]) + more)
    assert prune(host, store)["pruned"] == 5 - len(left)
    assert held(host) == left
    whole(host, store)


def test_the_strictest_limit_decides(tmp_path: Path, store: DirectoryStore) -> None:
    host = delivered(tmp_path, store)
    retain(host, keep_days=36500, keep_bytes=1 << 50, keep_shards=3)
    assert prune(host, store)["pruned"] == 2
    retain(host, keep_days=36500, keep_bytes=0, keep_shards=100)
    assert prune(host, store)["pruned"] == 2


@pytest.mark.parametrize("limits", [{"keep_bytes": 0}, {"keep_shards": 1}, {"keep_days": 0}], ids=str)
def test_the_newest_shard_stays(
    tmp_path: Path, store: DirectoryStore, clock: types.SimpleNamespace, limits: dict[str, int]
) -> None:
    host = delivered(tmp_path, store)
    clock.now += 9 * DAY
    retain(host, **limits)
    prune(host, store)
    assert held(host) == [5]
    host.reboot()
    prune(host, store)
    assert held(host) == [5]


def test_an_empty_spool_has_nothing_to_prune(tmp_path: Path, store: DirectoryStore) -> None:
    host = Host(tmp_path / "host", count=3)
    retain(host, keep_bytes=0)
    for check in (True, False):
        assert prune(host, store, check) == {"changed": False, "pruned": 0, "kept": 0}


def test_manifests_and_the_stores_words_stay(tmp_path: Path, store: DirectoryStore) -> None:
    host = delivered(tmp_path, store)
    before = host.files()
    retain(host, keep_shards=1)
    prune(host, store)
    after = host.files()
    gone = {name for name in before if name not in after}
    assert len(gone) == 4 and all(name.endswith(".ima.gz") for name in gone)
    assert {name for name in after if before.get(name) != after[name]} == {"pruned.json"}
    said = json.loads(Path(host.spool, "pruned.json").read_bytes())
    spool = Spool(host.spool)
    assert (said["sequence"], said["store"]) == (4, store.name)
    assert said["manifest"] == spool.digest(spool.entries[3])


# --- what never goes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["local", "central", "verified", "never"])
def test_what_the_store_did_not_acknowledge_stays(tmp_path: Path, store: DirectoryStore, policy: str) -> None:
    host = Host(tmp_path / "host", "delete_n", policy, count=49, shard_records=10)
    host.run()
    retain(host, keep_bytes=0)
    assert prune(host, store) == {"changed": False, "pruned": 0, "kept": 5}
    host.acknowledge("consistent" if policy == "verified" else "", sequence=2)
    host.run()
    if policy == "never":
        assert prune(host, store)["pruned"] == 0
    else:
        assert reason_of(lambda: prune(host, store)).reason == "not_confirmed"
    assert held(host) == [1, 2, 3, 4, 5]
    oracle(host)


def test_without_a_verdict_nothing_goes_under_verified(tmp_path: Path, store: DirectoryStore) -> None:
    host = delivered(tmp_path, store, policy="local")
    assert parse(host.held()) == []
    host.configure(trim_after="verified")
    retain(host, keep_bytes=0)
    assert prune(host, store)["pruned"] == 0
    rotate(host, store)
    assert prune(host, store)["pruned"] == 4
    whole(host, store)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_what_the_kernel_may_still_hold_stays(tmp_path: Path, store: DirectoryStore, flavour: str) -> None:
    """Under ``never``, or where the kernel cannot delete, no shard of this epoch goes; those of an earlier boot do."""
    host = delivered(tmp_path, store, flavour, "never")
    retain(host, keep_bytes=0)
    assert prune(host, store)["pruned"] == 0 and held(host) == [1, 2, 3, 4, 5]
    host.reboot()
    host.grow(25)
    rotate(host, store)
    assert prune(host, store)["pruned"] == 5
    assert held(host) == [6, 7, 8]
    whole(host, store)


@pytest.mark.parametrize(("base", "left"), [(0, 1), (9, 1), (10, 2), (19, 2), (20, 3), (45, 5), (50, 5)])
@pytest.mark.parametrize("policy", ["local", "central"])
def test_a_shard_goes_only_when_all_its_records_left_the_kernel(
    tmp_path: Path, store: DirectoryStore, policy: str, base: int, left: int
) -> None:
    host = delivered(tmp_path, store, policy="never")
    host.configure(trim_after=policy)
    if base:
        assert host.trim(base) == base
    retain(host, keep_bytes=0)
    prune(host, store)
    assert held(host) == list(range(left, 6))
    whole(host, store)
    rotate(host, store)
    assert prune(host, store)["kept"] == 1
    whole(host, store)


def test_a_journal_that_claims_a_trim_is_not_believed(tmp_path: Path, store: DirectoryStore) -> None:
    host = delivered(tmp_path, store, policy="never")
    journal = json.loads(Path(host.spool, "journal.json").read_bytes())
    journal["base"] = 50
    host.journal(canonical(journal))
    retain(host, keep_bytes=0)
    prune(host, store)
    assert held(host) == [1, 2, 3, 4, 5]
    oracle(host)


# --- the store is asked, now ------------------------------------------------------------------------------------------


def in_store(store: DirectoryStore, sequence: int, suffix: str) -> Path:
    return next(Path(store.directory).rglob(f"{sequence:08d}-*{suffix}"))


def edit(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"violations":0', b'"violations":7'))


DAMAGES: dict[str, tuple[str, t.Callable[[Path], object]]] = {
    "shard lost": (".ima.gz", Path.unlink),
    "shard shorter": (".ima.gz", lambda path: path.write_bytes(path.read_bytes()[:-1])),
    "shard changed": (".ima.gz", lambda path: path.write_bytes(path.read_bytes()[:-1] + b"\x77")),
    "shard empty": (".ima.gz", lambda path: path.write_bytes(b"")),
    "shard a link": (".ima.gz", lambda path: (path.rename(f"{path}.x"), path.symlink_to(f"{path}.x"))),
    "manifest lost": (".json", Path.unlink),
    "manifest edited": (".json", edit),
    "both lost": (".ima.gz", lambda path: (path.unlink(), next(path.parent.glob(f"{path.name[:8]}-*.json")).unlink())),
}


@pytest.mark.parametrize("sequence", [1, 3, 4])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_store_that_lost_or_changed_a_shard_confirms_nothing(
    tmp_path: Path, store: DirectoryStore, damage: str, sequence: int
) -> None:
    host = delivered(tmp_path, store)
    suffix, harm = DAMAGES[damage]
    before = tree(store.directory)
    harm(in_store(store, sequence, suffix))
    assert tree(store.directory) != before, "the fault was not delivered"
    files = host.files()
    retain(host, keep_bytes=0)
    for check in (True, False):
        error = reason_of(lambda check=check: prune(host, store, check))
        assert (error.reason, error.details["sequence"]) == ("not_confirmed", sequence)
        assert host.files() == files
    oracle(host)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"{}"])
def test_a_store_with_a_torn_manifest_confirms_nothing(tmp_path: Path, store: DirectoryStore, content: bytes) -> None:
    host = delivered(tmp_path, store)
    in_store(store, 2, ".json").write_bytes(content)
    files = host.files()
    retain(host, keep_bytes=0)
    error = reason_of(lambda: prune(host, store))
    assert host.files() == files
    assert error.reason == "not_confirmed"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"{}"])
def test_a_torn_manifest_in_the_store_stops_the_pruning(tmp_path: Path, store: DirectoryStore, content: bytes) -> None:
    host = delivered(tmp_path, store)
    in_store(store, 2, ".json").write_bytes(content)
    files = host.files()
    retain(host, keep_bytes=0)
    assert reason_of(lambda: prune(host, store)).reason
    assert host.files() == files


def expire(store: DirectoryStore, sequences: t.Iterable[int]) -> None:
    """What a store's lifecycle does."""
    for sequence in sequences:
        os.unlink(in_store(store, sequence, ".ima.gz"))


def test_what_expired_in_the_store_first_may_go(
    tmp_path: Path, store: DirectoryStore, clock: types.SimpleNamespace
) -> None:
    host = delivered(tmp_path, store)
    Path(store.directory, "retention.json").write_bytes(b'{"shard_days":30,"version":1}')
    expire(store, [1, 2])
    retain(host, keep_days=7)
    clock.now = START + 31 * DAY
    assert prune(host, store)["pruned"] == 4 and held(host) == [5]


@pytest.mark.parametrize("how", ["too early", "no retention", "not the oldest", "another manifest"])
def test_what_did_not_expire_is_not_given_up(
    tmp_path: Path, store: DirectoryStore, clock: types.SimpleNamespace, how: str
) -> None:
    host = delivered(tmp_path, store)
    if how != "no retention":
        Path(store.directory, "retention.json").write_bytes(b'{"shard_days":30,"version":1}')
    expire(store, [2] if how == "not the oldest" else [1])
    if how == "another manifest":
        path = in_store(store, 1, ".json")
        path.write_bytes(path.read_bytes().replace(b'"violations":0', b'"violations":1'))
    retain(host, keep_days=7)
    clock.now = START + (29 if how == "too early" else 31) * DAY
    with pytest.raises(ImaError) as caught:
        prune(host, store)
    assert caught.value.reason == "not_confirmed" and held(host) == [1, 2, 3, 4, 5]


def test_a_store_that_is_empty_confirms_nothing(tmp_path: Path, store: DirectoryStore) -> None:
    host = delivered(tmp_path, store)
    files = host.files()
    retain(host, keep_bytes=0)
    assert reason_of(lambda: prune(host, new_store(tmp_path / "other"))).reason == "not_confirmed"
    assert host.files() == files


def test_while_the_store_was_not_asked_nothing_goes(tmp_path: Path, store: DirectoryStore) -> None:
    host = delivered(tmp_path, store)
    files = host.files()
    retain(host, keep_bytes=0)
    answer = _host.prune(host.config(), None, False)
    assert [each["sequence"] for each in answer["candidates"]] == [1, 2, 3, 4]
    assert (answer["changed"], answer["pruned"], answer["kept"]) == (False, 0, 5)

    def unreachable(*_unused: t.Any) -> t.Any:
        raise ConnectionError("the store does not answer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "confirms", unreachable)
        with pytest.raises(ConnectionError):
            prune(host, store)
    assert host.files() == files


def test_each_shard_is_confirmed_before_it_goes(
    tmp_path: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of a later round, when there are more than one call can name."""
    host = delivered(tmp_path, store)
    retain(host, keep_shards=1)
    monkeypatch.setattr(_host, "MOST_CANDIDATES", 2)
    real, asked = store.confirms, []

    def confirms(name: str, entry: t.Any, digest: str) -> bool:
        assert entry.sequence in held(host)
        asked.append(entry.sequence)
        return real(name, entry, digest)

    monkeypatch.setattr(store, "confirms", confirms)
    assert prune(host, store) == {"changed": True, "pruned": 4, "kept": 1}
    assert asked == [1, 2, 3, 4]


@pytest.mark.parametrize(("sequence", "manifest"), [(2, 1), (5, 5), (1, None), (0, 1), (99, 5)], ids=str)
def test_a_confirmation_of_something_else_removes_nothing(
    tmp_path: Path, store: DirectoryStore, sequence: int, manifest: int | None
) -> None:
    host = delivered(tmp_path, store)
    retain(host, keep_shards=1)
    spool = Spool(host.spool)
    digest = spool.digest(spool.entries[manifest - 1]) if manifest else "0" * 64
    files = host.files()
    confirmed = {"sequence": sequence, "manifest": digest, "store": "s"}
    assert reason_of(lambda: _host.prune(host.config(), confirmed, False)).reason == "store_diverged"
    assert host.files() == files


def test_a_host_that_names_what_the_store_never_had_gets_no_word(tmp_path: Path, store: DirectoryStore) -> None:
    delivered(tmp_path, store)
    for sequence, digest in ((1, "0" * 64), (77, "0" * 64)):
        answer = {"changed": False, "pruned": 0, "kept": 9, "candidates": [{"sequence": sequence, "manifest": digest}]}
        error = reason_of(lambda answer=answer: _retention.prune(store, "host", lambda _round: answer, False))
        assert error.reason == "not_confirmed"


@pytest.mark.parametrize(
    "answer",
    [
        {},
        None,
        {"candidates": 1},
        {"changed": False, "pruned": -1, "kept": 0, "candidates": []},
        {"changed": False, "pruned": 0, "kept": 0, "candidates": [{"sequence": 1, "manifest": "../x"}]},
        {"changed": False, "pruned": 0, "kept": 0, "candidates": [{"sequence": 1, "manifest": "0" * 64}] * 1001},
    ],
    ids=lambda answer: str(answer)[:60],
)
def test_an_answer_that_is_none_is_refused(store: DirectoryStore, answer: t.Any) -> None:
    assert reason_of(lambda: _retention.prune(store, "host", lambda _round: answer, False)).reason in (
        "bad_answer",
        "host_failed",
    )


def test_a_host_that_never_comes_to_an_end_is_stopped(tmp_path: Path, store: DirectoryStore) -> None:
    host = delivered(tmp_path, store)
    spool = Spool(host.spool)
    one = {"sequence": 1, "manifest": spool.digest(spool.entries[0])}
    calls = []

    def call(_round: Json) -> Json:
        calls.append(1)
        assert len(calls) < 200, "the controller never stops"
        return {"changed": True, "pruned": 1, "kept": 4, "candidates": [one]}

    assert reason_of(lambda: _retention.prune(store, "host", call, False)).reason == "bad_answer"


# --- check mode, and again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limits", [{}, {"keep_shards": 3}, {"keep_bytes": 0}], ids=str)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_check_mode_predicts_and_writes_nothing(
    tmp_path: Path, store: DirectoryStore, flavour: str, limits: dict[str, int]
) -> None:
    host = delivered(tmp_path, store, flavour)
    retain(host, **limits)
    before = tree(str(tmp_path))
    foreseen = prune(host, store, check=True)
    assert tree(str(tmp_path)) == before
    assert prune(host, store) == foreseen
    assert prune(host, store, check=True) == {"changed": False, "pruned": 0, "kept": foreseen["kept"]}


def test_check_mode_foresees_more_than_one_call_can_name(
    tmp_path: Path, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = delivered(tmp_path, store)
    retain(host, keep_shards=1)
    monkeypatch.setattr(_host, "MOST_CANDIDATES", 3)
    foreseen = prune(host, store, check=True)
    assert prune(host, store) == foreseen


@pytest.mark.parametrize("how", ["reboot", "journal lost", "somebody else trimmed sealed records"])
def test_check_mode_foresees_what_a_survey_will_find(tmp_path: Path, store: DirectoryStore, how: str) -> None:
    host = delivered(tmp_path, store, policy="never" if how.startswith("somebody") else "central")
    if how == "reboot":
        host.reboot()
    elif how == "journal lost":
        host.grow(3)
        host.export()
        host.journal(None)
    else:
        _emulated.foreign_trim(host.kernel, 20)
    retain(host, keep_bytes=0)
    foreseen = prune(host, store, check=True)
    assert prune(host, store) == foreseen


@pytest.mark.parametrize("flavour", TRIMMING)
def test_a_second_run_changes_nothing(tmp_path: Path, store: DirectoryStore, flavour: str) -> None:
    host = delivered(tmp_path, store, flavour)
    retain(host, keep_shards=2)
    assert prune(host, store)["pruned"] == 3
    before = tree(str(tmp_path))
    for _again in range(2):
        assert prune(host, store) == {"changed": False, "pruned": 0, "kept": 2}
    assert tree(str(tmp_path)) == before


# --- killed -----------------------------------------------------------------------------------------------------------


class Killer:
    """Kills this process before or after the ``number``-th call that changes a file or a name."""

    CALLS = ("open", "write", "fsync", "close", "link", "rename", "unlink")

    def __init__(self, number: int, after: bool) -> None:
        self._left, self._after = number, after
        for name in self.CALLS:
            setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        def call(*args: t.Any, **keywords: t.Any) -> t.Any:
            self._left -= 1
            if self._left == 0 and not self._after:
                os.kill(os.getpid(), signal.SIGKILL)
            try:
                return real(*args, **keywords)
            finally:
                if self._left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        return call


def killed(host: Host, confirmed: Json, number: int, after: bool) -> bool:
    """Let the host's half prune in another process; whether it was killed (else it came to its end)."""
    pid = os.fork()
    if pid == 0:
        try:
            Killer(number, after)
            _host.prune(host.config(), confirmed, False)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_call(tmp_path: Path, store: DirectoryStore, after: bool) -> None:
    """The next run works, nothing is lost, and when there is more to prune, what was left goes too."""
    host = delivered(tmp_path, store)
    retain(host, keep_shards=2)
    saved, spool = str(tmp_path / "saved"), Spool(host.spool)
    shutil.copytree(host.root, saved)
    confirmed = {"sequence": 3, "manifest": spool.digest(spool.entries[2]), "store": store.name}
    seen = set()
    number = 0
    while True:
        number += 1
        shutil.rmtree(host.root)
        shutil.copytree(saved, host.root)
        if not killed(host, confirmed, number, after):
            break
        stated = os.path.exists(f"{host.spool}/pruned.json")
        seen.add((stated, len(held(host))))
        assert stated or held(host) == [1, 2, 3, 4, 5], "a file went before the statement"
        assert held(host)[-2:] == [4, 5]
        whole(host, store)
        prune(host, store)
        assert prune(host, store)["changed"] is False
    assert seen == {(False, 5), (True, 5), (True, 4), (True, 3), (True, 2)}, "not every instant was struck"
    assert held(host) == [4, 5]


def left_behind(tmp_path: Path, store: DirectoryStore) -> Host:
    """A host on which a pruning of three shards died after its statement."""
    host = delivered(tmp_path, store)
    retain(host, keep_shards=2)
    spool = Spool(host.spool)
    confirmed = {"sequence": 3, "manifest": spool.digest(spool.entries[2]), "store": store.name}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ansible_collections.integrity.ima.plugins.module_utils._durable.remove", die)
        with contextlib.suppress(KeyboardInterrupt):
            _host.prune(host.config(), confirmed, False)
    assert held(host) == [1, 2, 3, 4, 5] and Spool(host.spool).pruned == 3
    return host


def die(path: str) -> t.NoReturn:
    raise KeyboardInterrupt(path)


def test_what_a_dead_pruning_left_goes_with_the_next(tmp_path: Path, store: DirectoryStore) -> None:
    host = left_behind(tmp_path, store)
    host.grow(10)
    rotate(host, store)
    prune(host, store)
    assert held(host) == [5, 6]
    whole(host, store)


def test_what_a_dead_pruning_left_goes_with_the_next_run(tmp_path: Path, store: DirectoryStore) -> None:
    host = left_behind(tmp_path, store)
    prune(host, store)
    assert held(host) == [4, 5]


def test_check_mode_foresees_what_a_dead_pruning_left(tmp_path: Path, store: DirectoryStore) -> None:
    host = left_behind(tmp_path, store)
    host.grow(10)
    rotate(host, store)
    foreseen = prune(host, store, check=True)
    assert prune(host, store) == foreseen


# --- life after a pruning ---------------------------------------------------------------------------------------------


def pruned(tmp_path: Path, store: DirectoryStore, flavour: str = "delete_n", keep: int = 1, **limits: int) -> Host:
    host = delivered(tmp_path, store, flavour)
    retain(host, keep_shards=keep, **limits)
    assert prune(host, store)["kept"] == keep
    return host


def rotated(host: Host, store: DirectoryStore) -> None:
    """Rotate and prune, again and again; nothing is lost, and the store is consistent."""
    for count in (13, 0, 1):
        host.grow(count)
        assert rotate(host, store)["fault"] is None
        whole(host, store)
        prune(host, store)
        whole(host, store)
    assert verify(store, "host", ()).verdict == "consistent"


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("flavour", TRIMMING)
def test_rotations_go_on(tmp_path: Path, store: DirectoryStore, flavour: str, keep: int) -> None:
    host = pruned(tmp_path, store, flavour, keep)
    rotated(host, store)
    assert host.faults() == [] and parse(host.held()) == []


@pytest.mark.parametrize("flavour", TRIMMING)
def test_export_trim_and_anchor_go_on(tmp_path: Path, store: DirectoryStore, flavour: str) -> None:
    host = pruned(tmp_path, store, flavour)
    host.grow(12)
    assert host.export().records == 12
    whole(host, store)
    assert host.anchor().index == 62
    rotate(host, store)
    assert _host.trim(host.config(), "cut", 0, 1, True, False)["changed"]
    rotate(host, store)
    assert host.locked(lambda cycle: cycle.anchor_indexes())
    host.locked(lambda cycle: cycle.aggregate())
    assert _host.info(host.config())["fault"] is None
    whole(host, store)


@pytest.mark.parametrize("flavour", TRIMMING)
def test_somebody_elses_trim_is_still_found(tmp_path: Path, store: DirectoryStore, flavour: str) -> None:
    host = pruned(tmp_path, store, flavour)
    host.grow(12)
    _emulated.foreign_trim(host.kernel, 5)
    error = reason_of(lambda: rotate(host, store))
    assert (error.reason, error.details["index"]) == ("foreign_trim", 50)


def test_somebody_elses_trim_of_sealed_records_is_still_told(tmp_path: Path, store: DirectoryStore) -> None:
    host = pruned(tmp_path, store)
    host.grow(12)
    host.export()
    _emulated.foreign_trim(host.kernel, 5)
    rotate(host, store)
    host.grow(1)
    rotate(host, store)
    assert host.faults() == [("foreign_trim", 55, False)]
    whole(host, store)


def test_records_that_a_kernel_keeps_while_older_shards_are_pruned(tmp_path: Path, store: DirectoryStore) -> None:
    """The base lies inside a shard that is held; every search for it must do without the older ones."""
    host = delivered(tmp_path, store, policy="never")
    host.configure(trim_after="central")
    host.trim(25)
    retain(host, keep_bytes=0)
    assert prune(host, store)["pruned"] == 2 and held(host) == [3, 4, 5]
    host.journal(None)
    place, new = host.cycle().predict()
    assert (place.base, place.cut, new) == (25, 50, 0)
    host.grow(3)
    assert host.export().base == 25
    whole(host, store)
    rotated(host, store)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_reboot(tmp_path: Path, store: DirectoryStore, flavour: str) -> None:
    host = delivered(tmp_path, store, flavour)
    host.reboot()
    host.grow(3)
    rotate(host, store)
    retain(host, keep_shards=1)
    assert prune(host, store) == {"changed": True, "pruned": 5, "kept": 1}
    whole(host, store)
    rotated(host, store)
    host.reboot()
    rotated(host, store)
    assert [fault for fault in host.faults() if fault[2]] == []


@pytest.mark.parametrize("new", [0, 12], ids=["nothing held", "records held"])
@pytest.mark.parametrize("carry_over", [True, False])
@pytest.mark.parametrize("flavour", TRIMMING)
def test_a_kexec(tmp_path: Path, store: DirectoryStore, flavour: str, carry_over: bool, new: int) -> None:
    host = pruned(tmp_path, store, flavour)
    host.grow(new)
    if new:
        host.export()
        if not carry_over:
            rotate(host, store)
    host.kexec(carry_over)
    host.grow(4)
    rotated(host, store)
    assert [fault for fault in host.faults() if fault[2]] == []


@pytest.mark.parametrize("flavour", TRIMMING)
def test_the_journal_is_lost(tmp_path: Path, store: DirectoryStore, flavour: str) -> None:
    host = pruned(tmp_path, store, flavour, keep=2)
    host.grow(3)
    for content in (None, b"", b"{torn"):
        host.journal(content)
        rotate(host, store)
        whole(host, store)
        host.grow(2)
    rotated(host, store)


def test_the_journal_is_lost_while_the_kernel_holds_nothing_sealed(tmp_path: Path, store: DirectoryStore) -> None:
    host = pruned(tmp_path, store)
    assert parse(host.held()) == []
    host.journal(None)
    rotated(host, store)


def test_the_readable_copies_of_encrypted_shards_go_too(tmp_path: Path, store: DirectoryStore) -> None:
    recipients = tmp_path / "recipients"
    recipients.mkdir()
    command = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=audit -days 9 -keyout key -out recipients/audit.pem"
    subprocess.run(command.split(), cwd=str(tmp_path), check=True, stderr=subprocess.DEVNULL)
    host = Host(tmp_path / "host", count=49, shard_records=10, trim_after="central")
    for text in (f"[encryption]\nrecipients = {recipients}\n", "[retention]\nkeep_shards = 2\n"):
        with open(host.conf, "a", encoding="utf-8") as file:
            file.write(text)
    rotate(host, store)
    readable = [name for name in host.files() if name.endswith(".plain.gz")]
    assert len(readable) == 5
    foreseen = prune(host, store, check=True)
    assert prune(host, store) == foreseen == {"changed": True, "pruned": 3, "kept": 2}
    assert sorted(name for name in host.files() if name.endswith(".plain.gz")) == sorted(readable)[3:]
    host.grow(10)
    assert rotate(host, store)["trimmed"] == 10
    other = new_store(tmp_path / "other")
    assert reason_of(lambda: rotate(host, other)).reason == "pruned"
    put_back(host, store)
    assert rotate(host, other)["delivered"] == 6
    other.key = str(tmp_path / "key")
    assert verify(other, "host", ()).verdict == "consistent"


# --- a shard that is needed -------------------------------------------------------------------------------------------


def test_a_new_store_needs_what_was_pruned(tmp_path: Path, store: DirectoryStore) -> None:
    host = pruned(tmp_path, store, keep=2)
    other = new_store(tmp_path / "other")
    error = reason_of(lambda: rotate(host, other))
    assert error.reason == "pruned" and "pruned.json" in str(error) and "shards/" in str(error)
    assert held(host) == [4, 5] and other.head("host") is None
    for sequence in (1, 2):
        put_back(host, store, sequence)
        assert reason_of(lambda: rotate(host, other)).reason == "pruned"
    put_back(host, store, 3)
    assert rotate(host, other)["delivered"] == 5
    assert verify(other, "host", ()).verdict == "consistent"
    assert b"".join(Spool(host.spool).raw_from(0)) == host.truth()


def test_the_reason_names_the_shard_and_where_to_get_it(tmp_path: Path, store: DirectoryStore) -> None:
    host = pruned(tmp_path, store, keep=3)
    spool = Spool(host.spool)
    assert (spool.pruned, spool.held_from) == (2, 20)
    for entry in spool.entries[:2]:
        error = reason_of(lambda entry=entry: spool.path(entry))
        assert error.reason == "pruned" and f"shards/{entry.shard}" in error.hint
        where = (error.details["sequence"], error.details["index"], error.details["boot_id"])
        assert where == (entry.sequence, entry.first, entry.boot_id)
        (path,) = put_back(host, store, entry.sequence)
        assert spool.path(entry) == path
    for entry in spool.entries[2:]:
        assert os.path.exists(spool.path(entry))
    assert host.sealed() == host.truth()


def test_what_was_put_back_goes_again(tmp_path: Path, store: DirectoryStore) -> None:
    host = pruned(tmp_path, store, keep=2)
    put_back(host, store)
    host.grow(10)
    rotate(host, store)
    prune(host, store)
    assert held(host) == [5, 6]


def test_what_was_put_back_goes_only_by_the_stores_word_of_now(tmp_path: Path, store: DirectoryStore) -> None:
    """The store lost a shard, and somebody put it back on the host to deliver it again: it may be the last copy."""
    host = pruned(tmp_path, store, keep=2)
    put_back(host, store)
    in_store(store, 2, ".ima.gz").unlink()
    with contextlib.suppress(ImaError):
        prune(host, store)
    assert 2 in held(host)


def test_a_file_that_is_gone_without_a_statement_is_missing(tmp_path: Path, store: DirectoryStore) -> None:
    """Pruning up to shard 3 is no excuse for shard 4."""
    host = pruned(tmp_path, store, keep=2)
    spool = Spool(host.spool)
    os.unlink(spool.path(spool.entries[3]))
    error = reason_of(lambda: rotate(host, store))
    assert error.reason == "shard_missing"


# --- a statement that is none -----------------------------------------------------------------------------------------


def statement(host: Host, **changes: t.Any) -> bytes:
    said = json.loads(Path(host.spool, "pruned.json").read_bytes())
    return canonical(dict(said, **changes))


STATEMENTS: dict[str, t.Callable[[Host], bytes]] = {
    "empty": lambda host: b"",
    "torn": lambda host: statement(host)[:-9],
    "zeros": lambda host: bytes(200),
    "not canonical": lambda host: statement(host).replace(b",", b", "),
    "another version": lambda host: statement(host, version=2),
    "one more member": lambda host: statement(host, more=1),
    "another digest": lambda host: statement(host, manifest="0" * 64),
    "of another shard": lambda host: statement(host, sequence=4),
    "an older one": lambda host: statement(
        host, sequence=2, manifest=Spool(host.spool).digest(Spool(host.spool).entries[1])
    ),
    "beyond the chain": lambda host: statement(host, sequence=99),
    "sequence 0": lambda host: statement(host, sequence=0),
    "deep": lambda host: b'{"a":' * 30000,
}


@pytest.mark.parametrize("what", STATEMENTS)
def test_a_statement_that_is_torn_or_forged_excuses_nothing(tmp_path: Path, store: DirectoryStore, what: str) -> None:
    host = pruned(tmp_path, store, keep=2)
    good = Path(host.spool, "pruned.json").read_bytes()
    bad = STATEMENTS[what](host)
    assert bad != good
    Path(host.spool, "pruned.json").write_bytes(bad)
    before = host.files()
    host.grow(5)
    for work in (lambda: Spool(host.spool).entries, host.export, lambda: rotate(host, store)):
        error = reason_of(work)
        assert error.reason == "shard_missing"
        assert error.details["index"] == (20 if what == "an older one" else 0)
    assert host.files() == before
    put_back(host, store)
    rotate(host, store)
    oracle(host)


def test_a_statement_about_an_older_chain_excuses_nothing(tmp_path: Path, store: DirectoryStore) -> None:
    host = pruned(tmp_path, store, keep=2)
    old = Path(host.spool, "pruned.json").read_bytes()
    again = delivered(tmp_path / "again", new_store(tmp_path / "second"))
    Path(again.spool, "pruned.json").write_bytes(old)
    assert Spool(again.spool).pruned == 0
    spool = Spool(again.spool)
    os.unlink(spool.path(spool.entries[0]))
    assert reason_of(lambda: Spool(again.spool).entries).reason == "shard_missing"


def test_a_statement_without_need_does_no_harm(tmp_path: Path, store: DirectoryStore) -> None:
    host = pruned(tmp_path, store, keep=2)
    put_back(host, store)
    rotate(host, store)
    oracle(host)
    Path(host.spool, "pruned.json").unlink()
    rotate(host, store)
    oracle(host)
    assert held(host) == [1, 2, 3, 4, 5]
    assert prune(host, store)["pruned"] == 3
