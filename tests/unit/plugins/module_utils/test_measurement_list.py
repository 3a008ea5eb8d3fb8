# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Measurement lists of real kernels, of the other byte order, broken ones and arbitrary ones."""

from __future__ import annotations

import io
import json
import re
import struct
import tracemalloc
import typing as t
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils import _pcr
from ansible_collections.integrity.ima.plugins.module_utils._errors import ListError

CAPTURES = Path(__file__).resolve().parents[3] / "fixtures" / "captures"
BANKS = {bank: size for size, bank in ml.DIGEST_SIZES.items()}
LITTLE, BIG = ml.Layout(20, "little"), ml.Layout(20, "big")
LAYOUTS = [ml.Layout(size, order) for size in ml.DIGEST_SIZES for order in ("little", "big")]
FORMATS = ["d-ng|n-ng|iuid", "d|n", "n-ng", "d-ngv2|n-ng|igid|imode", "n|d-modsig|xattrnames"]
TEMPLATES = list(ml.TEMPLATES) + FORMATS

quick = settings(deadline=None, max_examples=60)


def _binaries() -> list[Path]:
    names = ["kernel-lab/*/binary_runtime_measurements*", "kernel-lab/*/trimmed-prefix.bin", "fixtures/*.binary_*"]
    return sorted(path for name in names for path in CAPTURES.glob(name) if path.stat().st_size)


def _id(path: Path) -> str:
    return str(path.relative_to(CAPTURES))


def _size(path: Path) -> int:
    found = re.search(r"_(sha\d+)", path.name)
    return BANKS[found.group(1)] if found else 20


def _layout(path: Path) -> ml.Layout:
    return ml.Layout(_size(path), "little")


def _twin(path: Path) -> Path:
    """The ASCII list that the kernel showed beside a binary one."""
    if path.parent.name == "fixtures":
        return path.with_name(path.name.replace("binary_sha1", "ascii"))
    return path.with_name(path.name.replace("binary", "ascii"))


BINARIES = _binaries()
TWINS = [path for path in BINARIES if _twin(path) != path and _twin(path).exists()]
SHA1_LISTS = [path for path in BINARIES if _size(path) == 20]
# The kernel's counts are of the live list.
LIVE = [path for path in BINARIES if re.fullmatch(r"binary_.*[^d]", path.name) and path.with_name("meta.json").exists()]
EVERY = pytest.mark.parametrize("path", BINARIES, ids=_id)
EVERY_TWIN = pytest.mark.parametrize("path", TWINS, ids=_id)
EVERY_LIVE = pytest.mark.parametrize("path", LIVE, ids=_id)
EVERY_SHA1 = pytest.mark.parametrize("path", SHA1_LISTS, ids=_id)


def chunks(raw: bytes, *sizes: int) -> t.Callable[[int], bytes]:
    """A source whose reads give as many bytes as ``sizes`` say, in turn."""
    stream, turn = io.BytesIO(raw), [0]

    def source(size: int) -> bytes:
        turn[0] += 1
        return stream.read(min(size, sizes[turn[0] % len(sizes)]))

    return source


def parse(raw: bytes, layout: ml.Layout = LITTLE, **options: t.Any) -> list[ml.Record]:
    return list(ml.read(io.BytesIO(raw).read, layout, **options))


def parse_ascii(text: bytes, **options: t.Any) -> list[ml.Record]:
    return list(ml.read_ascii(io.BytesIO(text).read, **{"byte_order": "little", **options}))


def swap(record: ml.Record, size: int = 20) -> bytes:
    """The record as a big-endian kernel would write it."""
    ids = ml.field_ids(record.template) or ()
    values = [
        value[::-1] if name in ("iuid", "igid", "imode") else value
        for name, value in zip(ids, ml.fields(record, "little"))
    ]
    return ml.encode(record.pcr, record.template, values, ml.Layout(size, "big"), violation=record.violation)


# ---- real lists -----------------------------------------------------------------------------------------------------


