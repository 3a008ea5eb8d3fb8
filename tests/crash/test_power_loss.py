# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A power cut at every instant: each state that it may leave on a disk is recovered from, by the real thing.

A host that loses power loses its list as well: all that is promised is that what was deleted from the kernel, and what
the store acknowledged, is in the shards. A controller that loses power must have what it acknowledged.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import random
import shutil
import subprocess
import tempfile
import typing as t
from pathlib import Path

import pytest
from recorder import Cut, Event, Kernel, Recorder, lay_out

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _protocol, _schema, _snapshot
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._fleet import document, member
from ansible_collections.integrity.ima.plugins.module_utils._shard import SHARD_SUFFIX, Entry, digest
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import claims_of, verify
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support, _support

LONG = os.environ.get("LONG") == "1"
MOST = 40  # states of one scenario, unless LONG=1
MEMORY = "/dev/shm"
RUN = "20260102T030400Z-00000001"
Tally = t.Callable[[str, float], None]


class Promises:
    """What the outside was told before a power cut."""

    def __init__(self, events: t.Sequence[Event]) -> None:
        self.prefix = len(events)
        self.deleted: dict[str, int] = {}
        self.acknowledged: dict[int, str] = {}
        self.faults: set[tuple[str, int]] = set()
        self.runs: set[str] = set()
        self.kernel: Kernel
        for event in events:
            if event.kind == "kernel":
                self.kernel = event.told
                self.deleted[event.told.boot_id] = event.told.first
            elif event.kind == "acknowledged":
                self.acknowledged.update([event.told])
            elif event.kind == "fault":
                self.faults.add(event.told)
            elif event.kind == "run":
                self.runs.add(event.told)


class Scene:
    """A recorded run. ``start``: only power cuts behind so many events are of interest."""

    kernel: str
    spool: str
    recorder: Recorder
    start = 0
    tried = 0
    key: str | None = None  # for encrypted shards
    lenient: frozenset[str] = frozenset()  # faults that may be told

    def recorded(self, name: str = "") -> None:
        """Keep what the kernel recorded, and how it is after a reboot."""
        self._kernel, self._rebooted = f"{self.kernel}.end{name}", f"{self.kernel}.rebooted{name}"
        for copy in (self._kernel, self._rebooted):
            shutil.copytree(self.kernel, copy)
        _emulated.reboot(self._rebooted)

    def cuts(self, machine: str) -> list[Cut]:
        return self.recorder.cuts(machine, self.start)

    def promised(self, cut: Cut) -> Promises:
        return Promises(self.recorder.events[: cut.prefix])

    def again(self) -> bool:
        """Whether another rotation follows the recovery: after every fourth power cut, or all of them."""
        self.tried += 1
        return LONG or self.tried % 4 == 0

    def reboot(self) -> None:
        shutil.rmtree(self.kernel)
        shutil.copytree(self._rebooted, self.kernel)

    def kernel_at(self, promised: Promises) -> None:
        """The kernel as it was at that instant: it did not lose power."""
        shutil.rmtree(self.kernel)
        shutil.copytree(self._kernel, self.kernel)
        Path(self.kernel, "state").write_bytes(promised.kernel.state)

    def look(self, promised: Promises) -> None:
        """The shards are what the kernel recorded, and hold all that was promised; the chain holds."""
        spool = Spool(self.spool)
        boots = _emulated.recorded(self.kernel)
        for boot in boots:
            entries = [entry for entry in spool.entries if entry.boot_id == boot.boot_id]
            end, first = (entries[-1].end, entries[0].first) if entries else (0, 0)
            gone = promised.deleted.get(boot.boot_id, 0)
            assert end >= gone, f"lost: records {end} to {gone - 1} were deleted from the kernel, no shard has them"
            sealed, truth = raw_of(spool, entries), Path(boot.path).read_bytes()[: boot.size]
            assert first == 0 and truth.startswith(sealed), "the shards are not what the kernel recorded"
            assert boot is not boots[-1] or sealed == truth, "an export leaves records behind"
        sequences = {entry.sequence: spool.digest(entry) for entry in spool.entries}
        for sequence, manifest in promised.acknowledged.items():
            assert sequences.get(sequence) == manifest, f"lost: shard {sequence}, which the store acknowledged"
        told = {(fault["reason"], fault["index"]) for each in spool.entries for fault in spool.manifest(each)["faults"]}
        assert promised.faults <= told, f"hidden: {promised.faults - told} was found before the power cut"
        assert {reason for reason, _index in told} <= self.lenient, f"a fault that was none: {told}"
        self.judge(spool, {reason for reason, _index in told})
        left = [name for _folder, _folders, names in os.walk(self.spool) for name in names if name.endswith(".tmp")]
        assert left == [] and _protocol.generation(self.spool) == len(spool.entries), "something of a dead run stays"

    def judge(self, spool: Spool, told: set[str]) -> None:
        """The verifier's word on the shards, in a store that has just them."""
        root = self.spool + ".judge"
        shutil.rmtree(root, ignore_errors=True)
        name = spool.manifest(spool.entries[0])["name"]
        for entry in spool.entries:
            target = os.path.join(root, "hosts", name, entry.boot_id)
            os.makedirs(target, exist_ok=True)
            for path in (entry.shard, entry.manifest):
                os.link(os.path.join(spool.shards, path), os.path.join(root, "hosts", name, path))
        Path(root, "format.json").write_bytes(b'{"format":"integrity.ima store","version":1}')
        store = DirectoryStore(root)
        store.key = self.key
        verdict = verify(store, name, [])
        expected = ("broken", told) if told else ("consistent", {""})
        assert verdict.verdict == expected[0] and verdict.reason in expected[1], f"{verdict.reason}: {verdict.message}"

    def host(self, cut: Cut) -> None:
        """The host lost power: boot, rotate, look."""
        raise NotImplementedError


