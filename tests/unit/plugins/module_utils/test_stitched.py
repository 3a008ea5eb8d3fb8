# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The stitched lists: the kernel's whole list up to the cut, on one inode, whoever dies, reboots or prunes."""

from __future__ import annotations

import os
import random
import signal
import typing as t
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ansible_collections.integrity.ima.plugins.module_utils import _durable, _host, _stitched
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import utc_now
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._stitched_support import (
    NAMES,
    RustReader,
    Stitching,
    ascii_of,
    right,
)
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import (
    FLAVOURS,
    TRIMMING,
    Host,
    oracle,
    parse,
)

CALLS = ("open", "pwrite", "pread", "ftruncate", "fsync", "fchmod", "link", "rename", "write", "close")


def prune(host: Stitching) -> None:
    """Remove every shard but the newest whose records the kernel does not hold any more."""
    spool = Spool(host.spool)
    base, epoch = spool.journal()["base"], set(spool.epoch)
    gone = [entry for entry in spool.entries[:-1] if entry not in epoch or entry.end <= base]
    if gone:
        spool.prune(gone[-1], "test", utc_now())


def dying(host: Stitching, work: t.Callable[[], object], call: int, after: bool) -> int:
    """Do the work in a child that is killed at that call of ours on any file; 0: it did not come so far."""
    pid = os.fork()
    if pid == 0:
        seen = 0

        def wrap(real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
            def wrapper(*args: t.Any, **more: t.Any) -> t.Any:
                nonlocal seen
                seen += 1
                if seen == call and not after:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return real(*args, **more)
                finally:
                    if seen == call:
                        os.kill(os.getpid(), signal.SIGKILL)

            return wrapper

        try:
            for name in CALLS:
                setattr(os, name, wrap(getattr(os, name)))
            work()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


# -- what they hold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_they_grow_with_each_export_on_one_inode(tmp_path, flavour):
    host = Stitching(tmp_path, flavour, count=30)
    host.export()
    right(host)
    inodes = host.inodes()
    for _round in range(5):
        host.run()
        host.grow(11)
        host.violation()
        assert host.export().notes == []
        right(host)
    assert host.inodes() == inodes
    assert [host.path(name).stat().st_mode & 0o7777 for name in NAMES] == [0o640, 0o640]


def test_without_the_section_nothing_is_kept(tmp_path):
    host = Host(tmp_path, count=3)
    host.export()
    assert "stitched.json" not in host.files()


def test_an_export_with_nothing_new_writes_nothing_and_reads_no_shard(tmp_path, monkeypatch):
    host = Stitching(tmp_path, count=30)
    host.run()
    before = [host.path(name).stat() for name in NAMES], host.files()
    monkeypatch.setattr(_stitched, "_rendered", None)
    monkeypatch.setattr(_durable, "replace", None)
    assert host.export().notes == []
    assert ([host.path(name).stat() for name in NAMES], host.files()) == before


@pytest.mark.parametrize("flavour", TRIMMING)
def test_a_reboot_begins_them_anew_in_place_and_a_kexec_that_carries_the_list_goes_on(tmp_path, flavour):
    host = Stitching(tmp_path, flavour, count=30)
    host.run()
    inodes = host.inodes()
    held = host.path(_stitched.BINARY).read_bytes()
    host.grow(5)
    host.kexec(carry_over=True)
    host.grow(5)
    host.run()
    right(host)
    assert host.path(_stitched.BINARY).read_bytes().startswith(held)
    host.reboot()
    host.grow(2)
    assert host.run()[0].notes == []
    right(host)
    assert len(parse(host.path(_stitched.BINARY).read_bytes())) == 3
    assert host.inodes() == inodes


# -- readers that keep them open ------------------------------------------------------------------------------------


class PythonReader:
    """How Keylime's former Python agent read: one open file, all of it from the start each time."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")

    def read(self, nth: int) -> tuple[bytes, int]:
        self._file.seek(0)
        lines = self._file.read().splitlines(keepends=True)
        return b"".join(lines[nth:]), len(lines)


class Follower:
    """A program that only ever reads on."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._count = 0

    def read(self, nth: int) -> tuple[bytes, int]:
        data = self._file.read()
        self._count += data.count(b"\n")
        return data, self._count


@pytest.mark.parametrize("kind", [RustReader, PythonReader, Follower])
@pytest.mark.parametrize("flavour", TRIMMING)
def test_a_reader_that_opens_once_sees_every_record_in_order_over_20_trims(tmp_path, flavour, kind):
    host = Stitching(tmp_path, flavour, count=10)
    host.export()
    reader, got, entry, trims = kind(host.path(_stitched.ASCII)), b"", 0, 0
    while trims < 20:
        data, entry = reader.read(entry)
        got += data
        host.grow(trims % 4 + 1)
        trims += host.run()[1] > 0
    got += reader.read(entry)[0]
    assert got == ascii_of(host.truth())
    assert len(host.held()) < len(host.truth()) / 4


# -- death, damage, pruning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("moment", ["first", "more", "reboot"])
def test_killed_at_each_call_the_next_run_adds_what_is_missing(tmp_path, moment, after):
    host = Stitching(tmp_path, count=40)
    if moment != "first":
        host.run()
        if moment == "reboot":
            host.reboot()
        host.grow(20)
    host.configure(lock_timeout="5")
    bare = Host.configure
    bare(host)  # seal the shards first: what dies is only the stitching
    host.export()
    host.configure()
    saved = {name: host.path(name).read_bytes() for name in NAMES if host.path(name).exists()}
    state = Path(host.spool, "stitched.json")
    noted = state.read_bytes() if state.exists() else None
    call = deaths = 0
    while True:
        call += 1
        for name in NAMES:  # back to before, on the same inode
            if name in saved:
                host.path(name).write_bytes(saved[name])
            elif host.path(name).exists():
                host.path(name).unlink()
        if noted:
            state.write_bytes(noted)
        elif state.exists():
            state.unlink()
        status = dying(host, lambda: _stitched.follow(host.lists, Spool(host.spool)), call, after)
        if not os.WIFSIGNALED(status):
            break
        deaths += 1
        before = {name: host.path(name).read_bytes() for name in NAMES if host.path(name).exists()}
        assert _stitched.follow(host.lists, Spool(host.spool)) == []
        right(host)
        if moment == "more":
            assert all(host.path(name).read_bytes().startswith(data) for name, data in before.items())
    assert deaths > 15
    right(host)


def test_a_torn_append_is_completed(tmp_path):
    host = Stitching(tmp_path, count=30)
    host.run()
    sizes = {name: host.path(name).stat().st_size for name in NAMES}
    Host.configure(host)
    host.grow(20)
    host.export()
    truth = {_stitched.BINARY: host.truth(), _stitched.ASCII: ascii_of(host.truth())}
    for name in NAMES:
        with host.path(name).open("ab") as file:
            file.write(truth[name][sizes[name] : sizes[name] + 33])
    host.configure()
    assert host.export().notes == []
    right(host)


@pytest.mark.parametrize("damage", ["end", "cut", "longer", "hole", "removed"])
def test_what_should_not_be_there_is_mended_in_place_and_said(tmp_path, damage):
    host = Stitching(tmp_path, count=300)
    host.run()
    for name in NAMES:
        path = host.path(name)
        data = path.read_bytes()
        if damage == "removed":
            path.unlink()
        else:
            path.write_bytes(
                {
                    "end": data[:-1] + b"\xff",
                    "cut": data[: len(data) // 2],
                    "longer": data + b"x",
                    "hole": data[:5000] + bytes(100) + data[5100:],
                }[damage]
            )
    if damage == "hole":  # too far from the end to be noticed, while the state knows the place
        os.unlink(os.path.join(host.spool, "stitched.json"))
    host.grow(3)
    notes = host.export().notes
    right(host)
    # What is missing is added without a word; only what was wrong is worth one.
    assert [note for note in notes if "mended in place" in note] == notes
    assert len(notes) == (0 if damage in ("cut", "removed") else 2)
    assert host.export().notes == []


@pytest.mark.parametrize("state", [b"", b"{", b'{"files":{},"version":1}', b'{"files":{},"version":2}', None])
def test_the_state_is_a_hint(tmp_path, state):
    host = Stitching(tmp_path, count=30)
    host.run()
    path = Path(host.spool, "stitched.json")
    path.unlink() if state is None else path.write_bytes(state)
    host.grow(4)
    assert host.run()[0].notes == []
    right(host)


def test_pruned_shards_make_no_difference_even_without_the_state(tmp_path):
    host = Stitching(tmp_path, trim_after="central", count=60)
    host.export()
    host.acknowledge()
    host.run()
    prune(host)
    host.grow(10)
    assert host.export().notes == []
    right(host)
    os.unlink(os.path.join(host.spool, "stitched.json"))
    assert host.export().notes == []
    right(host)
    # The ASCII list can be made again from the binary one, whose bytes the manifests know.
    host.path(_stitched.ASCII).unlink()
    assert host.export().notes == []
    right(host)


def test_what_only_the_store_has_is_asked_for_and_nothing_wrong_is_written(tmp_path):
    host = Stitching(tmp_path, trim_after="central", count=60)
    host.export()
    host.acknowledge()
    host.run()
    prune(host)
    text = host.path(_stitched.ASCII).read_bytes()
    host.path(_stitched.BINARY).write_bytes(b"\0" * 9999)
    os.unlink(os.path.join(host.spool, "stitched.json"))
    host.grow(10)
    done = host.export()
    assert (done.records, len(done.notes)) == (10, 2)
    assert all("was pruned" in note and "put the shard back" in note for note in done.notes)
    assert host.path(_stitched.ASCII).read_bytes() == text
    assert host.truth().endswith(b"".join(Spool(host.spool).raw_from(61)))


# -- who may do what ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o770, 0o757, 0o1777])
def test_a_directory_that_others_can_write_to_is_not_used_and_the_export_goes_on(tmp_path, mode):
    host = Stitching(tmp_path, count=9)
    os.chmod(host.lists, mode)
    done = host.export()
    assert (done.records, os.listdir(host.lists)) == (10, [])
    assert len(done.notes) == 1 and "Others could write" in done.notes[0]
    oracle(host)


@pytest.mark.parametrize("kind", ["link", "hard link", "fifo", "directory"])
def test_what_is_no_file_of_ours_is_not_written_to(tmp_path, kind):
    host = Stitching(tmp_path, count=9)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = host.path(_stitched.ASCII)
    make: dict[str, t.Callable[[], object]] = {
        "link": lambda: path.symlink_to(victim),
        "hard link": lambda: os.link(victim, path),
        "fifo": lambda: os.mkfifo(path),
        "directory": path.mkdir,
    }
    make[kind]()
    done = host.export()
    assert (done.records, len(done.notes)) == (10, 1)
    assert victim.read_bytes() == b"precious"


def test_a_missing_directory_is_a_note_in_the_results_of_export_and_rotate(tmp_path):
    host = Stitching(tmp_path, count=9)
    os.rmdir(host.lists)
    assert "not brought up to the cut" in _host.export(host.config(), False)["notes"][0]
    host.grow(1)
    params = {"have": None, "part": None, "chunk_bytes": 1 << 20, "export": True, "anchor": False}
    answer = _host.rotate(host.config(), params, False)
    assert (answer["exported"], len(answer["warnings_said"])) == (1, 1)


def test_check_mode_does_not_touch_them(tmp_path):
    host = Stitching(tmp_path, count=9)
    _host.export(host.config(), True)
    assert os.listdir(host.lists) == []


# -- the oracle -----------------------------------------------------------------------------------------------------

STEPS = st.lists(st.sampled_from(["grow", "export", "run", "kexec", "reboot", "kill", "forget", "prune"]), max_size=10)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=STEPS, flavour=st.sampled_from(TRIMMING), seed=st.integers(0, 10**6))
def test_whatever_happens_they_are_the_kernels_list_up_to_the_cut(tmp_path_factory, steps, flavour, seed):
    host = Stitching(tmp_path_factory.mktemp("any"), flavour, "local", count=5)
    dice = random.Random(seed)
    for step in steps:
        if step == "grow":
            host.grow(dice.randint(1, 15))
        elif step in ("export", "run"):
            getattr(host, step)()
            right(host)
        elif step == "kexec":
            host.run()
            host.kexec(carry_over=True)
        elif step == "reboot":
            host.reboot()
        elif step == "kill":
            host.grow(dice.randint(1, 15))
            dying(host, host.run, dice.randint(1, 120), dice.random() < 0.5)
        elif step == "forget" and os.path.exists(os.path.join(host.spool, "stitched.json")):
            os.unlink(os.path.join(host.spool, "stitched.json"))
        elif step == "prune":
            host.run()
            prune(host)
    notes = [note for note in host.run()[0].notes if "stitched" in note]
    # Whether a list that begins otherwise is that of the boot before, only the state knows.
    assert notes == [] or "forget" in steps
    right(host)
