# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The measurement lists without a kernel: same answers, same errno values, soft PCRs, faults on demand.

A directory holds it:

``state``
    one JSON object, replaced by rename. The rename is the commit: whoever is killed before it has done nothing.
``recorded.<boot number>.<boot id>``
    every record of that boot in the form of the SHA-1 list, host byte order. It is only ever appended to (what lies
    behind the committed size is torn, and cut off by the next append); trimming moves offsets in ``state``. So it is
    what the emulated kernel really recorded: the oracle of tests. It is also the file whose ``flock`` is the kernel's
    lock of readers and writer.
``lock``
    the short lock of those who change ``state``, apart from the former, since a kernel records while a list is open.

Behaviour is that of Linux 7.3.4 (``ima_fs.c``, ``ima_queue.c``, ``fs/seq_file.c``), as observed on real kernels.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import os
import re
import signal
import threading
import typing as t
import uuid

from ansible_collections.integrity.ima.plugins.module_utils._errors import EmulatorError
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import (
    DIGEST_SIZES,
    SHA1,
    TEMPLATES,
    Layout,
    Record,
    convert,
    detect,
    encode,
    fields,
    read,
    to_ascii,
)
from ansible_collections.integrity.ima.plugins.module_utils._pcr import Replay
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import (
    DELETE_N,
    EXPORT_ONLY,
    FLUSH_HTABLE,
    STAGED,
    File,
    Files,
    Holder,
    holders_of,
    in_bank_order,
)

VERSION = 1
LINK_MODE = 0o444  # what lstat says of a symlink in securityfs
PAGE = 4096
FAULTS = ("enoent", "kill_before_delete", "kill_after_delete", "kill_after_stage", "lost_reply")

_RELEASES = {EXPORT_ONLY: "6.12.107-emulated", DELETE_N: "7.3.4-emulated", STAGED: "7.3.4-emulated"}
_SIZES = {bank: size for size, bank in DIGEST_SIZES.items()}
_PCR = 10  # CONFIG_IMA_MEASURE_PCR_IDX
_CHUNK = 1 << 20
_BATCH = 10000  # records per commit when growing
_LONGEST_COMMAND = 21
_ULONG_MAX = (1 << 64) - 1
_NUMBER = re.compile(rb"\+?([0-9]+)(\n?)\Z")
_LIST = re.compile(r"(ascii|binary)_runtime_measurements(?:_(sha[0-9]+))?(_staged)?\Z")


@dataclasses.dataclass
class State:
    """Everything that the emulated kernel knows, as ``state`` holds it. Offsets are bytes in the recorded file."""

    version: int
    flavour: str
    banks: list[str]  # of the TPM; empty without one
    padded: list[str]
    single: bool  # the two plain files of kernels before 6.10
    flush_htable: bool
    template: str
    file_hash: str
    policy: bool  # whether reading a file records it
    capture: str  # SHA-256 of the list that this began with, or empty
    machine_id: str
    release: str
    boot_id: str
    boot: int
    reset_count: int
    pcrs: dict[str, dict[str, str]]
    records: int = 0
    size: int = 0
    live_index: int = 0
    live_offset: int = 0
    staged: list[int] | None = None  # first index, first offset, end index, end offset
    table_offset: int = 0  # records before it are no longer in the hash table
    violations: int = 0
    suspended: bool = False
    phantom: bool = False
    capable: bool = True
    faults: list[str] = dataclasses.field(default_factory=list)

    @property
    def recorded(self) -> str:
        """The name of this boot's recorded file."""
        return f"recorded.{self.boot:04d}.{self.boot_id}"

    @property
    def count(self) -> int:
        """Records in the live list."""
        return self.records - self.live_index

    def segment(self, staged: bool) -> tuple[int, int, int]:
        """First index, first offset and end offset of the live or the staged list."""
        if not staged:
            return self.live_index, self.live_offset, self.size
        if self.staged is None:
            return 0, 0, 0
        return self.staged[0], self.staged[1], self.staged[3]


# --- the state on disk ------------------------------------------------------------------------------------------------


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _load(directory: str) -> State:
    path = os.path.join(directory, "state")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        hint = "create it with integrity.ima.ima_emulator"
        raise EmulatorError(f"There is no emulated kernel in {directory}", reason="absent", hint=hint) from error
    try:
        pieces = iter(lambda: os.read(descriptor, 65536), b"")
        state = State(**json.loads(b"".join(pieces)))
    except (ValueError, TypeError) as error:
        raise EmulatorError(f"{path} is not the state of an emulated kernel", reason="malformed_state") from error
    finally:
        os.close(descriptor)
    if state.version != VERSION:
        raise EmulatorError(f"{path} is of version {state.version}, not {VERSION}", reason="malformed_state")
    return state


def _store(directory: str, state: State) -> None:
    """The commit. No fsync: the emulation need not survive the machine, only the process."""
    fresh = os.path.join(directory, "state.new")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        _write_all(descriptor, json.dumps(dataclasses.asdict(state), sort_keys=True).encode("ascii"))
    finally:
        os.close(descriptor)
    os.rename(fresh, os.path.join(directory, "state"))


