# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""Verdicts: what can be said of a host's history in a store, and what is wrong with it, by name.

``attested`` needs a quote of the host's TPM; without one the best is ``consistent``: every shard is there, in order,
unaltered, and replays from zero to what its manifest says. ``stale``: consistent, but old. ``broken``: a named fault.
"""

from __future__ import annotations

import calendar
import dataclasses
import hashlib
import time
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import (
    ImaError,
    ListError,
    ManifestError,
    StoreError,
)
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import (
    Record,
    event_name,
    file_digest,
    read,
)
from ansible_collections.integrity.ima.plugins.module_utils._pcr import BANKS, Replay
from ansible_collections.integrity.ima.plugins.module_utils._shard import (
    MANIFEST_SUFFIX,
    SHARD_SUFFIX,
    Entry,
    Manifest,
    ShardReader,
    anchor_content,
    anchor_name,
    digest,
    entry_of,
    layout_of,
    parse_manifest,
)
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Head, Store, follows

ATTESTED, CONSISTENT, STALE, BROKEN = "attested", "consistent", "stale", "broken"
CLAIMS_READ = 64  # newest fleet documents that are compared; older ones stay as evidence
# What a host says of itself, or a rotation of a host, that means that its history has a hole or cannot be trusted.
_FATAL = frozenset(
    (
        "foreign_trim",
        "kexec",
        "pcr_mismatch",
        "ambiguous_base",
        "equivocation",
        "machine_changed",
        "chain",
        "spool_behind_store",
        "store_diverged",
        "host_name",
        "head_changed",
        "spool_gap",
        "spool_fork",
        "shard_altered",
    )
)
_BOOT_AGGREGATES = (b"boot_aggregate", b"boot_aggregate_late")


class Broken(ImaError):
    """A named fault in a history. Details: ``boot_id``, ``index``, ``sequence`` as far as they are known."""

    default_reason = "broken"


@dataclasses.dataclass
class Verdict:
    """What is said of one host; the fields are those of the module's result."""

    verdict: str = CONSISTENT
    reason: str = ""
    message: str = ""
    boot_id: str = ""
    index: int | None = None
    sequence: int | None = None
    shards: int = 0
    records: int = 0
    boots: int = 0
    emulated: bool = False
    aggregate_digest: str = ""
    pcrs: dict[str, dict[str, str]] = dataclasses.field(default_factory=dict)
    seen: str = ""
    warnings: list[str] = dataclasses.field(default_factory=list)

    def broken(self, fault: ImaError) -> None:
        """Take the first fault as the verdict."""
        self.verdict, self.reason, self.message = BROKEN, fault.reason, fault.msg
        self.boot_id = fault.details.get("boot_id", self.boot_id)
        self.index, self.sequence = fault.details.get("index"), fault.details.get("sequence")


class Claim(t.NamedTuple):
    """What a fleet document says of one host: ``run`` and the member of ``hosts``."""

    run: str
    time: str
    said: dict[str, t.Any]


def claims_of(store: Store) -> dict[str, list[Claim]]:
    """Return what the newest fleet documents say of each host, oldest first. A document that cannot be read raises."""
    claims: dict[str, list[Claim]] = {}
    for run in store.runs()[-CLAIMS_READ:]:
        document = store.run(run)
        if document["run"] != run:
            raise StoreError(f"The fleet document {run} calls itself {document['run']}", reason="fleet_document")
        for host, said in document["hosts"].items():
            claims.setdefault(host, []).append(Claim(run, document["time"], said))
    return claims


def verify(store: Store, host: str, claims: t.Sequence[Claim], max_age: int = 0, now: float | None = None) -> Verdict:
    """Return the verdict on a host: every shard read again, every record hashed, every claim compared.

    ``max_age`` in seconds (0: any age): how long ago the host may last have answered.
    """
    verdict = Verdict()
    try:
        history = _History(store, host, verdict)
        history.walk()
        _compare(history, claims, verdict)
    except (Broken, ManifestError, StoreError, ListError) as fault:
        verdict.broken(fault)
    _seen(verdict, claims)
    if verdict.verdict == CONSISTENT and max_age:
        age = (time.time() if now is None else now) - _seconds(verdict.seen)
        if age > max_age:
            verdict.verdict, verdict.reason = STALE, "stale"
            verdict.message = f"the host last answered at {verdict.seen or 'no known time'}"
    return verdict


def _seen(verdict: Verdict, claims: t.Sequence[Claim]) -> None:
    """The controller's word on when the host last answered goes before the host's own clock."""
    answered = [claim.time for claim in claims if claim.said["status"] == "present"]
    verdict.seen = max(answered) if answered else verdict.seen


