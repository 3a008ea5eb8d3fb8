# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""Helpers of the tests of the controller's side: emulated hosts, rotations in one process, and forged stores."""

from __future__ import annotations

import base64
import copy
import gzip
import hashlib
import io
import json
import os
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _host, _protocol
from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._fleet import document, member
from ansible_collections.integrity.ima.plugins.module_utils._pcr import Replay
from ansible_collections.integrity.ima.plugins.module_utils._rotation import Rotation
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._shard import digest, entry_of
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore

FLAVOURS = ("export_only", "delete_n", "staged")
CHUNK = 4096
CAPTURES = os.path.join(os.path.dirname(__file__), "..", "..", "..", "fixtures", "captures")
Json = t.Dict[str, t.Any]


class Host:
    """An emulated host: its kernel, its config and spool, and the module ima_rotate on it, called in this process."""

    def __init__(
        self,
        directory: t.Any,
        name: str = "h",
        flavour: str = "delete_n",
        trim_after: str = "central",
        shard_records: int = 7,
        **parameters: t.Any,
    ) -> None:
        self.directory, self.name, self.flavour = str(directory), name, flavour
        self.kernel = os.path.join(self.directory, "kernel")
        self.spool = os.path.join(self.directory, "spool")
        self.config = os.path.join(self.directory, "snapshot.conf")
        os.makedirs(self.spool)
        _emulated.create(self.kernel, flavour=flavour, **parameters)
        self.configure(trim_after, shard_records)
        self.sent = 0  # bytes of shards that left the host
        self.rounds: list[Json] = []

    def configure(self, trim_after: str = "central", shard_records: int = 7, lock_timeout: int = 0) -> None:
        """Write the config."""
        with open(self.config, "w", encoding="utf-8") as file:
            file.write(
                f"[snapshot]\nname={self.name}\nspool={self.spool}\ntrim_after={trim_after}\n"
                f"shard_records={shard_records}\nlock_timeout={lock_timeout}\n"
                f"[list]\nsource=emulated\ndirectory={self.kernel}\nbusy_timeout=0\n"
            )
        os.chmod(self.config, 0o644)

    def grow(self, count: int) -> None:
        """Let the kernel record that many files."""
        _emulated.grow(self.kernel, count)

    def answer(self, one_round: Json, *, check: bool = False, anchor: bool = False, chunk_bytes: int = CHUNK) -> Json:
        """Run one round, and answer as the module would: JSON, and errors as ``failed``."""
        self.rounds.append(one_round)
        params = dict(copy.deepcopy(one_round), anchor=anchor, chunk_bytes=chunk_bytes)
        try:
            result = _host.rotate(_protocol.load(self.config), params, check)
        except ImaError as error:
            result = dict(error.result(), failed=True)
        text = json.dumps(result)
        self.sent += sum(len(base64.b64decode(chunk["data"])) for chunk in result.get("chunks", ()))
        return t.cast(Json, json.loads(text))

    def rotation(self, store: DirectoryStore, call: t.Any = None, **options: t.Any) -> Rotation:
        """Return a rotation that was not run yet."""
        check = options.pop("check", False)
        options = dict({"anchor": False, "chunk_bytes": CHUNK}, **options)

        def here(one_round: Json) -> Json:
            own = {key: value for key, value in options.items() if key in ("anchor", "chunk_bytes")}
            return self.answer(one_round, check=check, **own)

        return Rotation(store, self.name, call or here, options)

    def rotate(self, store: DirectoryStore, **options: t.Any) -> Json:
        """Run a rotation; return its result."""
        rotation = self.rotation(store, **options)
        rotation.run()
        return rotation.result()

    def live(self) -> int:
        """How many records the kernel still lists."""
        return int(_emulated.describe(self.kernel)["count"])

    def pcrs(self) -> Json:
        """What the emulated TPM has."""
        return t.cast(Json, _emulated.describe(self.kernel)["pcrs"])

    def recorded(self, boot: int = -1) -> bytes:
        """Everything that the kernel recorded in a boot, trimmed or not."""
        found = _emulated.recorded(self.kernel)[boot]
        with open(found.path, "rb") as file:
            return file.read(found.size)


def new_store(directory: t.Any) -> DirectoryStore:
    """Return an empty store."""
    os.makedirs(str(directory), exist_ok=True)
    return DirectoryStore(str(directory))


