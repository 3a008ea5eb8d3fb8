# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How the kernel's files are used: flavours, patience, and what each errno means."""

from __future__ import annotations

import errno
import functools
import os
import threading
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils import _securityfs as securityfs
from ansible_collections.integrity.ima.plugins.module_utils._errors import KernelError
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import File, Holder, KernelFiles, Lists

BINARY = "binary_runtime_measurements"


class Files(_emulated.EmulatedFiles):
    """The emulated files with a few answers replaced."""

    modes: t.Mapping[str, int | OSError] = {}
    opens: t.Mapping[str, OSError] = {}
    parameters = ""
    seen_holders: list[Holder] | None = None
    opened: list[tuple[str, int]]

    def mode(self, name: str) -> int:
        found = self.modes.get(name)
        if isinstance(found, OSError):
            raise found
        return super().mode(name) if found is None else found

    def open(self, name: str, flags: int) -> File:
        self.opened = [*getattr(self, "opened", []), (name, flags)]
        if name in self.opens:
            raise self.opens[name]
        return super().open(name, flags)

    def command_line(self) -> str:
        return f"{super().command_line()} {self.parameters}"

    def holders(self) -> list[Holder]:
        return super().holders() if self.seen_holders is None else self.seen_holders


def os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def make(directory: Path, **parameters: t.Any) -> Files:
    _emulated.create(str(directory), **parameters)
    return Files(str(directory))


def reason_of(function: t.Callable[[], object]) -> str:
    with pytest.raises(KernelError) as caught:
        function()
    return caught.value.reason


def read_all(file: File) -> bytes:
    with file:
        return b"".join(iter(lambda: file.read(65536), b""))


# --- flavours ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "flavour", "deletes"),
    [
        ({"flavour": "export_only"}, "export_only", False),
        ({"flavour": "export_only", "single": True}, "export_only", False),
        ({"flavour": "delete_n"}, "delete_n", True),
        ({"flavour": "delete_n", "flush_htable": True}, "export_only", False),
        ({"flavour": "staged"}, "staged", True),
        ({"flavour": "staged", "flush_htable": True}, "staged", False),
    ],
)
def test_flavour(tmp_path: Path, parameters: dict[str, t.Any], flavour: str, deletes: bool) -> None:
    files = make(tmp_path, **parameters)
    lists = Lists(files)
    assert (lists.flavour(), lists.can_delete_n()) == (flavour, deletes)
    assert not hasattr(files, "opened"), "a flavour is never found out by opening"


@pytest.mark.parametrize(
    ("word", "flavour"),
    [
        ("ima_flush_htable", "export_only"),
        ("ima-flush-htable", "export_only"),
        ("not_ima_flush_htable", "delete_n"),
        ("ima_flush_htables", "delete_n"),
    ],
)
def test_flush_parameter_is_a_word_of_its_own(tmp_path: Path, word: str, flavour: str) -> None:
    files = make(tmp_path)
    files.parameters = word
    assert Lists(files).flavour() == flavour


@pytest.mark.parametrize(
    ("modes", "reason"),
    [
        ({"ima_trim_log": 0o660}, "vendor_trim_log"),
        ({BINARY: FileNotFoundError(errno.ENOENT, "no")}, "no_measurement_list"),
        ({BINARY: NotADirectoryError(errno.ENOTDIR, "no")}, "no_measurement_list"),
        ({BINARY: PermissionError(errno.EACCES, "no")}, "not_permitted"),
    ],
)
def test_flavour_errors(tmp_path: Path, modes: dict[str, t.Any], reason: str) -> None:
    files = make(tmp_path)
    files.modes = modes
    assert reason_of(Lists(files).flavour) == reason
    assert reason_of(Lists(files).can_delete_n) == reason


def test_a_read_only_staged_file_is_not_the_staged_flavour(tmp_path: Path) -> None:
    files = make(tmp_path, flavour="staged")
    files.modes = {f"{BINARY}_staged": 0o440}
    assert Lists(files).flavour() == "delete_n"