def raw_of(spool: Spool, entries: t.Iterable[Entry]) -> bytes:
    pieces = []
    for entry in entries:
        file, reader = spool.reader(entry)
        with file:
            pieces += iter(functools.partial(reader.read, 65536), b"")
    return b"".join(pieces)


class Alone(Scene):
    """A host without a store."""

    def __init__(self, root: Path, flavour: str = "delete_n", trim_after: str = "local", **keywords: t.Any) -> None:
        keywords = dict({"count": 2, "shard_records": 3}, **keywords)
        self.machine = _support.Host(root / "host", flavour, trim_after, **keywords)
        self.kernel, self.spool = self.machine.kernel, self.machine.spool
        self.before = self.prepare(self.machine)
        self.recorder = Recorder(self.kernel, host=self.spool)
        with self.recorder:
            self.work(self.machine)
        self.recorded()
        if trim_after != "local":
            self.only_acknowledged()

    def prepare(self, host: _support.Host) -> t.Any:
        """What came before: all of it is durable."""
        host.run()
        host.grow(4)

    def work(self, host: _support.Host) -> None:
        host.run()

    def only_acknowledged(self) -> None:
        """No record left the kernel that the store had not acknowledged."""
        spool, most = Spool(self.spool), 0
        ends = {entry.sequence: entry.end for entry in spool.entries}
        for event in self.recorder.events:
            if event.kind == "acknowledged":
                most = max(most, ends[event.told[0]])
            elif event.kind == "kernel":
                assert event.told.first <= most, "a record left the kernel before the store acknowledged it"

    def acknowledge(self, verdict: str = "") -> None:
        spool = Spool(self.spool)
        for entry in spool.entries:
            self.recorder.note("acknowledged", (entry.sequence, spool.digest(entry)))
        self.machine.acknowledge(verdict)

    def host(self, cut: Cut) -> None:
        promised = self.promised(cut)
        lay_out(cut.tree, self.spool)
        self.reboot()
        self.machine.run()
        self.look(promised)
        if self.again():
            self.machine.grow(1)
            self.machine.run()
            self.look(promised)


class FirstRun(Alone):
    def prepare(self, host: _support.Host) -> None:
        pass


class Twice(Alone):
    """With a staged list: the second run deletes what the first staged."""

    def work(self, host: _support.Host) -> None:
        host.run()
        host.grow(1)
        host.run()


class Acknowledged(Alone):
    verdict = ""

    def prepare(self, host: _support.Host) -> None:
        pass

    def work(self, host: _support.Host) -> None:
        host.grow(4)
        host.run()
        self.acknowledge(self.verdict)
        host.run()
        assert host.held() == b""


class Verified(Acknowledged):
    verdict = "consistent"


