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

import contextlib
import errno
import fcntl
import os
import re
import time
import typing as t
import urllib.parse

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._encryption import decrypted
from ansible_collections.integrity.ima.plugins.module_utils._errors import (
    ManifestError,
    StoreError,
    WriteError,
    printable,
)
from ansible_collections.integrity.ima.plugins.module_utils._schema import (
    FLEET,
    IDENTITY,
    LIMIT,
    RETENTION,
    canonical,
    parse,
)
from ansible_collections.integrity.ima.plugins.module_utils._shard import (
    BOOT_ID,
    MANIFEST_SUFFIX,
    SHARD_SUFFIX,
    Entry,
    Manifest,
    ShardReader,
    check_stored,
    digest,
    entry_of,
    parse_manifest,
    parse_name,
)
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import seconds_of
from ansible_collections.integrity.ima.plugins.module_utils._store._objects import (
    FORMAT,
    FORMAT_NAME,
    NO_FILE,
    RETENTION_NAME,
    Objects,
    Signing,
)

MOST_STORED = 4 << 30  # bytes of one compressed shard
RUN = re.compile(r"[0-9]{8}T[0-9]{6}Z-[0-9a-f]{8}\Z")
_FLEET_LIMIT = 256 << 20
_SIZED = 100  # shards whose sizes are compared before a store's word is passed on: a manifest is read for each
_IDENTITY = "identity.json"
_EVIDENCE = "evidence"
_INCOMING = ".incoming"
_QUOTE = re.compile(r"[0-9]{8}-[0-9a-f]{16}\.quote\.json\Z")


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


