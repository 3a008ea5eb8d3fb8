# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The well-known config, the lock and the generation counter; ``docs/PROTOCOL.md`` specifies them for others."""

from __future__ import annotations

import configparser
import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import time
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._emulated import EmulatedFiles
from ansible_collections.integrity.ima.plugins.module_utils._errors import ConfigError, LockError, printable
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import DIRECTORY, Files, KernelFiles, Lists

CONFIG = "/etc/ima/snapshot.conf"
MOUNTINFO = "/proc/self/mountinfo"
LOCKS = "/proc/locks"
TRIM_AFTER = ("local", "central", "verified", "never")

# flock(2) on these is translated, served by another machine, or lost with a server.
REMOTE = frozenset(
    (
        "nfs",
        "nfs4",
        "cifs",
        "smb3",
        "smbfs",
        "9p",
        "ceph",
        "glusterfs",
        "fuse.glusterfs",
        "fuse.sshfs",
        "fuse.cephfs",
        "fuse.s3fs",
        "lustre",
        "afs",
        "ocfs2",
        "gfs2",
        "beegfs",
        "gpfs",
        "ncpfs",
        "coda",
        "orangefs",
        "pvfs2",
    )
)


class Config(t.NamedTuple):
    """What the config says. Paths are absolute; times in seconds."""

    path: str
    name: str
    spool: str
    lock: str
    lock_timeout: int
    trim_after: str
    shard_records: int
    source: str
    directory: str
    busy_timeout: int
    keep_days: int | None = None
    keep_shards: int | None = None
    keep_bytes: int | None = None
    recipients: str = ""
    export_records: int | None = None
    export_bytes: int | None = None
    export_seconds: int | None = None
    stitched: str = ""

    def lists(self) -> Lists:
        """Return the measurement lists that the config names, the kernel's or an emulated kernel's."""
        files: Files = KernelFiles(self.directory) if self.source == "kernel" else EmulatedFiles(self.directory)
        return Lists(files, busy_timeout=float(self.busy_timeout))


_LONGEST = 1 << 16
VOLATILE = frozenset(("tmpfs", "ramfs"))


def _path(value: str) -> str:
    if not os.path.isabs(value) or os.path.normpath(value) != value.rstrip("/") or not value.isprintable():
        raise ValueError("must be an absolute path without . or .., of printable characters")
    return value.rstrip("/")


def _number(low: int, high: int) -> t.Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.match(r"[0-9]{1,16}\Z", value) or not low <= int(value) <= high:
            raise ValueError(f"must be a whole number from {low} to {high}")
        return int(value)

    return parse


def _optional(low: int, high: int) -> t.Callable[[str], int | None]:
    number = _number(low, high)

    def parse(value: str) -> int | None:
        return number(value) if value else None

    return parse


def _choice(*words: str) -> t.Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in words:
            raise ValueError(f"must be one of {', '.join(words)}")
        return value

    return parse


def _name(value: str) -> str:
    if not 1 <= len(value) <= 253 or not value.isprintable():
        raise ValueError("must be 1 to 253 printable characters")
    return value


# section -> key -> (reader, default); None: the key must stand there.
_KEYS: dict[str, dict[str, tuple[t.Callable[[str], t.Any], str | None]]] = {
    "snapshot": {
        "name": (_name, ""),
        "spool": (_path, None),
        "lock": (_path, ""),
        "lock_timeout": (_number(0, 86400), "60"),
        "trim_after": (_choice(*TRIM_AFTER), "central"),
        "shard_records": (_number(1, 10000000), "50000"),
    },
    "list": {
        "source": (_choice("kernel", "emulated"), "kernel"),
        "directory": (_path, DIRECTORY),
        "busy_timeout": (_number(0, 3600), "30"),
    },
    "encryption": {"recipients": (_path, "")},
    "retention": {
        "keep_days": (_optional(0, 36500), ""),
        "keep_shards": (_optional(1, 10**8), ""),
        "keep_bytes": (_optional(0, 1 << 50), ""),
    },
    "schedule": {
        "export_records": (_optional(1, 10**9), ""),
        "export_bytes": (_optional(1, 1 << 50), ""),
        "export_seconds": (_optional(1, 10**9), ""),
    },
    "stitched": {"directory": (_path, "")},
}
# The keys whose member of Config has another name, because two sections have a key of theirs.
_MEMBERS = {("stitched", "directory"): "stitched"}


