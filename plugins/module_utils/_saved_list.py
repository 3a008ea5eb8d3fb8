# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""A saved measurement list, binary or ASCII, of any bank and byte order: what it replays to."""

from __future__ import annotations

import collections
import itertools
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, ListError
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import Record, detect, read, read_ascii
from ansible_collections.integrity.ima.plugins.module_utils._pcr import BANKS, Values, parse_values, search

_HEAD = 1 << 18


class SavedList:
    """The list in an open binary ``file``: its form, and its records as a stream.

    Raises :class:`ListError` with reason ``empty_list`` or ``not_a_list``; while it is read, ``malformed_list``.
    """

    def __init__(self, file: t.BinaryIO) -> None:
        layout = detect(file.read(_HEAD))
        file.seek(0)
        self.templates: t.Counter[str] = collections.Counter()
        self.ascii = layout is None
        records = read_ascii(file.read) if layout is None else read(file.read, layout)
        first = list(itertools.islice(records, 1))
        self.digest_size = len(first[0].digest)
        self.byte_order = layout.byte_order if layout else None
        self._records = itertools.chain(first, records)

    def __iter__(self) -> t.Iterator[Record]:
        for record in self._records:
            if len(record.digest) != self.digest_size:
                raise ListError(
                    f"record {record.index} at byte {record.offset}: a template digest of {len(record.digest)} bytes "
                    f"in a list of {self.digest_size}",
                    index=record.index,
                    offset=record.offset,
                )
            self.templates[record.template] += 1
            yield record


def aggregate_saved(path: str, banks: t.Sequence[str] | None, start: t.Any, expect: t.Any) -> dict[str, t.Any]:
    """Return records, violations, PCR values and where ``expect`` was reached, of the list in the file ``path``.

    Without ``banks``, those of ``expect`` and ``start``, else SHA-1 and SHA-256. Raises :class:`ListError` (with
    ``index`` and ``offset`` of the bad record), :class:`ImaError` ``no_file``, ``pcr_values`` or ``pcr_mismatch``; the
    last with the same result in its details.
    """
    begin, wanted = parse_values(start or {}, "start"), parse_values(expect or {}, "expect")
    named = {bank for values in (begin, wanted) for row in values.values() for bank in row}
    chosen = [bank for bank in BANKS if bank in (banks or named or ("sha1", "sha256"))]
    try:
        with open(path, "rb") as file:
            result = _replay(file, chosen, begin, wanted)
    except OSError as error:
        raise ImaError(f"Cannot read {path}: {error.strerror}", reason="no_file", path=path) from error
    except ListError as error:
        error.details["path"] = path
        raise
    if wanted and result["reached_at"] is None:
        raise ImaError(
            f"The {result['records']} records in {path} never reach the expected PCR values",
            reason="pcr_mismatch",
            path=path,
            hint="is 'start' what the PCRs had before the first record, and is the list complete?",
            **result,
        )
    return result


def _replay(file: t.BinaryIO, banks: list[str], start: Values, expect: Values) -> dict[str, t.Any]:
    saved = SavedList(file)
    match = search(saved, banks, start, expect, digest_size=saved.digest_size)
    return {
        "changed": False,
        "records": match.records,
        "violations": match.violations,
        "pcrs": match.pcrs,
        "reached_at": match.reached_at,
        "padded": match.padded,
        "templates": dict(saved.templates),
        "digest_size": saved.digest_size,
        "byte_order": saved.byte_order,
        "form": "ascii" if saved.ascii else "binary",
    }