def tree(directory: str) -> dict[str, str]:
    """Return the SHA-256 of every file below a directory, and the names of the directories."""
    found = {}
    for root, directories, files in os.walk(directory):
        for name in directories:
            found[os.path.relpath(os.path.join(root, name), directory)] = "directory"
        for name in files:
            path = os.path.join(root, name)
            found[os.path.relpath(path, directory)] = file_sha256(path)
    return found


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file, or where it leads if it is a symbolic link."""
    if os.path.islink(path):
        return "-> " + os.readlink(path)
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def write_fleet(store: DirectoryStore, number: int, results: dict[str, t.Any], **changes: t.Any) -> str:
    """Write the fleet document of run ``number`` from results of rotations; return its name."""
    run = f"20260102T0304{number:02d}Z-{number:08x}"
    store.write_run(dict(document(run, {host: member(result) for host, result in results.items()}), **changes))
    return run


# -- forging: a store's history taken apart and put together again -------------------------------------------------


class Sealed:
    """One shard of a store, taken apart: the manifest, and the records' bytes."""

    def __init__(self, manifest: Json, raw: bytes) -> None:
        self.manifest, self.raw = manifest, raw

    @property
    def records(self) -> list[bytes]:
        """The records, one by one."""
        layout = ml.Layout(20, self.manifest["byte_order"])
        return [record.raw for record in ml.read(io.BytesIO(self.raw).read, layout, verify=False)]


def base(store: DirectoryStore, host: str = "h") -> str:
    """Return the directory of a host in a store."""
    return os.path.join(store.directory, "hosts", host)


def take(store: DirectoryStore, host: str = "h") -> list[Sealed]:
    """Take a host's history apart."""
    found = []
    for entry in store.entries(host):
        with store.open_shard(host, entry) as file:
            found.append(Sealed(store.manifest(host, entry), gzip.decompress(file.read())))
    return found


def paths(store: DirectoryStore, sealed: Sealed, host: str = "h") -> tuple[str, str]:
    """Return the paths of a shard and of its manifest."""
    entry = entry_of(sealed.manifest)
    return os.path.join(base(store, host), entry.shard), os.path.join(base(store, host), entry.manifest)


def write(path: str, data: bytes) -> None:
    """Write a file, whatever was there."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(data)


def zipped(raw: bytes) -> bytes:
    """Compress records as a host does, to the same bytes."""
    into = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=into, mtime=0) as file:
        file.write(raw)
    return into.getvalue()


def put(store: DirectoryStore, sealed: Sealed, host: str = "h", *, data: bytes | None = None) -> None:
    """Write a shard and its manifest as they are, over what was there; ``data``: other bytes for the manifest."""
    shard, manifest = paths(store, sealed, host)
    write(shard, zipped(sealed.raw))
    write(manifest, canonical(sealed.manifest) if data is None else data)


def describe(sealed: Sealed) -> None:
    """Make the manifest say what the bytes are."""
    stored = zipped(sealed.raw)
    sealed.manifest.update(
        size=len(sealed.raw),
        sha256=hashlib.sha256(sealed.raw).hexdigest(),
        stored_size=len(stored),
        stored_sha256=hashlib.sha256(stored).hexdigest(),
    )


def replayed(raw: bytes, start: Json) -> Json:
    """Return the PCR values after some records."""
    replay = Replay(["sha1", "sha256"], start)
    replay.run(ml.read(io.BytesIO(raw).read, verify=False))
    return t.cast(Json, replay.values())


def link(history: list[Sealed], *, pcrs: bool = True) -> None:
    """Re-hash everything: bytes, chain of manifests, and (if ``pcrs``) the PCR values from shard to shard."""
    head, end = None, {}
    for number, sealed in enumerate(history, 1):
        describe(sealed)
        sealed.manifest.update(previous=head, sequence=number)
        if pcrs:
            start = end if sealed.manifest["first"] else {}
            sealed.manifest["pcrs_end"] = end = replayed(sealed.raw, start)
            zeros = {"sha1": "00" * 20, "sha256": "00" * 32}
            sealed.manifest["pcrs_start"] = {pcr: start.get(pcr, zeros) for pcr in end}
            if sealed.manifest["observed"]:
                index = sealed.manifest["first"] + sealed.manifest["count"]
                sealed.manifest["observed"] = {"pcrs": end, "index": index}
        head = digest(canonical(sealed.manifest))


def forge(store: DirectoryStore, history: list[Sealed], host: str = "h", *, pcrs: bool = True) -> None:
    """Put a changed history in place of a host's, everything re-hashed."""
    for entry in store.entries(host):
        for name in (entry.shard, entry.manifest):
            os.unlink(os.path.join(base(store, host), name))
    link(history, pcrs=pcrs)
    for sealed in history:
        put(store, sealed, host)


def altered(raw: bytes) -> bytes:
    """Return a record of the same size about another file digest, with the right template digest."""
    record = next(ml.read(io.BytesIO(raw).read, verify=False))
    values = ml.fields(record, ml.SHA1.byte_order)
    values[0] = values[0][:-1] + bytes([values[0][-1] ^ 1])
    return ml.encode(record.pcr, record.template, values, ml.SHA1)


class Wire:
    """A ``call`` that lets a test change every answer, and counts."""

    def __init__(self, host: Host, change: t.Callable[[int, Json], t.Any], **options: t.Any) -> None:
        self.host, self.change, self.options = host, change, dict({"chunk_bytes": CHUNK}, **options)
        self.count = 0

    def __call__(self, one_round: Json) -> t.Any:
        self.count += 1
        return self.change(self.count, self.host.answer(one_round, **self.options))
