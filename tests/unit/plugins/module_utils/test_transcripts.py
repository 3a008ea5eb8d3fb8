# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The emulated kernel against what real kernels answered: every line of the transcripts is done again and compared.

Each transcript was printed by one program on a real kernel, a line per observation. The drivers here walk its lines: a
line that no step knows fails, so none is skipped. The sizes of the records are chosen so that the byte counts must be
equal too.
"""

from __future__ import annotations

import ast
import errno
import os
import re
import threading
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import File

TRANSCRIPTS = Path(__file__).resolve().parents[3] / "fixtures" / "transcripts"
BINARY, ASCII = "binary_runtime_measurements", "ascii_runtime_measurements"
RECORD = 87  # bytes of an ima-ng record with a SHA-256 digest, without its path
BOOT_AGGREGATE = RECORD + len("boot_aggregate")
_STATE = re.compile(r"(.*?) +count=(\d+) live=(\d+) staged=(\S+) viol=(\d+) pcr10=([0-9A-F]{16})\Z")
_BUSY = "Device or resource busy"


def in_child(function: t.Callable[[], object]) -> str:
    """What ``function`` returns in another process, as text; an ``OSError`` as its errno name."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(into, str(answer(function)).encode())
        finally:
            os._exit(0)
    os.close(into)
    with os.fdopen(out) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    return text


def answer(function: t.Callable[[], object]) -> object:
    try:
        return function()
    except OSError as error:
        return errno.errorcode[error.errno or 0]


