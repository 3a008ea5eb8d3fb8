# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""Every durable write of the collection, and nothing else.

The order is always: parent directory opened first, temporary name in the same directory (``O_EXCL``), write all,
``fsync``, close, publish, ``fsync`` of the directory. Sealed things are published with ``link``, which never
overwrites; the few mutable files with ``rename``. An ``fsync`` that failed is never tried again on the same file:
the kernel may have dropped the pages and would answer yes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import stat
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import WriteError

CHUNK = 1 << 16
TEMPORARY = ".tmp"

_REASONS = {
    errno.ENOSPC: "no_space",
    errno.EDQUOT: "no_space",
    errno.EROFS: "read_only",
    errno.EMFILE: "too_many_files",
    errno.ENFILE: "too_many_files",
    errno.EACCES: "not_permitted",
    errno.EPERM: "not_permitted",
    errno.ELOOP: "symlink",
}
_HINTS = {
    "no_space": "free space on that file system and run again",
    "read_only": "the file system is read-only: look at the kernel's log, then run again",
    "not_permitted": "run with the rights of the spool's owner",
    "symlink": "replace the symbolic link by a real file or directory",
}


@contextlib.contextmanager
def failing(path: str, what: str) -> t.Iterator[None]:
    """Turn an ``OSError`` of one step into a :class:`WriteError` that names the step, the file and the errno."""
    try:
        yield
    except OSError as error:
        reason = _REASONS.get(error.errno or 0, "write_failed")
        name = errno.errorcode.get(error.errno or 0, "?")
        raise WriteError(
            f"Cannot {what} {path}: {error.strerror} ({name})",
            reason=reason,
            kept="everything that was sealed before",
            hint=_HINTS.get(reason, "look at the kernel's log for that disk, then run again"),
            path=path,
            errno=name,
        ) from error


def open_directory(path: str) -> int:
    """Return a descriptor of the directory ``path``, to be kept open over what is published in it."""
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def sync_directory(path: str) -> None:
    """Make the names in ``path`` durable."""
    with failing(path, "make the names durable in"):
        descriptor = open_directory(path)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_directory(path: str, mode: int = 0o700) -> None:
    """Create ``path`` and what is missing above it, each name durable in its parent before the next is made.

    A directory that exists may have been made by a run that died before its ``fsync``: its name is made durable too.
    """
    parent = os.path.dirname(path)
    if parent and not os.path.isdir(parent):
        make_directory(parent, mode)
    with failing(path, "create the directory"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, mode)
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        sync_directory(parent or ".")


class NewFile:
    """A file under a temporary name: ``write`` it, then ``publish`` (never overwrites) or ``replace``.

    As a context manager it discards what was not published. strace of ``publish``: openat(dir) openat(O_EXCL)
    write... fsync fstat close link unlink fsync(dir) close(dir).
    """

    def __init__(self, path: str, mode: int = 0o600) -> None:
        self.path = path
        self.size = 0
        self._sealed = False
        directory, name = os.path.split(path)
        self._name = name
        self._temporary = f".{name}.{secrets.token_hex(4)}{TEMPORARY}"
        self._file = self._directory = -1
        with failing(path, "create a new file for"):
            self._directory = open_directory(directory)
            # Not for reading: a policy that measures root's reads would record each new file, empty as it is.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            self._file = os.open(self._temporary, flags, mode, dir_fd=self._directory)

    def write(self, data: bytes) -> int:
        """Write all of ``data``, however short the kernel's writes are."""
        with failing(self.path, "write to"):
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._file, rest) :]
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        """For ``gzip``, which flushes its file: durability comes with ``seal``."""

    def seal(self) -> None:
        """Make the content durable under the temporary name, and close it."""
        if self._sealed:
            return
        with failing(self.path, "make durable"):
            if self._file < 0:
                raise OSError(errno.EBADF, "it was closed, or made durable in vain, before")
            try:
                os.fsync(self._file)
                if os.fstat(self._file).st_size != self.size:
                    raise OSError(errno.EIO, "the file is not as long as what was written")
            finally:
                descriptor, self._file = self._file, -1
                if descriptor >= 0:
                    os.close(descriptor)
        self._sealed = True

    def rest(self) -> None:
        """Let go of the directory until publishing: many files may wait for that at once."""
        directory, self._directory = self._directory, -1
        if directory >= 0:
            with failing(self.path, "close the directory of"):
                os.close(directory)

    @property
    def temporary(self) -> str:
        """The path of a sealed file that has no name yet."""
        return os.path.join(os.path.dirname(self.path), self._temporary)

    def publish_as(self, name: str) -> bool:
        """Publish under another name of the same directory, one that was not known when the file was begun."""
        self.path, self._name = os.path.join(os.path.dirname(self.path), name), name
        return self.publish()

    def publish(self) -> bool:
        """Give the sealed file its name. False: the name was there already, with these very bytes."""
        self.seal()
        new = True
        with failing(self.path, "publish"):
            if self._directory < 0:
                self._directory = open_directory(os.path.dirname(self.path))
            try:
                os.link(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            except FileExistsError:
                new = False
                self._compare()
            os.unlink(self._temporary, dir_fd=self._directory)
            self._temporary = ""
            os.fsync(self._directory)
        self.discard()
        return new

    def _compare(self) -> None:
        ours = digest_of(os.path.join(os.path.dirname(self.path), self._temporary))
        theirs = digest_of(self.path)
        if ours != theirs:
            raise WriteError(
                f"{self.path} exists already with other bytes (SHA-256 {theirs}, ours would be {ours})",
                reason="exists_different",
                kept="the file that was there",
                path=self.path,
                found=theirs,
                expected=ours,
                hint="two histories claim one name: keep both machines' spools and find out who wrote it",
            )

    def replace(self) -> None:
        """Give the sealed file its name in place of what had it."""
        self.seal()
        with failing(self.path, "replace"):
            os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._temporary = ""
            os.fsync(self._directory)
        self.discard()

    def discard(self) -> None:
        """Forget it; the temporary name goes, if this process still can."""
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = -1
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(os.path.dirname(self.path), self._temporary))
            self._temporary = ""
        if self._directory >= 0:
            with contextlib.suppress(OSError):
                os.close(self._directory)
            self._directory = -1

    def __enter__(self) -> NewFile:
        return self

    def __exit__(self, *_unused: t.Any) -> None:
        self.discard()


