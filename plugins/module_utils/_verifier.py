# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""Verdicts: what can be said of a host's history in a store, and what is wrong with it, by name.

``attested`` needs a quote of the host's TPM; without one the best is ``consistent``: every shard is there, in order,
unaltered, and replays from zero to what its manifest says. ``stale``: consistent, but old. ``broken``: a named fault.
"""

from __future__ import annotations

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
    printable,
)
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import (
    Record,
    event_name,
    file_digest,
    read,
    starts_boot,
)
from ansible_collections.integrity.ima.plugins.module_utils._pcr import BANKS, Replay
from ansible_collections.integrity.ima.plugins.module_utils._schema import QUOTE, parse
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
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import seconds_of
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Head, Store, follows
from ansible_collections.integrity.ima.plugins.module_utils._tpm import QuoteError, check_document

ATTESTED, CONSISTENT, STALE, BROKEN = "attested", "consistent", "stale", "broken"
CLAIMS_READ = 64  # fleet documents that are compared at least; and always the newest in which a host was present
MOST_WARNINGS = 50
# What a host says of itself, or a rotation of a host, that means that its history has a hole or cannot be trusted.
_FATAL = frozenset(
    (
        "foreign_trim",
        "kexec",
        "pcr_mismatch",
        "empty_list",
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


# What says nothing of the host: the verifier cannot read what it is to judge.
_UNREAD = frozenset(("no_key", "no_openssl", "store_unavailable", "store_denied", "store_untrusted", "library_missing"))


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
    quotes: int = 0
    attested_to: int | None = None
    expired: int = 0
    seen: str = ""
    warnings: list[str] = dataclasses.field(default_factory=list)
    sound: bool = False

    def warn(self, what: str) -> None:
        """Add a warning, unless there are very many."""
        if len(self.warnings) < MOST_WARNINGS:
            self.warnings.append(printable(what))

    def broken(self, fault: ImaError) -> None:
        """Take the first fault as the verdict."""
        self.verdict, self.reason, self.message = BROKEN, fault.reason, printable(fault.msg)
        self.boot_id = fault.details.get("boot_id", self.boot_id)
        self.index, self.sequence = fault.details.get("index"), fault.details.get("sequence")


class Claim(t.NamedTuple):
    """What a fleet document says of one host: ``run`` and the member of ``hosts``."""

    run: str
    time: str
    said: dict[str, t.Any]


def claims_of(store: Store) -> dict[str, list[Claim]]:
    """Return what the fleet documents say of each host, oldest first: the newest 64 of them, and as many more as it
    takes to find the newest one in which each of these hosts was present.

    Raises :class:`StoreError` for a document that cannot be read, is not canonical, or has another name.
    """
    claims: dict[str, list[Claim]] = {}
    absent: set[str] = set()
    for number, run in enumerate(reversed(store.runs())):
        if number >= CLAIMS_READ and not absent:
            break
        document = store.run(run)
        if document["run"] != run:
            raise StoreError(f"The fleet document {run} calls itself {document['run']}", reason="fleet_document")
        for host, said in document["hosts"].items():
            claims.setdefault(host, []).insert(0, Claim(run, document["time"], said))
        absent = {host for host, said in claims.items() if all(each.said["status"] == "missing" for each in said)}
    return claims


def verify(
    store: Store,
    host: str,
    claims: t.Sequence[Claim],
    max_age: int = 0,
    now: float | None = None,
    *,
    newest_boot: bool = False,
) -> Verdict:
    """Return the verdict on a host: every shard read again, every record hashed, every claim compared.

    ``max_age`` in seconds (0: any age): how long ago the host may last have answered. ``newest_boot``: what the host
    itself reported of earlier epochs does not count.
    """
    verdict = Verdict()
    now = time.time() if now is None else now
    try:
        history = _History(store, host, verdict)
        history.walk()
        _compare(history, claims, verdict)
        verdict.sound = True
        history.reported(newest_boot)
        history.attest(newest_boot)
        if not newest_boot:
            _missing(claims, verdict)
    except (Broken, ManifestError, StoreError, ListError, QuoteError) as fault:
        if fault.reason in _UNREAD:
            raise
        verdict.broken(fault)
        if fault.reason == "no_shard" and claims and claims[-1].said["status"] == "missing":
            said = claims[-1].said
            verdict.message += printable(f": at rotation {claims[-1].run} it gave none ({said['reason']})")
    except OSError as error:
        verdict.broken(Broken(f"a file of this host cannot be read: {error.strerror}", reason="unreadable"))
    _seen(verdict, claims, now)
    if verdict.verdict in (ATTESTED, CONSISTENT) and max_age:
        if now - _seconds(verdict.seen) > max_age:
            verdict.verdict, verdict.reason = STALE, "stale"
            verdict.message = f"the host last answered at {verdict.seen or 'no known time'}"
    return verdict


def _seen(verdict: Verdict, claims: t.Sequence[Claim], now: float) -> None:
    """The controller's word on when the host last answered goes before the host's own clock."""
    times = [claim.time for claim in claims if claim.said["status"] == "present"] or [verdict.seen]
    past = [each for each in times if _seconds(each) <= now + 300]
    if len(past) < len(times):
        verdict.warn("a time in the future was recorded; it does not count")
    verdict.seen = max(past, default="")


def _seconds(text: str) -> float:
    try:
        return seconds_of(text)
    except ValueError:
        return 0.0


class _History:
    """A host's shards in a store, walked in order."""

    def __init__(self, store: Store, host: str, verdict: Verdict) -> None:
        self._store, self._host, self._verdict = store, host, verdict
        names, other = store.names(host)
        self._names = names
        self._entries = sorted(entry for entry, suffix in names if suffix == MANIFEST_SUFFIX)
        if other:
            verdict.warn(f"{len(other)} names in the store are neither shards nor manifests")
        self.digests: dict[int, str] = {}
        self.manifests: dict[int, Manifest] = {}
        self._reported: list[tuple[int, Broken]] = []
        self._points: list[_Point] = []
        self._enrolled = False
        self._expired = 0  # the sequence up to which there are manifests only

    def walk(self) -> None:
        """Check everything; raise the first fault."""
        if not self._entries and not self._names:
            raise Broken(f"The store has no shard of {self._host}", reason="no_shard")
        head: Head | None = None
        for number, entry in enumerate(self._entries, 1):
            self._in_order(number, entry)
            head = self._manifest(entry, head)
        self._orphans()
        self._expired = self._store.expired(self._host)
        self._rewritten()
        self._points = self._quoted()
        if self._expired:
            self._verdict.expired = self._expired
            self._verdict.warn(
                f"{self._expired} shards {self._store.GONE}: of their records only the chain of manifests was checked"
            )
        replays = _Epochs(self._points)
        for entry in self._entries[self._expired :]:
            self._shard(entry, replays)

    def reported(self, newest_boot: bool) -> None:
        """Raise the first fault that the host itself reported (of the newest epoch only, if so asked)."""
        for sequence, fault in self._reported:
            if sequence >= self._from(newest_boot):
                raise fault
        evidence = self._store.evidence(self._host)
        if evidence:
            raise Broken(
                f"{len(evidence)} manifests of this host contradict what is here; they are kept as evidence",
                reason="equivocation",
            )

    def _from(self, newest_boot: bool) -> int:
        """Return the first sequence that counts."""
        return max((entry.sequence for entry in self._entries if entry.first == 0), default=0) if newest_boot else 0

    def _in_order(self, number: int, entry: Entry) -> None:
        if entry.sequence < number:
            raise self._fault("repeated_shard", f"two manifests claim sequence {entry.sequence}", entry)
        if entry.sequence > number:
            lost = [each for each, suffix in self._names if each.sequence == number and suffix == SHARD_SUFFIX]
            if lost:
                raise self._fault("missing_manifest", f"the manifest of shard {number} is missing", lost[0])
            before = self._entries[number - 2] if number > 1 else None
            first = before.end if before else 0
            boot = before.boot_id if before else entry.boot_id
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
            self._host_said(manifest["sequence"], fault)
        if head is not None and manifest["first"] == 0:
            self._new_boot(manifest, head.manifest)

    def _new_boot(self, manifest: Manifest, before: Manifest) -> None:
        """What a boot that began anew means for the one before it."""
        end, boot_id = before["first"] + before["count"], before["boot_id"]
        self._verdict.warn(f"records of boot {boot_id} from index {end} on, if there were any, were never exported")
        reset = before["reset_count"]
        told = any(fault["reason"] == "kexec" for fault in manifest["faults"])
        if reset is not None and reset == manifest["reset_count"] and not told:
            what = (
                f"boot {manifest['boot_id']} began without a TPM reset, yet its list began anew: a kexec lost the list"
            )
            where = {"boot_id": boot_id, "index": end, "sequence": manifest["sequence"]}
            self._keep(manifest["sequence"], Broken(what, reason="kexec", **where))

    def _host_said(self, sequence: int, fault: dict[str, t.Any]) -> None:
        if fault["lost"]:
            where = {"boot_id": fault["boot_id"], "index": fault["index"], "sequence": sequence}
            self._keep(sequence, Broken(fault["message"], reason=fault["reason"], **where))
        else:
            self._verdict.warn(f"{fault['reason']} at index {fault['index']}: {fault['message']}")

    def _keep(self, sequence: int, fault: Broken) -> None:
        self._reported.append((sequence, fault))

    def _rewritten(self) -> None:
        """What a store that keeps versions remembers: nothing of ours is ever removed or written again."""
        names = self._store.rewritten(self._host)
        if names is None:
            self._verdict.warn("the store keeps versions and does not show them to this account: rewriting is not seen")
            return
        changed = sorted(printable(name) for name, other in names.items() if other)
        if changed:
            what = f"{len(changed)} objects of this host were written again in the store with other bytes"
            raise Broken(f"{what}, {changed[0]} first", reason="rewritten")
        gone = names.keys() - {entry.shard for entry in self._entries[: self._expired]}
        if gone:
            self._verdict.warn(f"somebody removed {len(gone)} objects of this host from the store; they were put back")

    def _orphans(self) -> None:
        sealed = set(self._entries)
        orphans = sorted(entry for entry, suffix in self._names if suffix == SHARD_SUFFIX and entry not in sealed)
        if orphans and orphans[0].sequence <= len(self._entries):
            raise self._fault("repeated_shard", "a second shard file claims this sequence", orphans[0])
        if orphans:
            self._verdict.warn("a delivery was interrupted: a shard is here, its manifest is not yet")

    def _shard(self, entry: Entry, epochs: _Epochs) -> None:
        manifest = self.manifests[entry.sequence]
        try:
            with self._store.reading(self._host, manifest) as reader:
                try:
                    records = read(reader.read, layout_of(manifest), first_index=entry.first)
                    epochs.replay(manifest, records, self._anchors(entry))
                except (ListError, Broken) as error:
                    raise self._unless_altered(entry, reader, error) from error
        except ManifestError as error:
            raise self._altered(entry, error) from error

    def _quoted(self) -> list[_Point]:
        """Return what the quotes say, each checked wholly. Raises :class:`QuoteError`, :class:`Broken`."""
        identity = self._store.identity(self._host)
        self._enrolled = identity is not None
        points: list[_Point] = []
        resets: dict[str, int] = {}
        for data in self._store.quotes(self._host):
            quote = parse(data, QUOTE, f"a quote of {self._host}", QuoteError)
            sequence = quote["sequence"]
            where = {"sequence": sequence, "boot_id": quote["boot_id"]}
            if identity is None:
                raise Broken("there are quotes, but no attestation key is recorded", reason="quote_identity", **where)
            try:
                attest = check_document(quote, identity)
            except QuoteError as error:
                raise Broken(error.msg, reason=error.reason, **where) from error
            manifest = self.manifests.get(sequence)
            if (
                manifest is None
                or self.digests[sequence] != quote["manifest"]
                or manifest["boot_id"] != quote["boot_id"]
            ):
                raise Broken(f"a quote follows a shard {sequence} that is not here", reason="missing_shard", **where)
            resets.setdefault(quote["boot_id"], attest.reset_count)
            points.append(_Point(sequence, quote["boot_id"], quote["pcrs"]))
        self._same_reset(resets)
        self._verdict.quotes = len(points)
        return points

    def _same_reset(self, resets: dict[str, int]) -> None:
        """Two boots between which the TPM was not reset, yet the list began anew: a kexec that lost it."""
        before: Manifest | None = None
        for sequence in sorted(self.manifests):
            manifest = self.manifests[sequence]
            if before is not None and manifest["first"] == 0:
                old, new = resets.get(before["boot_id"]), resets.get(manifest["boot_id"])
                end = before["first"] + before["count"]
                where = {"boot_id": before["boot_id"], "index": end, "sequence": sequence}
                if old is not None and old == new:
                    what = f"the TPM signs that boot {manifest['boot_id']} began without a reset: a kexec lost the list"
                    self._keep(sequence, Broken(what, reason="kexec", **where))
                elif old is not None and new is not None and new < old:
                    what = "the TPM's reset counter went back: another TPM"
                    self._keep(sequence, Broken(what, reason="reset_count", **where))
            before = manifest

    def attest(self, newest_boot: bool) -> None:
        """Raise what makes a quote worthless; take ``attested`` when the newest one covers the newest shards.

        After :meth:`reported`: where records are known to be lost, no list reaches what the TPM signs, and the loss is
        the fault to name.
        """
        if not self._enrolled:
            return
        points = [point for point in self._points if point.sequence >= self._from(newest_boot)]
        last = len(self._entries)
        for point in points:
            # A quote is reached in the shard that it follows or in the next ones: they may have expired.
            if point.index is None and self._expired < point.sequence < last:
                raise Broken(
                    "the list never reaches the PCR values that the TPM signed",
                    reason="quote_not_reached",
                    boot_id=point.boot_id,
                    sequence=point.sequence,
                )
        newest = max(
            (point for point in points if point.index is not None), key=lambda each: each.sequence, default=None
        )
        if newest is None or newest.sequence < last - 1 or newest.boot_id != self._entries[-1].boot_id:
            self._verdict.warn("this host is enrolled, but its newest shards are not covered by a quote")
        else:
            self._verdict.verdict, self._verdict.attested_to = ATTESTED, newest.index

    def _unless_altered(self, entry: Entry, reader: ShardReader, error: ListError | Broken) -> Broken:
        """A record that is wrong in a file that is not the sealed one is the file's fault: :class:`ManifestError`."""
        while reader.read(_durable.CHUNK):
            pass
        if isinstance(error, Broken):
            return error
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