def spread(total: int, count: int) -> list[int]:
    """Sizes of ``count`` records that have ``total`` bytes together."""
    return [total // count + (number < total % count) for number in range(count)]


def read_all(file: File) -> bytes:
    return b"".join(iter(lambda: file.read(1 << 20), b""))


class Machine:
    """The emulated kernel in the state in which the program found the real one."""

    def __init__(self, directory: Path, sizes: t.Sequence[int], pid: str, **parameters: t.Any) -> None:
        self.directory = str(directory / "kernel")
        self.scratch = directory
        self.pid = pid
        self.pcrs: dict[str, str] = {}
        _emulated.create(self.directory, **parameters)
        self.files = _emulated.EmulatedFiles(self.directory)
        for number, size in enumerate(sizes):
            self.record("/" + f"{number:03d}".rjust(size - RECORD - 1, "x"))

    def record(self, path: str) -> int:
        return _emulated.feed(self.directory, records=[{"path": path, "content": path}])

    def count(self) -> int:
        return int(self.content("runtime_measurements_count"))

    def content(self, name: str) -> bytes:
        with self.files.open(name, os.O_RDONLY) as file:
            return read_all(file)

    def size(self, name: str) -> str:
        return str(answer(lambda: len(self.content(name))))

    def write(self, name: str, data: bytes, flags: int = os.O_WRONLY) -> object:
        def once() -> int:
            with self.files.open(name, flags) as file:
                return file.write(data)

        return answer(once)

    def opened(self, name: str, flags: int) -> object:
        """``ok`` or an errno name; closed again at once."""
        return answer(lambda: self.files.open(name, flags).close() or "ok")

    def check_state(self, line: str, state: t.Sequence[str]) -> None:
        """Counts are equal, and the PCR changes exactly where the real one did."""
        count, live, staged, violations, shown = state
        has_staged = f"{BINARY}_staged" in self.files.listdir()
        seen = (self.count(), self.size(BINARY), self.size(f"{BINARY}_staged") if has_staged else "-")
        assert (*seen, int(self.content("violations"))) == (int(count), live, staged, int(violations)), line
        value = (self.files.pcr("sha256", 10) or b"").hex()
        assert self.pcrs.setdefault(shown, value) == value, line
        assert len(set(self.pcrs.values())) == len(self.pcrs), line


Step = t.Callable[["Walk", str], object]
STEPS: dict[str, Step] = {}


def step(*labels: str) -> t.Callable[[Step], Step]:
    def register(function: Step) -> Step:
        STEPS.update(dict.fromkeys(labels, function))
        return function

    return register


class Walk:
    """Goes through the lines of a transcript; a step does what the program did and returns what it printed."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.held: list[File] = []
        self.forked = False
        self.duplicate = machine.scratch / "dup"
        self.duplicate.write_text("dup")

    def line(self, line: str) -> None:
        if line.startswith(("kernel ", "## ")):
            return
        if re.match(r"   \S+ 0o", line):
            return self.check_name(line)
        if "staged ascii tail:" in line or "live ascii tail:" in line:
            return self.check_tail(line)
        label, arrow, shown = line.partition(" -> ")
        state = _STATE.match(shown)
        result = self.do(label.strip(), line)
        assert str(result) == (state.group(1) if state else shown).strip(), line
        if state:
            self.machine.check_state(line, state.groups()[1:])

    def do(self, label: str, line: str) -> object:
        written = re.match(r"write (b'.*') to (staged \(nothing staged\)|\S+)\Z", label)
        if written:
            name = f"{BINARY}_staged" if written.group(2).startswith("staged") else written.group(2)
            return self.machine.write(name, ast.literal_eval(written.group(1)))
        assert label in STEPS, f"no step knows this line: {line}"
        return STEPS[label](self, line)

    def check_name(self, line: str) -> None:
        name, mode, target = re.match(r"   (\S+) 0o(\d+) (?:-> (\S+))?", line).groups()  # type: ignore[union-attr]
        if target is None:
            assert answer(lambda: self.machine.files.readlink(name)) == "EINVAL"
            assert self.machine.files.mode(name) == int(mode, 8), line
        else:
            assert self.machine.files.readlink(name) == target
            assert int(mode, 8) == _emulated.LINK_MODE
            assert self.machine.files.mode(name) == self.machine.files.mode(target)

    def check_tail(self, line: str) -> None:
        """Digests differ, but not the form; the program cut the line at 110 characters."""
        kind, tail = re.match(r"   (staged|live) ascii tail: (.*)", line).groups()  # type: ignore[union-attr]
        content = self.machine.content(ASCII + ("_staged" if kind == "staged" else ""))
        mine = content.decode().splitlines()[-1][:110]
        assert re.sub("[0-9a-f]{40,}", "#", mine) == re.sub("[0-9a-f]{40,}", "#", tail)
        assert len(mine) == len(tail)

    def hold(self, name: str, flags: int) -> File:
        self.held.append(self.machine.files.open(name, flags))
        return self.held[-1]

    def let_go(self) -> None:
        while self.held:
            self.held.pop().close()


@step("initial", "end", "after D")
def _nothing(walk: Walk, line: str) -> object:
    return "-"


@step('write b"2\\n" with O_WRONLY|O_TRUNC (shell >)')
def _truncating(walk: Walk, line: str) -> object:
    return walk.machine.write(BINARY, b"2\n", os.O_WRONLY | os.O_TRUNC)


@step('write b"2\\n" with O_WRONLY|O_APPEND (shell >>)')
def _appending(walk: Walk, line: str) -> object:
    return walk.machine.write(BINARY, b"2\n", os.O_WRONLY | os.O_APPEND)


@step(*(f'write b"1\\n" to {name}' for name in (ASCII, f"{BINARY}_sha1", f"{BINARY}_sha256")))
def _through_other_files(walk: Walk, line: str) -> object:
    return walk.machine.write(line.split(" to ")[1].split()[0], b"1\n")


@step('write "1" then "\\n" in two writes')
def _two_writes(walk: Walk, line: str) -> object:
    with walk.machine.files.open(BINARY, os.O_WRONLY) as file:
        return answer(lambda: (file.write(b"1"), file.write(b"\n")))


@step('write "1\\n" twice on one fd')
def _twice(walk: Walk, line: str) -> object:
    with walk.machine.files.open(BINARY, os.O_WRONLY) as file:
        return file.write(b"1\n"), file.write(b"1\n")


@step("reader open; second reader open")
def _readers(walk: Walk, line: str) -> object:
    walk.hold(BINARY, os.O_RDONLY)
    return walk.machine.opened(ASCII, os.O_RDONLY)


@step("reader open; writer open (same process)", "reader open; O_RDWR open")
@step("reader open on live; writer open of staged")
def _writer_beside_reader(walk: Walk, line: str) -> object:
    name = f"{BINARY}_staged" if "of staged" in line else BINARY
    return walk.machine.opened(name, os.O_RDWR if "O_RDWR" in line else os.O_WRONLY)


@step("reader open; shell: echo 1 > list", "writer open; other process echo 1 >")
def _shell(walk: Walk, line: str) -> object:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    assert in_child(lambda: walk.machine.opened(BINARY, flags)) == "EBUSY"
    assert line.endswith(f": {_BUSY}')")
    return line.partition(" -> ")[2]


@step("writer(O_RDWR) open; reader open same task")
def _reader_beside_writer(walk: Walk, line: str) -> object:
    walk.let_go()
    walk.hold(BINARY, os.O_RDWR)
    return walk.machine.opened(BINARY, os.O_RDONLY)


@step("writer open; cat in other process")
def _cat(walk: Walk, line: str) -> object:
    assert in_child(lambda: walk.machine.opened(ASCII, os.O_RDONLY)) == "EBUSY"
    assert line.endswith(f": {_BUSY}')")
    # The program cat was measured as it was started, and then shows in the count.
    walk.machine.record("/usr/bin/cat")
    return line.partition(" -> ")[2]


@step("writer open; read runtime_measurements_count", "writer open; read violations")
def _numbers(walk: Walk, line: str) -> object:
    return int(walk.machine.content("violations" if "violations" in line else "runtime_measurements_count"))


@step("writer open; second writer same task", "writer open; O_RDWR same task on another list")
def _second_writer(walk: Walk, line: str) -> object:
    return walk.machine.opened(ASCII, os.O_RDWR if "O_RDWR" in line else os.O_WRONLY)


@step("writer open; writer open from another THREAD of same process")
def _other_thread(walk: Walk, line: str) -> object:
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(walk.machine.opened(BINARY, os.O_WRONLY)))
    thread.start()
    thread.join()
    return seen[0]


@step("writer open; measurement of a new file still recorded?")
def _measured_under_lock(walk: Walk, line: str) -> object:
    return walk.machine.record(f"/root/newfile-{walk.machine.pid}")


@step("O_RDWR fd: read 60 B (pos 60), write 3, continue read, rewind+read all")
def _read_and_delete(walk: Walk, line: str) -> object:
    (file,) = walk.held
    assert len(file.read(60)) == 60
    before = walk.machine.count()
    written = file.write(b"3\n")
    continued = file.read(1 << 20)
    file.rewind()
    whole = read_all(file)
    counts = f"write={written} count {before}->{walk.machine.count()}"
    return f"{counts} continued={len(continued)} bytes, after rewind={len(whole)} bytes"


@step("forked child: write on inherited fd")
def _fork(walk: Walk, line: str) -> object:
    (file,) = walk.held
    walk.forked = True
    written = in_child(lambda: file.write(b"1\n"))
    return f"{written} ; new writer open -> {in_child(lambda: walk.machine.opened(BINARY, os.O_WRONLY))}"


@step("writer closed")
def _close_writer(walk: Walk, line: str) -> object:
    if not walk.forked:
        # This kernel's transcript lost the child's line, but not what the child did.
        assert _fork(walk, line) == "2 ; new writer open -> EBUSY"
    walk.let_go()
    return "-"


@step("plain read works again", "read staged when nothing staged")
def _plain_read(walk: Walk, line: str) -> object:
    return walk.machine.size(f"{BINARY}_staged" if "staged" in line else BINARY)


def _capability(flags: int) -> Step:
    def open_without(walk: Walk, line: str) -> object:
        _emulated.capable(walk.machine.directory, False)
        try:
            walk.machine.files.open(BINARY, flags).close()
        except OSError as error:
            path = "/sys/kernel/security/ima/" + str(error.filename)
            return (0, f"[Errno {error.errno}] {error.strerror}: '{path}'")
        finally:
            _emulated.capable(walk.machine.directory, True)
        return (0, "ok")

    return open_without


step("uid 1000 gid 0 (group write bit): open O_RDONLY")(_capability(os.O_RDONLY))
step("root without CAP_SYS_ADMIN: open O_RDONLY")(_capability(os.O_RDONLY))
step("uid 1000 gid 0: open O_WRONLY", "root without CAP_SYS_ADMIN: open O_WRONLY")(_capability(os.O_WRONLY))


@step("re-read of a measured file adds", "re-read after trim (+drop_caches) adds", "re-read after utime adds")
def _read_again(walk: Walk, line: str) -> object:
    if line.startswith("re-read of a measured"):
        walk.machine.files.measure(str(walk.duplicate))
    if "utime" in line:
        os.utime(walk.duplicate)
    before = walk.machine.count()
    walk.machine.files.measure(str(walk.duplicate))
    return walk.machine.count() - before


@step("trim everything (write count)")
def _delete_all(walk: Walk, line: str) -> object:
    return walk.machine.write(BINARY, b"%d\n" % walk.machine.count())


@step("4 new files measured", "2 more files measured while staged", "1 new file")
def _new_files(walk: Walk, line: str) -> object:
    count, letter = {"4": (4, "g"), "2": (2, "h"), "1": (1, "k")}[line[0]]
    for number in range(count):
        assert walk.machine.record(f"/root/{letter}{number if count > 1 else ''}-{walk.machine.pid}") == 1
    return "-"


@step("re-read of a staged file")
def _read_staged_file_again(walk: Walk, line: str) -> object:
    assert walk.machine.record(f"/root/g0-{walk.machine.pid}") == 0
    return "-"


@step("re-read of a staged+deleted file adds")
def _read_deleted_file_again(walk: Walk, line: str) -> object:
    return walk.machine.record(f"/root/g1-{walk.machine.pid}")


@step("write A\\n to staged", "write A\\n again", "write A\\n to ascii staged", "A", "A on empty live list")
def _stage(walk: Walk, line: str) -> object:
    return walk.machine.write(f"{ASCII if 'ascii' in line else BINARY}_staged", b"A\n")


@step("D again", "D without reading", "staged reader open; D by writer")
def _delete_staged(walk: Walk, line: str) -> object:
    if line.startswith("staged reader"):
        walk.hold(f"{ASCII}_staged", os.O_RDONLY)
    return walk.machine.write(f"{BINARY}_staged", b"D\n")


@step("trim 1 from live while staged exists", "trim N larger than live while staged exists")
def _delete_while_staged(walk: Walk, line: str) -> object:
    return walk.machine.write(BINARY, b"1\n" if "trim 1" in line else b"50\n")


@step("staged reader open; live reader")
def _live_reader(walk: Walk, line: str) -> object:
    seen = walk.machine.opened(ASCII, os.O_RDONLY)
    walk.let_go()
    return seen


@step("staged O_RDWR open; live read")
def _live_read(walk: Walk, line: str) -> object:
    walk.hold(f"{BINARY}_staged", os.O_RDWR)
    return walk.machine.opened(BINARY, os.O_RDONLY)


@step("staged O_RDWR: read all then D on the same fd")
def _read_then_delete(walk: Walk, line: str) -> object:
    (file,) = walk.held
    return f"{len(read_all(file))} bytes, write -> {answer(lambda: file.write(b'D' + bytes([10])))}"


@step("staged fd after D, rewind+read")
def _read_deleted(walk: Walk, line: str) -> object:
    (file,) = walk.held
    file.rewind()
    seen = len(file.read(1 << 16))
    walk.let_go()
    return seen


@step("one task, two RDWR fds: A, read ascii+binary, D")
def _two_descriptors(walk: Walk, line: str) -> object:
    files = walk.machine.files
    with files.open(f"{BINARY}_staged", os.O_RDWR) as first, files.open(f"{ASCII}_staged", os.O_RDWR) as second:
        return first.write(b"A\n"), len(second.read(4096)), len(first.read(4096)), first.write(b"D\n")


# The sizes come from the differences of the byte counts in the transcript. "first" to "F" fix what the read after the
# deletion must give: the rest of the first record, then the whole records from the second of the new head on that fit.
DELETE_N = [
    *spread(11327 - 10280, 10), 98, 101, 133, *spread(233, 2), *spread(259, 2), 129, 133, 128, *spread(261, 2),
    128, *spread(255, 2), 122, *spread(3983, 30), *spread(4317, 34),
]  # fmt: skip
STAGING = [
    *spread(10596 - 9456, 10), 129, 133, 128, *spread(261, 2), *spread(257, 2), 127, 122, 128, *spread(258, 2),
    130, *spread(259, 2), 128, *spread(4082, 31), *spread(3314, 26),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "flavour", "sizes", "pid"),
    [("delete-n-debian-7.3.4", "delete_n", DELETE_N, "123"), ("staging-7.3.4", "staged", STAGING, "12")],
)
def test_every_line(tmp_path: Path, name: str, flavour: str, sizes: list[int], pid: str) -> None:
    lines = (TRANSCRIPTS / f"{name}.txt").read_text().splitlines()
    machine = Machine(tmp_path, sizes, pid, flavour=flavour)
    assert machine.size(f"{BINARY}_sha1") == str(BOOT_AGGREGATE + sum(sizes))
    names = [line.split()[0] for line in lines if re.match(r"   \S+ 0o", line)]
    assert machine.files.listdir() == names
    walk = Walk(machine)
    for line in lines:
        walk.line(line)
    assert not walk.held


def test_flush(tmp_path: Path) -> None:
    """With ima_flush_htable N is refused, and after D the same files are recorded again."""
    lines = (TRANSCRIPTS / "flush.txt").read_text().splitlines()
    machine = Machine(tmp_path, [], "1", flavour="staged", flush_htable=True)
    programs = ["/usr/bin/dash", "/usr/bin/true"]
    initial = int(re.match(r"count=(\d+)", lines[0]).group(1))  # type: ignore[union-attr]
    for path in programs:
        assert machine.record(path) == 1
    _emulated.grow(machine.directory, initial - 3)
    dumped: list[str] = []
    for line in lines:
        if line.startswith("count="):
            # The memory figures beside it are what only a real kernel has.
            assert line.startswith(f"count={machine.count()} ")
        elif line.startswith("trim 10"):
            assert machine.write(BINARY, b"10\n") == "EINVAL" and line.endswith("[Errno 22] Invalid argument")
        elif line.startswith(("A -> (2,", "D -> (2,")):
            assert machine.write(f"{BINARY}_staged", line[:1].encode() + b"\n") == 2
        elif line == "re-read same files after flush: count 0 -> 2":
            assert machine.count() == 0
            assert [machine.record(path) for path in programs] == [1, 1] and machine.count() == 2
        elif line == "drop_caches then re-read:":
            assert [machine.record(path) for path in programs] == [0, 0]
            dumped = [f"{machine.count()} {text}" if not number else text
                      for number, text in enumerate(machine.content(ASCII).decode().splitlines())]  # fmt: skip
        elif dumped:
            mine = dumped.pop(0)
            assert re.sub("[0-9a-f]{40,}", "#", mine) == re.sub("[0-9a-f]{40,}", "#", line)
        else:
            assert not line.strip(), f"no step knows this line: {line}"
    assert not dumped
