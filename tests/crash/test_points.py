# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Death and errors at every call on the spool and on the kernel's list; then a clean run must recover.

A crash point is a scenario, a way to strike and the number of a call. LONG=1 takes all of them; without it every
``every``-th is taken, and kills at each call of the cycle itself. Each fault is seen delivered.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import typing as t
from pathlib import Path

import pytest
from conftest import Tally
from shim import DONE, DROPPED, HIT, KILLS, MODES, UNHIT, Call, Run, Scene, Work, fits, strike

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import Cycle, utc_now
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import (
    TRIMMING,
    Host,
    oracle,
    parse,
)

LONG = os.environ.get("LONG") == "1"
SOME = (KILLS[1], DONE, DROPPED, "ENOSPC once", "EIO for ever")
# What only looks may fail with an error of the system, which the modules report as such.
LOOKING = ("look", "listdir", "scandir", "kernel read")


def sweep(
    scene: Scene,
    work: Work,
    check: t.Callable[[Host], None],
    tally: Tally,
    *,
    modes: t.Sequence[str] = MODES,
    every: int = 1,
    full: t.Sequence[str] = (),
    near: t.Callable[[Call], bool] = lambda call: True,
    told: t.Callable[[str, Call, Run], None] = lambda mode, call, run: None,
) -> int:
    """Strike at every call that a way of striking fits. A short run takes every ``every``-th of those ``near`` enough;
    with ``full`` also all points of those ways, and one of each way at each kind of call. ``told`` judges the run."""
    scene.restore()
    calls = strike(scene.host, work).calls
    assert calls
    points = [(mode, number) for mode in modes for number in fitting(mode, calls)]
    if not LONG:
        points = [(mode, number) for mode, number in points if near(calls[number - 1])]
        kinds = {(mode, calls[number - 1].kind): (mode, number) for mode, number in points if full}
        chosen = {*points[::every], *kinds.values(), *(point for point in points if point[0] in full)}
        points = [point for point in points if point in chosen]
    for mode, number in points:
        scene.restore()
        hit(scene.host, work, mode, number, calls[number - 1], check, told)
    # The last call was among them.
    scene.restore()
    past = strike(scene.host, work, len(calls) + 1, KILLS[0])
    assert (past.state, past.answer) == (UNHIT, "")
    tally("crash points", len(set(points)))
    no_loss(tally)
    return len(set(points))


def fitting(mode: str, calls: t.Sequence[Call]) -> list[int]:
    return [number for number, call in enumerate(calls, 1) if fits(mode, call)]


def hit(
    host: Host,
    work: Work,
    mode: str,
    number: int,
    call: Call,
    check: t.Callable[[Host], None],
    told: t.Callable[[str, Call, Run], None],
) -> None:
    """One crash point: the fault is delivered, the error is one of ours, and a clean run recovers."""
    run = strike(host, work, number, mode)
    where = f"{mode} at call {number} ({call.kind} {os.path.basename(call.path)}, then {run.answer or 'no error'})"
    assert run.state == HIT, f"{where}: no fault was delivered"
    assert (run.answer == "killed") == (mode in KILLS), where
    assert run.answer == "killed" or run.calls[number - 1].kind == call.kind, f"{where}: another call was struck"
    if run.answer.startswith("OSError") and not mode.endswith("for ever"):
        assert call.kind in LOOKING, f"{where}: the error names neither step nor file"
    try:
        told(mode, call, run)
        check(host)
    except BaseException as error:
        raise AssertionError(f"{where}: {error}") from error


def no_loss(tally: Tally) -> None:
    """The oracle was asked after each fault."""
    tally("losses", 0)
    tally("duplicates", 0)


def clean(host: Host) -> None:
    """A run after the fault: everything is found again, nothing is left over."""
    oracle(host)
    host.grow(1)
    host.run()
    oracle(host)
    tidy(host)
    # A journal that nobody could read is no loss, but its base has to be found again.
    assert [fault for fault in host.faults() if fault[0] != "foreign_trim" or fault[2]] == []


def tidy(host: Host) -> None:
    left = [name for name in host.files() if name.endswith(".tmp")]
    assert left == [], "temporary files of a dead run stay"
    assert int(Path(host.spool, "generation").read_text()) == Spool(host.spool).entries[-1].sequence


