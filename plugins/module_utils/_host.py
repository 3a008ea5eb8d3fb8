# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""What the host's modules do, one function each: lock, cycle, and a result of counts and digests."""

from __future__ import annotations

import collections
import os
import time
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, KernelError, SpoolError, TrimError
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import SHA1, read
from ansible_collections.integrity.ima.plugins.module_utils._protocol import Config, Lock, generation
from ansible_collections.integrity.ima.plugins.module_utils._schema import LEAST_CHUNK, canonical
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import DELETE_N, EXPORT_ONLY, STAGED
from ansible_collections.integrity.ima.plugins.module_utils._shard import Entry, anchor_name
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import Cycle, Export, as_recorded, utc_now
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._tpm import TpmError
from ansible_collections.integrity.ima.plugins.module_utils._tpm import enroll as make_key
from ansible_collections.integrity.ima.plugins.module_utils._upload import put

Result = t.Dict[str, t.Any]
MOST_PENDING = 16  # manifests in one answer
MOST_CANDIDATES = 1000  # shards that one call of ima_prune can name


def cycle_of(config: Config) -> Cycle:
    """Return a new cycle over the host that ``config`` describes."""
    return Cycle(config, config.lists(), Spool(config.spool))


def _position(cycle: Cycle) -> Result:
    """Return counts and digests for a diff: where shards end, and where the kernel's list begins."""
    head = cycle.spool.head
    return {
        "sequence": head.sequence if head else 0,
        "cut": head.end if head else 0,
        "base": cycle.spool.journal()["base"],
        "aggregate_digest": cycle.spool.digest(head) if head else "",
    }


def _diff(before: Result, after: Result) -> Result:
    return {"before": before, "after": after}


def _shard(cycle: Cycle, entry: Entry) -> Result:
    manifest = cycle.spool.manifest(entry)
    keys = ("sequence", "boot_id", "first", "count", "size", "sha256", "stored_size", "stored_sha256", "violations")
    return dict({key: manifest[key] for key in keys}, manifest_sha256=cycle.spool.digest(entry))


# -- ima_info -----------------------------------------------------------------------------------------------


def info(config: Config) -> Result:
    """Return what the kernel offers and holds, and how far the shards are behind."""
    lists = config.lists()
    files = lists.files
    seen = lists.count(), lists.violations()
    holders = [{"pid": holder.pid, "command": holder.command} for holder in files.holders()]
    result: Result = {
        "changed": False,
        "flavour": lists.flavour(),
        "emulated": files.emulated,
        "release": files.release(),
        "boot_id": files.boot_id(),
        "machine_id": files.machine_id(),
        "reset_count": files.reset_count(),
        "banks": lists.banks(),
        "tpm_banks": files.tpm_banks(),
        "count": seen[0],
        "violations": seen[1],
        "holders": holders,
        "trim_after": config.trim_after,
        "name": config.name,
    }
    templates: t.Counter[str] = collections.Counter()
    size = count = 0
    with Lock(config, shared=True, create=False), lists.view() as file:
        for record in read(file.read, SHA1):
            templates[record.template] += 1
            size += len(record.raw)
            count += 1
    result.update(bytes=size, held=count, templates=dict(templates))
    result.update(_progress(config, count))
    return result


def _progress(config: Config, held: int) -> Result:
    """Return cut, base and lag; nulls when there is no spool, or when it does not fit the kernel's list."""
    unknown: Result = {"cut": None, "base": None, "lag": None, "sequence": None, "generation": None, "fault": None}
    try:
        cycle = cycle_of(config)
        if not cycle.spool.check():
            return dict(unknown, lag=held)
        with Lock(config, shared=True, create=False):
            place, new = cycle.predict()
            head = cycle.spool.head
            return dict(
                unknown,
                cut=place.cut,
                base=place.base,
                lag=new,
                sequence=head.sequence if head else 0,
                generation=generation(config.spool),
                fault=cycle.blocked(),
            )
    except ImaError as error:
        return dict(unknown, fault=error.result())