class Pruned(Alone):
    """All but the newest shard go from the spool; the store has them."""

    def prepare(self, host: _support.Host) -> None:
        host.grow(12)
        host.run()
        shutil.copytree(host.spool, host.spool + ".store")

    def work(self, host: _support.Host) -> None:
        def prune(cycle: _snapshot.Cycle) -> int:
            return cycle.spool.prune(cycle.spool.entries[-2], "/store", "2026-01-01T00:00:00Z")

        assert host.locked(prune) > 1

    def look(self, promised: Promises) -> None:
        spool = Spool(self.spool)
        for entry in spool.entries:
            path = os.path.join(spool.shards, entry.shard)
            if not os.path.exists(path):
                assert entry.sequence <= spool.pruned, "a shard's file is gone that no statement lets go"
                shutil.copyfile(os.path.join(f"{self.spool}.store", "shards", entry.shard), path)
        super().look(promised)


class Encrypted(Alone):
    """Each shard is two files."""

    def prepare(self, host: _support.Host) -> None:
        root = os.path.dirname(host.spool)
        recipients, self.key = os.path.join(root, "recipients"), os.path.join(root, "key")
        os.mkdir(recipients)
        command = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-subj", "/CN=verifier", "-days", "9999"]
        certificate = os.path.join(recipients, "verifier.pem")
        subprocess.run([*command, "-keyout", self.key, "-out", certificate], check=True, capture_output=True)
        with open(host.conf, "a", encoding="utf-8") as file:
            file.write(f"[encryption]\nrecipients = {recipients}\n")
        super().prepare(host)


class Anchored(Alone):
    def work(self, host: _support.Host) -> None:
        host.export()
        host.anchor()
        host.run()
        assert Spool(self.spool).manifest(Spool(self.spool).entries[-1])["anchors"]


class ForeignTrim(Alone):
    """Somebody else trimmed: what was said of it is in the next boot's manifests."""

    lenient = frozenset({"foreign_trim"})

    def prepare(self, host: _support.Host) -> None:
        super().prepare(host)
        _emulated.foreign_trim(host.kernel, 2)

    def promised(self, cut: Cut) -> Promises:
        promised = super().promised(cut)
        promised.deleted.clear()  # it was not the host that deleted them
        return promised

    def work(self, host: _support.Host) -> None:
        try:
            host.run()
        except ImaError as error:
            assert error.reason == "foreign_trim"
            self.recorder.note("fault", (error.reason, error.details["index"]))
        else:
            raise AssertionError("a foreign trim was not found")


class Dies(Alone):
    """A run dies where ``after`` says, and the host stays up; the next one goes on with names that are not safe yet."""

    def __init__(self, root: Path, after: t.Callable[[Event], bool], *arguments: t.Any, **keywords: t.Any) -> None:
        self.after = after
        super().__init__(root, *arguments, **keywords)

    def work(self, host: _support.Host) -> None:
        self.start = self.recorder.dies(host.run, self.after)
        host.run()
        host.run()
        assert host.held() == b""


class SetAside(Alone):
    """A run died with an orphan, and its journal forgot it: nobody can seal it, so it is set aside."""

    def prepare(self, host: _support.Host) -> None:
        super().prepare(host)
        Recorder(self.kernel, host=self.spool).dying(host.run, named("link", SHARD_SUFFIX))
        Spool(self.spool).write_journal(seal=None)

    def work(self, host: _support.Host) -> None:
        host.run()
        assert any(name.endswith(".broken") for name in host.files())


class DiesInTheFirst(Dies):
    def prepare(self, host: _support.Host) -> None:
        pass


class Again(Alone):
    """The power comes back, and the host recovers: that is what is recorded."""

    def __init__(self, before: Alone, cut: Cut, number: int) -> None:
        self.machine, self.kernel, self.spool = before.machine, before.kernel, before.spool
        self.earlier = before.promised(cut)
        lay_out(cut.tree, self.spool)
        before.reboot()
        self.recorder = Recorder(self.kernel, host=self.spool)
        with self.recorder:
            self.machine.run()
        self.recorded(str(number))

    def promised(self, cut: Cut) -> Promises:
        promised = super().promised(cut)
        promised.deleted = {**self.earlier.deleted, **promised.deleted}
        return promised


