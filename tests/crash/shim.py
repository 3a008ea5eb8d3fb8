# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Death and errors at one call of a forked child, on the spool, on lists kept beside it or on the kernel's list.

Nothing in the product knows of it: the functions of ``os``, ``open`` and the emulated kernel's files are wrapped in the
child. A first run without a fault gives the calls; each way to strike fits some of them.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import errno
import os
import pickle
import shutil
import signal
import traceback
import typing as t
from pathlib import Path

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import Host

Work = t.Callable[[Host], object]
BY_DESCRIPTOR = ("write", "pwrite", "pread", "fsync", "close", "ftruncate", "fchmod")
WRAPPED = (*BY_DESCRIPTOR, "open", "link", "rename", "unlink", "mkdir")
WRITING = ("write", "pwrite")
LISTING = ("listdir", "scandir")
UNHIT, HIT, CRASHED = 0, 3, 4
PR_SET_PTRACER, PR_SET_PTRACER_ANY = 0x59616D61, (1 << 64) - 1  # prctl(2)

KILLS = ("killed before", "killed after")
DONE, HALF, DROPPED = "done, but EIO", "half a write", "fsync drops the pages"
# What each call can be answered with. ENOENT: the file went away meanwhile.
ERRORS: t.Mapping[str, tuple[str, ...]] = {
    "create": ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EMFILE", "ESTALE"),
    "write": ("EIO", "ENOSPC", "EDQUOT", "ESTALE"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT", "ESTALE"),
    "fsync directory": ("EIO", "ESTALE"),
    "link": ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "ENOENT"),
    "rename": ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "ENOENT"),
    "unlink": ("EIO", "EROFS", "ESTALE", "ENOENT"),
    "mkdir": ("EIO", "ENOSPC", "EDQUOT", "EROFS"),
    "ftruncate": ("EIO",),
    "fchmod": ("EIO", "EROFS"),
    "pread": ("EIO", "ESTALE"),
    "close": ("EIO", "ENOSPC", "EDQUOT"),
    "close directory": ("EIO",),
    "look": ("EIO", "EMFILE", "ESTALE", "ENOENT"),
    "look directory": ("EIO", "EMFILE", "ESTALE"),
    "listdir": ("EIO", "ESTALE"),
    "scandir": ("EIO", "ESTALE"),
    "kernel open": ("EBUSY", "ENOMEM"),
    "kernel read": ("EIO", "ENOMEM"),
    "kernel write": ("EIO", "ENOMEM", "EBUSY"),
}
STICKY = ("EIO", "ENOSPC", "EROFS", "EMFILE", "EBUSY")
ALL_ERRORS = tuple(sorted({name for names in ERRORS.values() for name in names}))
MODES = (
    *KILLS,
    DONE,
    HALF,
    DROPPED,
    *(f"{name} once" for name in ALL_ERRORS),
    *(f"{name} for ever" for name in STICKY),
)


class Call(t.NamedTuple):
    """A call: its function, what it is on, whether it changes something, and how much it wrote."""

    name: str
    path: str
    changes: bool
    directory: bool = False
    other: str = ""  # the new name of a link or rename
    size: int = 0

    @property
    def kind(self) -> str:
        """The key in :data:`ERRORS`."""
        if self.name == "open":
            what = "create" if self.changes else "look"
            return f"{what} directory" if self.directory else what
        if self.name in WRITING:
            return "write"
        return f"{self.name} directory" if self.directory and self.name in ("fsync", "close") else self.name


def fits(mode: str, call: Call) -> bool:
    """Say whether there is a point in striking this call so. Death at a call that only looks is one at another."""
    if mode in KILLS:
        return call.changes
    if call.path.endswith("/lock"):
        return False  # it is only looked at
    if mode == DONE:
        return call.changes and call.name != "close"
    if mode == HALF:
        return call.kind == "write" and call.size > 1
    if mode == DROPPED:
        return call.kind == "fsync"
    return mode.split()[0] in ERRORS.get(call.kind, ())


