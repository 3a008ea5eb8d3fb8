# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The stitched lists: what a host's kernel would show if nothing had ever been trimmed, out of a store."""

from __future__ import annotations

import hashlib
import os
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError, WriteError
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import Record, read, to_ascii
from ansible_collections.integrity.ima.plugins.module_utils._pcr import BANKS, Replay
from ansible_collections.integrity.ima.plugins.module_utils._shard import Manifest, ShardReader, layout_of
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Store
from ansible_collections.integrity.ima.plugins.module_utils._verifier import BROKEN, verify


def epoch_of(store: Store, host: str, boot_id: str) -> list[Manifest]:
    """Return the manifests of the epoch that ``boot_id`` (empty: the newest) belongs to, from index 0 on."""
    epochs: list[list[Manifest]] = []
    for entry in store.entries(host):
        manifest = store.manifest(host, entry)
        if manifest["first"] == 0 or not epochs:
            epochs.append([])
        epochs[-1].append(manifest)
    found = [epoch for epoch in epochs if not boot_id or any(each["boot_id"] == boot_id for each in epoch)]
    if not found:
        raise StoreError(
            f"The store has no shard of {host}" + (f" from boot {boot_id}" if boot_id else ""),
            reason="no_shard",
            hint="the boots are the directories below the host's in the store",
        )
    return found[-1]


def stitch(
    store: Store, host: str, boot_id: str, binary: str | None, text: str | None, check: bool
) -> dict[str, t.Any]:
    """Write the whole binary and ASCII lists of one boot; nothing is written when the host's history is broken there.

    Raises :class:`StoreError` (``broken`` with the verdict's reason in ``fault``, ``no_shard``), :class:`ListError`
    ``unknown_template`` when a record cannot be rendered, :class:`WriteError`.
    """
    epoch = epoch_of(store, host, boot_id)
    verdict = verify(store, host, ())
    if verdict.verdict == BROKEN and not _readable(store, host, epoch):
        raise StoreError(
            f"The history of {host} is broken: {verdict.message}",
            reason="broken",
            fault=verdict.reason,
            index=verdict.index,
            sequence=verdict.sequence,
            hint="integrity.ima.ima_verify says more",
        )
    changed = [
        path
        for path, render in ((binary, _raw), (text, _ascii))
        if path and _write(path, _rendered(store, host, epoch, render), check)
    ]
    last = epoch[-1]
    return {
        "changed": bool(changed),
        "boot_id": last["boot_id"],
        "records": last["first"] + last["count"],
        "shards": len(epoch),
        "pcrs": last["pcrs_end"],
        "padded": last["padded"],
        "violations": sum(manifest["violations"] for manifest in epoch),
    }


def _readable(store: Store, host: str, epoch: list[Manifest]) -> bool:
    """Say whether this epoch's own bytes replay from zero to its end, whatever is wrong elsewhere in the history."""
    banks = [bank for bank in BANKS if any(bank in row for row in epoch[-1]["pcrs_end"].values())]
    replay = Replay(banks, {}, padded=epoch[-1]["padded"])
    replay.run(record for record, _order in _records(store, host, epoch))
    return bool(replay.values() == epoch[-1]["pcrs_end"])


def _records(store: Store, host: str, epoch: list[Manifest]) -> t.Iterator[tuple[Record, str]]:
    for manifest in epoch:
        with store.open_shard_of(host, manifest) as file:
            reader = ShardReader(file, manifest, f"{manifest['sequence']} of {host}")
            for record in read(reader.read, layout_of(manifest), first_index=manifest["first"]):
                yield record, manifest["byte_order"]


def _raw(record: Record, _byte_order: str) -> bytes:
    return record.raw


def _ascii(record: Record, byte_order: str) -> bytes:
    return to_ascii(record, byte_order)


def _rendered(
    store: Store, host: str, epoch: list[Manifest], render: t.Callable[[Record, str], bytes]
) -> t.Iterator[bytes]:
    return (render(record, order) for record, order in _records(store, host, epoch))


def _write(path: str, pieces: t.Iterator[bytes], check: bool) -> bool:
    """Replace ``path`` by the pieces unless it has these bytes already; False when nothing changes."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise WriteError(f"The directory {directory} does not exist", reason="no_directory", path=directory)
    digest = hashlib.sha256()
    if check:
        for piece in pieces:
            digest.update(piece)
        return not os.path.exists(path) or _durable.digest_of(path) != digest.hexdigest()
    with _durable.NewFile(path) as file:
        for piece in pieces:
            digest.update(piece)
            file.write(piece)
        if os.path.exists(path) and _durable.digest_of(path) == digest.hexdigest():
            return False
        file.replace()
    return True