class Delivered(Scene):
    """A host and a controller with a store."""

    more = 4

    def __init__(self, root: Path, trim_after: str = "central", count: int = 4, shard_records: int = 3) -> None:
        self.machine = _store_support.Host(root / "host", "h", "delete_n", trim_after, shard_records)
        self.kernel, self.spool = self.machine.kernel, self.machine.spool
        self.store = str(root / "store")
        os.mkdir(self.store)
        self.machine.grow(count)
        self.recorder = Recorder(self.kernel, host=self.spool, controller=self.store)
        with self.recorder:
            self.work()
        self.recorded()

    def call(self, one_round: t.Any) -> t.Any:
        have = one_round["have"]
        if have:
            self.recorder.note("acknowledged", (have["sequence"], have["manifest"]))
        return self.machine.answer(one_round)

    def rotate(self) -> t.Any:
        return self.machine.rotate(DirectoryStore(self.store), call=self.call)

    def work(self) -> None:
        result = self.rotate()
        DirectoryStore(self.store).write_run(document(RUN, {"h": member(result)}))
        self.recorder.note("run", RUN)
        self.machine.grow(self.more)
        self.rotate()
        assert self.machine.live() == 0

    def settle(self) -> None:
        """Rotate until all is there. A part that the power cut tore is dropped once, and sent again."""
        try:
            self.machine.rotate(DirectoryStore(self.store))
        except ImaError as error:
            if error.reason != "shard_altered":
                raise
            self.machine.rotate(DirectoryStore(self.store))

    def agree(self) -> None:
        """Host and store have the same shards, and the verifier finds nothing."""
        store, spool = DirectoryStore(self.store), Spool(self.spool)
        assert [*store.entries("h")] == spool.entries, "the store lacks a shard"
        for entry in spool.entries:
            for path in (entry.shard, entry.manifest):
                here, there = os.path.join(spool.shards, path), os.path.join(self.store, "hosts", "h", path)
                assert Path(here).read_bytes() == Path(there).read_bytes(), f"lost: {path} differs in the store"
        verdict = verify(store, "h", claims_of(store).get("h", []))
        assert verdict.verdict == "consistent", f"{verdict.reason}: {verdict.message}"
        assert self.machine.live() == 0, "the store has all shards, and still nothing is deleted"

    def host(self, cut: Cut) -> None:
        promised = self.promised(cut)
        lay_out(cut.tree, self.spool)
        lay_out(self.recorder.at(cut.prefix)["controller"].seen(), self.store)
        self.reboot()
        self.goes_on(promised)

    def controller(self, cut: Cut) -> None:
        """The controller lost power, the host did not."""
        promised = self.promised(cut)
        lay_out(cut.tree, self.store)
        lay_out(self.recorder.at(cut.prefix)["host"].seen(), self.spool)
        self.kernel_at(promised)
        self.kept(promised)
        self.goes_on(promised)

    def goes_on(self, promised: Promises) -> None:
        """Recover and rotate, and where there is time for it once more: what was promised is there, on both sides."""
        self.settle()
        self.look(promised)
        self.agree()
        if self.again():
            self.machine.grow(1)
            self.settle()
            self.look(promised)
            self.agree()

    def kept(self, promised: Promises) -> None:
        """What was acknowledged is in the store, and what was deleted was acknowledged."""
        store = DirectoryStore(self.store)
        there = {entry.sequence: entry for entry in store.entries("h")}
        for sequence, manifest in promised.acknowledged.items():
            entry = there.get(sequence)
            assert entry is not None, f"lost: the store acknowledged shard {sequence}, and does not have it"
            assert digest(store.manifest_bytes("h", entry)) == manifest, f"lost: manifest {sequence} is another"
            shard = Path(self.store, "hosts", "h", entry.stem + SHARD_SUFFIX)
            stored = store.manifest("h", entry)["stored_sha256"]
            assert shard.exists(), f"lost: the store acknowledged shard {sequence}, and does not have it"
            assert hashlib.sha256(shard.read_bytes()).hexdigest() == stored, f"lost: shard {sequence} is torn"
        most = max((there[sequence].end for sequence in promised.acknowledged), default=0)
        assert max(promised.deleted.values()) <= most, "a record left the kernel before the store acknowledged it"
        assert promised.runs <= set(store.runs()), "lost: a fleet document"
        if there:
            verdict = verify(store, "h", claims_of(store).get("h", []))
            assert verdict.verdict == "consistent", f"{verdict.reason}: {verdict.message}"


