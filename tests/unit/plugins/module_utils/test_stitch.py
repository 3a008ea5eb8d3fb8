# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The stitched lists against what the emulated kernel really recorded, its untrimmed twin, and evmctl."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils._emulated import EmulatedFiles
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, StoreError, WriteError
from ansible_collections.integrity.ima.plugins.module_utils._stitch import stitch
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

ODD = Path(support.CAPTURES) / "kernel-lab" / "6.1-ima-ng-t2-violations" / "binary_runtime_measurements"


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> DirectoryStore:
    return support.new_store(tmp_path / "store")


def stitched(
    store: DirectoryStore, tmp_path: Path, *, boot_id: str = "", check: bool = False
) -> tuple[bytes, bytes, support.Json]:
    result = stitch(store, "h", boot_id, str(tmp_path / "binary"), str(tmp_path / "ascii"), check)
    return (tmp_path / "binary").read_bytes(), (tmp_path / "ascii").read_bytes(), result


def trimmed(host: support.Host, store: DirectoryStore, times: int = 3) -> None:
    """Rotate some times, so that the kernel deletes records each time."""
    for number in range(times):
        host.grow(9)
        if number == 1:
            _emulated.violation(host.kernel, "/var/log/x y")
        result = host.rotate(store)
        assert result["trimmed"] or host.flavour == "export_only"


def whole_ascii(raw: bytes, twin: Path) -> bytes:
    """What a kernel that recorded all of ``raw`` and was never trimmed shows as its ASCII list."""
    (twin.parent / "recorded").write_bytes(raw)
    _emulated.create(str(twin), flavour="delete_n", capture=str(twin.parent / "recorded"))
    with EmulatedFiles(str(twin)).open("ascii_runtime_measurements", os.O_RDONLY) as file:
        return b"".join(iter(lambda: file.read(65536), b""))


@pytest.mark.parametrize("flavour", support.FLAVOURS)
@pytest.mark.parametrize("capture", ["", str(ODD)], ids=["synthetic", "odd-names"])
def test_the_stitched_lists_are_what_an_untrimmed_kernel_shows(
    tmp_path: Path, store: DirectoryStore, flavour: str, capture: str
) -> None:
    host = support.Host(tmp_path / "h", flavour=flavour, capture=capture, shard_records=11)
    trimmed(host, store)
    binary, text, result = stitched(store, tmp_path)
    assert binary == host.recorded()
    assert text == whole_ascii(host.recorded(), tmp_path / "twin")
    records = list(ml.read(io.BytesIO(binary).read))
    assert (result["records"], result["violations"]) == (len(records), sum(record.violation for record in records))
    assert (result["changed"], result["pcrs"], result["padded"]) == (True, host.pcrs(), [])
    assert result["shards"] == len(store.entries("h"))
    assert (tmp_path / "binary").stat().st_mode & 0o777 == 0o600, "they hold file names"


@pytest.mark.parametrize("name", ["6.1-ima-buf-multipcr", "6.1-evm-sig-sha256", "6.1-ima-legacy-sha1"])
def test_the_ascii_list_of_a_real_kernel(tmp_path: Path, store: DirectoryStore, name: str) -> None:
    capture = Path(support.CAPTURES) / "kernel-lab" / name
    host = support.Host(tmp_path / "h", capture=str(capture / "binary_runtime_measurements"), shard_records=40)
    host.rotate(store)
    binary, text, _result = stitched(store, tmp_path)
    assert binary == (capture / "binary_runtime_measurements").read_bytes()
    assert text == (capture / "ascii_runtime_measurements").read_bytes()


def test_stitching_again_changes_nothing_and_check_mode_writes_nothing(tmp_path: Path, store: DirectoryStore) -> None:
    host = support.Host(tmp_path / "h")
    trimmed(host, store)
    paths = str(tmp_path / "binary"), str(tmp_path / "ascii")
    before = support.tree(str(tmp_path))
    assert stitch(store, "h", "", *paths, True)["changed"] is True
    assert support.tree(str(tmp_path)) == before
    assert stitch(store, "h", "", *paths, False)["changed"] is True
    before, inode = support.tree(str(tmp_path)), os.stat(paths[0]).st_ino
    assert stitch(store, "h", "", *paths, False)["changed"] is False
    assert stitch(store, "h", "", *paths, True)["changed"] is False
    assert support.tree(str(tmp_path)) == before and os.stat(paths[0]).st_ino == inode
    Path(paths[1]).write_bytes(b"other")
    assert stitch(store, "h", "", *paths, True)["changed"] is True
    assert stitch(store, "h", "", None, paths[1], False)["changed"] is True
    assert support.tree(str(tmp_path)) == before


def test_two_boots(tmp_path: Path, store: DirectoryStore) -> None:
    host = support.Host(tmp_path / "h")
    trimmed(host, store)
    first = store.entries("h")[0].boot_id
    _emulated.reboot(host.kernel)
    trimmed(host, store, 2)
    newest, _text, result = stitched(store, tmp_path)
    assert newest == host.recorded(1) and result["boot_id"] != first
    old, _text, result = stitched(store, tmp_path, boot_id=first)
    assert old == host.recorded(0) and result["boot_id"] == first


def test_a_kexec_that_carried_the_list_over(tmp_path: Path, store: DirectoryStore) -> None:
    host = support.Host(tmp_path / "h", trim_after="never")
    host.grow(9)
    host.rotate(store)
    first = store.entries("h")[0].boot_id
    _emulated.kexec(host.kernel, True)
    host.grow(4)
    host.rotate(store)
    binary, _text, result = stitched(store, tmp_path)
    assert binary == host.recorded() and result["records"] == 15 and result["pcrs"] == host.pcrs()
    assert stitched(store, tmp_path, boot_id=first)[0] == binary, "both boots are one list"