def test_there_are_captures_of_every_kind() -> None:
    seen = {record.template for path in SHA1_LISTS for record in parse(path.read_bytes())}
    assert set(ml.TEMPLATES) <= seen
    assert len(BINARIES) > 50 and len(TWINS) > 40
    assert {_size(path) for path in BINARIES} == {20, 32, 48}


@EVERY
def test_parses_every_list(path: Path) -> None:
    raw = path.read_bytes()
    records = parse(raw, _layout(path))
    assert b"".join(record.raw for record in records) == raw
    assert [record.index for record in records] == list(range(len(records)))
    assert all(raw[record.offset :].startswith(record.raw) for record in records)
    assert records == parse(raw, _layout(path), verify=False)


@EVERY_LIVE
def test_counts_are_the_kernels(path: Path) -> None:
    records = parse(path.read_bytes(), _layout(path))
    told = json.loads(path.with_name("meta.json").read_text())
    assert (len(records), sum(record.violation for record in records)) == (told["count"], told["violations"])


@EVERY
def test_rehashes_every_record(path: Path) -> None:
    bank = ml.DIGEST_SIZES[_size(path)]
    for record in parse(path.read_bytes(), _layout(path)):
        computed = ml.template_digest(bank, record.template, record.data)
        assert record.digest == (bytes(_size(path)) if record.violation else computed)


@EVERY
def test_takes_records_apart_and_together(path: Path) -> None:
    layout = _layout(path)
    for record in parse(path.read_bytes(), layout):
        values = ml.fields(record, "little")
        assert ml.template_data(record.template, values, "little") == record.data
        assert ml.encode(record.pcr, record.template, values, layout, violation=record.violation) == record.raw


@EVERY_TWIN
def test_renders_the_kernels_ascii(path: Path) -> None:
    records = parse(path.read_bytes(), _layout(path))
    assert b"".join(ml.to_ascii(record, "little") for record in records) == _twin(path).read_bytes()


@EVERY_TWIN
def test_reads_the_kernels_ascii(path: Path) -> None:
    text = _twin(path).read_bytes()
    records = parse_ascii(text)
    assert [record._replace(offset=0) for record in records] == [
        record._replace(offset=0) for record in parse(path.read_bytes(), _layout(path))
    ]
    assert all(text[record.offset :].startswith(ml.to_ascii(record, "little")) for record in records)


@EVERY
def test_converts_to_every_other_bank(path: Path) -> None:
    records = parse(path.read_bytes(), _layout(path))
    for size, bank in ml.DIGEST_SIZES.items():
        converted = b"".join(ml.convert(record, "little", size) for record in records)
        again = parse(converted, ml.Layout(size, "little"))
        assert [record.data for record in again] == [record.data for record in records]
        other = path.with_name(re.sub(r"_sha\d+", f"_{bank}", path.name))
        if other.exists() and _size(other) == size:
            assert converted == other.read_bytes()


@EVERY
def test_detects_every_list(path: Path) -> None:
    raw = path.read_bytes()
    records = parse(raw, _layout(path))
    for cut in (len(raw), 65536, 4096, len(records[0].raw), len(records[0].raw) - 1):
        assert ml.detect(raw[:cut]) == _layout(path), cut


@EVERY_TWIN
def test_detects_ascii(path: Path) -> None:
    assert ml.detect(_twin(path).read_bytes()[:100]) is None


@EVERY
@pytest.mark.parametrize("sizes", [(1,), (7,), (4096, 1, 3), (65536,)])
def test_any_pieces(path: Path, sizes: tuple[int, ...]) -> None:
    records = parse(path.read_bytes(), _layout(path))[:40]
    raw = b"".join(record.raw for record in records)
    assert list(ml.read(chunks(raw, *sizes), _layout(path))) == records


@EVERY_TWIN
def test_any_pieces_of_ascii(path: Path) -> None:
    text = _twin(path).read_bytes()
    assert list(ml.read_ascii(chunks(text, 1000, 1, 17), byte_order="little")) == parse_ascii(text)


