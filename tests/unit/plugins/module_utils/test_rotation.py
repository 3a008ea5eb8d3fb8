# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whole rotations between an emulated host and a store: honest ones, cut off ones, and hosts that lie."""

from __future__ import annotations

import base64
import copy
import fcntl
import gzip
import itertools
import json
import os
import shutil
import tracemalloc
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _rotation
from ansible_collections.integrity.ima.plugins.module_utils import _host as host_side
from ansible_collections.integrity.ima.plugins.module_utils._emulated import EmulatedFiles
from ansible_collections.integrity.ima.plugins.module_utils._errors import (
    ImaError,
    ManifestError,
    SpoolError,
    StoreError,
)
from ansible_collections.integrity.ima.plugins.module_utils._protocol import load
from ansible_collections.integrity.ima.plugins.module_utils._rotation import HostFailed, HostUnreachable, answer_of
from ansible_collections.integrity.ima.plugins.module_utils._schema import CLAIM, canonical, check
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import Lists
from ansible_collections.integrity.ima.plugins.module_utils._shard import digest
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import claims_of, verify
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

POLICIES = ("local", "central", "verified", "never")
Change = t.Callable[[int, support.Json], t.Any]


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> DirectoryStore:
    return support.new_store(tmp_path / "store")


@pytest.fixture(name="host")
def _host(tmp_path: Path) -> support.Host:
    """A host with two shards, each of more than one chunk."""
    host = support.Host(tmp_path / "h", shard_records=100)
    host.grow(199)
    return host


def both(store: DirectoryStore, host: support.Host) -> tuple[t.Any, t.Any]:
    return support.tree(store.directory), support.tree(host.directory)


# -- honest hosts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flavour", "policy"), list(itertools.product(support.FLAVOURS, POLICIES)))
def test_a_rotation_delivers_everything_and_deletes_what_the_policy_lets_go(
    tmp_path: Path, store: DirectoryStore, flavour: str, policy: str
) -> None:
    host = support.Host(tmp_path / "h", flavour=flavour, trim_after=policy, shard_records=90)
    kept = flavour == "export_only" or policy == "never"
    recorded = 1
    for grown in (200, 30, 0, 100):
        host.grow(grown)
        recorded += grown
        result = host.rotate(store)
        fresh = grown + (1 if recorded == grown + 1 else 0)
        assert result["changed"] is (fresh > 0) and result["exported"] == fresh
        assert result["trimmed"] == (0 if kept else fresh)
        assert host.live() == (recorded if kept else 0)
        assert result["fault"] is None and result["flavour"] == flavour
        assert result["claim"]["index"] == recorded and result["claim"]["records"] == fresh
        assert result["claim"]["pcrs"] == host.pcrs() and not check(result["claim"], CLAIM)
        verdict = verify(store, "h", ())
        assert (verdict.verdict, verdict.records, verdict.pcrs) == ("consistent", recorded, host.pcrs())
    assert b"".join(sealed.raw for sealed in support.take(store)) == host.recorded()


@pytest.mark.parametrize("chunk_bytes", [4096, 5000, 1 << 20])
def test_chunks_of_any_size_give_the_same_store(tmp_path: Path, chunk_bytes: int) -> None:
    host = support.Host(tmp_path / "h", shard_records=150, flavour="export_only")
    host.grow(449)
    store = support.new_store(tmp_path / "store")
    result = host.rotate(store, chunk_bytes=chunk_bytes)
    assert result["delivered"] == 3 and (result["rounds"] > 5) is (chunk_bytes < 1 << 20)
    assert verify(store, "h", ()).records == 450
    for sealed in support.take(store):
        shard, manifest = support.paths(store, sealed)
        for path in (shard, manifest):
            name = os.path.relpath(path, support.base(store))
            assert support.file_sha256(path) == support.file_sha256(os.path.join(host.spool, "shards", name))


@pytest.mark.parametrize("flavour", support.FLAVOURS)
def test_a_backlog_of_many_shards_is_drained_in_pieces(tmp_path: Path, store: DirectoryStore, flavour: str) -> None:
    host = support.Host(tmp_path / "h", flavour=flavour, shard_records=5)
    host.grow(199)
    result = host.rotate(store, chunk_bytes=1 << 20)
    assert (result["delivered"], result["exported"], result["claim"]["records"]) == (40, 200, 200)
    assert host.live() == (200 if flavour == "export_only" else 0)
    assert verify(store, "h", ()).shards == 40


@pytest.mark.parametrize(("flavour", "policy"), list(itertools.product(support.FLAVOURS, POLICIES)))
def test_rotating_again_changes_not_a_byte(tmp_path: Path, store: DirectoryStore, flavour: str, policy: str) -> None:
    host = support.Host(tmp_path / "h", flavour=flavour, trim_after=policy)
    host.grow(20)
    host.rotate(store)
    before = both(store, host)
    for _again in range(2):
        result = host.rotate(store)
        assert (result["changed"], result["delivered"], result["trimmed"], result["exported"]) == (False, 0, 0, 0)
        # Under "verified" the host hears the verdict once more.
        assert result["rounds"] == (2 if policy == "verified" else 1)
        assert result["diff"]["before"] == result["diff"]["after"]
        assert both(store, host) == before


