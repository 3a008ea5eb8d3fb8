# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The stitched lists on the host: what the kernel would show up to the cut if nothing had ever been trimmed.

They are for programs that open a list once and keep it open: bytes are only ever added, to the same file, until the
list begins anew. They are a copy for convenience: nothing rests on them, and a failure to write them is a note.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import ConfigError, ImaError, SpoolError
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import Record, read, to_ascii
from ansible_collections.integrity.ima.plugins.module_utils._schema import STITCHED, canonical, parse
from ansible_collections.integrity.ima.plugins.module_utils._shard import Entry, Manifest, layout_of
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool

BINARY, ASCII = "binary_runtime_measurements", "ascii_runtime_measurements"
_STATE = "stitched.json"
_TAIL = 4096  # bytes before a place that are looked at to know it again
_PIECE = 1 << 16
_MODE = 0o640
State = t.Dict[str, t.Any]


def follow(directory: str, spool: Spool) -> list[str]:
    """Bring both lists up to the cut; the caller holds the lock. Return what went wrong, and what had to be mended.

    Idempotent, and safe to kill at any call: the next run finds by content what is missing.
    """
    if not spool.epoch:
        return []
    notes: list[str] = []
    try:
        with contextlib.ExitStack() as stack:
            folder = _open_directory(directory)
            stack.callback(os.close, folder)
            binary, text = [stack.enter_context(_List(folder, name)) for name in (BINARY, ASCII)]
            for file in (binary, text):
                try:
                    notes += _bring(spool, file, binary)
                except (ImaError, OSError) as error:
                    notes.append(f"the stitched {file.name} was not brought up to the cut: {error}")
    except (ImaError, OSError) as error:
        notes.append(f"the stitched lists were not brought up to the cut: {error}")
    return notes


def _open_directory(path: str) -> int:
    """Raises :class:`ConfigError` ``stitched_unsafe`` for one in which others could put files of theirs."""
    with _durable.failing(path, "open the directory of the stitched lists"):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(descriptor)
    if status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022:
        return descriptor
    os.close(descriptor)
    raise ConfigError(
        f"Others could write to {path} (owner {status.st_uid}, mode {status.st_mode:o})",
        reason="stitched_unsafe",
        path=path,
        hint="make it a directory of root's that group and others cannot write to",
    )