def load(path: str = CONFIG) -> Config:
    """Return the config in ``path``.

    Raises :class:`ConfigError` with reason ``config_missing``, ``config_unsafe``, ``config_syntax``,
    ``config_unknown`` or ``config_value``; the last two name file, section and key.
    """
    parser = configparser.RawConfigParser(strict=True, delimiters=("=",), comment_prefixes=("#", ";"))
    # Keys keep their case, as for the shell reader. configparser asks for this very assignment; its types forbid it.
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    try:
        text = _read_safely(path)
        _require_plain(path, text)
        parser.read_string(text, source=path)
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be understood: {printable(str(error))}", reason="config_syntax", path=path
        ) from error
    for section in list(parser.sections()) + (["DEFAULT"] if parser.defaults() else []):
        for key in parser.defaults() if section == "DEFAULT" else parser.options(section):
            if key not in _KEYS.get(section, {}):
                raise _fault(path, section, key, "is not a key that this version knows", "config_unknown")
        if section not in _KEYS:
            raise _fault(path, section, "", "is not a section that this version knows", "config_unknown")
    values = {
        _MEMBERS.get((section, key), key): _value(parser, path, section, key)
        for section, keys in _KEYS.items()
        for key in keys
    }
    values["name"] = values["name"] or socket.gethostname()
    values["lock"] = values["lock"] or os.path.join(values["spool"], "lock")
    return Config(path=path, **values)


