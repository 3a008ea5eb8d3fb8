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
import shutil
import typing as t
from pathlib import Path

import pytest
import test_power_loss as power
from conftest import Tally
from recorder import DAMAGES, HOLE, Cut, Recorder, lay_out
from shim import DROPPED, HALF, KILLS, Call, Run, Scene, Work, below
from test_points import _no_disk, all_gone, sweep

from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._stitched import ASCII, BINARY
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._stitched_support import (
    NAMES,
    RustReader,
    Stitching,
    ascii_of,
    right,
)
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import TRIMMING, oracle

__all__ = ["_no_disk"]  # of each test here, too
STATE = "stitched.json"
MOST = 24  # power cuts of one scenario, unless LONG=1
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
        def wrapper(*args: t.Any) -> t.Any:
            try:
                return real(*args)
            finally:
                self.look()

        return wrapper

    def look(self) -> None:
        now = held(self._host)
        for name in NAMES:
            count, before = alike(now[name], self._truth[name]), self._right[name]
            # What is in common with the boot before goes with the rest of it.
            common = alike(self._old[name], self._truth[name])
            assert count >= before or before <= common, f"{name}: {before} bytes were right, {count} are left"
            assert not self._sound[name] or self._is_sound(name, now[name]), f"{name}: wrong bytes are there"
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
def test_struck_at_every_call(tmp_path: Path, name: str, flavour: str, tally: Tally) -> None:
    umask = os.umask(0o077)  # so that the group's right to read has to be given
    try:
        scene = SCENES[name](tmp_path, flavour)
        work = t.cast(Work, scene.work)
        every = 7 if flavour == "delete_n" else 23
        assert sweep(scene, work, scene.check, tally, every=every, near=near, told=scene.told) >= 10
    finally:
        os.umask(umask)