@pytest.mark.parametrize("flavour", support.FLAVOURS)
@pytest.mark.parametrize("rotated", [False, True])
def test_check_mode_writes_nothing_on_either_side(
    tmp_path: Path, store: DirectoryStore, flavour: str, rotated: bool
) -> None:
    host = support.Host(tmp_path / "h", flavour=flavour)
    if rotated:
        host.grow(10)
        host.rotate(store)
    host.grow(12)
    before = both(store, host)
    rotation = host.rotation(store, check=True)
    rotation.predict()
    result = rotation.result()
    assert both(store, host) == before
    assert (result["changed"], result["exported"], result["delivered"]) == (True, 12 if rotated else 13, 0)
    assert result["diff"]["after"]["cut"] - result["diff"]["before"]["cut"] == result["exported"]
    assert host.rotate(store)["exported"] == result["exported"], "what was predicted happens"
    rotation = host.rotation(store, check=True)
    rotation.predict()
    assert rotation.result()["changed"] is False


def test_check_mode_foresees_the_delivery_of_what_was_sealed_before(host: support.Host, store: DirectoryStore) -> None:
    """A timer on the host exported; the rotation will deliver and trim that."""
    host_side.export(load(host.config), False)
    rotation = host.rotation(store, check=True)
    rotation.predict()
    foreseen = rotation.result()["changed"]
    assert host.rotate(store)["changed"] is True
    assert foreseen is True


@pytest.mark.parametrize(("flavour", "policy"), list(itertools.product(support.FLAVOURS, POLICIES)))
def test_check_mode_foresees_what_goes(tmp_path: Path, store: DirectoryStore, flavour: str, policy: str) -> None:
    """At first nothing is sealed, then a part is sealed and not delivered, then the host begins another boot."""
    host = support.Host(tmp_path / "h", flavour=flavour, trim_after=policy)
    for step, count in (("new", 20), ("sealed", 3), ("booted", 5), ("nothing", 0)):
        if step == "sealed":
            host.grow(2)
            host_side.export(load(host.config), False)
        if step == "booted":
            _emulated.reboot(host.kernel)
        host.grow(count)
        rotation = host.rotation(store, check=True)
        rotation.predict()
        foreseen = rotation.result()
        result = host.rotate(store)
        for what in ("changed", "exported", "trimmed", "fault", "flavour"):
            assert foreseen[what] == result[what], (step, what)
        where = [(each["diff"]["after"]["base"], each["diff"]["after"]["cut"]) for each in (foreseen, result)]
        assert where[0] == where[1]
        # What an export staged goes first.
        staged = flavour == "staged" and policy in ("central", "verified")
        going = {"new": 21, "sealed": 2 if staged else 5, "booted": 6, "nothing": 0}
        assert result["trimmed"] == (0 if flavour == "export_only" or policy == "never" else going[step])


def test_check_mode_foresees_that_a_loss_lets_nothing_go(host: support.Host, store: DirectoryStore) -> None:
    host.grow(5)
    host.rotate(store)
    host.grow(9)
    _emulated.kexec(host.kernel, False)
    host.grow(4)
    rotation = host.rotation(store, check=True)
    rotation.predict()
    foreseen, result = rotation.result(), host.rotate(store)
    assert foreseen["trimmed"] == result["trimmed"] == 0
    assert foreseen["exported"] == result["exported"] > 0
    assert (foreseen["fault"]["reason"], foreseen["fault"]["index"]) == ("kexec", 205)
    assert (result["fault"]["reason"], result["fault"]["index"]) == ("kexec", 205)


@pytest.mark.parametrize("flavour", support.FLAVOURS)
def test_check_mode_knows_that_an_anchor_alone_is_not_rotated(
    tmp_path: Path, store: DirectoryStore, flavour: str
) -> None:
    host = support.Host(tmp_path / "h", flavour=flavour)
    host.grow(9)
    host.rotate(store, anchor=True)
    rotation = host.rotation(store, check=True, anchor=True)
    rotation.predict()
    foreseen, result = rotation.result(), host.rotate(store, anchor=True)
    for what in ("changed", "exported", "trimmed"):
        assert foreseen[what] == result[what] and not result[what]


def test_check_mode_foresees_a_spool_that_was_emptied(host: support.Host, store: DirectoryStore) -> None:
    host.rotate(store)
    shutil.rmtree(host.spool)
    os.mkdir(host.spool)
    for attempt in (host.rotation(store, check=True).predict, lambda: host.rotate(store)):
        with pytest.raises(HostFailed) as caught:
            attempt()
        assert caught.value.reason == "spool_behind_store"


@pytest.mark.parametrize("to", ["cut", "anchor", "records"])
@pytest.mark.parametrize("policy", ["local", "central"])
@pytest.mark.parametrize("number", [1, 2])
def test_check_mode_foresees_a_trim_with_an_anchor_that_is_to_be_made(
    tmp_path: Path, store: DirectoryStore, to: str, policy: str, number: int
) -> None:
    host = support.Host(tmp_path / "h", trim_after=policy)
    host.grow(5)
    host.rotate(store, anchor=True)
    host.grow(8)
    want = {"to": to, "records": 7, "anchor": number, "make_anchor": True}

    def trimmed(check: bool) -> int | str:
        try:
            return t.cast(int, host_side.trim(load(host.config), **want, check=check)["trimmed"])
        except ImaError as error:
            assert error.reason in ("not_sealed", "not_acknowledged", "no_anchor")
            return "refused"

    assert trimmed(check=True) == trimmed(check=False)