class Store:
    """A central store over its objects. ``name`` is what acknowledgements call it.

    ``parts`` is a directory of this machine: unfinished deliveries and the locks between rotations lie there,
    in the layout of a store.
    """

    GONE = "expired in the store"  # what became of shards whose manifests stayed

    def __init__(self, objects: Objects, parts: str) -> None:
        self._objects, self._parts = objects, parts
        self.name = objects.name
        self.key: str | None = None  # the file of a private key that opens encrypted shards

    @staticmethod
    def _prefix(host: str) -> str:
        return f"hosts/{encode_name(host)}/"

    # -- hosts and their shards -------------------------------------------------------------------------------------

    def hosts(self) -> list[str]:
        """Return the inventory names of the hosts that have anything here, sorted."""
        return sorted(filter(None, map(decode_name, self._objects.folders("hosts/"))))

    def names(self, host: str) -> tuple[set[tuple[Entry, str]], list[str]]:
        """Return the shards and manifests of a host (entry, suffix), and every name that is neither."""
        known, other = self._sorted_out(self._objects.sizes(self._prefix(host)))
        return set(known), other

    @staticmethod
    def _sorted_out(sizes: dict[str, int]) -> tuple[dict[tuple[Entry, str], int], list[str]]:
        known: dict[tuple[Entry, str], int] = {}
        other = []
        for path, size in sizes.items():
            directory, _slash, name = path.partition("/")
            parsed = parse_name(directory, name)
            if parsed:
                known[parsed] = size
            elif not path.endswith("/") and path != _IDENTITY and directory != _EVIDENCE and not _QUOTE.match(name):
                other.append(printable(path))
        return known, sorted(other)

    def entries(self, host: str) -> list[Entry]:
        """Return what the manifests' names say, in order of sequence."""
        return sorted(entry for entry, suffix in self.names(host)[0] if suffix == MANIFEST_SUFFIX)

    def manifest_bytes(self, host: str, entry: Entry) -> bytes:
        """Return a manifest's bytes. :class:`StoreError` ``missing_manifest``, ``unreadable``."""
        try:
            return self._objects.read(self._prefix(host) + entry.manifest, LIMIT + 1)
        except OSError as error:
            raise self._missing(host, entry, "missing_manifest", "manifest", error) from error

    def rewritten(self, host: str) -> dict[str, bool] | None:
        """Return what of a host was removed or written again in the store: see :meth:`Objects.rewritten`."""
        return self._objects.rewritten(self._prefix(host))

    def open_shard(self, host: str, entry: Entry) -> t.BinaryIO:
        """Return a shard's file. :class:`StoreError` ``missing_shard``, ``unreadable``."""
        try:
            return self._objects.open(self._prefix(host) + entry.shard)
        except OSError as error:
            raise self._missing(host, entry, "missing_shard", "shard", error) from error

    def _missing(self, host: str, entry: Entry, reason: str, what: str, error: OSError) -> StoreError:
        if not isinstance(error, FileNotFoundError):
            reason = "unreadable"
        return StoreError(
            f"The {what} {entry.stem} of {host} (records {entry.first} to {entry.end - 1}) cannot be had "
            f"from {self.name}: {error.strerror}",
            reason=reason,
            index=entry.first,
            sequence=entry.sequence,
            boot_id=entry.boot_id,
            hint="look for it in the host's spool or in a copy of the store",
        )

    # -- deliveries -------------------------------------------------------------------------------------------------

    def _local(self, host: str) -> str:
        return os.path.join(self._parts, self._prefix(host).rstrip("/"))

    @contextlib.contextmanager
    def delivering(self, host: str) -> t.Iterator[None]:
        """Keep two rotations of one host apart. Raises :class:`StoreError` ``store_busy``."""
        self._objects.create(FORMAT_NAME, FORMAT)
        directory = self._local(host)
        _durable.make_directory(directory)
        flags = os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(os.path.join(directory, ".lock"), flags, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    raise
                raise StoreError(
                    f"Another rotation is delivering shards of {host} to {self.name}",
                    reason="store_busy",
                    path=directory,
                    kept="everything",
                    hint="let it end; rotations of one host do not overlap",
                ) from error
            if os.path.isdir(os.path.join(directory, _INCOMING)):
                _durable.sweep(os.path.join(directory, _INCOMING))
            self._objects.settle(self._prefix(host))
            yield
        finally:
            os.close(descriptor)

    def _part(self, host: str, manifest_digest: str) -> str:
        return os.path.join(self._local(host), _INCOMING, f"{manifest_digest}.part")

    def unfinished(self, host: str) -> tuple[str, int] | None:
        """Return the manifest digest of an unfinished delivery, and how many bytes of the shard are here."""
        directory = os.path.join(self._local(host), _INCOMING)
        for name in sorted(_durable.names(directory)):
            if re.match(r"[0-9a-f]{64}\.part\Z", name):
                return name[:64], os.lstat(os.path.join(directory, name)).st_size
        return None

    def receive(self, host: str, manifest_digest: str, offset: int, data: bytes) -> None:
        """Take a chunk of an unfinished delivery."""
        path = self._part(host, manifest_digest)
        directory = os.path.dirname(path)
        _durable.make_directory(directory)
        for name in _durable.names(directory) if offset == 0 else []:
            if name != os.path.basename(path):  # what an earlier rotation began and this one does not go on with
                os.unlink(os.path.join(directory, name))
        _durable.append_part(path, offset, data)

    def finish(self, host: str, manifest: Manifest) -> None:
        """Check a complete delivery against its manifest; publish shard, then manifest, durably, never overwriting.

        What does not fit its manifest is dropped, and has to be sent again.
        """
        data = canonical(manifest)
        entry = entry_of(manifest)
        part = self._part(host, digest(data))

        def check(file: t.BinaryIO) -> None:
            check_stored(file, manifest, f"{entry.stem} of {host}")

        shard = self._prefix(host) + entry.shard
        try:
            self._objects.create_from(shard, part, check, manifest["stored_size"], manifest["stored_sha256"])
        except (ManifestError, WriteError):
            with contextlib.suppress(OSError):
                os.unlink(part)
            raise
        self._objects.create(self._prefix(host) + entry.manifest, data)
        _durable.remove(part)

    def confirms(self, host: str, entry: Entry, manifest_digest: str) -> bool:
        """Say, from what the store itself has now, whether shard and manifest are here, whole and unaltered."""
        try:
            data = self.manifest_bytes(host, entry)
            manifest = parse_manifest(data, f"manifest {entry.stem} of {host}")
        except (ManifestError, StoreError) as error:
            if error.reason == "store_unavailable":
                raise
            return False
        name = self._prefix(host) + entry.shard
        size, sha256 = manifest["stored_size"], manifest["stored_sha256"]
        return digest(data) == manifest_digest and self._objects.confirms(name, size, sha256)

    def has(self, host: str, entry: Entry, manifest_digest: str) -> bool:
        """Say the same of what may not be here at all."""
        known = self.names(host)[0]
        here = {(entry, SHARD_SUFFIX), (entry, MANIFEST_SUFFIX)} <= known
        return here and self.confirms(host, entry, manifest_digest)

    def sign(self, host: str, manifest: Manifest) -> dict[str, t.Any] | None:
        """Return what a host needs to put an accepted manifest and its shard here itself; None: this store cannot.

        What is here already is not signed for: ``shard`` and ``document`` are None then, or ``url`` and ``headers``.
        Raises :class:`StoreError` ``exists_different`` when a name has other bytes.
        """
        if not isinstance(self._objects, Signing):
            return None
        data, entry = canonical(manifest), entry_of(manifest)
        wanted = {
            "shard": (entry.shard, manifest["stored_size"], manifest["stored_sha256"]),
            "document": (entry.manifest, len(data), digest(data)),
        }
        order: dict[str, t.Any] = {"sequence": entry.sequence, "manifest": digest(data), "store": self.name}
        for what, (name, size, sha256) in wanted.items():
            order[what] = None
            if self._objects.lacks(self._prefix(host) + name, size, sha256):
                url, headers = self._objects.sign(self._prefix(host) + name, size, sha256)
                order[what] = {"url": url, "headers": headers}
        return order

    # -- what lies beside the shards --------------------------------------------------------------------------------

    def quotes(self, host: str) -> list[bytes]:
        """Return the quotes of a host, in the order of their names (the sequence comes first)."""
        found = []
        for path in self._objects.sizes(self._prefix(host)):
            directory, _slash, name = path.partition("/")
            if BOOT_ID.match(directory) and _QUOTE.match(name):
                found.append((name, path))
        return [self._objects.read(self._prefix(host) + path, LIMIT + 1) for _name, path in sorted(found)]

    def put_quote(self, host: str, quote: dict[str, t.Any]) -> None:
        """Keep a checked quote beside the manifest that it follows; never over another."""
        data = canonical(quote)
        name = f"{quote['sequence']:08d}-{digest(data)[:16]}.quote.json"
        self._objects.create(f"{self._prefix(host)}{quote['boot_id']}/{name}", data)

    def identity_bytes(self, host: str) -> bytes | None:
        """Return what was recorded of a host's attestation key, or None."""
        try:
            return self._objects.read(self._prefix(host) + _IDENTITY, LIMIT + 1)
        except FileNotFoundError:
            return None

    def put_identity(self, host: str, data: bytes) -> bool:
        """Record a host's attestation key, durably, never over another. False: it was there with these bytes."""
        self._objects.create(FORMAT_NAME, FORMAT)
        return self._objects.create(self._prefix(host) + _IDENTITY, data)

    def keep_evidence(self, host: str, data: bytes) -> str:
        """Keep a manifest that contradicts what is here; return the name it got."""
        name = f"{_EVIDENCE}/{digest(data)}.json"
        self._objects.create(self._prefix(host) + name, data)
        return name

    def evidence(self, host: str) -> list[str]:
        """Return the names of what :meth:`keep_evidence` kept."""
        names = (path.partition("/") for path in self._objects.sizes(self._prefix(host)))
        return sorted(printable(name) for directory, _slash, name in names if directory == _EVIDENCE and name)

    # -- fleet documents --------------------------------------------------------------------------------------------

    def runs(self) -> list[str]:
        """Return the names of the fleet documents, oldest first."""
        names = [name.rstrip("/") for name in self._objects.sizes("fleet/")]
        return sorted(name[:-5] for name in names if name.endswith(".json") and RUN.match(name[:-5]))

    def run_bytes(self, run: str) -> bytes:
        """Return the bytes of a fleet document."""
        try:
            return self._objects.read(f"fleet/{run}.json", _FLEET_LIMIT + 1)
        except OSError as error:
            raise StoreError(
                f"The fleet document {run} in {self.name} cannot be read: {error.strerror}", reason="fleet_document"
            ) from error

    def put_run(self, run: str, data: bytes) -> None:
        """Write a fleet document, whole or not at all, never over another."""
        self._objects.create(FORMAT_NAME, FORMAT)
        self._objects.create(f"fleet/{run}.json", data)

    # -- what follows from these ------------------------------------------------------------------------------------

    def manifest(self, host: str, entry: Entry) -> Manifest:
        """Return a manifest, checked. Raises :class:`ManifestError`, :class:`StoreError` ``manifest_name``."""
        manifest = parse_manifest(self.manifest_bytes(host, entry), f"manifest {entry.stem} of {host}")
        if entry_of(manifest) != entry:
            raise StoreError(
                f"Manifest {entry.stem} of {host} in {self.name} describes another shard", reason="manifest_name"
            )
        return manifest

    @contextlib.contextmanager
    def reading(self, host: str, manifest: Manifest) -> t.Iterator[ShardReader]:
        """Yield the records' bytes of a shard, checked, and decrypted with ``key`` where it is encrypted."""
        entry = entry_of(manifest)
        what = f"{entry.stem} of {host}"
        with self.open_shard(host, entry) as file:
            if "encryption" not in manifest:
                yield ShardReader(file, manifest, what)
                return
            check_stored(file, manifest, what)
        with self.open_shard(host, entry) as file, decrypted(file, self.key, what) as readable:
            try:
                yield ShardReader(readable, manifest, what)
            except ManifestError as error:
                # The stored bytes are the sealed ones, as was just seen.
                raise StoreError(
                    f"Shard {what} does not open to what its manifest says: this is not the key of a recipient, or the "
                    "host encrypted something else",
                    reason="not_decrypted",
                    index=entry.first,
                    sequence=entry.sequence,
                    boot_id=entry.boot_id,
                ) from error

    def head(self, host: str) -> Head | None:
        """Return the newest shard of a host up to which all are here: what an acknowledgement may speak of.

        All must have their names, but for those that expired; the newest ``_SIZED`` must have the sizes that their
        manifests give, too.
        """
        known, _other = self._sorted_out(self._objects.sizes(self._prefix(host)))
        expired = self._expired(host, known)
        run: list[Entry] = []
        for entry in sorted(entry for entry, suffix in known if suffix == MANIFEST_SUFFIX):
            here = entry.sequence <= expired or known.get((entry, SHARD_SUFFIX), NO_FILE) >= 0
            if entry.sequence != len(run) + 1 or not here:
                break
            run.append(entry)
        whole: Head | None = None
        for entry in run[-_SIZED:]:
            manifest = self.manifest(host, entry)
            if entry.sequence > expired and known[entry, SHARD_SUFFIX] != manifest["stored_size"]:
                before = run[: entry.sequence - 1][-1:]
                return whole or (self._head_at(host, before[0]) if before else None)
            whole = Head(manifest, digest(canonical(manifest)))
        return whole

    def expired(self, host: str) -> int:
        """Return the sequence up to which the store's lifecycle has removed shard files; 0: none."""
        return self._expired(host, self._sorted_out(self._objects.sizes(self._prefix(host)))[0])

    def _expired(self, host: str, known: dict[tuple[Entry, str], int]) -> int:
        """The files of the oldest shards may be gone, without a gap, when the store says that it keeps them so long."""
        days = self.retention_days()
        oldest: Entry | None = None
        for entry in sorted(entry for entry, suffix in known if suffix == MANIFEST_SUFFIX) if days else []:
            if (entry, SHARD_SUFFIX) in known or entry.sequence != (oldest.sequence if oldest else 0) + 1:
                break
            oldest = entry
        if oldest is None or days is None:
            return 0
        sealed = seconds_of(self.manifest(host, oldest)["time"])
        return oldest.sequence if time.time() - sealed > days * 86400 else 0

    def retention_days(self) -> int | None:
        """Return for how many days this store keeps shard files, as ``ima_store`` recorded it; None: for ever."""
        try:
            data = self._objects.read(RETENTION_NAME, LIMIT + 1)
        except FileNotFoundError:
            return None
        return int(parse(data, RETENTION, f"the retention of {self.name}", StoreError)["shard_days"])

    def _head_at(self, host: str, entry: Entry) -> Head:
        manifest = self.manifest(host, entry)
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