# -- ima_export ---------------------------------------------------------------------------------------------


def export(config: Config, check: bool) -> Result:
    """Seal what the kernel holds beyond the cut."""
    with Lock(config, shared=check, create=not check):
        cycle = cycle_of(config)
        before = _position(cycle)
        if check:
            place, new = cycle.predict()
            after = dict(before, cut=place.cut + new, base=place.base)
            return {
                "changed": new > 0,
                "records": new,
                "shards": [],
                "cut": place.cut + new,
                "base": place.base,
                "more": False,
                "notes": [],
                "diff": _diff(before, after),
            }
        done = cycle.export()
        return dict(_exported(cycle, done), diff=_diff(before, _position(cycle)))


def save(config: Config) -> Result:
    """Seal all that the kernel holds beyond the cut, then delete what the policy lets go already."""
    with Lock(config):
        cycle = cycle_of(config)
        before = _position(cycle)
        notes = cycle.spool.recover()
        trimmed = _trim_what_may_go(cycle, witness=True) if cycle.spool.head else 0
        more = True
        while more:
            done = _export_piece(cycle, False) if config.trim_after == "local" else cycle.export()
            more, notes = done.more, notes + done.notes
            trimmed += _trim_what_may_go(cycle, witness=more)
        after = _position(cycle)
        return {
            "records": _sealed_since(cycle, before["sequence"]),
            "shards": after["sequence"] - before["sequence"],
            "trimmed": trimmed,
            "cut": after["cut"],
            "sequence": after["sequence"],
            "fault": cycle.blocked(),
            "busy": str(cycle.busy or ""),
            "notes": notes,
        }


def _exported(cycle: Cycle, done: Export) -> Result:
    return {
        "changed": done.records > 0,
        "records": done.records,
        "cut": done.cut,
        "base": done.base,
        "more": done.more,
        "notes": done.notes,
        "shards": [_shard(cycle, entry) for entry in done.entries[-MOST_PENDING:]],
    }


# -- ima_aggregate ------------------------------------------------------------------------------------------


def aggregate(config: Config, anchor: bool, check: bool) -> Result:
    """Return the aggregate at the cut; with ``anchor`` have the kernel record its digest."""
    with Lock(config, shared=not anchor or check, create=anchor and not check):
        cycle = cycle_of(config)
        result = dict(cycle.aggregate(), changed=False, anchor=None)
        if not anchor:
            return result
        if check:
            return dict(result, changed=_anchored(cycle) is None)
        cycle.spool.recover()
        made = cycle.anchor()
        found = {"index": made.index, "sha256": made.sha256, "bound": made.index is not None}
        return dict(result, anchor=found, changed=made.made)


def _anchored(cycle: Cycle) -> int | None:
    """Return the index of the anchor of this very cut, if the kernel has recorded it."""
    head = cycle.spool.head
    if head is None:
        return None
    name = anchor_name(cycle.spool.manifest(head), cycle.spool.digest(head))
    return cycle.find_anchor(name)


# -- ima_trim -----------------------------------------------------------------------------------------------


def trim(config: Config, to: str, records: int, anchor: int, make_anchor: bool, check: bool) -> Result:
    """Delete records from the list: to the cut, ``records`` of them, or up to the ``anchor``-th newest anchor."""
    with Lock(config, shared=check, create=not check):
        cycle = cycle_of(config)
        if not check:
            cycle.spool.recover()
        before = _position(cycle)
        cycle.require_trimmable()
        made = _make_anchor(cycle) if make_anchor and not check else None
        foreseen = check and make_anchor and not _only_anchor_is_new(cycle)
        place = cycle.survey(write=not check)
        if foreseen:
            count = _foreseen_trim(cycle, to, records, anchor)
        elif check:
            count = cycle.trimmable(place.base, _target(cycle, place.base, to, records, anchor))
        else:
            count = cycle.trim(_target(cycle, place.base, to, records, anchor))
        after = dict(_position(cycle), base=place.base + count)
        return {
            "changed": count > 0 or bool(made) or foreseen,
            "trimmed": count,
            "base": place.base + count,
            "cut": place.cut,
            "anchor": made,
            "diff": _diff(dict(before, base=place.base), after),
        }


