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
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError, printable
from ansible_collections.integrity.ima.plugins.module_utils._schema import LIMIT, canonical
from ansible_collections.integrity.ima.plugins.module_utils._shard import (
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
        return sorted(filter(None, (decode_name(name) for name in _names(os.path.join(self.directory, "hosts")))))

    def names(self, host: str) -> tuple[set[tuple[Entry, str]], list[str]]:
        """See :class:`Store`."""
        known: set[tuple[Entry, str]] = set()
        other = []
        for boot_id in _names(self._host(host)):
            if boot_id.startswith(".") or boot_id == _EVIDENCE:
                continue
            for name in _names(os.path.join(self._host(host), boot_id)) or [""]:
                parsed = parse_name(boot_id, name)
                if parsed:
                    known.add(parsed)
                elif not name.endswith(_durable.TEMPORARY):
                    other.append(printable(os.path.join(boot_id, name)))
        return known, sorted(other)

    def manifest_bytes(self, host: str, entry: Entry) -> bytes:
        """See :class:`Store`."""
        try:
            return _small(os.path.join(self._host(host), entry.manifest), LIMIT + 1)
        except FileNotFoundError as error:
            raise self._missing(host, entry, "missing_manifest", "manifest") from error

    def open_shard(self, host: str, entry: Entry) -> t.BinaryIO:
        """See :class:`Store`."""
        try:
            return os.fdopen(
                os.open(os.path.join(self._host(host), entry.shard), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb"
            )
        except FileNotFoundError as error:
            raise self._missing(host, entry, "missing_shard", "shard") from error

    def _missing(self, host: str, entry: Entry, reason: str, what: str) -> StoreError:
        return StoreError(
            f"The {what} {entry.stem} of {host} (records {entry.first} to {entry.end - 1}) is not in {self.name}",
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

    def keep_evidence(self, host: str, data: bytes) -> str:
        """See :class:`Store`."""
        directory = os.path.join(self._host(host), _EVIDENCE)
        _durable.make_directory(directory)
        name = f"{digest(data)}.json"
        _durable.create(os.path.join(directory, name), data)
        return f"{_EVIDENCE}/{name}"

    def runs(self) -> list[str]:
        """See :class:`Store`."""
        names = _names(os.path.join(self.directory, "fleet"))
        return sorted(name[:-5] for name in names if name.endswith(".json") and RUN.match(name[:-5]))

    def run_bytes(self, run: str) -> bytes:
        """See :class:`Store`."""
        return _small(os.path.join(self.directory, "fleet", f"{run}.json"), 1 << 30)

    def put_run(self, run: str, data: bytes) -> None:
        """See :class:`Store`."""
        self._prepare()
        _durable.make_directory(os.path.join(self.directory, "fleet"))
        _durable.create(os.path.join(self.directory, "fleet", f"{run}.json"), data)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _small(path: str, limit: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    with os.fdopen(descriptor, "rb") as file:
        return file.read(limit)
