# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""Shards and manifests: their names, their bytes, and what follows from a manifest (aggregate, anchor)."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import os
import re
import typing as t
import zlib

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._encryption import CMS, encrypt
from ansible_collections.integrity.ima.plugins.module_utils._errors import ManifestError
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import Layout
from ansible_collections.integrity.ima.plugins.module_utils._schema import MANIFEST, canonical, parse

Manifest = t.Dict[str, t.Any]
SHARD_SUFFIX = ".ima.gz"
PLAIN_SUFFIX = ".plain.gz"
MANIFEST_SUFFIX = ".json"
BOOT_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_NAME = re.compile(r"([0-9]{8})-(0|[1-9][0-9]{0,15})-([1-9][0-9]{0,12})(\.ima\.gz|\.json)\Z")
# No deflate stream grows more than 1032 times (zlib's own bound); what claims more is a bomb.
_MOST_RATIO = 1040


@dataclasses.dataclass(frozen=True, order=True)
class Entry:
    """A sealed shard, as its names tell: ``<boot id>/<sequence, 8 digits>-<first index>-<count>``."""

    sequence: int
    first: int
    count: int
    boot_id: str

    @property
    def end(self) -> int:
        """The index after its last record."""
        return self.first + self.count

    @property
    def stem(self) -> str:
        """The name without its suffix, relative to the directory of shards."""
        return f"{self.boot_id}/{self.sequence:08d}-{self.first}-{self.count}"

    @property
    def shard(self) -> str:
        """The shard's name, relative to the directory of shards."""
        return self.stem + SHARD_SUFFIX

    @property
    def manifest(self) -> str:
        """The manifest's name, relative to the directory of shards."""
        return self.stem + MANIFEST_SUFFIX


def plain_of(path: str) -> str:
    """Return the path of the readable file beside an encrypted shard; it never leaves the host."""
    return path[: -len(SHARD_SUFFIX)] + PLAIN_SUFFIX


def entry_of(manifest: Manifest) -> Entry:
    """Return the entry whose names a (checked) manifest must have."""
    return Entry(manifest["sequence"], manifest["first"], manifest["count"], manifest["boot_id"])


def parse_name(boot_id: str, name: str) -> tuple[Entry, str] | None:
    """Return entry and suffix of a file name, or None for any other name."""
    match = _NAME.match(name)
    if not match or not BOOT_ID.match(boot_id):
        return None
    entry = Entry(int(match.group(1)), int(match.group(2)), int(match.group(3)), boot_id)
    return (entry, match.group(4)) if entry.sequence else None


def parse_manifest(data: bytes, what: str) -> Manifest:
    """Return the manifest in ``data``; :class:`ManifestError` as :func:`_schema.parse`, or ``manifest_values``."""
    manifest = parse(data, MANIFEST, what, ManifestError)
    if manifest["stored_size"] * _MOST_RATIO + 1024 < manifest["size"] or manifest["size"] < 33 * manifest["count"]:
        raise ManifestError(f"{what} gives sizes that no shard can have", reason="manifest_values")
    if sorted(manifest["pcrs_start"]) != sorted(manifest["pcrs_end"]):
        raise ManifestError(f"{what} does not give start and end for the same PCRs", reason="manifest_values")
    rows = [*manifest["pcrs_start"].values(), *manifest["pcrs_end"].values()]
    if not rows or any(sorted(row) != sorted(rows[0]) or not {"sha1", "sha256"} <= set(row) for row in rows):
        raise ManifestError(f"{what} does not give every PCR in the same banks", reason="manifest_values")
    return manifest


def digest(data: bytes) -> str:
    """Return the SHA-256 of a manifest's bytes: the aggregate digest of its host at that cut."""
    return hashlib.sha256(data).hexdigest()


def layout_of(manifest: Manifest) -> Layout:
    """Return the layout of the records in a shard: always the SHA-1 list."""
    return Layout(20, manifest["byte_order"])