@EVERY_SHA1
@pytest.mark.parametrize("size", [20, 48])
def test_big_endian(path: Path, size: int) -> None:
    little = parse(path.read_bytes())
    raw = b"".join(swap(record, size) for record in little)
    layout = ml.Layout(size, "big")
    records = parse(raw, layout)
    assert ml.detect(raw[:5000]) == layout
    assert [(record.pcr, record.template, record.violation) for record in records] == [
        (record.pcr, record.template, record.violation) for record in little
    ]
    text = b"".join(ml.to_ascii(record, "big") for record in records)
    blank = re.compile(rb"^(..) [0-9a-f]{40,}", re.M)
    assert blank.sub(rb"\1", text) == blank.sub(rb"\1", b"".join(ml.to_ascii(record, "little") for record in little))
    with pytest.raises(ListError) as caught:
        parse(raw, ml.Layout(size, "little"))
    assert (caught.value.reason, caught.value.details["byte_order"]) == ("wrong_byte_order", "big")
    if not any(record.template == "ima" for record in records):
        assert [record.raw for record in parse_ascii(text)] == [record.raw for record in records]


def test_names_and_digests() -> None:
    records = parse((CAPTURES / "fixtures" / "k7.3.4.A.binary_sha1").read_bytes())
    assert ml.event_name(records[0], "little") in (b"boot_aggregate", b"boot_aggregate_late")
    for record in records:
        algo, digest = ml.file_digest(record, "little")
        shown = ml.to_ascii(record, "little").split(b" ")
        text = digest.hex() if record.template == "ima" else f"{algo}:{digest.hex()}"
        assert shown[-len(ml.fields(record, "little"))].decode() in (text, "ima:" + text)
        assert ml.event_name(record, "little") in ml.to_ascii(record, "little")


# ---- made records ---------------------------------------------------------------------------------------------------

DNG = b"sha256:\0" + b"\x11" * 32
ZERO_DNG = b"sha256:\0" + bytes(32)
NNG = b"/usr/bin/true\0"


def words(*values: int, order: str = "little") -> bytes:
    return struct.pack(("<" if order == "little" else ">") + "I" * len(values), *values)


def made(template: str = "ima-ng", data: bytes | None = None, digest: bytes | None = None) -> bytes:
    """A little-endian SHA-1 record with any data and digest."""
    data = ml.template_data("ima-ng", [DNG, NNG], "little") if data is None else data
    digest = ml.template_digest("sha1", template, data) if digest is None else digest
    length = b"" if template == "ima" else words(len(data))
    return words(10) + digest + words(len(template)) + template.encode("latin-1") + length + data


GOOD = made()


def ng(*values: bytes) -> bytes:
    return ml.template_data("ima-ng", values, "little")


BAD: dict[str, tuple[bytes, str]] = {
    "pcr": (words(24) + GOOD[4:], "malformed_list"),
    "name_len 0": (GOOD[:24] + words(0) + GOOD[28:], "malformed_list"),
    "name_len 256": (GOOD[:24] + words(256) + GOOD[28:], "malformed_list"),
    "name not ASCII": (made("ima-\xe4"), "malformed_list"),
    "name with a space": (made("ima ng"), "malformed_list"),
    "data_len": (GOOD[:34] + words((8 << 20) + 1) + GOOD[38:], "malformed_list"),
    "data_len of an unknown template": (made("new")[:31] + words(0xFFFFFFFF) + GOOD, "malformed_list"),
    "no data": (made(data=b""), "malformed_list"),
    "no data of an unknown template": (made("new", b""), "malformed_list"),
    "field goes beyond": (made(data=words(40) + DNG + words(99) + NNG), "malformed_list"),
    "field ends early": (made(data=words(40) + DNG + words(2) + NNG), "malformed_list"),
    "half a length": (made("new", ng(DNG) + b"\0\0"), "malformed_list"),
    "too few fields": (made(data=ng(DNG)), "malformed_list"),
    "too many fields": (made(data=ng(DNG, NNG, b"")), "malformed_list"),
    "wrong number in a format": (made("d-ng|n-ng|iuid", ng(DNG, NNG)), "malformed_list"),
    "16 fields": (made("new", ng(*[b"x"] * 16)), "malformed_list"),
    "ima n_len": (made("ima", bytes(20) + words(256) + b"x" * 256), "malformed_list"),
    "digest": (made(digest=b"\x01" * 20), "digest_mismatch"),
    "digest of ima": (made("ima", bytes(20) + words(1) + b"x", b"\x01" * 20), "digest_mismatch"),
    "digest of an unknown template": (made("new", digest=b"\x01" * 20), "digest_mismatch"),
    "violation with a digest": (made(digest=bytes(20)), "malformed_list"),
    "violation with a d": (made("ima", b"\1" * 20 + words(1) + b"x", bytes(20)), "malformed_list"),
    "violation with a d-ngv2": (made("ima-ngv2", ng(b"ima:" + DNG, NNG), bytes(20)), "malformed_list"),
    "violation without an algorithm": (made(data=ng(bytes(32), NNG), digest=bytes(20)), "malformed_list"),
    "big-endian": (ml.encode(10, "ima-ng", [DNG, NNG], BIG), "wrong_byte_order"),
}