def test_no_securityfs(tmp_path: Path) -> None:
    lists = Lists(KernelFiles(str(tmp_path / "missing")))
    for function in (lists.flavour, lists.banks, lists.count, lists.reader, lists.view, lists.writer):
        with pytest.raises(KernelError) as caught:
            function()
        assert caught.value.reason == "no_measurement_list"
        assert "ProtectKernelTunables" in caught.value.hint


@pytest.mark.parametrize(
    ("parameters", "banks"),
    [
        ({"banks": []}, ["sha1"]),
        ({"banks": ["sha256"]}, ["sha1", "sha256"]),
        ({"banks": ["sha512", "sha384", "sha1"]}, ["sha1", "sha384", "sha512"]),
        ({"banks": ["sha384"], "flavour": "export_only", "single": True}, ["sha1", "sha384"]),
        ({"banks": ["sha256"], "flavour": "staged"}, ["sha1", "sha256"]),
    ],
)
def test_banks(tmp_path: Path, parameters: dict[str, t.Any], banks: list[str]) -> None:
    assert Lists(make(tmp_path, **parameters)).banks() == banks


# --- the real kernel's class, over ordinary files ---------------------------------------------------------------------


@pytest.fixture(name="directory")
def _directory(tmp_path: Path) -> Path:
    (tmp_path / f"{BINARY}_sha1").write_bytes(b"0123456789")
    (tmp_path / f"{BINARY}_sha1").chmod(0o440)
    (tmp_path / BINARY).symlink_to(f"{BINARY}_sha1")
    (tmp_path / f"{BINARY}_tpm_alg_12").write_bytes(b"")
    (tmp_path / "runtime_measurements_count").write_text("17\n")
    (tmp_path / "violations").write_text("0\n")
    return tmp_path


def test_kernel_files(directory: Path) -> None:
    files = KernelFiles(str(directory))
    assert files.emulated is False and files.reset_count() is None
    assert files.mode(BINARY) == 0o440
    with pytest.raises(FileNotFoundError):
        files.mode("policy")
    with files.open(BINARY, os.O_RDONLY) as file:
        assert file.read(4) == b"0123"
        file.rewind()
        assert file.read(100) == b"0123456789" and file.read(1) == b""
        with pytest.raises(OSError, match="Bad file descriptor"):
            file.write(b"1\n")
    file.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        file.read(1)
    lists = Lists(files)
    assert (lists.count(), lists.violations()) == (17, 0)
    assert "sha1" in lists.banks()
    assert files.release() == os.uname().release
    assert files.command_line() == Path("/proc/cmdline").read_text().strip()
    assert len(files.boot_id()) == 36


def test_descriptors_are_not_inherited(directory: Path) -> None:
    with KernelFiles(str(directory)).open(BINARY, os.O_RDONLY) as file:
        assert isinstance(file, securityfs.KernelFile)
        assert not os.get_inheritable(file._descriptor)


def test_kernel_holders(directory: Path) -> None:
    files = KernelFiles(str(directory))
    other = directory / "other"
    other.mkdir()
    (other / f"{BINARY}_sha1").write_bytes(b"")
    with open(other / f"{BINARY}_sha1", "rb"), open(directory / "violations", "rb"):
        assert files.holders() == []
    with files.open(BINARY, os.O_RDONLY):
        (holder,) = files.holders()
    assert holder.pid == os.getpid()
    assert holder.command == Path("/proc/self/comm").read_text().strip()
    assert KernelFiles(str(directory / "missing")).holders() == []


def test_identities(tmp_path: Path) -> None:
    files = KernelFiles()
    (tmp_path / "good").write_text("0123456789abcdef0123456789abcdef\n")
    (tmp_path / "bad").write_text("uninitialized\n")
    pattern = r"[0-9a-f]{32}\Z"
    assert files._identity(str(tmp_path / "good"), pattern, "r") == "0123456789abcdef0123456789abcdef"
    assert reason_of(lambda: files._identity(str(tmp_path / "bad"), pattern, "r")) == "r"
    assert reason_of(lambda: files._identity(str(tmp_path / "missing"), pattern, "r")) == "r"