class DeliveryDies(Delivered):
    """A rotation dies on the controller, which stays up; the next one finds names that are not safe yet."""

    def __init__(self, root: Path, after: t.Callable[[Event], bool], **keywords: t.Any) -> None:
        self.after = after
        super().__init__(root, **keywords)

    def work(self) -> None:
        self.start = self.recorder.dies(self.rotate, self.after)
        self.rotate()
        assert self.machine.live() == 0


class Enrolled(Delivered):
    """A run dies while a key is recorded; the next rotation takes it for recorded."""

    key = b'{"version":1}'

    def work(self) -> None:
        store = DirectoryStore(self.store)
        self.start = self.recorder.dies(
            lambda: store.put_identity("h", self.key), named("link", "identity.json", "controller")
        )
        with store.delivering("h"):
            self.recorder.note("identity", store.identity_bytes("h"))

    def kept(self, promised: Promises) -> None:
        told = [event.told for event in self.recorder.events[: promised.prefix] if event.kind == "identity"]
        assert [DirectoryStore(self.store).identity_bytes("h")] * len(told) == told, "lost: the key on record"

    def controller(self, cut: Cut) -> None:
        lay_out(cut.tree, self.store)
        self.kept(self.promised(cut))


# -- where a run dies --------------------------------------------------------------------------------------------------


def named(kind: str, ending: str, machine: str = "host", number: int = 1) -> t.Callable[[Event], bool]:
    """After the ``number``-th event of this kind on a name that ends so."""
    left = [number]

    def matches(event: Event) -> bool:
        if event.kind == kind and event.machine == machine and event.changes[-1][0].endswith(ending):
            left[0] -= 1
            return left[0] == 0
        return False

    return matches


def the(number: int) -> t.Callable[[Event], bool]:
    """After so many events."""
    left = [number]

    def matches(event: Event) -> bool:
        left[0] -= 1
        return left[0] == 0

    return matches


HOSTS: dict[str, t.Callable[[Path], Scene]] = {
    "the first run": FirstRun,
    "export and trim": Alone,
    "export and trim, staged": lambda root: Twice(root, "staged"),
    "export and trim, ima_flush_htable": lambda root: Twice(root, "staged", flush_htable=True),
    "export only": lambda root: Alone(root, "export_only", "never"),
    "acknowledge, then trim": lambda root: Acknowledged(root, trim_after="central"),
    "acknowledge with a verdict, then trim": lambda root: Verified(root, trim_after="verified"),
    "a prune": Pruned,
    "encrypted shards": Encrypted,
    "anchor": Anchored,
    "a foreign trim is noted": ForeignTrim,
    "a run died with an orphan": lambda root: Dies(root, named("link", SHARD_SUFFIX)),
    "a run died with a manifest that has its name": lambda root: Dies(root, named("link", ".json", number=2)),
    "an orphan is set aside": SetAside,
    "the first run died with its format": lambda root: DiesInTheFirst(root, named("link", "format.json")),
    "the first run died with a new directory": lambda root: DiesInTheFirst(root, named("mkdir", "", number=3)),
    "a rotation": Delivered,
    "a rotation, verified": lambda root: Delivered(root, "verified"),
}
CONTROLLERS: dict[str, t.Callable[[Path], Delivered]] = {
    "a rotation": Delivered,
    "a rotation, verified": lambda root: Delivered(root, "verified"),
    "a shard in several chunks": lambda root: Delivered(root, count=150, shard_records=120),
    "a rotation died with a shard that has its name": lambda root: DeliveryDies(
        root, named("link", SHARD_SUFFIX, "controller")
    ),
    "a rotation died with a manifest that has its name": lambda root: DeliveryDies(
        root, named("link", "-4.json", "controller"), count=3, shard_records=4
    ),
    "a key is recorded": Enrolled,
}


# -- the tests ---------------------------------------------------------------------------------------------------------