def test_check_mode_foresees_an_anchor_and_the_trim_to_it(tmp_path: Path) -> None:
    host = support.Host(tmp_path / "h", trim_after="local")
    host.grow(5)
    want = {"to": "cut", "records": 0, "anchor": 1}
    config = load(host.config)
    host_side.export(config, False)
    host_side.trim(config, **want, make_anchor=False, check=False)
    host.grow(3)
    foreseen = host_side.trim(config, **want, make_anchor=True, check=True)["changed"]
    assert host_side.trim(config, **want, make_anchor=True, check=False)["changed"] is True
    assert foreseen is True


@pytest.mark.parametrize("flavour", support.FLAVOURS)
def test_anchors(tmp_path: Path, store: DirectoryStore, flavour: str) -> None:
    host = support.Host(tmp_path / "h", flavour=flavour)
    host.grow(9)
    host.rotate(store, anchor=True)
    before = both(store, host)
    result = host.rotate(store, anchor=True)
    assert (result["changed"], result["exported"]) == (False, 0) and both(store, host) == before
    host.grow(3)
    host.rotate(store, anchor=True)
    anchors = [anchor for sealed in support.take(store) for anchor in sealed.manifest["anchors"]]
    assert [anchor["index"] for anchor in anchors] == [10]
    assert verify(store, "h", ()).verdict == "consistent"


def test_a_reboot_begins_a_new_boot(host: support.Host, store: DirectoryStore) -> None:
    host.rotate(store)
    _emulated.reboot(host.kernel)
    host.grow(4)
    result = host.rotate(store)
    assert result["claim"]["index"] == 5 and verify(store, "h", ()).boots == 2


def test_what_the_host_finds_comes_back_as_its_reason(host: support.Host, store: DirectoryStore) -> None:
    host.rotate(store)
    host.grow(30)
    _emulated.foreign_trim(host.kernel, 10)
    before = support.tree(store.directory)
    with pytest.raises(HostFailed) as caught:
        host.rotate(store)
    assert caught.value.reason == "foreign_trim" and caught.value.details["index"] == 200
    assert support.tree(store.directory) == before and host.live() == 20


def test_a_kexec_that_lost_records_is_delivered_with_its_fault(host: support.Host, store: DirectoryStore) -> None:
    host.rotate(store)
    host.grow(3)
    _emulated.kexec(host.kernel, False)
    host.grow(2)
    result = host.rotate(store)
    assert result["fault"]["reason"] == "kexec" and result["fault"]["index"] == 200
    assert result["trimmed"] == 0 and host.live() == 3
    verdict = verify(store, "h", ())
    assert (verdict.verdict, verdict.reason, verdict.index) == ("broken", "kexec", 200)


# -- the policy "verified" -----------------------------------------------------------------------------------------


def test_verified_deletes_nothing_before_the_verdict(tmp_path: Path, store: DirectoryStore) -> None:
    host = support.Host(tmp_path / "h", trim_after="verified", shard_records=50)
    host.grow(199)
    live = []

    def watch(number: int, answer: support.Json) -> support.Json:
        live.append((host.rounds[-1]["have"] or {}).get("verdict", ""))
        assert host.live() == (200 if not live[-1] else 0)
        return answer

    rotation = host.rotation(store, call=support.Wire(host, watch))
    rotation.run()
    assert live[-1] == "consistent" and rotation.result()["trimmed"] == 200


def test_verified_with_a_broken_history_deletes_nothing(tmp_path: Path, store: DirectoryStore) -> None:
    host = support.Host(tmp_path / "h", trim_after="verified")
    host.grow(9)
    host.rotate(store)
    shard = support.paths(store, support.take(store)[0])[0]
    data = Path(shard).read_bytes()
    Path(shard).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    host.grow(9)
    with pytest.raises(StoreError) as caught:
        host.rotate(store)
    assert caught.value.reason == "edited_shard" and caught.value.details["index"] == 0
    assert host.live() == 9


def test_verified_looks_at_earlier_claims(tmp_path: Path, store: DirectoryStore) -> None:
    host = support.Host(tmp_path / "h", trim_after="verified")
    host.grow(9)
    result = host.rotate(store)
    result["claim"]["aggregate_digest"] = "0" * 64
    support.write_fleet(store, 1, {"h": result})
    host.grow(9)
    with pytest.raises(StoreError) as caught:
        host.rotate(store)
    assert caught.value.reason == "edited_manifest" and host.live() == 9


