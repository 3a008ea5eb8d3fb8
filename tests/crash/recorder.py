# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a power cut may leave of the files that a run wrote.

:class:`Recorder` wraps the functions of ``os`` in this process and notes, in order, what happens to the files below
one root for each machine, and what was told to the outside: records deleted from the kernel, shards acknowledged.
:class:`Disk` plays that again and gives the states after a cut: a file's bytes are safe since the ``fsync`` of that
file, a name in a directory since the ``fsync`` of that directory, and nothing else is.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import json
import os
import random
import shutil
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _emulated

Node = t.Union[int, str]  # a file's number, or a directory's path; "" is the root
Tree = t.Dict[str, t.Optional[bytes]]  # a file's bytes, or None for a directory, by path
# Nobody in the product uses these; what they did would be missed.
UNKNOWN = ("replace", "remove", "rmdir", "truncate", "symlink", "fdatasync", "writev", "sendfile")
LOST, WHOLE, ZEROS, HALF = DAMAGES = ("lost", "whole", "zeros", "half")
HOLE = "hole"  # zeros, and then the second half: for files that are written in place
FEW = 4  # so many names that are not safe: every combination


class Killed(BaseException):
    """The process dies here; no handler of ``Exception`` sees it."""


class Event(t.NamedTuple):
    """One step. ``path`` is the file or directory that it is about, relative to the machine's root."""

    kind: str
    machine: str = ""
    path: str = ""
    changes: tuple[tuple[str, Node | None], ...] = ()  # of names, in the directory ``path``
    node: Node = 0
    offset: int = 0
    data: bytes = b""
    told: t.Any = None  # what the outside knows

    def __str__(self) -> str:
        names = " ".join(name for name, _node in self.changes)
        return f"{self.kind} {self.machine}:{self.path} {names}".strip()


class Kernel(t.NamedTuple):
    """What the emulated kernel has committed: it no longer holds the records of ``boot_id`` before ``first``."""

    boot_id: str
    first: int
    state: bytes


