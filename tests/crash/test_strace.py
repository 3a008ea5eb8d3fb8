# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The same from outside: strace sees what really changes files, and kills at each of those calls.

strace is attached to a forked child that has imported everything and waits: its counters, which are per name and per
process, begin with the work. Then an audit hook: with the kernel's list open, nothing may fork, connect or start.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from conftest import Tally
from shim import WRITING, Run, Scene, Shim, Work, ended, started, strike
from test_points import LONG, all_gone, export_and_trim, no_loss

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import Lists
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._stitched_support import Stitching
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import TRIMMING, Host

STRACE = shutil.which("strace")
needs_strace = pytest.mark.skipif(STRACE is None, reason="strace is not installed")

# Everything that can change a file; the question mark is for those that not every architecture has.
CALLS = (
    "open openat openat2 creat write writev pwrite64 pwritev pwritev2 sendfile copy_file_range splice "
    "fsync fdatasync sync_file_range ftruncate truncate fallocate "
    "rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat rmdir mkdir mkdirat mknod mknodat "
    "chmod fchmod fchmodat chown fchown fchownat lchown utimensat setxattr fsetxattr lsetxattr"
).split()
SAME = {"openat": "open", "renameat": "rename", "renameat2": "rename", "linkat": "link", "mkdirat": "mkdir"}
SAME["pwrite64"] = "pwrite"
LINE = re.compile(r"(?P<pid>\d+) +(?P<name>\w+)\((?P<args>.*)(?:\) += (?P<result>-?\d+|\?).*|<unfinished \.\.\.>)\Z")
DESCRIPTOR = re.compile(r"(?:AT_FDCWD|\d+)<(?P<path>[^>]*)>")
NAME = re.compile(r'"(?P<path>[^"]*)"')
RANDOM = re.compile(r"\.[0-9a-f]{8}\.tmp\Z")


class Seen(t.NamedTuple):
    """A call that strace saw: its number among those of its name, whether it succeeded, and on which files."""

    real: str
    number: int
    result: str
    args: str
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        return "unlink" if self.real in ("unlinkat", "rmdir") else SAME.get(self.real, self.real)

    @property
    def changes(self) -> bool:
        return self.name != "open" or bool(re.search(r"O_(CREAT|WRONLY|RDWR)", self.args))

    @property
    def size(self) -> int:
        return int(self.result) if self.name in WRITING else 0

    def below(self, directory: str) -> bool:
        return bool(self.paths) and (self.paths[0] + "/").startswith(directory + "/")

    def alike(self) -> tuple[str, tuple[str, ...]]:
        """What it is in every run: temporary names are random."""
        return self.real, tuple(RANDOM.sub(".tmp", path) for path in self.paths)


def paths_of(args: str) -> tuple[str, ...]:
    """The files of a call: descriptors followed by names are directories."""
    words = [
        found.group(0) for found in re.finditer(rf"{DESCRIPTOR.pattern}|{NAME.pattern}".replace("?P<path>", ""), args)
    ]
    folder, paths = "", []
    for word in words:
        if word.startswith('"'):
            paths.append(os.path.join(folder, word.strip('"')))
            folder = ""
        else:
            folder = t.cast("re.Match[str]", DESCRIPTOR.match(word)).group("path")
    return tuple(paths) or (folder,)


def read_trace(path: Path) -> list[Seen]:
    counts: dict[str, int] = {}
    seen, pids = [], set()
    for line in path.read_text().splitlines():
        found = LINE.match(line)
        if not found:
            assert re.search(r"--- SIG|\+\+\+ ", line), f"strace says what nobody understands: {line}"
            continue
        pids.add(found["pid"])
        name, args = found["name"], found["args"]
        counts[name] = counts.get(name, 0) + 1
        if name in ("write", "pwrite64"):
            args = args.split(",")[0]  # not what was written
        seen.append(Seen(name, counts[name], found["result"] or "?", args, paths_of(args)))
    assert len(pids) == 1, "it started other processes"
    return seen


