# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The fleet's aggregate digests: one document per rotation, for the verifier."""

from __future__ import annotations

import secrets
import time
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import printable
from ansible_collections.integrity.ima.plugins.module_utils._schema import CLAIM, MISSING, check
from ansible_collections.integrity.ima.plugins.module_utils._shard import Manifest
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import utc_now


def new_run() -> str:
    """Return the name of a run: UTC time with microseconds (5 hex digits), so that names sort, and 3 random digits."""
    now = time.time()
    second = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    return f"{second}-{int(now % 1 * 1000000):05x}{secrets.token_hex(2)[:3]}"


def claim(manifest: Manifest, aggregate_digest: str, records: int) -> dict[str, t.Any]:
    """Return what a host claims at its cut; ``records``: how many came since the last rotation."""
    return {
        "status": "present",
        "machine_id": manifest["machine_id"],
        "boot_id": manifest["boot_id"],
        "sequence": manifest["sequence"],
        "index": manifest["first"] + manifest["count"],
        "records": records,
        "pcrs": manifest["pcrs_end"],
        "aggregate_digest": aggregate_digest,
        "flavour": manifest["flavour"],
        "emulated": manifest["emulated"],
        "time": utc_now(),
    }


def missing(reason: str, message: str, **where: t.Any) -> dict[str, t.Any]:
    """Return why a host is missing; ``boot_id`` and ``index`` name the place, where there is one."""
    said: dict[str, t.Any] = {"status": "missing", "reason": reason, "message": printable(message[:2000])[:2000]}
    return dict(said, **{key: value for key, value in where.items() if value is not None})


def member(result: t.Any) -> dict[str, t.Any]:
    """Return what the fleet document says of a host, from its registered result of ``ima_rotate`` (or None)."""
    result = result if isinstance(result, dict) else {}
    said = result.get("claim")
    if isinstance(said, dict) and not check(said, {"anyOf": [CLAIM, MISSING]}):
        return dict(said)
    if result.get("unreachable"):
        return missing("unreachable", str(result.get("msg", "")))
    if result.get("failed"):
        return missing("failed", str(result.get("msg", "")))
    return missing(
        "no_shard" if result else "not_run", "the rotation gave no claim" if result else "nothing was run on it"
    )


def document(run: str, hosts: dict[str, dict[str, t.Any]]) -> dict[str, t.Any]:
    """Return the fleet document of a run."""
    return {"version": 1, "run": run, "time": utc_now(), "hosts": hosts}