class Recorder:
    """A context manager: everything that happens below ``roots`` (machine: directory) while it is entered."""

    def __init__(self, kernel: str, **roots: str) -> None:
        self.kernel = kernel
        self.roots = roots
        self.events: list[Event] = []
        self.dead = False
        self._dies_after: t.Callable[[Event], bool] = lambda event: False
        self._numbers = itertools.count(1)
        self._names: dict[tuple[str, str], dict[str, Node]] = {}
        self._open_nodes: dict[int, tuple[str, Node]] = {}
        self._stack = contextlib.ExitStack()
        self.first = {machine: self._scan(machine) for machine in roots}

    def _scan(self, machine: str) -> Disk:
        disk = Disk()
        for folder, folders, files in os.walk(self.roots[machine]):
            relative = os.path.relpath(folder, self.roots[machine])
            relative = "" if relative == "." else relative
            names: dict[str, Node] = {name: os.path.join(relative, name) for name in folders}
            for name in files:
                names[name] = number = next(self._numbers)
                with open(os.path.join(folder, name), "rb") as file:
                    disk.files[number] = (file.read(),) * 2
            disk.names[relative] = dict(names)
            self._names[machine, relative] = names
        return disk

    # -- in place of os ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Recorder:
        self._note_kernel()
        for name in ("open", "write", "pwrite", "ftruncate", "fsync", "close", "link", "unlink", "rename", "mkdir"):
            real = getattr(os, name)
            self._put(os, name, functools.wraps(real)(functools.partial(getattr(self, f"_{name}"), real)))
        for name in UNKNOWN:
            self._put(os, name, functools.partial(self._unknown, name, getattr(os, name)))
        self._put(_emulated, "_store", functools.partial(self._commit, _emulated._store))
        return self

    def _put(self, module: t.Any, name: str, wrapper: t.Any) -> None:
        self._stack.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, wrapper)

    def __exit__(self, kind: object, *_unused: object) -> None:
        self._stack.close()
        self._let_go()
        if kind is None:
            for machine, root in self.roots.items():
                assert self.at(len(self.events))[machine].seen() == read_tree(root), f"{machine}: not all was recorded"

    def _record(self, event: Event) -> None:
        self.events.append(event)
        if self._dies_after(event):
            self.dead = True
            raise Killed(str(event))

    def _alive(self) -> None:
        if self.dead:
            raise Killed

    def _place(self, path: t.Any, folder: int | None = None) -> tuple[str, str] | None:
        """The machine and the path there, or None for a file of nobody's."""
        if folder is not None:
            machine, node = self._open_nodes.get(folder, ("", ""))
            return (machine, os.path.join(str(node), path)) if machine else None
        whole = os.path.abspath(os.fsdecode(path)) + "/"
        for machine, root in self.roots.items():
            if whole.startswith(root + "/"):
                return machine, whole[len(root) + 1 : -1]
        return None

    def _node(self, machine: str, path: str) -> Node | None:
        return self._names[machine, os.path.dirname(path)].get(os.path.basename(path)) if path else ""

    def _rename_nodes(self, kind: str, machine: str, folder: str, *changes: tuple[str, Node | None]) -> None:
        names = self._names[machine, folder]
        for name, node in changes:
            names.pop(name, None)
            if node is not None:
                names[name] = node
        self._record(Event(kind, machine, folder, changes))

    def _open(self, real: t.Any, path: t.Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        self._alive()
        place = self._place(path, dir_fd)
        descriptor: int = real(path, flags, mode, dir_fd=dir_fd)
        self._open_nodes.pop(descriptor, None)
        if place is None:
            return descriptor
        machine, where = place
        node = self._node(machine, where)
        if node is not None:
            assert not flags & os.O_TRUNC, "a file is emptied in place"
            self._open_nodes[descriptor] = (machine, node)
            return descriptor
        number = next(self._numbers)
        self._open_nodes[descriptor] = (machine, number)
        folder, name = os.path.split(where)
        self._rename_nodes("create", machine, folder, (name, number))
        return descriptor

    def _write(self, real: t.Any, descriptor: int, data: t.Any) -> int:
        if self.dead:
            return len(data)  # a buffer that is let go of after the death: nothing is written
        known = self._open_nodes.get(descriptor)
        offset = os.lseek(descriptor, 0, os.SEEK_CUR) if known else 0
        done: int = real(descriptor, data)
        if known:
            self._record(Event("write", known[0], node=known[1], offset=offset, data=bytes(data)[:done]))
        return done

    def _pwrite(self, real: t.Any, descriptor: int, data: t.Any, offset: int) -> int:
        self._alive()
        done: int = real(descriptor, data, offset)
        if descriptor in self._open_nodes:
            machine, node = self._open_nodes[descriptor]
            self._record(Event("write", machine, node=node, offset=offset, data=bytes(data)[:done]))
        return done

    def _ftruncate(self, real: t.Any, descriptor: int, size: int) -> None:
        self._alive()
        real(descriptor, size)
        if descriptor in self._open_nodes:
            machine, node = self._open_nodes[descriptor]
            self._record(Event("truncate", machine, node=node, offset=size))

    def _fsync(self, real: t.Any, descriptor: int) -> None:
        # Nothing is really made durable: these disks are plugged out on paper only.
        self._alive()
        if descriptor in self._open_nodes:
            machine, node = self._open_nodes[descriptor]
            kind, path = ("sync directory", node) if isinstance(node, str) else ("sync", "")
            self._record(Event(kind, machine, path, node=node))

    def _close(self, real: t.Any, descriptor: int) -> None:
        self._open_nodes.pop(descriptor, None)
        real(descriptor)

    def _link(self, real: t.Any, source: t.Any, target: t.Any, **folders: int) -> None:
        self._alive()
        old, new = self._place(source, folders.get("src_dir_fd")), self._place(target, folders.get("dst_dir_fd"))
        real(source, target, **folders)
        assert old and new and old[0] == new[0], "a link between machines"
        folder, name = os.path.split(new[1])
        self._rename_nodes("link", new[0], folder, (name, self._node(*old)))

    def _unlink(self, real: t.Any, path: t.Any, *, dir_fd: int | None = None) -> None:
        self._alive()
        place = self._place(path, dir_fd)
        real(path, dir_fd=dir_fd)
        if place:
            folder, name = os.path.split(place[1])
            self._rename_nodes("unlink", place[0], folder, (name, None))

    def _rename(self, real: t.Any, source: t.Any, target: t.Any, **folders: int) -> None:
        self._alive()
        old, new = self._place(source, folders.get("src_dir_fd")), self._place(target, folders.get("dst_dir_fd"))
        real(source, target, **folders)
        if old and new:
            folder, name = os.path.split(new[1])
            assert old[0] == new[0] and os.path.dirname(old[1]) == folder, "a rename between directories"
            node = self._node(*old)
            self._rename_nodes("rename", new[0], folder, (os.path.basename(old[1]), None), (name, node))

    def _mkdir(self, real: t.Any, path: t.Any, mode: int = 0o777, **folders: int) -> None:
        self._alive()
        place = self._place(path, folders.get("dir_fd"))
        real(path, mode, **folders)
        if place:
            machine, where = place
            folder, name = os.path.split(where)
            self._names[machine, where] = {}
            self._rename_nodes("mkdir", machine, folder, (name, where))

    def _unknown(self, name: str, real: t.Any, *args: t.Any, **keywords: t.Any) -> t.Any:
        self._alive()
        ours = args[0] in self._open_nodes if isinstance(args[0], int) else self._place(args[0])
        assert not ours, f"os.{name} is not recorded"
        return real(*args, **keywords)

    # -- the outside ---------------------------------------------------------------------------------------------------

    def _commit(self, real: t.Any, directory: str, state: _emulated.State) -> None:
        self._alive()
        real(directory, state)
        self._note_kernel()

    def _note_kernel(self) -> None:
        with open(os.path.join(self.kernel, "state"), "rb") as file:
            data = file.read()
        state = json.loads(data)
        first = state["staged"][0] if state["staged"] else state["live_index"]
        self._record(Event("kernel", told=Kernel(state["boot_id"], first, data)))

    def note(self, kind: str, told: t.Any) -> None:
        """The outside was told something: ``acknowledged``, ``fault``, ``run``."""
        self._record(Event(kind, told=told))

    # -- death ---------------------------------------------------------------------------------------------------------

    def dies(self, work: t.Callable[[], object], after: t.Callable[[Event], bool]) -> int:
        """Let the process die in ``work`` after an event; the page cache stays. Return how many events there were."""
        self._dies_after = after
        try:
            work()
        except Killed:
            pass
        else:
            raise AssertionError("it did not die")
        finally:
            self._dies_after = lambda event: False
        gc.collect()  # what was open would be written to when it is let go of
        self._let_go()
        self.dead = False
        return len(self.events)

    def dying(self, work: t.Callable[[], object], after: t.Callable[[Event], bool]) -> None:
        """Enter, and let the process die in ``work``."""
        with self:
            self.dies(work, after)

    def _let_go(self) -> None:
        for descriptor in list(self._open_nodes):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._open_nodes.clear()

    # -- afterwards ----------------------------------------------------------------------------------------------------

    def at(self, prefix: int) -> dict[str, Disk]:
        """Each machine's disk after the first ``prefix`` events."""
        disks = {machine: disk.copy() for machine, disk in self.first.items()}
        for event in self.events[:prefix]:
            if event.machine:
                disks[event.machine].apply(event)
        return disks

    def cuts(self, machine: str, start: int = 0, damages: t.Sequence[str] = DAMAGES) -> list[Cut]:
        """Every distinct state that a power cut of ``machine`` behind event ``start`` may leave, the worst first.

        One that is possible at several instants counts at the last: then most was promised. Later ones go first.
        """
        disk = self.at(start)[machine]
        found: dict[frozenset[t.Any], Cut] = {}
        chance = random.Random(len(self.events))
        for prefix in range(start, len(self.events) + 1):
            event = self.events[prefix - 1] if prefix > start else None
            if event and event.machine == machine:
                disk.apply(event)
            elif event and event.machine:
                continue
            for rank, tree in disk.states(chance, damages):
                key = frozenset(tree.items())
                rank = min(rank, found[key].rank) if key in found else rank
                found[key] = Cut(rank, prefix, tree)
        return sorted(found.values(), key=lambda cut: (cut.rank, -cut.prefix))


class Cut(t.NamedTuple):
    """What a disk holds after a power cut behind the first ``prefix`` events; a low ``rank`` is tried first."""

    rank: int
    prefix: int
    tree: Tree


class Disk:
    """A machine's disk: names that are safe, changes of names that are not yet, files as they are safe and as seen."""

    def __init__(self) -> None:
        self.names: dict[str, dict[str, Node]] = {}
        self.pending: list[tuple[str, tuple[tuple[str, Node | None], ...]]] = []
        self.files: dict[int, tuple[bytes, bytes]] = {}

    def copy(self) -> Disk:
        new = Disk()
        new.names = {folder: dict(names) for folder, names in self.names.items()}
        new.pending, new.files = list(self.pending), dict(self.files)
        return new

    def apply(self, event: Event) -> None:
        """Play one event."""
        if event.changes:
            self.pending.append((event.path, event.changes))
            for _name, node in event.changes:
                if isinstance(node, int):
                    self.files.setdefault(node, (b"", b""))
        elif event.kind == "sync directory":
            _change(self.names, [each for each in self.pending if each[0] == event.path])
            self.pending = [each for each in self.pending if each[0] != event.path]
        elif isinstance(event.node, int):
            safe, seen = self.files[event.node]
            if event.kind == "write":
                seen = seen[: event.offset] + event.data + seen[event.offset + len(event.data) :]
            elif event.kind == "truncate":
                seen = seen[: event.offset]
            self.files[event.node] = (seen, seen) if event.kind == "sync" else (safe, seen)

    def seen(self) -> Tree:
        """What the processes of the machine see."""
        return self._tree(self._layout([True] * len(self.pending)), {})

    def states(self, chance: random.Random, damages: t.Sequence[str] = DAMAGES) -> t.Iterator[tuple[int, Tree]]:
        """What a power cut may leave now, each with its rank."""
        for rank, kept in _selections(len(self.pending), chance):
            layout = self._layout(kept)
            loose = sorted(
                {node for node in layout.values() if isinstance(node, int) and len(set(self.files[node])) > 1}
            )
            for worse, damage in _damages(loose, chance, damages):
                yield rank + worse, self._tree(layout, damage)

    def _layout(self, kept: t.Sequence[bool]) -> dict[str, Node]:
        names = {folder: dict(held) for folder, held in self.names.items()}
        _change(names, [each for each, keep in zip(self.pending, kept) if keep])
        layout: dict[str, Node] = {}
        folders = [""]
        while folders:
            folder = folders.pop()
            for name, node in names.get(folder, {}).items():
                layout[os.path.join(folder, name)] = node
                if isinstance(node, str):
                    folders.append(node)
        return layout

    def _tree(self, layout: t.Mapping[str, Node], damage: t.Mapping[int, str]) -> Tree:
        return {
            path: _damaged(*self.files[node], damage.get(node, WHOLE)) if isinstance(node, int) else None
            for path, node in layout.items()
        }


def _change(names: dict[str, dict[str, Node]], pending: t.Iterable[tuple[str, t.Any]]) -> None:
    for folder, changes in pending:
        for name, node in changes:
            names.setdefault(folder, {}).pop(name, None)
            if node is not None:
                names[folder][name] = node
            if isinstance(node, str):
                names.setdefault(node, {})


def _selections(count: int, chance: random.Random) -> t.Iterator[tuple[int, tuple[bool, ...]]]:
    """Which changes of names survive: every combination of a few, else none, all, one, all but one, the first n."""
    yield 0, (False,) * count
    if count:
        yield 0, (True,) * count
    if count <= FEW:
        yield from ((1, kept) for kept in itertools.product((False, True), repeat=count))
        return
    numbers = range(count)
    for one in numbers:
        yield 1, tuple(number == one for number in numbers)
        yield 1, tuple(number != one for number in numbers)
        yield 1, tuple(number <= one for number in numbers)
    for _number in range(FEW):
        yield 2, tuple(chance.random() < 0.5 for _each in numbers)


def _damages(
    loose: t.Sequence[int], chance: random.Random, damages: t.Sequence[str]
) -> t.Iterator[tuple[int, dict[int, str]]]:
    """What became of the files whose bytes are not safe: all alike, then mixtures."""
    for how in damages if loose else (WHOLE,):
        yield int(how == HALF), dict.fromkeys(loose, how)
    if 1 < len(loose) <= 2:
        yield from ((2, dict(zip(loose, each))) for each in itertools.product(damages, repeat=len(loose)))
    elif loose[2:]:
        yield from ((2, {node: chance.choice(damages) for node in loose}) for _number in range(FEW))


def _damaged(safe: bytes, seen: bytes, how: str) -> bytes:
    if how == WHOLE or safe == seen:
        return seen
    if how == LOST:
        return safe
    begin = safe if seen.startswith(safe) else b""
    rest = seen[len(begin) :]
    half = len(rest) // 2
    return begin + {ZEROS: bytes(len(rest)), HALF: rest[:half], HOLE: bytes(half) + rest[half:]}[how]


def read_tree(root: str) -> Tree:
    """What is below ``root``."""
    tree: Tree = {}
    for folder, folders, files in os.walk(root):
        for name in folders:
            tree[os.path.relpath(os.path.join(folder, name), root)] = None
        for name in files:
            with open(os.path.join(folder, name), "rb") as file:
                tree[os.path.relpath(os.path.join(folder, name), root)] = file.read()
    return tree


def lay_out(tree: Tree, root: str) -> None:
    """Make ``root`` hold ``tree`` and nothing else."""
    shutil.rmtree(root, ignore_errors=True)
    os.mkdir(root, 0o700)
    for path in sorted(tree):
        data = tree[path]
        if data is None:
            os.mkdir(os.path.join(root, path), 0o700)
        else:
            with open(os.path.join(root, path), "wb") as file:
                file.write(data)
