# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The kernel's measurement-list files, and the rules of using them.

:class:`Files` is the directory, real (:class:`KernelFiles`) or emulated; it answers with the kernel's ``OSError``.
:class:`Lists` is what everybody else uses: it knows the flavours, waits while a list is busy, and turns errno values
into :class:`KernelError`. Source of all rules: ``security/integrity/ima/ima_fs.c`` and ``ima_queue.c`` (Linux 7.3).
"""

from __future__ import annotations

import abc
import errno
import hashlib
import os
import random
import re
import time
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import KernelError, printable

DIRECTORY = "/sys/kernel/security/integrity/ima"
TPM_DIRECTORY = "/sys/class/tpm/tpm0"
EXPORT_ONLY, DELETE_N, STAGED = "export_only", "delete_n", "staged"
BANK_ORDER = ("sha1", "sha256", "sha384", "sha512")
# The boot parameter without which D keeps the hash table, and with which N is refused.
FLUSH_HTABLE = "ima_flush_htable"

_LIST_NAME = re.compile(r"(ascii|binary)_runtime_measurements(_[0-9a-z_-]+)?\Z")
_COUNT = re.compile(rb"[0-9]{1,20}\n\Z")
_SHORTEST_WAIT, _LONGEST_WAIT = 0.01, 0.5  # seconds


class Holder(t.NamedTuple):
    """A process that has a list file open; ``command`` is printable text from ``/proc/<pid>/comm``."""

    pid: int
    command: str


class File(abc.ABC):
    """One open descriptor of a list file. Every method raises ``OSError`` as the kernel does."""

    @abc.abstractmethod
    def read(self, size: int) -> bytes:
        """At most ``size`` bytes, often fewer (the kernel gives a page), perhaps half a record; empty at the end."""

    @abc.abstractmethod
    def write(self, data: bytes) -> int:
        """One ``write(2)``: a command to the kernel. The number of bytes taken."""

    @abc.abstractmethod
    def rewind(self) -> None:
        """Read from the head again (``lseek`` to 0)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Release the descriptor and with it the kernel's lock; a second call does nothing."""

    def __enter__(self) -> File:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()


class Files(abc.ABC):
    """The directory of the measurement lists, and what is known of the boot and of the TPM beside it.

    Every method raises ``OSError`` as the kernel does, unless it says otherwise.
    """

    emulated: bool
    directory: str

    @abc.abstractmethod
    def listdir(self) -> list[str]:
        """The names in the directory, sorted."""

    @abc.abstractmethod
    def mode(self, name: str) -> int:
        """The permission bits of ``name``, symlinks followed. ``FileNotFoundError`` when there is no such name."""

    @abc.abstractmethod
    def open(self, name: str, flags: int) -> File:
        """Open ``name`` with ``os.O_*`` flags; close-on-exec always. ``EBUSY`` at once when the lists are locked."""

    @abc.abstractmethod
    def boot_id(self) -> str:
        """The UUID of this boot, as text. It changes at a kexec too. :class:`KernelError` ``no_boot_id``."""

    @abc.abstractmethod
    def machine_id(self) -> str:
        """The 32 hexadecimal digits of ``/etc/machine-id``. :class:`KernelError` ``no_machine_id``."""

    @abc.abstractmethod
    def release(self) -> str:
        """The kernel release, as ``uname -r``."""

    @abc.abstractmethod
    def command_line(self) -> str:
        """The kernel's command line, without the newline."""

    @abc.abstractmethod
    def reset_count(self) -> int | None:
        """The TPM's reset counter (rises at a reboot, not at a kexec); None when it is not known."""

    @abc.abstractmethod
    def tpm_banks(self) -> list[str]:
        """The TPM's PCR banks, sha1 before sha256 and so on; empty without a TPM."""

    @abc.abstractmethod
    def pcr(self, bank: str, index: int) -> bytes | None:
        """The value of one PCR, or None when there is no such bank. :class:`KernelError` ``pcr_unreadable``."""

    @abc.abstractmethod
    def measure(self, path: str) -> None:
        """Open ``path`` for read and read it to the end once, so that the kernel measures it if its policy says so."""

    @abc.abstractmethod
    def holders(self) -> list[Holder]:
        """The processes that have any list file open, this one included, sorted by pid. The unseen are left out."""


