# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A rotation that was cut off is taken up by the next one, and no byte that the store has is sent again.

Controller and module are processes of their own, and they die by SIGKILL. The wire between them is counted in a file
that survives both.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import secrets
import signal
import tempfile
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _durable, _emulated
from ansible_collections.integrity.ima.plugins.module_utils import _host as host_side
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import Cycle
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import verify
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

LONG = os.environ.get("LONG") == "1"
RECORDS = 340  # two shards of three chunks each, the boot_aggregate included
LATER = 30  # recorded between the rotation that was cut off and the next
MOST_ROUNDS = 60

COMBINATIONS = [("delete_n", "central"), ("staged", "verified")]
if LONG:
    COMBINATIONS = list(itertools.product(support.FLAVOURS, ("local", "central", "verified", "never")))
TRIMMING = [(flavour, policy) for flavour, policy in COMBINATIONS if flavour != "export_only" and policy != "never"]

Tally = t.Callable[[str, float], None]
Moment = t.Callable[[int, str], None]  # the number of a round, and "asked" or "answered"


@pytest.fixture(name="root")
def _root() -> t.Iterator[Path]:
    """A directory in memory where there is one: processes die here, not machines."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        yield Path(directory)


class Line(t.NamedTuple):
    """A chunk that left the host: in which round, shard, offset and bytes; whether the controller had it."""

    round: str
    sequence: int
    offset: int
    size: int
    arrived: bool


class Wire:
    """Runs each round in a process of its own, as Ansible does, and writes down what goes over the wire."""

    def __init__(self, host: support.Host, log: Path, moment: Moment, inside: t.Callable[[int], None]) -> None:
        self.host, self.log, self.moment, self.inside = host, log, moment, inside
        self.count = 0
        self.name = secrets.token_hex(4)

    def __call__(self, one_round: support.Json) -> t.Any:
        self.count += 1
        assert self.count < MOST_ROUNDS
        self.moment(self.count, "asked")
        answer = self._module(one_round)
        chunks = answer.get("chunks", ())
        self._note(chunks, arrived=False)
        self.moment(self.count, "answered")
        self._note(chunks, arrived=True)
        return answer

    def _module(self, one_round: support.Json) -> support.Json:
        said, say = os.pipe()
        pid = os.fork()
        if not pid:
            status = 1
            try:
                self.inside(self.count)
                with os.fdopen(say, "w", encoding="ascii") as pipe:
                    json.dump(self.host.answer(one_round), pipe)
                status = 0
            finally:
                os._exit(status)
        os.close(say)
        with os.fdopen(said, encoding="ascii") as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if status:
            assert status == -signal.SIGKILL, "the module may be killed, not fail"
            return {"failed": True, "msg": "MODULE FAILURE: deserialization failed", "rc": status}
        return t.cast(support.Json, json.loads(text))

    def _note(self, chunks: t.Iterable[support.Json], *, arrived: bool) -> None:
        sizes = [(each, len(base64.b64decode(each["data"]))) for each in chunks]
        lines = [[f"{self.name}.{self.count}", each["sequence"], each["offset"], size, arrived] for each, size in sizes]
        with self.log.open("a", encoding="ascii") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


class Scene:
    """One host, one store, and the wire between them."""

    def __init__(self, root: Path, flavour: str = "delete_n", policy: str = "central", name: str = "h") -> None:
        self.log = root / f"{name}.wire"
        self.host = support.Host(root / name, name=name, flavour=flavour, trim_after=policy, shard_records=170)
        self.host.grow(RECORDS - 1)
        self.store = support.new_store(root / "store")
        self.kept = flavour == "export_only" or policy == "never"

    def rotate(self, moment: Moment | None = None, inside: t.Callable[[int], None] | None = None) -> int:
        """Rotate in this process; return the number of rounds."""
        wire = Wire(self.host, self.log, moment or (lambda number, when: None), inside or (lambda number: None))
        self.host.rotation(DirectoryStore(self.store.directory), call=wire).run()
        return wire.count

    def resume(self) -> None:
        """Rotate. A staged list that was left goes first; what was recorded since then goes with the next rotation."""
        self.rotate()
        if self.host.flavour == "staged":
            self.rotate()

    def controller(self, moment: Moment, prepare: t.Callable[[], None] = lambda: None) -> int:
        """Rotate in a controller of its own; return how it ended: an exit code, or minus the signal."""
        pid = os.fork()
        if not pid:
            status = 1
            try:
                prepare()
                self.rotate(moment)
                status = 0
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def lines(self) -> list[Line]:
        """What left the host; each chunk once, with whether it arrived."""
        if not self.log.exists():
            return []
        said = [Line(*json.loads(line)) for line in self.log.read_text(encoding="ascii").splitlines()]
        arrived = [line for line in said if line.arrived]
        sent = [line for line in said if not line.arrived]
        return arrived + [line for line in sent if line._replace(arrived=True) not in arrived]

    def sizes(self) -> int:
        """Bytes of all shards in the spool: what has to be sent once."""
        spool = Spool(self.host.spool)
        return sum(os.path.getsize(os.path.join(spool.shards, entry.shard)) for entry in spool.entries)

    def check(self, lost: int = 0) -> None:
        """Nothing is lost, nothing is there twice, and nothing was sent twice but the ``lost`` bytes."""
        recorded, live = self.host.recorded(), self.host.live()
        stored = b"".join(sealed.raw for sealed in support.take(self.store, self.host.name))
        assert stored == recorded
        assert live == (recorded_count(self.host) if self.kept else 0)
        verdict = verify(self.store, self.host.name, ())
        assert (verdict.verdict, verdict.records) == ("consistent", recorded_count(self.host)), verdict.message
        assert verdict.pcrs == self.host.pcrs()
        assert self.store.unfinished(self.host.name) is None
        assert sum(line.size for line in self.lines()) == self.sizes() + lost


def recorded_count(host: support.Host) -> int:
    """How many records the kernel ever made, trimmed or not, in this boot."""
    return int(_emulated._load(host.kernel).records)


def die(at: int, when: str) -> Moment:
    """Kill the controller at a moment."""

    def moment(number: int, now: str) -> None:
        if (number, now) == (at, when):
            os.kill(os.getpid(), signal.SIGKILL)

    return moment


def rounds_of(root: Path, flavour: str, policy: str) -> int:
    """How many rounds a rotation takes that nothing cuts off; it sends each byte once."""
    scene = Scene(root, flavour, policy)
    rounds = scene.rotate()
    scene.check()
    assert rounds > 6
    return rounds


@pytest.mark.parametrize(("flavour", "policy"), COMBINATIONS)
@pytest.mark.parametrize("when", ["asked", "answered"])
def test_the_controller_dies_at_every_round(root: Path, flavour: str, policy: str, when: str, tally: Tally) -> None:
    """Before a round, each byte is sent once; when an answer was on its way, just its bytes are sent again.

    Every gap between chunk k and chunk k + 1 is among the rounds, and so are the rounds after the last chunk: there the
    store has the shard and the acknowledgement did not reach the host, or it did and its answer is lost.
    """
    rounds = rounds_of(root / "whole", flavour, policy)
    for number in range(1, rounds + 1):
        scene = Scene(root / str(number), flavour, policy)
        assert scene.controller(die(number, when)) == -signal.SIGKILL
        lost = sum(line.size for line in scene.lines() if not line.arrived)
        assert lost <= support.CHUNK and (when == "answered" or not lost)
        if number % 2:
            scene.host.grow(LATER)
        scene.resume()
        scene.check(lost)
    tally("interrupted rotations", rounds)


@pytest.mark.parametrize(("flavour", "policy"), TRIMMING)
@pytest.mark.parametrize("moment", ["before_delete", "after_delete"])
def test_the_host_dies_when_it_trims(root: Path, flavour: str, policy: str, moment: str, tally: Tally) -> None:
    """The acknowledgement is durable on the host, and the module is killed just before, or just after, the deletion."""
    scene = Scene(root, flavour, policy)
    assert _emulated.kill_next(scene.host.kernel, moment)
    with pytest.raises(ImaError) as caught:
        scene.rotate()
    assert caught.value.reason == "host_failed"
    spool = Spool(scene.host.spool)
    assert policy == "local" or spool.acknowledgement(spool.entries[0])
    assert not _emulated._load(scene.host.kernel).faults, "the fault was not delivered"
    scene.host.grow(LATER)
    scene.resume()
    scene.check()
    tally("interrupted rotations", 1)


@pytest.mark.parametrize(("flavour", "policy"), COMBINATIONS)
def test_the_host_dies_between_the_acknowledgement_and_the_trim(
    root: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, policy: str, tally: Tally
) -> None:
    """At every round: the store's word was written down, nothing else of that round happened."""
    rounds = rounds_of(root / "whole", flavour, policy)
    acknowledge = host_side._acknowledge
    cuts = 0
    for number in range(1, rounds + 1):
        scene = Scene(root / str(number), flavour, policy)
        killed = root / f"{number}.killed"

        def inside(now: int, number: int = number, killed: Path = killed) -> None:
            if now == number:
                monkeypatch.setattr(host_side, "_acknowledge", lambda cycle, have: deadly(cycle, have, killed))

        def deadly(cycle: Cycle, have: t.Any, killed: Path) -> int:
            acknowledge(cycle, have)
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
            return 0

        with pytest.raises(ImaError) as caught:
            scene.rotate(inside=inside)
        assert caught.value.reason == "host_failed" and killed.exists()
        scene.host.grow(LATER)
        scene.resume()
        scene.check()
        cuts += 1
    tally("interrupted rotations", cuts)


