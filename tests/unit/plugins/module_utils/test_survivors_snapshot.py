# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The cycle, where the mutation check found that no other test looks (tests/mutation)."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _snapshot, _tpm
from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils._pcr import Values
from ansible_collections.integrity.ima.plugins.module_utils._schema import MANIFEST, QUOTE, canonical
from ansible_collections.integrity.ima.plugins.module_utils._schema import parse as parse_document
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import Cycle
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._tpm import TpmError
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import (
    Host,
    oracle,
    parse,
    reason_of,
    replayed,
)

BANKS = ["sha1", "sha256"]


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def manifests(host: Host) -> list[dict[str, t.Any]]:
    spool = Spool(host.spool)
    return [spool.manifest(entry) for entry in spool.entries]


def values_after(host: Host, count: int) -> Values:
    """The PCR values after that many records."""
    return replayed(b"".join(record.raw for record in parse(host.truth())[:count]), BANKS)


def recover(host: Host) -> None:
    host.locked(lambda cycle: cycle.spool.recover())


def observing(monkeypatch: pytest.MonkeyPatch, values: Values | None) -> None:
    monkeypatch.setattr(Cycle, "observe", lambda self: values)


def fault(boot_id: str, index: int, *, lost: bool = True, reason: str = "foreign_trim") -> dict[str, t.Any]:
    where = {"boot_id": boot_id, "found": boot_id, "index": index}
    return {"reason": reason, "lost": lost, "message": "it happened", **where}


# --- quotes -----------------------------------------------------------------------------------------------------------


class Tpm:
    """Quotes of the emulated PCRs, without a signature; the first ones are of values that have gone on since."""

    def __init__(self, host: Host, monkeypatch: pytest.MonkeyPatch, moving: int = 0) -> None:
        self.host, self.moving = host, moving
        self.calls: list[tuple[str, bytes, list[str], list[int]]] = []
        monkeypatch.setattr(_tpm, "quote", self.quote)

    def quote(self, handle: str, extra: bytes, banks: list[str], pcrs: list[int]) -> tuple[bytes, bytes]:
        self.calls.append((handle, extra, banks, pcrs))
        state = self.host.state()
        row = {str(pcr): {bank: _emulated._pcr_value(state, bank, pcr).hex() for bank in banks} for pcr in pcrs}
        if len(self.calls) <= self.moving:
            row["10"] = {bank: "11" * len(bytes.fromhex(value)) for bank, value in row["10"].items()}
        bits = sum(1 << pcr for pcr in pcrs).to_bytes(3, "little")
        algorithms = {"sha1": 0x0004, "sha256": 0x000B}
        attest = struct.pack(">IHHH", 0xFF544347, 0x8018, 0, len(extra)) + extra + bytes(17 + 8)
        attest += struct.pack(">I", len(banks)) + b"".join(struct.pack(">HB", algorithms[b], 3) + bits for b in banks)
        digest = _tpm.pcr_digest(row, [(bank, pcrs) for bank in banks], "sha256")
        return attest + struct.pack(">H", len(digest)) + digest, b"signature %d" % len(self.calls)


def test_a_quote_says_what_it_follows_and_what_it_covers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, nonce = Host(tmp_path, count=3), "ab" * 32
    assert reason_of(lambda: host.cycle().quote(nonce)).reason == "no_shard"
    _emulated.feed(host.kernel, records=[{"path": "/eleven", "content": "x", "pcr": 11}])
    host.export()
    tpm = Tpm(host, monkeypatch)
    monkeypatch.setattr(_snapshot, "utc_now", lambda: "2026-11-22T00:00:00Z")
    quote = host.cycle().quote(nonce)
    parse_document(canonical(quote), QUOTE, "the quote", TpmError)
    spool, state = Spool(host.spool), host.state()
    head = spool.entries[-1]
    extra = _tpm.qualifying_data(nonce, state.machine_id, state.boot_id, 1, spool.digest(head))
    ((handle, asked, banks, pcrs),) = tpm.calls
    assert (handle, asked, banks, pcrs) == ("0x81010a1a", extra, BANKS, list(range(12)))
    assert {
        key: quote[key] for key in ("version", "machine_id", "boot_id", "sequence", "manifest", "nonce", "time")
    } == {
        "version": 1,
        "machine_id": state.machine_id,
        "boot_id": state.boot_id,
        "sequence": 1,
        "manifest": spool.digest(head),
        "nonce": nonce,
        "time": "2026-11-22T00:00:00Z",
    }
    zeros = {"sha1": "00" * 20, "sha256": "00" * 32}
    assert quote["pcrs"] == dict({str(pcr): zeros for pcr in range(10)}, **state.pcrs)
    assert base64.b64decode(quote["signature"]) == b"signature 1"
    assert _tpm.parse_attest(base64.b64decode(quote["attest"])).extra == extra


