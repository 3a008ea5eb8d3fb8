# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Each barrier, removed, must be missed: the product is broken on purpose in a forked child, and a named check fails.

A mutant replaces lines of a module. They must be there exactly once: who changes the code changes the mutant.
With ``-s``, and in one process, a table is printed at the end.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import sys
import tempfile
import textwrap
import traceback
import types
import typing as t
from pathlib import Path

import pytest
import test_kept_lists
import test_power_loss as power

from ansible_collections.integrity.ima.plugins.module_utils import (
    _durable,
    _emulated,
    _protocol,
    _rotation,
    _securityfs,
    _snapshot,
    _spool,
    _stitched,
)
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._store import _base, _directory
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import Host, oracle

UNITS = "ansible_collections.integrity.ima.tests.unit.plugins.module_utils"
# Power cuts that a mutant has to survive before it counts as not caught, and as harmless.
MOST, HARMLESS = (1000, 1000) if power.LONG else (120, 40)
Check = t.Callable[[Path], None]


class Mutant(t.NamedTuple):
    """Lines of a module and what stands there instead, the check that must fail, and how; or why nothing can fail."""

    module: types.ModuleType
    old: str
    new: str
    caught_by: str
    complaint: str = ""
    equivalent: str = ""


# -- the checks --------------------------------------------------------------------------------------------------------


def two_processes(root: Path) -> None:
    """One process comes while another is between copying and sealing: it is turned away."""
    host = Host(root / "host", count=5)
    real, told = _snapshot.Cycle._seal, []

    def seal(*arguments: t.Any) -> t.Any:
        if not told:
            told.append("")
            told[0] = status_of(host.run)
        return real(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_snapshot.Cycle, "_seal", seal)
        host.run()
    oracle(host)
    assert told == ["LockError locked"], f"the other was not turned away: {told}"


def unknown_outcome(root: Path) -> None:
    """A deletion is done and reported as failed, while records arrive: what arrived stays."""
    host = Host(root / "host", count=9)
    host.export()
    host.grow(15)
    _emulated.lost_reply(host.kernel)
    try:
        host.trim()
    except ImaError as error:
        assert error.reason == "delete_unknown", f"the deletion was answered with {error.reason}"
    oracle(host)
    host.run()
    oracle(host)


def whole_or_not_there(root: Path) -> None:
    """A run dies before and after each write of a new file: no name ever leads to half of it."""
    for number in range(2):
        path = root / str(number) / "file"
        path.parent.mkdir()
        recorder = power.Recorder(str(kernel_of(root / f"kernel{number}")), host=str(path.parent))
        recorder.dying(functools.partial(_durable.create, str(path), b"bytes"), wrote(number))
        assert not path.exists(), f"torn: a name leads to {path.read_bytes()!r}"


def kernel_of(path: Path) -> Path:
    _emulated.create(str(path))
    return path


def wrote(number: int) -> t.Callable[[t.Any], bool]:
    return lambda event: event.kind == ("create", "write")[number]


def status_of(work: t.Callable[[], object]) -> str:
    """How a child fared that did the work."""
    return in_child(lambda: work() and None)


OWN: dict[str, Check] = {
    "two_processes": two_processes,
    "unknown_outcome": unknown_outcome,
    "whole_or_not_there": whole_or_not_there,
}


def host_loses_power(name: str) -> str:
    return f"test_power_loss.test_a_host_loses_power[{name}]"


def controller_loses_power(name: str) -> str:
    return f"test_power_loss.test_a_controller_loses_power[{name}]"


def lists_are_struck(name: str) -> str:
    return f"test_kept_lists.test_struck_at_every_call[{name}-delete_n]"


