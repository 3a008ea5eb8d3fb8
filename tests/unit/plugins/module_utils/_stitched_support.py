# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A host that keeps stitched lists, what they have to hold, and a reader that keeps one open."""

from __future__ import annotations

import os
import typing as t
from pathlib import Path

from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils import _stitched
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import Host, parse

NAMES = (_stitched.BINARY, _stitched.ASCII)


class Stitching(Host):
    """A host that keeps stitched lists."""

    def __init__(self, root: Path | str, *words: t.Any, lists: str = "lists", **more: t.Any) -> None:
        self.lists = os.path.join(str(root), lists)
        super().__init__(root, *words, **more)
        os.makedirs(self.lists, mode=0o750)

    def configure(self, **keys: str) -> None:
        super().configure(**keys)
        with open(self.conf, "a", encoding="utf-8") as file:
            file.write(f"[stitched]\ndirectory = {self.lists}\n")

    def path(self, name: str) -> Path:
        return Path(self.lists, name)

    def inodes(self) -> list[int]:
        return [self.path(name).stat().st_ino for name in NAMES]


def ascii_of(raw: bytes) -> bytes:
    return b"".join(ml.to_ascii(record, ml.SHA1.byte_order) for record in parse(raw))


def right(host: Stitching) -> None:
    """Both lists hold what the kernel recorded since the epoch began, up to the cut."""
    cut = Spool(host.spool).epoch[-1].end
    whole = b"".join(record.raw for record in parse(host.truth())[:cut])
    assert host.path(_stitched.BINARY).read_bytes() == whole, "the binary list is not what the kernel recorded"
    assert host.path(_stitched.ASCII).read_bytes() == ascii_of(whole), "the ASCII list is not what the kernel recorded"


class RustReader:
    """How rust-keylime's MeasurementList reads: one open file, seek to a known place, lines from an entry on."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._known: set[tuple[int, int]] = set()

    def read(self, nth: int) -> tuple[bytes, int]:
        entries, size = max((each for each in self._known if each[0] < nth), default=(0, 0))
        self._file.seek(size)
        data = self._file.read()
        offset, found = 0, None
        while True:
            found = data[offset:] if entries == nth else found
            end = data.find(b"\n", offset)
            if end < 0:
                break
            offset, entries = end + 1, entries + 1
        self._known.add((entries, size + offset))
        assert found is not None, "the verifier asked for an entry that the list had lost"
        return found, entries
