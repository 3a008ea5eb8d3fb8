# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Death and errors at every call that changes the spool, in a forked child; then a clean run must recover.

Nothing in the product knows of it: the functions of ``os`` are wrapped in the child. Only calls on the spool count; the
emulated kernel has faults of its own. Each sweep ends because a run completed unhit, and each fault is seen delivered.
"""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import (
    TRIMMING,
    Host,
    oracle,
    parse,
)

Work = t.Callable[[Host], object]
WRAPPED = ("open", "write", "fsync", "link", "rename", "unlink", "mkdir", "close", "ftruncate")
# Which calls an errno makes sense for; EIO fits all.
NO_SPACE = frozenset(("open", "write", "fsync", "link", "rename", "mkdir"))
KILLS = ("before", "after")
LONG = os.environ.get("LONG") == "1"
# How to strike, and at every how manieth call; LONG=1: at each.
MODES = {
    "before": 4,
    "after": 1,
    "fail": 7,
    "fail no space": 5,
    "fail for ever": 7,
    "done but failed": 3,
    "half a write": 7,
}
UNHIT, HIT = 0, 3


class Shim:
    """Wraps ``os`` in this process; strikes at the ``number``-th call on the spool."""

    def __init__(self, spool: str, number: int, mode: str) -> None:
        self.spool, self.number, self.mode = spool, number, mode
        self.calls = 0
        self.hit = False
        self.descriptors: set[int] = set()  # open on the spool
        self.written: set[int] = set()  # those of them that are open for write
        self.log: list[str] = []

    def install(self) -> None:
        for name in WRAPPED:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _ours(self, name: str, args: tuple[t.Any, ...], keywords: dict[str, t.Any]) -> bool:
        if name in ("write", "fsync", "close", "ftruncate"):
            return args[0] in self.descriptors
        folders = [keywords.get(key) for key in ("dir_fd", "src_dir_fd") if keywords.get(key) is not None]
        if folders:
            return folders[0] in self.descriptors
        path = os.fspath(args[0])
        return isinstance(path, str) and (path + "/").startswith(self.spool + "/") and path != self.spool + "/lock"

    def _changes(self, name: str, args: tuple[t.Any, ...]) -> bool:
        if name == "open":
            return bool(args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
        return name != "close" or args[0] in self.written

    def _wrap(self, name: str, real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        def wrapper(*args: t.Any, **keywords: t.Any) -> t.Any:
            if not self._ours(name, args, keywords):
                return real(*args, **keywords)
            # Death at a call that changes nothing is death at the one before it; but reading can fail.
            if self.mode == "fail" or self._changes(name, args):
                self.calls += 1
                self.log.append(name)
            else:
                return self._done(name, args, real(*args, **keywords) if name != "fsync" else None)
            strikes = self.calls == self.number or (self.mode == "fail for ever" and self.calls > self.number > 0)
            if not strikes:
                return self._done(name, args, real(*args, **keywords) if name != "fsync" else None)
            self.hit = True
            if self.mode == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.mode in ("fail", "fail for ever", "fail no space"):
                if name == "close":
                    real(*args, **keywords)
                    self.descriptors.discard(args[0])
                code = errno.ENOSPC if self.mode == "fail no space" and name in NO_SPACE else errno.EIO
                raise OSError(code, os.strerror(code))
            if self.mode == "half a write" and name == "write":
                return real(args[0], bytes(args[1])[: (len(args[1]) + 1) // 2])
            result = self._done(name, args, real(*args, **keywords) if name != "fsync" else None)
            if self.mode == "after":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.mode == "done but failed":
                if name == "open":
                    self.descriptors.discard(result)
                    real_close(result)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return result

        return wrapper

    def _done(self, name: str, args: tuple[t.Any, ...], result: t.Any) -> t.Any:
        if name == "open":
            self.descriptors.add(result)
            if self._changes(name, args):
                self.written.add(result)
        elif name == "close":
            self.descriptors.discard(args[0])
            self.written.discard(args[0])
        return result


real_close = os.close


def strike(host: Host, work: Work, number: int, mode: str) -> tuple[int, str]:
    """Do the work in a child that is struck at one call. Whether it was hit, and the reason that it raised."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        shim = Shim(host.spool, number, mode)
        answer = ""
        try:
            shim.install()
            work(host)
        except ImaError as error:
            answer = error.reason
        except BaseException as error:
            answer = f"{type(error).__name__} at {shim.log[number - 1] if shim.hit else '-'}: {error}"
        os.write(into, answer.encode())
        os._exit(HIT if shim.hit else UNHIT)
    os.close(into)
    with os.fdopen(out) as pipe:
        answer = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL and mode in KILLS
        return HIT, "killed"
    return os.WEXITSTATUS(status), answer


