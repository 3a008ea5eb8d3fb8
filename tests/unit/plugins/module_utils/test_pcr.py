# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Replays: the lists of real kernels against the PCRs of their TPMs, and by hand."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import lzma
import re
import typing as t
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils import _pcr
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, ListError

CAPTURES = Path(__file__).resolve().parents[3] / "fixtures" / "captures"
LITTLE = ml.Layout(20, "little")
NAME = "binary_runtime_measurements"


def parse(raw: bytes, size: int = 20) -> t.Iterator[ml.Record]:
    return ml.read(io.BytesIO(raw).read, ml.Layout(size, "little"))


def turned(told: dict[str, dict[str, str]]) -> _pcr.Values:
    """``{bank: {pcr: hex}}`` as the captures have it, as ``Values``."""
    return {pcr: {bank: told[bank][pcr] for bank in told} for pcr in next(iter(told.values()), {})}


def some(values: _pcr.Values, pcrs: t.Iterable[str], banks: t.Iterable[str]) -> _pcr.Values:
    return {pcr: {bank: values[pcr][bank] for bank in banks} for pcr in pcrs}


def whole_list(directory: Path, suffix: str) -> bytes:
    """All records since boot: trimmed, staged and live."""
    parts = [directory / "trimmed-prefix.bin"] if suffix in ("", "_sha1") else []
    parts += [directory / f"{NAME}{suffix}_staged", directory / f"{NAME}{suffix}"]
    return b"".join(part.read_bytes() for part in parts if part.exists())


def _lists() -> list[tuple[str, str]]:
    """Directory and bank suffix of each list whose replay the TPM can confirm."""
    found = []
    for meta in sorted(CAPTURES.glob("kernel-lab/*/meta.json")):
        for path in sorted(meta.parent.glob(f"{NAME}*")):
            suffix = path.name[len(NAME) :]
            trimmed = (meta.parent / "trimmed-prefix.bin").exists() and suffix != "_sha1"
            if json.loads(meta.read_text())["pcrs"] and not suffix.endswith("_staged") and not trimmed:
                found.append((meta.parent.name, suffix))
    return found


LISTS = _lists()
REPLAYING = [pair for pair in LISTS if pair[0] != "lab7.3-kexec-1-after"]


def load(name: str, suffix: str) -> tuple[list[ml.Record], int, _pcr.Values, list[str]]:
    """Records, digest size of the list, the TPM's values, its banks."""
    directory = CAPTURES / "kernel-lab" / name
    told = json.loads((directory / "meta.json").read_text())["pcrs"]
    size = _pcr.BANKS[suffix[1:]] if suffix else 20
    return list(parse(whole_list(directory, suffix), size)), size, turned(told), list(told)


# ---- real lists -----------------------------------------------------------------------------------------------------


def test_there_are_lists_of_every_kind() -> None:
    assert len(REPLAYING) >= 20 and len(LISTS) > len(REPLAYING)
    assert {suffix for name_, suffix in REPLAYING} == {"", "_sha1", "_sha256", "_sha384"}


@pytest.mark.parametrize("name, suffix", REPLAYING)
def test_replays_to_the_tpm(name: str, suffix: str) -> None:
    records, size, told, banks = load(name, suffix)
    replay = _pcr.Replay(banks, digest_size=size).run(records)
    pcrs = sorted({str(record.pcr) for record in records})
    assert replay.values() == some(told, pcrs, banks)
    assert (replay.records, replay.violations) == (len(records), sum(record.violation for record in records))


@pytest.mark.parametrize("name, suffix", REPLAYING)
def test_search_finds_the_end(name: str, suffix: str) -> None:
    records, size, told, banks = load(name, suffix)
    pcrs = sorted({str(record.pcr) for record in records})
    expect = some(told, pcrs, banks)
    match = _pcr.search(iter(records), banks, None, expect, digest_size=size)
    assert match == (len(records), sum(record.violation for record in records), expect, len(records), [])


