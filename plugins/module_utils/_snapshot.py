# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The cycle on one host: recover, find our place in the kernel's list, export, anchor, acknowledge, trim.

The order "durable, then delete" holds for every flavour, and recovery is the first part of every run. The caller
holds the lock. Nothing is kept in memory across an error: make a new :class:`Cycle` to go on.
"""

from __future__ import annotations

import base64
import calendar
import contextlib
import dataclasses
import itertools
import os
import time
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable, _tpm
from ansible_collections.integrity.ima.plugins.module_utils._encryption import recipients_in
from ansible_collections.integrity.ima.plugins.module_utils._errors import (
    HistoryError,
    KernelError,
    ListError,
    SpoolError,
    TrimError,
)
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import (
    SHA1,
    Record,
    event_name,
    file_digest,
    read,
    starts_boot,
)
from ansible_collections.integrity.ima.plugins.module_utils._pcr import BANKS, Replay, Values, search
from ansible_collections.integrity.ima.plugins.module_utils._protocol import Config, require_durable
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import EXPORT_ONLY, STAGED, File, Lists
from ansible_collections.integrity.ima.plugins.module_utils._shard import (
    ANCHOR_NAME,
    Entry,
    Manifest,
    ShardFile,
    aggregate_text,
    anchor_content,
    anchor_name,
)
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._stitched import follow

_READ = 1 << 16
_ATTEMPTS = 20
MOST_ANCHORS = 100  # in one manifest
Fault = t.Dict[str, t.Any]


def utc_now() -> str:
    """Return the time as the documents write it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def seconds_of(text: str) -> float:
    """Return a document's time in seconds since 1970. Raises ValueError for digits that are no date."""
    return float(calendar.timegm(time.strptime(text, "%Y-%m-%dT%H:%M:%SZ")))


_RECORD_STORED = 64  # bytes that a record takes in a shard: half a digest more than what does not compress
_ROOM = 1 << 20  # bytes for manifests, journal and what the file system itself needs


class Place(t.NamedTuple):
    """Where the kernel's list stands in the spool's history.

    ``base``: index of the first record that the kernel still holds; ``cut``: index up to which shards are sealed;
    ``start``: PCR values there. ``proven``: sealed records were found at the list's head, or the epoch is new.
    """

    base: int
    cut: int
    start: Values
    padded: list[str]
    proven: bool
    faults: list[Fault]


class Export(t.NamedTuple):
    """What an export did: sealed shards, records in them, where the list stands, whether more is waiting."""

    entries: list[Entry]
    records: int
    base: int
    cut: int
    more: bool
    notes: list[str]


class Tail(t.NamedTuple):
    """What the kernel holds beyond the cut, and what the TPM said before it was read."""

    place: Place
    records: t.Iterator[Record]
    observed: Values | None


@dataclasses.dataclass(frozen=True)
class Anchor:
    """An anchor: its file's digest, and the index at which the kernel recorded it (None: its policy did not)."""

    name: str
    sha256: str
    index: int | None
    made: bool


class _Buffered:
    """A list file read in pieces of one size: the kernel walks the list anew for each read, however small."""

    def __init__(self, file: File) -> None:
        self._file, self._rest = file, b""

    def read(self, size: int) -> bytes:
        data = self._rest or self._file.read(_READ)
        self._rest = data[size:]
        return data[:size]

    def starts_with(self, pieces: t.Iterable[bytes]) -> bool:
        """Say whether exactly these bytes come next; afterwards the position is behind them."""
        for piece in pieces:
            while piece:
                data = self.read(len(piece))
                if not data or not piece.startswith(data):
                    return False
                piece = piece[len(data) :]
        return True

    def rewind(self) -> None:
        self._file.rewind()
        self._rest = b""


class _Draft:
    """A shard under its temporary name, with what its manifest will say."""

    def __init__(self, shard: ShardFile, first: int, start: Values, violations: int) -> None:
        self.shard, self.first, self.start, self.violations = shard, first, start, -violations
        self.anchors: list[dict[str, t.Any]] = []
        self.members: dict[str, t.Any] = {}

    def close(self, end: Values, violations: int) -> None:
        """Make its bytes durable."""
        start = {pcr: self.start.get(pcr, {bank: "00" * BANKS[bank] for bank in banks}) for pcr, banks in end.items()}
        self.members = dict(
            self.shard.close(),
            first=self.first,
            pcrs_start=start,
            pcrs_end=end,
            violations=self.violations + violations,
            anchors=self.anchors,
        )


def _where_reached(drafts: list[_Draft], reached: int | None) -> _Draft | None:
    """Return the shard in which the replay reached the observed values: what came later is in the shards behind it."""
    for draft in drafts:
        if reached is not None and reached <= draft.first + draft.shard.count:
            return draft
    return drafts[-1] if drafts else None


class _Copy(t.NamedTuple):
    """How far the list was copied: whether to its end, and where the observed PCRs were reached."""

    at_end: bool
    more: bool
    reached: int | None


