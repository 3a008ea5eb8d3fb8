# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""From what a user calls a store to the store: a directory, ``sftp://`` or ``s3://``."""

from __future__ import annotations

import hashlib
import os
import re

from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError, printable
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Store
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore


def open_store(store: str, key: str | None = None) -> Store:
    """Return the store; ``key`` is the file of a private key for encrypted shards.

    See :func:`_opened`.
    """
    opened = _opened(store)
    opened.key = key
    return opened


def _opened(store: str) -> Store:
    """Return the store that ``store`` names: an absolute path, ``sftp://user@host/path`` or ``s3://bucket/prefix``.

    Raises :class:`StoreError` with reason ``store_address``, or what the kind of store raises when it is opened.
    """
    if not re.match(r"[a-z0-9+.-]+://", store):
        return DirectoryStore(store)
    if store.startswith("sftp://"):
        from ansible_collections.integrity.ima.plugins.module_utils._store._sftp import SftpObjects

        return Store(SftpObjects(store), _parts(store))
    if store.startswith("s3://"):
        from ansible_collections.integrity.ima.plugins.module_utils._store._s3 import S3Objects

        return Store(S3Objects(store), _parts(store))
    raise StoreError(
        f"{printable(store)[:200]} is not a store that this version knows",
        reason="store_address",
        hint="give an absolute path, sftp://user@host/path or s3://bucket/prefix",
    )


def _parts(store: str) -> str:
    """Return the directory of this user in which deliveries to a distant store wait until they are whole."""
    state = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    name = hashlib.sha256(store.partition("?")[0].encode("utf-8", "surrogatepass")).hexdigest()[:16]
    return os.path.join(state, "integrity-ima", name)