def check_of(name: str, most: int = MOST) -> Check:
    """The check of that name: one of a power cut, one of this file, or another test with its arguments."""
    module, function, argument = t.cast(t.Any, re.fullmatch(r"(\w+)\.(\w+?)(?:\[(.*)\])?", name)).groups()
    if module == "test_power_loss":
        scenes, machine = (
            (power.HOSTS, "host") if function == "test_a_host_loses_power" else (power.CONTROLLERS, "controller")
        )
        return lambda root: loses_power(t.cast(t.Any, scenes)[argument](root), machine, most)
    if module == "test_mutants":
        return OWN[function]
    if function == "test_what_is_not_durable_is_gone":
        return lambda root: loses_power(test_kept_lists.CUTS[argument](root), "host", most)
    kept = module == "test_kept_lists"
    test = getattr(test_kept_lists if kept else importlib.import_module(f"{UNITS}.{module}"), function)
    values = argument.split("-") if argument else []

    def run(root: Path) -> None:
        names = test.__code__.co_varnames[: test.__code__.co_argcount]
        with pytest.MonkeyPatch.context() as patch:
            known: dict[str, t.Any] = {"tmp_path": root, "disk": root, "monkeypatch": patch}
            known["tally"] = lambda *_figure: None
            if "store" in names:
                known.update(store=_store_support.new_store(root / "store"), host=_store_support.Host(root / "host"))
            rest = iter(values)
            test(**{each: known[each] if each in known else WRITES.get(value := next(rest), value) for each in names})

    return run


WRITES = {"create": _durable.create, "replace": _durable.replace}


def loses_power(scene: power.Scene, machine: str, most: int) -> None:
    """As the test of that name, over the ``most`` worst states."""
    for cut in scene.cuts(machine)[:most]:
        wrong = power.complaint(getattr(scene, machine), cut)
        assert not wrong, wrong


# -- the mutants -------------------------------------------------------------------------------------------------------

IN_PLACE = """
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, mode)
    os.write(file, data)
    os.fsync(file)
    os.close(file)
    sync_directory(os.path.dirname(path))
    return True
"""
CREATE = """
    with NewFile(path, mode) as file:
        file.write(data)
        return file.publish()
"""
LISTS_LOSE_POWER = "test_kept_lists.test_what_is_not_durable_is_gone[a kexec]"
WRONG_LIST = "list is not what the kernel recorded"
MADE_BEFORE = "new_shard makes the boot directory's name durable before anything is in it"

