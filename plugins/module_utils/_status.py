# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""How far the shards are behind the kernel, told by counts: the list is not read, so it is cheap and an estimate."""

from __future__ import annotations

import time
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, SpoolError
from ansible_collections.integrity.ima.plugins.module_utils._host import cycle_of
from ansible_collections.integrity.ima.plugins.module_utils._protocol import Config, Lock, generation
from ansible_collections.integrity.ima.plugins.module_utils._schema import STATUS, canonical, parse
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import STAGED
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import Cycle, seconds_of
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool

Status = t.Dict[str, t.Any]
MOST_HOLDERS = 16
_RECORD = 128  # bytes that a record is taken to have while there is no shard to learn from
_PROGRESS = ("cut", "base", "lag", "lag_bytes", "sequence", "acknowledged", "age")


def status(config: Config) -> Status:
    """Return the document that ``docs/PROTOCOL.md`` specifies. A spool that cannot be used is told in ``fault``.

    Raises :class:`KernelError`, :class:`LockError`.
    """
    lists = config.lists()
    found: Status = {
        "version": 1,
        "name": config.name,
        "boot_id": lists.files.boot_id(),
        "flavour": lists.flavour(),
        "emulated": lists.files.emulated,
        "count": lists.count(),
        "generation": generation(config.spool),
        "holders": [
            {"pid": holder.pid, "command": holder.command[:64]} for holder in lists.files.holders()[:MOST_HOLDERS]
        ],
        "fault": None,
        **dict.fromkeys(_PROGRESS),
    }
    try:
        # Before the lock: it lies in the spool.
        there = Spool(config.spool).check()
        if there:
            with Lock(config, shared=True, create=False):
                found.update(_progress(cycle_of(config), time.time()))
        else:
            found.update(sequence=0, acknowledged=0, lag=found["count"], lag_bytes=found["count"] * _RECORD)
    except SpoolError as error:
        found["fault"] = _shown(error.result(), error.msg)
    found["due"] = _due(config, found)
    return parse(canonical(found), STATUS, "the status", ImaError)


def due(config: Config) -> bool:
    """Say whether a limit of the config's schedule is reached; with no limit set, always."""
    limits = (config.export_records, config.export_bytes, config.export_seconds)
    return limits == (None, None, None) or bool(status(config)["due"])


def _progress(cycle: Cycle, now: float) -> Status:
    """What the spool tells, and what follows from the kernel's count."""
    head, fault = cycle.spool.head, cycle.blocked()
    said: Status = {"fault": _shown(fault, fault["message"]) if fault else None, "sequence": 0, "acknowledged": 0}
    lag, size, count = _lag(cycle), _RECORD, 1
    if head is not None:
        manifest = cycle.spool.manifest(head)
        size, count = manifest["size"], manifest["count"]
        here = head.boot_id == cycle.boot_id
        age = int(now - seconds_of(manifest["time"]))
        said.update(
            sequence=head.sequence,
            cut=head.end if here else None,
            base=cycle.spool.journal()["base"] if here and _known(cycle) else None,
            acknowledged=_acknowledged(cycle.spool),
            # With a clock that went back nobody knows.
            age=age if age >= 0 else None,
        )
    return dict(said, lag=lag, lag_bytes=None if lag is None else lag * size // count)


def _known(cycle: Cycle) -> bool:
    return bool(cycle.spool.journal()["boot_id"] == cycle.boot_id)


def _lag(cycle: Cycle) -> int | None:
    """Return how many records are not sealed; None when the counts contradict each other: then only reading tells.

    The journal says where the list began when it was last read. Before this boot's first shard all of it counts.
    """
    head, journal, count = cycle.spool.head, cycle.spool.journal(), cycle.lists.count()
    if head is None or head.boot_id != cycle.boot_id:
        return count
    if not _known(cycle):
        return None
    start = journal["base"]
    if cycle.flavour == STAGED:
        start = max(start, journal.get("live", start))
    lag = int(start + count - head.end)
    return lag if lag >= 0 else None


def _acknowledged(spool: Spool) -> int:
    """Return the sequence up to which the store's word is recorded."""
    for entry in reversed(spool.entries):
        if spool.acknowledgement(entry):
            return entry.sequence
    return 0


def _shown(fault: t.Mapping[str, t.Any], message: str) -> Status:
    where = {key: fault.get(key) for key in ("index", "boot_id")}
    return dict(where, reason=fault["reason"], message=message[:2000])


def _due(config: Config, found: Status) -> bool:
    """Say whether an export is due. Nothing new is never due; what is not known is, if anything is."""
    if found["lag"] == 0:
        return False
    limits = (
        (config.export_records, found["lag"]),
        (config.export_bytes, found["lag_bytes"]),
        (config.export_seconds, found["age"]),
    )
    given = [(limit, value) for limit, value in limits if limit is not None]
    return not given or any(value is None or value >= limit for limit, value in given)