def _read_small(path: str, limit: int = 65536) -> bytes:
    """A small file, at most ``limit`` bytes of it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = b""
        while len(data) < limit:
            piece = os.read(descriptor, limit - len(data))
            if not piece:
                break
            data += piece
        return data
    finally:
        os.close(descriptor)


def read_through(path: str) -> None:
    """Open ``path`` for read and read it to the end: what makes IMA measure a file (``FILE_CHECK``)."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        while os.read(descriptor, 1 << 20):
            pass
    finally:
        os.close(descriptor)


def _command_of(pid: str) -> str:
    try:
        return printable(_read_small(f"/proc/{pid}/comm", 64).rstrip(b"\n"))
    except OSError:
        return ""


def _has_open(pid: str, names: t.Container[str], identities: t.Container[tuple[int, int]]) -> bool:
    folder = f"/proc/{pid}/fd"
    for number in os.listdir(folder):
        try:
            # The name decides first: a stat of every descriptor could hang on a dead network file system.
            if os.path.basename(os.readlink(f"{folder}/{number}")) in names:
                found = os.stat(f"{folder}/{number}")
                if (found.st_dev, found.st_ino) in identities:
                    return True
        except OSError:
            continue
    return False


def holders_of(paths: t.Iterable[str]) -> list[Holder]:
    """The processes that have one of ``paths`` open, from ``/proc/*/fd``: all of them for root, its own for others."""
    names: set[str] = set()
    identities: set[tuple[int, int]] = set()
    for path in paths:
        try:
            found = os.stat(path)
        except OSError:
            continue
        names.add(os.path.basename(os.path.realpath(path)))
        identities.add((found.st_dev, found.st_ino))
    holders: list[Holder] = []
    for pid in os.listdir("/proc"):
        try:
            if pid.isdigit() and _has_open(pid, names, identities):
                holders.append(Holder(int(pid), _command_of(pid)))
        except OSError:
            continue
    return sorted(holders)