def test_tpm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = KernelFiles()
    monkeypatch.setattr(securityfs, "TPM_DIRECTORY", str(tmp_path / "missing"))
    assert files.tpm_banks() == [] and files.pcr("sha256", 10) is None
    for bank in ("sha384", "sha256", "sm3_256"):
        (tmp_path / f"pcr-{bank}").mkdir()
    (tmp_path / "pcr-sha256" / "10").write_text("AB" * 32 + "\n")
    (tmp_path / "pcr-sha384" / "10").write_text("xyz\n")
    monkeypatch.setattr(securityfs, "TPM_DIRECTORY", str(tmp_path))
    assert files.tpm_banks() == ["sha256", "sha384"]
    assert files.pcr("sha256", 10) == b"\xab" * 32
    assert files.pcr("sha1", 10) is None
    assert reason_of(lambda: files.pcr("sha384", 10)) == "pcr_unreadable"


def test_measure_reads_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(3 << 20))
    KernelFiles().measure(str(tmp_path / "file"))
    with pytest.raises(FileNotFoundError):
        KernelFiles().measure(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    "content", ["", "\n", "12", "12\n\n", " 12\n", "+12\n", "-1\n", "1" * 21 + "\n", "0x1\n", "١\n"]
)
def test_malformed_counts(directory: Path, content: str) -> None:
    (directory / "runtime_measurements_count").write_text(content)
    (directory / "violations").write_text(content)
    lists = Lists(KernelFiles(str(directory)))
    assert reason_of(lists.count) == reason_of(lists.violations) == "malformed_count"