def quickly(put: t.Callable[[t.Any, str, t.Any], None]) -> None:
    """Which bytes are safe is reckoned, not tried; and a document is held against its schema once."""
    put(os, "fsync", lambda descriptor: None)
    real: t.Callable[..., str] = _schema.check
    known: dict[t.Any, str] = {}

    def check(value: t.Any, schema: t.Any, *rest: t.Any) -> str:
        key = (_schema.canonical(value), id(schema), rest)
        if key not in known:
            put(_schema, "check", real)  # it calls itself
            known[key] = real(value, schema, *rest)
            put(_schema, "check", check)
        return known[key]

    put(_schema, "check", check)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> t.Iterator[Path]:
    """A directory in memory where there is one: thousands of disks are laid out in it."""
    quickly(monkeypatch.setattr)
    if not os.access(MEMORY, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY, prefix="power-loss-") as name:
        yield Path(name)


def complaint(check: t.Callable[[Cut], None], cut: Cut) -> str:
    """What is wrong after this power cut; empty when nothing is."""
    try:
        check(cut)
    except (ImaError, AssertionError, OSError) as error:
        return f"{type(error).__name__} {getattr(error, 'reason', '')}: {error}"
    return ""


def bounded(cuts: list[Cut], most: int) -> list[Cut]:
    """The worst of them, and some of the rest, in order of rank."""
    if LONG or len(cuts) <= most:
        return cuts
    worst = [cut for cut in cuts if cut.rank == 0]
    chance = random.Random(most)
    worst = worst if len(worst) <= most * 2 // 3 else chance.sample(worst, most * 2 // 3)
    rest = [cut for cut in cuts if cut.rank]
    chosen = worst + chance.sample(rest, min(len(rest), most - len(worst)))
    return sorted(chosen, key=lambda cut: cut.rank)


def survive(scene: Scene, machine: str, most: int = MOST) -> int:
    """Every power cut of a machine is survived; how many distinct states there were."""
    check = getattr(scene, machine)
    cuts = bounded(scene.cuts(machine), most)
    for cut in cuts:
        wrong = complaint(check, cut)
        if wrong:
            event = scene.recorder.events[cut.prefix - 1] if cut.prefix else "the start"
            raise AssertionError(
                f"{wrong}\nafter a power cut behind event {cut.prefix}, {event}, with {sorted(cut.tree)}"
            )
    gc.collect()
    return len(cuts)


def survived(tally: Tally, states: int) -> None:
    tally("power-loss states", states)
    tally("losses", 0)
    tally("duplicates", 0)


@pytest.mark.parametrize("name", HOSTS)
def test_a_host_loses_power(disk: Path, name: str, tally: Tally) -> None:
    states = survive(HOSTS[name](disk), "host")
    assert states >= 10
    survived(tally, states)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controller_loses_power(disk: Path, name: str, tally: Tally) -> None:
    states = survive(CONTROLLERS[name](disk), "controller")
    assert states >= 3
    survived(tally, states)


def test_a_run_dies_anywhere_and_then_the_host_loses_power(disk: Path, tally: Tally) -> None:
    """Killed after event i; the next run goes on with what is not safe, and the power is cut after j."""
    events = len(FirstRun(disk / "whole").recorder.events)
    assert events >= 60
    for number in range(3, events, 1 if LONG else 9):
        scene = DiesInTheFirst(disk / str(number), the(number))
        survived(tally, survive(scene, "host", 8))


def test_the_power_goes_again_while_the_host_recovers(disk: Path, tally: Tally) -> None:
    before = Alone(disk)
    cuts = before.recorder.cuts("host")
    assert len(cuts) > 100
    for number, cut in enumerate(cuts[:: 5 if LONG else 20]):
        survived(tally, survive(Again(before, cut, number), "host", 6))


def test_a_rotation_dies_anywhere_and_then_the_controller_loses_power(disk: Path, tally: Tally) -> None:
    events = Delivered(disk / "whole").recorder.events
    here = [number for number, event in enumerate(events, 1) if event.machine == "controller" and event.changes]
    run = next(number for number, event in enumerate(events) if event.kind == "run")
    last = max(number for number, event in enumerate(events[:run]) if event.kind == "acknowledged")
    here = [number - 1 for number in here if number < last]  # the kernel's first state is an event, too
    assert len(here) >= 20
    for number in here[:: 1 if LONG else 9]:
        scene = DeliveryDies(disk / str(number), the(number))
        survived(tally, survive(scene, "controller", 8))
