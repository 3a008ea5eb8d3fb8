# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""What every central store is: one layout, write-once names, and the rules for what a host may add.

Layout, the same in every store: ``hosts/<host>/<boot id>/<stem>.ima.gz`` and ``.json``,
``hosts/<host>/evidence/`` for what contradicts it, ``fleet/<run>.json``. ``<host>`` is the inventory's name,
percent-encoded; nothing that a host sends becomes part of a path before it was checked against the schema.
"""

from __future__ import annotations

import abc
import re
import typing as t
import urllib.parse

from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError
from ansible_collections.integrity.ima.plugins.module_utils._schema import FLEET, IDENTITY, canonical, parse
from ansible_collections.integrity.ima.plugins.module_utils._shard import (
    MANIFEST_SUFFIX,
    Entry,
    Manifest,
    digest,
    entry_of,
    parse_manifest,
)

MOST_STORED = 4 << 30  # bytes of one compressed shard
RUN = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}\Z")
_FLEET_LIMIT = 256 << 20


class Head(t.NamedTuple):
    """The newest shard of a host in a store: its manifest and the manifest's digest."""

    manifest: Manifest
    digest: str


def encode_name(name: str) -> str:
    """Return an inventory name as one safe path component (percent-encoding, a leading dot too)."""
    try:
        quoted = urllib.parse.quote(name, safe="")
    except UnicodeEncodeError:
        quoted = ""
    quoted = "%2E" + quoted[1:] if quoted.startswith(".") else quoted
    if not quoted or len(quoted) > 250:
        raise StoreError(f"{name!r:.300} cannot be the name of a host in a store", reason="host_name")
    return quoted


def decode_name(component: str) -> str | None:
    """Return the inventory name of a path component that :func:`encode_name` made, or None for any other."""
    name = urllib.parse.unquote(component, errors="replace")
    try:
        return name if encode_name(name) == component else None
    except StoreError:
        return None