def test_a_quote_is_made_again_while_the_pcrs_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, count=3)
    host.export()
    tpm = Tpm(host, monkeypatch, moving=19)
    quote = host.cycle().quote("ab" * 32)
    assert base64.b64decode(quote["signature"]) == b"signature 20" and len(tpm.calls) == 20
    assert [call[3] for call in tpm.calls] == [list(range(11))] * 20
    Tpm(host, monkeypatch, moving=20)
    assert reason_of(lambda: host.cycle().quote("ab" * 32)).reason == "pcrs_moving"


def test_a_pcr_that_cannot_be_read_has_no_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The quote covers it, so nothing is found that the TPM signed."""
    host = Host(tmp_path, count=3)
    host.export()
    Tpm(host, monkeypatch)
    real = _emulated.EmulatedFiles.pcr
    monkeypatch.setattr(
        _emulated.EmulatedFiles, "pcr", lambda self, bank, index: None if index == 9 else real(self, bank, index)
    )
    assert reason_of(lambda: host.cycle().quote("ab" * 32)).reason == "pcrs_moving"


# --- the TPM's values -------------------------------------------------------------------------------------------------


def reading(monkeypatch: pytest.MonkeyPatch, value: t.Callable[[int, str, int], bytes | None]) -> list[tuple[str, int]]:
    """Let ``value(how many were read before, bank, PCR)`` be what the TPM has; return what is read."""
    seen: list[tuple[str, int]] = []

    def pcr(self: t.Any, bank: str, index: int) -> bytes | None:
        seen.append((bank, index))
        return value(len(seen) - 1, bank, index)

    monkeypatch.setattr(_emulated.EmulatedFiles, "pcr", pcr)
    return seen


SIZES = {"sha1": 20, "sha256": 32}


def test_values_are_read_until_they_are_twice_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most twenty times more, and what is returned was read last."""
    cycle = Host(tmp_path, count=3).cycle()
    for still, expected in ((0, 1), (38, 20), (40, None)):
        # One value is asked for first: whether there is any; then two at a time.
        seen = reading(
            monkeypatch,
            lambda number, bank, index, still=still: bytes([1 + min((number + 1) // 2, still // 2 + 1)]) * SIZES[bank],
        )
        observed = cycle.observe()
        if expected is None:
            assert observed is None
        else:
            assert observed is not None and sorted(observed) == ["10"] and sorted(observed["10"]) == BANKS
        assert len(seen) == 1 + 2 + 2 * (expected or 20)


def test_a_tpm_that_ima_does_not_extend_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cycle = Host(tmp_path, count=3).cycle()
    reading(monkeypatch, lambda number, bank, index: bytes(SIZES[bank]))
    assert cycle.observe() is None
    reading(monkeypatch, lambda number, bank, index: bytes(20) if bank == "sha1" else b"\1" * 32)
    assert cycle.observe() == {"10": {"sha1": "00" * 20, "sha256": "01" * 32}}
    reading(monkeypatch, lambda number, bank, index: b"\1" * 20 if bank == "sha1" else None)
    assert cycle.observe() == {"10": {"sha1": "01" * 20}}
    assert Host(tmp_path / "none", count=3, banks=[]).cycle().observe() is None


def test_what_is_observed_is_what_the_newest_shard_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its PCRs, even those of the boot before; its banks in its own boot, all of them in the next."""
    host = Host(tmp_path, banks=["sha1", "sha256"])
    _emulated.feed(host.kernel, records=[{"path": "/eleven", "content": "x", "pcr": 11}])
    host.export()
    monkeypatch.setattr(_emulated.EmulatedFiles, "tpm_banks", lambda self: ["sha1", "sha256", "sha384"])
    reading(monkeypatch, lambda number, bank, index: b"\1" * {**SIZES, "sha384": 48}[bank])
    observed = host.cycle().observe()
    assert observed is not None
    assert {pcr: sorted(row) for pcr, row in observed.items()} == {"10": BANKS, "11": BANKS}
    host.reboot()
    observed = host.cycle().observe()
    assert observed is not None
    assert {pcr: sorted(row) for pcr, row in observed.items()} == dict.fromkeys(("10", "11"), [*BANKS, "sha384"])


@pytest.mark.parametrize(("reached", "shard"), [(0, 0), (3, 0), (7, 0), (8, 1), (14, 1), (15, 2), (21, 2), (None, 2)])
def test_the_observed_values_are_in_the_shard_in_which_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reached: int | None, shard: int
) -> None:
    host = Host(tmp_path, "delete_n", "never", count=20)
    zeros = {"10": {"sha1": "00" * 20, "sha256": "00" * 32}}
    values = (
        {"10": {"sha1": "11" * 20, "sha256": "11" * 32}} if reached is None else values_after(host, reached) or zeros
    )
    observing(monkeypatch, values)
    host.export()
    observed = [manifest["observed"] for manifest in manifests(host)]
    assert observed[shard] == {"pcrs": values, "index": reached}
    assert [each for number, each in enumerate(observed) if number != shard] == [None, None]


def test_a_piece_of_the_list_observes_nothing(tmp_path: Path) -> None:
    """What the TPM has may be reached behind it."""
    host = Host(tmp_path, "delete_n", "never", count=20)
    host.export(limit=2)
    assert [manifest["observed"] for manifest in manifests(host)] == [None, None]
    host.export()
    assert manifests(host)[2]["observed"] == {"pcrs": host.state().pcrs, "index": 21}


# --- what an export asks for ------------------------------------------------------------------------------------------


def test_an_export_asks_for_room_for_every_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, asked = Host(tmp_path, count=9), []
    monkeypatch.setattr(Spool, "require_room", lambda self, size: asked.append(size))
    host.run()
    host.export()
    assert asked == [64 * 10 + 2**20, 2**20]


def test_what_a_reboot_forgets_is_no_place_for_a_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated kernel's may lie anywhere."""
    host, asked = Host(tmp_path, count=1), []
    monkeypatch.setattr(_snapshot, "require_durable", asked.append)
    host.cycle()
    assert asked == []
    monkeypatch.setattr(_emulated.EmulatedFiles, "emulated", False)
    host.cycle()
    assert asked == [host.spool]


def test_a_manifest_names_as_many_anchors_as_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _snapshot.MOST_ANCHORS == MANIFEST["properties"]["anchors"]["maxItems"]
    for most in (2, 3, 4):
        host = Host(tmp_path / str(most))
        recover(host)
        for number in (1, 2, 3):
            path = Path(host.spool, "anchors", f"0000000{number}-0123456789abcdef.aggregate")
            path.write_text(str(number))
            _emulated.feed(host.kernel, records=[{"path": str(path), "content": str(number)}])
        monkeypatch.setattr(_snapshot, "MOST_ANCHORS", most)
        host.export()
        (manifest,) = manifests(host)
        assert [(each["index"], each["sequence"]) for each in manifest["anchors"]] == [(1, 1), (2, 2), (3, 3)][:most]


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_fault_is_noted_once_and_the_journal_stays_small(tmp_path: Path) -> None:
    host = Host(tmp_path, count=3)
    boot = host.state().boot_id
    faults = [fault(boot, number) for number in range(20)]

    def note(cycle: Cycle) -> None:
        for each in [faults[0], *faults]:
            cycle._note_fault(each)

    host.locked(note)
    assert Spool(host.spool).journal()["faults"] == faults[:16]


def test_a_manifest_has_room_for_one_fault_more(tmp_path: Path) -> None:
    """What the journal holds, and what is found now."""
    host = Host(tmp_path, count=3)
    other = "13b0692a-94e1-4061-890d-87c47d9ca675"
    faults = [fault(other, number) for number in range(16)]
    recover(host)
    host.locked(lambda cycle: cycle.spool.write_journal(faults=faults))
    host.export()
    assert manifests(host)[0]["faults"] == faults[:15]
    assert Spool(host.spool).journal()["faults"] == []


def test_only_a_loss_in_this_epoch_forbids_deleting(tmp_path: Path) -> None:
    host = Host(tmp_path, count=3)
    boot, other = host.state().boot_id, "13b0692a-94e1-4061-890d-87c47d9ca675"

    def blocked_by(*faults: dict[str, t.Any]) -> t.Any:
        host.locked(lambda cycle: cycle.spool.write_journal(faults=list(faults)))
        return host.cycle().blocked()

    recover(host)
    lost = fault(boot, 1)
    for _time in range(2):
        assert blocked_by() is None
        assert blocked_by(fault(boot, 1, lost=False), fault(other, 2)) is None
        assert blocked_by(fault(other, 2), lost) == lost
        blocked_by()
        host.export()
    blocked_by(lost)
    host.grow(1)
    host.export()
    assert Spool(host.spool).journal()["faults"] == [] and host.cycle().blocked() == lost
    error = reason_of(host.trim)
    assert (error.reason, error.details["index"], error.details["boot_id"]) == ("foreign_trim", 1, boot)
    host.kexec(True)
    assert host.cycle().blocked() is None, "not before it is known that the list was carried over"
    host.grow(1)
    host.export()
    assert host.cycle().blocked() == lost
    host.reboot()
    host.export()
    assert host.cycle().blocked() is None


# --- what errors tell -------------------------------------------------------------------------------------------------


def details(error: t.Any, *names: str) -> tuple[t.Any, ...]:
    return (error.reason, *(error.details.get(name) for name in names))


def test_the_place_of_each_refusal(tmp_path: Path) -> None:
    host = Host(tmp_path / "empty")
    boot = host.state().boot_id
    _emulated.foreign_trim(host.kernel, 1)
    assert details(reason_of(host.export), "index", "boot_id") == ("empty_list", 0, boot)

    host = Host(tmp_path / "ambiguous", "delete_n", "never", count=2, banks=[])
    boot = host.state().boot_id
    host.violation(6)
    host.export()
    host.journal(None)
    _emulated.foreign_trim(host.kernel, 5)
    host.violation(3)
    assert details(reason_of(host.export), "index", "boot_id") == ("ambiguous_base", 3, boot)

    host = Host(tmp_path / "trimmed", count=20)
    boot = host.state().boot_id
    host.export()
    _emulated.foreign_trim(host.kernel, 2)
    assert details(reason_of(host.trim), "index", "boot_id") == ("head_changed", 0, boot)
    host.run()
    host.grow(9)
    _emulated.foreign_trim(host.kernel, 3)
    assert details(reason_of(host.export), "index", "boot_id") == ("foreign_trim", 21, boot)

    host = Host(tmp_path / "staged", "staged", count=9)
    host.export()
    assert details(reason_of(lambda: host.trim(5)), "index") == ("staged_whole", 5)


def test_the_shard_that_a_store_and_a_spool_do_not_agree_about(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)

    def acknowledge(sequence: int, digest: str) -> t.Any:
        return reason_of(lambda: host.locked(lambda cycle: cycle.acknowledge(sequence, digest, "test")))

    assert details(acknowledge(1, "0" * 64), "sequence") == ("spool_behind_store", 1)
    host.export()
    assert details(acknowledge(3, "0" * 64), "sequence") == ("spool_behind_store", 3)
    assert details(acknowledge(1, "0" * 64), "sequence") == ("store_diverged", 1)


def test_a_list_that_is_shorter_than_what_is_to_be_deleted(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)
    host.export()
    _emulated.foreign_trim(host.kernel, 10)
    assert details(reason_of(host.trim), "index") == ("head_changed", 0)
    assert Spool(host.spool).journal()["trim"] is None, "it was not even begun"


def test_an_acknowledgement_says_no_verdict_of_its_own(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "central", count=3)
    host.export()
    spool = Spool(host.spool)
    (entry,) = spool.entries
    assert host.locked(lambda cycle: cycle.acknowledge(1, spool.digest(entry), "test")) == 1
    assert Spool(host.spool).acknowledged(entry, "") and not Spool(host.spool).acknowledged(entry, "consistent")
    assert host.trim() == 4


def test_the_spool_of_a_host_that_was_renamed(tmp_path: Path) -> None:
    host = Host(tmp_path, count=3)
    host.export()
    files = host.files()
    text = Path(host.conf).read_text(encoding="utf-8")
    Path(host.conf).write_text(text.replace("name = host", "name = another"), encoding="utf-8")
    assert reason_of(host.export).reason == "host_renamed"
    assert reason_of(lambda: host.locked(lambda cycle: cycle.predict())).reason == "host_renamed", "check mode"
    assert host.files() == files


# --- what the policy allows -------------------------------------------------------------------------------------------


def test_what_the_store_has_now_goes_before_its_older_words(tmp_path: Path) -> None:
    """It lost its newest shards since: they are its own business, but no record goes on their strength."""
    host = Host(tmp_path, "delete_n", "central", count=20)
    host.export()
    host.acknowledge()
    for has, expected in ((None, 21), (3, 21), (2, 14), (1, 7), (0, 0)):
        cycle = host.cycle()
        cycle.store_has = has
        assert cycle.allowed_to(0) == expected
        assert cycle.allowed_to(7) == max(7, expected)
        assert cycle.allowed_to(9) == max(9, expected)
    host.configure(trim_after="local")
    cycle = host.cycle()
    cycle.store_has = 0
    assert cycle.allowed_to(0) == 21


def test_what_left_the_kernel_needs_no_word_any_more(tmp_path: Path) -> None:
    host = Host(tmp_path, count=20)
    host.export()
    host.trim(7)
    host.configure(trim_after="central")
    spool = Spool(host.spool)
    spool.acknowledge(spool.entries[1], "test", "", "2026-01-01T00:00:00Z")
    assert host.cycle().allowed_to(7) == 14
    assert host.cycle().allowed_to(6) == 6


def test_nothing_is_allowed_before_a_boot_has_a_shard_of_its_own(tmp_path: Path) -> None:
    host = Host(tmp_path, count=20)
    assert host.cycle().allowed_to(0) == 0
    host.export()
    assert host.cycle().allowed_to(0) == 21
    host.kexec(True)
    assert (host.cycle().allowed_to(0), host.cycle().allowed_to(7)) == (0, 7)
    host.grow(1)
    host.export()
    assert host.cycle().allowed_to(0) == 23


def test_what_is_not_sealed_and_what_is_not_allowed(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "central", count=9)
    host.export()
    cycle = host.cycle()
    assert details(reason_of(lambda: cycle.trimmable(0, 11)), "index") == ("not_sealed", 0)
    assert details(reason_of(lambda: cycle.trimmable(0, 10)), "index") == ("not_acknowledged", 0)
    assert (cycle.trimmable(0, None), cycle.trimmable(0, 0), cycle.trimmable(4, 2)) == (0, 0, 0)
    host.acknowledge()
    cycle = host.cycle()
    assert (cycle.trimmable(0, None), cycle.trimmable(0, 10), cycle.trimmable(4, 9)) == (10, 10, 5)
    host.reboot()
    assert reason_of(lambda: host.cycle().trimmable(0, 5)).reason == "not_sealed"


@pytest.mark.parametrize(
    ("keys", "shards", "size", "age", "over"),
    [
        ({"keep_days": "7"}, 9, 9, 7 * 86400, False),
        ({"keep_days": "7"}, 9, 9, 7 * 86400 + 1, True),
        ({"keep_shards": "3"}, 3, 9, 10**9, False),
        ({"keep_shards": "3"}, 4, 9, 0, True),
        ({"keep_bytes": "100"}, 9, 100, 10**9, False),
        ({"keep_bytes": "100"}, 9, 101, 0, True),
        ({}, 9, 10**12, 10**9, False),
    ],
    ids=str,
)
def test_each_limit_of_what_is_kept(
    tmp_path: Path, keys: dict[str, str], shards: int, size: int, age: int, over: bool
) -> None:
    host = Host(tmp_path)
    with open(host.conf, "a", encoding="utf-8") as file:
        file.write("[retention]\n" + "".join(f"{key} = {value}\n" for key, value in keys.items()))
    sealed = "2026-01-01T00:00:00Z"
    assert host.cycle()._over(shards, size, sealed, _snapshot.seconds_of(sealed) + age) is over


# --- staging, trimming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["policy", "fault", ""])
def test_nothing_is_staged_that_may_not_be_deleted(tmp_path: Path, why: str) -> None:
    host = Host(tmp_path, "staged", "never" if why == "policy" else "central", count=3)
    recover(host)
    if why == "fault":
        faults = [fault(host.state().boot_id, 0)]
        host.locked(lambda cycle: cycle.spool.write_journal(faults=faults))
    done = host.export()
    assert (host.state().staged is None, done.notes) == (bool(why), [])
    host.grow(2)
    notes = [] if why else ["found a staged list that an earlier run left"]
    assert host.export().notes == notes


def test_trimming_leaves_its_intention_and_then_its_result(tmp_path: Path) -> None:
    for flavour in ("delete_n", "staged"):
        host = Host(tmp_path / flavour, flavour, count=9)
        host.export()
        spool = Spool(host.spool)
        _emulated.lost_reply(host.kernel)
        assert reason_of(host.trim).reason == "delete_unknown"
        journal = Spool(host.spool).journal()
        assert journal["trim"] == {"base": 0, "target": 10, "manifest": spool.digest(spool.entries[-1])}
        assert (journal["boot_id"], journal["base"]) == (host.state().boot_id, 0)
        assert host.export().base == 10
        journal = Spool(host.spool).journal()
        assert (journal["trim"], journal["base"]) == (None, 10)
        host.grow(3)
        host.export()
        assert host.trim() == 3
        journal = Spool(host.spool).journal()
        assert (journal["trim"], journal["base"]) == (None, 13)


# --- looking without exporting ----------------------------------------------------------------------------------------


def test_a_survey_notes_what_it_finds(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "never", count=20)
    host.export()
    _emulated.foreign_trim(host.kernel, 5)
    files = host.files()
    place = host.cycle().survey(write=False)
    assert (place.base, place.cut, place.proven, host.files()) == (5, 21, True, files)
    boot = host.state().boot_id
    host.locked(lambda cycle: cycle.spool.write_journal(trim={"base": 0, "target": 9, "manifest": "0" * 64}))
    assert host.locked(lambda cycle: cycle.survey()).base == 5
    journal = Spool(host.spool).journal()
    assert (journal["base"], journal["trim"], journal["boot_id"]) == (5, None, boot)
    assert [(each["reason"], each["index"], each["lost"]) for each in journal["faults"]] == [("foreign_trim", 5, False)]


def test_a_survey_that_finds_a_loss_notes_it_only_if_it_may_write(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "never", count=4)
    host.export()
    host.grow(20)
    _emulated.foreign_trim(host.kernel, 8)
    files = host.files()
    assert reason_of(lambda: host.cycle().survey(write=False)).reason == "foreign_trim"
    assert host.files() == files
    assert reason_of(lambda: host.locked(lambda cycle: cycle.survey())).reason == "foreign_trim"
    assert [(each["index"], each["lost"]) for each in Spool(host.spool).journal()["faults"]] == [(5, True)]


def test_the_aggregate_at_the_cut(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)
    host.export()
    host.reboot()
    host.grow(2)
    host.violation(3)
    host.export()
    host.violation(2)
    host.export()
    spool, state = Spool(host.spool), host.state()
    found = host.cycle().aggregate()
    text = found.pop("text")
    assert text.startswith("Snapshot_Attempt_Count=4;sha1:PCR10:") and state.pcrs["10"]["sha256"] in text
    assert found == {
        "sequence": 4,
        "index": 8,
        "boot_id": state.boot_id,
        "machine_id": state.machine_id,
        "records": 18,
        "violations": 5,
        "pcrs": state.pcrs,
        "padded": [],
        "aggregate_digest": spool.digest(spool.entries[-1]),
    }


# --- anchors ----------------------------------------------------------------------------------------------------------


def test_an_anchor_in_a_directory_with_a_blank_is_found(tmp_path: Path) -> None:
    """The kernel writes an underscore in its place."""
    host = Host(tmp_path / "with a blank", "delete_n", "never", count=9)
    host.export()
    made = host.anchor()
    assert made.index == 10
    assert host.cycle().anchor_indexes() == [10]
    host.export()
    assert [each["index"] for each in manifests(host)[-1]["anchors"]] == [10]
    assert host.cycle().anchor_indexes() == [10]


def test_the_anchors_of_the_epoch_in_order(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "never", count=9)
    indexes = []
    for _number in range(3):
        host.export()
        indexes.append(host.anchor().index)
        host.grow(2)
    assert host.cycle().anchor_indexes() == indexes
    names = sorted(os.listdir(os.path.join(host.spool, "anchors")))
    assert host.cycle().find_anchor(names[-1]) == indexes[-1]
    assert host.cycle().find_anchor(names[0]) is None, "it is not behind the cut"
    assert host.cycle().find_anchor("00000009-0123456789abcdef.aggregate") is None
    host.reboot()
    host.export()
    assert host.cycle().anchor_indexes() == []


def test_the_anchors_behind_the_cut_in_order(tmp_path: Path) -> None:
    """The newest two shards may have one: what came before an anchor can be sealed without it."""
    host = Host(tmp_path, "delete_n", "never", count=9)
    host.export()
    host.grow(3)
    made = host.anchor()
    host.export(stop=_snapshot.as_recorded(os.path.join(host.spool, "anchors", made.name)))
    assert host.spans()[-1] == (3, 10, 3)
    host.grow(2)
    host.anchor()
    assert host.cycle().anchor_indexes() == [13, 16]


def test_a_violation_of_an_anchor_is_no_anchor(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "never", count=9)
    host.export()
    made = host.anchor()
    host.violation(path=os.path.join(host.spool, "anchors", made.name))
    host.export()
    assert [each["anchors"] for each in manifests(host)][-1] == [{"index": 10, "sequence": 2, "sha256": made.sha256}]


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "md5"])
def test_an_anchor_needs_a_digest_that_binds(tmp_path: Path, algorithm: str) -> None:
    host = Host(tmp_path, count=3)
    assert host.cycle()._anchors() == {}
    recover(host)
    path = Path(host.spool, "anchors", "00000001-0123456789abcdef.aggregate")
    path.write_bytes(b"content")
    Path(host.spool, "anchors", "notes").write_bytes(b"")
    cycle = host.cycle()
    anchors = cycle._anchors()
    assert anchors == {os.fsencode(path): path.name}
    values = [algorithm.encode() + b":\0" + hashlib.new(algorithm, b"content").digest(), os.fsencode(path) + b"\0"]
    (record,) = parse(ml.encode(10, "ima-ng", values, ml.SHA1))
    found = [{"index": 0, "sequence": 1, "sha256": hashlib.sha256(b"content").hexdigest()}]
    assert cycle._recognise(record, anchors) == ([] if algorithm == "md5" else found)


# --- what a manifest and the journal say ------------------------------------------------------------------------------


def test_every_member_of_a_manifest_and_of_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, count=5, shard_records=4)
    monkeypatch.setattr(_snapshot, "utc_now", lambda: "2026-11-22T00:00:00Z")
    host.export()
    spool, state = Spool(host.spool), host.state()
    first, second = manifests(host)
    own = ("count", "size", "sha256", "stored_size", "stored_sha256", "pcrs_start", "pcrs_end")
    common = {
        "version": 1,
        "machine_id": state.machine_id,
        "name": "host",
        "boot_id": state.boot_id,
        "reset_count": state.reset_count,
        "release": state.release,
        "flavour": "delete_n",
        "emulated": True,
        "byte_order": ml.SHA1.byte_order,
        "padded": [],
        "violations": 0,
        "anchors": [],
        "faults": [],
        "time": "2026-11-22T00:00:00Z",
    }
    assert {key: value for key, value in first.items() if key not in own} == dict(
        common, sequence=1, first=0, previous=None, observed=None
    )
    observed = {"pcrs": state.pcrs, "index": 6}
    assert {key: value for key, value in second.items() if key not in own} == dict(
        common, sequence=2, first=4, previous=spool.digest(spool.entries[0]), observed=observed
    )
    expected = {"version": 1, "boot_id": state.boot_id, "base": 0, "trim": None, "seal": None, "faults": []}
    assert Spool(host.spool).journal() == expected
    assert host.trim() == 6
    assert Spool(host.spool).journal() == dict(expected, base=6)