@pytest.mark.parametrize("suffix", ["_sha1", "_sha256"])
def test_kexec_without_the_list_does_not_replay(suffix: str) -> None:
    records, size, told, banks = load("lab7.3-kexec-1-after", suffix)
    assert _pcr.Replay(banks, digest_size=size).run(records).values()["10"] != told["10"]
    for bank in banks:
        match = _pcr.search(records, banks, None, some(told, ["10"], [bank]), digest_size=size)
        assert match.reached_at is None


@pytest.mark.parametrize("parts", [[NAME + "_sha1_staged"], [NAME + "_sha1"], ["both, live first"]])
def test_staged_and_live_replay_only_together_and_in_order(parts: list[str]) -> None:
    directory = CAPTURES / "kernel-lab" / "lab7.3-stage-1-staged"
    names = parts if parts[0].startswith(NAME) else [NAME + "_sha1", NAME + "_sha1_staged"]
    records = list(itertools.chain.from_iterable(parse((directory / name).read_bytes()) for name in names))
    told = turned(json.loads((directory / "meta.json").read_text())["pcrs"])
    assert _pcr.search(records, ["sha1"], None, {"10": told["10"]}).reached_at is None


def test_a_trimmed_list_needs_what_was_trimmed() -> None:
    directory = CAPTURES / "kernel-lab" / "7.3-trim-1-after40"
    told = turned(json.loads((directory / "meta.json").read_text())["pcrs"])
    prefix = _pcr.Replay(["sha1", "sha256"]).run(parse((directory / "trimmed-prefix.bin").read_bytes()))
    assert prefix.records == 40
    for bank, size in (("sha1", 20), ("sha256", 32)):
        live = (directory / f"{NAME}_{bank}").read_bytes()
        alone = _pcr.search(parse(live, size), ["sha256"], None, {"10": told["10"]}, digest_size=size)
        match = _pcr.search(parse(live, size), ["sha256"], prefix.values(), {"10": told["10"]}, digest_size=size)
        assert (alone.reached_at, match.reached_at, match.pcrs["10"]) == (None, 95, {**told["10"]})


def _stages() -> list[tuple[str, str, str]]:
    found = []
    for path in sorted(CAPTURES.glob("fixtures/*.binary_*")):
        kernel, stage, bank = re.fullmatch(r"(.*)\.(.)\.binary_(.*)", path.name).groups()  # type: ignore[union-attr]
        found.append((kernel, stage, bank))
    return found


@pytest.mark.parametrize("kernel, stage, bank", _stages())
def test_every_stage(kernel: str, stage: str, bank: str) -> None:
    told = json.loads((CAPTURES / "fixtures" / f"{kernel}.pcrs.json").read_text())
    banks = ["sha1", "sha256", "sha384"]
    records = list(parse((CAPTURES / "fixtures" / f"{kernel}.{stage}.binary_{bank}").read_bytes(), _pcr.BANKS[bank]))
    after = turned({each: told[stage][each] for each in banks})
    trimmed = kernel == "k7.3.4" and stage in "CE"
    start = turned({each: told["A"][each] for each in banks}) if trimmed else None
    match = _pcr.search(records, banks, start, some(after, ["10", "11"], banks), digest_size=_pcr.BANKS[bank])
    padded = ["sha384"] if kernel == "k6.1.192" else []
    assert (match.reached_at, match.padded) == (len(records), padded)
    assert some(match.pcrs, ["10", "11"], banks) == some(after, ["10", "11"], banks)
    if not trimmed:
        assert (match.records, match.violations) == (told[stage]["count"], told[stage]["violations"])
    replay = _pcr.Replay(banks, start, padded=padded, digest_size=_pcr.BANKS[bank]).run(records)
    assert replay.values() == match.pcrs
    told_so = _pcr.search(records, banks, start, match.pcrs, digest_size=_pcr.BANKS[bank], padded=padded)
    assert told_so == match