class Shim:
    """Wraps the calls of this process and strikes the ``number``-th, counted from 1; 0 strikes none."""

    def __init__(self, spool: str, number: int = 0, mode: str = "", *, durable: bool = False, lists: str = "") -> None:
        self.spool, self.number, self.mode = spool, number, mode
        self.lists = lists  # another file system: what fails for ever there does not fail in the spool
        self.durable = durable  # else processes die here, not disks: what is written is there
        self.hit = False
        self.log: list[Call] = []
        self.done: list[Call] = []  # those that changed something and succeeded
        self.open: dict[int, tuple[str, bool, bool]] = {}  # path, for write, a directory
        self.synced: dict[int, int] = {}  # how much of a file is on the disk
        self._real_pwrite = os.pwrite

    def install(self) -> None:
        """Wrap everything; there is no way back."""
        for name in WRAPPED:
            setattr(os, name, self._wrap(name, getattr(os, name)))
        for name in LISTING:
            setattr(os, name, self._listing(name, getattr(os, name)))
        # By setattr: to a type checker these are functions for ever.
        setattr(builtins, "open", self._builtin_open(builtins.open))  # noqa: B010
        kernel = _emulated.EmulatedFiles
        setattr(kernel, "open", self._kernel("open", kernel.open))  # noqa: B010
        for name in ("read", "write"):
            setattr(_emulated._ListFile, name, self._kernel(name, getattr(_emulated._ListFile, name)))

    # -- which calls count ------------------------------------------------------------------------------------------

    def _inside(self, path: t.Any) -> bool:
        return isinstance(path, str) and (below(path, self.spool) or below(path, self.lists))

    def _path(self, path: t.Any, folder: int | None) -> str:
        """Where a path leads, if that is in the spool."""
        if folder is not None:
            return os.path.join(self.open[folder][0], path) if folder in self.open else ""
        return path if self._inside(path) else ""

    def _call(self, name: str, args: tuple[t.Any, ...], keywords: dict[str, t.Any]) -> Call | None:
        """What a call of ``os`` is; None when it is none on the spool."""
        if name in BY_DESCRIPTOR:
            path, written, directory = self.open.get(args[0], ("", False, False))
            changes = written if name == "close" else name != "pread"
            size = len(args[1]) if name in WRITING else 0
            return Call(name, path, changes, directory, "", size) if path else None
        path = self._path(args[0], keywords.get("dir_fd", keywords.get("src_dir_fd")))
        if not path:
            return None
        if name == "open":
            changes = bool(args[1] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR))
            return Call(name, path, changes, bool(args[1] & os.O_DIRECTORY))
        other = self._path(args[1], keywords.get("dst_dir_fd")) if name in ("link", "rename") else ""
        return Call(name, path, True, False, other)

    # -- the wrappers -----------------------------------------------------------------------------------------------

    def _strikes(self, call: Call) -> bool:
        self.log.append(call)
        now = len(self.log) == self.number
        later = self.mode.endswith("for ever") and len(self.log) > self.number > 0 and fits(self.mode, call)
        if later:
            later = below(call.path, self.lists) == below(self.log[self.number - 1].path, self.lists)
        self.hit = self.hit or now
        return now or later

    def _struck(self, call: Call, real: t.Callable[[], t.Any]) -> t.Any:
        """The call, with the fault if it is its turn."""
        if not self._strikes(call):
            return real()
        if self.mode == KILLS[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mode == KILLS[1]:
            with contextlib.suppress(OSError):
                real()
            os.kill(os.getpid(), signal.SIGKILL)
        if self.mode == DONE or call.name == "close":
            with contextlib.suppress(FileExistsError):
                result = real()
                if call.name == "open":
                    os.close(result)  # the number was never given to anybody
        code = errno.EIO if self.mode in (DONE, DROPPED) else getattr(errno, self.mode.split()[0])
        raise OSError(code, os.strerror(code))

    def _wrap(self, name: str, real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        def wrapper(*args: t.Any, **keywords: t.Any) -> t.Any:
            call = self._call(name, args, keywords)
            if call is None:
                return real(*args, **keywords)
            if name in WRITING and self.mode == HALF and len(self.log) + 1 == self.number:
                args = (args[0], bytes(args[1])[: (len(args[1]) + 1) // 2], *args[2:])
                self._strikes(call)
                return real(*args)
            if name == "fsync" and self.mode == DROPPED and len(self.log) + 1 == self.number:
                self._drop(args[0])
            return self._struck(call, lambda: self._done(call, args, real, keywords))

        return wrapper

    def _done(self, call: Call, args: tuple[t.Any, ...], real: t.Callable[..., t.Any], keywords: t.Any) -> t.Any:
        if call.name == "close":  # first: the number may be another's at once
            self.open.pop(args[0])
            self.synced.pop(args[0], None)
        result: t.Any = None if call.name == "fsync" and not self.durable else real(*args, **keywords)
        if call.name == "fsync":
            self.synced[args[0]] = os.fstat(args[0]).st_size
        if call.name == "open":
            self.open[result] = (call.path, bool(args[1] & (os.O_WRONLY | os.O_RDWR)), call.directory)
            self.synced[result] = os.fstat(result).st_size  # what was there is on the disk
        if call.name == "ftruncate":
            self.synced[args[0]] = min(self.synced[args[0]], args[1])
        if call.changes:
            self.done.append(call._replace(size=result) if call.name in WRITING else call)
        return result

    def _drop(self, descriptor: int) -> None:
        """What an ``fsync`` that failed leaves: pages marked clean that never reached the disk."""
        start, end = self.synced.get(descriptor, 0), os.fstat(descriptor).st_size
        assert end > start or end == 0, "there is nothing to drop"
        self._real_pwrite(descriptor, bytes(end - start), start)

    def _listing(self, name: str, real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        def wrapper(path: t.Any = ".") -> t.Any:
            return self._struck(Call(name, path, False), lambda: real(path)) if self._inside(path) else real(path)

        return wrapper

    def _builtin_open(self, real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        def wrapper(file: t.Any, mode: str = "r", *args: t.Any, **keywords: t.Any) -> t.Any:
            if not self._inside(file):
                return real(file, mode, *args, **keywords)
            changes = bool(set(mode) & set("wax+"))
            return self._struck(Call("open", file, changes), lambda: real(file, mode, *args, **keywords))

        return wrapper

    def _kernel(self, name: str, real: t.Callable[..., t.Any]) -> t.Callable[..., t.Any]:
        def wrapper(kernel: t.Any, *args: t.Any) -> t.Any:
            path = str(args[0]) if name == "open" else ""
            call = Call(f"kernel {name}", path, name == "write")
            return self._struck(call, lambda: real(kernel, *args))

        return wrapper


def below(path: str, directory: str) -> bool:
    """Whether a file is in a directory, or that itself."""
    return bool(directory) and (path + "/").startswith(directory + "/")


class Run(t.NamedTuple):
    """How a child ended: whether it was hit, the reason that it raised, and its calls (of one that was not killed)."""

    state: int
    answer: str
    calls: list[Call]
    done: list[Call]  # those that changed something and succeeded


def strike(host: Host, work: Work, number: int = 0, mode: str = "") -> Run:
    """Do the work in a child that is struck at one call."""
    return ended(*started(host, work, Shim(host.spool, number, mode, lists=getattr(host, "lists", ""))))


def started(host: Host, work: Work, shim: Shim | None, gate: int | None = None) -> tuple[int, int]:
    """Begin the work in a child, once there is a byte to read from ``gate``; pid and pipe, for :func:`ended`."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        _child(host, work, shim, into, gate)
    os.close(into)
    return pid, out


def ended(pid: int, out: int) -> Run:
    """Wait for the child's end."""
    with os.fdopen(out, "rb") as pipe:
        data = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL and not data
        return Run(HIT, "killed", [], [])
    answer, calls, done = pickle.loads(data)
    assert os.WEXITSTATUS(status) in (UNHIT, HIT), answer
    return Run(os.WEXITSTATUS(status), answer, [Call(*call) for call in calls], [Call(*call) for call in done])


def _child(host: Host, work: Work, shim: Shim | None, into: int, gate: int | None) -> t.NoReturn:
    """Never returns into the parent's code."""
    write, leave = os.write, os._exit
    answer, code = "", CRASHED
    try:
        if shim:
            shim.install()
        if gate is not None:
            # Where Yama rules, a tracer that is no ancestor needs to be allowed.
            ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_ulong(PR_SET_PTRACER_ANY))
            os.read(gate, 1)
        code = UNHIT
        work(host)
    except ImaError as error:
        answer = error.reason
    except OSError as error:
        answer = f"OSError {errno.errorcode.get(error.errno or 0, '?')}"
    except BaseException:
        answer, code = traceback.format_exc(), CRASHED
    if code == UNHIT and shim and shim.hit:
        code = HIT
    log, done = (shim.log, shim.done) if shim else ([], [])
    data = pickle.dumps((answer, [tuple(call) for call in log], [tuple(call) for call in done]))
    while data:
        data = data[write(into, data) :]
    leave(code)


class Scene:
    """A host in one state, put back before each strike."""

    def __init__(self, root: Path, host: Host) -> None:
        self.host, self._saved = host, str(root / "saved")
        for name in ("spool", "ima"):
            shutil.copytree(os.path.join(host.root, name), os.path.join(self._saved, name))
        self._keys = pickle.dumps((host.before, host.carried))

    def restore(self) -> None:
        """Put it back."""
        for name in ("spool", "ima"):
            shutil.rmtree(os.path.join(self.host.root, name))
            shutil.copytree(os.path.join(self._saved, name), os.path.join(self.host.root, name))
        self.host.before, self.host.carried = pickle.loads(self._keys)
