# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The emulated kernel: what it records, what it survives, whom it locks out, and its faults."""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import json
import os
import random
import resource
import signal
import sys
import threading
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils._emulated import EmulatedFiles, Request
from ansible_collections.integrity.ima.plugins.module_utils._errors import EmulatorError, ImaError, KernelError
from ansible_collections.integrity.ima.plugins.module_utils._pcr import Replay
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import File, Lists

CAPTURES = Path(__file__).resolve().parents[3] / "fixtures" / "captures"
BINARY, ASCII = "binary_runtime_measurements", "ascii_runtime_measurements"


@pytest.fixture(name="directory")
def _directory(tmp_path: Path) -> str:
    return str(tmp_path / "kernel")


def make(directory: str, count: int = 0, **parameters: t.Any) -> EmulatedFiles:
    """A kernel with ``count`` records after its boot_aggregate."""
    _emulated.create(directory, **parameters)
    _emulated.grow(directory, count)
    return EmulatedFiles(directory)


def read_all(files: EmulatedFiles, name: str, size: int = 65536) -> bytes:
    with files.open(name, os.O_RDONLY) as file:
        return rest(file, size)


def rest(file: File, size: int = 65536) -> bytes:
    return b"".join(iter(lambda: file.read(size), b""))


def write(files: EmulatedFiles, data: bytes, name: str = BINARY) -> int:
    with files.open(name, os.O_WRONLY) as file:
        return file.write(data)


def parse(raw: bytes) -> list[ml.Record]:
    return list(ml.read(io.BytesIO(raw).read))


def paths(raw: bytes) -> list[str]:
    return [ml.event_name(record, sys.byteorder).decode() for record in parse(raw)]


def oracle(directory: str, boot: int = -1) -> bytes:
    """What was really recorded since that boot."""
    _boot_id, path, size = _emulated.recorded(directory)[boot]
    return Path(path).read_bytes()[:size]


def consistent(directory: str) -> _emulated.State:
    """The state, after checking it against what was recorded (of one boot, without kexec)."""
    state = _emulated._load(directory)
    records = parse(oracle(directory))
    assert len(records) == state.records
    assert sum(record.violation for record in records) == state.violations
    if state.banks:
        assert Replay(state.banks, padded=state.padded).run(records).values() == state.pcrs
    return state


def error_of(function: t.Callable[[], object]) -> str:
    with pytest.raises(ImaError) as caught:
        function()
    return caught.value.reason


def errno_of(function: t.Callable[[], object]) -> str:
    with pytest.raises(OSError) as caught:
        function()
    return errno.errorcode[caught.value.errno or 0]