def test_the_other_mode_does_not_hold() -> None:
    told = json.loads((CAPTURES / "fixtures" / "k6.1.192.pcrs.json").read_text())["A"]
    raw = (CAPTURES / "fixtures" / "k6.1.192.A.binary_sha1").read_bytes()
    expect = {"10": {"sha384": told["sha384"]["10"]}}
    assert _pcr.search(parse(raw), ["sha384"], None, expect, padded=[]).reached_at is None
    assert _pcr.search(parse(raw), ["sha384"], None, expect, padded=["sha384"]).reached_at == 25
    expect = {"10": {"sha256": told["sha256"]["10"]}}
    assert _pcr.search(parse(raw), ["sha256"], None, expect, padded=["sha256"]).reached_at is None


def test_a_long_list() -> None:
    told = json.loads((CAPTURES / "big" / "6.1-ima-ng-60k.meta.json").read_text())
    with lzma.open(CAPTURES / "big" / "6.1-ima-ng-60k.binary.xz") as stream:
        match = _pcr.search(ml.read(stream.read, LITTLE), ["sha1"], None, {"10": turned(told["pcrs"])["10"]})
    assert (match.records, match.reached_at, match.padded) == (told["count"], told["count"], [])
    assert match.pcrs["10"] == turned(told["pcrs"])["10"]


# ---- by hand --------------------------------------------------------------------------------------------------------


def record(
    number: int = 0, pcr: int = 10, size: int = 20, template: str = "ima-ng", violation: bool = False
) -> ml.Record:
    value = bytes([number]) * 20
    values = [value, b"x"] if template == "ima" else [b"sha1:\0" + (bytes(20) if violation else value), b"/x\0"]
    if violation and template == "ima":
        values[0] = bytes(20)
    return next(parse(ml.encode(pcr, template, values, ml.Layout(size, "little"), violation=violation), size))


def extended(bank: str, *values: bytes, start: bytes = b"") -> str:
    pcr = start or bytes(_pcr.BANKS[bank])
    for value in values:
        pcr = getattr(hashlib, bank)(pcr + value).digest()
    return pcr.hex()


@pytest.mark.parametrize("size", _pcr.BANKS.values())
@pytest.mark.parametrize("template", ["ima", "ima-ng"])
@pytest.mark.parametrize("bank", _pcr.BANKS)
@pytest.mark.parametrize("padded", [False, True])
def test_extends_as_the_kernel_does(size: int, template: str, bank: str, padded: bool) -> None:
    records = [
        record(1, 10, size, template),
        record(2, 10, size, template, violation=True),
        record(3, 4, size, template),
    ]

    def value(each: ml.Record) -> bytes:
        if each.violation:
            return b"\xff" * _pcr.BANKS[bank]
        source = "sha1" if padded else bank
        return ml.template_digest(source, template, each.data).ljust(_pcr.BANKS[bank], b"\0")

    replay = _pcr.Replay([bank], padded=[bank] if padded else [], digest_size=size)
    for each in records:
        replay.extend(each)
    assert replay.values() == {
        "4": {bank: extended(bank, value(records[2]))},
        "10": {bank: extended(bank, value(records[0]), value(records[1]))},
    }
    assert (replay.records, replay.violations) == (3, 1)


def test_starts_where_it_is_told() -> None:
    start = {"10": {"sha1": "11" * 20}, "17": {"sha256": "ff" * 32}}
    replay = _pcr.Replay(["sha1", "sha256"], start)
    assert replay.values() == {
        "10": {"sha1": "11" * 20, "sha256": "00" * 32},
        "17": {"sha1": "00" * 20, "sha256": "ff" * 32},
    }
    first = record(1)
    values = replay.run([first]).values()
    assert values["10"]["sha1"] == extended("sha1", first.digest, start=b"\x11" * 20)
    assert list(values) == ["10", "17"]


def test_a_list_of_another_bank_is_not_mistaken() -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        _pcr.Replay(["sha1"]).extend(record(1, size=32))


