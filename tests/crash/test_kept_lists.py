# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The lists kept whole on the host: death, errors and power cuts at every call, while readers hold them open.

Whatever happens, the next run makes both lists what the kernel recorded up to the cut, in the same files, and at no
instant does a byte go away that was right. What fails in the lists fails no export and no trim.
"""

from __future__ import annotations

import errno
import json
import os
import typing as t
from pathlib import Path

import pytest
import test_power_loss as power
from conftest import Tally
from recorder import DAMAGES, HOLE, Cut, Event, Recorder, lay_out
from shim import DROPPED, HALF, KILLS, Call, Run, Scene, Work, below
from test_points import all_gone, sweep
from test_power_loss import LONG, disk

from ansible_collections.integrity.ima.plugins.module_utils._stitched import ASCII, BINARY
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._stitched_support import (
    NAMES,
    RustReader,
    Stitching,
    ascii_of,
    right,
)
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import TRIMMING, oracle

__all__ = ["disk"]
STATE = "stitched.json"
MOST = 16  # power cuts of one scenario, unless LONG=1
Lists = t.Dict[str, bytes]


def held(host: Stitching) -> Lists:
    """What the lists hold."""
    return {name: host.path(name).read_bytes() if host.path(name).exists() else b"" for name in NAMES}


def alike(one: bytes, other: bytes) -> int:
    """How many bytes at the beginning are the same."""
    return len(os.path.commonprefix([one, other]))


class Watch:
    """A context manager that looks at the lists at each change: bytes that are right stay, and no others come."""

    def __init__(self, host: Stitching, old: Lists) -> None:
        self._host, self._old = host, old
        truth = host.truth()
        self._truth = {BINARY: truth, ASCII: ascii_of(truth)}
        now = held(host)
        self._right = {name: alike(now[name], self._truth[name]) for name in NAMES}
        # After damage, wrong bytes are there until they are mended.
        self._sound = {name: self._is_sound(name, now[name]) for name in NAMES}
        self._patch = pytest.MonkeyPatch()

    def _is_sound(self, name: str, data: bytes) -> bool:
        return data == self._old[name] or self._truth[name].startswith(data)

    def __enter__(self) -> None:
        for name in ("pwrite", "ftruncate"):
            self._patch.setattr(os, name, self._looking(getattr(os, name)))

    def __exit__(self, *_unused: object) -> None:
        self._patch.undo()

    def _looking(self, real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        def wrapper(descriptor: int, *args: t.Any) -> t.Any:
            try:
                return real(descriptor, *args)
            finally:
                for name in NAMES:
                    path = self._host.path(name)
                    if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                        self.look(name, path.read_bytes())

        return wrapper

    def look(self, name: str, now: bytes) -> None:
        count, before = alike(now, self._truth[name]), self._right[name]
        # What is in common with the boot before goes with the rest of it.
        common = alike(self._old[name], self._truth[name])
        assert count >= before or before <= common, f"{name}: {before} bytes were right, {count} are left"
        assert not self._sound[name] or self._is_sound(name, now), f"{name}: wrong bytes are there"
        self._right[name] = count


# --- death and errors -------------------------------------------------------------------------------------------------


class Kept(Scene):
    """A host whose lists are put back in place, and readers that hold them open from before the strike on."""

    def __init__(self, root: Path, host: Stitching, *, anew: bool) -> None:
        super().__init__(root, host)
        self.kept, self.anew, self._lists = host, anew, held(host)
        self.there = [name for name in NAMES if host.path(name).exists()]
        self.old = self._lists if anew else dict.fromkeys(NAMES, b"")
        self.mode = ""
        self.work(host)
        self._left = host.held()
        self.restore()

    def restore(self) -> None:
        super().restore()
        for name in NAMES:
            if name not in self.there:
                self.kept.path(name).unlink(missing_ok=True)
                continue
            with self.kept.path(name).open("r+b") as file:
                file.truncate(0)
                file.write(self._lists[name])
        self._reading = bool(self.there) and not self.anew
        if self._reading:
            self._open()

    def _open(self) -> None:
        self._text, self._binary = RustReader(self.kept.path(ASCII)), self.kept.path(BINARY).open("rb")
        self._got, self._entry = dict.fromkeys(NAMES, b""), 0
        self.read()

    def read(self) -> None:
        """Read on: whole lines of the one list, every byte of the other."""
        text, entry = self._text.read(self._entry)
        self._got[ASCII] += b"".join(text.splitlines(keepends=True)[: entry - self._entry])
        self._got[BINARY] += self._binary.read()
        self._entry = entry

    def work(self, host: t.Any) -> None:
        said = Path(host.root, "said")
        with Watch(host, self.old):
            done, _count = host.run()
        said.write_text(json.dumps(done.notes))

    def told(self, mode: str, call: Call, run: Run) -> None:
        """What failed in the lists, or in the word on them, is said, and the rest of the run is done."""
        self.mode = mode
        ours = below(call.path, self.kept.lists)
        state = STATE in os.path.basename(call.path) and not mode.endswith("for ever")
        if mode not in KILLS and (ours or state):
            assert run.answer == "", "a fault in the lists stopped the run"
            assert self.kept.held() == self._left, "a fault in the lists kept the kernel's list from being trimmed"
            notes = json.loads(Path(self.kept.root, "said").read_text())
            assert not ours or mode == HALF or any("stitched" in note for note in notes), "nobody was told"

    def check(self, host: t.Any) -> None:
        """One run later they are whole, and go on; the readers saw every byte once."""
        inodes = {name: host.path(name).stat().st_ino for name in os.listdir(host.lists)}
        if self._reading:
            self.read()
        with Watch(host, self.old):
            notes = [note for note in host.run()[0].notes if "stitched" in note]
        right(host)
        damaged = self.mode == DROPPED
        assert damaged or notes == [], f"a death was taken for damage: {notes}"
        if not self._reading:
            self._open()
        all_gone(host)
        right(host)
        assert {name: host.path(name).stat().st_ino for name in inodes} == inodes, "another file has a list's name"
        assert set(self.there) <= set(inodes), "a list's name is gone"
        self.read()
        assert damaged or self._got == held(host), "a reader saw other bytes"


def near(call: Call) -> bool:
    """A call on the lists, or on what is remembered of them."""
    return os.path.basename(os.path.dirname(call.path)) == "lists" or STATE in call.path or call.path.endswith("/lists")


def growing(root: Path, flavour: str) -> Kept:
    host = Stitching(root, flavour, count=2, shard_records=3)
    host.run()
    host.grow(4)
    return Kept(root, host, anew=False)


def beginning(root: Path, flavour: str) -> Kept:
    host = Stitching(root, flavour, count=2, shard_records=3)
    return Kept(root, host, anew=False)


def rebooted(root: Path, flavour: str) -> Kept:
    host = Stitching(root, flavour, count=4, shard_records=3)
    host.run()
    host.reboot()
    host.grow(3)
    return Kept(root, host, anew=True)


SCENES = {"the first run": beginning, "export and trim": growing, "a reboot": rebooted}


@pytest.mark.parametrize("flavour", TRIMMING)
@pytest.mark.parametrize("name", SCENES)
def test_struck_at_every_call(disk: Path, name: str, flavour: str, tally: Tally) -> None:
    umask = os.umask(0o077)  # so that the group's right to read has to be given
    try:
        scene = SCENES[name](disk, flavour)
        work = t.cast(Work, scene.work)
        every = 11 if flavour == "delete_n" else 37
        assert sweep(scene, work, scene.check, tally, every=every, near=near, told=scene.told) >= 5
    finally:
        os.umask(umask)


# --- what is mended ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["zeros", "hole", "one byte"])
def test_what_was_right_stays_while_the_rest_is_mended(disk: Path, damage: str) -> None:
    """Bytes are wrong: what is right before them is there at every instant."""
    host = Stitching(disk, count=200)
    host.run()
    for name in NAMES:
        data = bytearray(host.path(name).read_bytes())
        start = len(data) * 2 // 3
        end = {"zeros": len(data), "hole": start + 100, "one byte": start + 1}[damage]
        data[start:end] = bytes([data[start] ^ 1]) + bytes(end - start - 1)
        with host.path(name).open("r+b") as file:
            file.write(data)
    if damage != "zeros":  # so far from the end it is not looked for
        os.unlink(os.path.join(host.spool, STATE))
    with Watch(host, dict.fromkeys(NAMES, b"")):
        assert len(host.export().notes) == 2
    right(host)


class Pages:
    """Which bytes of a file are on its disk, if one that failed to be written is called clean all the same."""

    def __init__(self, path: Path) -> None:
        self._inode, size = path.stat().st_ino, path.stat().st_size
        self.failing = False
        self.safe, self.dirty = set(range(size)), set[int]()
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Pages:
        for name in ("pwrite", "fsync"):
            self._patch.setattr(os, name, self._wrap(getattr(self, f"_{name}"), getattr(os, name)))
        return self

    def __exit__(self, *_unused: object) -> None:
        self._patch.undo()

    def _wrap(self, mine: t.Callable[..., None], real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        def wrapper(descriptor: int, *args: t.Any) -> t.Any:
            result = real(descriptor, *args)
            if os.fstat(descriptor).st_ino == self._inode:
                mine(result, *args)
            return result

        return wrapper

    def _pwrite(self, done: int, _data: t.Any, offset: int) -> None:
        self.dirty |= set(range(offset, offset + done))

    def _fsync(self, _result: None) -> None:
        dirty, self.dirty = self.dirty, set()
        if self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.safe |= dirty


@pytest.mark.parametrize("name", NAMES)
def test_what_a_failed_fsync_left_in_memory_is_written_again(disk: Path, name: str) -> None:
    """The kernel may call such pages clean, and answer yes to the next one."""
    host = Stitching(disk, count=30)
    host.run()
    host.grow(20)
    with Pages(host.path(name)) as pages:
        pages.failing = True
        (note,) = host.export().notes
        assert name in note and "EIO" in note
        pages.failing = False
        host.grow(3)
        assert host.export().notes == []
    right(host)
    assert set(range(host.path(name).stat().st_size)) == pages.safe, "a list counts as durable that is not"


# --- power cuts -------------------------------------------------------------------------------------------------------


class PowerCut(power.Scene):
    """A host that loses all that was not durable: with its boot, or in a kexec that nobody synced before.

    Only the kexec carries list and epoch over; so only then what was remembered of the lists is believed.
    """

    def __init__(self, root: Path, flavour: str = "delete_n", *, kexec: bool = True, anew: bool = False) -> None:
        self.kexec = kexec
        # In the spool, to be on the same disk. A new spool would be refused with something in it.
        self.machine = Stitching(root / "host", flavour, "local", lists="spool/lists", count=90, shard_records=60)
        self.kernel, self.spool = self.machine.kernel, self.machine.spool
        os.rmdir(self.machine.lists)
        self.machine.run()
        os.mkdir(self.machine.lists, 0o750)
        self.machine.run()
        self.old = dict.fromkeys(NAMES, b"")
        if anew:
            self.old = held(self.machine)
            self.machine.reboot()
        self.machine.grow(90)
        self.recorder = Recorder(self.kernel, host=self.spool)
        self.inodes = {name: self._inode(name) for name in NAMES}
        self.nodes = list(self.recorder.first["host"].names["lists"].values())
        with self.recorder:
            self.machine.run()
            self.machine.grow(90)
            self.machine.run()
        self.recorded()

    def cuts(self, machine: str) -> list[Cut]:
        """While the lists are brought up to the cut. Pages written in place come to the disk in any order."""
        cuts = self.recorder.cuts(machine, damages=(*DAMAGES, HOLE))
        return [cut for cut in cuts if LONG or any(map(self._near, self.recorder.events[cut.prefix - 2 : cut.prefix]))]

    def _near(self, event: Event) -> bool:
        return event.path == "lists" or event.node in self.nodes or STATE in str(event)

    def _inode(self, name: str) -> str:
        status = self.machine.path(name).stat()
        return f"{status.st_dev}:{status.st_ino}"

    def _same_files(self) -> None:
        """On the disk that is laid out the lists have other numbers than on the one before; what was noted follows."""
        path = Path(self.spool, STATE)
        text = path.read_text(encoding="latin-1") if path.exists() else ""
        for name in NAMES:
            if self.machine.path(name).exists():
                text = text.replace(f'"{self.inodes[name]}"', f'"{self._inode(name)}"')
        if path.exists():
            path.write_text(text, encoding="latin-1")

    def host(self, cut: Cut) -> None:
        lay_out(cut.tree, self.spool)
        self._same_files()
        self.kernel_at(self.promised(cut))
        if self.kexec:
            self.machine.before, self.machine.carried = b"", 0
            self.machine.kexec(carry_over=True)
        else:
            self.machine.reboot()
        old = self.old if self.kexec else held(self.machine)
        with Watch(self.machine, old):
            self.machine.run()
        oracle(self.machine, pcrs=False)
        right(self.machine)
        if self.again():
            self.machine.grow(1)
            assert [note for note in self.machine.run()[0].notes if "stitched" in note] == []
            right(self.machine)


CUTS: dict[str, t.Callable[[Path], PowerCut]] = {
    "a reboot": lambda root: PowerCut(root, kexec=False),
    "a kexec": PowerCut,
    "a kexec, staged": lambda root: PowerCut(root, "staged"),
    "a kexec after a reboot": lambda root: PowerCut(root, anew=True),
}


@pytest.mark.parametrize("name", CUTS)
def test_what_is_not_durable_is_gone(disk: Path, name: str, tally: Tally) -> None:
    scene = CUTS[name](disk)
    power.survived(tally, power.survive(scene, "host", MOST))
