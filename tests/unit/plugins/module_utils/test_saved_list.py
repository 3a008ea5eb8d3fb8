# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Saved lists: every capture of a real kernel against the PCRs of its TPM, and lists that are wrong."""

from __future__ import annotations

import io
import json
import lzma
import os
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, ListError
from ansible_collections.integrity.ima.plugins.module_utils._pcr import Replay
from ansible_collections.integrity.ima.plugins.module_utils._saved_list import aggregate_saved

CAPTURES = Path(__file__).resolve().parents[3] / "fixtures" / "captures"
LAB = CAPTURES / "kernel-lab"
SIZES = {20: "sha1", 32: "sha256", 48: "sha384", 64: "sha512"}
NAME = "binary_runtime_measurements"
THREE = LAB / "6.12-ima-ng-3banks" / f"{NAME}_sha1"
# Their list alone does not lead to their PCRs, as tests/fixtures/README.md says.
PARTS = ("7.3-trim-1-after40", "lab7.3-stage-1-staged", "lab7.3-kexec-0-before", "lab7.3-kexec-1-after")


def lists() -> list[Path]:
    return sorted(
        path
        for path in LAB.glob("*/*_runtime_measurements*")
        if path.stat().st_size and path.parent.name not in PARTS and not path.name.endswith("_staged")
    )


def told(path: Path) -> t.Any:
    """PCR values by number and bank, of those PCRs that IMA extends."""
    values = json.loads((path.parent / "meta.json").read_text(encoding="utf-8"))["pcrs"]
    return {pcr: {bank: values[bank][pcr] for bank in values} for pcr in ("10", "11", "12") if values}


def meta(path: Path) -> t.Any:
    return json.loads((path.parent / "meta.json").read_text(encoding="utf-8"))


def _id(path: t.Any) -> str:
    return "/".join(path.parts[-2:]) if isinstance(path, Path) else str(path)


@pytest.mark.parametrize("path", lists(), ids=_id)
def test_a_list_of_a_real_kernel_reaches_the_values_of_its_tpm(path: Path) -> None:
    values = told(path)
    result = aggregate_saved(str(path), None, None, values)
    assert (result["records"], result["violations"]) == (meta(path)["count"], meta(path)["violations"])
    assert result["changed"] is False and result["padded"] == []
    assert result["form"] == ("ascii" if path.name.startswith("ascii") else "binary")
    assert result["byte_order"] == (None if result["form"] == "ascii" else "little")
    bank = path.name.split("_")[3] if path.name.count("_") == 3 else "sha1"
    assert SIZES[result["digest_size"]] == bank
    assert sum(result["templates"].values()) == result["records"]
    if values:
        # Whatever the PCRs were never extended with does not show.
        assert result["reached_at"] == result["records"]
        for pcr, banks in result["pcrs"].items():
            assert {name: value.lower() for name, value in values[pcr].items()} == banks
    else:
        assert result["reached_at"] is None and sorted(result["pcrs"]["10"]) == ["sha1", "sha256"]
    json.dumps(result)


def test_several_pcrs() -> None:
    path = LAB / "6.1-ima-buf-multipcr" / NAME
    result = aggregate_saved(str(path), None, None, told(path))
    assert sorted(result["pcrs"]) == ["10", "11", "12"] and "ima-buf" in result["templates"]


def expected(kernel: str, stage: str) -> t.Any:
    values = json.loads((CAPTURES / "fixtures" / f"{kernel}.pcrs.json").read_text(encoding="utf-8"))[stage]
    return {pcr: {bank: row[pcr] for bank, row in values.items() if isinstance(row, dict)} for pcr in ("10", "11")}


SMALL = sorted(
    path
    for path in (CAPTURES / "fixtures").iterdir()
    if path.suffix != ".json" and not (path.name.startswith("k7.3.4") and path.name.split(".")[3] in "CE")
)


@pytest.mark.parametrize("path", SMALL, ids=_id)
def test_every_kind_of_record_and_a_padded_bank(path: Path) -> None:
    kernel, stage = path.name.rsplit(".", 2)[:2]
    values = expected(kernel, stage)
    result = aggregate_saved(str(path), None, None, values)
    assert result["reached_at"] == result["records"]
    assert result["padded"] == (["sha384"] if kernel == "k6.1.192" else [])
    assert result["pcrs"]["10"]["sha384"] == values["10"]["sha384"].lower()