def names(directory: str) -> list[str]:
    """Return the names in a directory; none when it is not there."""
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def digest_of(path: str, algorithm: str = "sha256") -> str:
    """Return the digest of a file in lower-case hex."""
    digest = hashlib.new(algorithm)
    with failing(path, "read"), open(path, "rb") as file:
        for chunk in iter(lambda: file.read(CHUNK), b""):
            digest.update(chunk)
    return digest.hexdigest()


def create(path: str, data: bytes, mode: int = 0o600) -> bool:
    """Create ``path`` with ``data``. False: it was there with these bytes. Other bytes: ``exists_different``."""
    with NewFile(path, mode) as file:
        file.write(data)
        return file.publish()


def replace(path: str, data: bytes, mode: int = 0o600) -> None:
    """Put ``data`` in place of what ``path`` held: the old bytes or the new ones, never a mixture."""
    with NewFile(path, mode) as file:
        file.write(data)
        file.replace()


def append_part(path: str, offset: int, data: bytes) -> None:
    """Add a chunk at ``offset`` to a private, not yet published file; what lies beyond ``offset`` is dropped.

    Nothing is promised of it: :func:`publish_part` reads it again.
    """
    with failing(path, "write a chunk to"):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(descriptor).st_size < offset:
                raise OSError(errno.EINVAL, "the chunk does not follow the last one")
            os.ftruncate(descriptor, offset)
            os.lseek(descriptor, offset, os.SEEK_SET)
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        finally:
            os.close(descriptor)


def publish_part(part: str, path: str, check: t.Callable[[t.BinaryIO], None]) -> bool:
    """Copy a complete part into a new durable file, let ``check`` read the copy, and publish it; the part stays."""
    with NewFile(path) as file:
        with failing(part, "read"), open(part, "rb") as source:
            for chunk in iter(lambda: source.read(CHUNK), b""):
                file.write(chunk)
        with open(os.path.join(os.path.dirname(path), file._temporary), "rb") as copy:
            check(copy)
        return file.publish()


def remove(path: str) -> bool:
    """Remove a file and make its absence durable. False: it was not there."""
    with failing(path, "remove"):
        try:
            os.unlink(path)
        except FileNotFoundError:
            return False
        sync_directory(os.path.dirname(path))
        return True


def remove_tree(path: str) -> None:
    """Remove a directory and all that is in it, and make its absence durable."""
    with failing(path, "remove"):
        shutil.rmtree(path)
        sync_directory(os.path.dirname(path))


def set_aside(path: str) -> str:
    """Rename a file that is not what it should be to ``<path>.broken[-n]``, as evidence; return the new name."""
    with failing(path, "set aside"):
        for number in range(1000):
            name = f"{path}.broken" + (f"-{number}" if number else "")
            try:
                os.link(path, name)
            except FileExistsError:
                continue
            os.unlink(path)
            sync_directory(os.path.dirname(path))
            return name
        raise FileExistsError(errno.EEXIST, "a thousand broken files with this name")


def sweep(directory: str) -> int:
    """Remove the temporary names that dead runs left in ``directory``; the caller holds the lock. Return how many."""
    count = 0
    with failing(directory, "clean"):
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if name.startswith(".") and name.endswith(TEMPORARY) and not os.path.isdir(path):
                os.unlink(path)
                count += 1
    return count