class Cycle:
    """The cycle over one host's lists and spool."""

    def __init__(self, config: Config, lists: Lists, spool: Spool) -> None:
        self.config, self.lists, self.spool = config, lists, spool
        self.flavour = lists.flavour()
        self.boot_id = lists.files.boot_id()
        # The last shard that the store has by its own word of now, where there is one: older words may be out of date.
        self.store_has: int | None = None
        self.reset_count = lists.files.reset_count()
        # What a user should know though the cycle went on.
        self.warnings: list[str] = []
        self.busy: KernelError | None = None  # why nothing can be deleted just now: somebody has the list open
        if not lists.files.emulated:
            require_durable(config.spool)

    # -- finding our place ------------------------------------------------------------------------------------------

    def locate(self, view: _Buffered, observed: Values | None) -> Place:
        """Find where the list continues the spool, by content; afterwards ``view`` stands at record ``cut``.

        Raises :class:`HistoryError` with reason ``foreign_trim`` (records are gone that no shard holds),
        ``ambiguous_base`` or ``empty_list``.
        """
        head = self.spool.head
        if head is None:
            return self._new_epoch(view, observed, None)
        if head.boot_id != self.boot_id and not self._carried_over(view, observed, head):
            return self._new_epoch(view, observed, head)
        return self._same_epoch(view, observed, head)

    def _hints(self, end: int) -> list[int]:
        """Bases that the journal knows of, the likeliest first. They are tried, never believed."""
        journal = self.spool.journal()
        hints = [journal["base"]] + ([journal["trim"]["target"]] if journal["trim"] else [])
        known = {entry.boot_id for entry in self.spool.epoch} | {self.boot_id}
        hints = [hint if journal["boot_id"] in known else 0 for hint in hints if hint <= end]
        held = self.spool.held_from
        return [hint for hint in dict.fromkeys(hints) if hint >= held]

    def _runs(self, view: _Buffered, base: int, end: int) -> bool:
        view.rewind()
        return view.starts_with(self.spool.raw_from(base, end))

    def _same_epoch(self, view: _Buffered, observed: Values | None, head: Entry) -> Place:
        """Find the base among those that the journal knows, else among all sealed records.

        That the list begins at the cut fits whatever the list holds, so it is believed on the journal's word only, and
        ``proven`` is false then.
        """
        manifest, hints = self.spool.manifest(head), self._hints(head.end)
        place = Place(head.end, head.end, manifest["pcrs_end"], manifest["padded"], True, [])
        fitting = [base for base in hints if base == head.end or self._runs(view, base, head.end)]
        if fitting:
            base = fitting[0] if len(fitting) == 1 else self._decide(view, place, observed, fitting)
        else:
            base = self._decide(view, place, observed, [*self._search_bases(view, head.end), head.end])
            before = hints[0] if hints else 0
            message = f"somebody else trimmed records {before} to {base - 1}; all of them are in shards"
            place = place._replace(faults=[self._fault("foreign_trim", base, message, lost=False)])
        self._runs(view, base, head.end)
        return place._replace(base=base, proven=base < head.end)

    def _search_bases(self, view: _Buffered, end: int) -> list[int]:
        """Return where in the epoch's shards the list could begin, so that all sealed records from there on follow."""
        view.rewind()
        first = next(read(view.read, SHA1), None)
        if first is None:
            return []
        start = self.spool.held_from
        sealed = read(_Pieces(self.spool.raw_from(start, end)).read, SHA1, first_index=start, verify=False)
        same = [record.index for record in sealed if record.raw == first.raw]
        return [base for base in same if self._runs(view, base, end)]

    def _decide(self, view: _Buffered, place: Place, observed: Values | None, fitting: list[int]) -> int:
        """Choose among bases that all fit: by the TPM, else by records that the kernel does not record twice.

        Raises :class:`HistoryError` ``foreign_trim`` or ``ambiguous_base``.
        """
        if observed:
            beyond = {base: self._beyond(view, place, base, observed) for base in fitting}
            reached = {base: count for base, count in beyond.items() if count is not None}
            # While the PCRs stand still, the right base is the one whose list leads to them with its last record.
            best = [base for base, count in reached.items() if count == 0]
            if len(best) == 1 and self.observe() == observed:
                return best[0]
            if reached:
                raise self._ambiguous(sorted(reached))
        inside = [base for base in fitting if base < place.cut]
        if not inside:
            raise self._foreign_trim(place.cut)
        if len(inside) > 1 or not self._telling(inside[0], place.cut):
            raise self._ambiguous(fitting)
        return inside[0]

    def _beyond(self, view: _Buffered, place: Place, base: int, observed: Values) -> int | None:
        """Return how many records follow the point at which the list, begun at ``base``, reaches the TPM's values.

        Those of the observed PCRs count. None: it never does.
        """
        self._runs(view, base, place.cut)
        # The others prove nothing: nobody asked the TPM for them.
        records = (each for each in read(view.read, SHA1, first_index=place.cut) if str(each.pcr) in observed)
        match = search(records, [], place.start, observed, padded=place.padded)
        return None if match.reached_at is None else match.records - match.reached_at

    def _telling(self, base: int, end: int) -> bool:
        """Say whether the sealed records hold one that the kernel records only once: no violation, no flushed table."""
        records = read(_Pieces(self.spool.raw_from(base, end)).read, SHA1, first_index=base, verify=False)
        return not self.lists.records_recur() and any(not record.violation for record in records)

    def _ambiguous(self, bases: list[int]) -> HistoryError:
        return HistoryError(
            f"The list could begin at any of the records {bases[:10]}: equal records follow each other",
            reason="ambiguous_base",
            index=bases[0],
            boot_id=self.boot_id,
            kept="everything",
            hint="run again when less is being measured; nothing is deleted or numbered on a guess",
        )

    def _leads_to(self, view: _Buffered, place: Place, observed: Values) -> bool:
        """Say whether the rest of the list, replayed from the cut, reaches the TPM's values."""
        return self._beyond(view, place, place.base, observed) is not None

    def _carried_over(self, view: _Buffered, observed: Values | None, head: Entry) -> bool:
        """Say whether this boot's list begins with the last one's records: a kexec that carried the list over.

        Two kernels that measured the same may look like one that was carried over: with a TPM, its values decide.
        """
        if self._was_reset(head):
            return False
        manifest = self.spool.manifest(head)
        place = Place(head.end, head.end, manifest["pcrs_end"], manifest["padded"], True, [])
        for base in dict.fromkeys([*self._hints(head.end), *self._search_bases(view, head.end), head.end]):
            if self._runs(view, base, head.end):
                # A reboot may measure the same files in the same order; only a kexec puts another boot_aggregate
                # behind them.
                records = read(view.read, SHA1, first_index=head.end)
                starts = [starts_boot(record, SHA1.byte_order) for record in itertools.islice(records, 1)]
                if (base < head.end or starts == [False]) and any(
                    starts + [starts_boot(each, SHA1.byte_order) for each in records]
                ):
                    if observed is None or self._beyond(view, place, base, observed) is not None:
                        return True
        return False

    def _new_epoch(self, view: _Buffered, observed: Values | None, head: Entry | None) -> Place:
        """This boot's list from index 0; with a TPM, find the padded banks and whether it begins at zero."""
        view.rewind()
        first = next(read(view.read, SHA1), None)
        self._check_first(first, head)
        place, faults = Place(0, 0, {}, [], True, []), []
        if observed:
            view.rewind()
            match = search(read(view.read, SHA1), [], {}, observed)
            place = place._replace(padded=match.padded)
            if match.reached_at is None and head is not None and not self._was_reset(head):
                continued = self._continued(view, observed, head)
                if continued:
                    return continued
                faults = [
                    self._fault(
                        "kexec",
                        head.end,
                        "the TPM's PCRs go back before this boot's list, as after a kexec that did not "
                        f"carry the list over: the records from index {head.end} on are lost",
                        boot_id=head.boot_id,
                    )
                ]
            elif match.reached_at is None:
                faults = [self._fault("pcr_mismatch", 0, "the list, replayed from zero, never reaches the TPM's PCRs")]
        view.rewind()
        return place._replace(faults=faults)

    def _was_reset(self, head: Entry) -> bool:
        """Say whether the TPM's reset counter tells that this boot is not a kexec of the last one."""
        before = self.spool.manifest(head)["reset_count"]
        return before is not None and self.reset_count is not None and before != self.reset_count

    def _check_first(self, first: Record | None, head: Entry | None) -> None:
        if first is None:
            raise ListError(
                "The kernel's list is empty, and this boot has no shard: IMA is off, or somebody deleted the records",
                reason="empty_list",
                boot_id=self.boot_id,
                index=0,
                hint="look at the kernel's command line and at what else trims the list on this host",
            )
        if not starts_boot(first, SHA1.byte_order):
            raise self._foreign_trim(0)

    def _continued(self, view: _Buffered, observed: Values, head: Entry) -> Place | None:
        """A kexec without carry-over that lost nothing: every record had been trimmed or exported before it."""
        manifest = self.spool.manifest(head)
        place = Place(head.end, head.end, manifest["pcrs_end"], manifest["padded"], True, [])
        if not self._leads_to(view, place, observed):
            return None
        view.rewind()
        return place

    def _fault(self, reason: str, index: int, message: str, *, lost: bool = True, boot_id: str | None = None) -> Fault:
        return {
            "reason": reason,
            "boot_id": boot_id or self.boot_id,
            "index": index,
            "found": self.boot_id,
            "lost": lost,
            "message": message,
        }

    def _foreign_trim(self, index: int) -> HistoryError:
        message = f"records from index {index} on left the kernel before any shard held them: somebody else trimmed"
        return HistoryError(
            f"The measurement list does not continue what was exported: {message}",
            reason="foreign_trim",
            index=index,
            boot_id=self.boot_id,
            kept="all shards, and what the kernel still holds",
            hint="find out what else writes to the list (audit securityfs); the history goes on at the next boot",
        )

    def observe(self) -> Values | None:
        """Return the TPM's values of PCR 10 and of the other PCRs seen so far, read twice alike; None without TPM.

        To be read before the list: a record is listed before it is extended, so the list may be ahead, never behind.
        """
        files = self.lists.files
        head = self.spool.head
        known = (
            self.spool.manifest(head)["pcrs_end"].get("10", BANKS) if head and head.boot_id == self.boot_id else BANKS
        )
        banks = [bank for bank in files.tpm_banks() if bank in known]
        # Those of the boot before, too: after a kexec they tell of what was lost. After a reset they are zero.
        seen = set(self.spool.manifest(head)["pcrs_end"]) if head else set()
        pcrs = sorted(seen | {"10"}, key=int)

        def values() -> Values:
            found = {pcr: {bank: files.pcr(bank, int(pcr)) for bank in banks} for pcr in pcrs}
            return {pcr: {bank: value.hex() for bank, value in row.items() if value} for pcr, row in found.items()}

        if not any(files.pcr(bank, 10) != bytes(BANKS[bank]) for bank in banks):
            return None  # IMA began before the TPM's driver, and extends nothing: as good as no TPM
        before = values() if banks else {}
        for _attempt in range(_ATTEMPTS if banks else 0):
            after = values()
            if after == before:
                return after if after["10"] else None  # the TPM's driver went away after it had named its banks
            before = after
        return None

    # -- export -----------------------------------------------------------------------------------------------------

    def export(self, limit: int | None = None, stop: bytes | None = None) -> Export:
        """Seal what the kernel holds beyond the cut, in at most ``limit`` shards, up to the record named ``stop``.

        Raises :class:`HistoryError`, ``ListError``, :class:`SpoolError`, ``WriteError``, ``KernelError``.
        """
        notes = self.spool.recover()
        self._require_name()
        self.spool.require_room(_RECORD_STORED * self.lists.count() + _ROOM)
        if self.flavour == STAGED and self.config.trim_after != "never" and not self.blocked():
            notes += self._stage()
        observed = self.observe()
        # Before the list is read: what comes meanwhile is then taken for new once more, never for sealed.
        counted = self.lists.count() if self.flavour == STAGED else 0
        drafts: list[_Draft] = []
        try:
            with self.lists.view() as file:
                view = _Buffered(file)
                place = self._locate_noting(view, observed)
                if (limit, stop) != (None, None) and observed and not place.proven:
                    self._prove(view, place, observed)
                copy = self._copy(view, place, observed, limit, stop, drafts)
            entries = self._seal(place, copy, drafts, observed)
        finally:
            for draft in drafts:
                draft.shard.discard()
        cut = entries[-1].end if entries else place.cut
        live = {"live": max(place.base, cut - counted) if copy.at_end else cut} if self.flavour == STAGED else {}
        self.spool.write_journal(boot_id=self.boot_id, base=place.base, trim=None, seal=None, **live)
        said = follow(self.config.stitched, self.spool) if self.config.stitched else []
        self.warnings += [text for text in said if text not in self.warnings]
        notes += said
        return Export(entries, sum(entry.count for entry in entries), place.base, cut, copy.more, notes)

    def _require_name(self) -> None:
        head = self.spool.head
        if head is not None and self.spool.manifest(head)["name"] != self.config.name:
            raise SpoolError(
                f"The spool holds the history of {self.spool.manifest(head)['name']!r:.260}, the config's name is "
                f"{self.config.name!r:.260}",
                reason="host_renamed",
                path=self.config.path,
                kept="everything",
                hint="give the config its old name back, or begin a new spool under the new name",
            )

    def _stage(self) -> list[str]:
        """Set the live list aside, unless a dead run already did: that list is exported and deleted first.

        Who has the list open keeps it from being set aside, and not from being read: then it is exported where it is.
        """
        with self.lists.reader(staged=True) as file:
            if file.read(1):
                return ["found a staged list that an earlier run left"]
        try:
            with self.lists.writer(staged=True) as file:
                self.lists.stage(file)
        except KernelError as error:
            if error.reason != "list_busy":
                raise
            self.busy = error
            return [f"nothing can be deleted: {error.msg}"]
        return []

    def _locate_noting(self, view: _Buffered, observed: Values | None) -> Place:
        try:
            return self.locate(view, observed)
        except HistoryError as error:
            if error.reason == "foreign_trim":
                self._note_fault(self._fault("foreign_trim", error.details["index"], error.msg))
            raise

    def _prove(self, view: _Buffered, place: Place, observed: Values) -> None:
        """Before a piece is sealed and deleted whose end is not the list's, let the whole list speak for its place."""
        if not self._leads_to(view, place, observed):
            error = self._foreign_trim(place.cut)
            self._note_fault(self._fault("foreign_trim", place.cut, error.msg))
            raise error
        self._runs(view, place.base, place.cut)

    def _note_fault(self, fault: Fault) -> None:
        faults = self.spool.journal()["faults"]
        if fault not in faults:
            self.spool.write_journal(faults=(faults + [fault])[:16])

    def _copy(
        self,
        view: _Buffered,
        place: Place,
        observed: Values | None,
        limit: int | None,
        stop: bytes | None,
        drafts: list[_Draft],
    ) -> _Copy:
        """Copy the records from the cut on into ``drafts``, durable under temporary names."""
        replay = Replay(self._banks(place), place.start, padded=place.padded)
        watch = _Watch(replay, observed, place.cut)
        tap = _Tap(read(view.read, SHA1, first_index=place.cut), stop)
        anchors = self._anchors()
        steps = replay.steps(tap)
        while limit is None or len(drafts) < limit:
            start, violations, draft = replay.values(), replay.violations, None
            for row in itertools.islice(steps, self.config.shard_records):
                record = tap.record
                if draft is None:
                    draft = _Draft(self.spool.new_shard(self.boot_id), record.index, start, violations)
                    drafts.append(draft)
                draft.shard.add(record.raw)
                watch.see(record, row)
                if anchors and len(draft.anchors) < MOST_ANCHORS:
                    draft.anchors += self._recognise(record, anchors)
            if draft is None:
                break
            draft.close(replay.values(), replay.violations)
        more = not tap.ended and next(tap, None) is not None
        return _Copy(tap.ended and not tap.stopped, more, watch.reached)

    def _banks(self, place: Place) -> list[str]:
        """The banks of the epoch; they do not change within it."""
        known = {bank for banks in place.start.values() for bank in banks} or {*self.lists.banks(), "sha1", "sha256"}
        return [bank for bank in BANKS if bank in known]

    def _anchors(self) -> dict[bytes, str]:
        """The anchors that this host made: path, as the kernel records it, and file name."""
        try:
            names = os.listdir(self.spool.anchors)
        except FileNotFoundError:
            return {}
        return {as_recorded(os.path.join(self.spool.anchors, name)): name for name in names if ANCHOR_NAME.match(name)}

    def _recognise(self, record: Record, anchors: dict[bytes, str]) -> list[dict[str, t.Any]]:
        name = anchors.get(event_name(record, SHA1.byte_order))
        if name is None or record.violation:
            return []
        algorithm, digest = file_digest(record, SHA1.byte_order)
        path = os.path.join(self.spool.anchors, name)
        if algorithm not in BANKS or _durable.digest_of(path, algorithm) != digest.hex():
            return []
        return [{"index": record.index, "sequence": int(name[:8]), "sha256": _durable.digest_of(path)}]

    def _judge(self, place: Place, copy: _Copy, observed: Values | None) -> list[Fault]:
        """Return the faults for the next manifest. Raises ``foreign_trim`` when the base was a hint and is not true."""
        faults: list[Fault] = self.spool.journal()["faults"] + place.faults
        if faults:
            # A run that died may have sealed them already, in any shard of its batch.
            told = [fault for entry in self.spool.entries for fault in self.spool.manifest(entry)["faults"]]
            faults = [fault for fault in faults if fault not in told][:15]
        if not (observed and copy.at_end and copy.reached is None) or any(fault["lost"] for fault in place.faults):
            return faults
        if not place.proven:
            error = self._foreign_trim(place.cut)
            self._note_fault(self._fault("foreign_trim", place.cut, error.msg))
            raise error
        if not self.blocked():
            message = "the list, replayed from its start, does not reach the TPM's PCRs any more"
            faults.append(self._fault("pcr_mismatch", place.cut, message))
        return faults

    def _seal(self, place: Place, copy: _Copy, drafts: list[_Draft], observed: Values | None) -> list[Entry]:
        faults = self._judge(place, copy, observed)
        entries: list[Entry] = []
        recipients = recipients_in(self.config.recipients) if self.config.recipients else []
        watched = _where_reached(drafts, copy.reached) if copy.at_end else None
        for draft in drafts:
            # Here, not earlier: no other program may be started while the list is open.
            draft.members.update(draft.shard.encrypt(recipients) if recipients else {})
            manifest = self._manifest(draft, place, [] if entries else faults)
            if draft is watched and observed:
                manifest["observed"] = {"pcrs": observed, "index": copy.reached}
            entries.append(self.spool.seal(draft.shard, manifest))
        if entries:
            self.spool.write_journal(faults=[])
        for fault in [] if entries else faults:
            self._note_fault(fault)
        return entries

    def _manifest(self, draft: _Draft, place: Place, faults: list[Fault]) -> Manifest:
        head = self.spool.head
        files = self.lists.files
        return dict(
            draft.members,
            version=1,
            machine_id=files.machine_id(),
            name=self.config.name,
            boot_id=self.boot_id,
            reset_count=self.reset_count,
            release=files.release(),
            flavour=self.flavour,
            emulated=files.emulated,
            sequence=head.sequence + 1 if head else 1,
            previous=self.spool.digest(head) if head else None,
            byte_order=SHA1.byte_order,
            padded=place.padded,
            observed=None,
            faults=faults,
            time=utc_now(),
        )

    def predict(self) -> tuple[Place, int]:
        """Return our place and the number of records that an export would seal; nothing is written (check mode)."""
        if self.spool.check():
            self._require_name()
        with self.tail() as tail:
            return tail.place, sum(1 for _record in tail.records)

    @contextlib.contextmanager
    def tail(self) -> t.Iterator[Tail]:
        """Open what the kernel holds beyond the cut, to be read and closed at once; nothing is written."""
        observed = self.observe() if self.spool.check() else None
        with self.lists.view() as file:
            view = _Buffered(file)
            place = self.locate(view, observed)
            yield Tail(place, read(view.read, SHA1, first_index=place.cut), observed)

    # -- anchor -----------------------------------------------------------------------------------------------------

    def anchor(self) -> Anchor:
        """Have the kernel measure a file that holds the aggregate at the cut, and find its record in the list.

        Running it again at the same cut finds the same anchor. Raises :class:`SpoolError` ``no_shard``.
        """
        head = self._head()
        digest = self.spool.digest(head)
        manifest = self.spool.manifest(head)
        content, name = anchor_content(manifest, digest), anchor_name(manifest, digest)
        path = os.path.join(self.spool.anchors, name)
        made = _durable.create(path, content)
        index = None if made else self._find(path, write=True)
        if index is None:
            with _durable.failing(path, "have the kernel measure"):
                self.lists.files.measure(path)
            index = self._find(path, write=True)
        return Anchor(name, _durable.digest_of(path), index, made)

    def _head(self) -> Entry:
        head = self.spool.head
        if head is None:
            raise SpoolError(
                f"The spool {self.spool.directory} has no shard yet",
                reason="no_shard",
                path=self.spool.directory,
                hint="export first (integrity.ima.ima_export)",
            )
        return head

    def _find(self, path: str, write: bool = False) -> int | None:
        """Return the index of the record of an anchor, which can only stand behind the cut.

        ``write``: a hole that is found on the way is noted in the journal, so that it outlives a reboot.
        """
        anchors = {as_recorded(path): os.path.basename(path)}
        observed = self.observe()
        with self.lists.view() as file:
            view = _Buffered(file)
            place = self._locate_noting(view, observed) if write else self.locate(view, observed)
            for record in read(view.read, SHA1, first_index=place.cut):
                if self._recognise(record, anchors):
                    return record.index
        return None

    def aggregate(self) -> dict[str, t.Any]:
        """Return the aggregate at the cut: PCR values, counts, chain head, and the text form of the 2023 proposal."""
        head = self._head()
        manifest = self.spool.manifest(head)
        epoch = [self.spool.manifest(entry) for entry in self.spool.epoch]
        return {
            "sequence": head.sequence,
            "index": head.end,
            "boot_id": head.boot_id,
            "machine_id": manifest["machine_id"],
            "records": sum(entry.count for entry in self.spool.entries),
            "violations": sum(each["violations"] for each in epoch),
            "pcrs": manifest["pcrs_end"],
            "padded": manifest["padded"],
            "aggregate_digest": self.spool.digest(head),
            "text": aggregate_text(manifest),
        }

    def quote(self, nonce: str) -> dict[str, t.Any]:
        """Return a quote over PCRs 0 to 9 and those that the list extends, bound to the head. Raises ``TpmError``.

        To be called with no list open: tpm2-tools are other processes.
        """
        head = self._head()
        manifest, digest = self.spool.manifest(head), self.spool.digest(head)
        machine_id, files = manifest["machine_id"], self.lists.files
        extra = _tpm.qualifying_data(nonce, machine_id, head.boot_id, head.sequence, digest)
        banks, pcrs = files.tpm_banks(), sorted(set(range(10)) | {int(pcr) for pcr in manifest["pcrs_end"]} | {10})
        for _attempt in range(_ATTEMPTS):
            attest, signature = _tpm.quote(_tpm.HANDLE, extra, banks, pcrs)
            values = {str(pcr): {bank: (files.pcr(bank, pcr) or b"").hex() for bank in banks} for pcr in pcrs}
            parsed = _tpm.parse_attest(attest)
            # The values are read after the quote: a record that came between makes them others than the signed ones.
            if _tpm.pcr_digest(values, parsed.selection, "sha256") == parsed.pcr_digest:
                break
        else:
            raise _tpm.TpmError("The PCRs kept changing while they were quoted", reason="pcrs_moving")
        encode = base64.b64encode
        return {
            "version": 1,
            "machine_id": machine_id,
            "boot_id": head.boot_id,
            "sequence": head.sequence,
            "manifest": digest,
            "nonce": nonce,
            "attest": encode(attest).decode("ascii"),
            "signature": encode(signature).decode("ascii"),
            "pcrs": values,
            "time": utc_now(),
        }

    # -- acknowledge and trim ---------------------------------------------------------------------------------------

    def acknowledge(self, sequence: int, digest: str, store: str, verdict: str = "") -> int:
        """Record that ``store`` holds the shards up to ``sequence``, whose manifest has ``digest`` there.

        A manifest commits to all before it, so one digest speaks for the whole chain. Return how many were new.
        Raises :class:`SpoolError` ``spool_behind_store`` or ``store_diverged``.
        """
        new = [entry for entry in self.covered(sequence, digest) if not self.spool.acknowledged(entry, verdict)]
        for entry in new:
            self.spool.acknowledge(entry, store, verdict, utc_now())
        return len(new)

    def covered(self, sequence: int, digest: str) -> list[Entry]:
        """Return the shards that a store has which has the one with that number under that digest.

        Raises :class:`SpoolError` ``spool_behind_store`` or ``store_diverged``.
        """
        entries = [entry for entry in self.spool.entries if entry.sequence <= sequence]
        head = self.spool.head
        if not entries or entries[-1].sequence != sequence:
            raise SpoolError(
                f"The store holds shard {sequence} of this host, the spool ends at {head.sequence if head else 'none'}",
                reason="spool_behind_store",
                sequence=sequence,
                path=self.spool.directory,
                kept="both",
                hint="the spool was emptied or restored from a backup: put back the host's files from the store (their "
                "names are the same in both); if it was removed on purpose, go on under a new name",
            )
        if self.spool.digest(entries[-1]) != digest:
            raise SpoolError(
                f"Shard {sequence} in the store is not the one in the spool (manifest {digest} there, "
                f"{self.spool.digest(entries[-1])} here)",
                reason="store_diverged",
                sequence=sequence,
                path=self.spool.directory,
                kept="both",
                hint="two histories claim one name: compare them before anything is removed",
            )
        return entries

    def blocked(self) -> Fault | None:
        """Return the fault for which nothing may be deleted in this epoch, if there is one."""
        head = self.spool.head
        here = head is not None and head.boot_id == self.boot_id
        boots = {entry.boot_id for entry in self.spool.epoch} if here else set()
        told = [fault for entry in self.spool.epoch for fault in self.spool.manifest(entry)["faults"]] if here else []
        for fault in told + self.spool.journal()["faults"]:
            if fault["lost"] and fault["found"] in boots | {self.boot_id}:
                return t.cast(Fault, fault)
        return None

    def allowed_to(self, base: int) -> int:
        """Return the index up to which the policy lets records leave the kernel.

        Until this boot has a shard of its own, none: the shards before it may hold the same records in the same order.
        """
        limit, policy = base, self.config.trim_after
        if self.spool.head is None or self.spool.head.boot_id != self.boot_id:
            return base
        for entry in self.spool.epoch:
            if entry.end > base:
                held = policy == "local" or self.store_has is None or entry.sequence <= self.store_has
                if entry.first > limit or not held or not self.spool.allowed(entry, policy):
                    break
                limit = entry.end
        return limit

    def anchor_indexes(self) -> list[int]:
        """Return the indexes of the epoch's anchors, the sealed ones and that of this cut, in order."""
        epoch = self.spool.epoch
        sealed = [anchor["index"] for entry in epoch for anchor in self.spool.manifest(entry)["anchors"]]
        open_ones = {
            self.find_anchor(anchor_name(self.spool.manifest(each), self.spool.digest(each))) for each in epoch[-2:]
        }
        return sealed + sorted(index for index in open_ones if index is not None and index not in sealed)

    def find_anchor(self, name: str) -> int | None:
        """Return the index at which the kernel recorded the anchor of that name, behind the cut."""
        path = os.path.join(self.spool.anchors, name)
        return self._find(path) if os.path.exists(path) else None

    def survey(self, write: bool = True) -> Place:
        """Find our place, and note it in the journal (unless this is check mode); nothing is sealed or deleted."""
        observed = self.observe()
        with self.lists.view() as file:
            place = self._locate_noting(_Buffered(file), observed) if write else self.locate(_Buffered(file), observed)
        if write:
            for fault in place.faults:
                self._note_fault(fault)
            self.spool.write_journal(boot_id=self.boot_id, base=place.base, trim=None)
        return place

    def prunable(self, now: float) -> list[Entry]:
        """Return the shards whose files retention lets go, oldest first.

        Never the newest; none without the store's recorded word (and the verdict, where the policy wants one); none
        whose records the kernel may still hold. ``now``: seconds since 1970.
        """
        pruned = self.spool.pruned
        held = [entry for entry in self.spool.entries if entry.sequence > pruned]
        manifests = [self.spool.manifest(entry) for entry in held]
        size = sum(manifest["stored_size"] for manifest in manifests)
        epoch, base = set(self.spool.epoch), self._surely_gone()
        going: list[Entry] = []
        policy = "verified" if self.config.trim_after == "verified" else "central"
        for entry, manifest in zip(held[:-1], manifests):
            if (entry in epoch and entry.end > base) or not self.spool.allowed(entry, policy):
                break
            if not self._over(len(held) - len(going), size, manifest["time"], now):
                break
            going.append(entry)
            size -= manifest["stored_size"]
        return self.spool.left_over() + going

    def _surely_gone(self) -> int:
        """Return the index before which the kernel holds nothing, whatever the journal says."""
        observed = self.observe()
        with self.lists.view() as file:
            view = _Buffered(file)
            place = self.locate(view, observed)
            head = self._head()
            if place.proven or place.cut != head.end:
                return place.base
            return min([place.base, *self._search_bases(view, head.end)])

    def _over(self, shards: int, size: int, sealed: str, now: float) -> bool:
        """Say whether any limit of the config is exceeded by what is kept from a shard sealed at that time on."""
        config = self.config
        old = config.keep_days is not None and now - seconds_of(sealed) > config.keep_days * 86400
        many = config.keep_shards is not None and shards > config.keep_shards
        return old or many or (config.keep_bytes is not None and size > config.keep_bytes)

    def require_trimmable(self) -> None:
        """Raise :class:`TrimError` ``policy_never``, ``export_only`` or the reason of the fault that forbids it."""
        fault = self.blocked()
        if self.config.trim_after == "never":
            raise TrimError("The policy is trim_after = never", reason="policy_never", path=self.config.path)
        if self.flavour == EXPORT_ONLY:
            raise TrimError(
                "This kernel cannot delete records (before Linux 7.2, or booted with ima_flush_htable and without "
                "CONFIG_IMA_STAGING)",
                reason="export_only",
                hint="nothing to do: exports and verdicts work all the same",
            )
        if fault:
            raise TrimError(
                f"Nothing is deleted in this boot: {fault['message']}",
                reason=fault["reason"],
                index=fault["index"],
                boot_id=fault["boot_id"],
                kept="what the kernel and the spool hold",
                hint="the next boot begins a sound history; this one keeps its fault in its manifests",
            )

    def trim(self, target: int | None = None) -> int:
        """Delete the records before index ``target`` (default: all that the policy allows); return how many.

        Only what is sealed, allowed by the policy, and byte-identical in the kernel. Raises :class:`TrimError`,
        :class:`HistoryError` ``head_changed``, :class:`KernelError`; after ``delete_unknown`` run the cycle again.
        """
        self.require_trimmable()
        base = self.spool.journal()["base"]
        count = self.trimmable(base, target)
        if not count:
            return 0
        if self.flavour == STAGED and self._staged():
            return self._trim_staged(base, base + count, exactly=target is not None)
        if not self.lists.can_delete_n():
            # Booted with ima_flush_htable: the next export stages the list, and that is deleted as a whole.
            return self._staged_whole(target is not None, base + count)
        return self._trim_head(base, base + count)

    def trimmable(self, base: int, target: int | None) -> int:
        """Return how many records may go. Raises :class:`TrimError` ``not_sealed``, ``not_acknowledged``."""
        limit = self.allowed_to(base)
        if target is not None and target > limit:
            raise self._not_allowed(target, limit)
        return max(0, (limit if target is None else target) - base)

    def _not_allowed(self, target: int, limit: int) -> TrimError:
        where, kept = f"Records {limit} to {target - 1} are", "all of them, in the kernel"
        if target > self._head().end or self._head().boot_id != self.boot_id:
            hint = "export first (integrity.ima.ima_export)"
            return TrimError(f"{where} not sealed in a shard", reason="not_sealed", index=limit, kept=kept, hint=hint)
        return TrimError(
            f"{where} sealed, but what trim_after = {self.config.trim_after} demands has not happened to them",
            reason="not_acknowledged",
            index=limit,
            kept=kept,
            hint="deliver the shards (integrity.ima.ima_rotate)",
        )

    def _staged(self) -> bool:
        with self.lists.reader(staged=True) as file:
            return bool(file.read(1))

    def _intend(self, base: int, target: int) -> None:
        self.spool.write_journal(
            boot_id=self.boot_id,
            base=base,
            trim={"base": base, "target": target, "manifest": self.spool.digest(self._head())},
        )

    def _trim_head(self, base: int, target: int) -> int:
        """Delete by number. Died before the write: the list is as it was. After it: its head is found by content."""
        with self.lists.writer() as file:
            if self._identical(file, base, target) != target:
                raise self._head_changed(base)
            self._intend(base, target)
            self.lists.delete(file, target - base)
        self.spool.write_journal(base=target, trim=None)
        return target - base

    def _identical(self, file: File, base: int, limit: int) -> int:
        """Compare the kernel's records, counted as the kernel has them, with the sealed ones from ``base`` on.

        Return the index after the last one, ``limit`` at the most. Raises :class:`HistoryError` ``head_changed``.
        """
        sealed = _Pieces(self.spool.raw_from(base, limit))
        for record in itertools.islice(read(_Buffered(file).read, SHA1, first_index=base), limit - base):
            if sealed.exactly(len(record.raw)) != record.raw:
                raise self._head_changed(record.index)
            base = record.index + 1
        return base

    def _trim_staged(self, base: int, limit: int, *, exactly: bool) -> int:
        """Delete the staged list, if every record of it may go. It cannot grow, so there is no number to get wrong."""
        with self.lists.writer(staged=True) as file:
            target = self._identical(file, base, limit)
            file.rewind()
            whole = sum(1 for _record in read(_Buffered(file).read, SHA1, verify=False)) == target - base
            if not whole or (exactly and target != limit):
                return self._staged_whole(exactly, limit)
            self._intend(base, target)
            self.lists.delete_staged(file)
        self.spool.write_journal(base=target, trim=None)
        return target - base

    @staticmethod
    def _staged_whole(asked: bool, limit: int) -> int:
        """The staged list goes as a whole: wait for the rest of it, or refuse what was asked for by number."""
        if asked:
            raise TrimError(
                f"The kernel deletes its staged list only as a whole, and that does not end at index {limit}",
                reason="staged_whole",
                index=limit,
                kept="everything",
                hint="trim to the cut; numbers and anchors work again when nothing is staged",
            )
        return 0

    def _head_changed(self, base: int) -> HistoryError:
        return HistoryError(
            f"The list's head is not byte-identical with the sealed records from index {base} on; nothing was deleted",
            reason="head_changed",
            index=base,
            boot_id=self.boot_id,
            kept="everything",
            hint="run the export again: it finds out whether somebody else trimmed",
        )


