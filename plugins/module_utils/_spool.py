# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The spool: shards and manifests on the host, the chain that they make, and what a dead run left.

Layout: ``format.json`` · ``journal.json`` · ``pruned.json`` · ``generation`` · ``lock`` · ``anchors/``
· ``shards/<boot id>/<stem>.ima.gz``, ``.json`` (the manifest: the commit) and ``.ack`` (the store's word). Only
presence is evidence: the journal is a hint. An *epoch* is a run of shards without a gap, from index 0 on; a new boot
begins one, a kexec that carries the list over does not.
"""

from __future__ import annotations

import base64
import collections
import itertools
import os
import re
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import ManifestError, SpoolError, WriteError
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import read
from ansible_collections.integrity.ima.plugins.module_utils._protocol import raise_generation, require_local
from ansible_collections.integrity.ima.plugins.module_utils._schema import (
    ACKNOWLEDGEMENT,
    JOURNAL,
    LIMIT,
    PRUNED,
    canonical,
    parse,
)
from ansible_collections.integrity.ima.plugins.module_utils._shard import (
    MANIFEST_SUFFIX,
    PLAIN_SUFFIX,
    SHARD_SUFFIX,
    Entry,
    Manifest,
    ShardFile,
    ShardReader,
    check_stored,
    digest,
    entry_of,
    layout_of,
    parse_manifest,
    parse_name,
    plain_of,
)

FORMAT = b'{"format":"integrity.ima spool","version":1}'
_ACK_SUFFIX = ".ack"
_PRUNED = "pruned.json"
_IGNORED = re.compile(r"\.|lost\+found\Z|(?:.*\.)?lock\Z")
_EMPTY_JOURNAL: dict[str, t.Any] = {
    "version": 1,
    "boot_id": None,
    "base": 0,
    "trim": None,
    "seal": None,
    "faults": [],
}


def _pieces(reader: ShardReader) -> t.Iterator[bytes]:
    return iter(lambda: reader.read(_durable.CHUNK), b"")


class Spool:
    """The spool in ``directory``. Its state is what is on the disk: make a new object after any error."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.shards = os.path.join(directory, "shards")
        self.anchors = os.path.join(directory, "anchors")
        self._entries: list[Entry] | None = None

    # -- opening ----------------------------------------------------------------------------------------------------

    def check(self) -> bool:
        """Look whether this is a spool that we can use; True when it is, False when it is an empty directory.

        Raises :class:`SpoolError` with reason ``spool_missing``, ``spool_foreign`` or ``newer_version``, and
        :class:`ConfigError` ``remote_file_system``.
        """
        if not os.path.isdir(self.directory):
            raise SpoolError(
                f"The spool {self.directory} does not exist",
                reason="spool_missing",
                path=self.directory,
                kept="everything: the kernel's list was not touched",
                hint="make it with the role's install tasks; if it was there before, find out who removed it first",
            )
        require_local(self.directory)
        found = self.small("format.json")
        if found == FORMAT:
            return True
        if found is None:
            names = [name for name in os.listdir(self.directory) if not _IGNORED.match(name)]
            if not names:
                return False
        newer = found is not None and found.startswith(FORMAT[:30]) and found != FORMAT
        raise SpoolError(
            f"{self.directory} is {'a spool of a newer version' if newer else 'not a spool, and not empty'}",
            reason="newer_version" if newer else "spool_foreign",
            path=self.directory,
            kept="everything in it",
            hint="update the collection on this host" if newer else "name an empty directory of its own for the spool",
        )

    def require_room(self, size: int) -> None:
        """Raise :class:`WriteError` ``no_space`` unless the file system has ``size`` bytes for us: before the list is
        opened, so that nobody is locked out for what cannot be finished.
        """
        found = os.statvfs(self.directory)
        free = found.f_bavail * found.f_frsize
        if free < size:
            raise WriteError(
                f"The spool {self.directory} has room for {free} bytes, an export may need {size}",
                reason="no_space",
                path=self.directory,
                kept="everything: the kernel's list was not touched",
                hint="free space on that file system and run again",
                needed=size,
                free=free,
            )

    def recover(self) -> list[str]:
        """Finish or set aside what a dead run left; the caller holds the lock. Return what was done, in words.

        Idempotent, and safe to kill at any call. A shard without manifest is complete (it was published after its
        ``fsync``) but not sealed: the journal holds the manifest that it was to get.
        """
        if not self.check():
            # Whoever made the directory may not have made its name durable.
            _durable.sync_directory(os.path.dirname(self.directory))
            _durable.create(os.path.join(self.directory, "format.json"), FORMAT)
        elif not os.path.isdir(self.shards):
            # The run that made it may have died between the name and its fsync.
            _durable.sync_directory(self.directory)
        for directory in (self.shards, self.anchors):
            _durable.make_directory(directory)
        done = [f"removed {n} temporary files" for n in [_durable.sweep(self.directory) + self._sweep()] if n]
        done += self._adopt()
        if self.head is not None:
            # The run that sealed the head may have died between the name and its fsync.
            _durable.sync_directory(os.path.join(self.shards, self.head.boot_id))
            _durable.sync_directory(self.shards)
            raise_generation(self.directory, self.head.sequence)
        return done

    def _sweep(self) -> int:
        return _durable.sweep(self.anchors) + sum(_durable.sweep(path) for path in self._boot_directories())

    def _boot_directories(self) -> list[str]:
        try:
            return [entry.path for entry in os.scandir(self.shards) if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            return []

    def _adopt(self) -> list[str]:
        done = []
        sealing = self.journal()["seal"]
        for orphan in self._orphans():
            path = os.path.join(self.shards, orphan.shard)
            if sealing and entry_of(sealing) == orphan and self._continues(sealing) and self._holds(path, sealing):
                _durable.sync_directory(os.path.dirname(path))
                _durable.sync_directory(self.shards)
                self._seal_manifest(sealing)
                done.append(f"sealed shard {orphan.sequence}, which a dead run had made durable")
            else:
                _durable.set_aside(path)
                done.append(f"set aside a shard without manifest ({orphan.stem})")
        # What an encrypted shard left that has no other file: its records were never sealed.
        names = {entry for entry, _suffix in self._names()}
        for plain in sorted(entry for entry in self._plain() if entry not in names):
            _durable.set_aside(plain_of(os.path.join(self.shards, plain.shard)))
            done.append(f"set aside the readable file of a shard that was not sealed ({plain.stem})")
        return done

    def _orphans(self) -> list[Entry]:
        found: dict[Entry, set[str]] = {}
        for entry, suffix in self._names():
            found.setdefault(entry, set()).add(suffix)
        return sorted(entry for entry, suffixes in found.items() if suffixes == {SHARD_SUFFIX})

    def _listed(self) -> t.Iterator[tuple[str, str]]:
        """Yield boot id and name of whatever lies among the shards."""
        for directory in self._boot_directories():
            for name in os.listdir(directory):
                yield os.path.basename(directory), name

    def _names(self) -> t.Iterator[tuple[Entry, str]]:
        return filter(None, itertools.starmap(parse_name, self._listed()))

    def _plain(self) -> t.Iterator[Entry]:
        plain = (
            (boot_id, name[: -len(PLAIN_SUFFIX)]) for boot_id, name in self._listed() if name.endswith(PLAIN_SUFFIX)
        )
        parsed = (parse_name(boot_id, stem + SHARD_SUFFIX) for boot_id, stem in plain)
        return (entry for entry, _suffix in filter(None, parsed))

    def _continues(self, manifest: Manifest) -> bool:
        head = self.head
        return (manifest["sequence"], manifest["previous"]) == (
            (head.sequence + 1, self.digest(head)) if head else (1, None)
        )

    @staticmethod
    def _holds(path: str, manifest: Manifest) -> bool:
        try:
            with open(path, "rb") as file:
                check_stored(file, manifest, path)
            if "encryption" in manifest:
                with open(plain_of(path), "rb") as file:
                    collections.deque(_pieces(ShardReader(file, manifest, path)), maxlen=0)
        except (ManifestError, FileNotFoundError):
            return False
        return True

    # -- the chain --------------------------------------------------------------------------------------------------

    @property
    def entries(self) -> list[Entry]:
        """The sealed shards in order. Raises :class:`SpoolError` ``spool_gap``, ``spool_fork`` or ``shard_missing``."""
        if self._entries is None:
            names = set(self._names())
            entries = sorted(entry for entry, suffix in names if suffix == MANIFEST_SUFFIX)
            if entries and entries[0].sequence != 1:
                raise self._fault("spool_gap", f"Shards 1 to {entries[0].sequence - 1} are missing", entries[0])
            for before, after in zip(entries, entries[1:]):
                self._adjacent(before, after)
            pruned = self.pruned_of(entries)
            for entry in entries:
                if (entry, SHARD_SUFFIX) not in names and entry.sequence > pruned:
                    raise self._fault("shard_missing", f"Shard {entry.sequence} has a manifest but no file", entry)
            self._entries = entries
        return self._entries

    def _adjacent(self, before: Entry, after: Entry) -> None:
        if after.sequence == before.sequence:
            raise self._fault("spool_fork", f"Two shards claim sequence {after.sequence}", after)
        if after.sequence != before.sequence + 1 or after.first not in (0, before.end):
            raise self._fault(
                "spool_gap",
                f"Between shard {before.sequence} (to index {before.end - 1}) and shard {after.sequence} "
                f"(from index {after.first}) something is missing",
                after,
            )

    def _fault(self, reason: str, what: str, entry: Entry) -> SpoolError:
        return SpoolError(
            f"{what} in {self.shards}",
            reason=reason,
            path=os.path.join(self.shards, entry.stem),
            index=entry.first,
            sequence=entry.sequence,
            boot_id=entry.boot_id,
            kept="everything that is there; the kernel's list too",
            hint="restore the missing files from the central storage, under the same names, then run again",
        )

    @property
    def head(self) -> Entry | None:
        """The newest sealed shard."""
        return self.entries[-1] if self.entries else None

    def pruned_of(self, entries: list[Entry]) -> int:
        """Return the sequence up to which files may be gone; 0 unless a statement about this very chain says so."""
        data = self.small(_PRUNED)
        try:
            said = parse(data, PRUNED, _PRUNED, SpoolError) if data else None
        except SpoolError:
            return 0
        known = [entry for entry in entries if said and entry.sequence == said["sequence"]]
        return said["sequence"] if said and known and self.digest(known[0]) == said["manifest"] else 0

    @property
    def pruned(self) -> int:
        """The sequence up to which the shards' files were removed; 0: none. Their manifests stay."""
        return self.pruned_of(self.entries)

    @property
    def held_from(self) -> int:
        """The index of the epoch's first record whose shard is still a file here."""
        pruned = self.pruned
        return next((entry.first for entry in self.epoch if entry.sequence > pruned), 0)

    @property
    def epoch(self) -> list[Entry]:
        """The shards of the newest epoch, in order."""
        entries = self.entries
        start = max((number for number, entry in enumerate(entries) if entry.first == 0), default=0)
        return entries[start:]

    def manifest_bytes(self, entry: Entry) -> bytes:
        """Return the bytes of a manifest."""
        data = self._small(self.manifest_path(entry))
        if data is None:
            raise self._fault("manifest_missing", f"The manifest of shard {entry.sequence} went away", entry)
        return data

    def manifest(self, entry: Entry) -> Manifest:
        """Return a manifest, checked. Raises :class:`ManifestError` (see :func:`_schema.parse`), ``manifest_name``."""
        path = self.manifest_path(entry)
        manifest = parse_manifest(self.manifest_bytes(entry), path)
        if entry_of(manifest) != entry:
            raise ManifestError(f"{path} describes another shard", reason="manifest_name", path=path)
        return manifest

    def digest(self, entry: Entry) -> str:
        """Return the SHA-256 of a manifest."""
        return digest(self.manifest_bytes(entry))

    def has(self, entry: Entry) -> bool:
        """Say whether a shard's file is here: it was not pruned."""
        return os.path.exists(os.path.join(self.shards, entry.shard))

    def small(self, name: str) -> bytes | None:
        """Return the content of a small file in the spool, or None."""
        return self._small(os.path.join(self.directory, name))

    def path(self, entry: Entry) -> str:
        """Return the path of a shard's file. Raises :class:`SpoolError` ``pruned``: only the store has it."""
        path = os.path.join(self.shards, entry.shard)
        if not self.has(entry) and entry.sequence <= self.pruned:
            raise SpoolError(
                f"Shard {entry.sequence} is needed, but was pruned from {self.directory}: a store had confirmed it",
                reason="pruned",
                path=self.directory,
                index=entry.first,
                sequence=entry.sequence,
                boot_id=entry.boot_id,
                kept="its manifest, and all newer shards",
                hint=f"take it from the store that pruned.json names, put it back as shards/{entry.shard}, run again",
            )
        return path

    def manifest_path(self, entry: Entry) -> str:
        """Return the path of a manifest."""
        return os.path.join(self.shards, entry.manifest)

    def reader(self, entry: Entry) -> tuple[t.BinaryIO, ShardReader]:
        """Return the open file of a shard (to be closed by the caller) and its checking reader."""
        path, manifest = self.path(entry), self.manifest(entry)
        path = plain_of(path) if "encryption" in manifest else path
        with _durable.failing(path, "open"):
            file = open(path, "rb")
        return file, ShardReader(file, manifest, path)

    def raw_from(self, index: int, end: int | None = None) -> t.Iterator[bytes]:
        """Yield the bytes of the newest epoch's records from ``index`` on, up to ``end``, in pieces."""
        for entry in self.epoch:
            if entry.end <= index or (end is not None and entry.first >= end):
                continue
            file, reader = self.reader(entry)
            with file:
                if index <= entry.first and (end is None or entry.end <= end):
                    yield from _pieces(reader)
                    continue
                layout = layout_of(self.manifest(entry))
                for record in read(reader.read, layout, first_index=entry.first, verify=False):
                    if record.index >= index and (end is None or record.index < end):
                        yield record.raw

    def chunk(self, entry: Entry, offset: int, size: int) -> dict[str, t.Any]:
        """Return ``size`` bytes of a shard's file from ``offset`` on, in base64."""
        path = self.path(entry)
        with _durable.failing(path, "read"), open(path, "rb") as file:
            file.seek(offset)
            data = base64.b64encode(file.read(size)).decode("ascii")
        return {"sequence": entry.sequence, "offset": offset, "data": data}

    # -- sealing ----------------------------------------------------------------------------------------------------

    def new_shard(self, boot_id: str) -> ShardFile:
        """Begin a shard of this boot, under a temporary name."""
        directory = os.path.join(self.shards, boot_id)
        _durable.make_directory(directory)
        return ShardFile(os.path.join(directory, "shard"))

    def seal(self, shard: ShardFile, manifest: Manifest) -> Entry:
        """Publish a closed shard, then its manifest: from here on it is part of the chain.

        If we died before the manifest, :meth:`recover` finishes with the one that the journal holds.
        """
        entry = entry_of(parse_manifest(canonical(manifest), "the new manifest"))
        self.write_journal(seal=manifest)
        shard.publish(os.path.join(self.shards, entry.shard))
        self._seal_manifest(manifest)
        raise_generation(self.directory, entry.sequence)
        return entry

    def _seal_manifest(self, manifest: Manifest) -> None:
        _durable.create(os.path.join(self.shards, entry_of(manifest).manifest), canonical(manifest))
        self._entries = None

    # -- the store's word -------------------------------------------------------------------------------------------

    def acknowledge(self, entry: Entry, store: str, verdict: str, now: str) -> bool:
        """Record durably that ``store`` holds a shard (and what the verifier said). False: it was recorded already."""
        if self.acknowledged(entry, verdict):
            return False
        word = {
            "version": 1,
            "sequence": entry.sequence,
            "manifest": self.digest(entry),
            "store": store,
            "verdict": verdict,
            "time": now,
        }
        _durable.replace(self._acknowledgement_path(entry), canonical(word))
        return True

    def acknowledged(self, entry: Entry, verdict: str) -> bool:
        """Say whether the store's word on a shard is recorded, and a verdict if one is to be recorded now."""
        before = self.acknowledgement(entry)
        return bool(before and (before["verdict"] or not verdict))

    def acknowledgement(self, entry: Entry) -> dict[str, t.Any] | None:
        """Return the store's word on a shard, if it gave one on this very manifest; a torn one counts as none."""
        data = self._small(self._acknowledgement_path(entry))
        try:
            word = parse(data, ACKNOWLEDGEMENT, self._acknowledgement_path(entry), SpoolError) if data else None
        except SpoolError:
            return None
        return word if word and word["manifest"] == self.digest(entry) else None

    def _acknowledgement_path(self, entry: Entry) -> str:
        return os.path.join(self.shards, entry.stem + _ACK_SUFFIX)

    def files(self) -> int:
        """Return how many shards have their files here."""
        return sum(map(self.has, self.entries))

    def left_over(self) -> list[Entry]:
        """Return the shards whose files are here although a pruning stated that they go: it died, or somebody
        put them back.
        """
        pruned = self.pruned
        return [entry for entry in self.entries if entry.sequence <= pruned and self.has(entry)]

    def _remove(self, sequence: int) -> int:
        files = [os.path.join(self.shards, entry.shard) for entry in self.entries if entry.sequence <= sequence]
        for path in files:
            _durable.remove(plain_of(path))
        return sum(_durable.remove(path) for path in files)

    def prune(self, entry: Entry, store: str, now: str) -> int:
        """Remove the shard files up to ``entry``, which ``store`` holds by its own word of now; return how many.

        The statement is durable before the first file goes; manifests and the store's words stay. If we died after
        it: the files that are left harm nobody, and go the next time.
        """
        word = {"version": 1, "sequence": entry.sequence, "manifest": self.digest(entry), "store": store, "time": now}
        if self.pruned < entry.sequence:
            _durable.replace(os.path.join(self.directory, _PRUNED), canonical(word))
        return self._remove(entry.sequence)

    def allowed(self, entry: Entry, trim_after: str) -> bool:
        """Say whether the policy lets the records of a sealed shard leave the kernel."""
        if trim_after == "local":
            return True
        word = self.acknowledgement(entry) if trim_after in ("central", "verified") else None
        return bool(word and (trim_after == "central" or word["verdict"]))

    # -- the journal ------------------------------------------------------------------------------------------------

    def journal(self) -> dict[str, t.Any]:
        """Return the journal, or an empty one when there is none that can be read: it is a hint, never evidence."""
        data = self.small("journal.json")
        try:
            journal = parse(data, JOURNAL, "the journal", SpoolError) if data else dict(_EMPTY_JOURNAL)
            if journal["seal"] is not None:
                parse_manifest(canonical(journal["seal"]), "the journal's manifest")
            return journal
        except (SpoolError, ManifestError):
            return dict(_EMPTY_JOURNAL)

    def write_journal(self, **changes: t.Any) -> None:
        """Change members of the journal, durably, if anything changes."""
        before = self.journal()
        after = dict(before, **changes)
        if after != before:
            _durable.replace(os.path.join(self.directory, "journal.json"), canonical(after))

    @staticmethod
    def _small(path: str) -> bytes | None:
        try:
            with open(path, "rb") as file:
                return file.read(LIMIT + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise WriteError(f"Cannot read {path}: {error.strerror}", reason="read_failed", path=path) from error