class ShardFile:
    """A shard being written under a temporary name: ``add`` records, then ``close``, then ``publish``.

    The compressed bytes depend on the records alone (no name, no time in the header).
    """

    def __init__(self, path: str) -> None:
        self._file = _durable.NewFile(path)
        self._copy: _durable.NewFile | None = None
        self._stored = hashlib.sha256()
        self._raw = hashlib.sha256()
        self.count = self.size = 0
        self._gzip = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=t.cast(t.Any, self), mtime=0)

    def write(self, data: bytes) -> int:
        """Take compressed bytes from ``gzip``."""
        self._stored.update(data)
        return self._file.write(bytes(data))

    def flush(self) -> None:
        """Nothing to do: see :meth:`close`."""

    def add(self, raw: bytes) -> None:
        """Add one record, exactly as the kernel gave it."""
        self._raw.update(raw)
        self._gzip.write(raw)
        self.count += 1
        self.size += len(raw)

    def close(self) -> dict[str, t.Any]:
        """Make the bytes durable under the temporary name; return the members of the manifest that describe them."""
        self._gzip.close()
        self._file.seal()
        self._file.rest()
        return {
            "count": self.count,
            "size": self.size,
            "sha256": self._raw.hexdigest(),
            "stored_size": self._file.size,
            "stored_sha256": self._stored.hexdigest(),
        }

    def encrypt(self, recipients: list[str]) -> dict[str, t.Any]:
        """Make an encrypted copy, durable under a temporary name: what is delivered. Return its members.

        After :meth:`close`. Raises :class:`StoreError`: see :func:`_encryption.encrypt`.
        """
        self._copy = _durable.NewFile(self._file.path)
        stored = hashlib.sha256()

        def write(data: bytes) -> None:
            stored.update(data)
            t.cast(_durable.NewFile, self._copy).write(data)

        encrypt(self._file.temporary, recipients, write)
        self._copy.seal()
        self._copy.rest()
        return {"stored_size": self._copy.size, "stored_sha256": stored.hexdigest(), "encryption": CMS}

    def publish(self, path: str) -> bool:
        """Give it its name, which only now is known; False when it was there with these bytes.

        The readable file of an encrypted shard gets its own name first.
        """
        if self._copy is None:
            return self._file.publish_as(os.path.basename(path))
        self._file.publish_as(os.path.basename(plain_of(path)))
        return self._copy.publish_as(os.path.basename(path))

    def discard(self) -> None:
        """Forget it."""
        self._file.discard()
        if self._copy is not None:
            self._copy.discard()


class ShardReader:
    """The records' bytes of a shard as a ``read(size)`` source, in constant memory, checked against its manifest.

    Raises :class:`ManifestError` with reason ``shard_altered`` (digest or size differs from the manifest's),
    at the latest when the end is read.
    """

    def __init__(self, file: t.BinaryIO, manifest: Manifest, what: str) -> None:
        self._file, self._manifest, self._what = file, manifest, what
        # The manifest gives size and digest of what is stored: of an encrypted shard that is not what is read here.
        self._readable = "encryption" not in manifest
        self._inflate = zlib.decompressobj(wbits=31)
        self._raw, self._stored = hashlib.sha256(), hashlib.sha256()
        self._size = self._stored_size = 0
        self._done = False

    def read(self, size: int) -> bytes:
        """Return up to ``size`` bytes; empty only at the end, once everything was found to be as the manifest says."""
        while not self._done:
            pending = self._inflate.unconsumed_tail
            data = pending or self._file.read(_durable.CHUNK)
            if not pending:
                self._stored.update(data)
                self._stored_size += len(data)
            try:
                out = self._inflate.decompress(data, max(1, size))
            except zlib.error as error:
                raise self._altered(f"is not what gzip wrote ({error})") from None
            self._size += len(out)
            if self._size > self._manifest["size"] or self._stored_size > self._manifest["stored_size"]:
                raise self._altered("is longer than the manifest says")
            self._raw.update(out)
            if self._inflate.eof or not (data or out):
                self._finish()
            if out:
                return out
        return b""

    def _finish(self) -> None:
        self._done = True
        rest = self._file.read(1)
        if rest or self._inflate.unused_data or not self._inflate.eof:
            raise self._altered("ends too early" if not self._inflate.eof else "has bytes behind its end")
        found = (self._stored_size, self._stored.hexdigest(), self._size, self._raw.hexdigest())
        wanted = tuple(self._manifest[key] for key in ("stored_size", "stored_sha256", "size", "sha256"))
        if found[2:] != wanted[2:] or (self._readable and found != wanted):
            raise self._altered(
                f"has SHA-256 {found[3]} ({found[2]} bytes), the manifest says {wanted[3]} ({wanted[2]} bytes)"
            )

    def _altered(self, how: str) -> ManifestError:
        return ManifestError(
            f"Shard {self._what} (records {self._manifest['first']} to "
            f"{self._manifest['first'] + self._manifest['count'] - 1}) {how}",
            reason="shard_altered",
            kept="the file as it is",
            index=self._manifest["first"],
            sequence=self._manifest["sequence"],
            boot_id=self._manifest["boot_id"],
            hint="compare with the other copy (host's spool, central storage) before anything is removed",
        )