class KernelFile(File):
    """A descriptor of the real kernel's file."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self, size: int) -> bytes:
        return os.read(self._descriptor, size)

    def write(self, data: bytes) -> int:
        return os.write(self._descriptor, data)

    def rewind(self) -> None:
        os.lseek(self._descriptor, 0, os.SEEK_SET)

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


class KernelFiles(Files):
    """The running kernel."""

    emulated = False

    def __init__(self, directory: str = DIRECTORY) -> None:
        self.directory = directory

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    def listdir(self) -> list[str]:
        return sorted(os.listdir(self.directory))

    def mode(self, name: str) -> int:
        return os.stat(self._path(name)).st_mode & 0o7777

    def open(self, name: str, flags: int) -> File:
        return KernelFile(os.open(self._path(name), flags | os.O_CLOEXEC))

    def _identity(self, path: str, pattern: str, reason: str) -> str:
        try:
            text = _read_small(path, 128).decode("ascii", "replace").strip()
        except OSError as error:
            raise KernelError(f"{path} cannot be read: {error.strerror}", reason=reason, path=path) from error
        if not re.match(pattern, text):
            raise KernelError(f"{path} does not hold an identity: {text!r}", reason=reason, path=path)
        return text

    def boot_id(self) -> str:
        pattern = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z"
        return self._identity("/proc/sys/kernel/random/boot_id", pattern, "no_boot_id")

    def machine_id(self) -> str:
        return self._identity("/etc/machine-id", r"[0-9a-f]{32}\Z", "no_machine_id")

    def release(self) -> str:
        return os.uname().release

    def command_line(self) -> str:
        return _read_small("/proc/cmdline").decode("utf-8", "replace").strip()

    def reset_count(self) -> int | None:
        return None

    def tpm_banks(self) -> list[str]:
        try:
            names = os.listdir(TPM_DIRECTORY)
        except FileNotFoundError:
            return []
        return in_bank_order(name[len("pcr-") :] for name in names if name.startswith("pcr-"))

    def pcr(self, bank: str, index: int) -> bytes | None:
        path = f"{TPM_DIRECTORY}/pcr-{bank}/{index}"
        try:
            value = bytes.fromhex(_read_small(path, 256).decode("ascii").strip())
            if len(value) != hashlib.new(bank).digest_size:
                raise ValueError(f"it has {len(value)} bytes")
            return value
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise KernelError(
                f"PCR {index} of bank {bank} cannot be read: {error}", reason="pcr_unreadable", path=path
            ) from error

    def measure(self, path: str) -> None:
        read_through(path)

    def holders(self) -> list[Holder]:
        try:
            names = [name for name in self.listdir() if _LIST_NAME.match(name)]
        except OSError:
            return []
        return holders_of(self._path(name) for name in names)


def in_bank_order(banks: t.Iterable[str]) -> list[str]:
    """The banks that the library can compute, each once, in the one order; others (SM3, unknown ones) are left out."""
    known = set(banks)
    return [bank for bank in BANK_ORDER if bank in known]


class _View(File):
    """Several readers one after the other, as one read-only list."""

    def __init__(self, parts: t.Sequence[File]) -> None:
        self._parts = parts
        self._current = 0

    def read(self, size: int) -> bytes:
        while self._current < len(self._parts):
            data = self._parts[self._current].read(size)
            if data or size == 0:
                return data
            self._current += 1
        return b""

    def write(self, data: bytes) -> int:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    def rewind(self) -> None:
        for part in self._parts:
            part.rewind()
        self._current = 0

    def close(self) -> None:
        for part in self._parts:
            part.close()


_DELETE_REASONS = {
    errno.ENOENT: ("fewer_records", "The list holds fewer than {count} records; nothing was deleted"),
    errno.ESTALE: ("suspended", "Measuring is suspended (reboot or kexec in progress); nothing was deleted"),
    errno.EINVAL: ("delete_refused", "The kernel refuses to delete {count} records; nothing was deleted"),
    errno.ERANGE: ("delete_refused", "The kernel cannot count to {count}; nothing was deleted"),
}
_DELETE_STAGED_REASONS = {
    errno.ENOENT: ("nothing_staged", "There is no staged list to delete"),
    errno.ESTALE: (
        "suspended",
        "Measuring is suspended (reboot or kexec in progress); the staged list was not deleted",
    ),
    errno.EINVAL: ("delete_refused", "The kernel refuses to delete the staged list"),
}
_UNKNOWN_HINT = (
    "close the list, recover from the start, and look at what the list holds; never just repeat the deletion"
)


def _command(file: File, data: bytes, reasons: t.Mapping[int, tuple[str, str]], count: int) -> None:
    """One write that deletes. Whatever is not a known refusal leaves the outcome unknown."""
    try:
        written = file.write(data)
    except OSError as error:
        code = error.errno or 0
        if code in reasons:
            reason, text = reasons[code]
            raise KernelError(
                text.format(count=count), reason=reason, errno=errno.errorcode[code], count=count
            ) from error
        name = errno.errorcode.get(code, str(error))
        msg = f"The deletion was answered with {name}; whether records were deleted is not known"
        raise KernelError(msg, reason="delete_unknown", hint=_UNKNOWN_HINT, errno=name, count=count) from error
    if written != len(data):
        msg = (
            f"The kernel took {written} of {len(data)} bytes of the command; whether records were deleted is not known"
        )
        raise KernelError(msg, reason="delete_unknown", hint=_UNKNOWN_HINT, errno="", count=count)


class Lists:
    """The measurement lists of one host: flavour, opening with patience, counting, deleting.

    ``busy_timeout`` is in seconds: how long an open is tried again while the kernel answers ``EBUSY``.
    """

    def __init__(self, files: Files, busy_timeout: float = 30.0) -> None:
        self.files = files
        self._busy_timeout = busy_timeout

    def _mode(self, name: str) -> int | None:
        """The permission bits, or None when there is no such file."""
        try:
            return self.files.mode(name)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except PermissionError as error:
            raise self._not_permitted(name, error) from error

    def _not_permitted(self, name: str, error: OSError) -> KernelError:
        hint = "run as root with CAP_SYS_ADMIN in the initial user namespace, outside of containers"
        msg = f"{self.files.directory}/{name} may not be opened"
        return KernelError(msg, reason="not_permitted", hint=hint, errno=errno.errorcode.get(error.errno or 0, ""))

    def _no_list(self) -> KernelError:
        hint = (
            "check that securityfs is mounted (mount -t securityfs securityfs /sys/kernel/security), that the kernel "
            "has IMA (CONFIG_IMA=y; a container has none: take it out of the group), "
            "and that the systemd unit, if there is one, does not set ProtectKernelTunables"
        )
        return KernelError(
            f"There is no measurement list in {self.files.directory}", reason="no_measurement_list", hint=hint
        )

    def _list_mode(self) -> int:
        if self._mode("ima_trim_log") is not None:
            hint = "trim with the vendor's tool, or use a kernel of 7.2 or later without that patch"
            raise KernelError("The kernel has the vendor interface ima_trim_log", reason="vendor_trim_log", hint=hint)
        mode = self._mode("binary_runtime_measurements")
        if mode is None:
            raise self._no_list()
        return mode

    def _flushes_htable(self) -> bool:
        # The kernel takes the parameter without a value, and a dash for an underscore.
        return FLUSH_HTABLE in (word.split("=")[0].replace("-", "_") for word in self.files.command_line().split())

    def flavour(self) -> str:
        """What the kernel offers: ``export_only``, ``delete_n`` or ``staged``.

        Decided by the permission bits, never by opening: before 7.2 root opens a 0440 file for write without an error.
        Raises :class:`KernelError` ``no_measurement_list``, ``vendor_trim_log``, ``not_permitted``.
        """
        mode = self._list_mode()
        if (self._mode("binary_runtime_measurements_staged") or 0) & 0o200:
            return STAGED
        return DELETE_N if mode & 0o200 and not self._flushes_htable() else EXPORT_ONLY

    def can_delete_n(self) -> bool:
        """Whether the kernel takes ``N``: also true on the staged flavour, unless booted with ``ima_flush_htable``."""
        return bool(self._list_mode() & 0o200) and not self._flushes_htable()

    def records_recur(self) -> bool:
        """Whether the kernel records an unchanged file again after a deletion (``ima_flush_htable``)."""
        return self._flushes_htable()

    def banks(self) -> list[str]:
        """The banks of the list files (6.10 and later) and of the TPM, and sha1, in :data:`BANK_ORDER`."""
        names = [name for name in self._listdir() if name.startswith("binary_runtime_measurements_")]
        return in_bank_order([name.split("_")[3] for name in names] + self.files.tpm_banks() + ["sha1"])

    def _listdir(self) -> list[str]:
        try:
            return self.files.listdir()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._no_list() from error
        except PermissionError as error:
            raise self._not_permitted("", error) from error

    def count(self) -> int:
        """The number of records in the live list. It drops at a deletion. :class:`KernelError` ``malformed_count``."""
        return self._number("runtime_measurements_count")

    def violations(self) -> int:
        """The number of violations since boot. :class:`KernelError` ``malformed_count``."""
        return self._number("violations")

    def _number(self, name: str) -> int:
        with self._open(name, os.O_RDONLY) as file:
            # One read: each renders the number anew, so the rest of "9" may be that of "10".
            data = file.read(64)
        if not _COUNT.match(data):
            raise KernelError(f"{name} does not hold a number: {printable(data)}", reason="malformed_count")
        return int(data)

    def reader(self, bank: str = "", *, ascii: bool = False, staged: bool = False) -> File:
        """A read-only descriptor of a list; while it is open nobody can delete.

        ``bank`` "" is the plain file (the sha1 list). Raises :class:`KernelError` ``list_busy``, ``not_permitted``,
        ``no_measurement_list``, ``not_staged_kernel``.
        """
        return self._open(_name(bank, ascii=ascii, staged=staged), os.O_RDONLY)

    def view(self) -> File:
        """All that the kernel still holds, read-only: the staged list (if the flavour has one), then the live list.

        Both are open before the first byte is read, so that nothing can move from one to the other meanwhile.
        Raises as :meth:`reader`.
        """
        parts: list[File] = []
        try:
            if self.flavour() == STAGED:
                parts.append(self.reader(staged=True))
            parts.append(self.reader())
        except BaseException:
            _View(parts).close()
            raise
        return _View(parts)

    def writer(self, *, staged: bool = False) -> File:
        """The one descriptor, for read and write, with which a list is read and deleted; it locks out everybody else.

        Have only one at a time, and close it in the thread that opened it, before any fork: with two of them the kernel
        (7.3.4, ``ima_fs.c``) can count a reader that does not exist, and refuses every later deletion until a reboot.
        Raises as :meth:`reader`.
        """
        return self._open(_name("", staged=staged), os.O_RDWR)

    def _open(self, name: str, flags: int) -> File:
        deadline = time.monotonic() + self._busy_timeout
        wait = _SHORTEST_WAIT
        while True:
            try:
                return self.files.open(name, flags | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise self._refusal(name, error) from error
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._busy(name, flags) from error
            time.sleep(min(left, wait * random.uniform(0.5, 1.5)))
            wait = min(wait * 2, _LONGEST_WAIT)

    def _refusal(self, name: str, error: OSError) -> KernelError:
        if error.errno in (errno.EPERM, errno.EACCES):
            return self._not_permitted(name, error)
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            if name.endswith("_staged"):
                hint = "the kernel must be built with CONFIG_IMA_STAGING=y"
                return KernelError("The kernel has no staged list", reason="not_staged_kernel", hint=hint)
            return self._no_list()
        return KernelError(
            f"{self.files.directory}/{name} cannot be opened: {error.strerror}",
            errno=errno.errorcode.get(error.errno or 0, ""),
        )

    def _busy(self, name: str, flags: int) -> KernelError:
        holders = self.files.holders()
        seen = ", ".join(f"{holder.command} (pid {holder.pid})" for holder in holders)
        details = [{"pid": holder.pid, "command": holder.command} for holder in holders]
        msg = f"The measurement list stayed busy for {self._busy_timeout:g} s"
        if seen:
            hint = "let these processes close the list, or give them a copy of it to read"
            return KernelError(f"{msg}; it is held open by {seen}", reason="list_busy", hint=hint, holders=details)
        hint = "a holder may be hidden in another PID namespace; look for it as root on the host"
        if flags & os.O_ACCMODE != os.O_RDONLY and self._can_read(name):
            hint = (
                "nobody but readers can block this, and no reader is to be seen: "
                "this may be a phantom reader (a kernel accounting bug), which only a reboot removes"
            )
        return KernelError(f"{msg}; no process is seen to hold it", reason="list_busy", hint=hint, holders=details)

    def _can_read(self, name: str) -> bool:
        try:
            self.files.open(name, os.O_RDONLY | os.O_CLOEXEC).close()
        except OSError:
            return False
        return True

    def delete(self, file: File, count: int) -> None:
        """Delete the first ``count`` records of the live list, for good, with one write on ``file`` (a :meth:`writer`).

        It is not idempotent and never tried again. :class:`KernelError`: ``fewer_records``, ``suspended`` and
        ``delete_refused`` deleted nothing; after ``delete_unknown`` recover from the start and look.
        """
        if count < 1:
            raise KernelError(f"{count} records cannot be deleted", reason="delete_refused", errno="", count=count)
        _command(file, b"%d\n" % count, _DELETE_REASONS, count)

    def stage(self, file: File) -> str:
        """Move the live list to the staged list, with one write on ``file`` (a staged :meth:`writer`).

        Returns ``staged``, ``leftover`` (an earlier staged list is still there; nothing moved) or ``empty`` (the live
        list has no records). Raises :class:`KernelError` ``suspended``, ``stage_failed``.
        """
        try:
            if file.write(b"A\n") == 2:
                return "staged"
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        except OSError as error:
            if error.errno == errno.EEXIST:
                return "leftover"
            if error.errno == errno.ENOENT:
                return "empty"
            name = errno.errorcode.get(error.errno or 0, str(error))
            if error.errno == errno.EACCES:
                msg = "Measuring is suspended (reboot or kexec in progress); nothing was staged"
                raise KernelError(msg, reason="suspended", errno=name) from error
            hint = "close the list, recover from the start, and look whether there is a staged list"
            raise KernelError(
                f"Staging was answered with {name}", reason="stage_failed", hint=hint, errno=name
            ) from error

    def delete_staged(self, file: File) -> None:
        """Delete the staged list, for good, with one write on ``file`` (a staged :meth:`writer`).

        :class:`KernelError`: ``nothing_staged``, ``suspended`` and ``delete_refused`` deleted nothing; after
        ``delete_unknown`` (``ENOMEM`` too: 7.3.4 has then lost the staged list) recover from the start and look.
        """
        _command(file, b"D\n", _DELETE_STAGED_REASONS, 0)


def _name(bank: str, *, ascii: bool = False, staged: bool = False) -> str:
    return (
        ("ascii" if ascii else "binary")
        + "_runtime_measurements"
        + (f"_{bank}" if bank else "")
        + ("_staged" if staged else "")
    )