@contextlib.contextmanager
def _locked(directory: str) -> t.Iterator[None]:
    try:
        descriptor = os.open(os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise EmulatorError(f"There is no emulated kernel in {directory}", reason="absent") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _changing(directory: str) -> t.Iterator[State]:
    """The state to change; committed at the end unless something was raised."""
    with _locked(directory):
        state = _load(directory)
        before = dataclasses.asdict(state)
        yield state
        if dataclasses.asdict(state) != before:
            _store(directory, state)


class _Window:
    """A range of bytes of a file as the source of ``read``: ``[offset, end)``."""

    def __init__(self, descriptor: int, offset: int, end: int) -> None:
        self._descriptor = descriptor
        self._offset = offset
        self._end = end

    def __call__(self, size: int) -> bytes:
        data = os.pread(self._descriptor, min(size, self._end - self._offset), self._offset)
        self._offset += len(data)
        return data


class _Recorder:
    """Appends records to the recorded file and to the soft PCRs; nothing of it counts before the state is committed."""

    def __init__(self, directory: str, state: State) -> None:
        self._state = state
        self._replay = Replay(state.banks, state.pcrs, padded=state.padded) if state.banks else None
        self._pending: list[bytes] = []
        self._pending_size = 0
        path = os.path.join(directory, state.recorded)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._descriptor, state.size)
        os.lseek(self._descriptor, state.size, os.SEEK_SET)

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, kind: object, *unused: object) -> None:
        try:
            if kind is None:
                self._flush()
                if self._replay is not None:
                    self._state.pcrs = self._replay.values()
        finally:
            os.close(self._descriptor)

    def _flush(self) -> None:
        _write_all(self._descriptor, b"".join(self._pending))
        self._pending, self._pending_size = [], 0

    def add(self, raw: bytes, *, extend: bool = True) -> None:
        """One record in the form of the SHA-1 list; ``extend=False`` for those that an earlier kernel extended."""
        if extend:
            record = next(read(_once(raw), SHA1, verify=False))
            if self._replay is not None:
                self._replay.extend(record)
            self._state.violations += record.violation
        self._pending.append(raw)
        self._pending_size += len(raw)
        self._state.records += 1
        self._state.size += len(raw)
        if self._pending_size >= _CHUNK:
            self._flush()

    def holds(self, raw: bytes) -> bool:
        """Whether the hash table has the same record: then the kernel does not record it again."""
        self._flush()
        return _found(self._descriptor, raw, self._state.table_offset, self._state.size)


def _once(data: bytes) -> t.Callable[[int], bytes]:
    pieces = iter((data,))
    return lambda size: next(pieces, b"")


# --- new records ------------------------------------------------------------------------------------------------------


def _field_list(template: str, name: bytes, algorithm: str, digest: bytes, buffer: bytes = b"") -> list[bytes]:
    if template not in TEMPLATES or template == "evm-sig":
        raise EmulatorError(f"Records of template {template} cannot be made up", reason="template")
    if template == "ima":
        return [digest, name[:255]]
    shown = name.replace(b" ", b"_") + b"\0"
    values = {
        "d-ng": algorithm.encode("ascii") + b":\0" + digest,
        "d-ngv2": b"ima:" + algorithm.encode("ascii") + b":\0" + digest,
        "n-ng": shown,
        "buf": buffer,
    }
    return [values.get(field, b"") for field in TEMPLATES[template]]


def _algorithm(state: State, template: str) -> str:
    """The hash of a file's content: the legacy template knows SHA-1 only."""
    return "sha1" if template == "ima" else state.file_hash


def _boot_aggregate(state: State) -> bytes:
    """The record with which a kernel begins: the hash of PCR 0-7 (SHA-1) or 0-9 of one bank, zeros without a TPM."""
    algorithm = _algorithm(state, state.template)
    if not state.banks:
        digest = bytes(_SIZES[algorithm])
    else:
        bank = next(bank for bank in (algorithm, "sha256", "sha1", state.banks[0]) if bank in state.banks)
        values = b"".join(_pcr_value(state, bank, index) for index in range(8 if bank == "sha1" else 10))
        algorithm = "sha1" if state.template == "ima" else bank
        digest = hashlib.new(algorithm, values).digest()
    return encode(_PCR, state.template, _field_list(state.template, b"boot_aggregate", algorithm, digest), SHA1)


def _pcr_value(state: State, bank: str, index: int) -> bytes:
    value = state.pcrs.get(str(index), {}).get(bank)
    if value is not None:
        return bytes.fromhex(value)
    return (b"\xff" if 17 <= index <= 22 else b"\0") * _SIZES[bank]


def _open_capture(path: str) -> tuple[int, Layout]:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        layout = detect(os.pread(descriptor, 65536, 0))
        if layout is None:
            raise EmulatorError("An ASCII list cannot be fed: take the binary one", reason="capture")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, layout


def _captured(path: str) -> t.Iterator[bytes]:
    """The records of a saved binary list of any bank and byte order, in the form of the host's SHA-1 list.

    The template digest covers the length words, so a list of the other byte order gets other digests.
    """
    descriptor, layout = _open_capture(path)
    try:
        for record in read(_Window(descriptor, 0, os.fstat(descriptor).st_size), layout):
            if layout == SHA1:
                yield record.raw
            elif layout.byte_order == SHA1.byte_order:
                yield convert(record, layout.byte_order, SHA1.digest_size)
            else:
                values = fields(record, layout.byte_order)
                yield encode(record.pcr, record.template, values, SHA1, violation=record.violation)
    finally:
        os.close(descriptor)