def test_counts_what_came_before_an_error() -> None:
    good = record(1).raw
    replay = _pcr.Replay(["sha1"])
    with pytest.raises(ListError):
        replay.run(parse(good + good + b"cut"))
    assert replay.records == 2
    assert replay.values() == _pcr.Replay(["sha1"]).run([record(1), record(1)]).values()


def test_the_whole_list_is_read_behind_the_match() -> None:
    good = record(1).raw
    expect = _pcr.Replay(["sha1"]).run([record(1)]).values()
    assert _pcr.search(parse(good * 3), ["sha1"], None, expect)[:1] == (3,)
    with pytest.raises(ListError) as caught:
        _pcr.search(parse(good + good + b"cut"), ["sha1"], None, expect)
    assert caught.value.details["index"] == 2


def states(records: list[ml.Record], banks: list[str], **options: t.Any) -> list[_pcr.Values]:
    """The values after 0, 1, 2, ... records."""
    replay = _pcr.Replay(banks, {"10": {}, "11": {}}, **options)
    return [replay.values()] + [_extended(replay, each).values() for each in records]


def _extended(replay: _pcr.Replay, each: ml.Record) -> _pcr.Replay:
    replay.extend(each)
    return replay


MIXED = [record(1), record(2, 11), record(3), record(0, violation=True), record(4, 11), record(5), record(6)]


@pytest.mark.parametrize("padded", [[], ["sha256"], ["sha256", "sha384"]])
@pytest.mark.parametrize("reached", range(1, len(MIXED) + 1))
def test_search_finds_every_place_in_every_mode(reached: int, padded: list[str]) -> None:
    banks = ["sha1", "sha256", "sha384"]
    expect = states(MIXED, banks, padded=padded)[reached]
    match = _pcr.search(iter(MIXED), banks, None, expect)
    assert (match.records, match.reached_at) == (len(MIXED), reached)
    assert match.padded == padded
    assert match.pcrs == states(MIXED, banks, padded=padded)[-1]


def test_search_takes_the_smallest_number() -> None:
    # PCR 11 alone is there after 2 records, and stays for a while.
    expect = {"11": {"sha1": states(MIXED, ["sha1"])[3]["11"]["sha1"]}}
    assert _pcr.search(MIXED, ["sha1"], None, expect).reached_at == 2
    both = states(MIXED, ["sha1"])[3]
    assert _pcr.search(MIXED, ["sha1"], None, both).reached_at == 3


def test_search_before_the_first_record() -> None:
    start = {"10": {"sha1": "22" * 20}}
    assert _pcr.search(MIXED, ["sha1"], start, start).reached_at == 0
    assert _pcr.search([], ["sha1"], None, {"10": {"sha256": "00" * 32}}) == (
        0,
        0,
        {"10": {"sha1": "00" * 20, "sha256": "00" * 32}},
        0,
        [],
    )


@pytest.mark.parametrize("expect", [None, {}, {"10": {}}])
def test_nothing_expected_is_nothing_reached(expect: _pcr.Values | None) -> None:
    match = _pcr.search(MIXED, ["sha1"], None, expect)
    assert (match.records, match.violations, match.reached_at, match.padded) == (7, 1, None, [])
    assert match.pcrs == states(MIXED, ["sha1"])[-1]


def test_values_of_different_times_do_not_hold_at_once() -> None:
    early, late = states(MIXED, ["sha1"])[1], states(MIXED, ["sha1"])[5]
    assert _pcr.search(MIXED, ["sha1"], None, {"10": early["10"], "11": late["11"]}).reached_at is None


def test_every_bank_must_hold() -> None:
    banks = ["sha1", "sha256"]
    early, late = states(MIXED, banks)[1]["10"], states(MIXED, banks)[-1]["10"]
    assert _pcr.search(MIXED, banks, None, {"10": {**early, "sha256": late["sha256"]}}).reached_at is None
    assert _pcr.search(MIXED, banks, None, {"10": {**early, "sha512": "11" * 64}}).reached_at is None