@pytest.mark.parametrize("kind", BAD)
def test_every_error_says_where(kind: str) -> None:
    bad, reason = BAD[kind]
    records = []
    with pytest.raises(ListError) as caught:
        for record in ml.read(io.BytesIO(GOOD + bad + GOOD).read, LITTLE, first_index=40, first_offset=1000):
            records.append(record)
    assert [(record.index, record.offset, record.raw) for record in records] == [(40, 1000, GOOD)]
    details = caught.value.details
    assert (caught.value.reason, details["index"], details["offset"]) == (reason, 41, 1000 + len(GOOD))
    assert f"record 41 at byte {1000 + len(GOOD)}" in str(caught.value)


def test_a_bad_field_is_named() -> None:
    with pytest.raises(ListError) as caught:
        parse(GOOD + made(data=words(40) + DNG + words(99) + NNG))
    assert (caught.value.details["field"], caught.value.details["field_offset"]) == (1, len(GOOD) + 38 + 44)


@pytest.mark.parametrize("cut", range(1, len(GOOD)))
def test_a_cut_anywhere(cut: int) -> None:
    with pytest.raises(ListError) as caught:
        parse(GOOD + GOOD[:cut])
    details = caught.value.details
    assert (caught.value.reason, details["index"], details["offset"]) == ("truncated", 1, len(GOOD))


def test_verify_false_only_walks() -> None:
    assert len(parse(GOOD + made(digest=b"\x01" * 20) + GOOD, verify=False)) == 3


@pytest.mark.parametrize("size", [32, 48, 64])
@pytest.mark.parametrize("order", ["little", "big"])
def test_padded_digest_is_accepted(size: int, order: str) -> None:
    data = ml.template_data("ima-ng", [DNG, NNG], order)
    digest = ml.template_digest("sha1", "ima-ng", data).ljust(size, b"\0")
    raw = ml._raw(10, digest, "ima-ng", data, order)
    [record] = parse(raw, ml.Layout(size, order))
    assert record.digest == digest and not record.violation
    assert ml.detect(raw) == ml.Layout(size, order)
    assert parse_ascii(ml.to_ascii(record, order), byte_order=order) == [record]


def test_a_newer_template_is_read_but_not_shown() -> None:
    [record] = parse(made("ima-ngv9"))
    assert (record.template, ml.fields(record, "little")) == ("ima-ngv9", [DNG, NNG])
    assert ml.event_name(record, "little") == b"" and ml.file_digest(record, "little") == ("", b"")
    with pytest.raises(ListError) as caught:
        ml.to_ascii(record, "little")
    assert (caught.value.reason, caught.value.details["template"]) == ("unknown_template", "ima-ngv9")


def test_a_digest_field_that_cannot_be_shown() -> None:
    [record] = parse(made(data=ng(b"no colon", NNG)))
    for use in (ml.to_ascii, ml.file_digest):
        with pytest.raises(ListError) as caught:
            use(record, "little")
        assert (caught.value.reason, caught.value.details["field"]) == ("malformed_list", 0)