class _Pieces:
    """An iterator of byte strings as a ``read(size)`` source."""

    def __init__(self, pieces: t.Iterator[bytes]) -> None:
        self._pieces, self._rest = pieces, b""

    def read(self, size: int) -> bytes:
        data = self._rest or next(self._pieces, b"")
        self._rest = data[size:]
        return data[:size]

    def exactly(self, size: int) -> bytes:
        """Return ``size`` bytes, or fewer at the end."""
        data = b""
        while len(data) < size:
            piece = self.read(size - len(data))
            if not piece:
                break
            data += piece
        return data


class _Tap:
    """The records on their way to the replay: remembers the current one, stops before a named one."""

    def __init__(self, records: t.Iterator[Record], stop: bytes | None) -> None:
        self._records, self._stop = records, stop
        self.ended = self.stopped = False
        self.record: Record

    def __iter__(self) -> t.Iterator[Record]:
        return self

    def __next__(self) -> Record:
        record = None if self.ended else next(self._records, None)
        if record is not None and self._stop is not None and event_name(record, SHA1.byte_order) == self._stop:
            self.stopped, record = True, None
        if record is None:
            self.ended = True
            raise StopIteration
        self.record = record
        return record


class _Watch:
    """Looks for the index at which all observed PCR values hold at once."""

    def __init__(self, replay: Replay, observed: Values | None, cut: int) -> None:
        slots = list(enumerate(each.bank for each in replay.slots))
        targets = {
            int(pcr): [(slot, bytes.fromhex(banks[bank])) for slot, bank in slots if bank in banks]
            for pcr, banks in (observed or {}).items()
        }
        self._targets = {pcr: wanted for pcr, wanted in targets.items() if wanted}
        self._replay = replay
        self.reached: int | None = cut if self._hold() else None

    def _hold(self) -> bool:
        pairs = [(pcr, slot, value) for pcr, wanted in self._targets.items() for slot, value in wanted]
        return bool(pairs) and all(self._replay.row(pcr)[slot] == value for pcr, slot, value in pairs)

    def see(self, record: Record, row: list[bytes]) -> None:
        """Look at the values after ``record``."""
        wanted = self._targets.get(record.pcr)
        if self.reached is None and wanted and row[wanted[0][0]] == wanted[0][1] and self._hold():
            self.reached = record.index + 1


def as_recorded(path: str) -> bytes:
    """Return a path as the kernel writes it into a record (``ima_write_template_field_data``: spaces become ``_``)."""
    return os.fsencode(path).replace(b" ", b"_")