def test_one_mode_for_all_pcrs_of_a_bank() -> None:
    plain = states(MIXED, ["sha256"])[5]
    padded = states(MIXED, ["sha256"], padded=["sha256"])[5]
    mixed = {"10": plain["10"], "11": padded["11"]}
    match = _pcr.search(MIXED, ["sha256"], None, mixed)
    assert (match.reached_at, match.padded) == (None, [])
    assert _pcr.search(MIXED, ["sha256"], None, padded).reached_at == 5


def test_an_expected_value_in_the_wrong_place() -> None:
    last = states(MIXED, ["sha1"])[-1]
    crossed = {"10": last["11"], "11": last["10"]}
    assert _pcr.search(MIXED, ["sha1"], None, crossed).reached_at is None


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(10, 11), st.booleans()), max_size=8),
    st.sampled_from([[], ["sha256"]]),
    st.data(),
)
def test_search_is_a_replay(kinds: list[tuple[int, int, bool]], padded: list[str], data: st.DataObject) -> None:
    records = [record(number, pcr, violation=violation) for number, pcr, violation in kinds]
    seen = states(records, ["sha1", "sha256"], padded=padded)
    expect = seen[data.draw(st.integers(0, len(records)))]
    match = _pcr.search(records, ["sha1", "sha256"], None, expect)
    assert match.reached_at == seen.index(expect)
    assert match.records == len(records)


# ---- values from outside --------------------------------------------------------------------------------------------


def test_values_are_normalised() -> None:
    given_ = {11: {"sha1": "0x" + "AB" * 20}, "2": {"sha256": "00" * 32, "sha1": "0X" + "cd" * 20}, "23": {}}
    parsed = _pcr.parse_values(given_, "start")
    assert parsed == {
        "2": {"sha256": "00" * 32, "sha1": "cd" * 20},
        "11": {"sha1": "ab" * 20},
        "23": {},
    }
    assert list(parsed) == ["2", "11", "23"]
    assert _pcr.parse_values(parsed, "start") == parsed
    assert _pcr.parse_values({}, "start") == {}


@pytest.mark.parametrize(
    "values",
    [
        None,
        [],
        "10",
        {"24": {}},
        {"-1": {}},
        {24: {}},
        {-1: {}},
        {10**5000: {}},
        {"1" * 5000: {}},
        {"10": {10**5000: ""}},
        {"010": {}},
        {"1_0": {}},
        {" 10": {}},
        {"\u0661": {}},
        {True: {}},
        {10.0: {}},
        {None: {}},
        {"10": {}, 10: {}},
        {"10": None},
        {"10": "ab"},
        {"10": {"md5": "00" * 16}},
        {"10": {"SHA1": "00" * 20}},
        {"10": {1: "00" * 20}},
        {"10": {"sha1": None}},
        {"10": {"sha1": 0}},
        {"10": {"sha1": b"00" * 20}},
        {"10": {"sha1": ""}},
        {"10": {"sha1": "00" * 32}},
        {"10": {"sha256": "00" * 20}},
        {"10": {"sha1": "0x" + "00" * 19}},
        {"10": {"sha1": "0g" * 20}},
        {"10": {"sha1": " 0" * 20}},
        {"10": {"sha1": "\u0660" * 40}},
        {"10": {"sha1": "\u017f" + "0" * 39}},
    ],
)
def test_bad_values_are_refused(values: t.Any) -> None:
    with pytest.raises(ImaError) as caught:
        _pcr.parse_values(values, "expected PCRs")
    assert caught.value.reason == "pcr_values"
    assert str(caught.value).startswith("expected PCRs: ")
    assert len(str(caught.value)) < 200


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=45) | st.binary(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["10", "sha1", "sha256"]) | st.integers(-1, 25), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None, max_examples=150)
@given(anything)
def test_any_values_are_parsed_or_refused(values: t.Any) -> None:
    try:
        parsed = _pcr.parse_values(values, "start")
    except ImaError as error:
        assert error.reason == "pcr_values"
    else:
        _pcr.Replay(list(_pcr.BANKS), parsed).values()