@dataclasses.dataclass
class _Point:
    """What a quote signs, and the index at which the replay reaches it."""

    sequence: int
    boot_id: str
    pcrs: dict[str, dict[str, str]]
    index: int | None = None


class _Observed:
    """The TPM's values that the host read before the list: the replay must hold them where the manifest says."""

    def __init__(self, manifest: Manifest, faulty: bool) -> None:
        observed = manifest["observed"]
        self._where = {key: manifest[key] for key in ("boot_id", "sequence")}
        self._pcrs = observed["pcrs"] if observed else {}
        self._index = observed["index"] if observed else None
        self._held = observed is None or (self._index is None and faulty)
        # The number of this shard's records after which they must hold.
        self.at = -1 if self._held or self._index is None else self._index - manifest["first"]

    def see(self, replay: Replay) -> None:
        """Compare, when the replay is there."""
        if replay.records == self.at and not self._held:
            values = replay.values()
            pairs = [
                (values.get(pcr, {}).get(bank), value) for pcr, row in self._pcrs.items() for bank, value in row.items()
            ]
            known = [found == value for found, value in pairs if found is not None]
            self._held = bool(known) and all(known)

    def met(self) -> None:
        """Raise :class:`Broken` ``pcr_mismatch`` if they did not hold."""
        if not self._held:
            what = "the TPM's values that the host read do not hold where its manifest says"
            raise Broken(what, reason="pcr_mismatch", index=self._index, **self._where)