class Store(abc.ABC):
    """A central store. ``name`` is what acknowledgements call it."""

    name: str

    @abc.abstractmethod
    def hosts(self) -> list[str]:
        """Return the inventory names of the hosts that have anything here, sorted."""

    @abc.abstractmethod
    def names(self, host: str) -> tuple[set[tuple[Entry, str]], list[str]]:
        """Return the shards and manifests of a host (entry, suffix), and every name that is neither."""

    @abc.abstractmethod
    def manifest_bytes(self, host: str, entry: Entry) -> bytes:
        """Return a manifest's bytes. :class:`StoreError` ``missing_manifest``."""

    @abc.abstractmethod
    def open_shard(self, host: str, entry: Entry) -> t.BinaryIO:
        """Return a shard's file. :class:`StoreError` ``missing_shard``."""

    @abc.abstractmethod
    def has_shard(self, host: str, entry: Entry) -> bool:
        """Say whether the file of a shard is here, with the size that its manifest gives."""

    @abc.abstractmethod
    def unfinished(self, host: str) -> tuple[str, int] | None:
        """Return the manifest digest of an unfinished delivery, and how many bytes of the shard are here."""

    @abc.abstractmethod
    def receive(self, host: str, manifest_digest: str, offset: int, data: bytes) -> None:
        """Take a chunk of an unfinished delivery."""

    @abc.abstractmethod
    def finish(self, host: str, manifest: Manifest) -> None:
        """Check a complete delivery against its manifest; publish shard, then manifest, durably, never overwriting."""

    @abc.abstractmethod
    def quotes(self, host: str) -> list[bytes]:
        """Return the quotes of a host, in the order of their names (the sequence comes first)."""

    @abc.abstractmethod
    def put_quote(self, host: str, quote: dict[str, t.Any]) -> None:
        """Keep a checked quote beside the manifest that it follows; never over another."""

    @abc.abstractmethod
    def identity_bytes(self, host: str) -> bytes | None:
        """Return what was recorded of a host's attestation key, or None."""

    @abc.abstractmethod
    def put_identity(self, host: str, data: bytes) -> bool:
        """Record a host's attestation key, durably, never over another. False: it was there with these bytes."""

    @abc.abstractmethod
    def keep_evidence(self, host: str, data: bytes) -> str:
        """Keep a manifest that contradicts what is here; return the name it got."""

    @abc.abstractmethod
    def evidence(self, host: str) -> list[str]:
        """Return the names of what :meth:`keep_evidence` kept."""

    @abc.abstractmethod
    def runs(self) -> list[str]:
        """Return the names of the fleet documents, oldest first."""

    @abc.abstractmethod
    def run_bytes(self, run: str) -> bytes:
        """Return the bytes of a fleet document."""

    @abc.abstractmethod
    def put_run(self, run: str, data: bytes) -> None:
        """Write a fleet document, whole or not at all, never over another."""

    # -- what follows from these ------------------------------------------------------------------------------------

    def entries(self, host: str) -> list[Entry]:
        """Return what the manifests' names say, in order of sequence."""
        return sorted(entry for entry, suffix in self.names(host)[0] if suffix == MANIFEST_SUFFIX)

    def manifest(self, host: str, entry: Entry) -> Manifest:
        """Return a manifest, checked. Raises :class:`ManifestError`, :class:`StoreError` ``manifest_name``."""
        manifest = parse_manifest(self.manifest_bytes(host, entry), f"manifest {entry.stem} of {host}")
        if entry_of(manifest) != entry:
            raise StoreError(
                f"Manifest {entry.stem} of {host} in {self.name} describes another shard", reason="manifest_name"
            )
        return manifest

    def open_shard_of(self, host: str, manifest: Manifest) -> t.BinaryIO:
        """Return the file of the shard that a manifest describes."""
        return self.open_shard(host, entry_of(manifest))

    def head(self, host: str) -> Head | None:
        """Return the newest shard of a host up to which all are here: what an acknowledgement may speak of."""
        whole: Entry | None = None
        for entry in self.entries(host):
            if entry.sequence != (whole.sequence if whole else 0) + 1 or not self.has_shard(host, entry):
                break
            whole = entry
        if whole is None:
            return None
        manifest = self.manifest(host, whole)
        return Head(manifest, digest(canonical(manifest)))

    def accept(self, host: str, data: bytes, head: Head | None) -> Manifest:
        """Check that ``data`` is the manifest that comes next for ``host``; return it.

        Raises :class:`ManifestError` (schema, canonical form), :class:`StoreError` with reason ``host_name``,
        ``machine_changed``, ``chain``, ``too_large`` or ``equivocation`` (another shard has this sequence here).
        """
        manifest = parse_manifest(data, f"the manifest that {host} sent")
        entry = entry_of(manifest)
        if manifest["name"] != host:
            raise self._refused(host, entry, "host_name", f"it calls itself {manifest['name']!r:.260}")
        if manifest["stored_size"] > MOST_STORED:
            raise self._refused(host, entry, "too_large", f"it has {manifest['stored_size']} bytes")
        for known in self.entries(host):
            if known.sequence == entry.sequence and digest(self.manifest_bytes(host, known)) != digest(data):
                kept = self.keep_evidence(host, data)
                raise self._refused(
                    host,
                    entry,
                    "equivocation",
                    f"another shard {entry.sequence} is here already; both are kept ({kept})",
                )
        if head is not None and manifest["machine_id"] != head.manifest["machine_id"]:
            raise self._refused(
                host, entry, "machine_changed", "it comes from another machine than the shards before it"
            )
        wrong = follows(manifest, head)
        if wrong:
            raise self._refused(host, entry, "chain", wrong)
        return manifest

    def _refused(self, host: str, entry: Entry, reason: str, why: str) -> StoreError:
        return StoreError(
            f"Shard {entry.sequence} of {host} was refused by {self.name}: {why}",
            reason=reason,
            sequence=entry.sequence,
            index=entry.first,
            boot_id=entry.boot_id,
            kept="what the store had; the shard on the host",
            hint="compare the host's spool with the store before anything is removed",
        )

    def identity(self, host: str) -> dict[str, t.Any] | None:
        """Return what was recorded of a host's attestation key, checked, or None."""
        data = self.identity_bytes(host)
        return parse(data, IDENTITY, f"the identity of {host}", StoreError) if data is not None else None

    def run(self, run: str) -> dict[str, t.Any]:
        """Return a fleet document, checked."""
        return parse(self.run_bytes(run), FLEET, f"fleet document {run} in {self.name}", StoreError, limit=_FLEET_LIMIT)

    def write_run(self, document: dict[str, t.Any]) -> None:
        """Write a fleet document under its own name, after checking it."""
        data = canonical(document)
        parse(data, FLEET, "the new fleet document", StoreError, limit=_FLEET_LIMIT)
        self.put_run(document["run"], data)


def follows(manifest: Manifest, head: Head | None) -> str:
    """Say why a manifest cannot be the one behind ``head``, or return an empty string.

    Either its boot begins (index 0, PCRs zero), or it goes on where the one before it ended.
    """
    before = head.manifest if head else None
    if manifest["sequence"] != (before["sequence"] + 1 if before else 1):
        return f"it has sequence {manifest['sequence']}, next would be {before['sequence'] + 1 if before else 1}"
    if manifest["previous"] != (head.digest if head else None):
        return "it names another manifest before it than the one that is here"
    zeros = all(set(value) == {"0"} for banks in manifest["pcrs_start"].values() for value in banks.values())
    if manifest["first"] == 0 and zeros and (before is None or before["boot_id"] != manifest["boot_id"]):
        return ""
    if before is None or manifest["first"] == 0:
        return "it does not begin a boot at index 0 with PCRs zero"
    if manifest["first"] != before["first"] + before["count"]:
        return f"it begins at index {manifest['first']}, the one before it ended at {before['first'] + before['count']}"
    for pcr, banks in manifest["pcrs_start"].items():
        expected = before["pcrs_end"].get(pcr) or {bank: "0" * len(value) for bank, value in banks.items()}
        if banks != expected:
            return f"PCR {pcr} does not begin where the one before it ended"
    if any(pcr not in manifest["pcrs_start"] for pcr in before["pcrs_end"]):
        return "it lacks a PCR that the one before it had"
    return ""