def run_child(function: t.Callable[[], object]) -> tuple[int, str]:
    """Run in another process: the signal that ended it (0: none) and what it returned, as text."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(out)
            os.write(into, repr(function()).encode())
            os._exit(0)
        except BaseException as error:
            os.write(into, repr(error).encode())
            os._exit(1)
    os.close(into)
    with os.fdopen(out) as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return (os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0), text


# --- creating ---------------------------------------------------------------------------------------------------------


def test_create_and_remove(directory: str) -> None:
    assert _emulated.create(directory) is True
    assert _emulated.create(directory) is False
    assert _emulated.create(directory, flavour="delete_n", banks=["sha256", "sha1"], padded=[]) is False
    others: list[dict[str, t.Any]] = [
        {"flavour": "staged"},
        {"banks": []},
        {"padded": ["sha256"]},
        {"template": "ima-sig"},
    ]
    for other in others:
        assert error_of(functools.partial(_emulated.create, directory, **other)) == "exists"
    (Path(directory) / "foreign").touch()
    assert _emulated.remove(directory) is True
    assert os.listdir(directory) == ["foreign"]
    assert _emulated.remove(directory) is False
    assert error_of(lambda: EmulatedFiles(directory).listdir()) == "absent"
    assert error_of(lambda: _emulated.grow(directory + "x", 1)) == "absent"


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"flavour": "none"}, "parameters"),
        ({"banks": ["md5"]}, "parameters"),
        ({"banks": ["sha1", "sha1"]}, "parameters"),
        ({"padded": ["sha384"]}, "parameters"),
        ({"padded": ["sha1"]}, "parameters"),
        ({"file_hash": "md5"}, "parameters"),
        ({"single": True}, "parameters"),
        ({"colour": "red"}, "parameters"),
        ({"template": "evm-sig"}, "template"),
    ],
)
def test_impossible_kernels(directory: str, parameters: dict[str, t.Any], reason: str) -> None:
    assert error_of(lambda: _emulated.create(directory, **parameters)) == reason
    assert not os.path.exists(directory)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version":1}', "{", "\0"])
def test_malformed_state(directory: str, content: str) -> None:
    files = make(directory)
    (Path(directory) / "state").write_text(content)
    assert error_of(files.listdir) == "malformed_state"


def test_another_version(directory: str) -> None:
    files = make(directory)
    state = json.loads((Path(directory) / "state").read_text())
    (Path(directory) / "state").write_text(json.dumps(dict(state, version=2)))
    assert error_of(files.listdir) == "malformed_state"


def test_identities(directory: str) -> None:
    files = make(directory, machine_id="ab" * 16, release="7.9.9", boot_id="0cc29c7a-cf70-4c5b-9209-839e590fa575")
    assert (files.machine_id(), files.release()) == ("ab" * 16, "7.9.9")
    assert files.boot_id() == "0cc29c7a-cf70-4c5b-9209-839e590fa575"
    assert files.emulated is True
    assert (files.tpm_banks(), files.reset_count()) == (["sha1", "sha256"], 1)
    assert files.pcr("sha256", 0) == bytes(32) and files.pcr("sha1", 17) == b"\xff" * 20
    assert files.pcr("sha384", 10) is None and files.pcr("sha1", 24) is None
    assert "ima_hash=sha256" in files.command_line() and "ima_flush_htable" not in files.command_line()


def test_without_a_tpm(directory: str) -> None:
    files = make(directory, 2, banks=[])
    assert files.tpm_banks() == [] and files.pcr("sha1", 10) is None and files.reset_count() is None
    (first, *_others) = parse(read_all(files, BINARY))
    assert ml.file_digest(first, sys.byteorder) == ("sha256", bytes(32))
    assert f"{BINARY}_sha1" in files.listdir() and f"{BINARY}_sha256" not in files.listdir()


def test_boot_aggregate_hashes_the_first_pcrs(directory: str) -> None:
    files = make(directory, file_hash="sha512")
    (record,) = parse(read_all(files, BINARY))
    assert ml.event_name(record, sys.byteorder) == b"boot_aggregate"
    assert ml.file_digest(record, sys.byteorder) == ("sha256", hashlib.sha256(bytes(320)).digest())
    (record,) = parse(read_all(make(directory + "2", banks=["sha1"]), BINARY))
    assert ml.file_digest(record, sys.byteorder) == ("sha1", hashlib.sha1(bytes(160)).digest())


@pytest.mark.parametrize("flavour", ["export_only", "delete_n", "staged"])
@pytest.mark.parametrize("template", ["ima", "ima-ng", "ima-sig", "ima-ngv2", "ima-sigv2", "ima-modsig"])
def test_every_template(directory: str, flavour: str, template: str) -> None:
    files = make(directory, 3, flavour=flavour, template=template, banks=["sha1", "sha384"], padded=["sha384"])
    _emulated.violation(directory, "/a b")
    consistent(directory)
    records = parse(read_all(files, BINARY))
    assert {record.template for record in records} == {template} and records[-1].violation
    text = read_all(files, ASCII)
    assert text == b"".join(ml.to_ascii(record, sys.byteorder) for record in records)
    padded = list(ml.read(io.BytesIO(read_all(files, f"{BINARY}_sha384")).read, ml.Layout(48, sys.byteorder)))
    assert [record.digest for record in padded] == [record.digest + bytes(28) for record in records]


# --- recording --------------------------------------------------------------------------------------------------------


def test_feeding(directory: str) -> None:
    files = make(directory)
    records: list[dict[str, t.Any]] = [
        {"path": "/bin/true", "content": "true"},
        {"path": "/with space", "content": b"\xff", "pcr": 11},
        {"path": "event", "content": "buffer", "template": "ima-buf"},
        {"path": "/given", "digest": "ab" * 32},
    ]
    assert _emulated.would_record(directory, records) == 4
    assert _emulated.feed(directory, records=records) == 4
    assert _emulated.feed(directory, records=records) == 0, "the kernel does not record what it knows"
    assert _emulated.would_record(directory, records) == 0
    assert _emulated.feed(directory, records=[dict(records[0], content="new")]) == 1
    assert _emulated.feed(directory, records=[dict(records[0], pcr=11)]) == 1
    _boot, true, space, event, given, *_rest = parse(read_all(files, BINARY))
    assert ml.file_digest(true, sys.byteorder) == ("sha256", hashlib.sha256(b"true").digest())
    assert (ml.event_name(space, sys.byteorder), space.pcr) == (b"/with_space", 11)
    assert ml.fields(event, sys.byteorder)[1:] == [b"event\0", b"buffer"]
    assert ml.file_digest(given, sys.byteorder) == ("sha256", b"\xab" * 32)
    assert files.pcr("sha1", 11) not in (None, bytes(20))
    consistent(directory)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"digest": "ab"}, "digest"),
        ({"digest": "zz" * 32}, "digest"),
        ({"pcr": 24}, "pcr"),
        ({"template": "unheard-of"}, "template"),
    ],
)
def test_a_bad_record_feeds_nothing(directory: str, record: dict[str, t.Any], reason: str) -> None:
    make(directory)
    before = (Path(directory) / "state").read_bytes()
    records = [*({"path": f"/good/{number}"} for number in range(3)), dict(record, path="/bad")]
    assert error_of(lambda: _emulated.feed(directory, records=records)) == reason
    assert (Path(directory) / "state").read_bytes() == before
    assert _emulated.feed(directory, records=records[:1]) == 1
    assert os.stat(_emulated.recorded(directory)[0].path).st_size == consistent(directory).size, "nothing torn is left"


def test_measure(directory: str, tmp_path: Path) -> None:
    files = make(directory)
    file = tmp_path / "file"
    file.write_text("one")
    files.measure(str(file))
    files.measure(str(file))
    file.write_text("two")
    files.measure(str(file))
    names = paths(read_all(files, BINARY))
    assert names[1:] == [str(file)] * 2
    unmeasured = make(directory + "2", policy=False)
    unmeasured.measure(str(file))
    assert len(parse(read_all(unmeasured, BINARY))) == 1
    with pytest.raises(FileNotFoundError):
        unmeasured.measure(str(tmp_path / "missing"))


def test_violation(directory: str) -> None:
    files = make(directory)
    before = files.pcr("sha256", 10) or b""
    _emulated.violation(directory, "/var/log/x")
    _emulated.violation(directory, "/var/log/x")
    after = hashlib.sha256(hashlib.sha256(before + b"\xff" * 32).digest() + b"\xff" * 32).digest()
    assert files.pcr("sha256", 10) == after
    assert read_all(files, "violations") == b"2\n"
    write(files, b"3\n")
    assert read_all(files, "violations") == b"2\n" and read_all(files, "runtime_measurements_count") == b"0\n"


def _meta() -> list[Path]:
    return sorted(CAPTURES.glob("kernel-lab/*/meta.json"))


def _list_of(capture: Path, prefix: str, staged: bool = False) -> bytes:
    name = f"{prefix}_runtime_measurements"
    end = "_staged" if staged else ""
    found = [capture / f"{name}{end}", capture / f"{name}_sha1{end}"]
    return next((path.read_bytes() for path in found if path.exists()), b"")


@pytest.mark.skipif(sys.byteorder != "little", reason="the captures are little-endian")
@pytest.mark.parametrize("meta", _meta(), ids=lambda meta: meta.parent.name)
def test_captures(directory: str, tmp_path: Path, meta: Path) -> None:
    """A real list gives the real TPM's PCRs, and all the other files byte for byte."""
    told, capture = json.loads(meta.read_text()), meta.parent
    trimmed = (capture / "trimmed-prefix.bin").read_bytes() if (capture / "trimmed-prefix.bin").exists() else b""
    staged, live = _list_of(capture, "binary", staged=True), _list_of(capture, "binary")
    (tmp_path / "first").write_bytes(staged or trimmed + live)
    single = not list(capture.glob(f"{BINARY}_sha1"))
    has_staged = bool(list(capture.glob("*_staged")))
    flavour = "export_only" if single else "staged" if has_staged else "delete_n"
    files = make(directory, flavour=flavour, banks=list(told["pcrs"]), single=single, capture=str(tmp_path / "first"))
    if staged:
        assert write(files, b"A\n", f"{BINARY}_staged") == 2
        (tmp_path / "second").write_bytes(live)
        assert _emulated.feed(directory, capture=str(tmp_path / "second")) == len(parse(live))
    if trimmed:
        write(files, b"%d\n" % len(parse(trimmed)))
    for path in sorted(capture.glob("*_runtime_measurements*")):
        if not path.name.startswith("binary_bios"):
            assert read_all(files, path.name) == path.read_bytes(), path.name
    assert int(read_all(files, "runtime_measurements_count")) == told["count"]
    assert int(read_all(files, "violations")) == told["violations"]
    # After a kexec without carry-over the list is not the PCR's whole history.
    if "kexec" not in capture.name:
        for bank, values in told["pcrs"].items():
            assert {index: (files.pcr(bank, int(index)) or b"").hex() for index in ("10", "11", "12")} == {
                index: values[index] for index in ("10", "11", "12")
            }


