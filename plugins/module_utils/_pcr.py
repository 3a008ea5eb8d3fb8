# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""PCR values from a measurement list: banks, extend, replay, violations, the padded mode, search.

``PCR := H(PCR || value)`` in each bank (TCG PC Client Platform TPM Profile; TPM 2.0 Library part 3, TPM2_PCR_Extend),
where ``value`` is (``ima_pcr_extend`` and ``ima_add_template_entry`` in security/integrity/ima/ima_queue.c):

* the template digest of the bank (Linux 5.8 and later),
* in a padded bank the SHA-1 template digest, filled with zeros: every bank before 5.8, and after it a bank whose hash
  the kernel could not allocate when IMA started (``ima_init_crypto`` in ima_crypto.c),
* for a violation 0xff as often as the bank's digest has bytes, in either mode.
"""

from __future__ import annotations

import hashlib
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import (
    DIGEST_SIZES,
    Record,
    hashed_data,
)

BANKS = {"sha1": 20, "sha256": 32, "sha384": 48, "sha512": 64}

# {"10": {"sha256": "<lower-case hex>"}}: the PCR number is decimal text, as in JSON.
Values = t.Dict[str, t.Dict[str, str]]

_PCRS: dict[int | str, str] = {key: str(number) for number in range(24) for key in (number, str(number))}
_HEX = frozenset("0123456789abcdef")


def parse_values(values: t.Any, what: str) -> Values:
    """Check PCR values that a user, a file or a host gave; ``what`` names them in the error.

    PCR numbers may be integers, digests upper case or with ``0x`` in front.
    Raises ``ImaError`` ``pcr_values``, with ``pcr`` and ``bank`` where they are known.
    """
    if not isinstance(values, dict):
        raise _bad_values(what, f"a mapping of PCR numbers is needed, not {type(values).__name__}")
    parsed: Values = {}
    for pcr, banks in values.items():
        number = _PCRS.get(pcr) if isinstance(pcr, (int, str)) and not isinstance(pcr, bool) else None
        if number is None:
            raise _bad_values(what, f"{_shown(pcr)} is not a PCR number (0 to 23)")
        if number in parsed:
            raise _bad_values(what, f"PCR {number} is given twice", pcr=number)
        if not isinstance(banks, dict):
            raise _bad_values(what, f"PCR {number} needs a mapping of banks", pcr=number)
        parsed[number] = {bank: _parse_digest(digest, number, bank, what) for bank, digest in banks.items()}
    return {pcr: parsed[pcr] for pcr in sorted(parsed, key=int)}


def _parse_digest(digest: t.Any, pcr: str, bank: t.Any, what: str) -> str:
    if not isinstance(bank, str) or bank not in BANKS:
        raise _bad_values(what, f"PCR {pcr}: {_shown(bank)} is not a bank ({', '.join(BANKS)})", pcr=pcr)
    text = digest.lower() if isinstance(digest, str) else ""
    text = text[2:] if text.startswith("0x") else text
    if len(text) != 2 * BANKS[bank] or not _HEX.issuperset(text):
        raise _bad_values(what, f"PCR {pcr}: {bank} needs {2 * BANKS[bank]} hexadecimal digits", pcr=pcr, bank=bank)
    return text


def _shown(key: t.Any) -> str:
    """A key in a message: only text is worth quoting, and any other may be endless."""
    return f"{key!r:.40}" if isinstance(key, str) else f"a key of type {type(key).__name__}"


def _bad_values(what: str, problem: str, **details: t.Any) -> ImaError:
    return ImaError(f"{what}: {problem}", reason="pcr_values", **details)


class _Slot(t.NamedTuple):
    """One bank in one mode."""

    bank: str
    padded: bool


class Replay:
    """Extends soft PCRs with records, all PCRs and banks in one pass.

    ``start`` holds the values before the first record (zeros where it says nothing); ``padded`` names the banks in
    padded mode; ``digest_size`` is that of the list the records come from, which must have been verified: the digest
    of its own bank is taken from the list.
    """

    records: int
    violations: int

    def __init__(
        self,
        banks: t.Sequence[str],
        start: Values | None = None,
        *,
        padded: t.Sequence[str] = (),
        digest_size: int = 20,
    ) -> None:
        self._prepare([_Slot(bank, bank in padded) for bank in dict.fromkeys(banks)], start, digest_size)

    def _prepare(self, slots: list[_Slot], start: Values | None, digest_size: int) -> None:
        self.records = 0
        self.violations = 0
        self.slots = slots
        self._digest_size = digest_size
        self._start = start or {}
        # Of each PCR the value in each slot.
        self.rows: dict[int, list[bytes]] = {}
        for pcr in self._start:
            self.row(int(pcr))

    def row(self, pcr: int) -> list[bytes]:
        """The values of ``pcr``, slot by slot; from now on it counts as seen."""
        if pcr not in self.rows:
            given = self._start.get(str(pcr), {})
            self.rows[pcr] = [bytes.fromhex(given.get(bank, "")) or bytes(BANKS[bank]) for bank, _padded in self.slots]
        return self.rows[pcr]

    def extend(self, record: Record) -> None:
        """One record."""
        self.run((record,))

    def run(self, records: t.Iterable[Record]) -> Replay:
        """All of ``records``; what the iterator raises passes through, with the records before it extended."""
        for _row in self.steps(records):
            pass
        return self

    def steps(self, records: t.Iterable[Record]) -> t.Iterator[list[bytes]]:
        """Extend record by record; gives the values of the record's PCR after each."""
        size, plan = self._digest_size, self._plan()
        zeros, rows = bytes(size), self.rows
        for _index, _offset, pcr, digest, template, data, _raw in records:
            row = rows.get(pcr) or self.row(pcr)
            if len(digest) != size:
                raise ValueError(f"a template digest of {len(digest)} bytes in a list of {size}")
            if digest == zeros:
                self.violations += 1
                for slot, extend, _measure, ones, _pad in plan:
                    row[slot] = extend(row[slot] + ones).digest()
            else:
                hashed = data if template != "ima" else hashed_data(template, data)
                for slot, extend, measure, _ones, pad in plan:
                    value = measure(hashed).digest() if measure else digest
                    row[slot] = extend(row[slot] + value + pad).digest()
            self.records += 1
            yield row

    def _plan(self) -> list[tuple[int, t.Any, t.Any, bytes, bytes]]:
        """Of each slot: number, bank's hash, hash of the template data (None: the list shows it), 0xff, padding."""
        plan = []
        for number, (bank, padded) in enumerate(self.slots):
            source = "sha1" if padded else bank
            measure = None if DIGEST_SIZES[self._digest_size] == source else getattr(hashlib, source)
            pad = bytes(BANKS[bank] - BANKS[source])
            plan.append((number, getattr(hashlib, bank), measure, b"\xff" * BANKS[bank], pad))
        return plan

    def values(self) -> Values:
        """Every PCR seen or given at the start, in every bank."""
        return self.values_of(range(len(self.slots)))

    def values_of(self, slots: t.Sequence[int]) -> Values:
        """The same, of some slots."""
        banks = [(slot, self.slots[slot].bank) for slot in slots]
        return {str(pcr): {bank: row[slot].hex() for slot, bank in banks} for pcr, row in sorted(self.rows.items())}