class _Epochs:
    """Replays shard after shard, and looks for the quoted values on the way."""

    def __init__(self, points: t.Sequence[_Point]) -> None:
        self._points = points
        self._faulty = False

    def replay(self, manifest: Manifest, records: t.Iterator[Record], anchors: dict[int, tuple[bytes, bytes]]) -> None:
        """Replay one shard and compare with what its manifest says. Raises :class:`Broken`."""
        banks = [bank for bank in BANKS if any(bank in row for row in manifest["pcrs_end"].values())]
        replay = Replay(banks, manifest["pcrs_start"], padded=manifest["padded"])
        if manifest["first"] == 0:
            self._faulty = False
        self._faulty = self._faulty or any(fault["lost"] for fault in manifest["faults"])
        watch = _Observed(manifest, self._faulty)
        self._run(replay, manifest, _looking(records, manifest, anchors, self._boot_aggregates(manifest)), watch)
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
        watch.met()

    def _run(self, replay: Replay, manifest: Manifest, records: t.Iterator[Record], watch: _Observed) -> None:
        """Replay, and note where each quote that may be reached from here on holds."""
        slots = [slot.bank for slot in replay.slots]
        waiting = [p for p in self._points if p.index is None and p.sequence <= manifest["sequence"]]

        def holds(point: _Point) -> bool:
            return all(
                point.pcrs.get(str(pcr), {}).get(bank, value.hex()) == value.hex()
                for pcr, row in replay.rows.items()
                for bank, value in zip(slots, row)
            )

        def note(tens: dict[str, list[_Point]], row: list[bytes]) -> None:
            for point in tens.get(row[0].hex(), ()):
                if point.index is None and holds(point):
                    point.index = manifest["first"] + replay.records

        tens: dict[str, list[_Point]] = {}
        for point in waiting:
            for pcr in manifest["pcrs_end"]:
                tens.setdefault(point.pcrs.get(pcr, {}).get(slots[0], ""), []).append(point)
        for row in [replay.row(int(pcr)) for pcr in manifest["pcrs_start"]] if tens else []:
            note(tens, row)
        watch.see(replay)
        for row in replay.steps(records):
            if tens:
                note(tens, row)
            if replay.records == watch.at:
                watch.see(replay)

    def _boot_aggregates(self, manifest: Manifest) -> dict[str, bytes]:
        """Return what boot_aggregate must be in this boot, by hash, where a quote tells PCRs 0 to 9."""
        for point in self._points:
            if point.boot_id == manifest["boot_id"]:
                return {
                    bank: hashlib.new(
                        bank,
                        b"".join(bytes.fromhex(point.pcrs[str(n)][bank]) for n in range(8 if bank == "sha1" else 10)),
                    ).digest()
                    for bank in BANKS
                    if all(bank in point.pcrs.get(str(n), {}) for n in range(10))
                }
        return {}