def _make_anchor(cycle: Cycle) -> Result:
    """Make an anchor the next record to be left: seal what came before it. One that is there already will do."""
    if _only_anchor_is_new(cycle):
        return {}
    cycle.export()
    made = cycle.anchor()
    if made.index is None:
        raise TrimError(
            "The kernel did not record the anchor: its policy does not measure the spool's file system",
            reason="anchor_not_measured",
            path=cycle.spool.anchors,
            kept="everything; nothing was deleted",
            hint="add a rule that measures root's reads there, or trim without making an anchor",
        )
    cycle.export(stop=as_recorded(f"{cycle.spool.anchors}/{made.name}"))
    return {"index": made.index, "sha256": made.sha256, "bound": True}


def _foreseen_trim(cycle: Cycle, to: str, records: int, anchor: int) -> int:
    """Return how many records go once the anchor is made: all that is there now is sealed then, and before it."""
    place, new = cycle.predict()
    end = place.cut + new
    allowed = end if cycle.config.trim_after == "local" else cycle.allowed_to(place.base)
    older = anchor - 1
    target = end if to == "anchor" and not older else _target(cycle, place.base, to, records, older)
    if target is not None and target > allowed:
        return cycle.trimmable(place.base, target)  # which says why not
    return (allowed if target is None else target) - place.base


def _target(cycle: Cycle, base: int, to: str, records: int, anchor: int) -> int | None:
    if to == "cut":
        return None
    if (records if to == "records" else anchor) < 1:
        raise TrimError(f"'{to if to == 'records' else 'anchor'}' must be at least 1", reason="value")
    if to == "records":
        return base + records
    indexes = [index for index in cycle.anchor_indexes() if index > base]
    if len(indexes) < anchor:
        raise TrimError(
            f"The list has {len(indexes)} anchors behind its first record, number {anchor} from the end was asked for",
            reason="no_anchor",
            hint="make one (integrity.ima.ima_aggregate with anchor, or make_anchor here)",
        )
    return indexes[-anchor]


# -- ima_prune ----------------------------------------------------------------------------------------------


def prune(config: Config, confirmed: Result | None, check: bool, after: int = 0) -> Result:
    """Name the shards that retention lets go; with the store's word of now on the last of them, remove their files.

    ``after``: leave out those up to this sequence, which were named before.
    """
    with Lock(config, shared=check, create=not check):
        cycle = cycle_of(config)
        if not check:
            cycle.spool.recover()
        if cycle.spool.head is None:
            return {"changed": False, "pruned": 0, "candidates": [], "kept": 0}
        done = 0
        going = [entry for entry in cycle.prunable(time.time()) if entry.sequence > after]
        if confirmed:
            sure = [entry for entry in going if entry.sequence <= confirmed["sequence"]]
            if not sure or cycle.spool.digest(sure[-1]) != confirmed["manifest"]:
                raise SpoolError("What the store confirmed is not what retention lets go", reason="store_diverged")
            done = cycle.spool.prune(sure[-1], confirmed["store"], utc_now())
            going = going[len(sure) :]
        return {
            "changed": done > 0,
            "pruned": done,
            "candidates": [
                {"sequence": entry.sequence, "manifest": cycle.spool.digest(entry)} for entry in going[:MOST_CANDIDATES]
            ],
            "kept": cycle.spool.files(),
        }


# -- ima_spool ----------------------------------------------------------------------------------------------


