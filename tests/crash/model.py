# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the model knows that the product does not: what each kernel recorded, who deleted what, and which faults it has.

The emulated kernel keeps all that it ever recorded. A :class:`Ledger` compares every sealed shard and every deletion
with that, and says of a store whether it is the truth.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import itertools
import json
import os
import shutil
import typing as t
import uuid

from ansible_collections.integrity.ima.plugins.action import ima_rotate
from ansible_collections.integrity.ima.plugins.module_utils import (
    _emulated,
    _fleet,
    _host,
    _protocol,
    _retention,
    _rotation,
    _schema,
    _shard,
    _snapshot,
    _spool,
    _verifier,
)
from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._shard import Entry
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._store import _base
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

Json = t.Dict[str, t.Any]
LEAST_CHUNK = 128  # so that shards of a few records travel in several chunks
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None


class Dropped(BaseException):
    """The controller is gone: nothing of it catches this."""


# -- speed: the same answers, sooner --------------------------------------------------------------------------------


def _remembering(real: t.Callable[..., Json]) -> t.Callable[..., Json]:
    """``parse`` is a function of the bytes and the schema: what it took once it takes again."""
    known: dict[tuple[bytes, int], bool] = {}

    def parse(data: bytes, schema: Json, *args: t.Any, **keywords: t.Any) -> Json:
        key = (data, id(schema))
        if key in known:
            return t.cast(Json, json.loads(data))
        if len(known) > 5000:
            known.clear()
        document = real(data, schema, *args, **keywords)
        known[key] = True
        return document

    return parse


@contextlib.contextmanager
def quick() -> t.Iterator[None]:
    """No disk, no waiting, small chunks, and the clock of the model."""
    undo: list[tuple[t.Any, str, t.Any]] = []

    def patch(owner: t.Any, name: str, value: t.Any) -> None:
        undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    patch(os, "fsync", lambda descriptor: None)
    patch(_emulated, "uuid", Identities)
    parse = _remembering(_schema.parse)
    for module in (_shard, _spool, _base, _verifier):
        patch(module, "parse", parse)
    patch(_protocol, "file_system", lambda path: "ext4")
    patch(_emulated.EmulatedFiles, "holders", lambda files: [])
    for module in (_host, _rotation):
        patch(module, "LEAST_CHUNK", LEAST_CHUNK)
    for module in (_snapshot, _rotation, _fleet):
        patch(module, "utc_now", Clock.now)
    try:
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)


class Identities:
    """Boot and machine ids that are the same in each run of a test."""

    number = 0

    @classmethod
    def uuid4(cls) -> uuid.UUID:
        """The next one. Their order is not that in which they were given."""
        cls.number += 1
        return uuid.UUID(bytes=hashlib.sha256(b"%d" % cls.number).digest()[:16])


class Clock:
    """The time that manifests and documents get; it may go back."""

    second = 0

    @classmethod
    def now(cls) -> str:
        """The time, as :func:`_snapshot.utc_now` writes it."""
        cls.second = (cls.second + 1) % 86400
        hours, rest = divmod(cls.second, 3600)
        return f"2026-01-02T{hours:02d}:{rest // 60:02d}:{rest % 60:02d}Z"


# -- the truth ------------------------------------------------------------------------------------------------------


class Boot:
    """What one kernel recorded, and the absolute indexes that its record 0 may have."""

    def __init__(self, boot_id: str, path: str, shifts: set[int]) -> None:
        self.boot_id, self.path, self.shifts = boot_id, path, shifts
        self.possible = shifts | {0}
        self._data, self._offsets = b"", [0]

    def _read(self) -> None:
        with open(self.path, "rb") as file:
            data = file.read()
        if len(data) > len(self._data):
            fresh = iter([data[len(self._data) :]])
            for record in ml.read(lambda size: next(fresh, b""), verify=False):
                self._offsets.append(self._offsets[-1] + len(record.raw))
            self._data = data

    def __len__(self) -> int:
        self._read()
        return len(self._offsets) - 1

    def raw(self, first: int, end: int) -> bytes:
        """The bytes of the records ``first`` to ``end - 1``, counted as this kernel does; b"" where there are none."""
        if end >= len(self._offsets):
            self._read()
        if not 0 <= first <= end < len(self._offsets):
            return b""
        return self._data[self._offsets[first] : self._offsets[end]]