def _require_plain(path: str, text: str) -> None:
    """Refuse what the shell reader of ``docs/PROTOCOL.md`` reads otherwise than we do: it would take another lock."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and line != line.strip() and not line.rstrip(" ").endswith("="):
            raise ConfigError(
                f"{path}: line {number} begins or ends with a blank",
                reason="config_syntax",
                path=path,
                line=number,
                hint="each key stands in a line of its own, from its first column to the end of its value",
            )


def _fault(path: str, section: str, key: str, what: str, reason: str) -> ConfigError:
    where = f"key {printable(key)!r}" if key else "it"
    return ConfigError(
        f"{path}: section [{printable(section)}]: {where} {what}",
        reason=reason,
        path=path,
        section=printable(section),
        key=printable(key),
        hint="correct the file; docs/PROTOCOL.md lists the keys",
    )


def _value(parser: configparser.RawConfigParser, path: str, section: str, key: str) -> t.Any:
    read, default = _KEYS[section][key]
    value = parser.get(section, key, fallback=default)
    if value is None:
        raise _fault(path, section, key, "is missing", "config_value")
    if value == "" and default == "":
        return None if section in ("retention", "schedule") else ""
    try:
        return read(value)
    except ValueError as error:
        raise _fault(path, section, key, f"{error}, not {printable(value)[:80]!r}", "config_value") from error


def _read_safely(path: str) -> str:
    """Return the text of a file that only root, or the user who runs this, can have written."""
    try:
        # Never waits, should somebody have put a FIFO there.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(
            f"Cannot read the config {path}: {error.strerror}",
            reason="config_missing",
            path=path,
            hint="install the role integrity.ima.ima_snapshot on this host, or name another file with 'config'",
        ) from error
    try:
        status = os.fstat(descriptor)
        if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022 or not stat.S_ISREG(status.st_mode):
            raise ConfigError(
                f"The config {path} could have been written by others, or is no file (owner {status.st_uid}, mode "
                f"{status.st_mode:o})",
                reason="config_unsafe",
                path=path,
                hint="make it a file of root's with mode 0644",
            )
        data = os.read(descriptor, _LONGEST + 1)
    finally:
        os.close(descriptor)
    if len(data) > _LONGEST:
        raise ConfigError(f"The config {path} is longer than {_LONGEST} bytes", reason="config_syntax", path=path)
    return data.decode("utf-8")


def file_system(path: str) -> str:
    """Return the type of the file system that holds ``path`` (``ext4``, ``nfs4``, ...), from mountinfo (proc(5))."""
    path, best, kind = os.path.realpath(path), "", ""
    with open(MOUNTINFO, "rb") as file:
        for line in file:
            left, _dash, right = line.partition(b" - ")
            point = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m.group(1), 8)]), left.split(b" ")[4])
            mount = os.fsdecode(point)
            # A later mount on the same point hides the earlier one.
            if len(mount) >= len(best) and (path == mount or path.startswith(mount.rstrip("/") + "/")):
                best, kind = mount, right.split(b" ")[0].decode("ascii", "replace")
    return kind


def require_local(path: str) -> None:
    """Refuse a path on a network file system: reason ``remote_file_system``."""
    why = ", where flock(2) and fsync(2) do not promise what the spool needs"
    _refuse(path, REMOTE, "remote_file_system", why, "name a directory on a local disk")


def require_durable(path: str) -> None:
    """Refuse a path on a file system that a reboot empties: reason ``volatile_file_system``."""
    why = ": what leaves the kernel's memory must not go to memory again"
    _refuse(path, VOLATILE, "volatile_file_system", why, "name a directory on a disk")


def _refuse(path: str, kinds: frozenset[str], reason: str, why: str, hint: str) -> None:
    kind = file_system(path)
    if kind in kinds:
        raise ConfigError(f"{path} is on {kind}{why}", reason=reason, path=path, file_system=kind, hint=hint)


class Lock:
    """``flock(2)`` on the lock file that the config names, as a context manager.

    Exclusive to export, trim or prune, shared to read shards. The file is made once and never replaced. Bounded
    wait; then :class:`LockError` with reason ``locked`` names the holder. ``lock_symlink``, ``lock_replaced``: the
    path is not the file that was locked. Without ``create`` (check mode) a lock that nobody made yet is not taken.
    """

    def __init__(self, config: Config, *, shared: bool = False, create: bool = True) -> None:
        self._config = config
        self._create = os.O_CREAT if create else 0
        self._operation = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        self._descriptor = -1

    def __enter__(self) -> Lock:
        path = self._config.lock
        require_local(os.path.dirname(path))
        try:
            # Never waits for a reader at the other end, should somebody have put a FIFO there.
            flags = os.O_RDONLY | self._create | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            if error.errno == errno.ENOENT and not self._create:
                return self
            if error.errno == errno.ELOOP:
                raise LockError(
                    f"The lock {path} is a symbolic link: whoever made it could send two programs to two files",
                    reason="lock_symlink",
                    path=path,
                    hint="remove the link, find out who made it, run again",
                ) from error
            raise LockError(
                f"Cannot open the lock {path}: {error.strerror}",
                reason="lock_missing",
                path=path,
                hint="its directory must exist, and its owner must run this: usually root, with become",
            ) from error
        try:
            self._wait()
            self._same()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait(self) -> None:
        deadline = time.monotonic() + self._config.lock_timeout
        pause = 0.01
        while True:
            try:
                fcntl.flock(self._descriptor, self._operation | fcntl.LOCK_NB)
                return
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                    raise LockError(
                        f"flock refused {self._config.lock}: {error.strerror}", reason="lock_refused"
                    ) from error
            if time.monotonic() >= deadline:
                raise self._held()
            time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
            pause = min(pause * 2, 0.5)

    def _held(self) -> LockError:
        holders = lock_holders(self._descriptor)
        names = ", ".join(f"{h['command']} (pid {h['pid']})" for h in holders) or "a process that this one cannot see"
        return LockError(
            f"The lock {self._config.lock} is held by {names}; waited {self._config.lock_timeout} s",
            reason="locked",
            path=self._config.lock,
            holders=holders,
            kept="everything: nothing was read or changed",
            hint="let that process end; the kernel frees the lock when it dies",
        )

    def _same(self) -> None:
        mine = os.fstat(self._descriptor)
        try:
            now = os.lstat(self._config.lock)
            same = (now.st_dev, now.st_ino) == (mine.st_dev, mine.st_ino) and stat.S_ISREG(mine.st_mode)
        except FileNotFoundError:
            same = False
        if not same:
            raise LockError(
                f"{self._config.lock} was replaced while it was being locked",
                reason="lock_replaced",
                path=self._config.lock,
                hint="the lock file must never be removed; run again",
            )

    def __exit__(self, *_unused: t.Any) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):  # nothing was written through it; an error under way goes before
                os.close(self._descriptor)
            self._descriptor = -1


def lock_holders(descriptor: int) -> list[dict[str, t.Any]]:
    """Return pid and command of those who hold a ``flock`` on the open file, from ``/proc/locks`` (proc(5))."""
    status = os.fstat(descriptor)
    mine = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    holders = []
    with open(LOCKS, encoding="ascii", errors="replace") as file:
        for line in file:
            words = line.split()
            if len(words) >= 6 and words[1] == "FLOCK" and words[5] == mine:
                holders.append({"pid": int(words[4]), "command": _command(words[4])})
    return holders


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", "rb") as file:
            return printable(file.read(64).strip())
    except OSError:
        return "gone"


def generation(spool: str) -> int:
    """Return the generation counter of a spool; 0 when there is none that can be read."""
    try:
        with open(os.path.join(spool, "generation"), "rb") as file:
            text = file.read(32)
    except OSError:
        return 0
    return int(text) if re.match(rb"[0-9]{1,20}\n\Z", text) else 0


def raise_generation(spool: str, value: int) -> None:
    """Let readers know, without the lock, that the shards up to sequence ``value`` are sealed."""
    if generation(spool) != value:
        _durable.replace(os.path.join(spool, "generation"), b"%d\n" % value, 0o644)
