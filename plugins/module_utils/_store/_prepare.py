# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""Whether a place can be a store, and what makes it one; what cannot be looked at is said, not assumed."""

from __future__ import annotations

import contextlib
import os
import secrets
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError, WriteError
from ansible_collections.integrity.ima.plugins.module_utils._protocol import require_durable
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryObjects
from ansible_collections.integrity.ima.plugins.module_utils._store._objects import (
    FORMAT,
    FORMAT_NAME,
    RETENTION_NAME,
    Objects,
)
from ansible_collections.integrity.ima.plugins.module_utils._store._s3 import S3Objects
from ansible_collections.integrity.ima.plugins.module_utils._store._sftp import SftpObjects

Result = t.Dict[str, t.Any]


class _Wish(t.NamedTuple):
    """What the user asked for."""

    create: bool
    lock_mode: str
    lock_days: int
    shard_days: int
    check: bool


def prepare(store: str, *, create: bool, lock_mode: str, lock_days: int, shard_days: int, check: bool) -> Result:
    """Check a store; with ``create`` make what is missing. Return what was found and done; ``check`` changes nothing.

    Raises :class:`StoreError` with the reasons of :func:`_open.open_store`, ``not_write_once`` or ``not_locked``.
    """
    wish = _Wish(create, lock_mode, lock_days, shard_days, check)
    if store.startswith("s3://"):
        return _s3(store, wish)
    if lock_days:
        raise StoreError("Only a bucket can lock its objects", reason="store_address", hint="leave out lock_days")
    return _sftp(store, wish) if store.startswith("sftp://") else _directory(store, wish)


def _found(kind: str, changed: bool, **more: t.Any) -> Result:
    return dict({"changed": changed, "kind": kind, "write_once": None, "versioning": None, "lock": None}, **more)


def _documents(objects: Objects, wish: _Wish) -> bool:
    """Make it a store, if it is none yet, and record its retention; say whether that was, or would be, a change."""
    wanted = {FORMAT_NAME: FORMAT}
    if wish.shard_days:
        wanted[RETENTION_NAME] = canonical({"version": 1, "shard_days": wish.shard_days})
    changed = False
    for name, data in wanted.items():
        try:
            if objects.read(name, len(data) + 1) != data:
                raise StoreError(
                    f"{objects.name} keeps shards for another number of days already ({name})",
                    reason="exists_different",
                    kept=name,
                    hint=f"if that has to change, remove {name} from the store by hand",
                )
        except FileNotFoundError:
            changed = True if wish.check else objects.create(name, data) or changed
    return changed


def _probe(objects: DirectoryObjects | SftpObjects, remove: t.Callable[[str], None]) -> None:
    """Create a file, then again with other bytes: the second time must be refused. Nothing stays."""
    name = f".probe-{secrets.token_hex(8)}"
    try:
        objects.create(name, b"first")
        with contextlib.suppress(StoreError, WriteError):
            objects.create(name, b"second")
        if objects.read(name, 16) != b"first":
            raise StoreError(
                f"{objects.name} lets a file be overwritten by a rename",
                reason="not_write_once",
                hint="use another server: OpenSSH's does not",
            )
    finally:
        remove(name)


def _directory(path: str, wish: _Wish) -> Result:
    made = os.path.isabs(path) and not os.path.lexists(path)
    if made and wish.create:
        require_durable(os.path.dirname(path))
        if wish.check:
            return _found("directory", True)
        _durable.make_directory(path)
    objects = DirectoryObjects(path)
    require_durable(path)
    mode = os.stat(path).st_mode & 0o777
    narrowed = bool(mode & 0o077) and wish.create
    if narrowed and not wish.check:
        os.chmod(path, 0o700)
    formatted = _documents(objects, wish)
    if not wish.check:
        _probe(objects, lambda name: os.unlink(os.path.join(path, name)))
    return _found(
        "directory", made or narrowed or formatted, write_once=None if wish.check else True, mode=f"{mode:04o}"
    )


def _sftp(address: str, wish: _Wish) -> Result:
    changed = wish.create and SftpObjects.make_root(address, wish.check)
    if changed and wish.check:
        return _found("sftp", True)
    objects = SftpObjects(address)
    changed = _documents(objects, wish) or changed
    if not wish.check:
        _probe(objects, objects.remove_probe)
    return _found("sftp", changed, write_once=None if wish.check else True, fsync=objects.syncs)


def _s3(address: str, wish: _Wish) -> Result:
    changed = wish.create and S3Objects.make_bucket(address, wish.check)
    if changed and wish.check:
        return _found("s3", True)
    objects = S3Objects(address)
    state = objects.protection()
    if wish.create and state["versioning"] != "Enabled":
        changed = True
        if not wish.check:
            objects.enable_versioning()
    wanted = {"mode": wish.lock_mode, "days": wish.lock_days}
    if wish.lock_days and state["lock"] != wanted:
        if state["lock"] is None or not wish.create:
            raise StoreError(
                f"{objects.name} does not lock its objects as asked for ({state['lock']})",
                reason="not_locked",
                hint="object lock is given to a bucket when it is created; create another one",
            )
        changed = True
        if not wish.check:
            objects.set_lock(wish.lock_mode, wish.lock_days)
    changed = _documents(objects, wish) or changed
    if not wish.check:
        objects.create(FORMAT_NAME, FORMAT)  # a second time: the server must refuse
        state = objects.protection()
    return _found("s3", changed, write_once=None if wish.check else True, **state)