def remove_spool(config: Config, aggregate_digest: str, expired: int, check: bool) -> Result:
    """Remove the spool, if its newest manifest is the one in the store, and the store has all records that are here.

    Under the lock, so that what another program seals and deletes until then is seen. Raises :class:`SpoolError`
    ``not_delivered``.
    """
    if not os.path.isdir(config.spool):
        return {"changed": False, "shards": 0}
    with Lock(config, shared=check, create=not check):
        cycle = cycle_of(config)
        if not check:
            cycle.spool.recover()
            _require_delivered(cycle, aggregate_digest, expired)
        shards = cycle.spool.files()
        if not check:
            _durable.remove_tree(config.spool)
        return {"changed": True, "shards": shards}


def _require_delivered(cycle: Cycle, aggregate_digest: str, expired: int) -> None:
    what = ""
    if _position(cycle)["aggregate_digest"] != aggregate_digest:
        what = "its newest shard is not the newest one in the store"
    elif expired > cycle.spool.pruned:
        what = f"{expired} shards have expired in the store, and this spool still has those behind {cycle.spool.pruned}"
    if what:
        raise SpoolError(
            f"The spool {cycle.config.spool} holds records that the store does not have: {what}",
            reason="not_delivered",
            path=cycle.config.spool,
            kept="all of it",
            hint="rotate and verify again, or copy what has expired in the store to where it is kept",
        )


# -- ima_rotate ---------------------------------------------------------------------------------------------


def rotate(config: Config, params: Result, check: bool) -> Result:
    """Do one round of a rotation: upload what was signed for, take the store's word, trim, export, trim again.

    What is not uploaded directly comes back in chunks.
    """
    have, fault_of_upload = params["have"], None
    taken = have
    if params.get("uploads") and not check:
        have, taken, fault_of_upload = _upload(config, params)
    with Lock(config, shared=check, create=not check):
        cycle = cycle_of(config)
        before = _position(cycle)
        if check:
            return _foreseen(cycle, params, before)
        cycle.spool.recover()
        if params.get("busy"):
            # An earlier round of this rotation waited for it already.
            cycle.busy = KernelError(params["busy"], reason="list_busy")
        acknowledged = _acknowledge(cycle, have)
        trimmed = _trim_what_may_go(cycle, witness=params["export"]) if cycle.spool.head else 0
        more = False
        while params["export"]:
            done = _export_piece(cycle, params["anchor"])
            more = done.more
            trimmed += _trim_what_may_go(cycle, witness=done.more)
            if not done.more or config.trim_after != "local":
                break
        news = _sealed_since(cycle, before["sequence"]) and not more
        quote, said = _quote(cycle, params.get("nonce")) if news else (None, [])
        exported = _sealed_since(cycle, before["sequence"])
        answer = _pending(cycle, dict(params, have=taken))
        fault = cycle.blocked()
        answer.update(
            changed=bool(acknowledged or trimmed or exported),
            exported=exported,
            trimmed=trimmed,
            more=more,
            fault=fault,
            busy=str(cycle.busy or "")[:2000],
            quote=quote,
            warnings_said=[text[:2000] for text in (said + cycle.warnings)[:16]],
            position=_diff(before, _position(cycle)),
            flavour=cycle.flavour,
            trim_after=config.trim_after,
            uploaded=have["sequence"] if params.get("uploads") and have else 0,
            upload_fault=fault_of_upload,
        )
        return answer