def test_a_carried_over_list_of_which_the_head_was_trimmed(tmp_path: Path, store: DirectoryStore) -> None:
    host = support.Host(tmp_path / "h")
    trimmed(host, store, 1)
    before = host.recorded()
    host.configure("never", 7)
    host.grow(5)
    host.rotate(store)
    _emulated.kexec(host.kernel, True)
    host.grow(2)
    host.configure("central", 7)
    host.rotate(store)
    binary, _text, _result = stitched(store, tmp_path)
    assert binary == before + host.recorded()


def refused(store: DirectoryStore, tmp_path: Path, boot_id: str = "") -> StoreError:
    before = support.tree(str(tmp_path))
    with pytest.raises(StoreError) as caught:
        stitch(store, "h", boot_id, str(tmp_path / "binary"), str(tmp_path / "ascii"), False)
    assert support.tree(str(tmp_path)) == before, "nothing is written"
    return caught.value


def test_a_history_with_a_hole_is_not_stitched(tmp_path: Path, store: DirectoryStore) -> None:
    trimmed(support.Host(tmp_path / "h"), store)
    for path in support.paths(store, support.take(store)[1]):
        os.unlink(path)
    error = refused(store, tmp_path)
    assert (error.reason, error.details["fault"], error.details["sequence"]) == ("broken", "missing_shard", 2)


@pytest.mark.parametrize(("which", "fault"), [("shard", "edited_shard"), ("manifest", "edited_manifest")])
def test_an_edited_history_is_not_stitched(tmp_path: Path, store: DirectoryStore, which: str, fault: str) -> None:
    trimmed(support.Host(tmp_path / "h"), store)
    path = Path(support.paths(store, support.take(store)[1])[which == "manifest"])
    path.write_bytes(path.read_bytes()[:-1])
    error = refused(store, tmp_path)
    assert (error.reason, error.details["fault"]) == ("broken", fault)


def test_a_missing_shard_file_is_not_stitched(tmp_path: Path, store: DirectoryStore) -> None:
    trimmed(support.Host(tmp_path / "h"), store)
    os.unlink(support.paths(store, support.take(store)[1])[0])
    error = refused(store, tmp_path)
    assert (error.reason, error.details["fault"]) == ("broken", "missing_shard")


def test_a_sound_boot_is_stitched_though_another_one_has_a_fault(tmp_path: Path, store: DirectoryStore) -> None:
    host = support.Host(tmp_path / "h")
    trimmed(host, store)
    host.grow(3)
    _emulated.kexec(host.kernel, False)
    host.grow(3)
    assert host.rotate(store)["fault"]["reason"] == "kexec"
    first = store.entries("h")[0].boot_id
    binary = stitched(store, tmp_path, boot_id=first)[0]
    assert host.recorded(0).startswith(binary) and len(list(ml.read(io.BytesIO(binary).read))) == 29


def test_what_is_not_there(tmp_path: Path, store: DirectoryStore) -> None:
    assert refused(store, tmp_path).reason == "no_shard"
    trimmed(support.Host(tmp_path / "h"), store, 1)
    assert refused(store, tmp_path, "13b0692a-94e1-4061-890d-87c47d9ca675").reason == "no_shard"
    with pytest.raises(WriteError) as caught:
        stitch(store, "h", "", str(tmp_path / "no" / "binary"), None, False)
    assert caught.value.reason == "no_directory"


def test_a_directory_in_the_place_of_the_list(tmp_path: Path, store: DirectoryStore) -> None:
    trimmed(support.Host(tmp_path / "h"), store, 1)
    for check in (True, False):
        with pytest.raises(ImaError):
            stitch(store, "h", "", str(tmp_path), None, check)


# -- evmctl ----------------------------------------------------------------------------------------------------------


def evmctl(path: Path, values: support.Json, tmp_path: Path) -> subprocess.CompletedProcess[bytes]:
    """Run evmctl on a binary list. One bank a run: with two it takes a list that is wrong in the first for right."""
    pcrs = tmp_path / "pcrs"
    ((bank, value),) = values.items()
    size = len(value) // 2
    row = {10: value.upper()}
    lines = [f"PCR-{n:02d}: " + " ".join(_pairs(row.get(n, "00" * size))) for n in range(24)]
    pcrs.write_text("\n".join(lines) + "\n", encoding="ascii")
    return subprocess.run(
        ["evmctl", "ima_measurement", "--ignore-violations", "--pcrs", f"{bank},{pcrs}", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )


def _pairs(text: str) -> list[str]:
    return [text[at : at + 2] for at in range(0, len(text), 2)]


@pytest.mark.skipif(not shutil.which("evmctl"), reason="evmctl is not installed (package ima-evm-utils)")
@pytest.mark.parametrize("flavour", ["delete_n", "staged"])
def test_evmctl_accepts_the_stitched_list_of_a_trimmed_host(
    tmp_path: Path, store: DirectoryStore, flavour: str
) -> None:
    host = support.Host(tmp_path / "h", flavour=flavour, shard_records=11)
    trimmed(host, store, 4)
    assert host.live() == 0
    binary = stitched(store, tmp_path)[0]
    records = [record.raw for record in ml.read(io.BytesIO(binary).read)]
    for bank, value in host.pcrs()["10"].items():
        whole = evmctl(tmp_path / "binary", {bank: value}, tmp_path)
        assert whole.returncode == 0, whole.stdout
        for gone in (0, 12, len(records) - 1):
            (tmp_path / "less").write_bytes(b"".join(records[:gone] + records[gone + 1 :]))
            assert evmctl(tmp_path / "less", {bank: value}, tmp_path).returncode != 0