@pytest.mark.skipif(sys.byteorder != "little", reason="the captures are little-endian")
@pytest.mark.parametrize("kernel", ["k6.1.192", "k6.12.107", "k7.3.4"])
def test_every_record_kind(directory: str, kernel: str) -> None:
    """Three banks; on 6.1 sha384 is padded."""
    folder = CAPTURES / "fixtures"
    told = json.loads((folder / f"{kernel}.pcrs.json").read_text())["A"]
    padded = ["sha384"] if kernel == "k6.1.192" else []
    single = kernel == "k6.1.192"
    flavour = "delete_n" if kernel == "k7.3.4" else "export_only"
    capture = str(folder / f"{kernel}.A.binary_sha1")
    banks = ["sha1", "sha256", "sha384"]
    files = make(directory, flavour=flavour, banks=banks, padded=padded, single=single, capture=capture)
    for bank in banks:
        assert (files.pcr(bank, 10) or b"").hex() == told[bank]["10"]
        assert (files.pcr(bank, 11) or b"").hex() == told[bank]["11"]
        if not single:
            assert read_all(files, f"{BINARY}_{bank}") == (folder / f"{kernel}.A.binary_{bank}").read_bytes()
    assert read_all(files, ASCII) == (folder / f"{kernel}.A.ascii").read_bytes()
    if not single:
        other = make(directory + "2", banks=banks, capture=str(folder / f"{kernel}.A.binary_sha384"))
        assert oracle(directory + "2") == oracle(directory)
        assert other.pcr("sha384", 10) == files.pcr("sha384", 10)


def test_a_capture_of_the_other_byte_order(directory: str, tmp_path: Path) -> None:
    order = "big" if sys.byteorder == "little" else "little"
    values = [b"sha256:\0" + bytes(range(32)), b"/path\0"]
    zeros = [b"sha256:\0" + bytes(32), b"/path\0"]
    layout = ml.Layout(32, order)
    raw = ml.encode(10, "ima-ng", values, layout) + ml.encode(11, "ima-ng", zeros, layout, violation=True)
    (tmp_path / "list").write_bytes(raw)
    files = make(directory, capture=str(tmp_path / "list"))
    first, second = parse(read_all(files, BINARY))
    assert ml.fields(first, sys.byteorder) == values and first.pcr == 10
    assert second.violation and second.pcr == 11
    consistent(directory)