def test_a_count_that_gets_a_digit_while_it_is_read(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel renders the number at each read: at offset 2 of what was "9" there is the end of "10"."""
    count = directory / "runtime_measurements_count"
    count.write_text("9\n")
    real = KernelFiles.open

    class Growing:
        def __init__(self, file: t.Any) -> None:
            self._file = file

        def read(self, size: int) -> bytes:
            data: bytes = self._file.read(size)
            count.write_text("10\n")
            return data

        def __enter__(self) -> t.Any:
            return self

        def __exit__(self, *_unused: t.Any) -> None:
            self._file.close()

    monkeypatch.setattr(KernelFiles, "open", lambda self, *arguments: Growing(real(self, *arguments)))
    lists = Lists(KernelFiles(str(directory)))
    assert [lists.count(), lists.count()] == [9, 10]


# --- opening ----------------------------------------------------------------------------------------------------------


def test_readers(tmp_path: Path) -> None:
    lists = Lists(make(tmp_path, flavour="staged"))
    _emulated.grow(str(tmp_path), 3)
    with lists.writer(staged=True) as file:
        assert lists.stage(file) == "staged"
    _emulated.grow(str(tmp_path), 2)
    live, staged = read_all(lists.reader()), read_all(lists.reader(staged=True))
    assert read_all(lists.reader("sha1")) == live and len(staged) > len(live)
    assert len(read_all(lists.reader("sha256"))) == len(live) + 2 * 12
    assert read_all(lists.reader(ascii=True)).count(b"\n") == 2
    assert read_all(lists.reader("sha256", ascii=True, staged=True)).count(b"\n") == 4
    with lists.view() as view:
        assert read_all_open(view) == staged + live
        view.rewind()
        assert read_all_open(view) == staged + live
        assert view.read(10) == b""
        view.rewind()
        assert view.read(0) == b"" and view.read(10) == staged[:10]
        with pytest.raises(OSError, match="Bad file descriptor"):
            view.write(b"1\n")
        assert reason_of(Lists(lists.files, 0).writer) == "list_busy"
    lists.writer().close()


def read_all_open(file: File) -> bytes:
    return b"".join(iter(lambda: file.read(1000), b""))


def test_view_opens_everything_before_it_reads(tmp_path: Path) -> None:
    files = make(tmp_path, flavour="staged")
    with Lists(files).view():
        assert [name for name, _flags in files.opened] == [f"{BINARY}_staged", BINARY]
    assert read_all(Lists(make(tmp_path / "n")).view()) == read_all(Lists(make(tmp_path / "n")).reader())


def test_view_that_fails_leaves_nothing_open(tmp_path: Path) -> None:
    files = make(tmp_path, flavour="staged")
    files.opens = {BINARY: os_error(errno.EPERM)}
    assert reason_of(Lists(files).view) == "not_permitted"
    files.opens = {}
    Lists(files, 0).writer().close()


def test_writer_flags(tmp_path: Path) -> None:
    files = make(tmp_path, flavour="staged")
    Lists(files).writer().close()
    Lists(files).writer(staged=True).close()
    flags = os.O_RDWR | os.O_CLOEXEC
    assert files.opened == [(BINARY, flags), (f"{BINARY}_staged", flags)]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (errno.EPERM, "not_permitted"),
        (errno.EACCES, "not_permitted"),
        (errno.ENOENT, "no_measurement_list"),
        (errno.ENFILE, "kernel"),
    ],
)
def test_open_errors(tmp_path: Path, code: int, reason: str) -> None:
    files = make(tmp_path)
    files.opens = {BINARY: os_error(code)}
    assert reason_of(Lists(files).writer) == reason_of(Lists(files).reader) == reason
    assert len(files.opened) == 2, "only EBUSY is worth another try"


def test_staged_list_on_another_kernel(tmp_path: Path) -> None:
    lists = Lists(make(tmp_path))
    assert reason_of(lambda: lists.writer(staged=True)) == "not_staged_kernel"
    assert reason_of(lambda: lists.reader(staged=True, ascii=True)) == "not_staged_kernel"


def test_without_the_capability(tmp_path: Path) -> None:
    lists = Lists(make(tmp_path))
    _emulated.capable(str(tmp_path), False)
    lists.reader().close()
    assert reason_of(lists.writer) == "not_permitted"


# --- busy -------------------------------------------------------------------------------------------------------------


def test_busy_names_the_holders(tmp_path: Path) -> None:
    files = make(tmp_path)
    command = Path("/proc/self/comm").read_text().strip()
    with files.open(BINARY, os.O_RDONLY):
        begun = time.monotonic()
        with pytest.raises(KernelError) as caught:
            Lists(files, 0.3).writer()
        assert 0.3 <= time.monotonic() - begun < 1.5
    assert caught.value.reason == "list_busy"
    assert caught.value.details == {"holders": [{"pid": os.getpid(), "command": command}]}
    assert f"{command} (pid {os.getpid()})" in str(caught.value)
    tries = len(files.opened) - 1
    assert 4 <= tries <= 10, "10 ms, doubling"


def test_busy_until_the_holder_closes(tmp_path: Path) -> None:
    files = make(tmp_path)
    holder = files.open(BINARY, os.O_RDONLY)
    timer = threading.Timer(0.15, holder.close)
    timer.start()
    begun = time.monotonic()
    Lists(files, 10).writer().close()
    timer.join()
    assert 0.1 < time.monotonic() - begun < 2


def test_backoff_is_bounded_and_jittered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = make(tmp_path)
    _emulated.phantom(str(tmp_path))
    now, waits = [0.0], []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", sleep)
    assert reason_of(Lists(files, 30).writer) == "list_busy"
    assert now[0] == pytest.approx(30)
    assert all(0.005 <= wait <= 0.75 for wait in waits[:-1]) and waits[0] <= 0.015
    assert len(set(waits)) > 10 and len(waits) < 200


def test_phantom_reader_is_suspected(tmp_path: Path) -> None:
    files = make(tmp_path)
    _emulated.phantom(str(tmp_path))
    with pytest.raises(KernelError) as caught:
        Lists(files, 0).writer()
    assert caught.value.reason == "list_busy" and caught.value.details == {"holders": []}
    assert "phantom" in caught.value.hint and "reboot" in caught.value.hint
    Lists(files).reader().close()


def test_hidden_writer_is_not_taken_for_a_phantom(tmp_path: Path) -> None:
    files = make(tmp_path)
    files.seen_holders = []
    lists = Lists(files, 0)
    with files.open(BINARY, os.O_RDWR):
        opened: list[KernelError] = []

        def other() -> None:
            for function in (lists.writer, lists.reader):
                with pytest.raises(KernelError) as caught:
                    function()
                opened.append(caught.value)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert [error.reason for error in opened] == ["list_busy"] * 2
    assert not any("phantom" in error.hint for error in opened)


# --- commands ---------------------------------------------------------------------------------------------------------


class Answering(File):
    """A descriptor whose writes are answered as told."""

    def __init__(self, reply: int | OSError) -> None:
        self.reply = reply
        self.written: list[bytes] = []

    def read(self, size: int) -> bytes:
        raise AssertionError("nobody may read now")

    def write(self, data: bytes) -> int:
        self.written.append(data)
        if isinstance(self.reply, OSError):
            raise self.reply
        return self.reply

    def rewind(self) -> None:
        raise AssertionError("nobody may rewind now")

    def close(self) -> None:
        raise AssertionError("whoever opened it closes it")


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (os_error(errno.ENOENT), "fewer_records"),
        (os_error(errno.ESTALE), "suspended"),
        (os_error(errno.EINVAL), "delete_refused"),
        (os_error(errno.ERANGE), "delete_refused"),
        (os_error(errno.EIO), "delete_unknown"),
        (os_error(errno.EINTR), "delete_unknown"),
        (os_error(errno.ENOMEM), "delete_unknown"),
        (os_error(errno.EBUSY), "delete_unknown"),
        (OSError("no number"), "delete_unknown"),
        (1, "delete_unknown"),
        (0, "delete_unknown"),
    ],
)
def test_delete_errors(tmp_path: Path, reply: int | OSError, reason: str) -> None:
    file = Answering(reply)
    assert reason_of(lambda: Lists(make(tmp_path)).delete(file, 12)) == reason
    assert file.written == [b"12\n"], "a deletion is never tried again"


def test_delete(tmp_path: Path) -> None:
    lists = Lists(make(tmp_path))
    file = Answering(3)
    lists.delete(file, 40)
    assert file.written == [b"40\n"]
    for count in (0, -1):
        assert reason_of(functools.partial(lists.delete, file, count)) == "delete_refused"
    assert len(file.written) == 1


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (os_error(errno.ENOENT), "nothing_staged"),
        (os_error(errno.ESTALE), "suspended"),
        (os_error(errno.EINVAL), "delete_refused"),
        (os_error(errno.ENOMEM), "delete_unknown"),
        (os_error(errno.EIO), "delete_unknown"),
        (1, "delete_unknown"),
    ],
)
def test_delete_staged_errors(tmp_path: Path, reply: int | OSError, reason: str) -> None:
    file = Answering(reply)
    assert reason_of(lambda: Lists(make(tmp_path)).delete_staged(file)) == reason
    assert file.written == [b"D\n"]


def test_delete_staged(tmp_path: Path) -> None:
    file = Answering(2)
    Lists(make(tmp_path)).delete_staged(file)
    assert file.written == [b"D\n"]


@pytest.mark.parametrize(
    ("reply", "result"), [(2, "staged"), (os_error(errno.EEXIST), "leftover"), (os_error(errno.ENOENT), "empty")]
)
def test_stage(tmp_path: Path, reply: int | OSError, result: str) -> None:
    file = Answering(reply)
    assert Lists(make(tmp_path)).stage(file) == result
    assert file.written == [b"A\n"]


@pytest.mark.parametrize(
    ("reply", "reason"),
    [(os_error(errno.EACCES), "suspended"), (os_error(errno.EINVAL), "stage_failed"), (1, "stage_failed")],
)
def test_stage_errors(tmp_path: Path, reply: int | OSError, reason: str) -> None:
    file = Answering(reply)
    assert reason_of(lambda: Lists(make(tmp_path)).stage(file)) == reason
    assert file.written == [b"A\n"]