class Scene:
    """A host in one state, put back before each strike."""

    def __init__(self, root: Path, host: Host) -> None:
        self.host, self._saved = host, str(root / "saved")
        for name in ("spool", "ima"):
            shutil.copytree(os.path.join(host.root, name), os.path.join(self._saved, name))
        self._keys = pickle.dumps((host.before, host.carried))

    def restore(self) -> None:
        for name in ("spool", "ima"):
            shutil.rmtree(os.path.join(self.host.root, name))
            shutil.copytree(os.path.join(self._saved, name), os.path.join(self.host.root, name))
        self.host.before, self.host.carried = pickle.loads(self._keys)


def sweep(
    scene: Scene,
    work: Work,
    check: t.Callable[[Host], None],
    modes: t.Iterable[str] = tuple(MODES),
    bare: list[str] | None = None,
) -> int:
    """Strike at every call in every mode; the number of faults delivered. ``bare`` gets what was no ``ImaError``."""
    host, delivered = scene.host, 0
    for mode in modes:
        for number in range(1, 1000, 1 if LONG or bare is not None else MODES[mode]):
            scene.restore()
            state, answer = strike(host, work, number, mode)
            assert " " not in answer or answer.startswith("OSError"), f"{mode} at call {number}: {answer}"
            if " " in answer and bare is not None:
                bare.append(answer)
            if state == UNHIT:
                assert answer == "" and number > 3, f"{mode} at call {number}: unhit, but {answer}"
                break
            assert state == HIT
            delivered += 1
            try:
                check(host)
            except BaseException as error:
                raise AssertionError(f"{mode} at call {number} ({answer}): {error}") from error
        else:
            raise AssertionError("the sweep does not end")
    return delivered


def clean(host: Host) -> None:
    """A run after the fault: everything is found again, nothing is left over."""
    oracle(host)
    host.grow(1)
    host.run()
    oracle(host)
    tidy(host)
    assert host.faults() == []


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


# --- the sweeps -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", TRIMMING)
def test_export_and_trim(tmp_path: Path, flavour: str, capsys: pytest.CaptureFixture[str]) -> None:
    host = Host(tmp_path, flavour, "local", count=2, shard_records=3)
    host.run()
    host.grow(4)
    modes = MODES if flavour == "delete_n" or LONG else ("after",)
    points = sweep(Scene(tmp_path, host), export_and_trim, all_gone, modes)
    with capsys.disabled():
        print(f" {points} faults ", end="")
    assert points >= (100 if flavour == "delete_n" else 40)


def test_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    host = Host(tmp_path, "delete_n", "local", count=2)
    points = sweep(Scene(tmp_path, host), export_and_trim, all_gone, ("after", "done but failed"))
    with capsys.disabled():
        print(f" {points} faults ", end="")
    assert points >= 40


def test_export_only(tmp_path: Path) -> None:
    host = Host(tmp_path, "export_only", "never", count=2, shard_records=3)
    host.run()
    host.grow(2)
    assert sweep(Scene(tmp_path, host), export_and_trim, clean, ("after", "done but failed")) >= 25


@pytest.mark.parametrize("verdict", ["", "attested"])
def test_acknowledge(tmp_path: Path, verdict: str) -> None:
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

    assert sweep(Scene(tmp_path, host), lambda host: host.acknowledge(verdict), check) >= 40


def test_anchor(tmp_path: Path) -> None:
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

    assert sweep(Scene(tmp_path, host), lambda host: host.anchor(), check) >= 15