def test_faults_are_told_in_the_first_shard_of_a_batch(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "never", count=20)
    host.export()
    _emulated.foreign_trim(host.kernel, 5)
    host.grow(20)
    host.export()
    told = [manifest["faults"] for manifest in manifests(host)]
    assert [len(faults) for faults in told] == [0, 0, 0, 1, 0, 0]
    ((found,),) = (faults for faults in told if faults)
    boot = host.state().boot_id
    message = "somebody else trimmed records 0 to 4; all of them are in shards"
    assert found == dict(fault(boot, 5, lost=False), message=message)


def test_a_list_that_leads_nowhere_is_a_fault_at_the_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told once: what comes later cannot be right either."""
    host = Host(tmp_path, "delete_n", "never", count=4)
    host.export()
    observing(monkeypatch, {"10": {"sha1": "11" * 20, "sha256": "11" * 32}})
    for _time in range(3):
        host.grow(2)
        host.export()
    assert host.faults() == [("pcr_mismatch", 5, True)]
    assert [manifest["observed"]["index"] for manifest in manifests(host)[1:]] == [None] * 3


# --- finding the place ------------------------------------------------------------------------------------------------


def test_a_journal_of_no_boot_tells_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "never", count=9)
    host.export()
    host.journal(b'{"base":3,"boot_id":null,"faults":[],"seal":null,"trim":null,"version":1}')
    host.grow(1)
    assert host.export().base == 0
    assert host.faults() == []


def test_a_journal_that_is_ahead_of_all_shards_tells_nothing(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "never", count=9)
    host.export()
    host.locked(lambda cycle: cycle.spool.write_journal(base=99, trim={"base": 0, "target": 98, "manifest": "0" * 64}))
    host.grow(1)
    assert host.export().base == 0
    oracle(host)


def test_a_journal_that_is_behind_what_was_pruned_is_not_tried(tmp_path: Path) -> None:
    """The files of the first two shards are gone."""
    host = Host(tmp_path, count=20)
    host.run()
    host.locked(lambda cycle: cycle.spool.prune(cycle.spool.entries[1], "test", "2026-01-01T00:00:00Z"))
    host.locked(lambda cycle: cycle.spool.write_journal(base=3))
    host.grow(2)
    assert (host.export().base, host.faults()) == (21, [("foreign_trim", 21, False)])


@pytest.mark.parametrize("flavour", ["delete_n", "staged"])
def test_without_a_tpm_only_what_follows_tells_equal_records_apart(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, "never", count=1, banks=[])
    for _time in range(2):
        host.violation()
        host.grow(1)
    host.export()
    _emulated.foreign_trim(host.kernel, 4)
    assert host.export().base == 4
    oracle(host)


def test_without_a_tpm_two_places_that_fit_are_one_too_many(tmp_path: Path) -> None:
    """The list is a violation, a file, the same violation; the last of them is sealed, too."""
    host = Host(tmp_path, "delete_n", "never", count=1, banks=[])
    host.violation()
    host.grow(1)
    host.violation()
    host.export()
    _emulated.foreign_trim(host.kernel, 2)
    assert details(reason_of(host.export), "index") == ("ambiguous_base", 2)


def test_a_padded_bank_is_replayed_so_wherever_the_tpm_is_asked(tmp_path: Path) -> None:
    host = Host(tmp_path, count=4, shard_records=5, padded=["sha256"])
    host.run()
    host.grow(7)
    assert host.export(limit=1).records == 5
    host.export()
    assert [manifest["padded"] for manifest in manifests(host)] == [["sha256"]] * 3
    assert manifests(host)[-1]["pcrs_end"] == host.state().pcrs
    oracle(host)


def among_equal_records(tmp_path: Path) -> Host:
    """The list began at record 5; it fits from every violation on that is sealed."""
    host = Host(tmp_path, "delete_n", "never", count=2)
    host.violation(6)
    host.export()
    _emulated.foreign_trim(host.kernel, 5)
    host.violation(3)
    return host


def test_among_equal_records_the_tpm_decides_while_it_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = among_equal_records(tmp_path)
    now = host.state().pcrs
    later = {"10": {"sha1": "11" * 20, "sha256": "11" * 32}}
    answers = iter([now, later])
    with monkeypatch.context() as patch:
        patch.setattr(Cycle, "observe", lambda self: next(answers))
        assert details(reason_of(host.export), "index", "boot_id") == ("ambiguous_base", 5, host.state().boot_id)
    assert host.export().base == 5
    oracle(host)


def test_records_of_a_pcr_that_nobody_asked_for_decide_nothing(tmp_path: Path) -> None:
    host = among_equal_records(tmp_path)
    _emulated.feed(host.kernel, records=[{"path": "/eleven", "content": "x", "pcr": 11}])
    assert host.export().base == 5
    oracle(host)


@pytest.mark.parametrize("flush_htable", [False, True])
def test_without_a_tpm_a_file_tells_where_the_list_begins_if_it_is_measured_once(
    tmp_path: Path, flush_htable: bool
) -> None:
    host = Host(tmp_path, "staged", "never", count=4, banks=[], flush_htable=flush_htable)
    lists = host.config().lists()
    with lists.writer(staged=True) as file:
        lists.stage(file)
    host.grow(5)
    host.export()
    with lists.writer(staged=True) as file:
        lists.delete_staged(file)
    if flush_htable:
        assert details(reason_of(host.export), "index") == ("ambiguous_base", 5)
    else:
        assert host.export().base == 5
    assert len(manifests(host)) == 2


def test_a_piece_is_exported_where_all_before_it_was_trimmed(tmp_path: Path) -> None:
    for name, banks in (("tpm", BANKS), ("none", [])):
        host = Host(tmp_path / name, count=4, shard_records=5, banks=banks)
        host.run()
        host.grow(20)
        assert host.export(limit=1).records == 5
        stop = parse(host.truth())[13]
        done = host.export(stop=ml.event_name(stop, ml.SHA1.byte_order))
        assert (done.records, done.cut, done.more) == (3, 13, False)
        assert host.spans() == [(1, 0, 5), (2, 5, 5), (3, 10, 3)]
        assert [manifest["observed"] for manifest in manifests(host)[1:]] == [None, None]
        done = host.export(limit=1)
        assert (done.records, done.more) == (5, True)
        host.export()
        assert manifests(host)[-1]["observed"] == ({"pcrs": host.state().pcrs, "index": 25} if banks else None)
        oracle(host)


def test_a_piece_that_cannot_be_proven_is_noted(tmp_path: Path) -> None:
    host = Host(tmp_path, count=4, shard_records=5)
    host.run()
    host.grow(20)
    _emulated.foreign_trim(host.kernel, 3)
    boot = host.state().boot_id
    assert details(reason_of(lambda: host.export(limit=1)), "index", "boot_id") == ("foreign_trim", 5, boot)
    (noted,) = Spool(host.spool).journal()["faults"]
    assert {key: noted[key] for key in ("reason", "index", "lost", "boot_id", "found")} == {
        "reason": "foreign_trim",
        "index": 5,
        "lost": True,
        "boot_id": boot,
        "found": boot,
    }


def test_a_lost_list_is_a_fault_of_the_boot_before(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)
    host.run()
    before = host.state().boot_id
    host.grow(3)
    host.kexec(False, same_epoch=False)
    host.grow(2)
    place, count = host.cycle().predict()
    assert (place.base, place.cut, place.start, count) == (0, 0, {}, 3)
    host.export()
    (found,) = manifests(host)[-1]["faults"]
    assert (found["reason"], found["index"], found["lost"]) == ("kexec", 10, True)
    assert (found["boot_id"], found["found"]) == (before, host.state().boot_id)


def test_a_prediction_is_about_the_tpm_too(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)
    host.run()
    host.grow(12)
    _emulated.foreign_trim(host.kernel, 2)
    place, count = host.cycle().predict()
    assert (place.base, place.cut, place.proven, count) == (10, 10, False, 10)
    host = among_equal_records(tmp_path / "equal")
    place, count = host.cycle().predict()
    assert (place.base, place.cut, count) == (5, 9, 3)


def test_a_guess_is_not_noted_as_a_loss(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "never", count=2, banks=[])
    host.violation(6)
    host.export()
    host.journal(None)
    _emulated.foreign_trim(host.kernel, 5)
    host.violation(3)
    assert reason_of(host.export).reason == "ambiguous_base"
    assert Spool(host.spool).journal()["faults"] == []


def test_a_first_list_after_a_reset_that_leads_nowhere_lost_nothing_of_the_boot_before(tmp_path: Path) -> None:
    """Between the reboot and the first export there was a kexec: its records are unknown, not those before them."""
    host = Host(tmp_path, count=9)
    host.run()
    host.reboot()
    host.grow(2)
    host.kexec(False, same_epoch=False)
    host.export()
    assert host.faults() == [("pcr_mismatch", 0, True)]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_counter_that_cannot_be_read_tells_of_no_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The TPM's driver comes and goes with the kernel; the list says that it was carried over."""
    host = Host(tmp_path, "delete_n", "never", count=9)
    with monkeypatch.context() as patch:
        if when == "before":
            patch.setattr(_emulated.EmulatedFiles, "reset_count", lambda self: None)
        host.export()
    host.kexec(True)
    with monkeypatch.context() as patch:
        if when == "after":
            patch.setattr(_emulated.EmulatedFiles, "reset_count", lambda self: None)
        assert host.export().cut == 11
    assert host.spans()[-1] == (3, 10, 1)
    oracle(host)