def test_file_digest_kinds() -> None:
    def digest(template: str, value: bytes) -> tuple[str, bytes]:
        [record] = parse(ml.encode(10, template, [value, NNG], LITTLE))
        return ml.file_digest(record, "little")

    assert digest("ima-ng", DNG) == ("sha256", b"\x11" * 32)
    assert digest("ima-ngv2", b"ima:" + DNG) == ("sha256", b"\x11" * 32)
    assert digest("ima-ngv2", b"verity:" + DNG) == ("verity:sha256", b"\x11" * 32)
    assert digest("ima", b"\x22" * 20) == ("sha1", b"\x22" * 20)


@pytest.mark.parametrize("head, reason", [(b"", "empty_list"), (b"hello", "not_a_list"), (bytes(200), "not_a_list")])
def test_what_is_no_list(head: bytes, reason: str) -> None:
    with pytest.raises(ListError) as caught:
        ml.detect(head)
    assert (caught.value.reason, caught.value.details) == (reason, {"index": 0, "offset": 0})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_detects_violations_forgeries_and_long_records(layout: ml.Layout) -> None:
    violation = ml.encode(10, "ima-ng", [ZERO_DNG, NNG], layout, violation=True)
    long = ml.encode(10, "ima-buf", [DNG, NNG, b"x" * 70000], layout)
    forged = ml.encode(10, "ima-ng", [DNG, NNG], layout).replace(b"true", b"fals")
    legacy = ml.encode(10, "ima", [bytes(20), b"x"], layout, violation=True)
    for raw in (violation, violation * 20, long[:65536], forged, violation + forged, legacy):
        assert ml.detect(raw) == layout


def test_detects_by_digest_before_structure() -> None:
    # PCR 0 is 0 in either byte order, and the file digest looks like the rest of a little-endian SHA-384 record.
    fake = b"zz" + words(1) + b"x" + words(4, 0) + b"\x11" * 17
    raw = ml.encode(0, "ima-ng", [b"sha256:\0" + fake, NNG], BIG)
    assert next(ml.read(io.BytesIO(raw).read, ml.Layout(48, "little"), verify=False)).template == "x"
    assert ml.detect(raw) == BIG