def test_verified_never_passes_an_old_verdict_on_to_a_new_shard(tmp_path: Path, store: DirectoryStore) -> None:
    """Between the verdict and the round that tells the host of it, a timer on the host seals another shard."""
    host = support.Host(tmp_path / "h", trim_after="verified", shard_records=50)
    host.grow(20)
    judged: list[str] = []
    real, late = _rotation.verify, []

    def verifying(store_: t.Any, name: str, claims: t.Any, **options: t.Any) -> t.Any:
        judged.append(store_.head(name).digest)
        return real(store_, name, claims, **options)

    def call(one_round: support.Json) -> support.Json:
        told = one_round["have"]
        if told and told["verdict"]:
            assert told["manifest"] in judged, "the host is told a verdict on a shard that nobody verified"
            if not late:
                late.append(True)
                host.grow(5)
                assert host_side.export(load(host.config), False)["records"] == 5
        return host.answer(one_round)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rotation, "verify", verifying)
        host.rotation(store, call=call).run()
    assert late


# -- busy, locked, unreachable ---------------------------------------------------------------------------------------


def test_two_rotations_at_once_into_one_store(host: support.Host, store: DirectoryStore) -> None:
    caught: list[str] = []

    def second(number: int, answer: support.Json) -> support.Json:
        if number == 2:
            with pytest.raises(StoreError) as error:
                host.rotate(DirectoryStore(store.directory))
            caught.append(error.value.reason)
        return answer

    host.rotation(store, call=support.Wire(host, second)).run()
    assert caught == ["store_busy"] and verify(store, "h", ()).records == 200 and host.live() == 0