MUTANTS: dict[str, Mutant] = {
    # -- every fsync of _durable, and those that call it
    "a new file is not synced": Mutant(
        _durable, "os.fsync(self._file)", "", host_loses_power("export and trim"), "ManifestError|lost: "
    ),
    "a published name is not synced": Mutant(
        _durable,
        """
        os.unlink(self._temporary, dir_fd=self._directory)
        self._temporary = ""
        os.fsync(self._directory)
        """,
        """
        os.unlink(self._temporary, dir_fd=self._directory)
        self._temporary = ""
        """,
        host_loses_power("export and trim"),
        "lost: records .* were deleted from the kernel",
    ),
    "a replaced name is not synced": Mutant(
        _durable,
        """
        os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._temporary = ""
        os.fsync(self._directory)
        """,
        """
        os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._temporary = ""
        """,
        host_loses_power("a foreign trim is noted"),
        "hidden: ",
    ),
    "sync_directory does nothing": Mutant(
        _durable, "os.fsync(descriptor)", "", host_loses_power("the first run"), "lost: records "
    ),
    "a new directory's name is not synced": Mutant(
        _durable, 'sync_directory(parent or ".")', "", host_loses_power("the first run"), "lost: records "
    ),
    "a new directory's name is not synced in the store": Mutant(
        _durable, 'sync_directory(parent or ".")', "", controller_loses_power("a rotation"), "lost: the store "
    ),
    "a removal is not synced": Mutant(
        _durable,
        """
        sync_directory(os.path.dirname(path))
        return True
        """,
        "return True",
        controller_loses_power("a rotation"),
        equivalent="the part of a delivery is removed after its shard is sealed; one that comes back is dropped when "
        "the next delivery begins, and never taken for another shard: its name is a manifest's digest. A pruned file "
        "that comes back goes with the next pruning",
    ),
    "a pruning's removal is not synced": Mutant(
        _durable,
        """
        sync_directory(os.path.dirname(path))
        return True
        """,
        "return True",
        host_loses_power("a prune"),
        equivalent="a file that comes back is a shard that is whole, and goes with the next pruning",
    ),
    "pruned before it is stated": Mutant(
        _spool,
        """
        if self.pruned < entry.sequence:
            _durable.replace(os.path.join(self.directory, _PRUNED), canonical(word))
        return self._remove(entry.sequence)
        """,
        """
        count = self._remove(entry.sequence)
        _durable.replace(os.path.join(self.directory, _PRUNED), canonical(word))
        return count
        """,
        host_loses_power("a prune"),
        "shard_missing",
    ),
    "setting aside is not synced": Mutant(
        _durable,
        """
        sync_directory(os.path.dirname(path))
        return name
        """,
        "return name",
        host_loses_power("an orphan is set aside"),
        equivalent="what is set aside was never sealed, and the next recovery sets it aside again; what is sealed in "
        "that directory afterwards brings an fsync of the same directory",
    ),
    # -- the fsyncs of recovery
    "recovery does not sync the head's name": Mutant(
        _spool,
        "_durable.sync_directory(os.path.join(self.shards, self.head.boot_id))",
        "",
        host_loses_power("a run died with a manifest that has its name"),
        "lost: records .* were deleted from the kernel",
    ),
    "recovery does not sync the boot directory's name": Mutant(
        _spool,
        """
        _durable.sync_directory(self.shards)
        raise_generation(self.directory, self.head.sequence)
        """,
        "raise_generation(self.directory, self.head.sequence)",
        host_loses_power("the first run died with a new directory"),
        equivalent=MADE_BEFORE,
    ),
    "recovery does not sync the orphan's name": Mutant(
        _spool,
        "_durable.sync_directory(os.path.dirname(path))",
        "",
        host_loses_power("a run died with an orphan"),
        "shard_missing",
    ),
    "recovery does not sync the orphan's boot directory": Mutant(
        _spool,
        """
        _durable.sync_directory(self.shards)
        self._seal_manifest(sealing)
        """,
        "self._seal_manifest(sealing)",
        host_loses_power("a run died with an orphan"),
        equivalent=MADE_BEFORE,
    ),
    # -- the order of sealing
    "the manifest before its shard": Mutant(
        _spool,
        """
        shard.publish(os.path.join(self.shards, entry.shard))
        self._seal_manifest(manifest)
        """,
        """
        self._seal_manifest(manifest)
        shard.publish(os.path.join(self.shards, entry.shard))
        """,
        host_loses_power("export and trim"),
        "shard_missing",
    ),
    "deleted before it is sealed": Mutant(
        _snapshot,
        "entries = self._seal(place, copy, drafts, observed)",
        """
        gone = sum(draft.members["count"] for draft in drafts)
        with self.lists.writer() as early:
            self.lists.delete(early, gone)
        place = place._replace(base=place.base + gone)
        entries = self._seal(place, copy, drafts, observed)
        """,
        host_loses_power("export and trim"),
        "lost: records .* were deleted from the kernel",
    ),
    "written in place": Mutant(
        _durable, CREATE, IN_PLACE, host_loses_power("export and trim"), "ManifestError (not_json|too_short|schema)"
    ),
    "written in place, and the process dies": Mutant(
        _durable, CREATE, IN_PLACE, "test_mutants.whole_or_not_there", "torn: "
    ),
    "rename in place of link for what is sealed": Mutant(
        _durable,
        """
        try:
            os.link(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except FileExistsError:
            new = False
            self._compare()
        os.unlink(self._temporary, dir_fd=self._directory)
        """,
        "os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)",
        "test_durable.test_exists_different",
        "DID NOT RAISE",
    ),
    "an fsync that failed is tried again": Mutant(
        _durable,
        "os.fsync(self._file)",
        """
        try:
            os.fsync(self._file)
        except OSError:
            os.fsync(self._file)
        """,
        "test_durable.test_a_failed_fsync_is_not_tried_again[create]",
        "'NoneType' object is not callable",  # it goes on to publish
    ),
    "the journal does not hold the manifest before the shard": Mutant(
        _spool,
        "self.write_journal(seal=manifest)",
        "",
        "test_spool.test_an_orphan_that_the_journal_knows",
        "assert notes",
    ),
    # -- the deletion
    "the head is not compared before the deletion": Mutant(
        _snapshot,
        "if self._identical(file, base, target) != target:",
        "if False:",
        "test_snapshot.test_head_changed",
        "head_changed",
    ),
    "the staged list is not compared before the deletion": Mutant(
        _snapshot,
        "target = self._identical(file, base, limit)",
        "target = limit",
        "test_snapshot.test_head_changed_staged",
        "DID NOT RAISE",
    ),
    "the intent is not written": Mutant(
        _snapshot,
        """
        self._intend(base, target)
        self.lists.delete(file, target - base)
        """,
        "self.lists.delete(file, target - base)",
        "test_snapshot.test_killed_at_the_kernel[delete_n-after_delete]",
        "assert host.faults",
    ),
    "the intent is not written, staged": Mutant(
        _snapshot,
        """
        self._intend(base, target)
        self.lists.delete_staged(file)
        """,
        "self.lists.delete_staged(file)",
        "test_snapshot.test_killed_at_the_kernel[staged-after_delete]",
        "assert host.faults",
    ),
    "a deletion of unknown outcome is repeated": Mutant(
        _securityfs,
        """
        try:
            written = file.write(data)
        except OSError as error:
            code = error.errno or 0
        """,
        """
        try:
            try:
                written = file.write(data)
            except OSError:
                written = file.write(data)
        except OSError as error:
            code = error.errno or 0
        """,
        "test_mutants.unknown_outcome",
        "neither in a shard nor in the kernel",
    ),
    "central does not wait for the acknowledgement": Mutant(
        _spool,
        'if trim_after == "local":',
        'if trim_after in ("local", "central"):',
        host_loses_power("acknowledge, then trim"),
        "left the kernel before the store acknowledged it",
    ),
    "verified does not wait for the verdict": Mutant(
        _spool,
        'return bool(word and (trim_after == "central" or word["verdict"]))',
        "return bool(word)",
        "test_snapshot.test_verified[delete_n]",
        "assert host.run",
    ),
    # -- the lock
    "the lock is not taken": Mutant(
        _protocol,
        """
        self._wait()
        self._same()
        """,
        "",
        "test_mutants.two_processes",
        "WriteError|was not turned away",
    ),
    "the lock's path is not compared": Mutant(
        _protocol,
        """
        self._wait()
        self._same()
        """,
        "self._wait()",
        "test_protocol.test_the_lock_changes_while_it_is_waited_for[replaced]",
        "DID NOT RAISE",
    ),
    "two rotations of one host at once": Mutant(
        _base,
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "",
        "test_store.test_two_rotations_of_one_host_do_not_overlap",
        "DID NOT RAISE",
    ),
    # -- the store
    "the store does not sync what a dead rotation published": Mutant(
        _directory,
        "for path in [directory, *boots]:",
        "for path in [directory]:",
        controller_loses_power("a rotation died with a manifest that has its name"),
        "lost: the store acknowledged shard",
    ),
    "the store does not sync a host's directory": Mutant(
        _directory,
        "for path in [directory, *boots]:",
        "for path in boots:",
        controller_loses_power("a key is recorded"),
        "lost: the key on record",
    ),
    "the store acknowledges before the shard's fsync": Mutant(
        _directory,
        "return _durable.publish_part(part, path, check)",
        """
        os.link(part, path)
        _durable.sync_directory(os.path.dirname(path))
        return True
        """,
        controller_loses_power("a rotation"),
        "lost: ",
    ),
    "the store acknowledges before the manifest's fsync": Mutant(
        _directory,
        "return _durable.create(path, data, 0o644 if name == FORMAT_NAME else 0o600)",
        """
        if os.path.exists(path):
            return False
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.write(file, data)
        os.close(file)
        _durable.sync_directory(os.path.dirname(path))
        return True
        """,
        controller_loses_power("a rotation"),
        "StoreError store_foreign|ManifestError|lost: ",
    ),
    "the store does not settle what a dead rotation left": Mutant(
        _base,
        "self._objects.settle(self._prefix(host))",
        "",
        controller_loses_power("a rotation died with a manifest that has its name"),
        "lost: the store acknowledged shard",
    ),
    "the store publishes the manifest first": Mutant(
        _base,
        """
        shard = self._prefix(host) + entry.shard
        try:
        """,
        """
        shard = self._prefix(host) + entry.shard
        self._objects.create(self._prefix(host) + entry.manifest, data)
        try:
        """,
        controller_loses_power("a rotation"),
        "missing_shard",
    ),
    "the store's word is sent before it is finished": Mutant(
        _rotation,
        """
        self._store.finish(self._host, manifest)
        self._head, self._verdict = Head(manifest, digest(data)), ""
        """,
        """
        self._head, self._verdict = Head(manifest, digest(data)), ""
        self._round(export=False)
        self._store.finish(self._host, manifest)
        """,
        controller_loses_power("a rotation"),
        "lost: the store acknowledged shard",
    ),
    # -- the lists kept whole on the host
    "the lists are not synced": Mutant(_stitched, "file.sync()", "", LISTS_LOSE_POWER, WRONG_LIST),
    "the lists are synced after they are remembered": Mutant(
        _stitched,
        """
        file.sync()
        size = file.offset if sequence else 0
        noted = {"epoch": epoch, "inode": file.inode, "sequence": sequence, "size": size, "tail": file.tail(size)}
        files = dict(_remembered(spool), **{file.name: noted})
        _durable.replace(os.path.join(spool.directory, _STATE), canonical({"version": 1, "files": files}))
        """,
        """
        size = file.offset if sequence else 0
        noted = {"epoch": epoch, "inode": file.inode, "sequence": sequence, "size": size, "tail": file.tail(size)}
        files = dict(_remembered(spool), **{file.name: noted})
        _durable.replace(os.path.join(spool.directory, _STATE), canonical({"version": 1, "files": files}))
        file.sync()
        """,
        LISTS_LOSE_POWER,
        WRONG_LIST,
    ),
    "the lists' names are not synced": Mutant(
        _stitched,
        "os.fsync(self._folder)",
        "",
        LISTS_LOSE_POWER,
        equivalent="a list that has no name after a power cut is made again from its beginning, and nobody has the "
        "other one open any more",
    ),
    "the lists are remembered before they are written": Mutant(
        _stitched,
        """
        for entry in epoch:
            if entry.sequence > done:
        """,
        """
        _remember(spool, file, first, epoch[-1].sequence)
        for entry in epoch:
            if entry.sequence > done:
        """,
        lists_are_struck("export and trim"),
        "bytes were right|list is not what the kernel recorded",
    ),
    "the lists go on after a reboot": Mutant(
        _stitched,
        'if before and before["epoch"] != first:',
        "if False:",
        lists_are_struck("a reboot"),
        "wrong bytes are there",
    ),
    "the lists are not emptied": Mutant(
        _stitched,
        """
        file.cut_off(0)
        before = _remember(spool, file, first, 0)
        """,
        "before = _remember(spool, file, first, 0)",
        lists_are_struck("a reboot"),
        "a death was taken for damage",
    ),
    "that the lists were emptied is not remembered": Mutant(
        _stitched,
        "before = _remember(spool, file, first, 0)",
        "before = None",
        lists_are_struck("a reboot"),
        "bytes were right, 0 are left",
    ),
    "the end of the lists is not compared": Mutant(
        _stitched,
        'return bool(file.inode == noted["inode"] and file.size >= size and file.tail(size) == noted["tail"])',
        'return bool(file.inode == noted["inode"] and file.size >= size)',
        "test_stitched.test_what_should_not_be_there_is_mended_in_place_and_said[end]",
        "is not what the kernel recorded",
    ),
    "the lists are mended with what was right before": Mutant(
        _stitched,
        "self.cut_off(self.offset + len(os.path.commonprefix([data, there])))",
        "self.cut_off(self.offset)",
        "test_kept_lists.test_what_was_right_stays_while_the_rest_is_mended[hole]",
        "bytes were right",
    ),
    "what a failed fsync left of the lists is believed": Mutant(
        _stitched,
        "rest, at = memoryview(data), self.offset",
        """
        done = len(there) if right else 0
        rest, at = memoryview(data)[done:], self.offset + done
        """,
        "test_kept_lists.test_what_a_failed_fsync_left_in_memory_is_written_again[binary_runtime_measurements]",
        "counts as durable that is not",
    ),
    "a fault in the lists is let through": Mutant(
        _stitched,
        """
        except (ImaError, OSError) as error:
            notes.append(f"the stitched lists were not brought up to the cut: {error}")
        """,
        """
        except ConfigError as error:
            notes.append(f"the stitched lists were not brought up to the cut: {error}")
        """,
        lists_are_struck("export and trim"),
        "a fault in the lists stopped the run|the error names neither step nor file",
    ),
}