def traced(host: Host, work: Work, log: Path, shim: Shim | None = None, inject: str = "") -> tuple[Run, list[Seen]]:
    """Do the work in a child under strace, with a fault or without; what strace saw."""
    gate, opener = os.pipe()
    pid, out = started(host, work, shim, gate)
    command = [STRACE or "strace", "-f", "-y", "-s", "0", "-o", str(log), "-p", str(pid)]
    command += ["-e", "trace=" + ",".join(f"?{name}" for name in CALLS)] + (["-e", inject] if inject else [])
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as tracer:
        said = t.cast(t.IO[str], tracer.stderr).readline()
        os.write(opener, b".")
        run = ended(pid, out)
    os.close(opener)
    os.close(gate)
    assert "attached" in said, f"strace cannot trace here: {said}"
    return run, read_trace(log)


# --- what the shim sees is all ----------------------------------------------------------------------------------------


def rotation(host: Host) -> None:
    host.export()
    host.acknowledge()
    host.anchor()
    host.trim()


def prepared(root: Path, flavour: str, *, new: bool = False) -> Host:
    host = Host(root, flavour, "local", count=2, shard_records=3)
    if not new:
        host.run()
        host.grow(4)
    return host


def both(host: Host, work: Work, log: Path) -> tuple[list[tuple[t.Any, ...]], list[tuple[t.Any, ...]]]:
    """What changed files in the spool: as the shim has it, and as strace."""
    lists = getattr(host, "lists", "")
    run, seen = traced(host, work, log, Shim(host.spool, durable=True, lists=lists))
    assert run.answer == ""
    real = [each for each in seen if each.changes and each.result != "-1"]
    elsewhere = {each.paths[0] for each in real if not each.below(host.root) and not each.paths[0].startswith("pipe:")}
    assert elsewhere == set(), "it writes outside of the spool"
    ours = [(call.name, *filter(None, (call.path, call.other)), call.size) for call in run.done if call.path]
    there = [each for each in real if each.below(host.spool) or (lists and each.below(lists))]
    theirs = [(each.name, *each.paths, each.size) for each in there]
    return [each for each in ours if each[0] != "close"], theirs


@needs_strace
@pytest.mark.parametrize(
    ("flavour", "new", "work"),
    [
        ("delete_n", False, export_and_trim),
        ("staged", False, export_and_trim),
        ("delete_n", True, export_and_trim),
        ("delete_n", False, rotation),
    ],
)
def test_nothing_writes_past_the_shim(tmp_path: Path, flavour: str, new: bool, work: Work) -> None:
    """Call by call, with files and sizes: what the shim can strike is everything."""
    ours, theirs = both(prepared(tmp_path, flavour, new=new), work, tmp_path / "trace")
    assert ours == theirs
    assert {name for name, *_rest in ours} >= {"open", "write", "fsync", "link", "rename", "unlink"}
    assert len(ours) >= 50


@needs_strace
@pytest.mark.parametrize("new", [True, False])
def test_nothing_writes_past_the_shim_with_lists_kept_whole(tmp_path: Path, new: bool) -> None:
    host = Stitching(tmp_path, count=2)
    if not new:
        host.run()
        host.reboot()
    ours, theirs = both(host, export_and_trim, tmp_path / "trace")
    assert ours == theirs
    assert sum(name == "pwrite" for name, *_rest in ours) == 2
    assert sum(name == "ftruncate" for name, *_rest in ours) == (0 if new else 2)


@needs_strace
def test_what_writes_past_the_shim_is_found(tmp_path: Path) -> None:
    host = prepared(tmp_path, "delete_n")
    past = os.path.join(host.spool, "past")

    def work(host: Host) -> None:
        host.run()
        with open(past, "wb") as file:
            file.write(b"123")

    ours, theirs = both(host, work, tmp_path / "trace")
    assert [each for each in theirs if each not in ours] == [("open", past, 0), ("write", past, 3)]


# --- killed by the kernel ---------------------------------------------------------------------------------------------