class Ledger:
    """The truth about one host, and what the product made of it."""

    # The TPM's values are read of PCR 10 and of those that shards of this epoch have: the loss of the first records of
    # another PCR is not seen before more of them come.
    other_pcrs_unseen = True

    def __init__(self, host: support.Host, store: DirectoryStore, policy: str) -> None:
        self.host, self.store, self.policy = host, store, policy
        self.tpm = bool(self.state().banks)
        self.boots: dict[str, Boot] = {}
        self.epoch: set[str] = set()  # the boots that a kexec joined to this one
        self.holes: list[tuple[str, int, int]] = []  # what others deleted
        self.seen: dict[str, tuple[int, int, int]] = {}  # sealed files of the spool
        self.stored: dict[str, tuple[int, int, int]] = {}
        self.hazards: list[str] = []  # faults after which a verdict other than consistent is right
        self.blind = False  # a loss that the documents say cannot be seen
        self.lost: dict[str, str] = {}  # boot in which a loss can be seen: the loss
        self.named = ""  # the loss that the product named
        self.crashed = self.touched = False  # a process died; somebody else trimmed sealed records
        self.deleted = self.shards = 0
        self._begin(set(), {0})

    def state(self) -> _emulated.State:
        """The emulated kernel's state."""
        return _emulated._load(self.host.kernel)

    @property
    def boot(self) -> Boot:
        """The newest boot."""
        return self.boots[self.boot_id]

    def _begin(self, joined: set[str], shifts: set[int]) -> None:
        state = self.state()
        self.boot_id = state.boot_id
        self.boots[state.boot_id] = Boot(state.boot_id, os.path.join(self.host.kernel, state.recorded), shifts)
        self.epoch = joined | {state.boot_id}
        self.mark()

    @staticmethod
    def _first(state: _emulated.State) -> int:
        return state.staged[0] if state.staged is not None else state.live_index

    def mark(self) -> None:
        """What happened up to here was not the product's doing."""
        self.first = self._first(self.state())

    # -- what the world does ----------------------------------------------------------------------------------------

    def sealed_to(self) -> int:
        """Up to which record of this kernel, as it counts, shards hold everything."""
        head = Spool(self.host.spool).head
        if head is None or head.boot_id not in self.epoch:
            return 0
        return max(0, min(head.end - shift for shift in self.boot.shifts))

    def foreign_trim(self, count: int) -> bool:
        """Somebody else deletes; False when there is nothing."""
        self.note()
        state = self.state()
        count = min(count, state.count)
        if not count or self.host.flavour == "export_only" or state.flush_htable:
            return False
        start, end = state.live_index, state.live_index + count
        _emulated.foreign_trim(self.host.kernel, count)
        self.holes.append((state.boot_id, start, end))
        self.touched = True
        unsaved = end > self.sealed_to()
        if unsaved:
            self._loses("foreign_trim", self._believed(max(start, self.sealed_to()), end))
        elif not self.tpm or state.staged is not None:
            # Without a TPM the next record to come could be any; a staged list with a hole behind it fits nowhere.
            self.hazards.append("foreign_trim of sealed records")
        self.mark()
        return True

    def _believed(self, first: int, end: int) -> bool:
        """docs/concepts.md, limits: without a TPM a list that was trimmed to the cut may begin with any record."""
        spool = Spool(self.host.spool)
        if self.tpm:
            return self._unwatched(first, end, self._watched())
        head, journal = spool.head, spool.journal()
        hints = [journal["base"], journal["trim"]["target"] if journal["trim"] else -1]
        following = self.boot.raw(end, end + 1)
        return (head is not None and head.end in hints) or b"boot_aggregate" in following

    def _watched(self) -> set[str]:
        """The PCRs of which the TPM's values are read."""
        spool = Spool(self.host.spool)
        here = spool.head is not None and spool.head.boot_id in self.epoch
        return {"10"}.union(*(spool.manifest(each)["pcrs_end"] for each in spool.epoch if here))

    def _unwatched(self, first: int, end: int, watched: set[str]) -> bool:
        """Whether these records extended only PCRs that the product does not look at."""
        pieces = iter([self.boot.raw(first, end)])
        pcrs = {str(record.pcr) for record in ml.read(lambda size: next(pieces, b""), verify=False)}
        return self.other_pcrs_unseen and not pcrs & watched

    def _loses(self, what: str, unseen: bool) -> None:
        self.hazards.append(what)
        if unseen:
            self.blind = True
        else:
            self.lost[self.boot_id] = what

    def reboot(self) -> None:
        """A cold boot. The records that no shard holds are gone: docs/concepts.md, limits."""
        self.note()
        _emulated.reboot(self.host.kernel)
        self._begin(set(), {0})

    def kexec(self, carry_over: bool) -> None:
        """Another kernel without a reset."""
        self.note()
        old, first, sealed = self.boot, self._first(self.state()), self.sealed_to()
        lossy = not carry_over and sealed < len(old)
        unseen = lossy and (not self.tpm or self._unwatched(sealed, len(old), self._watched()))
        pending = self.lost.get(self.boot_id)
        _emulated.kexec(self.host.kernel, carry_over)
        if carry_over:
            head = Spool(self.host.spool).head
            if not self.tpm and head is not None and head.boot_id != old.boot_id:
                # docs/PROTOCOL.md, reset_count: that the boot before began with a reset is not known without a TPM.
                self.hazards.append("kexec of a boot without shards")
                self.blind = True
            # Without a TPM a list of which nothing was left looks like that of a cold boot.
            anew = {0} if first == len(old) and not self.tpm else set()
            self._begin(self.epoch, anew | {shift + first for shift in old.shifts})
            if pending and anew:
                self.blind = True
            elif pending:
                self.lost[self.boot_id] = pending
            return
        joined = set() if lossy or not self.tpm else self.epoch
        self._begin(joined, {0} if lossy else {0} | {shift + len(old) for shift in old.shifts})
        if lossy or pending:
            # docs/PROTOCOL.md, reset_count: only a TPM tells a kexec from a reboot.
            self._loses("kexec", unseen)

    def looks_like_a_boot(self) -> None:
        """A file called boot_aggregate was measured: docs/concepts.md, limits. A TPM is not deceived by it."""
        if not self.tpm:
            self.hazards.append("boot_aggregate as a file's name")
            self.blind = True

    def spool_replaced(self, what: str) -> None:
        """An old backup was put back, or the spool was lost."""
        self.hazards.append(what)
        # docs/concepts.md, limits: without a TPM the list's head fits an old cut as well.
        self.blind = self.blind or not self.tpm
        self.seen = {}
        self.boot.shifts = self.boot.possible
        self.named = ""  # the journal kept it

    # -- what the product did ---------------------------------------------------------------------------------------

    def note(self) -> None:
        """Look what is new in the spool, and what left the kernel."""
        state = self.state()
        assert state.boot_id == self.boot_id
        first, before = self._first(state), self.first
        self._sealed()
        if first != before:
            assert first > before, "the kernel holds records again that it had deleted"
            mine = [index for index in range(before, first) if not self._hole(index)]
            for _key, run in itertools.groupby(enumerate(mine), lambda pair: pair[1] - pair[0]):
                indexes = [index for _number, index in run]
                self._deleted(indexes[0], indexes[-1] + 1)
            self.first = first

    def _hole(self, index: int) -> bool:
        return any(boot_id == self.boot_id and first <= index < end for boot_id, first, end in self.holes)

    def _deleted(self, first: int, end: int) -> None:
        """Promise 1: what we deleted is in shards where the policy demands it, byte for byte, at its index."""
        self.deleted += end - first
        where = f"records {first} to {end - 1} of boot {self.boot_id}"
        assert self.policy != "never", f"{where} were deleted under the policy never"
        truth = self.boot.raw(first, end)
        spool = Spool(self.host.spool)
        for shift in self.boot.shifts:
            entries = [each for each in spool.epoch if each.end > first + shift and each.first < end + shift]
            if _sealed_raw(spool, first + shift, end + shift) == truth and self._ours(entries):
                break
        else:
            assert self.blind and truth in self._everything(spool), f"{where} were deleted and are in no shard"
            entries = []
        for entry in entries if self.policy in ("central", "verified") else ():
            data = spool.manifest_bytes(entry)
            assert self.store.manifest_bytes(self.host.name, entry) == data, f"{where}: the store has another shard"
            with self.store.open_shard(self.host.name, entry) as file:
                stored = hashlib.sha256(file.read()).hexdigest()
            assert stored == json.loads(data)["stored_sha256"], f"{where} were deleted before the store had them"
            word = spool.acknowledgement(entry)
            assert word and (self.policy == "central" or word["verdict"]), f"{where} were deleted without the word"

    def _everything(self, spool: Spool) -> bytes:
        """What the shards of the newest epoch hold, the pruned ones in the store."""
        pieces = []
        for entry in spool.epoch:
            if entry.sequence > spool.pruned:
                pieces.append(_sealed_raw(spool, entry.first, entry.end))
            else:
                with self.store.open_shard(self.host.name, entry) as file:
                    pieces.append(gzip.decompress(file.read()))
        return b"".join(pieces)

    def _ours(self, entries: list[Entry]) -> bool:
        """Shards of these very records. Without a TPM equal lists of two boots are one, if a kexec carried one over."""
        return not self.tpm or all(entry.boot_id in self.epoch for entry in entries)

    def _sealed(self) -> None:
        """Promise 2, and what makes promise 3 true: each new shard holds what its kernel recorded at that index."""
        shards = os.path.join(self.host.spool, "shards")
        found = _files(shards, (".ima.gz", ".json"))
        gone = [name for name, identity in self.seen.items() if found.get(name) != identity]
        pruned = self._pruned() if gone else set()
        assert not [name for name in gone if name in found or name not in pruned], f"{gone} were sealed, and changed"
        fresh = sorted(name for name in found.keys() - self.seen.keys() if name.endswith(".json"))
        for name in fresh:
            parsed = _shard.parse_name(*name.split("/"))
            if parsed and parsed[0].shard not in found and parsed[0].shard in self._pruned():
                continue
            assert parsed and parsed[0].shard in found, f"{name} has no shard"
            with open(os.path.join(shards, parsed[0].shard), "rb") as file:
                self._true(parsed[0], gzip.decompress(file.read()))
            self.shards += 1
        sealed = {name for name in found if name.endswith(".json")}
        stems = {name[: -len(".json")] for name in sealed}
        self.seen = {name: found[name] for name in found if name.split(".")[0] in stems}
        numbers = [name.split("/")[1].split("-")[0] for name in sealed]
        assert len(set(numbers)) == len(numbers), "a sequence number was given twice"

    def _pruned(self) -> set[str]:
        """Shard files that may be gone: the spool says so, and the store has them."""
        spool = Spool(self.host.spool)
        said = [entry for entry in spool.entries if entry.sequence <= spool.pruned]
        for entry in said:
            with self.store.open_shard(self.host.name, entry) as file:
                stored = hashlib.sha256(file.read()).hexdigest()
            assert stored == spool.manifest(entry)["stored_sha256"], f"{entry.stem} was pruned, and the store lacks it"
        return {entry.shard for entry in said}

    def _true(self, entry: Entry, raw: bytes) -> None:
        boot = self.boots[entry.boot_id]
        shifts = {each for each in boot.shifts if boot.raw(entry.first - each, entry.end - each) == raw}
        spool = Spool(self.host.spool)
        told = any(fault["lost"] for each in spool.epoch for fault in spool.manifest(each)["faults"])
        assert shifts or self.blind or told, f"shard {entry.stem} does not hold what the kernel recorded there"
        if shifts:
            boot.shifts = shifts

    def store_kept(self) -> None:
        """Promise 2: what the store has it keeps, and never changes."""
        found = _files(self.store.directory, (".ima.gz", ".json"))
        for name, identity in self.stored.items():
            assert found.get(name) == identity, f"{name} in the store changed"
        self.stored = found

    def prune(self, shards: int, expected: t.Callable[[str, t.Collection[str], str], None]) -> int:
        """Remove shard files but for the newest ``shards``, as the action does; return how many went."""
        with open(self.host.config, encoding="utf-8") as file:
            plain = file.read()

        def call(one_round: Json) -> Json:
            config = _protocol.load(self.host.config)
            return t.cast(Json, json.loads(json.dumps(_host.prune(config, one_round["confirmed"], False))))

        try:
            _write(self.host.config, f"{plain}[retention]\nkeep_shards={shards}\n")
            return int(_retention.prune(DirectoryStore(self.store.directory), self.host.name, call, False)["pruned"])
        except ImaError as error:
            expected(error.reason, (), error.msg)
            return 0
        finally:
            _write(self.host.config, plain)

    # -- verdicts ---------------------------------------------------------------------------------------------------

    @property
    def sound(self) -> bool:
        """Nothing was done to this host that could make a verdict other than consistent right."""
        return not self.hazards

    def untrue(self) -> str:
        """Say what in the store is not the truth: empty when every shard is, and nothing of this boot is missing."""
        end = 0
        entries = self.store.entries(self.host.name)
        for entry in entries:
            boot = self.boots[entry.boot_id]
            with self.store.open_shard(self.host.name, entry) as file:
                raw = gzip.decompress(file.read())
            if not any(boot.raw(entry.first - shift, entry.end - shift) == raw for shift in boot.shifts):
                return f"shard {entry.stem} is not what the kernel recorded"
        if entries and entries[-1].boot_id in self.epoch:
            end = entries[-1].end
        if end not in {shift + len(self.boot) for shift in self.boot.shifts}:
            return f"the store ends at {end}, the kernel recorded {len(self.boot)} (from {self.boot.shifts})"
        return ""