def _sha256_of(path: str) -> str:
    return _digest_file(path, "sha256").hex()


def _digest_file(path: str, algorithm: str) -> bytes:
    hasher = hashlib.new(algorithm)
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for piece in iter(lambda: os.read(descriptor, _CHUNK), b""):
            hasher.update(piece)
    finally:
        os.close(descriptor)
    return hasher.digest()


def _record_of(state: State, item: t.Mapping[str, t.Any]) -> bytes:
    """A record from ``path`` and ``content`` or ``digest`` (hexadecimal), ``template`` and ``pcr`` being optional."""
    template = item.get("template") or state.template
    algorithm = _algorithm(state, template)
    content = item.get("content") or b""
    buffer = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else bytes(content)
    try:
        digest = bytes.fromhex(item["digest"]) if item.get("digest") else hashlib.new(algorithm, buffer).digest()
    except ValueError:
        digest = b""
    if len(digest) != _SIZES[algorithm]:
        raise EmulatorError(f"The digest of a record to feed is not a {algorithm}", reason="digest")
    pcr = _PCR if item.get("pcr") is None else int(item["pcr"])
    if not 0 <= pcr <= 23:
        raise EmulatorError(f"There is no PCR {pcr}", reason="pcr")
    return encode(pcr, template, _field_list(template, os.fsencode(item["path"]), algorithm, digest, buffer), SHA1)


# --- creating, feeding, faults ----------------------------------------------------------------------------------------


# What create() may be given, and what a new emulated kernel is where it is not.
DEFAULTS: t.Mapping[str, t.Any] = {
    "flavour": DELETE_N,
    "banks": ["sha1", "sha256"],
    "padded": [],
    "single": False,
    "flush_htable": False,
    "template": "ima-ng",
    "file_hash": "sha256",
    "policy": True,
    "capture": "",
    "machine_id": "",
    "boot_id": "",
    "release": "",
}


def create(directory: str, **parameters: t.Any) -> bool:
    """Boot an emulated kernel in ``directory``; False when it is there already, with the same parameters.

    Parameters are those of :data:`DEFAULTS`; one that is not given, or None, is not compared either. ``banks`` are the
    TPM's (empty: no TPM), ``padded`` those of them that get the padded SHA-1 digest, ``single`` means the two plain
    files of kernels before 6.10, ``policy`` whether reading a file records it. ``capture`` is the path of a saved
    binary list that becomes the list of this boot; without it there is one boot_aggregate record.
    :class:`EmulatorError` ``exists``, ``parameters``, ``template``, ``capture``; :class:`ListError`, ``OSError``.
    """
    if exists(directory, **parameters):
        return False
    state = _first_state(parameters)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    with _locked(directory):
        if os.path.exists(os.path.join(directory, "state")):
            raise EmulatorError("Somebody else is creating this emulated kernel", reason="exists")
        _unlink_from(directory, 0)
        with _Recorder(directory, state) as recorder:
            for raw in _captured(parameters["capture"]) if state.capture else [_boot_aggregate(state)]:
                recorder.add(raw)
        _store(directory, state)
    return True


def exists(directory: str, **parameters: t.Any) -> bool:
    """Whether there is an emulated kernel; :class:`EmulatorError` ``exists`` when it has other parameters."""
    wanted = _first_state(parameters)
    if not os.path.exists(os.path.join(directory, "state")):
        return False
    found = _load(directory)
    # A boot id is how it began: a reboot must not make it another emulated kernel.
    given = [name for name, value in parameters.items() if value not in (None, "") and name != "boot_id"]
    other = [name for name in given if getattr(found, name) != getattr(wanted, name)]
    if other:
        msg = f"There is an emulated kernel already, with another {', '.join(other)}"
        raise EmulatorError(msg, reason="exists", hint="remove it first, or use another directory", parameters=other)
    return True


def _first_state(parameters: t.Mapping[str, t.Any]) -> State:
    wanted = dict(DEFAULTS, **{name: value for name, value in parameters.items() if value is not None})
    unknown = sorted(set(wanted) - set(DEFAULTS))
    flavour, banks, padded = wanted["flavour"], in_bank_order(wanted["banks"]), in_bank_order(wanted["padded"])
    if unknown or flavour not in _RELEASES or len(banks) != len(wanted["banks"]) or not set(padded) <= set(banks):
        msg = f"No kernel has flavour {flavour}, banks {wanted['banks']}, padded {wanted['padded']}, {unknown}"
        raise EmulatorError(msg, reason="parameters")
    if wanted["file_hash"] not in _SIZES or (wanted["single"] and flavour != EXPORT_ONLY) or "sha1" in padded:
        msg = f"No kernel has file hash {wanted['file_hash']}, single {wanted['single']}, padded {padded}"
        raise EmulatorError(msg, reason="parameters")
    _field_list(wanted["template"], b"", "sha1", b"")
    wanted.update(banks=banks, padded=padded, capture=_sha256_of(wanted["capture"]) if wanted["capture"] else "")
    wanted["machine_id"] = wanted["machine_id"] or uuid.uuid4().hex
    wanted["boot_id"] = wanted["boot_id"] or str(uuid.uuid4())
    wanted["release"] = wanted["release"] or _RELEASES[flavour]
    return State(version=VERSION, boot=0, reset_count=1, pcrs={}, **wanted)