@pytest.mark.parametrize("form", ["binary_sha1", "binary_sha256", "binary_sha384", "ascii"])
@pytest.mark.parametrize("stage", ["C", "E"])
def test_a_trimmed_list_with_the_values_at_its_start(form: str, stage: str) -> None:
    trimmed = CAPTURES / "fixtures" / f"k7.3.4.{stage}.{form}"
    values = expected("k7.3.4", stage)
    with pytest.raises(ImaError) as caught:
        aggregate_saved(str(trimmed), None, None, values)
    assert caught.value.reason == "pcr_mismatch"
    result = aggregate_saved(
        str(trimmed), None, start_of("k7.3.4.B.binary_sha1", f"k7.3.4.{stage}.binary_sha1"), values
    )
    assert result["reached_at"] == result["records"]


def start_of(whole: str, trimmed: str) -> t.Any:
    """The values after the records that were deleted."""
    data, rest = ((CAPTURES / "fixtures" / name).read_bytes() for name in (whole, trimmed))
    first = next(ml.read(io.BytesIO(rest).read, ml.Layout(20, "little"))).raw
    replay = Replay(["sha1", "sha256", "sha384"])
    replay.run(ml.read(io.BytesIO(data[: data.index(first)]).read, ml.Layout(20, "little")))
    return replay.values()


def test_a_trimmed_list_of_the_lab() -> None:
    directory = LAB / "7.3-trim-1-after40"
    prefix = aggregate_saved(str(directory / "trimmed-prefix.bin"), None, None, None)
    assert prefix["records"] == 40
    result = aggregate_saved(str(directory / f"{NAME}_sha1"), None, prefix["pcrs"], told(directory / f"{NAME}_sha1"))
    assert result["reached_at"] == result["records"]


def test_a_list_that_is_ahead_of_the_pcrs(tmp_path: Path) -> None:
    path = THREE
    raw = path.read_bytes()
    again = next(ml.read(io.BytesIO(raw).read, ml.Layout(20, "little"))).raw
    (tmp_path / "ahead").write_bytes(raw + again * 3)
    result = aggregate_saved(str(tmp_path / "ahead"), None, None, told(path))
    assert result["reached_at"] == result["records"] - 3


def test_a_kexec_that_lost_the_list_is_a_mismatch() -> None:
    path = LAB / "lab7.3-kexec-1-after" / f"{NAME}_sha1"
    with pytest.raises(ImaError) as caught:
        aggregate_saved(str(path), None, None, told(path))
    assert caught.value.reason == "pcr_mismatch"
    details = caught.value.details
    assert details["reached_at"] is None and details["records"] == meta(path)["count"]
    assert details["path"] == str(path) and details["pcrs"]["10"]


def test_a_list_of_two_banks_is_none(tmp_path: Path) -> None:
    rest = b" ima-ng sha1:" + b"0" * 40 + b" /v\n"
    first = b"10 " + b"0" * 64 + rest
    (tmp_path / "two").write_bytes(first + b"10 " + b"0" * 40 + rest)
    with pytest.raises(ListError) as caught:
        aggregate_saved(str(tmp_path / "two"), None, None, None)
    assert caught.value.reason == "malformed_list"
    assert (caught.value.details["index"], caught.value.details["offset"]) == (1, len(first))
    assert "20 bytes in a list of 32" in caught.value.msg


@pytest.mark.parametrize("bank", ["sha1", "sha256", "sha384", "sha512"])
def test_banks_are_chosen(bank: str) -> None:
    path = str(THREE)
    assert list(aggregate_saved(path, [bank], None, None)["pcrs"]["10"]) == [bank]