# As they were when they were imported.
SOURCES = {
    path: Path(path).read_text(encoding="utf-8")
    for path in {t.cast(str, mutant.module.__file__) for mutant in MUTANTS.values()}
}


def mutated(source: str, old: str, new: str) -> str:
    """Replace whole lines, wherever they are indented to."""
    old, new = (textwrap.dedent(text).strip("\n") for text in (old, new or "pass"))
    places = []
    for depth in range(0, 24, 4):
        before, after = (textwrap.indent(text, " " * depth) for text in (old, new))
        places += [(f"\n{before}\n", f"\n{after}\n")] * source.count(f"\n{before}\n")
    assert len(places) == 1, f"the text to be mutated is there {len(places)} times: {old}"
    return source.replace(*places[0])


def apply(mutant: Mutant) -> None:
    """Give the functions of the product the changed code, in this process."""
    path = t.cast(str, mutant.module.__file__)
    names = dict(vars(mutant.module))
    exec(compile(mutated(SOURCES[path], mutant.old, mutant.new), path, "exec"), names)
    assert transplant(vars(mutant.module), names, mutant.module.__name__), "the mutant changes no code"


def transplant(old: t.Mapping[str, t.Any], new: t.Mapping[str, t.Any], module: str) -> int:
    """Every function and method keeps its identity, and gets the new code; how many were changed."""
    changed = 0
    for name, value in new.items():
        before, after = plain(old.get(name)), plain(value)
        if isinstance(after, type) and after.__module__ == module:
            changed += transplant(vars(before), vars(after), module)
        elif isinstance(after, types.FunctionType) and after.__module__ == module and before is not after:
            if (before.__code__.co_code, before.__code__.co_consts) != (
                after.__code__.co_code,
                after.__code__.co_consts,
            ):
                before.__code__ = after.__code__
                changed += 1
    return changed