def _sealed_raw(spool: Spool, first: int, end: int | None = None) -> bytes:
    """What the shards of the newest epoch hold; b"" where one was pruned."""
    try:
        return b"".join(spool.raw_from(first, end))
    except ImaError as error:
        assert error.reason == "pruned"
        return b""


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def _files(directory: str, suffixes: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    """Inode, size and time of all files whose name ends so."""
    found = {}
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = list(os.scandir(os.path.join(directory, folder)))
        except FileNotFoundError:
            continue
        for entry in entries:
            name = os.path.join(folder, entry.name)
            if entry.is_dir(follow_symlinks=False):
                folders.append(name)
            elif name.endswith(suffixes):
                status = entry.stat(follow_symlinks=False)
                found[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


# -- a rotation, and what comes between its rounds ------------------------------------------------------------------


class Outcome(t.NamedTuple):
    """How a rotation ended: the reason that it gave (empty: all is well), and its result."""

    reason: str
    result: Json


_runs = itertools.count()


def claims(store: DirectoryStore, host: str) -> list[_verifier.Claim]:
    """What the fleet documents say of a host."""
    return _verifier.claims_of(store).get(host, [])


def rotate(host: support.Host, store: DirectoryStore, call: t.Any = None, **options: t.Any) -> Outcome:
    """Rotate as the action does, and write the fleet document, unless the controller is gone."""
    try:
        rotation = host.rotation(DirectoryStore(store.directory), call, **options)
    except ImaError as error:
        return _documented(host, store, ima_rotate._failed(host.name, error, {}))
    try:
        rotation.run()
    except Dropped:
        return Outcome("dropped", {})
    except _rotation.HostUnreachable as error:
        result = dict(error.raw, claim=_fleet.missing("unreachable", error.msg), reason="unreachable")
        return _documented(host, store, result)
    except ImaError as error:
        return _documented(host, store, ima_rotate._failed(host.name, error, rotation.result()))
    result = rotation.result()
    return _documented(host, store, ima_rotate._faulty(host.name, result) if result["fault"] else result)


def _documented(host: support.Host, store: DirectoryStore, result: Json) -> Outcome:
    number = max([int(run[-8:], 16) for run in store.runs()], default=0) + 1
    run = f"20260102T030405Z-{number:08x}"
    store.write_run(_fleet.document(run, {host.name: _fleet.member(result)}))
    return Outcome(result.get("reason", "") if result.get("failed") or result.get("unreachable") else "", result)


def put_back(host: support.Host, store: DirectoryStore) -> None:
    """What the hint of ``spool_behind_store`` says: the spool gets what the store has."""
    lose(host)
    source = os.path.join(store.directory, "hosts", host.name)
    with _protocol.Lock(_protocol.load(host.config)):
        Spool(host.spool).recover()
        for entry in store.entries(host.name):
            os.makedirs(os.path.join(host.spool, "shards", entry.boot_id), exist_ok=True)
            for name in (entry.shard, entry.manifest):
                shutil.copyfile(os.path.join(source, name), os.path.join(host.spool, "shards", name))


def lose(host: support.Host) -> None:
    """The spool's disk was replaced by an empty one."""
    shutil.rmtree(host.spool)
    os.makedirs(host.spool)


def back_up(host: support.Host) -> str:
    """Copy the spool; return where."""
    number = len([name for name in os.listdir(host.directory) if name.startswith("backup")])
    path = os.path.join(host.directory, f"backup{number}")
    shutil.copytree(host.spool, path)
    return path


def restore(host: support.Host, path: str) -> None:
    """Put a backup of the spool back."""
    shutil.rmtree(host.spool)
    shutil.copytree(path, host.spool)


def everything(host: support.Host) -> dict[str, tuple[int, int, int]]:
    """All files of a host."""
    return _files(host.directory, ("",))