def test_a_big_list(tmp_path: Path) -> None:
    big = CAPTURES / "big"
    path = tmp_path / "big"
    path.write_bytes(lzma.open(next(big.glob("*.xz"))).read())
    document = json.loads(next(big.glob("*.meta.json")).read_text(encoding="utf-8"))
    value = document["pcrs"]["sha1"]["10"]
    result = aggregate_saved(str(path), ["sha1"], None, {10: {"sha1": "0x" + value.upper()}})
    assert result["reached_at"] == result["records"] == document["count"]


# -- what is wrong ---------------------------------------------------------------------------------------------------


GOOD = THREE.read_bytes()
RECORDS = list(ml.read(io.BytesIO(GOOD).read, ml.Layout(20, "little")))


def bad(tmp_path: Path, data: bytes) -> ImaError:
    path = tmp_path / "list"
    path.write_bytes(data)
    with pytest.raises(ImaError) as caught:
        aggregate_saved(str(path), None, None, None)
    assert caught.value.details["path"] == str(path)
    json.dumps(caught.value.result())
    return caught.value


@pytest.mark.parametrize("number", [1, 50, 290])
def test_a_bad_record_is_named(tmp_path: Path, number: int) -> None:
    record = RECORDS[number]
    altered = bytearray(GOOD)
    altered[record.offset + len(record.raw) - 2] ^= 1
    error = bad(tmp_path, bytes(altered))
    assert isinstance(error, ListError)
    assert (error.reason, error.details["index"], error.details["offset"]) == (
        "digest_mismatch",
        number,
        record.offset,
    )


def test_a_cut_list(tmp_path: Path) -> None:
    error = bad(tmp_path, GOOD[: RECORDS[9].offset + 30])
    assert (error.reason, error.details["index"], error.details["offset"]) == ("truncated", 9, RECORDS[9].offset)


def test_garbage_behind_the_last_record(tmp_path: Path) -> None:
    error = bad(tmp_path, GOOD + b"\xff" * 100)
    assert (error.details["index"], error.details["offset"]) == (len(RECORDS), len(GOOD))


def test_a_bad_line(tmp_path: Path) -> None:
    lines = (THREE.parent / "ascii_runtime_measurements_sha1").read_bytes().split(b"\n")
    lines[20] = lines[20].replace(b"sha256:", b"sha256:0")
    error = bad(tmp_path, b"\n".join(lines))
    assert error.details["index"] == 20 and error.details["offset"] == sum(len(line) + 1 for line in lines[:20])


@pytest.mark.parametrize(
    ("data", "reason"),
    [(b"", "empty_list"), (b"\0" * 500, "not_a_list"), (b"hello world\n" * 50, "not_a_list"), (b"\xff", "not_a_list")],
    ids=["empty", "zeros", "text", "byte"],
)
def test_what_is_no_list(tmp_path: Path, data: bytes, reason: str) -> None:
    assert bad(tmp_path, data).reason == reason


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ImaError) as caught:
            aggregate_saved(str(path), None, None, None)
        assert caught.value.reason == "no_file" and caught.value.details["path"] == str(path)


@pytest.mark.parametrize(
    "values",
    [
        {"24": {"sha1": "0" * 40}},
        {"-1": {"sha1": "0" * 40}},
        {"ten": {"sha1": "0" * 40}},
        {"10": {"md5": "0" * 32}},
        {"10": {"sha1": "0" * 64}},
        {"10": {"sha1": "g" * 40}},
        {"10": {"sha1": 7}},
        {"10": "0" * 40},
        {"10": None},
        {"10": {"sha1": "0" * 40}, 10: {"sha1": "0" * 40}},
        ["10"],
        "10",
        7,
    ],
    ids=str,
)
@pytest.mark.parametrize("which", ["start", "expect"])
def test_values_that_are_none(which: str, values: t.Any) -> None:
    path = str(THREE)
    start, expect = (values, None) if which == "start" else (None, values)
    with pytest.raises(ImaError) as caught:
        aggregate_saved(path, None, start, expect)
    assert caught.value.reason == "pcr_values" and which in str(caught.value)


def test_odd_file_names_are_never_shown(tmp_path: Path) -> None:
    path = LAB / "6.1-ima-ng-t2-violations" / NAME
    text = json.dumps(aggregate_saved(str(path), None, None, told(path)))
    assert text.isascii() and "/" not in text and os.sep not in text