def _seconds(text: str) -> float:
    try:
        return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return 0.0


class _History:
    """A host's shards in a store, walked in order."""

    def __init__(self, store: Store, host: str, verdict: Verdict) -> None:
        self._store, self._host, self._verdict = store, host, verdict
        names, other = store.names(host)
        self._names = names
        self._entries = sorted(entry for entry, suffix in names if suffix == MANIFEST_SUFFIX)
        verdict.warnings += [f"{len(other)} names in the store are neither shards nor manifests"] if other else []
        self.digests: dict[int, str] = {}
        self.manifests: dict[int, Manifest] = {}
        self._first_fault: Broken | None = None

    def walk(self) -> None:
        """Check everything; raise the first fault."""
        if not self._entries and not self._names:
            raise Broken(f"The store has no shard of {self._host}", reason="no_shard")
        head: Head | None = None
        for number, entry in enumerate(self._entries, 1):
            self._in_order(number, entry)
            head = self._manifest(entry, head)
        self._orphans()
        replays = _Epochs()
        for entry in self._entries:
            self._shard(entry, replays)
        if self._first_fault:
            raise self._first_fault

    def _in_order(self, number: int, entry: Entry) -> None:
        if entry.sequence < number:
            raise self._fault("repeated_shard", f"two manifests claim sequence {entry.sequence}", entry)
        if entry.sequence > number:
            lost = [each for each, suffix in self._names if each.sequence == number and suffix == SHARD_SUFFIX]
            if lost:
                raise self._fault("missing_manifest", f"the manifest of shard {number} is missing", lost[0])
            before = self._entries[number - 2] if number > 1 else None
            first = before.end if before else 0
            boot = before.boot_id if before and entry.first else entry.boot_id
            raise Broken(
                f"shard {number} is missing, manifest and all: the records from index {first} of boot {boot} on, up to "
                f"shard {entry.sequence}",
                reason="missing_shard",
                index=first,
                sequence=number,
                boot_id=boot,
            )

    def _fault(self, reason: str, what: str, entry: Entry, index: int | None = None) -> Broken:
        return Broken(
            f"{what} (shard {entry.sequence}, records {entry.first} to {entry.end - 1} of boot {entry.boot_id})",
            reason=reason,
            index=entry.first if index is None else index,
            sequence=entry.sequence,
            boot_id=entry.boot_id,
        )

    def _manifest(self, entry: Entry, head: Head | None) -> Head:
        data = self._store.manifest_bytes(self._host, entry)
        try:
            manifest = parse_manifest(data, "the manifest")
        except ManifestError as error:
            raise self._fault(
                "edited_manifest", f"the manifest is not what a host wrote: {error.msg}", entry
            ) from error
        if entry_of(manifest) != entry:
            raise self._fault("swapped_manifest", "the manifest describes another shard than its name says", entry)
        if manifest["name"] != self._host:
            raise self._fault("foreign_manifest", "the manifest is of a host with another name", entry)
        if head and manifest["machine_id"] != head.manifest["machine_id"]:
            raise self._fault("machine_changed", "the manifest is of another machine than the one before it", entry)
        if manifest["previous"] != (head.digest if head else None):
            before = self._entries[entry.sequence - 2] if head else entry
            what = "the next manifest names another one before it: this one was edited or replaced, or the next one was"
            raise self._fault("edited_manifest", what, before)
        wrong = follows(manifest, head)
        if wrong:
            raise self._fault("chain", wrong, entry)
        self.manifests[entry.sequence], self.digests[entry.sequence] = manifest, digest(data)
        self._count(manifest, head)
        return Head(manifest, digest(data))

    def _count(self, manifest: Manifest, head: Head | None) -> None:
        verdict = self._verdict
        verdict.shards += 1
        verdict.records += manifest["count"]
        verdict.boots += head is None or head.manifest["boot_id"] != manifest["boot_id"]
        verdict.emulated = verdict.emulated or manifest["emulated"]
        verdict.aggregate_digest, verdict.pcrs = self.digests[manifest["sequence"]], manifest["pcrs_end"]
        verdict.seen, verdict.boot_id = manifest["time"], manifest["boot_id"]
        for fault in manifest["faults"]:
            self._host_said(fault)
        same_reset = (
            head and manifest["reset_count"] is not None and manifest["reset_count"] == head.manifest["reset_count"]
        )
        if (
            head
            and manifest["first"] == 0
            and same_reset
            and not any(f["reason"] == "kexec" for f in manifest["faults"])
        ):
            self._keep(
                Broken(
                    f"boot {manifest['boot_id']} began without a TPM reset, yet its list began anew: a kexec that "
                    "did not carry the list over",
                    reason="kexec",
                    boot_id=head.manifest["boot_id"],
                    index=head.manifest["first"] + head.manifest["count"],
                    sequence=manifest["sequence"],
                )
            )

    def _host_said(self, fault: dict[str, t.Any]) -> None:
        if fault["lost"]:
            self._keep(Broken(fault["message"], reason=fault["reason"], boot_id=fault["boot_id"], index=fault["index"]))
        else:
            self._verdict.warnings.append(f"{fault['reason']} at index {fault['index']}: {fault['message']}")

    def _keep(self, fault: Broken) -> None:
        self._first_fault = self._first_fault or fault

    def _orphans(self) -> None:
        sealed = set(self._entries)
        orphans = sorted(entry for entry, suffix in self._names if suffix == SHARD_SUFFIX and entry not in sealed)
        if orphans and orphans[0].sequence <= len(self._entries):
            raise self._fault("repeated_shard", "a second shard file claims this sequence", orphans[0])
        if orphans:
            self._verdict.warnings.append("a delivery was interrupted: a shard is here, its manifest is not yet")

    def _shard(self, entry: Entry, epochs: _Epochs) -> None:
        manifest = self.manifests[entry.sequence]
        with self._store.open_shard(self._host, entry) as file:
            reader = ShardReader(file, manifest, entry.stem)
            try:
                epochs.replay(
                    manifest, read(reader.read, layout_of(manifest), first_index=entry.first), self._anchors(entry)
                )
            except ManifestError as error:
                raise self._altered(entry, error) from error
            except ListError as error:
                raise self._unless_altered(entry, reader, error) from error

    def _unless_altered(self, entry: Entry, reader: ShardReader, error: ListError) -> ImaError:
        """A record that is wrong in a file that is not the sealed one is the file's fault."""
        try:
            while reader.read(_durable.CHUNK):
                pass
        except ManifestError as altered:
            return self._altered(entry, altered)
        return self._fault("bad_record", error.msg, entry, error.details.get("index"))

    def _altered(self, entry: Entry, error: ManifestError) -> Broken:
        stored = hashlib.sha256()
        with self._store.open_shard(self._host, entry) as file:
            for chunk in iter(lambda: file.read(_durable.CHUNK), b""):
                stored.update(chunk)
        for other in self.manifests.values():
            if other["stored_sha256"] == stored.hexdigest() and other["sequence"] != entry.sequence:
                return self._fault("swapped_shard", f"the file holds the bytes of shard {other['sequence']}", entry)
        return self._fault("edited_shard", error.msg, entry)

    def _anchors(self, entry: Entry) -> dict[int, tuple[bytes, bytes]]:
        """Return what the anchors in a shard must be: index to (end of the recorded name, content)."""
        wanted = {}
        for anchor in self.manifests[entry.sequence]["anchors"]:
            manifest, head = self.manifests.get(anchor["sequence"]), self.digests.get(anchor["sequence"])
            if manifest is None or head is None or anchor["sequence"] >= entry.sequence:
                raise self._fault(
                    "anchor", f"it names an anchor of shard {anchor['sequence']}, which is not before it", entry
                )
            wanted[anchor["index"]] = (anchor_name(manifest, head).encode("ascii"), anchor_content(manifest, head))
        return wanted