def all_gone(host: Host) -> None:
    clean(host)
    if host.held():  # a staged list that the dead run left was deleted first
        host.run()
        oracle(host)
    assert host.held() == b""


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes die here, not disks: what is written is there."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def export_and_trim(host: Host) -> None:
    host.run()


# --- the calls of the cycle -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", TRIMMING)
def test_export_and_trim(tmp_path: Path, flavour: str, tally: Tally) -> None:
    host = Host(tmp_path, flavour, "local", count=2, shard_records=3)
    host.run()
    host.grow(4)
    full = (KILLS[1], DROPPED) if flavour == "delete_n" else ()
    assert sweep(Scene(tmp_path, host), export_and_trim, all_gone, tally, every=31, full=full) >= 30


def test_the_first_run(tmp_path: Path, tally: Tally) -> None:
    host = Host(tmp_path, "delete_n", "local", count=2)
    assert sweep(Scene(tmp_path, host), export_and_trim, all_gone, tally, every=17) >= 20


def test_export_only(tmp_path: Path, tally: Tally) -> None:
    host = Host(tmp_path, "export_only", "never", count=2, shard_records=3)
    host.run()
    host.grow(2)
    assert sweep(Scene(tmp_path, host), export_and_trim, clean, tally, every=17) >= 15


@pytest.mark.parametrize("verdict", ["", "attested"])
def test_acknowledge(tmp_path: Path, verdict: str, tally: Tally) -> None:
    """Struck while the word on several shards is written: the next word reaches them all."""
    host = Host(tmp_path, "delete_n", "verified" if verdict else "central", count=8, shard_records=3)
    host.run()

    def check(host: Host) -> None:
        assert len(parse(host.held())) == 9
        held = host.held()
        host.run()
        oracle(host)
        assert host.held() == held[len(held) - len(host.held()) :]
        host.acknowledge(verdict)
        assert len(host.faults()) == 0
        host.run()
        assert host.held() == b"", "the store has all shards, and still nothing is deleted"
        oracle(host)

    assert sweep(Scene(tmp_path, host), lambda host: host.acknowledge(verdict), check, tally, every=11) >= 15


def test_anchor(tmp_path: Path, tally: Tally) -> None:
    host = Host(tmp_path, "delete_n", "local", count=4)
    host.run()

    def check(host: Host) -> None:
        made = host.anchor()
        assert made.index == 5
        assert len(parse(host.held())) == 1
        oracle(host)
        host.grow(1)
        host.run()
        spool = Spool(host.spool)
        assert spool.manifest(spool.entries[-1])["anchors"] == [{"index": 5, "sequence": 1, "sha256": made.sha256}]
        all_gone(host)

    assert sweep(Scene(tmp_path, host), lambda host: host.anchor(), check, tally, every=7) >= 10


def test_trim_alone(tmp_path: Path, tally: Tally) -> None:
    """Part of the list goes: after any fault the rest is found by content."""
    host = Host(tmp_path, "delete_n", "local", count=8, shard_records=3)
    host.export()

    def check(host: Host) -> None:
        oracle(host)
        assert host.export().base in (0, 5)
        all_gone(host)

    assert sweep(Scene(tmp_path, host), lambda host: host.trim(5), check, tally, every=5) >= 15


def test_a_whole_rotation(tmp_path: Path, tally: Tally) -> None:
    """Export, the store's word, anchor and trim as one: kills at each call between the steps too."""
    host = Host(tmp_path, "delete_n", "central", count=2, shard_records=3)
    host.run()
    host.grow(4)

    def work(host: Host) -> None:
        host.export()
        host.acknowledge()
        host.anchor()
        host.trim()

    def check(host: Host) -> None:
        oracle(host)
        work(host)
        host.run()
        host.acknowledge()
        host.run()
        oracle(host)
        tidy(host)
        assert host.held() == b""

    assert sweep(Scene(tmp_path, host), work, check, tally, every=43) >= 15


def test_prune(tmp_path: Path, tally: Tally) -> None:
    """The store has everything, and files of two shards go: one that is gone without a word for it would be a fault."""
    host = Host(tmp_path, "delete_n", "central", count=8, shard_records=3)
    host.run()
    host.acknowledge()
    host.run()
    oracle(host)

    def work(host: Host) -> None:
        def prune(cycle: Cycle) -> None:
            cycle.spool.recover()
            cycle.spool.prune(cycle.spool.entries[1], "test", utc_now())

        host.locked(prune)

    def check(host: Host) -> None:
        host.grow(1)
        host.run()
        work(host)
        host.run()
        tidy(host)
        spool = Spool(host.spool)
        assert (spool.pruned, spool.held_from, host.faults()) == (2, 6, [])
        assert not [name for name in host.files() if name.endswith(("-0-3.ima.gz", "-3-3.ima.gz"))]
        truth = parse(host.truth())
        assert b"".join(spool.raw_from(6)) == b"".join(record.raw for record in truth[6 : spool.epoch[-1].end])
        assert parse(host.held())[-1].raw == truth[-1].raw

    assert sweep(Scene(tmp_path, host), work, check, tally, every=3) >= 15