def test_trim_alone(tmp_path: Path) -> None:
    """Part of the list goes: after any fault the rest is found by content."""
    host = Host(tmp_path, "delete_n", "local", count=8, shard_records=3)
    host.export()

    def check(host: Host) -> None:
        oracle(host)
        assert host.export().base in (0, 5)
        all_gone(host)

    assert sweep(Scene(tmp_path, host), lambda host: host.trim(5), check, (*KILLS, "fail", "done but failed")) >= 20


def test_every_error_is_one_of_ours(tmp_path: Path) -> None:
    """A disk that fails gives a reason, a file and an errno, at whichever call: no bare OSError."""
    host = Host(tmp_path, "delete_n", "central", count=2, shard_records=3)
    host.run()
    host.grow(4)

    def work(host: Host) -> None:
        host.export()
        host.acknowledge()
        host.anchor()
        host.trim()

    bare: list[str] = []
    sweep(Scene(tmp_path, host), work, lambda host: None, ("fail",), bare)
    assert bare == []


def test_recovery_of_an_orphan(tmp_path: Path) -> None:
    """A run died between a shard and its manifest: the recovery is struck at every call."""
    host = Host(tmp_path, "delete_n", "local", count=2, shard_records=3)
    host.run()
    host.grow(2)
    number = orphaning(tmp_path / "find", host)
    assert strike(host, export_and_trim, number, "after")[1] == "killed"
    points = sweep(Scene(tmp_path, host), recover, all_gone, ("after", "done but failed"))
    assert points >= 15
    assert not [name for name in host.files() if "broken" in name]


def recover(host: Host) -> None:
    host.locked(lambda cycle: cycle.spool.recover())


def orphaning(root: Path, host: Host) -> int:
    """The number of the call after which there is a shard without a manifest."""
    scene = Scene(root, host)
    for number in range(1, 200):
        scene.restore()
        strike(host, export_and_trim, number, "after")
        names = {name for name in host.files() if name.startswith("shards")}
        if any(name.endswith(".gz") and name[: -len(".ima.gz")] + ".json" not in names for name in names):
            scene.restore()
            return number
    raise AssertionError("no call leaves an orphan")


@pytest.mark.parametrize("flavour", TRIMMING)
def test_killed_and_killed_again(tmp_path: Path, flavour: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Kill at i, kill the recovery at j: a bounded sample of all pairs."""
    host = Host(tmp_path, flavour, "local", count=2, shard_records=3)
    host.run()
    host.grow(4)
    scene, pairs = Scene(tmp_path, host), 0
    for first in range(1, 1000, 1 if LONG else 11):
        scene.restore()
        if strike(host, export_and_trim, first, KILLS[first % 2])[0] == UNHIT:
            break
        between = Scene(tmp_path / str(first), host)
        for second in range(1 + first % 13, 1000, 2 if LONG else 13):
            between.restore()
            if strike(host, export_and_trim, second, KILLS[second % 2])[0] == UNHIT:
                break
            pairs += 1
            all_gone(host)
    with capsys.disabled():
        print(f" {pairs} pairs ", end="")
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
def test_the_kernel_and_then_the_spool(tmp_path: Path, flavour: str, moment: str) -> None:
    """Killed at the kernel's side, then at every third call of the recovery."""
    host = Host(tmp_path, flavour, "local", count=2, shard_records=3)
    host.run()
    host.grow(3)
    _emulated.kill_next(host.kernel, moment)
    assert strike(host, export_and_trim, 0, "before") == (HIT, "killed")
    oracle(host)
    host.grow(1)
    scene, delivered = Scene(tmp_path, host), 0
    for number in range(1, 1000, 3):
        scene.restore()
        if strike(host, export_and_trim, number, "after")[0] == UNHIT:
            break
        delivered += 1
        all_gone(host)
    assert delivered >= 5


def test_equal_records_at_every_death(tmp_path: Path) -> None:
    """The list consists of one violation again and again: content alone tells little."""
    host = Host(tmp_path, "delete_n", "local", count=1)
    host.run()
    host.violation(2)

    def check(host: Host) -> None:
        oracle(host)
        host.violation(2)
        host.run()
        oracle(host)
        assert host.faults() == []
        host.grow(1)
        all_gone(host)

    assert sweep(Scene(tmp_path, host), export_and_trim, check, ("after",)) >= 20