class _Epochs:
    """Replays shard after shard, from zero at the beginning of each epoch."""

    def __init__(self) -> None:
        self._replay: Replay | None = None

    def replay(self, manifest: Manifest, records: t.Iterator[Record], anchors: dict[int, tuple[bytes, bytes]]) -> None:
        """Replay one shard and compare with what its manifest says. Raises :class:`Broken`."""
        banks = [bank for bank in BANKS if any(bank in row for row in manifest["pcrs_end"].values())]
        replay = Replay(banks, manifest["pcrs_start"], padded=manifest["padded"])
        replay.run(_looking(records, manifest, anchors))
        where = {"boot_id": manifest["boot_id"], "index": manifest["first"], "sequence": manifest["sequence"]}
        if replay.records != manifest["count"]:
            raise Broken(
                f"shard {manifest['sequence']} has {replay.records} records, its manifest says {manifest['count']}",
                reason="count",
                **where,
            )
        if replay.values() != manifest["pcrs_end"] or replay.violations != manifest["violations"]:
            raise Broken(
                f"shard {manifest['sequence']} does not replay to the PCR values and violations in its manifest",
                reason="pcr_mismatch",
                **where,
            )


def _looking(
    records: t.Iterator[Record], manifest: Manifest, anchors: dict[int, tuple[bytes, bytes]]
) -> t.Iterator[Record]:
    """Pass the records through; the first of an epoch must be a boot_aggregate, and anchors what they claim to be."""
    where = {"boot_id": manifest["boot_id"], "sequence": manifest["sequence"]}
    order, met = manifest["byte_order"], 0
    for record in records:
        if record.index == 0 and event_name(record, order) not in _BOOT_AGGREGATES:
            raise Broken(
                "the first record of the boot is not boot_aggregate", reason="no_boot_aggregate", index=0, **where
            )
        if record.index in anchors:
            name, content = anchors[record.index]
            algorithm, value = file_digest(record, order)
            if not event_name(record, order).endswith(b"/" + name) or hashlib.new(algorithm, content).digest() != value:
                raise Broken(
                    "the anchor's record does not hold the aggregate", reason="anchor", index=record.index, **where
                )
            met += 1
        yield record
    if met != len(anchors):
        raise Broken(
            "an anchor is named that the shard does not hold", reason="anchor", index=manifest["first"], **where
        )