@pytest.mark.parametrize("content", [b"", b"10 " + b"0" * 40 + b" ima-ng sha256:00 /x\n", b"x" * 100])
def test_what_is_no_capture(directory: str, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "list").write_bytes(content)
    assert error_of(lambda: _emulated.create(directory, capture=str(tmp_path / "list"))) != ""
    assert error_of(lambda: EmulatedFiles(directory).listdir()) == "absent"
    make(directory)
    before = (Path(directory) / "state").read_bytes()
    assert error_of(lambda: _emulated.feed(directory, capture=str(tmp_path / "list"))) != ""
    assert (Path(directory) / "state").read_bytes() == before


def test_growing_is_constant_in_memory(directory: str) -> None:
    """IMA_EMULATED_RECORDS=1000000 for the full measure."""
    count = int(os.environ.get("IMA_EMULATED_RECORDS", "200000"))

    def grow() -> int:
        make(directory, 1000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _emulated.grow(directory, count)
        files = EmulatedFiles(directory)
        with files.open(BINARY, os.O_RDONLY) as file:
            while file.read(65536):
                pass
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    status, kilobytes = run_child(grow)
    assert status == 0 and int(kilobytes) < 24 * 1024
    files = EmulatedFiles(directory)
    assert int(read_all(files, "runtime_measurements_count")) == count + 1001
    assert write(files, b"%d\n" % (count + 999)) == len(str(count)) + 1
    assert len(parse(read_all(files, BINARY))) == 2


# --- reading ----------------------------------------------------------------------------------------------------------


def test_the_buffer_size_does_not_matter(directory: str) -> None:
    files = make(directory, 500)
    whole = oracle(directory)
    for size in (1, 7, 60, 4095, 4096, 65536):
        assert read_all(files, BINARY, size) == whole, size


def test_a_read_gives_a_page_at_most(directory: str) -> None:
    files = make(directory, 500)
    counts = []
    for size in (4096, 65536, 1 << 20):
        with files.open(BINARY, os.O_RDONLY) as file:
            pieces = list(iter(functools.partial(file.read, size), b""))
        counts.append(len(pieces))
        assert all(len(piece) < 4096 for piece in pieces)
    assert counts[1] == counts[2]
    assert len(set(counts)) == 1 or counts[0] >= counts[1]


def test_a_record_larger_than_a_page(directory: str) -> None:
    files = make(directory)
    events = [{"path": "e", "content": "x" * size, "template": "ima-buf"} for size in (10, 4096, 100000, 20)]
    _emulated.feed(directory, records=events)
    whole = oracle(directory)
    with files.open(BINARY, os.O_RDONLY) as file:
        first = file.read(1 << 20)
        assert len(first) < 4096
        second = file.read(1 << 20)
        assert 4096 < len(second) < 8192, "whole, and in parts only if less is asked for"
        part = file.read(1000)
        assert len(part) == 1000
        assert first + second + part + rest(file) == whole


def _event(size: int) -> dict[str, t.Any]:
    """A record of ``size`` bytes."""
    empty = ml.encode(10, "ima-buf", [b"sha256:\0" + bytes(32), b"e\0", b""], ml.SHA1)
    return {"path": "e", "content": "x" * (size - len(empty)), "template": "ima-buf"}


def test_a_page_is_never_full(directory: str) -> None:
    """The buffer of seq_file counts as overflown when its last byte is used."""
    for sizes, reads in (
        ([2000, 2095, 100], [4095, 100]),
        ([2000, 2096, 100], [2000, 2196]),
        ([4095, 100], [4095, 100]),
        ([4096, 100, 4000], [4196, 4000]),
    ):
        files = make(directory)
        write(files, b"1\n")
        _emulated.feed(directory, records=[dict(_event(size), pcr=number) for number, size in enumerate(sizes)])
        with files.open(BINARY, os.O_RDONLY) as file:
            assert [len(piece) for piece in iter(functools.partial(file.read, 1 << 20), b"")] == reads
        _emulated.remove(directory)


def test_rewinding_forgets_the_buffer(directory: str) -> None:
    files = make(directory, 100)
    with files.open(BINARY, os.O_RDONLY) as file:
        file.read(10)
        file.rewind()
        assert rest(file) == oracle(directory)


def test_reading_goes_by_record_number(directory: str) -> None:
    """After a deletion on the same descriptor reading on skips records; from the head it does not."""
    files = make(directory, 300)
    records = parse(oracle(directory))
    with files.open(BINARY, os.O_RDWR) as file:
        assert file.read(10) == records[0].raw[:10]
        file.write(b"100\n")
        assert file.read(len(records[0].raw) - 10) == records[0].raw[10:]
        assert rest(file) == b"".join(record.raw for record in records[101:])
        file.rewind()
        assert rest(file) == b"".join(record.raw for record in records[100:])
        _emulated.grow(directory, 1)
        assert len(parse(rest(file))) == 1, "what was recorded after the end was reached"


def test_deleting_through_another_file(directory: str) -> None:
    files = make(directory, 10)
    with files.open(f"{ASCII}_sha256", os.O_RDWR) as file:
        assert file.write(b"4\n") == 2
        assert rest(file).count(b"\n") == 7
    assert oracle(directory).endswith(read_all(files, BINARY)) and len(parse(read_all(files, BINARY))) == 7


def test_directions(directory: str) -> None:
    files = make(directory)
    with files.open(BINARY, os.O_RDONLY) as file:
        assert errno_of(lambda: file.write(b"1\n")) == "EBADF"
        assert file.read(0) == b""
    with files.open(BINARY, os.O_WRONLY) as file:
        assert errno_of(lambda: file.read(1)) == "EBADF"
    assert errno_of(lambda: file.write(b"1\n")) == "EBADF"
    file.close()
    assert errno_of(lambda: files.open("nothing", os.O_RDONLY)) == "ENOENT"
    assert errno_of(lambda: files.open(f"{BINARY}_staged", os.O_RDONLY)) == "ENOENT"
    assert errno_of(lambda: files.open("policy", os.O_RDONLY)) == "EACCES"
    assert errno_of(lambda: write(files, b"1\n", "violations")) == "EINVAL"
    assert b"measure" in read_all(make(directory + "2", flavour="staged"), "policy")


def test_export_only_takes_no_lock(directory: str) -> None:
    files = make(directory, 3, flavour="export_only", single=True)
    assert files.listdir() == [ASCII, BINARY, "policy", "runtime_measurements_count", "violations"]
    assert files.mode(BINARY) == 0o440
    with files.open(BINARY, os.O_RDWR) as writer, files.open(BINARY, os.O_RDONLY):
        assert errno_of(lambda: writer.write(b"1\n")) == "EINVAL"
        assert len(parse(read_all(files, BINARY))) == 4


# --- SIGKILL ----------------------------------------------------------------------------------------------------------

_CALLS = ("open", "write", "rename", "close", "ftruncate", "truncate", "lseek", "pread", "read", "unlink", "makedirs")


def kill_at(number: int, function: t.Callable[[], object]) -> bool:
    """Run ``function`` in a child that is killed before its call ``number`` of the system; False: it made fewer."""

    def counted() -> None:
        left = [number]
        real = {name: getattr(os, name) for name in _CALLS}

        def wrap(name: str) -> t.Callable[..., t.Any]:
            def call(*arguments: t.Any, **named: t.Any) -> t.Any:
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left[0] -= 1
                if name == "write":
                    # Half of it: a torn write.
                    return real[name](arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2 or 1])
                return real[name](*arguments, **named)

            return call

        for name in _CALLS:
            setattr(os, name, wrap(name))
        try:
            function()
        finally:
            for name in _CALLS:
                setattr(os, name, real[name])

    status, text = run_child(counted)
    assert status in (0, signal.SIGKILL) and text in ("", "None"), text
    return status != 0