def test_memory_is_bounded() -> None:
    piece = GOOD * (65536 // len(GOOD))
    left = [60]
    asked = []

    def source(size: int) -> bytes:
        asked.append(size)
        left[0] -= 1
        return piece[:size] if left[0] >= 0 else b""

    tracemalloc.start()
    count = sum(1 for _record in ml.read(source, LITTLE, verify=False))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 60 * (65536 // len(GOOD))
    assert peak < 1 << 20 and set(asked) == {65536}


def test_a_claimed_length_is_not_allocated() -> None:
    with pytest.raises(ListError) as caught:
        parse(GOOD[:34] + words(8 << 20) + GOOD[38:])
    assert caught.value.reason == "truncated"


# ---- ASCII ----------------------------------------------------------------------------------------------------------

LINE = ml.to_ascii(parse(GOOD)[0], "little")
SIG_LINE = ml.to_ascii(parse(made("ima-sig", ng(DNG, b"/a\n/b\0", b"\xab")))[0], "little")
UID_LINE = ml.to_ascii(parse(made("n-ng|iuid", ng(NNG, words(1000))))[0], "little")
VIOLATION_LINE = ml.to_ascii(parse(ml.encode(10, "ima-ng", [ZERO_DNG, NNG], LITTLE, violation=True))[0], "little")
UNKNOWN_LINE = LINE.replace(b"ima-ng", b"ima-ng9")
DIGEST = LINE.split(b" ")[1]

BAD_LINES: dict[str, tuple[bytes, str]] = {
    "upper-case template digest": (LINE.replace(DIGEST, DIGEST.upper()), "malformed_list"),
    "upper-case signature": (SIG_LINE.replace(b" ab\n", b" AB\n"), "malformed_list"),
    "upper-case file digest": (LINE.replace(b"11" * 32, b"AA" * 32), "malformed_list"),
    "PCR": (b"24" + LINE[2:], "malformed_list"),
    "length of the digest": (LINE.replace(DIGEST, DIGEST[:-2]), "malformed_list"),
    "no record": (b"hello\n", "malformed_list"),
    "empty line": (b"\n", "malformed_list"),
    "unknown template": (UNKNOWN_LINE, "unknown_template"),
    "too many fields": (LINE[:-1] + b" x\n", "malformed_list"),
    "too few fields": (LINE.replace(b" /usr/bin/true", b""), "malformed_list"),
    "NUL": (LINE.replace(b"true", b"tr\0e"), "malformed_list"),
    "another path": (LINE.replace(b"true", b"fals"), "digest_mismatch"),
    "another uid": (UID_LINE.replace(b" 1000", b" 1001"), "digest_mismatch"),
    "uid too large": (UID_LINE.replace(b" 1000", b" 4294967296"), "malformed_list"),
    "uid not plain": (UID_LINE.replace(b" 1000", b" +1000"), "malformed_list"),
    "uid endless": (UID_LINE.replace(b" 1000", b" " + b"9" * 100000), "malformed_list"),
    "violation with a digest": (LINE.replace(DIGEST, b"0" * 40), "malformed_list"),
    "long d of ima": (b"10 " + DIGEST + b" ima " + b"00" * 21 + b" x\n", "malformed_list"),
    "long n of ima": (b"10 " + DIGEST + b" ima " + b"00" * 20 + b" " + b"x" * 256 + b"\n", "malformed_list"),
    "cut": (LINE[:-1], "truncated"),
    "cut in the head": (LINE[:60], "truncated"),
    "more lines than a path can have": (LINE.replace(b"true", b"fals") + b"\n" * 70000, "digest_mismatch"),
    "endless path": (LINE.replace(b"true", b"fals") + b"xxxxxxx\n" * 9000, "digest_mismatch"),
    "endless violation": (VIOLATION_LINE + b"xxxxxxx\n" * 9000, "malformed_list"),
}


@pytest.mark.parametrize("tail", [b"", LINE + SIG_LINE], ids=["last", "middle"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_every_ascii_error_says_where(kind: str, tail: bytes) -> None:
    bad, reason = BAD_LINES[kind]
    text = LINE + bad + (tail if bad.endswith(b"\n") else b"")
    records = []
    with pytest.raises(ListError) as caught:
        for record in ml.read_ascii(io.BytesIO(text).read, first_index=7, byte_order="little"):
            records.append(record)
    assert [(record.index, record.offset) for record in records] == [(7, 0)]
    assert (caught.value.reason, caught.value.details["index"]) == (reason, 8)
    assert caught.value.details["offset"] == len(LINE)


def test_newlines_in_paths() -> None:
    look_alike = b"/x\n" + LINE.replace(b" ", b"_") + b"10_\n\0"
    raw = b"".join(
        (
            GOOD,
            ml.encode(10, "ima-sig", [ZERO_DNG, b"\n/a\n\nb\n\0", b""], LITTLE, violation=True),
            ml.encode(10, "ima-ng", [DNG, look_alike], LITTLE),
            ml.encode(10, "ima-sig", [DNG, look_alike, b"\x03\x02"], LITTLE),
            ml.encode(10, "ima-ng", [ZERO_DNG, b"/tail\n\0"], LITTLE, violation=True),
        )
    )
    text = b"".join(ml.to_ascii(record, "little") for record in parse(raw))
    assert b"".join(record.raw for record in parse_ascii(text)) == raw


@pytest.mark.parametrize("path, fine", [(b"\n" * 4096, True), (b"\n" * 4097, False), (b"\n" + b"x" * 65536, False)])
@pytest.mark.parametrize("violation", [True, False])
def test_joining_is_bounded(path: bytes, fine: bool, violation: bool) -> None:
    values = [ZERO_DNG if violation else DNG, path + b"\0"]
    records = parse(ml.encode(10, "ima-ng", values, LITTLE, violation=violation))
    text = ml.to_ascii(records[0], "little")
    if fine:
        assert parse_ascii(text) == records
        return
    with pytest.raises(ListError) as caught:
        parse_ascii(text)
    assert caught.value.reason == ("malformed_list" if violation else "digest_mismatch")


def test_the_first_record_that_tells_binds_the_byte_order() -> None:
    big = ml.to_ascii(parse(ml.encode(10, "ima-ng", [DNG, NNG], BIG), BIG)[0], "big")
    assert [record.raw for record in parse_ascii(big)] == [ml.encode(10, "ima-ng", [DNG, NNG], BIG)]
    for text in (LINE + big, big + LINE):
        with pytest.raises(ListError) as caught:
            parse_ascii(text)
        assert (caught.value.reason, caught.value.details["index"]) == ("digest_mismatch", 1)


# ---- properties -----------------------------------------------------------------------------------------------------


def any_fields(template: str) -> st.SearchStrategy[list[bytes]]:
    if template == "ima":
        return st.tuples(st.binary(min_size=20, max_size=20), st.binary(max_size=255)).map(list)
    count = len(ml.field_ids(template) or (1, 2))
    return st.lists(st.binary(max_size=300), min_size=count, max_size=count)


def shown(name: str, template: str, order: str) -> st.SearchStrategy[bytes]:
    """Field bytes as a kernel makes them."""
    text = st.binary(max_size=60).map(lambda raw: raw.replace(b"\0", b"\n").replace(b" ", b"_"))
    if name in ("n", "n-ng"):
        return text if template == "ima" else text.map(lambda raw: raw + b"\0")
    if name == "xattrnames":
        return text.map(lambda raw: raw + b"\0" if raw else raw)
    if name in ("iuid", "igid", "imode"):
        size: int = 2 if name == "imode" else 4
        return st.binary(min_size=size, max_size=size)
    if name in ("d-ng", "d-ngv2", "d-modsig"):
        algos = st.sampled_from([b"sha1:\0", b"sha512:\0", b"ima:sm3-256:\0", b"verity:sha256:\0", b":\0"])
        return st.tuples(algos, st.binary(min_size=1, max_size=64)).map(b"".join)
    return st.binary(min_size=20, max_size=20) if name == "d" else st.binary(max_size=60)


any_layout = st.sampled_from(LAYOUTS)
any_sizes = st.lists(st.integers(1, 200), min_size=1, max_size=5)


@quick
@given(st.data(), any_layout, any_sizes)
@pytest.mark.parametrize("template", [*TEMPLATES, "ima-future"])
def test_encode_read_round_trip(template: str, data: st.DataObject, layout: ml.Layout, sizes: list[int]) -> None:
    wanted = data.draw(st.lists(st.tuples(st.integers(0, 23), any_fields(template)), max_size=4))
    raw = b"".join(ml.encode(pcr, template, values, layout) for pcr, values in wanted)
    records = list(ml.read(chunks(raw, *sizes), layout))
    assert [(record.pcr, ml.fields(record, layout.byte_order)) for record in records] == wanted
    assert b"".join(record.raw for record in records) == raw
    assert all(record.template == template for record in records)
    assert b"".join(ml.convert(record, layout.byte_order, layout.digest_size) for record in records) == raw
    if raw:
        assert ml.detect(raw) == layout


@quick
@given(st.data(), any_layout, st.booleans())
@pytest.mark.parametrize("template", TEMPLATES)
def test_ascii_round_trip(template: str, data: st.DataObject, layout: ml.Layout, lead: bool) -> None:
    order = layout.byte_order
    names = ml.field_ids(template) or ()
    lists = data.draw(st.lists(st.tuples(*[shown(name, template, order) for name in names]), max_size=4))
    raw = b"".join(ml.encode(10, template, list(values), layout) for values in lists)
    # The violation comes last: before the first verified record nothing tells the byte order.
    raw += ml.encode(9, "ima-ng", [ZERO_DNG, NNG], layout, violation=True) if lead else b""
    records = parse(raw, layout)
    text = b"".join(ml.to_ascii(record, order) for record in records)
    assert [record.raw for record in parse_ascii(text, byte_order=order)] == [record.raw for record in records]


KINDS = (CAPTURES / "fixtures" / "k7.3.4.A.binary_sha1").read_bytes()
KINDS_RECORDS = parse(KINDS)
KINDS_VALUES = _pcr.Replay(list(_pcr.BANKS)).run(KINDS_RECORDS).values()
KINDS_ASCII = b"".join(ml.to_ascii(record, "little") for record in KINDS_RECORDS)


def unprotected(position: int) -> str:
    """Which bytes of a list no PCR covers: the names of templates, and all of a violation but PCR and digest."""
    [record] = [each for each in KINDS_RECORDS if each.offset <= position < each.offset + len(each.raw)]
    at = position - record.offset
    if 28 <= at < 28 + len(record.template):
        return "name"
    return "violation" if record.violation and at >= 28 else ""


def check_change(position: int, byte: int) -> None:
    raw = KINDS[:position] + bytes([byte]) + KINDS[position + 1 :]
    try:
        records = parse(raw)
    except ListError:
        return
    if _pcr.Replay(list(_pcr.BANKS)).run(records).values() != KINDS_VALUES:
        return
    kind = unprotected(position)
    assert kind
    if kind == "name":
        # A name is in no digest: it is no template that is known, and does not pass as one.
        with pytest.raises(ListError):
            [ml.to_ascii(record, "little") for record in records]


@pytest.mark.parametrize("flip", [0x01, 0x80])
def test_every_changed_byte_is_noticed(flip: int) -> None:
    for position, byte in enumerate(KINDS):
        check_change(position, byte ^ flip)


@settings(deadline=None, max_examples=400)
@given(st.integers(0, len(KINDS) - 1), st.integers(1, 255))
def test_any_change_of_a_byte_is_noticed(position: int, flip: int) -> None:
    check_change(position, KINDS[position] ^ flip)


def test_every_cut_is_noticed() -> None:
    ends = {record.offset + len(record.raw) for record in KINDS_RECORDS} | {0}
    for cut in range(len(KINDS)):
        if cut in ends:
            assert _pcr.Replay(["sha1"]).run(parse(KINDS[:cut])).values() != KINDS_VALUES
            continue
        with pytest.raises(ListError) as caught:
            parse(KINDS[:cut])
        assert caught.value.reason == "truncated"


def only_list_errors(raw: bytes) -> None:
    for layout in LAYOUTS:
        for verify in (True, False):
            try:
                for record in ml.read(io.BytesIO(raw).read, layout, verify=verify):
                    ml.event_name(record, layout.byte_order)
                    ml.file_digest(record, layout.byte_order)
                    ml.to_ascii(record, layout.byte_order)
            except ListError as error:
                assert {"index", "offset"} <= set(error.details)
    for use in (parse_ascii, ml.detect):
        try:
            use(raw)
        except ListError as error:
            assert {"index", "offset"} <= set(error.details)


@settings(deadline=None, max_examples=150)
@given(st.binary(max_size=400))
def test_garbage_gives_list_errors_only(raw: bytes) -> None:
    only_list_errors(raw)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from([KINDS[:1500], KINDS_ASCII[:2500]]), st.data())
def test_mangled_lists_give_list_errors_only(raw: bytes, data: st.DataObject) -> None:
    for _turn in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(start, min(len(raw), start + 50)))
        raw = raw[:start] + data.draw(st.binary(max_size=20)) + raw[end:]
    only_list_errors(raw)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, len(KINDS_ASCII) - 1), st.integers(0, 255))
def test_any_changed_byte_of_ascii_is_an_error_or_shown(position: int, byte: int) -> None:
    text = KINDS_ASCII[:position] + bytes([byte]) + KINDS_ASCII[position + 1 :]
    try:
        records = parse_ascii(text)
    except ListError:
        return
    # What was read is what stands there: the same bytes come out again.
    assert b"".join(ml.to_ascii(record, "little") for record in records) == text
