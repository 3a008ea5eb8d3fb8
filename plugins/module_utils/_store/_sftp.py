# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The store in a directory of an SFTP server, with paramiko.

The server is known by its host key or refused. A file gets its name by a rename that never overwrites (OpenSSH's
server links and unlinks), after ``fsync@openssh.com`` where that is offered, and after it was read back. What SFTP
cannot ask for without that extension is durability: that is up to the server's file system then.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
import secrets
import socket
import stat
import time
import typing as t
import urllib.parse

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError, printable
from ansible_collections.integrity.ima.plugins.module_utils._store._objects import (
    NO_FILE,
    Check,
    Objects,
    Source,
    exists_different,
    hashed,
    library_missing,
    query_of,
    require_store,
)

TIMEOUT = 60  # seconds without an answer
_FSYNC = "fsync@openssh.com"
_STATVFS = "statvfs@openssh.com"
_PIECE = 32768  # bytes of one request that writes
_READ = 1 << 17  # bytes of one that reads: OpenSSH answers with up to 255 KiB, others with less
_ABANDONED = 86400  # seconds after which a temporary file belongs to nobody who lives


class SftpObjects(Objects):
    """Objects as files of an SFTP server: ``sftp://user@host:port/path?known_hosts=FILE&key=FILE``."""

    def __init__(self, address: str) -> None:
        self._address(address)
        with self._asking("open"), self._refusing("", 0):
            require_store(self, self.name, self._is_empty)

    def _address(self, address: str) -> None:
        """Take an address apart; nothing is asked of the server."""
        parts = urllib.parse.urlsplit(address)
        self._options = query_of(parts, ("known_hosts", "key"))
        self._root = urllib.parse.unquote(parts.path).rstrip("/")
        self._host, self._port, self._user = parts.hostname, parts.port or 22, parts.username
        if not self._host or parts.password is not None:
            raise StoreError(
                "An SFTP store is named sftp://user@host:port/path, without a password",
                reason="store_address",
                hint="log in with a key or an agent",
            )
        self.name = f"sftp://{parts.netloc}{parts.path}"
        self.syncs: bool | None = None  # whether the server makes a file durable when asked; None: not asked yet
        self._client: t.Any = None
        self._sftp: t.Any = None

    @classmethod
    def make_root(cls, address: str, check: bool) -> bool:
        """Create the store's directory if it is not there; say whether that was, or would be, needed."""
        objects = cls.__new__(cls)
        objects._address(address)
        try:
            with objects._asking("create the directory"):
                missing = objects._size_of(objects._root or "/") is None
                if missing and not check:
                    objects._connection().mkdir(objects._root, 0o700)
                return missing
        finally:
            objects.close()

    def remove_probe(self, name: str) -> None:
        """Remove what was created to see whether the server overwrites; nothing else is ever removed by its name."""
        with self._asking("remove a probe"):
            self._connection().remove(self._path(name))

    def _is_empty(self) -> bool:
        try:
            names = self._connection().listdir(self._root or "/")
        except FileNotFoundError:
            raise StoreError(
                f"{self.name} does not exist",
                reason="store_missing",
                hint="look at its spelling; create the directory only if the store is new",
            ) from None
        return all(name.startswith(".") for name in names)

    # -- the connection ---------------------------------------------------------------------------------------------

    def _connection(self) -> t.Any:
        if self._sftp is None:
            try:
                import paramiko
            except ImportError as error:
                raise library_missing("paramiko", "SFTP") from error
            client = paramiko.SSHClient()
            known = self._options.get("known_hosts")
            if known:
                client.load_host_keys(known)
            else:
                client.load_system_host_keys()
            client.set_missing_host_key_policy(paramiko.RejectPolicy())
            key = self._options.get("key")
            client.connect(
                self._host,
                port=self._port,
                username=self._user,
                key_filename=key,
                look_for_keys=key is None,
                allow_agent=key is None,
                timeout=TIMEOUT,
                banner_timeout=TIMEOUT,
                auth_timeout=TIMEOUT,
            )
            # Each write waits for its answer: what is sent without waiting can fail and nobody hears of it.
            client.get_transport().sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._client, self._sftp = client, client.open_sftp()
            self._sftp.get_channel().settimeout(TIMEOUT)
        return self._sftp

    def close(self) -> None:
        """Let go of the connection; the next use makes a new one."""
        client, self._client, self._sftp = self._client, None, None
        if client is not None:
            client.close()

    @contextlib.contextmanager
    def _asking(self, what: str) -> t.Iterator[None]:
        """Turn a lost or refused connection into a :class:`StoreError`; what the server says of a file is OSError."""
        try:
            yield
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            module = type(error).__module__
            if not isinstance(error, (EOFError, OSError, UnicodeError)) and not module.startswith("paramiko"):
                raise
            if _without_reason(error):
                raise
            self.close()
            raise self._lost(what, error) from error

    @contextlib.contextmanager
    def _refusing(self, directory: str, size: int) -> t.Iterator[None]:
        """Name the server's refusal of ``size`` bytes: it says "Failure" of a full disk as of all else."""
        try:
            yield
        except OSError as error:
            if isinstance(error, PermissionError):
                reason, hint = "store_denied", "look at the directory's owner and mode on the server"
            elif not _without_reason(error):
                raise
            elif self._room(directory) < size:
                reason, hint = "store_full", "make room in the store and rotate again"
            else:
                reason, hint = (
                    "write_failed",
                    "look at the server's log: quota, limits, a file system that went read-only",
                )
            raise StoreError(
                f"{self.name} refuses to write or read: {printable(str(error))[:300]}",
                reason=reason,
                kept="the shard on the host, and what was delivered before",
                hint=hint,
            ) from error

    def _room(self, directory: str) -> int:
        """Return the bytes that are free for this account (``statvfs@openssh.com``); very many where nobody says so."""
        from paramiko.sftp import CMD_EXTENDED

        try:
            _kind, answer = self._connection()._request(CMD_EXTENDED, _STATVFS, directory)
            _size, fragment, _blocks, _free, available = [answer.get_int64() for _number in range(5)]
            return int(fragment * available)
        except Exception:
            return 1 << 62

    def _lost(self, what: str, error: Exception) -> StoreError:
        kind = type(error).__name__
        reason, hint = "store_unavailable", "look at the server and the network, and rotate again"
        if kind == "BadHostKeyException" or "not found in known_hosts" in str(error):
            reason, hint = "store_untrusted", "compare the server's host key, then put it into known_hosts"
        elif kind in ("AuthenticationException", "PasswordRequiredException", "BadAuthenticationType"):
            reason, hint = "store_denied", "look at the key and the account on the server"
        return StoreError(
            f"Cannot {what} in {self.name}: {printable(str(error))[:300] or kind} ({kind})",
            reason=reason,
            kept="the shard on the host, and what was delivered before",
            hint=hint,
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    # -- reading ----------------------------------------------------------------------------------------------------

    def _list(self, path: str) -> list[t.Any]:
        try:
            return list(self._connection().listdir_attr(path))
        except FileNotFoundError:
            return []

    def folders(self, prefix: str) -> list[str]:
        """See :class:`Objects`."""
        with self._asking("list hosts"):
            found = self._list(self._path(prefix).rstrip("/"))
            return [each.filename for each in found if stat.S_ISDIR(each.st_mode or 0) and each.filename[0] != "."]

    def sizes(self, prefix: str) -> dict[str, int]:
        """See :class:`Objects`."""
        sizes: dict[str, int] = {}
        with self._asking("list files"):
            directory = self._path(prefix).rstrip("/")
            for each in self._list(directory):
                if each.filename.startswith("."):
                    continue
                if not stat.S_ISDIR(each.st_mode or 0):
                    sizes[each.filename] = _size(each)
                    continue
                sizes[f"{each.filename}/"] = NO_FILE
                for inner in self._list(f"{directory}/{each.filename}"):
                    if not inner.filename.endswith(_durable.TEMPORARY):
                        sizes[f"{each.filename}/{inner.filename}"] = _size(inner)
        return sizes

    def read(self, name: str, limit: int) -> bytes:
        """See :class:`Objects`."""
        with self.open(name) as file:
            return file.read(limit)

    def open(self, name: str) -> t.BinaryIO:
        """See :class:`Objects`."""
        with self._asking("open a file"):
            size = self._size_of(self._path(name))
            if size is None or size == NO_FILE:
                code = errno.ENOENT if size is None else errno.EINVAL
                raise FileNotFoundError(code, os.strerror(code)) if size is None else OSError(code, "it is no file")
            file = self._connection().open(self._path(name), "rb")
        read = _Bounded(file, size).read
        return t.cast(
            t.BinaryIO, io.BufferedReader(Source(read, file.close, lambda: self._asking("read a file")), _READ)
        )

    def confirms(self, name: str, size: int, sha256: str) -> bool:
        """See :class:`Objects`: by reading it."""
        try:
            with self.open(name) as file:
                return hashed(file) == (size, sha256)
        except FileNotFoundError:
            return False

    # -- writing ----------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bool:
        """See :class:`Objects`."""
        return self._publish(name, io.BytesIO(data), len(data), hashlib.sha256(data).hexdigest())

    def create_from(self, name: str, part: str, check: Check, size: int, sha256: str) -> bool:
        """See :class:`Objects`."""
        with open(part, "rb") as file:
            check(file)
            file.seek(0)
            return self._publish(name, file, size, sha256)

    def _publish(self, name: str, source: t.BinaryIO, size: int, sha256: str) -> bool:
        """Write under a temporary name, read back, then give it its name, which no other file may have."""
        path = self._path(name)
        directory, base = os.path.split(path)
        with self._asking("write a file"), self._refusing(directory, size):
            sftp = self._connection()
            if self._size_of(path) is not None:
                return self._same(name, size, sha256)
            self._make_directory(directory)
            temporary = f"{directory}/.{base}.{secrets.token_hex(4)}{_durable.TEMPORARY}"
            try:
                self._write(temporary, source)
                if not self.confirms(temporary[len(self._root) + 1 :], size, sha256):
                    raise StoreError(f"{self.name} does not hold what was written to it", reason="checksum_refused")
                try:
                    sftp.rename(temporary, path)
                except OSError:
                    # "Failure" may be said of a rename that was done: what has the name now decides.
                    if self._size_of(path) is None:
                        raise
                    return self._same(name, size, sha256)
                self._sync_directory(directory)
                return True
            finally:
                with contextlib.suppress(Exception):
                    sftp.remove(temporary)

    def _write(self, path: str, source: t.BinaryIO) -> None:
        sftp = self._connection()
        with sftp.open(path, "wx") as file:
            with contextlib.suppress(OSError):  # a server may forbid it, and has a umask for that
                file.chmod(0o600)
            for chunk in iter(lambda: source.read(_PIECE), b""):
                file.write(chunk)
            file.flush()
            self._fsync(file)

    def _sync_directory(self, path: str) -> None:
        with self._connection().open(path, "r") as names:
            self._fsync(names)

    def _fsync(self, file: t.Any) -> None:
        """Ask for durability as OpenSSH's file PROTOCOL has it (``fsync@openssh.com``); others may not know it."""
        from paramiko.sftp import CMD_EXTENDED

        try:
            self._connection()._request(CMD_EXTENDED, _FSYNC, file.handle)
            self.syncs = True
        except OSError as error:
            if "unsupported" not in str(error).lower():
                raise
            self.syncs = False

    def _same(self, name: str, size: int, sha256: str) -> bool:
        if not self.confirms(name, size, sha256):
            raise exists_different(f"{self.name}/{name}", sha256)
        return False

    def _size_of(self, path: str) -> int | None:
        try:
            return _size(self._connection().lstat(path))
        except FileNotFoundError:
            return None

    def _make_directory(self, path: str) -> None:
        if len(path) <= len(self._root) or self._size_of(path) is not None:
            return
        self._make_directory(os.path.dirname(path))
        try:
            self._connection().mkdir(path, 0o700)
        except OSError:
            if self._size_of(path) is None:  # another controller may have made it
                raise
        self._sync_directory(os.path.dirname(path))

    def settle(self, prefix: str) -> None:
        """See :class:`Objects`. Another controller may be at work: only temporary files of a day ago are removed."""
        directory = self._path(prefix).rstrip("/")
        with self._asking("settle what an earlier rotation left"):
            if self._size_of(directory) is None:
                return
            # A rotation that died may have published names without making them durable.
            self._sync_directory(directory)
            for boot in self._list(directory):
                if stat.S_ISDIR(boot.st_mode or 0):
                    self._settle_boot(f"{directory}/{boot.filename}")

    def _settle_boot(self, directory: str) -> None:
        for each in self._list(directory):
            old = (each.st_mtime or 0) < time.time() - _ABANDONED
            if old and each.filename.startswith(".") and each.filename.endswith(_durable.TEMPORARY):
                with contextlib.suppress(OSError):  # a server may forbid it
                    self._connection().remove(f"{directory}/{each.filename}")
        self._sync_directory(directory)


class _Bounded:
    """The first ``size`` bytes of a file, piece by piece: what paramiko reads ahead stays in memory."""

    def __init__(self, file: t.Any, size: int) -> None:
        file.MAX_REQUEST_SIZE = _READ
        self._file, self._left = file, size

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes; none at the end of the file."""
        data: bytes = self._file.read(min(size, _READ, self._left))
        self._left -= len(data)
        return data


def _without_reason(error: Exception) -> bool:
    """Say whether it is the server's word "Failure", and not a lost connection: paramiko gives it no errno."""
    return error.__class__ is OSError and error.errno is None and "closed" not in str(error)


def _size(attributes: t.Any) -> int:
    return int(attributes.st_size) if stat.S_ISREG(attributes.st_mode or 0) else NO_FILE