def remove(directory: str) -> bool:
    """Remove the emulated kernel with all that it recorded; False when there is none. Foreign files stay."""
    if not os.path.exists(os.path.join(directory, "state")):
        return False
    names = os.listdir(directory)
    ours = [name for name in names if name.startswith("recorded.")] + ["state.new", "lock", "state"]
    for name in ours:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))
    with contextlib.suppress(OSError):
        os.rmdir(directory)
    return True


def feed(directory: str, *, capture: str = "", records: t.Sequence[t.Mapping[str, t.Any]] = ()) -> int:
    """Record a saved list as it is, then single records as the kernel does: one that it knows is not recorded again.

    ``records`` are mappings with ``path`` and ``content`` or ``digest``; ``template`` and ``pcr`` are optional; for
    ``ima-buf`` the path is the event's name and the content its buffer. Returns the number of new records.
    Raises :class:`EmulatorError`, :class:`ListError`, ``OSError``; then nothing was recorded.
    """
    with _changing(directory) as state:
        before = state.records
        with _Recorder(directory, state) as recorder:
            for raw in _captured(capture) if capture else ():
                recorder.add(raw)
            for item in records:
                raw = _record_of(state, item)
                if not recorder.holds(raw):
                    recorder.add(raw)
        return state.records - before


def would_record(directory: str, records: t.Sequence[t.Mapping[str, t.Any]]) -> int:
    """How many of ``records`` :func:`feed` would record; writes nothing."""
    state = _load(directory)
    known: set[bytes] = set()
    with contextlib.closing(_Recorded(directory, state)) as recorded:
        for item in records:
            raw = _record_of(state, item)
            if not recorded.holds(raw):
                known.add(raw)
    return len(known)


def grow(directory: str, count: int, template: str = "") -> None:
    """Record ``count`` files that nobody ever read, each with a path and digest of its own; committed in batches."""
    left = count
    while left > 0:
        with _changing(directory) as state, _Recorder(directory, state) as recorder:
            chosen = template or state.template
            algorithm = _algorithm(state, chosen)
            for _number in range(min(left, _BATCH)):
                path = b"/emulated/%04d/%010d" % (state.boot, state.records)
                digest = hashlib.new(algorithm, path).digest()
                recorder.add(encode(_PCR, chosen, _field_list(chosen, path, algorithm, digest), SHA1))
        left -= _BATCH


def violation(directory: str, path: str) -> None:
    """Record an open_writers violation of ``path``: zeros in the list, 0xff into the PCRs; never deduplicated."""
    with _changing(directory) as state, _Recorder(directory, state) as recorder:
        algorithm = _algorithm(state, state.template)
        values = _field_list(state.template, os.fsencode(path), algorithm, bytes(_SIZES[algorithm]))
        recorder.add(encode(_PCR, state.template, values, SHA1, violation=True))


def foreign_trim(directory: str, count: int) -> None:
    """Another root process deletes the first ``count`` records. :class:`EmulatorError` ``refused``, ``errno`` in it."""
    path = os.path.join(directory, _load(directory).recorded)
    try:
        descriptor = _flock(path, writing=True)
        try:
            with _changing(directory) as state:
                if state.phantom:
                    raise _os_error(errno.EBUSY)
                _check_delete(state, count)
                _delete(directory, state, count)
        finally:
            os.close(descriptor)
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "")
        raise EmulatorError(f"The emulated kernel answers {name}", reason="refused", errno=name) from error


def reboot(directory: str) -> None:
    """A cold boot: new boot id, PCRs zero, a new list; staged and unsaved records are gone (from the kernel)."""
    with _changing(directory) as state:
        _end_boot(directory, state)
        _new_boot(state)
        state.reset_count += 1
        state.pcrs = {}
        with _Recorder(directory, state) as recorder:
            recorder.add(_boot_aggregate(state))


def kexec(directory: str, carry_over: bool) -> None:
    """Boot another kernel without a reset: new boot id, PCRs kept, a boot_aggregate that is extended.

    With ``carry_over`` (CONFIG_IMA_KEXEC) the staged and the live list come first, without being extended again.
    """
    with _changing(directory) as state:
        _end_boot(directory, state)
        old = dataclasses.replace(state)
        _new_boot(state)
        with _Recorder(directory, state) as recorder:
            for raw in _carried(directory, old) if carry_over else ():
                recorder.add(raw, extend=False)
            # Restored records are not in the hash table.
            state.table_offset = state.size
            recorder.add(_boot_aggregate(state))


def _carried(directory: str, old: State) -> t.Iterator[bytes]:
    with contextlib.closing(_Recorded(directory, old)) as recorded:
        for staged in (True, False):
            for record in recorded.records(*old.segment(staged)):
                yield record.raw


def _end_boot(directory: str, state: State) -> None:
    os.truncate(os.path.join(directory, state.recorded), state.size)
    _unlink_from(directory, state.boot + 1)


def _new_boot(state: State) -> None:
    state.boot_id, state.boot = str(uuid.uuid4()), state.boot + 1
    state.records = state.size = state.live_index = state.live_offset = state.table_offset = state.violations = 0
    state.staged, state.suspended, state.phantom, state.faults = None, False, False, []


def suspend(directory: str, on: bool) -> bool:
    """Measuring is suspended (a reboot or kexec has begun), or goes on. True if that is a change."""
    with _changing(directory) as state:
        changed = state.suspended != on
        state.suspended = on
        return changed


