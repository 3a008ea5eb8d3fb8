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
from ansible_collections.integrity.ima.plugins.module_utils._shard import Manifest, layout_of
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Store
from ansible_collections.integrity.ima.plugins.module_utils._verifier import claims_of, verify


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
        raise _no_shard(host, boot_id)
    return found[-1]


def _no_shard(host: str, boot_id: str) -> StoreError:
    return StoreError(
        f"The store has no shard of {host}" + (f" from boot {boot_id}" if boot_id else ""),
        reason="no_shard",
        hint="the hosts are the directories below 'hosts' in the store, the boots those below the host's",
    )


def stitch(
    store: Store, host: str, boot_id: str, binary: str | None, text: str | None, check: bool
) -> dict[str, t.Any]:
    """Write the whole binary and ASCII lists of one boot; nothing is written unless the whole chain is sound.

    What the host itself reported (a kexec that lost records, a foreign trim) does not forbid it; the result says it.

    Raises :class:`StoreError` (``broken`` with the verdict's reason in ``fault``, ``no_shard``), :class:`ListError`
    ``unknown_template`` when a record cannot be rendered, :class:`WriteError`.
    """
    if not store.entries(host):
        raise _no_shard(host, boot_id)
    verdict = verify(store, host, claims_of(store).get(host, []))
    if not verdict.sound:
        raise StoreError(
            f"The history of {host} is broken: {verdict.message}",
            reason="broken",
            fault=verdict.reason,
            index=verdict.index,
            sequence=verdict.sequence,
            hint="integrity.ima.ima_verify says more",
        )
    epoch = epoch_of(store, host, boot_id)
    changed = [
        path
        for path, render in ((binary, _raw), (text, _ascii))
        if path and _write(path, _rendered(store, host, epoch, render), check)
    ]
    last = epoch[-1]
    return {
        "changed": bool(changed),
        "verdict": verdict.verdict,
        "fault": verdict.reason,
        "boot_id": last["boot_id"],
        "records": last["first"] + last["count"],
        "shards": len(epoch),
        "pcrs": last["pcrs_end"],
        "padded": last["padded"],
        "violations": sum(manifest["violations"] for manifest in epoch),
    }


def _records(store: Store, host: str, epoch: list[Manifest]) -> t.Iterator[tuple[Record, str]]:
    for manifest in epoch:
        with store.reading(host, manifest) as reader:
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
    if not os.path.isdir(directory) or os.path.isdir(path):
        what = f"{path} is a directory" if os.path.isdir(path) else f"The directory {directory} does not exist"
        raise WriteError(what, reason="no_directory", path=path)
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