def _upload(config: Config, params: Result) -> tuple[Result | None, Result | None, Result | None]:
    """Put shards and manifests where the controller signed for, in order, without a lock: sealed files do not change.

    Return what the store now has by its own word, up to where uploads got a yes, and what went wrong with the first
    that did not. A yes that does not name the digest may be anybody's (a proxy's): then the controller asks the store,
    and tells in the next round.
    """
    have: Result | None = params["have"]
    taken = have
    spool = Spool(config.spool)
    known = {entry.sequence: entry for entry in spool.entries}
    unnamed: Result | None = None
    for order in params["uploads"]:
        try:
            entry = known.get(order["sequence"])
            if entry is None or spool.digest(entry) != order["manifest"]:
                raise SpoolError("This spool does not hold the shard that was signed for", reason="store_diverged")
            for what, path in (("shard", spool.path(entry)), ("document", spool.manifest_path(entry))):
                if order[what] and not put(params["urls"][order[what]["url"]], order[what]["headers"], path):
                    message = "the answer was yes, and did not name the digest of what was taken"
                    fault = {"sequence": order["sequence"], "reason": "unconfirmed", "message": message}
                    unnamed = unnamed or fault
        except ImaError as error:
            fault = {"sequence": order["sequence"], "reason": error.reason, "message": str(error)[:2000]}
            return have, taken, unnamed or fault
        taken = {"sequence": entry.sequence, "manifest": order["manifest"], "store": order["store"], "verdict": ""}
        have = have if unnamed else taken
    return have, taken, unnamed


def _foreseen(cycle: Cycle, params: Result, before: Result) -> Result:
    """Return what a whole rotation would do, in the form of one round's answer.

    That the store takes all, and that the verifier agrees where the policy asks it, is taken for granted.
    """
    have = params["have"]
    if have:
        cycle.covered(have["sequence"], have["manifest"])
    place, new = cycle.predict()
    if params["anchor"] and _only_anchor_is_new(cycle):
        new = 0
    waiting = any(entry.sequence > (have["sequence"] if have else 0) for entry in cycle.spool.entries)
    fault = cycle.blocked() or next((found for found in place.faults if found["lost"]), None)
    # Without a shard of this boot nothing goes, and the export that would make it has nothing to seal.
    goes = _permitted(cycle) and not fault and (new or _sealed_here(cycle))
    staged = _staged(cycle)
    going = place.cut + new - place.base if goes else 0
    if goes and staged > cycle.trimmable(place.base, None):
        going = staged
    return {
        "changed": bool(new or waiting or going),
        "exported": new,
        "trimmed": going,
        "more": False,
        "pending": 0,
        "manifests": [],
        "chunks": [],
        "fault": fault,
        "busy": "",
        "flavour": cycle.flavour,
        "quote": None,
        "warnings_said": [],
        "trim_after": cycle.config.trim_after,
        "position": _diff(before, dict(before, base=place.base + going, cut=place.cut + new)),
        "uploaded": 0,
        "upload_fault": None,
    }


def _sealed_since(cycle: Cycle, sequence: int) -> int:
    """Return the number of records in the shards behind ``sequence``, those that a dead run had made included."""
    return sum(entry.count for entry in cycle.spool.entries if entry.sequence > sequence)


def _quote(cycle: Cycle, nonce: str | None) -> tuple[str | None, list[str]]:
    """Quote the PCRs behind the head, then export what that had measured, so that the quoted point is in a shard.

    Returns the quote, and what to warn of. Without a TPM, or where the tools fail, the shards
    are delivered all the same: the verdict then says ``consistent``.
    """
    if not nonce or cycle.spool.head is None:
        return None, []
    if cycle.lists.files.emulated or not cycle.lists.files.tpm_banks():
        return None, []
    try:
        text = canonical(cycle.quote(nonce)).decode("ascii")
    except TpmError as error:
        return None, [f"no quote: {error}"]
    cycle.export()
    return text, []


def enroll(config: Config, check: bool) -> Result:
    """Return the host's attestation key, made if it has none. Raises :class:`TpmError`."""
    files = config.lists().files
    if files.emulated or not files.tpm_banks():
        raise TpmError(
            "This host has no TPM that the kernel uses",
            reason="no_tpm",
            hint="look for /sys/class/tpm/tpm0 and the firmware's settings; without a TPM do not enroll the host",
        )
    key = make_key(create=not check)
    if key is None:
        return {"changed": True, "machine_id": files.machine_id(), "ak": "", "ak_name": "", "ek": ""}
    return {"changed": key.pop("made"), "machine_id": files.machine_id(), **key}