def _looking(
    records: t.Iterator[Record],
    manifest: Manifest,
    anchors: dict[int, tuple[bytes, bytes]],
    boot_aggregates: dict[str, bytes],
) -> t.Iterator[Record]:
    """Pass the records through; the first of an epoch must be a boot_aggregate, and anchors what they claim to be."""
    where = {"boot_id": manifest["boot_id"], "sequence": manifest["sequence"]}
    order, met = manifest["byte_order"], 0
    for record in records:
        if record.index == 0 and not starts_boot(record, order):
            raise Broken(
                "the first record of the boot is not boot_aggregate", reason="no_boot_aggregate", index=0, **where
            )
        if record.index == 0 and boot_aggregates:
            algorithm, value = file_digest(record, order)
            if boot_aggregates.get(algorithm, value) != value:
                what = "boot_aggregate is not the digest of the PCRs that the TPM signed"
                raise Broken(what, reason="boot_aggregate", index=0, **where)
        if record.index in anchors:
            name, content = anchors[record.index]
            algorithm, value = file_digest(record, order)
            bound = algorithm in BANKS and hashlib.new(algorithm, content).digest() == value
            if not bound or not event_name(record, order).endswith(b"/" + name):
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
                f"the manifest of shard {said['sequence']} is not the one that rotation {claim.run} saw: it was edited "
                f"(SHA-256 {said['aggregate_digest']} then, {history.digests[said['sequence']]} now)",
                reason="edited_manifest",
                **where,
            )
        if said["pcrs"] != manifest["pcrs_end"] or said["index"] != manifest["first"] + manifest["count"]:
            raise Broken(
                f"what rotation {claim.run} recorded does not fit the manifest", reason="claim_mismatch", **where
            )


def _missing(claims: t.Sequence[Claim], verdict: Verdict) -> None:
    """Raise what a rotation said of a hole in this host's history, unless it was present again since.

    What it said when it came back is in its manifests. A rotation that did not get through takes nothing back.
    """
    present = max((number for number, claim in enumerate(claims) if claim.said["status"] == "present"), default=-1)
    for _run, _time, said in claims[present + 1 :]:
        if said["reason"] in _FATAL:
            where = {"index": said.get("index"), "boot_id": said.get("boot_id", verdict.boot_id)}
            raise Broken(said["message"], reason=said["reason"], **where)
    if claims and claims[-1].said["status"] == "missing":
        said = claims[-1].said
        verdict.warn(f"missing at rotation {claims[-1].run}: {said['reason']}: {said['message']}")


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
    known = set(store.hosts())
    known |= {
        h for h, said in claims.items() if said[-1].run in newest or any(c.said["status"] == "present" for c in said)
    }
    if not (hosts or known):
        raise StoreError(f"{store.name} has no host to verify", reason="no_hosts", hint="is the store mounted?")
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