def test_two_rotations_at_once_on_one_host(host: support.Host, store: DirectoryStore) -> None:
    host.rotate(store)
    with open(os.path.join(host.spool, "lock"), "rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(HostFailed) as caught:
            host.rotate(store)
    assert caught.value.reason == "locked" and host.rotate(store)["changed"] is False


@pytest.mark.parametrize("policy", ["central", "never"])
def test_a_host_that_goes_on_sealing_does_not_keep_the_rotation(
    tmp_path: Path, store: DirectoryStore, policy: str
) -> None:
    """Its own timer seals shards in every round; they are the next rotation's."""
    host = support.Host(tmp_path / "h", trim_after=policy, shard_records=100)
    host.grow(199)

    def seals(number: int, answer: support.Json) -> support.Json:
        assert number < 50, "the rotation runs after the host"
        host.grow(200)
        host_side.export(load(host.config), False)
        return answer

    wire = support.Wire(host, seals)
    rotation = _rotation.Rotation(store, "h", wire, {"chunk_bytes": support.CHUNK})
    rotation.run()
    assert rotation.records >= 200 and verify(store, "h", ()).verdict == "consistent"
    recorded = len(host.recorded())
    host.rotate(store)
    assert b"".join(sealed.raw for sealed in support.take(store)) == host.recorded()[:recorded]
    assert host.live() == (0 if policy == "central" else verify(store, "h", ()).records)


@pytest.mark.parametrize("flavour", ["delete_n", "staged"])
def test_a_list_that_somebody_holds_open(tmp_path: Path, store: DirectoryStore, flavour: str) -> None:
    host = support.Host(tmp_path / "h", flavour=flavour)
    host.grow(9)
    pid, close = hold(host.kernel)
    try:
        with pytest.raises(HostFailed) as caught:
            host.rotate(store)
    finally:
        close()
    assert caught.value.reason == "list_busy" and f"(pid {pid})" in caught.value.msg
    assert host.live() == 10
    assert host.rotate(store)["claim"]["index"] == 10
    assert host.live() == 0 and verify(store, "h", ()).verdict == "consistent" and pid


@pytest.mark.parametrize(("flavour", "flush"), [("delete_n", False), ("staged", False), ("staged", True)])
@pytest.mark.parametrize("policy", POLICIES[:3])
def test_who_holds_the_list_open_keeps_nothing_from_being_saved(
    tmp_path: Path, store: DirectoryStore, flavour: str, flush: bool, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For as long as it goes on, however often: what is not saved is lost with the next reset."""
    waited: list[bool] = []
    real = Lists.writer
    monkeypatch.setattr(Lists, "writer", lambda self, staged=False: waited.append(staged) or real(self, staged=staged))
    host = support.Host(tmp_path / "h", flavour=flavour, trim_after=policy, flush_htable=flush)
    host.grow(20)
    host.rotate(store)
    _pid, close = hold(host.kernel)
    try:
        for count in (5, 30, 1):
            host.grow(count)
            waited.clear()
            with pytest.raises(HostFailed) as caught:
                host.rotate(store)
            assert caught.value.reason == "list_busy" and "held open by" in caught.value.msg
            assert 1 <= len(waited) <= 2, "not in each round"
            assert b"".join(sealed.raw for sealed in support.take(store)) == host.recorded()
            host.grow(3)
            said = host_side.save(load(host.config))
            assert said["records"] == 3 and said["trimmed"] == 0 and "held open by" in said["busy"]
        assert host.live() == 45
    finally:
        close()
    result = host.rotate(store)
    again = host.rotate(store)
    assert result["trimmed"] + again["trimmed"] == 45 and host.live() == 0
    assert verify(store, "h", ()).verdict == "consistent"


def remove(host: support.Host, store: DirectoryStore, check: bool = False) -> support.Json:
    said = verify(store, "h", ())
    return host_side.remove_spool(load(host.config), said.aggregate_digest, said.expired, check)


def test_a_spool_goes_when_the_store_has_all_of_it(host: support.Host, store: DirectoryStore) -> None:
    host.rotate(store)
    before = both(store, host)
    assert remove(host, store, check=True) == {"changed": True, "shards": 2}
    assert both(store, host) == before
    assert remove(host, store) == {"changed": True, "shards": 2}
    assert not os.path.exists(host.spool)
    assert remove(host, store) == {"changed": False, "shards": 0}


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_exported_meanwhile_keeps_the_spool(tmp_path: Path, store: DirectoryStore, policy: str) -> None:
    """The timer exports, and under ``local`` trims, after the rotation whose word the removal goes by."""
    host = support.Host(tmp_path / "h", trim_after=policy)
    host.grow(9)
    host.rotate(store)
    host.grow(3)
    host_side.save(load(host.config))
    before = both(store, host)
    with pytest.raises(SpoolError) as caught:
        remove(host, store)
    assert caught.value.reason == "not_delivered"
    assert both(store, host) == before
    host.rotate(store)
    assert remove(host, store)["changed"] is True


def test_what_expired_in_the_store_keeps_the_spool_that_still_has_it(host: support.Host, store: DirectoryStore) -> None:
    host.rotate(store)
    head = Spool(host.spool).head
    config = load(host.config)
    digest_of_head = verify(store, "h", ()).aggregate_digest
    before = both(store, host)
    with pytest.raises(SpoolError) as caught:
        host_side.remove_spool(config, digest_of_head, 1, False)
    assert caught.value.reason == "not_delivered" and "1 shards have expired" in caught.value.msg
    assert both(store, host) == before and head is not None and head.sequence == 2
    Spool(host.spool).prune(Spool(host.spool).entries[0], store.name, "2026-01-01T00:00:00Z")
    assert host_side.remove_spool(config, digest_of_head, 1, False)["changed"] is True


def hold(kernel: str) -> tuple[int, t.Callable[[], None]]:
    """Let another process hold a list open for read."""
    ready, tell = os.pipe()
    wait, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            EmulatedFiles(kernel).open("ascii_runtime_measurements", os.O_RDONLY)
            os.write(tell, b"x")
            os.close(end)
            os.read(wait, 1)
        finally:
            os._exit(0)
    os.read(ready, 1)

    def close() -> None:
        os.write(end, b"x")
        os.waitpid(pid, 0)
        for descriptor in (ready, tell, wait, end):
            os.close(descriptor)

    return pid, close


@pytest.mark.parametrize("moment", [1, 2, 3, 4])
def test_unreachable_at_any_round(host: support.Host, store: DirectoryStore, moment: int) -> None:
    """The round is done on the host, its answer is lost."""

    def lose(number: int, answer: support.Json) -> support.Json:
        return {"unreachable": True, "msg": "Connection reset"} if number == moment else answer

    with pytest.raises(HostUnreachable) as caught:
        host.rotation(store, call=support.Wire(host, lose)).run()
    assert caught.value.reason == "unreachable" and caught.value.raw["unreachable"]
    host.rotate(store)
    verdict = verify(store, "h", ())
    assert (verdict.verdict, verdict.records, host.live()) == ("consistent", 200, 0)
    assert b"".join(sealed.raw for sealed in support.take(store)) == host.recorded()


# -- hosts that lie --------------------------------------------------------------------------------------------------


def lie(host: support.Host, store: DirectoryStore, change: Change, **options: t.Any) -> ImaError:
    """Rotate with changed answers; return the error. Nothing may have been published, nothing deleted."""
    before = {name for name in support.tree(store.directory) if name.endswith((".gz", ".json"))}
    live = host.live()
    with pytest.raises(ImaError) as caught:
        host.rotation(store, call=support.Wire(host, change, **options), **options).run()
    after = {name for name in support.tree(store.directory) if name.endswith((".gz", ".json"))}
    assert {name for name in after - before if "evidence" not in name and name != "format.json"} == set()
    assert host.live() == live
    assert isinstance(caught.value, (StoreError, ManifestError, HostFailed))
    return caught.value


def setting(**members: t.Any) -> Change:
    return lambda number, answer: dict(answer, **members)


def first_chunk(**members: t.Any) -> Change:
    def change(number: int, answer: support.Json) -> support.Json:
        answer["chunks"][0].update(members)
        return answer

    return change


WRONG = [
    ("changed", 1),
    ("changed", "yes"),
    ("exported", -1),
    ("exported", 10**30),
    ("exported", True),
    ("exported", 1.5),
    ("trimmed", "7"),
    ("more", None),
    ("pending", []),
    ("pending", 1 << 54),
    ("manifests", {}),
    ("manifests", [1]),
    ("manifests", ["x"] * 17),
    ("manifests", ["x" * ((1 << 20) + 1)]),
    ("chunks", "x"),
    ("chunks", [{}]),
    ("chunks", [{"sequence": 0, "offset": 0, "data": ""}]),
    ("chunks", [{"sequence": 1, "offset": -1, "data": ""}]),
    ("chunks", [{"sequence": 1, "offset": 0, "data": b"x".hex, "x": 1}]),
    ("chunks", [{"sequence": 1, "offset": 0, "data": None}]),
    ("fault", {}),
    ("fault", {"reason": "UPPER", "boot_id": "x", "index": 0, "lost": True, "message": ""}),
    ("flavour", "chocolate"),
    ("flavour", ["delete_n"]),
    ("trim_after", "always"),
    ("position", None),
    ("position", {"before": {}, "after": {}}),
]


@pytest.mark.parametrize(("key", "value"), WRONG, ids=[f"{key}-{number}" for number, (key, _v) in enumerate(WRONG)])
def test_wrong_types_and_huge_numbers(host: support.Host, store: DirectoryStore, key: str, value: t.Any) -> None:
    assert lie(host, store, setting(**{key: value})).reason == "bad_answer"


@pytest.mark.parametrize("raw", [None, [], "x", 7, {}, {"msg": "x"}, {"pending": 0}, {"failed": True, "pending": 0}])
def test_what_is_no_answer_at_all(host: support.Host, store: DirectoryStore, raw: t.Any) -> None:
    error = lie(host, store, lambda number, answer: raw)
    assert error.reason in ("host_failed", "bad_answer")


def test_an_answer_keeps_only_what_the_schema_knows(host: support.Host) -> None:
    answer = host.answer({"have": None, "part": None, "export": True})
    kept = answer_of(dict(answer, ansible_facts={"a": 1}, invocation={}, _ansible_no_log=False))
    assert kept == answer


def test_a_failure_of_the_host_is_bounded_and_its_details_are_checked() -> None:
    raw = {
        "failed": True,
        "msg": "\x1b[31m" + "x" * 10**6,
        "reason": "../../x",
        "index": -1,
        "boot_id": "../..",
        "path": "/etc/shadow",
        "ansible_facts": {"x": 1},
    }
    with pytest.raises(HostFailed) as caught:
        answer_of(raw)
    assert caught.value.reason == "host_failed" and caught.value.details == {}
    assert len(str(caught.value)) < 2100 and "\x1b" not in str(caught.value)
    boot = "13b0692a-94e1-4061-890d-87c47d9ca675"
    with pytest.raises(HostFailed) as caught:
        answer_of({"failed": True, "msg": ["no"], "reason": "locked", "index": 3, "boot_id": boot})
    assert caught.value.reason == "locked" and caught.value.details == {"index": 3, "boot_id": boot}


def manifest_with(**members: t.Any) -> Change:
    """The first manifest, with other members, in canonical form."""

    def change(number: int, answer: support.Json) -> support.Json:
        if answer["manifests"]:
            manifest = first_manifest(answer)
            manifest.update(members)
            answer["manifests"][0] = canonical(manifest).decode("ascii")
        return answer

    return change


def first_manifest(answer: support.Json) -> support.Json:
    return t.cast(support.Json, json.loads(answer["manifests"][0]))


PATHS = ["../../../../tmp/x", "/etc/passwd", "..", ".", "a/b", "a\0b", "", "evidence", ".incoming"]
STRINGS = ("boot_id", "machine_id", "sha256", "stored_sha256", "time", "flavour", "byte_order", "previous")


@pytest.mark.parametrize(("key", "value"), list(itertools.product(STRINGS, PATHS[:4])))
def test_a_path_in_any_string_of_a_manifest(host: support.Host, store: DirectoryStore, key: str, value: str) -> None:
    assert lie(host, store, manifest_with(**{key: value})).reason == "schema"


@pytest.mark.parametrize("value", PATHS)
def test_a_path_as_the_name_of_a_host(host: support.Host, store: DirectoryStore, value: str) -> None:
    assert lie(host, store, manifest_with(name=value)).reason == ("schema" if not value else "host_name")


VALUES = [
    ({"sequence": 2}, "chain"),
    ({"sequence": 0}, "schema"),
    ({"sequence": 10**9}, "schema"),
    ({"sequence": 10**25}, "not_json"),
    ({"sequence": True}, "schema"),
    ({"sequence": "1"}, "schema"),
    ({"previous": "0" * 64}, "chain"),
    ({"first": 5}, "chain"),
    ({"first": 1 << 60}, "schema"),
    ({"count": 0}, "schema"),
    ({"count": 1 << 40}, "manifest_values"),
    ({"size": 1 << 50}, "manifest_values"),
    ({"stored_size": 5 << 30}, "too_large"),
    ({"stored_size": 0}, "manifest_values"),
    ({"name": "another"}, "host_name"),
    ({"version": 2}, "newer_version"),
    ({"version": True}, "schema"),
    ({"quote": "x"}, "schema"),
    ({"extra": 1}, "schema"),
    ({"pcrs_start": {}}, "manifest_values"),
    ({"pcrs_start": {"24": {}}, "pcrs_end": {"24": {}}}, "schema"),
    ({"pcrs_start": {"10": {"sha1": "11" * 20, "sha256": "00" * 32}}}, "chain"),
    ({"anchors": [{"index": 0, "sequence": 1, "sha256": "../x"}]}, "schema"),
    ({"faults": [{"reason": "../x", "boot_id": "x", "index": 0, "lost": True, "message": ""}]}, "schema"),
]


@pytest.mark.parametrize(("members", "reason"), VALUES, ids=[str(number) for number in range(len(VALUES))])
def test_a_manifest_that_cannot_be_the_next_one(
    host: support.Host, store: DirectoryStore, members: support.Json, reason: str
) -> None:
    assert lie(host, store, manifest_with(**members)).reason == reason


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not_json"),
        ("null", "schema"),
        ("[" * 100000, "not_json"),
        ('{"a":1,"a":1}', "not_json"),
        ('{"version":1e400}', "not_json"),
        ('{"version":NaN}', "not_json"),
        ("{} ", "schema"),
    ],
)
def test_a_manifest_that_is_not_our_json(host: support.Host, store: DirectoryStore, text: str, reason: str) -> None:
    assert lie(host, store, setting(manifests=[text])).reason == reason


def test_a_manifest_with_characters_beyond_ascii(host: support.Host, store: DirectoryStore) -> None:
    assert lie(host, store, setting(manifests=["\u00e9"])).reason in ("bad_answer", "not_json")


def test_a_manifest_that_is_not_canonical(host: support.Host, store: DirectoryStore) -> None:
    def spaced(number: int, answer: support.Json) -> support.Json:
        answer["manifests"][0] = answer["manifests"][0].replace(":", ": ", 1)
        return answer

    assert lie(host, store, spaced).reason == "not_canonical"


def test_another_machine_under_the_name(tmp_path: Path, host: support.Host, store: DirectoryStore) -> None:
    host.rotate(store)
    host.grow(3)
    assert lie(host, store, manifest_with(machine_id="0" * 32)).reason == "machine_changed"
    clone = support.Host(tmp_path / "clone")
    clone.grow(5)
    assert lie(clone, store, lambda number, answer: answer).reason in ("spool_behind_store", "store_diverged")


def resized(change: t.Callable[[bytes], bytes]) -> Change:
    def changed(number: int, answer: support.Json) -> support.Json:
        data = base64.b64decode(answer["chunks"][0]["data"])
        answer["chunks"][0]["data"] = base64.b64encode(change(data)).decode()
        return answer

    return changed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (first_chunk(offset=1), "bad_answer"),
        (first_chunk(offset=1 << 40), "bad_answer"),
        (first_chunk(sequence=2), "bad_answer"),
        (first_chunk(data="%%%%"), "bad_answer"),
        (first_chunk(data="\u00e9\u00e9\u00e9\u00e9"), "bad_answer"),
        (first_chunk(data="abc"), "bad_answer"),
        (first_chunk(data="YQ==\nYQ=="), "bad_answer"),
        (first_chunk(data=""), "bad_answer"),
        (resized(lambda data: data + data), "bad_answer"),
        (resized(lambda data: data + bytes(1 << 20)), "bad_answer"),
        (resized(lambda data: bytes(len(data))), "shard_altered"),
        (setting(chunks=[]), "bad_answer"),
        (setting(chunks=[{"sequence": 1, "offset": 0, "data": "A" * ((32 << 20) + 4)}]), "bad_answer"),
    ],
    ids=[
        *("offset", "far", "sequence", "no-base64", "not-ascii", "cut-base64", "newline", "empty", "long"),
        *("huge", "zeros", "none", "over-the-limit"),
    ],
)
def test_chunks_that_lie(host: support.Host, store: DirectoryStore, change: Change, reason: str) -> None:
    assert lie(host, store, change, chunk_bytes=1 << 20).reason in (reason, "bad_answer")


def test_a_short_chunk_is_asked_for_again_and_the_shard_is_whole(host: support.Host, store: DirectoryStore) -> None:
    """A host that gives less than it could is slow, not false: the next round goes on where it stopped."""

    def shorter(number: int, answer: support.Json) -> support.Json:
        if number == 1:
            data = base64.b64decode(answer["chunks"][0]["data"])[: _rotation.LEAST_CHUNK]
            answer["chunks"] = [dict(answer["chunks"][0], data=base64.b64encode(data).decode())]
        return answer

    host.rotation(store, call=support.Wire(host, shorter)).run()
    assert verify(store, "h", ()).records == 200


@pytest.mark.parametrize("members", [{"more": True}, {"pending": 5}, {"more": True, "pending": 1, "chunks": []}])
def test_a_host_that_never_ends(
    host: support.Host, store: DirectoryStore, members: support.Json, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.rotate(store)
    monkeypatch.setattr(_rotation, "MOST_ROUNDS", 30)
    error = lie(host, store, setting(**members))
    assert error.reason in ("too_many_rounds", "bad_answer")


def test_a_host_that_promises_more_and_gives_nothing_is_not_asked_for_ever(
    host: support.Host, store: DirectoryStore
) -> None:
    host.rotate(store)
    wire = support.Wire(host, setting(more=True))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rotation, "MOST_ROUNDS", 2000)
        with pytest.raises(StoreError):
            host.rotation(store, call=wire).run()
    assert wire.count < 1000, "thousands of connections in which nothing came"


def forged(host: support.Host, raw: bytes, stored: bytes, **members: t.Any) -> Change:
    """The host's first shard with other bytes, its manifest made to fit as far as ``members`` do not say otherwise."""

    def change(number: int, answer: support.Json) -> support.Json:
        sealed = support.Sealed(first_manifest(answer), raw)
        support.describe(sealed)
        sealed.manifest.update(stored_size=len(stored), stored_sha256=support.hashlib.sha256(stored).hexdigest())
        sealed.manifest.update(members)
        data = base64.b64encode(stored).decode()
        chunk = {"sequence": 1, "offset": 0, "data": data}
        return dict(answer, manifests=[canonical(sealed.manifest).decode()], chunks=[chunk], pending=1)

    return change


def test_a_gzip_bomb(host: support.Host, store: DirectoryStore) -> None:
    bomb = gzip.compress(bytes(64 << 20), 9, mtime=0)
    for size in (40000, len(bomb) * 1000):
        change = forged(host, b"", bomb, size=size, count=100)
        tracemalloc.start()
        assert lie(host, store, change, chunk_bytes=1 << 20).reason == "shard_altered"
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20, "memory is bounded"
    assert store.unfinished("h") is None, "what did not fit is dropped"


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (lambda raw: raw, "shard_altered"),
        (lambda raw: gzip.compress(raw)[:-9], "shard_altered"),
        (lambda raw: gzip.compress(raw) + b"more", "shard_altered"),
        (lambda raw: gzip.compress(raw) + gzip.compress(raw), "shard_altered"),
        (lambda raw: gzip.compress(raw[:-1]), "shard_altered"),
        (lambda raw: gzip.compress(raw + b"x"), "shard_altered"),
        (lambda raw: b"\x1f\x8b" + bytes(500), "shard_altered"),
    ],
    ids=["plain", "cut", "tail", "two-members", "short", "long", "junk"],
)
def test_a_shard_that_is_not_what_its_manifest_says(
    host: support.Host, store: DirectoryStore, stored: t.Callable[[bytes], bytes], reason: str
) -> None:
    raw = host.recorded()[:30000]
    assert lie(host, store, forged(host, raw, stored(raw)), chunk_bytes=1 << 20).reason == reason