def _acknowledge(cycle: Cycle, have: Result | None) -> int:
    cycle.store_has = have["sequence"] if have else 0
    return cycle.acknowledge(have["sequence"], have["manifest"], have["store"], have["verdict"]) if have else 0


def _deletable(cycle: Cycle) -> bool:
    """Say whether this kernel, the policy and the history allow deleting anything of this boot."""
    return _sealed_here(cycle) and _permitted(cycle) and not cycle.blocked()


def _sealed_here(cycle: Cycle) -> bool:
    head = cycle.spool.head
    return head is not None and head.boot_id == cycle.boot_id


def _staged(cycle: Cycle) -> int:
    """Return how many records are staged already: where the store must have them first, the rest goes another time."""
    if cycle.flavour != STAGED:
        return 0
    with cycle.lists.reader(staged=True) as file:
        return sum(1 for _record in read(file.read, SHA1, verify=False))


def _permitted(cycle: Cycle) -> bool:
    return cycle.flavour != EXPORT_ONLY and cycle.config.trim_after != "never"


def _trim_what_may_go(cycle: Cycle, *, witness: bool) -> int:
    """Delete what the policy lets go, if this kernel can delete and nothing forbids it.

    With ``witness`` the last record of it stays: an export follows, and finds its place by that record's content.
    Who has the list open keeps records from being deleted, and must not keep them from being saved: ``busy`` says who.
    """
    if cycle.busy or not _deletable(cycle):
        return 0
    base = cycle.survey().base
    try:
        if not witness or cycle.flavour == STAGED:
            return cycle.trim()
        limit = base + cycle.trimmable(base, None)
        return cycle.trim(max(base, limit - 1))
    except KernelError as error:
        if error.reason != "list_busy":
            raise
        cycle.busy = error
        return 0


def _export_piece(cycle: Cycle, anchor: bool) -> Export:
    """Export one piece where the rest can be read after a trim, else everything; the anchor follows the last piece."""
    pieces = cycle.flavour == DELETE_N and cycle.config.trim_after != "never" and not cycle.blocked()
    if anchor and _only_anchor_is_new(cycle):
        place = cycle.survey()
        return Export([], 0, place.base, place.cut, False, [])
    done = cycle.export(limit=1 if pieces else None)
    if not anchor or done.more or not done.records:
        return done
    made = cycle.anchor()
    if made.index is None:
        return done
    rest = cycle.export(stop=as_recorded(f"{cycle.spool.anchors}/{made.name}"))
    return rest._replace(records=done.records + rest.records)


def _only_anchor_is_new(cycle: Cycle) -> bool:
    """Say whether nothing but the anchor of this cut was measured since: then there is nothing to rotate."""
    if cycle.spool.head is None:
        return False
    place, new = cycle.predict()
    return new == 1 and _anchored(cycle) == place.cut


def _pending(cycle: Cycle, params: Result) -> Result:
    """Return manifests that the store lacks, and as many of their bytes as one answer may have."""
    have = params["have"]["sequence"] if params["have"] else 0
    waiting = [entry for entry in cycle.spool.entries if entry.sequence > have]
    part, room = params["part"], params["chunk_bytes"]
    chunks: list[Result] = []
    for entry in [] if params.get("direct") else waiting[:MOST_PENDING]:
        size = cycle.spool.manifest(entry)["stored_size"]
        if chunks and room < min(size, LEAST_CHUNK):
            break
        known = part and part["manifest"] == cycle.spool.digest(entry)
        offset = min(part["offset"], size) if known else 0
        chunks.append(cycle.spool.chunk(entry, offset, min(room, size - offset)))
        room -= min(room, size - offset)
    manifests = [cycle.spool.manifest_bytes(entry).decode("ascii") for entry in waiting[:MOST_PENDING]]
    return {"pending": len(waiting), "manifests": manifests, "chunks": chunks}