# --- small parts ------------------------------------------------------------------------------------------------------


def test_pieces_are_given_whole_and_in_order() -> None:
    pieces = _snapshot._Pieces(iter([b"abc", b"de", b"f"]))
    assert [pieces.exactly(2), pieces.exactly(3), pieces.read(9), pieces.exactly(4), pieces.read(1)] == [
        b"ab",
        b"cde",
        b"f",
        b"",
        b"",
    ]
    assert _snapshot._Pieces(iter([b"abc", b"de"])).exactly(9) == b"abcde"


class Bytes:
    """A file whose reads are counted."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.reads = data, 0, 0

    def read(self, size: int) -> bytes:
        self.reads += 1
        piece = self.data[self.at : self.at + size]
        self.at += len(piece)
        return piece

    def rewind(self) -> None:
        self.at = 0


def test_a_list_is_read_in_large_pieces_and_compared_in_any() -> None:
    file = Bytes(bytes(range(250)) * 4)
    view = _snapshot._Buffered(t.cast(t.Any, file))
    assert view.starts_with([file.data[:1], file.data[1:10], b"", file.data[10:300]])
    assert (view.read(3), file.reads) == (file.data[300:303], 1)
    view.rewind()
    assert not view.starts_with([file.data[:5], b"other"])
    view.rewind()
    assert not view.starts_with([file.data + b"more"])
    view.rewind()
    assert view.starts_with([file.data]) and view.read(1) == b""
    assert view.starts_with([])