@pytest.mark.parametrize("off", [-1, 1])
def test_a_stored_size_that_lies(host: support.Host, store: DirectoryStore, off: int) -> None:
    raw = host.recorded()
    stored = gzip.compress(raw)
    error = lie(host, store, forged(host, raw, stored, stored_size=len(stored) + off), chunk_bytes=1 << 20)
    assert error.reason in ("shard_altered", "bad_answer", "chain")


def test_a_manifest_edited_between_the_rounds_of_one_shard(host: support.Host, store: DirectoryStore) -> None:
    def edited(number: int, answer: support.Json) -> support.Json:
        return manifest_with(release="other")(number, answer) if number >= 2 else answer

    error = lie(host, store, edited)
    assert error.reason == "bad_answer", "another manifest is another shard, whose bytes begin at 0"


def test_equivocation_is_refused_and_its_evidence_is_kept(host: support.Host, store: DirectoryStore) -> None:
    """The host has shown one shard 2; now another one has that sequence."""
    host.rotate(store)
    history = support.take(store)
    other = copy.deepcopy(history[1].manifest)
    other["violations"] = 1
    data = canonical(other)
    stored = Path(support.paths(store, history[1])[0]).read_bytes()
    chunk = {"sequence": 2, "offset": 0, "data": base64.b64encode(stored).decode()}
    before = support.tree(store.directory)

    def change(number: int, answer: support.Json) -> support.Json:
        return dict(answer, manifests=[data.decode()], chunks=[chunk], pending=1)

    for _twice in range(2):
        error = lie(host, store, change, chunk_bytes=1 << 20)
        assert error.reason == "equivocation" and error.details["sequence"] == 2
        after = support.tree(store.directory)
        assert {name: after[name] for name in before} == before
        evidence = os.path.join(support.base(store), "evidence")
        assert os.listdir(evidence) == [digest(data) + ".json"]
        assert Path(evidence, digest(data) + ".json").read_bytes() == data
    failed = {"failed": True, "claim": {"status": "missing", "reason": "equivocation", "message": "two shards 2"}}
    support.write_fleet(store, 1, {"h": failed})
    verdict = verify(store, "h", claims_of(store)["h"])
    assert (verdict.verdict, verdict.reason) == ("broken", "equivocation")


def test_the_spool_was_emptied_after_the_store_had_shards(host: support.Host, store: DirectoryStore) -> None:
    host.rotate(store)
    before = support.tree(store.directory)
    shutil.rmtree(os.path.join(host.spool, "shards"))
    os.unlink(os.path.join(host.spool, "journal.json"))
    host.grow(3)
    with pytest.raises(HostFailed) as caught:
        host.rotate(store)
    assert caught.value.reason == "spool_behind_store" and support.tree(store.directory) == before


def test_a_store_that_lost_its_newest_shard_gets_it_again(host: support.Host, store: DirectoryStore) -> None:
    host.rotate(store)
    before = support.tree(store.directory)
    newest = support.take(store)[-1]
    for path in support.paths(store, newest):
        os.unlink(path)
    assert host.rotate(store)["delivered"] == 1
    assert support.tree(store.directory) == before