def outcome(directory: str) -> tuple[t.Any, ...]:
    """What a reader sees."""
    files, state = EmulatedFiles(directory), _emulated._load(directory)
    staged = read_all(files, f"{BINARY}_staged") if state.flavour == "staged" else b""
    return state.boot, read_all(files, BINARY), staged, state.pcrs, state.faults, state.violations


_FEED = [{"path": f"/fed/{number}", "content": "x" * 3000, "template": "ima-buf"} for number in range(3)]


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda directory: _emulated.feed(directory, records=_FEED), id="feed"),
        pytest.param(lambda directory: _emulated.violation(directory, "/x"), id="violation"),
        pytest.param(lambda directory: write(EmulatedFiles(directory), b"2\n"), id="delete"),
        pytest.param(lambda directory: write(EmulatedFiles(directory), b"D\n", f"{BINARY}_staged"), id="delete_staged"),
        pytest.param(lambda directory: _emulated.kexec(directory, False), id="kexec"),
        pytest.param(lambda directory: _emulated.fail_next(directory, "enoent"), id="fault"),
    ],
)
def test_killed_at_any_call(directory: str, act: t.Callable[[str], object]) -> None:
    """Whoever is killed has done all of it or nothing, and whoever comes next can go on."""
    number, outcomes = 0, []
    while True:
        make(directory, 4, flavour="staged", boot_id="0cc29c7a-cf70-4c5b-9209-839e590fa575")
        write(EmulatedFiles(directory), b"A\n", f"{BINARY}_staged")
        _emulated.grow(directory, 3)
        killed = kill_at(number, lambda: act(directory))
        outcomes.append(outcome(directory))
        assert _emulated.feed(directory, records=[{"path": "/next"}]) == 1
        state = _emulated._load(directory)
        assert len(parse(oracle(directory))) == state.records
        assert len(_emulated.recorded(directory)) == state.boot + 1
        if state.boot == 0:
            consistent(directory)
        _emulated.reboot(directory)
        left = [name for name in os.listdir(directory) if name.startswith("recorded.")]
        assert len(left) == state.boot + 2, "no file of a boot that never was"
        _emulated.remove(directory)
        if not killed:
            break
        number += 1
    assert number > 5
    first, last = outcomes[0], outcomes[-1]
    assert first != last
    assert all(seen in (first, last) for seen in outcomes)
    assert outcomes == sorted(outcomes, key=lambda seen: seen != first), "one call is the commit"


def test_killed_while_creating(directory: str) -> None:
    number, created = 0, []
    while kill_at(number, lambda: _emulated.create(directory) and None):
        created.append(_emulated.create(directory))
        assert len([name for name in os.listdir(directory) if name.startswith("recorded.")]) == 1
        consistent(directory)
        _emulated.remove(directory)
        assert not os.path.exists(directory)
        number += 1
    assert number > 5 and created == sorted(created, reverse=True) and created[0] and not created[-1]