STEPS = ("part", "shard", "manifest")


@pytest.mark.parametrize("shard", [1, 2])
@pytest.mark.parametrize("step", STEPS)
def test_the_controller_dies_while_the_store_takes_a_shard(root: Path, shard: int, step: str, tally: Tally) -> None:
    """Its last chunk is here; its file has its name; its manifest too, and only the part is still to be removed."""
    scene = Scene(root)

    def prepare() -> None:
        names = {"part": "publish_part", "shard": "create", "manifest": "remove"}
        real: t.Any = getattr(_durable, names[step])
        seen: list[str] = []

        def deadly(path: str, *arguments: t.Any) -> t.Any:
            if f"{os.sep}hosts{os.sep}" in path:
                seen.append(path)
                if len(seen) == shard:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(path, *arguments)

        setattr(_durable, names[step], deadly)

    assert scene.controller(lambda number, when: None, prepare) == -signal.SIGKILL
    assert scene.store.unfinished("h"), "it died elsewhere"
    assert len(scene.store.entries("h")) == shard - (step != "manifest")
    scene.host.grow(LATER)
    scene.resume()
    scene.check()
    tally("interrupted rotations", 1)


def test_a_rotation_that_is_cut_at_every_round_gets_through_all_the_same(root: Path, tally: Tally) -> None:
    """Each controller lives for one round. Together they send what one would."""
    scene = Scene(root)
    whole = rounds_of(root / "whole", "delete_n", "central")
    for attempt in range(2 * whole):
        if not scene.controller(die(2, "asked")):
            break
        scene.host.grow(1 if attempt == 3 else 0)
        tally("interrupted rotations", 1)
    else:
        raise AssertionError("it never came to its end")
    scene.check()


def test_hosts_that_are_cut_off_do_not_disturb_each_other(root: Path, tally: Tally) -> None:
    """One store, two hosts: while one delivery is unfinished, the other host is rotated from end to end."""
    one, two = Scene(root, name="one"), Scene(root, name="two", flavour="staged")
    for number in (2, 3, 4):
        assert one.controller(die(number, "asked")) == -signal.SIGKILL
        assert one.store.unfinished("one") or one.store.head("one")
        before = support.tree(support.base(one.store, "one"))
        two.host.grow(LATER)
        two.resume()
        two.check()
        assert support.tree(support.base(one.store, "one")) == before
        tally("interrupted rotations", 1)
    one.resume()
    one.check()
    two.check()
