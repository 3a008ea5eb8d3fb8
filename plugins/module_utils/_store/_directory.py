# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The store in a directory of the controller, or of a shared mount."""

from __future__ import annotations

import os
import stat
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError
from ansible_collections.integrity.ima.plugins.module_utils._shard import BOOT_ID
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Store
from ansible_collections.integrity.ima.plugins.module_utils._store._objects import (
    FORMAT_NAME,
    NO_FILE,
    Check,
    Objects,
    require_store,
)


class DirectoryStore(Store):
    """The store below ``directory``, an absolute path.

    Raises :class:`StoreError` with reason ``store_missing``, ``store_foreign`` or ``newer_version``. An empty
    directory becomes a store with the first delivery.
    """

    def __init__(self, directory: str) -> None:
        super().__init__(DirectoryObjects(directory), directory)
        self.directory = directory


class DirectoryObjects(Objects):
    """Objects as files below a directory."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self.name = f"directory:{directory}"
        if not os.path.isabs(directory) or not os.path.isdir(directory):
            raise StoreError(
                f"There is no store {directory}"
                if os.path.isabs(directory)
                else f"The store {directory} is not an absolute path",
                reason="store_missing",
                path=directory,
                hint="look whether it is mounted, and at its spelling; create the directory only if the store is new",
            )
        require_store(self, directory, self._is_empty)

    def _is_empty(self) -> bool:
        return all(name.startswith(".") for name in os.listdir(self._directory))

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, name)

    def folders(self, prefix: str) -> list[str]:
        """See :class:`Objects`. A rotation makes a directory before the host has answered: it counts when filled."""
        path = self._path(prefix)
        told = _durable.names(path)
        return [n for n in told if any(not each.startswith(".") for each in _durable.names(os.path.join(path, n)))]

    def sizes(self, prefix: str) -> dict[str, int]:
        """See :class:`Objects`."""
        found = {}
        for name in _durable.names(self._path(prefix)):
            path = os.path.join(self._path(prefix), name)
            if name.startswith("."):
                continue
            if os.path.islink(path) or not os.path.isdir(path):
                found[name] = _size(path)
                continue
            found[f"{name}/"] = NO_FILE
            for inner in _durable.names(path):
                if not inner.endswith(_durable.TEMPORARY):
                    found[f"{name}/{inner}"] = _size(os.path.join(path, inner))
        return found

    def read(self, name: str, limit: int) -> bytes:
        """See :class:`Objects`."""
        descriptor = os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(min(limit, os.fstat(descriptor).st_size + 1))

    def open(self, name: str) -> t.BinaryIO:
        """See :class:`Objects`."""
        return os.fdopen(os.open(self._path(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb")

    def create(self, name: str, data: bytes) -> bool:
        """See :class:`Objects`."""
        path = self._path(name)
        if "/" in name:  # the store itself exists, and what is above it may be closed to us
            _durable.make_directory(os.path.dirname(path))
        return _durable.create(path, data, 0o644 if name == FORMAT_NAME else 0o600)

    def create_from(self, name: str, part: str, check: Check, size: int, sha256: str) -> bool:
        """See :class:`Objects`. The copy is read again before it gets its name."""
        path = self._path(name)
        _durable.make_directory(os.path.dirname(path))
        return _durable.publish_part(part, path, check)

    def confirms(self, name: str, size: int, sha256: str) -> bool:
        """See :class:`Objects`."""
        path = self._path(name)
        return _size(path) == size and _durable.digest_of(path) == sha256

    def settle(self, prefix: str) -> None:
        """See :class:`Objects`. A rotation that died may have published names without making them durable."""
        directory = self._path(prefix).rstrip("/")
        for entry in os.scandir(directory):
            if entry.is_dir(follow_symlinks=False):
                _durable.sweep(entry.path)
        boots = [os.path.join(directory, name) for name in _durable.names(directory) if BOOT_ID.match(name)]
        for path in [directory, *boots]:
            _durable.sync_directory(path)


def _size(path: str) -> int:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return NO_FILE
    return status.st_size if stat.S_ISREG(status.st_mode) else NO_FILE