def plain(value: t.Any) -> t.Any:
    """The function in a property, a static method or a decorated function."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return getattr(value, "__wrapped__", value)


def in_child(work: t.Callable[[], None]) -> str:
    """Do it in a forked child; what it complained of, or an empty string."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        said = ""
        try:
            work()
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__} {getattr(error, 'reason', '')}".strip()
            if not isinstance(error, ImaError):
                said += f": {error or ''} in {place.line}"
        os.write(into, said.encode()[:4000])
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        said = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return said if status == 0 else f"the child ended with status {status}"


def outcome(check: str, mutant: Mutant | None, root: Path, most: int = MOST) -> str:
    """What a check says of the product, or of a mutant; empty: nothing."""

    def work() -> None:
        if not check.startswith("test_durable"):
            power.quickly(setattr)
        if mutant:
            apply(mutant)
        check_of(check, most)(root)

    return in_child(work)


@pytest.fixture
def place() -> t.Iterator[Path]:
    folder = power.MEMORY if os.access(power.MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=folder, prefix="mutant-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def table() -> t.Iterator[list[str]]:
    rows: list[str] = []
    yield rows
    if rows:
        sys.stdout.write("\n" + "\n".join(rows) + "\n")


@pytest.mark.parametrize("check", sorted({mutant.caught_by for mutant in MUTANTS.values()}))
def test_without_a_mutant_the_check_passes(place: Path, check: str) -> None:
    """Those of power cuts pass in full where they live; a few cuts of each show that they can be called here."""
    assert outcome(check, None, place, most=5) == ""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_caught(place: Path, table: list[str], name: str) -> None:
    mutant = MUTANTS[name]
    said = outcome(mutant.caught_by, mutant, place, HARMLESS if mutant.equivalent else MOST)
    table.append(f"{name} | {mutant.caught_by} | {(said or mutant.equivalent or 'NOT CAUGHT').splitlines()[0]}")
    if mutant.equivalent:
        assert said == "", "the mutant is not equivalent any more: say in the table what it breaks"
    else:
        assert said, f"nothing fails without this barrier: {name}"
        assert re.search(mutant.complaint, said), said