def test_recovery_of_an_orphan(tmp_path: Path, tally: Tally) -> None:
    """A run died between a shard and its manifest: the recovery is struck at every call."""
    host = Host(tmp_path, "delete_n", "local", count=2, shard_records=3)
    host.run()
    host.grow(2)
    number = orphaning(tmp_path / "find", host)
    assert strike(host, export_and_trim, number, KILLS[1]).answer == "killed"
    assert sweep(Scene(tmp_path, host), recover, all_gone, tally, every=7) >= 15
    assert not [name for name in host.files() if "broken" in name]


def recover(host: Host) -> None:
    host.locked(lambda cycle: cycle.spool.recover())


def orphaning(root: Path, host: Host) -> int:
    """The number of the call after which there is a shard without a manifest."""
    scene = Scene(root, host)
    for number in range(1, 200):
        scene.restore()
        strike(host, export_and_trim, number, KILLS[1])
        names = {name for name in host.files() if name.startswith("shards")}
        if any(name.endswith(".gz") and name[: -len(".ima.gz")] + ".json" not in names for name in names):
            scene.restore()
            return number
    raise AssertionError("no call leaves an orphan")


def test_equal_records(tmp_path: Path, tally: Tally) -> None:
    """The list consists of one violation again and again: content alone tells little."""
    host = Host(tmp_path, "delete_n", "local", count=1)
    host.run()
    host.violation(2)

    def check(host: Host) -> None:
        oracle(host)
        host.violation(2)
        host.run()
        oracle(host)
        host.grow(1)
        all_gone(host)

    assert sweep(Scene(tmp_path, host), export_and_trim, check, tally, modes=SOME, every=11) >= 15


# --- twice ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", TRIMMING)
def test_killed_and_killed_again(tmp_path: Path, flavour: str, tally: Tally) -> None:
    """Kill at i, kill the recovery at j: a bounded sample of all pairs."""
    host = Host(tmp_path, flavour, "local", count=2, shard_records=3)
    host.run()
    host.grow(4)
    scene, pairs = Scene(tmp_path, host), 0
    firsts = fitting(KILLS[0], strike(host, export_and_trim).calls)
    for first in firsts[:: 3 if LONG else 11]:
        scene.restore()
        assert strike(host, export_and_trim, first, KILLS[first % 2]).answer == "killed"
        between = Scene(tmp_path / str(first), host)
        seconds = fitting(KILLS[0], strike(host, export_and_trim).calls)
        for second in seconds[first % 5 :: 2 if LONG else 13]:
            between.restore()
            assert strike(host, export_and_trim, second, KILLS[second % 2]).answer == "killed"
            pairs += 1
            all_gone(host)
    tally("killed twice", pairs)
    no_loss(tally)
    assert pairs >= 15


@pytest.mark.parametrize(
    ("flavour", "moment"),
    [
        ("delete_n", "before_delete"),
        ("delete_n", "after_delete"),
        ("staged", "before_delete"),
        ("staged", "after_delete"),
        ("staged", "after_stage"),
    ],
)
def test_the_kernel_and_then_the_spool(tmp_path: Path, flavour: str, moment: str, tally: Tally) -> None:
    """Killed at the kernel's side, then at calls of the recovery."""
    host = Host(tmp_path, flavour, "local", count=2, shard_records=3)
    host.run()
    host.grow(3)
    _emulated.kill_next(host.kernel, moment)
    assert strike(host, export_and_trim).answer == "killed"
    assert host.state().faults == []
    oracle(host)
    host.grow(1)
    assert sweep(Scene(tmp_path, host), export_and_trim, all_gone, tally, modes=SOME, every=19) >= 4