class Match(t.NamedTuple):
    """What a whole list gives.

    ``records`` and ``violations`` count all of it and ``pcrs`` are the values at its end; ``reached_at`` is the
    smallest number of records after which all expected values hold at once (None: never, or nothing was expected);
    ``padded`` names the banks whose values in ``pcrs`` are of the padded mode.
    """

    records: int
    violations: int
    pcrs: Values
    reached_at: int | None
    padded: list[str]


def search(
    records: t.Iterable[Record],
    banks: t.Sequence[str],
    start: Values | None = None,
    expect: Values | None = None,
    *,
    digest_size: int = 20,
    padded: t.Sequence[str] | None = None,
) -> Match:
    """Replay the list to its end, and find where the values in ``expect`` were reached.

    The list may be ahead of the PCRs (a record is listed before it is extended), never behind. ``padded`` names the
    padded banks; None tries both modes for each expected bank but SHA-1, one mode for all PCRs of a bank.
    """
    hunt = _Hunt(banks, start, expect or {}, digest_size, padded)
    replay = hunt.replay
    reached = 0 if hunt.holds() else None
    steps = replay.steps(records)
    if reached is None and expect:
        for row in steps:
            # Cheap first: a value that is expected somewhere must just have come up.
            if not hunt.wanted.isdisjoint(row) and hunt.holds():
                reached = replay.records
                break
    for _row in steps:
        pass
    names = sorted(bank for bank, slot in hunt.chosen.items() if replay.slots[slot].padded)
    pcrs = replay.values_of(list(hunt.chosen.values()))
    return Match(replay.records, replay.violations, pcrs, reached, names)


class _Hunt:
    """Which modes each bank is tried in, and which of them holds."""

    def __init__(
        self,
        banks: t.Sequence[str],
        start: Values | None,
        expect: Values,
        digest_size: int,
        padded: t.Sequence[str] | None,
    ) -> None:
        self.targets: dict[str, dict[int, bytes]] = {}
        for pcr, digests in expect.items():
            for bank, digest in digests.items():
                self.targets.setdefault(bank, {})[int(pcr)] = bytes.fromhex(digest)
        self.wanted = frozenset(value for targets in self.targets.values() for value in targets.values())
        slots = [_Slot(bank, bank in (padded or ())) for bank in dict.fromkeys([*banks, *self.targets])]
        # Of each bank the slot whose values are shown: per bank, unless the padded ones turn out to hold.
        self.chosen = {slot.bank: number for number, slot in enumerate(slots)}
        if padded is None:
            slots += [_Slot(bank, True) for bank in self.targets if bank != "sha1"]
        self.replay = Replay(())
        self.replay._prepare(slots, start, digest_size)

    def holds(self) -> bool:
        """Every expected value holds now; then ``chosen`` says in which mode."""
        found: dict[str, int] = {}
        for number, slot in reversed(list(enumerate(self.replay.slots))):
            targets = self.targets.get(slot.bank, {})
            if targets and all(self._value(pcr, number) == value for pcr, value in targets.items()):
                found[slot.bank] = number
        if not found or len(found) < len(self.targets):
            return False
        self.chosen.update(found)
        return True

    def _value(self, pcr: int, slot: int) -> bytes:
        return self.replay.row(pcr)[slot]
