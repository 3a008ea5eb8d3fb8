# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""A host's own spool, read as if it were a store, so that the one verifier can judge it."""

from __future__ import annotations

import contextlib
import os
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError
from ansible_collections.integrity.ima.plugins.module_utils._shard import (
    Manifest,
    ShardReader,
    entry_of,
    parse_name,
    plain_of,
)
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Store
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryObjects


class SpoolStore(Store):
    """The spool of one host. It has no quotes, no identity and no fleet documents."""

    GONE = "were pruned"

    def __init__(self, spool: Spool) -> None:
        super().__init__(SpoolObjects(spool), spool.directory)
        self._spool = spool

    @contextlib.contextmanager
    def reading(self, host: str, manifest: Manifest) -> t.Iterator[ShardReader]:
        """See :class:`Store`. Of an encrypted shard the readable file is read, which never leaves the host."""
        path = os.path.join(self._spool.shards, entry_of(manifest).shard)
        path = plain_of(path) if "encryption" in manifest else path
        try:
            file = open(path, "rb")
        except OSError as error:
            where = {key: manifest[key] for key in ("boot_id", "sequence")}
            raise StoreError(
                f"The shard {path} cannot be read: {error.strerror}",
                reason="missing_shard",
                index=manifest["first"],
                **where,
            ) from error
        with file:
            yield ShardReader(file, manifest, path)

    def expired(self, host: str) -> int:
        """See :class:`Store`."""
        return self._spool.pruned_of(self.entries(host))


class SpoolObjects(DirectoryObjects):
    """The shards and manifests of a spool, whichever host is asked for. Everything else in it is not seen."""

    def __init__(self, spool: Spool) -> None:
        self._directory = spool.shards
        self.name = f"spool:{spool.directory}"

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, *name.split("/")[2:])

    def sizes(self, prefix: str) -> dict[str, int]:
        """See :class:`Objects`."""
        return {name: size for name, size in super().sizes(prefix).items() if parse_name(*os.path.split(name))}