class _List:
    """One of the two files, open, and the place in it up to which it is known to be right."""

    def __init__(self, folder: int, name: str) -> None:
        self.name = name
        self.offset = 0
        self._folder = folder
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with _durable.failing(name, "open the stitched list"):
            self.descriptor = os.open(name, flags, _MODE, dir_fd=folder)
        try:
            self._own()
        except BaseException:
            os.close(self.descriptor)
            raise

    def _own(self) -> None:
        """Raises :class:`ConfigError` ``stitched_unsafe`` for what is no file of ours."""
        status = os.fstat(self.descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid not in (0, os.geteuid()):
            raise ConfigError(f"{self.name} is not a file of ours", reason="stitched_unsafe", path=self.name)
        group = os.fstat(self._folder).st_gid
        with _durable.failing(self.name, "let the group read"):
            if status.st_gid != group:
                os.fchown(self.descriptor, -1, group)
            if stat.S_IMODE(status.st_mode) != _MODE:
                os.fchmod(self.descriptor, _MODE)

    def __enter__(self) -> _List:
        return self

    def __exit__(self, *_unused: t.Any) -> None:
        os.close(self.descriptor)

    @property
    def inode(self) -> str:
        """What tells this file from another one of that name."""
        status = os.fstat(self.descriptor)
        return f"{status.st_dev}:{status.st_ino}"

    @property
    def size(self) -> int:
        """The file's size."""
        return os.fstat(self.descriptor).st_size

    def tail(self, offset: int) -> str:
        """Return the digest of the bytes right before ``offset``."""
        start = max(0, offset - _TAIL)
        return hashlib.sha256(self._read(start, offset - start)).hexdigest()

    def _read(self, offset: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = os.pread(self.descriptor, size - len(data), offset + len(data))
            if not piece:
                break
            data += piece
        return data

    def cut_off(self, offset: int) -> None:
        """Remove what is behind ``offset``."""
        with _durable.failing(self.name, "shorten"):
            os.ftruncate(self.descriptor, offset)

    def put(self, data: bytes) -> bool:
        """Have ``data`` stand at the place, and go behind it. False: something else stood there.

        No byte that is right goes away. What stands there already is written all the same: after an ``fsync`` that
        failed it may be in memory only, and the next one would say yes.
        """
        there = self._read(self.offset, len(data))
        right = data.startswith(there)
        if not right:
            self.cut_off(self.offset + len(os.path.commonprefix([data, there])))
        with _durable.failing(self.name, "append to"):
            rest, at = memoryview(data), self.offset
            while rest:
                done = os.pwrite(self.descriptor, rest, at)
                rest, at = rest[done:], at + done
        self.offset += len(data)
        return right

    def sync(self) -> None:
        """Make content and name durable."""
        with _durable.failing(self.name, "make durable"):
            os.fsync(self.descriptor)
            os.fsync(self._folder)


class _Kept:
    """The bytes of a pruned shard, out of the stitched binary list. Nothing of them is used before all were checked."""

    def __init__(self, descriptor: int, offset: int, manifest: Manifest) -> None:
        self._descriptor, self._offset, self._manifest = descriptor, offset, manifest
        self._left, self._digest = manifest["size"], hashlib.sha256()

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes."""
        data = os.pread(self._descriptor, min(size, self._left), self._offset)
        self._digest.update(data)
        self._offset, self._left = self._offset + len(data), self._left - len(data)
        return data

    def check(self) -> None:
        """Read all. Raises :class:`SpoolError` ``pruned`` unless it is what the shard held."""
        while self.read(_PIECE):
            pass
        if self._left or self._digest.hexdigest() != self._manifest["sha256"]:
            raise SpoolError(
                f"Shard {self._manifest['sequence']} was pruned, and the stitched list does not hold its records",
                reason="pruned",
                index=self._manifest["first"],
                sequence=self._manifest["sequence"],
                boot_id=self._manifest["boot_id"],
                kept="the stitched list as it is",
                hint="put the shard back from the store that pruned.json names, or wait for the next boot",
            )


def _bring(spool: Spool, file: _List, binary: _List) -> list[str]:
    """Append to ``file`` what is missing, make it durable, and remember how far it is right."""
    epoch = spool.epoch
    first = spool.digest(epoch[0])
    before, right = _remembered(spool).get(file.name), True
    if before and before["epoch"] != first:
        file.cut_off(0)
        before = _remember(spool, file, first, 0)
    known = before if before and _is_right(file, before) else None
    file.offset = known["size"] if known else 0
    done = known["sequence"] if known else 0
    for entry in epoch:
        if entry.sequence > done:
            for piece in _rendered(spool, entry, binary, file.name == ASCII):
                right = file.put(piece) and right
    if file.size > file.offset:
        file.cut_off(file.offset)
        right = False
    if known is None or (known["sequence"], right) != (epoch[-1].sequence, True):
        _remember(spool, file, first, epoch[-1].sequence)
    return [] if right else [f"the stitched {file.name} was not what it should be, and was mended in place"]


def _remembered(spool: Spool) -> dict[str, State]:
    """Return what the last run noted of each file: a hint, never evidence."""
    data = spool.small(_STATE)
    try:
        return t.cast(t.Dict[str, State], parse(data, STITCHED, _STATE, SpoolError)["files"]) if data else {}
    except SpoolError:
        return {}


def _is_right(file: _List, noted: State) -> bool:
    size = noted["size"]
    return bool(file.inode == noted["inode"] and file.size >= size and file.tail(size) == noted["tail"])


def _remember(spool: Spool, file: _List, epoch: str, sequence: int) -> State:
    """Note, once it is durable, that the file holds the epoch's shards up to ``sequence``."""
    file.sync()
    size = file.offset if sequence else 0
    noted = {"epoch": epoch, "inode": file.inode, "sequence": sequence, "size": size, "tail": file.tail(size)}
    files = dict(_remembered(spool), **{file.name: noted})
    _durable.replace(os.path.join(spool.directory, _STATE), canonical({"version": 1, "files": files}))
    return noted


def _rendered(spool: Spool, entry: Entry, binary: _List, text: bool) -> t.Iterator[bytes]:
    """Yield a shard's records in pieces of whole records, so that a reader seldom sees half of one."""
    manifest = spool.manifest(entry)
    pieces: list[bytes] = []
    size = 0
    for record in _records(spool, entry, manifest, binary):
        pieces.append(to_ascii(record, manifest["byte_order"]) if text else record.raw)
        size += len(pieces[-1])
        if size >= _PIECE:
            yield b"".join(pieces)
            pieces, size = [], 0
    yield b"".join(pieces)


def _records(spool: Spool, entry: Entry, manifest: Manifest, binary: _List) -> t.Iterator[Record]:
    layout = layout_of(manifest)
    if spool.has(entry):
        file, reader = spool.reader(entry)
        with file:
            yield from read(reader.read, layout, first_index=entry.first, verify=False)
        return
    offset = sum(spool.manifest(each)["size"] for each in spool.epoch if each.sequence < entry.sequence)
    _Kept(binary.descriptor, offset, manifest).check()
    yield from read(_Kept(binary.descriptor, offset, manifest).read, layout, first_index=entry.first, verify=False)