@needs_strace
@pytest.mark.parametrize("flavour", TRIMMING if LONG else ("delete_n",))
def test_killed_at_every_real_call(tmp_path: Path, flavour: str, tally: Tally) -> None:
    """SIGKILL as the call enters the kernel, which does not do it: on the spool, and where the emulated list lies."""
    host = prepared(tmp_path, flavour)
    scene, log = Scene(tmp_path, host), tmp_path / "trace"
    all_gone(host)  # whatever is imported late is imported now
    scene.restore()
    calls = [each for each in traced(host, export_and_trim, log)[1] if each.changes and each.below(host.root)]
    points = calls if LONG else calls[::5]
    for point in points:
        scene.restore()
        run, seen = traced(host, export_and_trim, log, inject=f"inject={point.real}:signal=KILL:when={point.number}")
        assert run.answer == "killed"
        assert (seen[-1].result, seen[-1].number, seen[-1].alike()) == ("?", point.number, point.alike())
        all_gone(host)
    tally("kills by strace", len(points))
    no_loss(tally)
    assert len(points) >= (60 if LONG else 12)


# --- with the kernel's list open --------------------------------------------------------------------------------------

FORBIDDEN = (
    "os.fork",
    "os.posix_spawn",
    "os.exec",
    "os.spawn",
    "os.system",
    "pty.",
    "subprocess.",
    "socket.",
    "_thread.",
)


class Window:
    """Counts how often this process opens the kernel's lists, and notes what it must not do meanwhile."""

    def __init__(self) -> None:
        self.opened = 0
        self.open: set[int] = set()
        self.events: list[str] = []

    def install(self) -> None:
        """An audit hook stays until the process ends, so this is for a child."""
        kernel, file = _emulated.EmulatedFiles, _emulated._ListFile
        really_open, really_close = kernel.open, file.close

        def opens(files: _emulated.EmulatedFiles, name: str, flags: int) -> t.Any:
            opened = really_open(files, name, flags)
            if isinstance(opened, file):
                self.open.add(id(opened))
                self.opened += 1
            return opened

        def closes(opened: _emulated._ListFile) -> None:
            really_close(opened)
            self.open.discard(id(opened))

        # By setattr: to a type checker a method is one for ever.
        setattr(kernel, "open", opens)  # noqa: B010
        setattr(file, "close", closes)  # noqa: B010
        sys.addaudithook(self._hear)

    def _hear(self, event: str, _args: t.Any) -> None:
        if self.open and event.startswith(FORBIDDEN):
            self.events.append(event)


def watched(work: Work, times: int) -> Work:
    def run(host: Host) -> None:
        window = Window()
        window.install()
        work(host)
        assert window.opened >= times and not window.open, f"lists were opened {window.opened} times"
        assert window.events == [], f"with the list open: {window.events}"

    return run


@pytest.mark.parametrize("flavour", TRIMMING)
@pytest.mark.parametrize(("work", "times"), [(lambda host: host.export(), 1), (lambda host: host.trim(), 1)])
def test_nothing_is_started_while_the_list_is_open(tmp_path: Path, flavour: str, work: Work, times: int) -> None:
    host = Host(tmp_path, flavour, "local", count=5, shard_records=3)
    host.export()
    assert strike(host, watched(work, times)).answer == ""


def forks() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)


def connects() -> None:
    with socket.socket(socket.AF_UNIX) as one, contextlib.suppress(OSError):
        one.connect("/nonexistent")


@pytest.mark.parametrize("act", [forks, connects, lambda: subprocess.run(["true"], check=True)])
@pytest.mark.parametrize("step", ["export", "trim"])
def test_what_is_started_is_found(tmp_path: Path, act: t.Callable[[], None], step: str) -> None:
    """A hook that hears nothing proves nothing."""
    host = Host(tmp_path, "delete_n", "local", count=5)
    owner, name = (Spool, "new_shard") if step == "export" else (Lists, "delete")

    def work(host: Host) -> None:
        really = getattr(owner, name)

        def disturbed(*args: t.Any) -> t.Any:
            act()
            return really(*args)

        setattr(owner, name, disturbed)
        host.run()

    with pytest.raises(AssertionError, match="with the list open"):
        strike(host, watched(work, 2))