def check_stored(file: t.BinaryIO, manifest: Manifest, what: str) -> None:
    """Read a shard's file as it is stored; what can be read of it without a key must be as its manifest says.

    Raises :class:`ManifestError` ``shard_altered``.
    """
    if "encryption" not in manifest:
        reader = ShardReader(file, manifest, what)
        while reader.read(_durable.CHUNK):
            pass
        return
    found, size = hashlib.sha256(), 0
    for chunk in iter(lambda: file.read(_durable.CHUNK), b""):
        found.update(chunk)
        size += len(chunk)
    if (size, found.hexdigest()) != (manifest["stored_size"], manifest["stored_sha256"]):
        raise ManifestError(
            f"Shard {what} has SHA-256 {found.hexdigest()} ({size} bytes), the manifest says "
            f"{manifest['stored_sha256']} ({manifest['stored_size']} bytes)",
            reason="shard_altered",
            kept="the file as it is",
            index=manifest["first"],
            sequence=manifest["sequence"],
            boot_id=manifest["boot_id"],
            hint="compare with the other copy (host's spool, central storage) before anything is removed",
        )


def aggregate(manifest: Manifest, head: str) -> dict[str, t.Any]:
    """Return the aggregate at the cut behind ``manifest``, whose digest is ``head``."""
    return {
        "version": 1,
        "machine_id": manifest["machine_id"],
        "boot_id": manifest["boot_id"],
        "sequence": manifest["sequence"],
        "index": manifest["first"] + manifest["count"],
        "pcrs": manifest["pcrs_end"],
        "padded": manifest["padded"],
        "aggregate_digest": head,
    }


def aggregate_text(manifest: Manifest) -> str:
    """Return the aggregate in the form of the 2023 proposal, section D.1 (``snapshot_aggregate``)."""
    items = [
        f"{bank}:PCR{pcr}:{value}"
        for pcr, banks in sorted(manifest["pcrs_end"].items(), key=lambda item: int(item[0]))
        for bank, value in sorted(banks.items(), key=lambda item: len(item[1]))
    ]
    return f"Snapshot_Attempt_Count={manifest['sequence']};{','.join(items)};"


ANCHOR_NAME = re.compile(r"(?!0{8})[0-9]{8}-[0-9a-f]{16}\.aggregate\Z")


def anchor_content(manifest: Manifest, head: str) -> bytes:
    """Return the bytes of the anchor that holds the aggregate behind ``manifest``; unique per cut."""
    return aggregate_text(manifest).encode("ascii") + b"\n" + canonical(aggregate(manifest, head)) + b"\n"


def anchor_name(manifest: Manifest, head: str) -> str:
    """Return the anchor's file name, never used twice: sequence and chain head are in it."""
    return f"{manifest['sequence']:08d}-{head[:16]}.aggregate"