# --- the kernel's answers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flavour", "fault", "answer"),
    [
        ("delete_n", "enoent", "fewer_records"),
        ("delete_n", "lost_reply", "delete_unknown"),
        ("staged", "lost_reply", "delete_unknown"),
    ],
)
def test_a_deletion_that_failed(tmp_path: Path, flavour: str, fault: str, answer: str, tally: Tally) -> None:
    """Done or not, the kernel says that it failed: it is not sent again, the next run finds out."""
    host = Host(tmp_path, flavour, "local", count=5, shard_records=3)
    _emulated.fail_next(host.kernel, fault)
    assert strike(host, export_and_trim).answer == answer
    assert host.state().faults == []
    assert (host.held() == b"") == (fault == "lost_reply")
    all_gone(host)
    no_loss(tally)


@pytest.mark.parametrize("flavour", TRIMMING)
@pytest.mark.parametrize(
    ("state", "answer"),
    [("reader", "list_busy"), ("suspended", "suspended"), ("not capable", "not_permitted"), ("phantom", "list_busy")],
)
def test_a_kernel_that_refuses(tmp_path: Path, flavour: str, state: str, answer: str, tally: Tally) -> None:
    """The reason is named, nothing is deleted, and afterwards all goes on; a phantom reader needs a reboot."""
    host = Host(tmp_path, flavour, "local", count=5, shard_records=3)
    with refusing(host, state):
        held = host.held()
        assert strike(host, export_and_trim).answer == answer
        assert host.held() == held
        oracle(host)
    if state == "phantom":
        host.configure(trim_after="never")  # exports go on
        host.run()
        oracle(host)
        host.configure(trim_after="local")
        host.reboot()
        host.run()
    all_gone(host)
    no_loss(tally)


@contextlib.contextmanager
def refusing(host: Host, state: str) -> t.Iterator[None]:
    if state == "reader":
        with host.config().lists().reader():
            yield
    elif state == "phantom":
        _emulated.phantom(host.kernel)
        yield
    else:

        def switch(directory: str, on: bool) -> object:
            return _emulated.capable(directory, not on) if state == "not capable" else _emulated.suspend(directory, on)

        switch(host.kernel, True)
        yield
        switch(host.kernel, False)


@pytest.mark.parametrize("flavour", TRIMMING)
@pytest.mark.parametrize("most", [1, 7])
def test_short_reads(tmp_path: Path, flavour: str, most: int, tally: Tally) -> None:
    """The kernel hands out a few bytes at a time, never a record whole."""
    host = Host(tmp_path, flavour, "local", count=4, shard_records=3)
    short: list[int] = []

    def work(host: Host) -> None:
        read = _emulated._ListFile.read

        def stingy(file: _emulated._ListFile, size: int) -> bytes:
            data = read(file, min(size, most))
            short.append(len(data) < size)
            return data

        # By setattr: to a type checker a method is one for ever.
        setattr(_emulated._ListFile, "read", stingy)  # noqa: B010
        host.run()
        assert sum(short) > 200, "the reads were not short"

    assert strike(host, work).answer == ""
    oracle(host)
    assert len(parse(host.sealed())) == 5
    all_gone(host)
    no_loss(tally)


# --- at random --------------------------------------------------------------------------------------------------------


def cycles(host: Host, ready: int) -> t.NoReturn:
    """The kernel records and the host exports and trims, until somebody ends it."""
    try:
        os.write(ready, b".")
        while True:
            host.grow(3)
            host.run()
    finally:
        os._exit(1)  # and is seen


def killed_after(host: Host, delay: float) -> None:
    """SIGKILL to a process at work, ``delay`` seconds after its start."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        cycles(host, into)
    os.close(into)
    assert os.read(out, 1) == b"."
    os.close(out)
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, "it ended before it was killed"


@pytest.mark.parametrize("flavour", TRIMMING)
def test_killed_at_random_instants(tmp_path: Path, flavour: str, tally: Tally) -> None:
    """No call is chosen: the process dies wherever it is, in the kernel's side as well."""
    chance = random.Random(f"random instants {flavour}")
    host = Host(tmp_path, flavour, "local", count=2, shard_records=2)
    number = 150 if LONG else 12
    found = []
    for _number in range(number):
        sealed = len(Spool(host.spool).entries)
        killed_after(host, chance.uniform(0.0, 0.05))
        oracle(host)
        found.append(len(Spool(host.spool).entries) > sealed)
        if chance.random() < 0.7:
            all_gone(host)
    assert any(found), "no process had begun its work"
    all_gone(host)
    tally("random kills", number)
    no_loss(tally)
