# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The store in a directory of the controller, or of a shared mount."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import stat
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError, printable
from ansible_collections.integrity.ima.plugins.module_utils._schema import LIMIT, canonical
from ansible_collections.integrity.ima.plugins.module_utils._shard import (
    BOOT_ID,
    Entry,
    Manifest,
    ShardReader,
    digest,
    entry_of,
    parse_name,
)
from ansible_collections.integrity.ima.plugins.module_utils._store._base import RUN, Store, decode_name, encode_name

FORMAT = b'{"format":"integrity.ima store","version":1}'
_INCOMING = ".incoming"
_EVIDENCE = "evidence"
_QUOTE = re.compile(r"[0-9]{8}-[0-9a-f]{16}\.quote\.json\Z")


class DirectoryStore(Store):
    """The store below ``directory``, an absolute path.

    Raises :class:`StoreError` with reason ``store_missing``, ``store_foreign`` or ``newer_version``. An empty
    directory becomes a store with the first delivery.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.name = f"directory:{directory}"
        self._check()

    def _check(self) -> None:
        if not os.path.isabs(self.directory) or not os.path.isdir(self.directory):
            raise StoreError(
                f"The store {self.directory} is not a directory with an absolute path",
                reason="store_missing",
                path=self.directory,
                hint="create it, with room for every host's shards, and name it by its whole path",
            )
        try:
            found = _small(os.path.join(self.directory, "format.json"), 4096)
        except FileNotFoundError:
            if not [name for name in os.listdir(self.directory) if not name.startswith(".")]:
                return
            found = b""
        if found != FORMAT:
            newer = found.startswith(FORMAT[:30])
            raise StoreError(
                f"{self.directory} is {'a store of a newer version' if newer else 'not a store, and not empty'}",
                reason="newer_version" if newer else "store_foreign",
                path=self.directory,
                hint="update the collection on this machine" if newer else "name an empty directory of its own",
            )

    def _prepare(self) -> None:
        _durable.create(os.path.join(self.directory, "format.json"), FORMAT, 0o644)

    def _host(self, host: str) -> str:
        return os.path.join(self.directory, "hosts", encode_name(host))

    @contextlib.contextmanager
    def delivering(self, host: str) -> t.Iterator[None]:
        """Keep two rotations of one host apart. Raises :class:`StoreError` ``store_busy``."""
        self._prepare()
        directory = self._host(host)
        _durable.make_directory(directory)
        descriptor = os.open(
            os.path.join(directory, ".lock"), os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    raise
                raise StoreError(
                    f"Another rotation is delivering shards of {host} to {self.directory}",
                    reason="store_busy",
                    path=directory,
                    kept="everything",
                    hint="let it end; rotations of one host do not overlap",
                ) from error
            self._tidy(directory)
            for path in [directory, *_boot_directories(directory)]:
                # A rotation that died may have published names without making them durable.
                _durable.sync_directory(path)
            yield
        finally:
            os.close(descriptor)

    @staticmethod
    def _tidy(directory: str) -> None:
        for entry in os.scandir(directory):
            if entry.is_dir(follow_symlinks=False):
                _durable.sweep(entry.path)

    def hosts(self) -> list[str]:
        """See :class:`Store`."""
        hosts = os.path.join(self.directory, "hosts")
        # A rotation makes the directory before the host has answered: it counts when something is in it.
        told = [
            name
            for name in _names(hosts)
            if any(not each.startswith(".") for each in _names(os.path.join(hosts, name)))
        ]
        return sorted(filter(None, map(decode_name, told)))

    def names(self, host: str) -> tuple[set[tuple[Entry, str]], list[str]]:
        """See :class:`Store`."""
        known: set[tuple[Entry, str]] = set()
        other = []
        for boot_id in _names(self._host(host)):
            if boot_id.startswith(".") or boot_id in (_EVIDENCE, "identity.json"):
                continue
            directory = os.path.join(self._host(host), boot_id)
            if os.path.islink(directory) or not os.path.isdir(directory):
                other.append(printable(boot_id))
                continue
            for name in _names(directory):
                parsed = parse_name(boot_id, name)
                if parsed:
                    known.add(parsed)
                elif not name.endswith(_durable.TEMPORARY) and not _QUOTE.match(name):
                    other.append(printable(os.path.join(boot_id, name)))
        return known, sorted(other)

    def manifest_bytes(self, host: str, entry: Entry) -> bytes:
        """See :class:`Store`."""
        try:
            return _small(os.path.join(self._host(host), entry.manifest), LIMIT + 1)
        except OSError as error:
            raise self._missing(host, entry, "missing_manifest", "manifest", error) from error

    def open_shard(self, host: str, entry: Entry) -> t.BinaryIO:
        """See :class:`Store`."""
        try:
            return os.fdopen(
                os.open(os.path.join(self._host(host), entry.shard), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb"
            )
        except OSError as error:
            raise self._missing(host, entry, "missing_shard", "shard", error) from error

    def has_shard(self, host: str, entry: Entry) -> bool:
        """See :class:`Store`."""
        try:
            status = os.lstat(os.path.join(self._host(host), entry.shard))
        except FileNotFoundError:
            return False
        return stat.S_ISREG(status.st_mode) and status.st_size == self.manifest(host, entry)["stored_size"]

    def _missing(self, host: str, entry: Entry, reason: str, what: str, error: OSError) -> StoreError:
        if not isinstance(error, FileNotFoundError):
            reason = "unreadable"
        return StoreError(
            f"The {what} {entry.stem} of {host} (records {entry.first} to {entry.end - 1}) cannot be had "
            f"from {self.name}: {error.strerror}",
            reason=reason,
            index=entry.first,
            sequence=entry.sequence,
            boot_id=entry.boot_id,
            hint="look for it in the host's spool or in a copy of the store",
        )

    def _part(self, host: str, manifest_digest: str) -> str:
        return os.path.join(self._host(host), _INCOMING, f"{manifest_digest}.part")

    def unfinished(self, host: str) -> tuple[str, int] | None:
        """See :class:`Store`."""
        directory = os.path.join(self._host(host), _INCOMING)
        for name in sorted(_names(directory)):
            if re.match(r"[0-9a-f]{64}\.part\Z", name):
                return name[:64], os.lstat(os.path.join(directory, name)).st_size
        return None

    def receive(self, host: str, manifest_digest: str, offset: int, data: bytes) -> None:
        """See :class:`Store`."""
        path = self._part(host, manifest_digest)
        _durable.make_directory(os.path.dirname(path))
        for name in _names(os.path.dirname(path)) if offset == 0 else []:
            if name != os.path.basename(path):  # what an earlier rotation began and this one does not go on with
                os.unlink(os.path.join(os.path.dirname(path), name))
        _durable.append_part(path, offset, data)

    def finish(self, host: str, manifest: Manifest) -> None:
        """See :class:`Store`. What does not fit its manifest is dropped, and has to be sent again."""
        data = canonical(manifest)
        entry = entry_of(manifest)
        part = self._part(host, digest(data))
        _durable.make_directory(os.path.join(self._host(host), entry.boot_id))

        def check(file: t.BinaryIO) -> None:
            reader = ShardReader(file, manifest, f"{entry.stem} of {host}")
            while reader.read(_durable.CHUNK):
                pass

        try:
            _durable.publish_part(part, os.path.join(self._host(host), entry.shard), check)
        except Exception:
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        _durable.create(os.path.join(self._host(host), entry.manifest), data)
        _durable.remove(part)

    def quotes(self, host: str) -> list[bytes]:
        """See :class:`Store`."""
        found = [
            (name, os.path.join(self._host(host), boot_id, name))
            for boot_id in _names(self._host(host))
            if BOOT_ID.match(boot_id)
            for name in _names(os.path.join(self._host(host), boot_id))
            if _QUOTE.match(name)
        ]
        return [_small(path, LIMIT + 1) for _name, path in sorted(found)]

    def put_quote(self, host: str, quote: dict[str, t.Any]) -> None:
        """See :class:`Store`."""
        data = canonical(quote)
        name = f"{quote['sequence']:08d}-{digest(data)[:16]}.quote.json"
        _durable.create(os.path.join(self._host(host), quote["boot_id"], name), data)

    def identity_bytes(self, host: str) -> bytes | None:
        """See :class:`Store`."""
        try:
            return _small(os.path.join(self._host(host), "identity.json"), LIMIT + 1)
        except FileNotFoundError:
            return None

    def put_identity(self, host: str, data: bytes) -> bool:
        """See :class:`Store`."""
        self._prepare()
        _durable.make_directory(self._host(host))
        return _durable.create(os.path.join(self._host(host), "identity.json"), data)

    def keep_evidence(self, host: str, data: bytes) -> str:
        """See :class:`Store`."""
        directory = os.path.join(self._host(host), _EVIDENCE)
        _durable.make_directory(directory)
        name = f"{digest(data)}.json"
        _durable.create(os.path.join(directory, name), data)
        return f"{_EVIDENCE}/{name}"

    def evidence(self, host: str) -> list[str]:
        """See :class:`Store`."""
        names = _names(os.path.join(self._host(host), _EVIDENCE))
        return sorted(printable(name) for name in names if not name.startswith("."))

    def runs(self) -> list[str]:
        """See :class:`Store`."""
        names = _names(os.path.join(self.directory, "fleet"))
        return sorted(name[:-5] for name in names if name.endswith(".json") and RUN.match(name[:-5]))

    def run_bytes(self, run: str) -> bytes:
        """See :class:`Store`."""
        try:
            return _small(os.path.join(self.directory, "fleet", f"{run}.json"), 1 << 30)
        except OSError as error:
            raise StoreError(
                f"The fleet document {run} in {self.name} cannot be read: {error.strerror}", reason="fleet_document"
            ) from error

    def put_run(self, run: str, data: bytes) -> None:
        """See :class:`Store`."""
        self._prepare()
        _durable.make_directory(os.path.join(self.directory, "fleet"))
        _durable.create(os.path.join(self.directory, "fleet", f"{run}.json"), data)


def _boot_directories(directory: str) -> list[str]:
    return [os.path.join(directory, name) for name in _names(directory) if BOOT_ID.match(name)]


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _small(path: str, limit: int) -> bytes:
    """Return the first ``limit`` bytes of a file, in no more memory than it has."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(min(limit, os.fstat(descriptor).st_size + 1))