def _compare(history: _History, claims: t.Sequence[Claim], verdict: Verdict) -> None:
    """Hold what each host claimed at earlier rotations against what is here."""
    for claim in claims:
        said = claim.said
        if said["status"] != "present":
            continue
        manifest = history.manifests.get(said["sequence"])
        where = {"boot_id": said["boot_id"], "sequence": said["sequence"], "index": said["index"]}
        if manifest is None:
            raise Broken(
                f"at rotation {claim.run} the store had shard {said['sequence']} of this host; it is gone",
                reason="missing_shard",
                **where,
            )
        if history.digests[said["sequence"]] != said["aggregate_digest"]:
            raise Broken(
                f"at rotation {claim.run} shard {said['sequence']} had the aggregate digest "
                f"{said['aggregate_digest']}, "
                f"now it is {history.digests[said['sequence']]}: the past was rewritten",
                reason="edited_manifest",
                **where,
            )
        if said["pcrs"] != manifest["pcrs_end"] or said["index"] != manifest["first"] + manifest["count"]:
            raise Broken(
                f"what rotation {claim.run} recorded does not fit the manifest", reason="claim_mismatch", **where
            )
    last = claims[-1] if claims else None
    if last and last.said["status"] == "missing":
        why = f"missing at rotation {last.run}: {last.said['reason']}: {last.said['message']}"
        if last.said["reason"] in _FATAL:
            raise Broken(
                last.said["message"],
                reason=last.said["reason"],
                index=last.said.get("index"),
                boot_id=last.said.get("boot_id", verdict.boot_id),
            )
        verdict.warnings.append(why)


def worst(verdicts: t.Iterable[str]) -> str:
    """Return the worst of some verdicts."""
    order = [ATTESTED, CONSISTENT, STALE, BROKEN]
    return max(verdicts, key=order.index, default=CONSISTENT)


class Unfit(ImaError):
    """Some hosts have a verdict that the caller does not accept; the details are the whole result."""

    default_reason = "broken"


def verify_fleet(
    store: Store, hosts: t.Sequence[str] | None, max_age: int, fail_on: t.Sequence[str]
) -> dict[str, t.Any]:
    """Return the verdicts on ``hosts`` (None: all of the store and of its newest fleet document), and their counts.

    Raises :class:`Unfit` when a host has one of the verdicts in ``fail_on``.
    """
    claims = claims_of(store)
    newest = store.runs()[-1:]
    known = set(store.hosts()) | {host for host, said in claims.items() if said[-1].run in newest}
    verdicts = {host: verify(store, host, claims.get(host, []), max_age) for host in sorted(hosts or known)}
    result: dict[str, t.Any] = {
        "changed": False,
        "verdict": worst(verdict.verdict for verdict in verdicts.values()),
        "counts": {
            word: sum(verdict.verdict == word for verdict in verdicts.values())
            for word in (ATTESTED, CONSISTENT, STALE, BROKEN)
        },
        "hosts": {host: dataclasses.asdict(verdict) for host, verdict in verdicts.items()},
    }
    unfit = [host for host, verdict in verdicts.items() if verdict.verdict in fail_on]
    if unfit:
        first = verdicts[unfit[0]]
        raise Unfit(
            f"{len(unfit)} of {len(verdicts)} hosts are not as they should be; {unfit[0]} is {first.verdict}: "
            f"{first.message or 'no quote of a TPM'}",
            reason=first.reason or first.verdict,
            hint="'hosts' in the result says what was found on each",
            **result,
        )
    return result