def capable(directory: str, on: bool) -> None:
    """Whether those who open a list file have CAP_SYS_ADMIN."""
    with _changing(directory) as state:
        state.capable = on


def phantom(directory: str) -> bool:
    """The kernel counts a reader that does not exist, until the reboot. True if that is a change."""
    with _changing(directory) as state:
        changed, state.phantom = not state.phantom, True
        return changed


def fail_next(directory: str, fault: str) -> bool:
    """The next command that fits fails, once: ``enoent`` (N drops nothing), ``lost_reply`` (N or D is done, the answer
    is EIO). True if that is a change."""
    if fault not in FAULTS:
        raise EmulatorError(f"There is no fault {fault}", reason="fault")
    with _changing(directory) as state:
        if fault in state.faults:
            return False
        state.faults.append(fault)
        return True


def kill_next(directory: str, moment: str) -> bool:
    """The process with the next command that fits is killed by SIGKILL, once: ``before_delete`` and ``after_delete``
    (N or D), ``after_stage`` (A). True if that is a change."""
    return fail_next(directory, f"kill_{moment}")


def lost_reply(directory: str) -> bool:
    """The next N or D is done, but the write reports EIO. True if that is a change."""
    return fail_next(directory, "lost_reply")


class Boot(t.NamedTuple):
    """One boot: its id, and the file of which ``size`` bytes are what the emulated kernel really recorded."""

    boot_id: str
    path: str
    size: int


def recorded(directory: str) -> list[Boot]:
    """Every boot, oldest first."""
    state = _load(directory)
    boots = []
    for number, name in _recorded_names(directory):
        path = os.path.join(directory, name)
        if number < state.boot:
            boots.append(Boot(name.split(".")[2], path, os.stat(path).st_size))
    return [*boots, Boot(state.boot_id, os.path.join(directory, state.recorded), state.size)]


def _recorded_names(directory: str) -> list[tuple[int, str]]:
    names = [name for name in os.listdir(directory) if name.startswith("recorded.")]
    return sorted((int(name.split(".")[1]), name) for name in names)


def _unlink_from(directory: str, first: int) -> None:
    """Remove the files of boots that were killed before they were committed."""
    for number, name in _recorded_names(directory):
        if number >= first:
            os.unlink(os.path.join(directory, name))


def describe(directory: str) -> dict[str, t.Any]:
    """What the module returns: counts, identities and digests, no file names."""
    state = _load(directory)
    return {
        "flavour": state.flavour,
        "boot_id": state.boot_id,
        "machine_id": state.machine_id,
        "count": state.count,
        "violations": state.violations,
        "pcrs": state.pcrs,
        "records_recorded": state.records,
    }


# --- the kernel's side of a command -----------------------------------------------------------------------------------


def _os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def _parse_number(data: bytes) -> int:
    """``kstrtoul`` in base 10, after the last newline was replaced by NUL."""
    if not data.endswith(b"\n"):
        raise _os_error(errno.EINVAL)
    found = _NUMBER.match(data[:-1].split(b"\0")[0])
    if not found:
        raise _os_error(errno.EINVAL)
    number = int(found.group(1))
    if number > _ULONG_MAX:
        raise _os_error(errno.ERANGE)
    if number == 0:
        raise _os_error(errno.EINVAL)
    return number


def _check_delete(state: State, count: int) -> None:
    if state.flavour == EXPORT_ONLY or state.flush_htable:
        raise _os_error(errno.EINVAL)
    if state.suspended:
        raise _os_error(errno.ESTALE)
    if count > state.count:
        raise _os_error(errno.ENOENT)


def _delete(directory: str, state: State, count: int) -> None:
    if count == state.count:
        state.live_index, state.live_offset = state.records, state.size
        return
    with contextlib.closing(_Recorded(directory, state)) as recorded_file:
        records = recorded_file.records(*state.segment(False))
        following = next(itertools.islice(records, count, None))
        state.live_index, state.live_offset = following.index, following.offset


def _command_delete(directory: str, data: bytes) -> None:
    """``N`` on an ordinary list."""
    with _changing(directory) as state:
        if state.flavour == EXPORT_ONLY or state.flush_htable:
            raise _os_error(errno.EINVAL)
        count = _parse_number(data)
        if _take(state, "enoent"):
            answer = errno.ENOENT
        else:
            _check_delete(state, count)
            answer = _with_faults(directory, state, lambda: _delete(directory, state, count))
    _answer(answer)


def _command_stage(directory: str) -> None:
    """``A``: the live list becomes the staged list."""
    with _changing(directory) as state:
        if state.staged is not None:
            raise _os_error(errno.EEXIST)
        if state.suspended:
            raise _os_error(errno.EACCES)
        if not state.count:
            raise _os_error(errno.ENOENT)
        state.staged = [state.live_index, state.live_offset, state.records, state.size]
        state.live_index, state.live_offset = state.records, state.size
        answer = _KILL if _take(state, "kill_after_stage") else 0
    _answer(answer)


def _command_delete_staged(directory: str) -> None:
    """``D``: the staged list is gone; with ima_flush_htable the hash table forgets it too."""
    with _changing(directory) as state:
        if state.staged is None:
            raise _os_error(errno.ENOENT)
        if state.suspended:
            raise _os_error(errno.ESTALE)

        def drop() -> None:
            if state.flush_htable:
                state.table_offset = state.live_offset
            state.staged = None

        answer = _with_faults(directory, state, drop)
    _answer(answer)


