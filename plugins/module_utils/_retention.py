# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The controller's half of pruning: what the host would remove is confirmed by the store first, one by one, now."""

from __future__ import annotations

import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError
from ansible_collections.integrity.ima.plugins.module_utils._rotation import Call, checked
from ansible_collections.integrity.ima.plugins.module_utils._schema import CANDIDATES
from ansible_collections.integrity.ima.plugins.module_utils._shard import digest
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Store


def prune(store: Store, host: str, call: Call, check_mode: bool) -> dict[str, t.Any]:
    """Have the host remove the shard files that its retention lets go and that ``store`` confirms; return the result.

    Raises :class:`StoreError` ``not_confirmed`` when the store does not have, byte for byte, what the host believes.
    """
    answer = checked(call({"confirmed": None, "after": 0}), CANDIDATES, "candidates")
    pruned = after = 0
    while answer["candidates"]:
        candidates = answer["candidates"]
        order = [after, *(each["sequence"] for each in candidates)]
        if order != sorted(set(order)):
            raise StoreError(f"{host} names shards to prune again, or out of order", reason="bad_answer")
        _confirm(store, host, candidates)
        after = candidates[-1]["sequence"]
        confirmed = None if check_mode else dict(candidates[-1], store=store.name)
        answer = checked(call({"confirmed": confirmed, "after": after if check_mode else 0}), CANDIDATES, "candidates")
        pruned += len(candidates) if check_mode else answer["pruned"]
    return {"changed": pruned > 0, "pruned": pruned, "kept": answer["kept"] - (pruned if check_mode else 0)}


def _confirm(store: Store, host: str, candidates: list[dict[str, t.Any]]) -> None:
    """Compare size and SHA-256 of each candidate's shard and manifest from the store's side.

    Of a shard that expired there, by the store's own retention, the manifest: both sides let its records go.
    """
    known = {entry.sequence: entry for entry in store.entries(host)}
    expired = store.expired(host)
    for candidate in candidates:
        entry, wanted = known.get(candidate["sequence"]), candidate["manifest"]
        if entry and entry.sequence <= expired:
            sure = digest(store.manifest_bytes(host, entry)) == wanted
        else:
            sure = entry is not None and store.confirms(host, entry, wanted)
        if not sure:
            raise StoreError(
                f"{store.name} does not confirm shard {candidate['sequence']} of {host}, which the host would prune",
                reason="not_confirmed",
                sequence=candidate["sequence"],
                kept="everything on the host",
                hint="verify the host: the store lost or changed what it had acknowledged",
            )