def test_killed_while_recording(directory: str) -> None:
    """Somebody records as fast as they can, and is killed: what was committed is there, and is a prefix."""
    make(directory)
    random.seed(1)
    known = 1
    for _attempt in range(8):
        out, into = os.pipe()
        pid = os.fork()
        if pid == 0:
            number = 0
            while True:
                _emulated.feed(directory, records=[{"path": f"/{os.getpid()}/{number}"}])
                os.write(into, b".")
                number += 1
        os.close(into)
        time.sleep(random.uniform(0.01, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with os.fdopen(out, "rb") as pipe:
            committed = len(pipe.read())
        records = consistent(directory).records
        assert known + committed <= records <= known + committed + 1
        known = records


def test_recording_and_deleting_at_once(directory: str) -> None:
    """Two processes record while a third deletes: every record is deleted or there, once, in order."""
    files = make(directory)
    pids = []
    for _child in range(2):
        pid = os.fork()
        if pid == 0:
            for number in range(60):
                _emulated.feed(directory, records=[{"path": f"/{os.getpid()}/{number}"}])
            os._exit(0)
        pids.append(pid)
    saved = b""
    while pids or int(read_all(files, "runtime_measurements_count")):
        with files.open(BINARY, os.O_RDWR) as file:
            piece = rest(file)
            if piece:
                file.write(b"%d\n" % len(parse(piece)))
        saved += piece
        pids = [pid for pid in pids if os.waitpid(pid, os.WNOHANG) == (0, 0)]
    assert saved == oracle(directory) and len(parse(saved)) == 121


# --- who is locked out ------------------------------------------------------------------------------------------------


def in_thread(function: t.Callable[[], object]) -> object:
    result: list[object] = []

    def run() -> None:
        try:
            result.append(function())
        except OSError as error:
            result.append(errno.errorcode[error.errno or 0])

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return result[0]


def opened(files: EmulatedFiles, flags: int) -> str:
    try:
        files.open(BINARY, flags).close()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "ok"


def test_the_lock_dies_with_its_process(directory: str) -> None:
    files = make(directory, 1)
    out, into = os.pipe()
    for flags, seen in ((os.O_RDWR, "EBUSY"), (os.O_RDONLY, "ok")):
        pid = os.fork()
        if pid == 0:
            files.open(BINARY, flags)
            os.write(into, b".")
            time.sleep(60)
        os.read(out, 1)
        assert (opened(files, os.O_RDONLY), opened(files, os.O_RDWR)) == (seen, "EBUSY")
        assert [holder.pid for holder in files.holders()] == [pid]
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert (opened(files, os.O_RDONLY), opened(files, os.O_RDWR)) == ("ok", "ok")
    os.close(out)
    os.close(into)


def test_the_lock_is_inherited(directory: str) -> None:
    files = make(directory, 5)
    file = files.open(BINARY, os.O_RDWR)
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(out, 1)
        os._exit(file.write(b"1\n"))
    file.close()
    assert opened(files, os.O_RDONLY) == "EBUSY", "the child still has it"
    os.write(into, b".")
    assert os.WEXITSTATUS(os.waitpid(pid, 0)[1]) == 2
    assert opened(files, os.O_RDWR) == "ok"
    os.close(out)
    os.close(into)


def test_a_childs_close_leaves_the_parents_lock(directory: str) -> None:
    files = make(directory)
    with files.open(BINARY, os.O_RDWR) as file:
        assert run_child(file.close)[0] == 0
        assert in_thread(lambda: opened(files, os.O_RDONLY)) == "EBUSY"
        files.open(BINARY, os.O_RDWR).close()
        assert in_thread(lambda: opened(files, os.O_RDONLY)) == "EBUSY", "the first one still holds it"
    assert opened(files, os.O_RDONLY) == "ok"
    first, second = files.open(BINARY, os.O_RDWR), files.open(ASCII, os.O_WRONLY)
    first.close()
    assert opened(files, os.O_RDONLY) == "EBUSY"
    second.close()
    assert opened(files, os.O_RDONLY) == "ok"


def test_another_kernel_is_not_locked(directory: str) -> None:
    one, two = make(directory), make(directory + "2")
    with one.open(BINARY, os.O_RDWR):
        assert opened(two, os.O_RDWR) == opened(two, os.O_RDONLY) == "ok"


def test_one_writer_closed_by_another_thread_is_safe(directory: str) -> None:
    files = make(directory)
    in_thread(files.open(BINARY, os.O_RDWR).close)
    assert opened(files, os.O_RDWR) == "ok"


def test_phantom_reader(directory: str) -> None:
    """The kernel's bug: two descriptors, the first closed by another thread, and no writer any more until a reboot."""
    files = make(directory)
    first, second = files.open(BINARY, os.O_RDWR), files.open(ASCII, os.O_RDWR)
    in_thread(first.close)
    assert opened(files, os.O_RDONLY) == "ok", "the kernel has forgotten its writer"
    second.close()
    assert (opened(files, os.O_RDONLY), opened(files, os.O_RDWR)) == ("ok", "EBUSY")
    assert run_child(lambda: opened(files, os.O_RDWR)) == (0, "'EBUSY'")
    assert files.holders() == []
    assert error_of(lambda: _emulated.foreign_trim(directory, 1)) == "refused"
    _emulated.reboot(directory)
    assert opened(files, os.O_RDWR) == "ok"


def test_two_writers_closed_by_their_thread_are_safe(directory: str) -> None:
    files = make(directory)
    first, second = files.open(BINARY, os.O_RDWR), files.open(ASCII, os.O_RDWR)
    first.close()
    in_thread(second.close)
    assert opened(files, os.O_RDWR) == "ok"


# --- boots and faults -------------------------------------------------------------------------------------------------


def test_reboot(directory: str) -> None:
    files = make(directory, 5, flavour="staged")
    write(files, b"A\n", f"{BINARY}_staged")
    _emulated.grow(directory, 2)
    _emulated.violation(directory, "/x")
    _emulated.suspend(directory, True)
    old, before = files.boot_id(), oracle(directory)
    with files.open(BINARY, os.O_RDONLY) as file:
        _emulated.reboot(directory)
        assert errno_of(lambda: file.read(10)) == "EIO"
        assert opened(files, os.O_RDWR) == "ok", "who had it open before is no more"
    assert files.boot_id() != old and files.reset_count() == 2
    assert paths(read_all(files, BINARY)) == ["boot_aggregate"]
    assert read_all(files, f"{BINARY}_staged") == b"" and read_all(files, "violations") == b"0\n"
    assert [boot.boot_id for boot in _emulated.recorded(directory)] == [old, files.boot_id()]
    assert oracle(directory, 0) == before and len(parse(before)) == 9
    consistent(directory)
    assert write(files, b"1\n") == 2


def test_kexec_without_carry_over(directory: str) -> None:
    files = make(directory, 5)
    old, before = files.boot_id(), files.pcr("sha256", 10)
    _emulated.kexec(directory, False)
    (record,) = parse(read_all(files, BINARY))
    assert files.boot_id() != old and files.reset_count() == 1
    start = {"10": {"sha256": (before or b"").hex()}}
    replay = Replay(["sha256"], start).run([record]).values()
    assert (files.pcr("sha256", 10) or b"").hex() == replay["10"]["sha256"]


def test_kexec_with_carry_over(directory: str) -> None:
    files = make(directory, 5, flavour="staged")
    write(files, b"1\n")
    write(files, b"A\n", f"{BINARY}_staged")
    _emulated.feed(directory, records=[{"path": "/live"}, {"path": "/kept"}])
    write(files, b"1\n")
    staged, live = read_all(files, f"{BINARY}_staged"), read_all(files, BINARY)
    whole = parse(oracle(directory))
    _emulated.kexec(directory, True)
    now = read_all(files, BINARY)
    assert now.startswith(staged + live) and paths(now)[-1] == "boot_aggregate"
    assert read_all(files, f"{BINARY}_staged") == b""
    replay = Replay(files.tpm_banks()).run([*whole, parse(now)[-1]]).values()
    assert _emulated.describe(directory)["pcrs"] == replay
    assert _emulated.feed(directory, records=[{"path": "/kept"}]) == 1, "restored records are not in the hash table"
    assert read_all(files, "violations") == b"0\n"


def test_hash_table(directory: str) -> None:
    """Deleted records stay known, unless the kernel was booted with ima_flush_htable."""
    for flush, known in ((False, 0), (True, 1)):
        files = make(f"{directory}{flush}", flavour="staged", flush_htable=flush)
        _emulated.feed(files.directory, records=[{"path": "/a"}])
        write(files, b"A\n", f"{BINARY}_staged")
        _emulated.feed(files.directory, records=[{"path": "/b"}])
        assert _emulated.feed(files.directory, records=[{"path": "/a"}]) == 0
        write(files, b"D\n", f"{BINARY}_staged")
        assert _emulated.feed(files.directory, records=[{"path": "/b"}]) == 0, "it is still in the list"
        assert _emulated.would_record(files.directory, [{"path": "/a"}]) == known
        assert _emulated.feed(files.directory, records=[{"path": "/a"}]) == known


def test_suspend(directory: str) -> None:
    files = make(directory, 5, flavour="staged")
    staged = f"{BINARY}_staged"
    for data in (b"A\n\n", b"D\n\n", b"A\0\n", b"D", b"1\n"):
        assert errno_of(functools.partial(write, files, data, staged)) == "EINVAL"
    assert _emulated.suspend(directory, True) and not _emulated.suspend(directory, True)
    assert errno_of(lambda: write(files, b"A\n", staged)) == "EACCES"
    assert errno_of(lambda: write(files, b"1\n")) == "ESTALE"
    _emulated.suspend(directory, False)
    assert write(files, b"A\n", staged) == 2
    _emulated.suspend(directory, True)
    assert errno_of(lambda: write(files, b"D\n", staged)) == "ESTALE"
    assert len(parse(read_all(files, staged))) == 6
    assert error_of(lambda: _emulated.foreign_trim(directory, 1)) == "refused"


def test_foreign_trim(directory: str) -> None:
    files = make(directory, 5)
    _emulated.foreign_trim(directory, 2)
    assert len(parse(read_all(files, BINARY))) == 4
    for flags in (os.O_RDONLY, os.O_RDWR):
        with files.open(BINARY, flags), pytest.raises(EmulatorError) as caught:
            _emulated.foreign_trim(directory, 1)
        assert caught.value.details["errno"] == "EBUSY"
    assert error_of(lambda: _emulated.foreign_trim(directory, 5)) == "refused"
    _emulated.fail_next(directory, "enoent")
    _emulated.foreign_trim(directory, 4)
    assert read_all(files, BINARY) == b"" and len(parse(oracle(directory))) == 6
    assert (
        error_of(lambda: _emulated.foreign_trim(make(directory + "2", 5, flavour="export_only").directory, 1))
        == "refused"
    )


def test_fail_next(directory: str) -> None:
    files = make(directory, 5)
    assert _emulated.fail_next(directory, "enoent") and not _emulated.fail_next(directory, "enoent")
    assert errno_of(lambda: write(files, b"x\n")) == "EINVAL"
    assert errno_of(lambda: write(files, b"2\n")) == "ENOENT"
    assert len(parse(read_all(files, BINARY))) == 6
    assert write(files, b"2\n") == 2
    assert error_of(lambda: _emulated.fail_next(directory, "unheard_of")) == "fault"
    assert error_of(lambda: _emulated.kill_next(directory, "unheard_of")) == "fault"


@pytest.mark.parametrize(
    ("flavour", "command", "name", "left"), [("delete_n", b"2\n", BINARY, 4), ("staged", b"D\n", f"{BINARY}_staged", 0)]
)
def test_kill_and_lost_reply(directory: str, flavour: str, command: bytes, name: str, left: int) -> None:
    def fresh() -> EmulatedFiles:
        _emulated.remove(directory)
        files = make(directory, 5, flavour=flavour)
        if flavour == "staged":
            write(files, b"A\n", name)
        return files

    for moment, remaining in (("before_delete", 6), ("after_delete", left)):
        files = fresh()
        _emulated.kill_next(directory, moment)
        assert run_child(functools.partial(write, files, command, name)) == (signal.SIGKILL, "")
        assert len(parse(read_all(files, name))) == remaining
        assert _emulated._load(directory).faults == [], "once"
        assert opened(files, os.O_RDWR) == "ok"
    files = fresh()
    _emulated.lost_reply(directory)
    assert errno_of(lambda: write(files, command, name)) == "EIO"
    assert len(parse(read_all(files, name))) == left


def test_kill_after_stage(directory: str) -> None:
    files = make(directory, 5, flavour="staged")
    _emulated.kill_next(directory, "after_stage")
    assert run_child(lambda: write(files, b"A\n", f"{BINARY}_staged")) == (signal.SIGKILL, "")
    assert len(parse(read_all(files, f"{BINARY}_staged"))) == 6 and read_all(files, BINARY) == b""
    assert Lists(files).count() == 0


def test_lists_over_the_emulated_kernel(directory: str) -> None:
    """A whole cycle through what everybody uses."""
    lists = Lists(make(directory, 5, flavour="staged"), 0)
    with lists.writer(staged=True) as file:
        with pytest.raises(KernelError) as caught:
            lists.delete_staged(file)
        assert caught.value.reason == "nothing_staged"
        assert lists.stage(file) == "staged"
        assert lists.stage(file) == "leftover"
        assert len(parse(rest(file))) == 6
        lists.delete_staged(file)
        assert lists.stage(file) == "empty"
    _emulated.grow(directory, 3)
    with lists.writer() as file:
        with pytest.raises(KernelError) as caught:
            lists.delete(file, 4)
        assert caught.value.reason == "fewer_records"
        lists.delete(file, 3)
    assert lists.count() == 0


# --- the module -------------------------------------------------------------------------------------------------------


def snapshot(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()} if os.path.exists(directory) else {}


@pytest.mark.parametrize("fault", ["", *(fault for fault in _emulated.ACTIONS)])
def test_predictions_come_true(directory: str, tmp_path: Path, fault: str) -> None:
    capture = make(str(tmp_path / "capture"), 3)
    (tmp_path / "list").write_bytes(read_all(capture, BINARY))
    parameters = {"flavour": "staged", "banks": None, "capture": str(tmp_path / "list")}
    record = {"path": "/fed", "content": "x", "template": None, "pcr": 10}
    requests = [
        Request(parameters),
        Request(parameters, feed=[record, record]),
        Request(parameters, feed=[record]),
        Request(parameters, grow=3, trim=2, fault=fault),
        Request(parameters, trim=2, fault=fault),
        Request({}, feed_capture=str(tmp_path / "list")),
        Request({}),
    ]
    changes = []
    for request in requests:
        before = snapshot(directory)
        told = _emulated.predict(directory, request)
        assert snapshot(directory) == before, "a prediction writes nothing"
        done = _emulated.apply(directory, request)
        assert (told.changed, told.before) == (done.changed, done.before)
        if told.after and not fault:
            assert told.after["records_recorded"] == done.after["records_recorded"]
        assert set(done.diff()["after"]) == {"count", "records_recorded", "violations", "pcrs"}
        changes.append(done.changed)
    once = ("", "suspend", "phantom_reader", *_emulated.FAULTS)
    assert changes[:4] == [True, True, False, True] and changes[5:] == [True, False]
    assert changes[4] is (fault not in once and fault != "resume")
    assert error_of(lambda: _emulated.predict(directory, Request({"flavour": "delete_n"}))) == "exists"


def test_withdraw(directory: str) -> None:
    assert _emulated.withdraw(directory, check=False) == (False, {}, {})
    make(directory, 2)
    told = _emulated.withdraw(directory, check=True)
    assert told.changed and told.before["count"] == 3 and told.after == {}
    assert _emulated.withdraw(directory, check=False) == told
    assert not os.path.exists(directory)