_KILL = -1


def _take(state: State, fault: str) -> bool:
    """Use up a pending fault."""
    if fault not in state.faults:
        return False
    state.faults.remove(fault)
    return True


def _with_faults(directory: str, state: State, act: t.Callable[[], None]) -> int:
    """Do it, or not: what follows the commit (0, an errno value, or the kill)."""
    if _take(state, "kill_before_delete"):
        return _KILL
    act()
    if _take(state, "kill_after_delete"):
        return _KILL
    return errno.EIO if _take(state, "lost_reply") else 0


def _answer(answer: int) -> None:
    if answer == _KILL:
        os.kill(os.getpid(), signal.SIGKILL)
    if answer:
        raise _os_error(answer)


# --- the lock of readers and writer -----------------------------------------------------------------------------------


class _Writer:
    """The task that has lists open for write, with its descriptors of one open file description."""

    def __init__(self, descriptor: int) -> None:
        self.task = threading.current_thread()
        self.descriptors = {descriptor}


class _Registry:
    """What ``flock`` cannot tell: which thread of this process is the writer."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.writers: dict[str, _Writer] = {}
        self.orphans: set[int] = set()


_registry = _Registry()


def _forget_writers() -> None:
    # A child has the descriptors of its parent but is another task.
    _registry.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_forget_writers)


def _flock(path: str, *, writing: bool) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if writing else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise _os_error(errno.EBUSY) from error
    return descriptor


def _acquire(path: str, *, writing: bool) -> int:
    """A descriptor that holds the lock: EBUSY at once when readers, or another task, hold it."""
    with _registry.lock:
        writer = _registry.writers.get(path)
        if writing and writer and writer.task is threading.current_thread():
            descriptor = os.dup(next(iter(writer.descriptors)))
            writer.descriptors.add(descriptor)
            return descriptor
        descriptor = _flock(path, writing=writing)
        if writing:
            _registry.writers[path] = _Writer(descriptor)
        return descriptor


def _release(path: str, descriptor: int) -> bool:
    """Close it. True when the kernel's accounting now counts a reader that does not exist.

    The kernel compares the closing task with the writer: when another one closes the first of several descriptors, the
    writer is forgotten, and each of the others counts as a reader that leaves twice.
    """
    with _registry.lock:
        writer = _registry.writers.get(path)
        if writer and descriptor in writer.descriptors:
            writer.descriptors.remove(descriptor)
            if not writer.descriptors:
                del _registry.writers[path]
            elif writer.task is not threading.current_thread():
                _registry.orphans |= writer.descriptors
                del _registry.writers[path]
                fcntl.flock(descriptor, fcntl.LOCK_UN)
        orphan = descriptor in _registry.orphans
        _registry.orphans.discard(descriptor)
        os.close(descriptor)
        return orphan


# --- the files --------------------------------------------------------------------------------------------------------


class _Recorded:
    """Reads the recorded file of one boot."""

    def __init__(self, directory: str, state: State) -> None:
        self._state = state
        self._descriptor = os.open(os.path.join(directory, state.recorded), os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self._descriptor)

    def records(self, index: int, offset: int, end: int) -> t.Iterator[Record]:
        window = _Window(self._descriptor, offset, end)
        return read(window, SHA1, first_index=index, first_offset=offset, verify=False)

    def holds(self, raw: bytes) -> bool:
        return _found(self._descriptor, raw, self._state.table_offset, self._state.size)


def _found(descriptor: int, raw: bytes, offset: int, end: int) -> bool:
    """Whether the bytes ``[offset, end)`` contain ``raw``; the SHA-1 digest in it makes that no accident."""
    while offset < end:
        if raw in os.pread(descriptor, min(_CHUNK + len(raw), end - offset), offset):
            return True
        offset += _CHUNK
    return False


class _Shape(t.NamedTuple):
    """Which view of the list a file is."""

    ascii: bool
    bank: str
    staged: bool


class _SmallFile(File):
    """A count, or the policy: readable at any time."""

    def __init__(self, content: t.Callable[[], bytes]) -> None:
        self._content = content
        self._position = 0

    def read(self, size: int) -> bytes:
        data = self._content()[self._position : self._position + size]
        self._position += len(data)
        return data

    def write(self, data: bytes) -> int:
        raise _os_error(errno.EINVAL)

    def rewind(self) -> None:
        self._position = 0

    def close(self) -> None:
        pass


class _ListFile(File):
    """A list file as ``fs/seq_file.c`` reads it: a page of whole records, and a record number instead of a position.

    The position is this object's: a forked child has its own from then on, where the kernel's would be shared.
    """

    def __init__(self, kernel: EmulatedFiles, state: State, descriptor: int, shape: _Shape, access: int) -> None:
        self._directory = kernel.directory
        self._descriptor = descriptor
        self._boot_id = state.boot_id
        self._path = os.path.join(kernel.directory, state.recorded)
        self._shape = shape
        self._access = access
        self._padded = shape.bank in state.padded
        self._page = PAGE
        self._shown = 0  # the record number: how many were shown, from the head
        self._buffer = b""
        self._at = self._offset = -1  # where the next record starts, if the head did not move

    def read(self, size: int) -> bytes:
        if self._access == os.O_WRONLY or self._descriptor < 0:
            raise _os_error(errno.EBADF)
        if size == 0:
            return b""
        data, self._buffer = self._buffer[:size], self._buffer[size:]
        if self._buffer:
            return data
        wanted = size - len(data)
        filled = self._fill(wanted)
        self._buffer = filled[wanted:]
        return data + filled[:wanted]

    def _fill(self, wanted: int) -> bytes:
        """One record whole, whatever its size, then more while they are wanted and fit into the buffer."""
        pieces: list[bytes] = []
        held = 0
        for record in self._records():
            shown = self._show(record)
            if not pieces:
                # The buffer doubles until one byte is free, and stays that large.
                while len(shown) >= self._page:
                    self._page *= 2
            elif held >= wanted or held + len(shown) >= self._page:
                break
            pieces.append(shown)
            held += len(shown)
            self._shown += 1
            self._at, self._offset = record.index + 1, record.offset + len(record.raw)
        return b"".join(pieces)

    def _records(self) -> t.Iterator[Record]:
        """The records from the record number on, walking from the head if it moved."""
        state = self._state()
        index, offset, end = state.segment(self._shape.staged)
        skip = self._shown
        if self._at == index + skip:
            index, offset, skip = self._at, self._offset, 0
        window = _Window(self._descriptor, offset, end)
        records = read(window, SHA1, first_index=index, first_offset=offset, verify=False)
        return itertools.islice(records, skip, None)

    def _state(self) -> State:
        state = _load(self._directory)
        if state.boot_id != self._boot_id:
            raise OSError(errno.EIO, "the emulated kernel was booted since this file was opened")
        return state

    def _show(self, record: Record) -> bytes:
        size = _SIZES[self._shape.bank]
        if self._padded:
            digest = record.digest + bytes(size - len(record.digest))
            raw = record.raw[:4] + digest + record.raw[24:]
        elif size != SHA1.digest_size:
            raw = convert(record, SHA1.byte_order, size)
        else:
            raw = record.raw
        return to_ascii(record._replace(digest=raw[4 : 4 + size]), SHA1.byte_order) if self._shape.ascii else raw

    def write(self, data: bytes) -> int:
        if self._access == os.O_RDONLY or self._descriptor < 0:
            raise _os_error(errno.EBADF)
        state = self._state()
        if state.flavour == EXPORT_ONLY or not 2 <= len(data) <= _LONGEST_COMMAND:
            raise _os_error(errno.EINVAL)
        if not self._shape.staged:
            _command_delete(self._directory, data)
        elif data == b"A\n":
            _command_stage(self._directory)
        elif data == b"D\n":
            _command_delete_staged(self._directory)
        else:
            raise _os_error(errno.EINVAL)
        return len(data)

    def rewind(self) -> None:
        self._shown, self._buffer = 0, b""

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0 and _release(self._path, descriptor):
            with _changing(self._directory) as state:
                state.phantom = state.phantom or state.boot_id == self._boot_id


class EmulatedFiles(Files):
    """The files of the emulated kernel in ``directory``. :class:`EmulatorError` ``absent``, ``malformed_state``."""

    emulated = True

    def __init__(self, directory: str) -> None:
        self.directory = os.path.abspath(directory)

    def _state(self) -> State:
        return _load(self.directory)

    def _names(self, state: State) -> dict[str, tuple[int, str]]:
        """Mode and link target ("" for a file) of every name."""
        writable = state.flavour != EXPORT_ONLY
        mode = 0o660 if writable else 0o440
        names = {"policy": (0o600 if state.flavour == STAGED else 0o200, "")}
        names.update(runtime_measurements_count=(0o440, ""), violations=(0o440, ""))
        suffixes = ("", "_staged") if state.flavour == STAGED else ("",)
        for kind, suffix in itertools.product(("ascii", "binary"), suffixes):
            plain = f"{kind}_runtime_measurements"
            if state.single:
                names[plain] = (mode, "")
                continue
            names[plain + suffix] = (LINK_MODE, f"{plain}_sha1{suffix}")
            for bank in in_bank_order([*state.banks, "sha1"]):
                names[f"{plain}_{bank}{suffix}"] = (mode, "")
        return names

    def _named(self, state: State, name: str) -> tuple[int, str]:
        try:
            return self._names(state)[name]
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name) from None

    def listdir(self) -> list[str]:
        return sorted(self._names(self._state()))

    def mode(self, name: str) -> int:
        state = self._state()
        mode, target = self._named(state, name)
        return self._named(state, target)[0] if target else mode

    def readlink(self, name: str) -> str:
        """Where the symlink ``name`` leads; ``OSError`` EINVAL if it is a file."""
        target = self._named(self._state(), name)[1]
        if not target:
            raise _os_error(errno.EINVAL)
        return target

    def open(self, name: str, flags: int) -> File:
        state = self._state()
        target = self._named(state, name)[1] or name
        access = flags & os.O_ACCMODE
        found = _LIST.match(target)
        if not found:
            return self._open_small(state, target, access)
        shape = _Shape(found.group(1) == "ascii", found.group(2) or "sha1", bool(found.group(3)))
        path = os.path.join(self.directory, state.recorded)
        if state.flavour == EXPORT_ONLY:
            # Before 7.2 there is no lock, and root may open a 0440 file for write.
            return _ListFile(self, state, os.open(path, os.O_RDONLY | os.O_CLOEXEC), shape, access)
        writing = access != os.O_RDONLY
        if writing and not state.capable:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), name)
        if writing and state.phantom:
            raise _os_error(errno.EBUSY)
        return _ListFile(self, state, _acquire(path, writing=writing), shape, access)

    def _open_small(self, state: State, name: str, access: int) -> File:
        if name == "policy":
            if access == os.O_RDONLY and state.flavour != STAGED:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
            return _SmallFile(lambda: b"measure func=FILE_CHECK mask=MAY_READ uid=0 \n" if state.policy else b"")
        if name == "violations":
            return _SmallFile(lambda: b"%d\n" % self._state().violations)
        return _SmallFile(lambda: b"%d\n" % self._state().count)

    def boot_id(self) -> str:
        return self._state().boot_id

    def machine_id(self) -> str:
        return self._state().machine_id

    def release(self) -> str:
        return self._state().release

    def command_line(self) -> str:
        state = self._state()
        words = ["ima_policy=tcb"] if state.policy else []
        words += [f"ima_hash={state.file_hash}", f"ima_template={state.template}"]
        return " ".join(words + ([FLUSH_HTABLE] if state.flush_htable else []))

    def reset_count(self) -> int | None:
        state = self._state()
        return state.reset_count if state.banks else None

    def tpm_banks(self) -> list[str]:
        return list(self._state().banks)

    def pcr(self, bank: str, index: int) -> bytes | None:
        state = self._state()
        return _pcr_value(state, bank, index) if bank in state.banks and 0 <= index <= 23 else None

    def measure(self, path: str) -> None:
        state = self._state()
        algorithm = _algorithm(state, state.template)
        digest = _digest_file(path, algorithm)
        if state.policy:
            feed(self.directory, records=[{"path": os.path.abspath(path), "digest": digest.hex()}])

    def holders(self) -> list[Holder]:
        return holders_of([os.path.join(self.directory, self._state().recorded)])


# --- the module -------------------------------------------------------------------------------------------------------


class Request(t.NamedTuple):
    """What is wanted of an emulated kernel: each part that is given is done, in this order."""

    parameters: t.Mapping[str, t.Any]
    feed_capture: str = ""
    feed: t.Sequence[t.Mapping[str, t.Any]] = ()
    grow: int = 0
    fault: str = ""
    trim: int = 0  # records that foreign_trim deletes


class Outcome(t.NamedTuple):
    """Whether it is a change, and :func:`describe` before and after (empty where there is no emulated kernel)."""

    changed: bool
    before: dict[str, t.Any]
    after: dict[str, t.Any]

    def diff(self) -> dict[str, dict[str, t.Any]]:
        """Counts and digests for the diff mode."""
        names = ("count", "records_recorded", "violations", "pcrs")
        shown = [{name: side[name] for name in names if name in side} for side in (self.before, self.after)]
        return {"before": shown[0], "after": shown[1]}


# Returning False means: it was so already.
_ACTIONS: t.Mapping[str, t.Callable[[str, int], t.Any]] = {
    "foreign_trim": foreign_trim,
    "reboot": lambda directory, count: reboot(directory),
    "kexec": lambda directory, count: kexec(directory, False),
    "kexec_carry_over": lambda directory, count: kexec(directory, True),
    "suspend": lambda directory, count: suspend(directory, True),
    "resume": lambda directory, count: suspend(directory, False),
    "phantom_reader": lambda directory, count: phantom(directory),
    **{fault: lambda directory, count, fault=fault: fail_next(directory, fault) for fault in FAULTS},  # type: ignore[misc]
}
ACTIONS = tuple(_ACTIONS)


def apply(directory: str, request: Request) -> Outcome:
    """Create the emulated kernel if there is none, then do the rest. Raises what the single functions raise."""
    before = describe(directory) if exists(directory, **request.parameters) else {}
    changed = create(directory, **request.parameters)
    if request.feed_capture or request.feed:
        changed |= feed(directory, capture=request.feed_capture, records=request.feed) > 0
    if request.grow > 0:
        grow(directory, request.grow)
        changed = True
    if request.fault:
        changed |= _ACTIONS[request.fault](directory, request.trim) is not False
    return Outcome(changed, before, describe(directory))


def predict(directory: str, request: Request) -> Outcome:
    """What :func:`apply` would change, without writing anything; PCR values and boot ids are shown as they are."""
    if not exists(directory, **request.parameters):
        return Outcome(True, {}, {})
    before = describe(directory)
    new = would_record(directory, request.feed) + request.grow
    if request.feed_capture:
        new += sum(1 for _raw in _captured(request.feed_capture))
    changed = new > 0 or (request.fault != "" and _would_change(_load(directory), request))
    after = dict(before, count=before["count"] + new, records_recorded=before["records_recorded"] + new)
    return Outcome(changed, before, after)


def withdraw(directory: str, *, check: bool) -> Outcome:
    """Remove the emulated kernel, or with ``check`` say whether there is one to remove."""
    if not exists(directory):
        return Outcome(False, {}, {})
    before = describe(directory)
    if not check:
        remove(directory)
    return Outcome(True, before, {})


def _would_change(state: State, request: Request) -> bool:
    known = {
        "suspend": not state.suspended,
        "resume": state.suspended,
        "phantom_reader": not state.phantom,
        **{fault: fault not in state.faults for fault in FAULTS},
    }
    return known.get(request.fault, True)
