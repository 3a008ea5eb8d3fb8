# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The verifier, where the mutation check found that no other test looks (tests/mutation)."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils._errors import ManifestError, StoreError
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import seconds_of
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import (
    Broken,
    Claim,
    Unfit,
    Verdict,
    _Epochs,
    _Point,
    claims_of,
    verify,
    verify_fleet,
    worst,
)
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import parse
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils.test_tpm import SoftTpm

# The history that all tests begin with. Sequence, first, count; the host was booted before the last.
SHAPE = [(1, 0, 7), (2, 7, 7), (3, 14, 7), (4, 21, 7), (5, 0, 7)]
TIMES = ("2026-01-02T03:04:01Z", "2026-01-02T03:04:02Z", "2026-01-02T03:04:03Z")


@pytest.fixture(name="origin", scope="module")
def _origin(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("origin")
    store = support.new_store(directory / "store")
    host = support.Host(directory / "h")
    for number, count in enumerate((20, 6, 6), 1):
        host.grow(count)
        support.write_fleet(store, number, {"h": host.rotate(store, anchor=True)}, time=TIMES[number - 1])
        if number == 2:
            _emulated.reboot(host.kernel)
    return str(directory / "store")


@pytest.fixture(name="store")
def _store(origin: str, tmp_path: Path) -> DirectoryStore:
    shutil.copytree(origin, tmp_path / "store")
    return DirectoryStore(str(tmp_path / "store"))


def judged(store: DirectoryStore, *, claims: bool = False, **options: t.Any) -> Verdict:
    return verify(store, "h", claims_of(store)["h"] if claims else (), **options)


def place(verdict: Verdict) -> tuple[str, int | None, int | None, str]:
    """Reason, sequence, index and boot of a fault."""
    assert verdict.verdict == "broken" and verdict.message
    return verdict.reason, verdict.sequence, verdict.index, verdict.boot_id


def boots(store: DirectoryStore) -> list[str]:
    """The boot of each shard."""
    return [entry.boot_id for entry in store.entries("h")]


def fault(reason: str, boot_id: str, lost: bool) -> support.Json:
    return {"reason": reason, "lost": lost, "message": "it happened", "boot_id": boot_id, "found": boot_id, "index": 3}


def missing(reason: str, **where: t.Any) -> support.Json:
    return {"claim": dict({"status": "missing", "reason": reason, "message": "so it said"}, **where)}


def rewrite(store: DirectoryStore, sealed: support.Sealed, **members: t.Any) -> None:
    """Change a manifest that no other one follows."""
    sealed.manifest.update(members)
    support.write(support.paths(store, sealed)[1], canonical(sealed.manifest))


# -- the result --------------------------------------------------------------------------------------------------------


def test_what_is_not_known_is_empty(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = judged(store)
    assert (verdict.verdict, verdict.reason, verdict.message, verdict.sound) == ("consistent", "", "", True)
    assert (verdict.index, verdict.sequence, verdict.attested_to) == (None, None, None)
    assert (verdict.shards, verdict.records, verdict.boots, verdict.quotes, verdict.expired) == (5, 35, 2, 0, 0)
    now = time.time() + 3600
    monkeypatch.setattr(time, "time", lambda: now)
    assert judged(store, max_age=1).reason == "stale"
    assert dataclasses.asdict(verify(store, "nobody", ())) == {
        "verdict": "broken", "reason": "no_shard", "message": "The store has no shard of nobody", "boot_id": "",
        "index": None, "sequence": None, "shards": 0, "records": 0, "boots": 0, "emulated": False,
        "aggregate_digest": "", "pcrs": {}, "quotes": 0, "attested_to": None, "expired": 0, "seen": "",
        "warnings": [], "sound": False,
    }  # fmt: skip


def test_a_host_that_never_answered_says_why(store: DirectoryStore) -> None:
    missing = {"status": "missing", "reason": "no_measurement_list", "message": "x"}
    plain = "The store has no shard of nobody"
    claims = [Claim("1", TIMES[0], dict(missing, reason="unreachable")), Claim("2", TIMES[1], missing)]
    assert verify(store, "nobody", claims).message == f"{plain}: at rotation 2 it gave none (no_measurement_list)"
    gone = [Claim("1", TIMES[0], missing), Claim("2", TIMES[1], {"status": "present"})]
    assert verify(store, "nobody", gone).message == plain, "what it once had is gone: no word of an earlier failure"
    os.unlink(support.paths(store, support.take(store)[1])[0])
    verdict = verify(store, "h", [Claim("9", TIMES[2], missing)])
    assert verdict.reason == "missing_shard" and "gave none" not in verdict.message


def test_a_fault_without_a_reason_of_its_own_is_broken() -> None:
    verdict = Verdict()
    verdict.broken(Broken("x"))
    assert (verdict.verdict, verdict.reason, Unfit("x").reason) == ("broken", "broken", "broken")


def test_a_host_cannot_flood_the_warnings(store: DirectoryStore) -> None:
    history = support.take(store)
    for sealed in history:
        sealed.manifest.update(faults=[fault("foreign_trim", sealed.manifest["boot_id"], False)] * 16, anchors=[])
    support.forge(store, history)
    verdict = judged(store)
    assert (verdict.verdict, len(verdict.warnings)) == ("consistent", 50)


def test_one_emulated_shard_makes_a_history_emulated(store: DirectoryStore) -> None:
    history = support.take(store)
    for sealed in history[1:]:
        sealed.manifest["emulated"] = False
    support.forge(store, history)
    assert judged(store).emulated is True


@pytest.mark.parametrize("number", [1, 3])
def test_the_place_of_a_fault_is_in_its_own_boot(store: DirectoryStore, number: int) -> None:
    """Not in the newest one, which the walk over the manifests saw last."""
    path = Path(support.paths(store, support.take(store)[number - 1])[0])
    path.write_bytes(path.read_bytes()[:-1])
    assert place(judged(store)) == ("edited_shard", number, SHAPE[number - 1][1], boots(store)[number - 1])
    assert boots(store)[0] != boots(store)[4]


# -- when the host was seen --------------------------------------------------------------------------------------------


def test_the_newest_rotation_in_which_it_was_present_tells_when_it_was_seen(store: DirectoryStore) -> None:
    support.write_fleet(store, 4, {"h": missing("unreachable")}, time="2026-01-02T03:04:04Z")
    assert judged(store, claims=True).seen == TIMES[2]


def test_a_clock_may_be_five_minutes_ahead(store: DirectoryStore) -> None:
    seen = seconds_of(TIMES[2])
    verdict = judged(store, claims=True, now=seen - 300)
    assert verdict.seen == TIMES[2] and not any("future" in warning for warning in verdict.warnings)
    verdict = judged(store, claims=True, now=seen - 301)
    assert verdict.seen == TIMES[1] and any("future" in warning for warning in verdict.warnings)


# -- fleet documents ---------------------------------------------------------------------------------------------------


class Fleet:
    """Fleet documents that are counted when they are read: of each, which hosts were present, and which were not."""

    def __init__(self, *documents: tuple[str, str]) -> None:
        self.names = [f"20260102T030405Z-{number:08x}" for number in range(len(documents))]
        self.hosts = dict(zip(self.names, documents))
        self.read: list[int] = []

    def runs(self) -> list[str]:
        return self.names

    def run(self, name: str) -> support.Json:
        self.read.append(self.names.index(name))
        words = zip(("present", "missing"), self.hosts[name])
        return {"run": name, "time": name, "hosts": {host: {"status": word} for word, hosts in words for host in hosts}}

    def claims(self) -> dict[str, list[int]]:
        """By host, which documents speak of it."""
        found = claims_of(t.cast(t.Any, self))
        return {host: [self.names.index(claim.run) for claim in claims] for host, claims in found.items()}


def test_of_many_fleet_documents_the_newest_64_are_read() -> None:
    fleet = Fleet(*[("h", "")] * 70)
    assert fleet.claims() == {"h": list(range(6, 70))}
    assert sorted(fleet.read) == list(range(6, 70))


def test_more_are_read_until_each_host_was_found_present(tmp_path: Path) -> None:
    """What the store must hold of a host that is missing for long is what the last good rotation said."""
    fleet = Fleet(("hl", ""), ("hl", ""), *[("h", "l")] * 67, ("l", "h"))
    assert fleet.claims() == {"h": list(range(6, 70)), "l": list(range(6, 70))}, "it was seen in the newest"
    fleet = Fleet(("hl", ""), ("hl", ""), *[("h", "l")] * 68)
    assert fleet.claims() == {"h": list(range(1, 70)), "l": list(range(1, 70))}
    assert sorted(fleet.read) == list(range(1, 70))


FATAL = (
    "foreign_trim",
    "kexec",
    "pcr_mismatch",
    "empty_list",
    "ambiguous_base",
    "equivocation",
    "machine_changed",
    "chain",
    "spool_behind_store",
    "store_diverged",
    "host_name",
    "head_changed",
    "spool_gap",
    "spool_fork",
    "shard_altered",
)


@pytest.mark.parametrize("reason", FATAL)
def test_what_a_rotation_said_of_a_hole_breaks_the_history(store: DirectoryStore, reason: str) -> None:
    support.write_fleet(store, 4, {"h": missing(reason, index=9, boot_id=boots(store)[0])})
    assert place(judged(store, claims=True)) == (reason, None, 9, boots(store)[0])


def test_a_rotation_that_never_found_the_host_may_know_of_a_hole(store: DirectoryStore) -> None:
    said = missing("foreign_trim", index=9, boot_id=boots(store)[0])["claim"]
    later = missing("unreachable")["claim"]
    claims = [Claim("1", TIMES[0], said), Claim("2", TIMES[1], later)]
    assert place(verify(store, "h", claims)) == ("foreign_trim", None, 9, boots(store)[0])


def test_what_is_claimed_after_a_rotation_that_missed_it_counts(store: DirectoryStore) -> None:
    first = store.run(store.runs()[0])["hosts"]["h"]
    support.write_fleet(store, 4, {"h": missing("unreachable")})
    support.write_fleet(store, 5, {"h": {"claim": dict(first, index=20)}})
    assert place(judged(store, claims=True)) == ("claim_mismatch", 3, 20, boots(store)[0])


# -- what cannot be read -----------------------------------------------------------------------------------------------


def raising(error: Exception) -> t.Callable[..., t.Any]:
    def work(*_arguments: t.Any) -> t.NoReturn:
        raise error

    return work


@pytest.mark.parametrize(
    "reason", ["no_key", "no_openssl", "store_unavailable", "store_denied", "store_untrusted", "library_missing"]
)
def test_what_says_nothing_of_the_host_is_no_verdict(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, reason: str
) -> None:
    monkeypatch.setattr(store, "open_shard", raising(StoreError("not to be had", reason=reason)))
    with pytest.raises(StoreError) as caught:
        judged(store)
    assert caught.value.reason == reason


def test_a_file_that_the_system_cannot_read_is_unreadable(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "manifest_bytes", raising(OSError(5, "Input/output error")))
    verdict = judged(store)
    assert (verdict.verdict, verdict.reason) == ("broken", "unreadable")
    assert "Input/output error" in verdict.message


def test_a_manifest_that_changes_while_it_is_verified(store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store reads it again for its own sake."""
    monkeypatch.setattr(store, "expired", raising(ManifestError("it is not JSON", reason="not_json")))
    assert judged(store).reason == "not_json"


def test_a_quote_that_is_no_document(store: DirectoryStore) -> None:
    support.write(os.path.join(support.base(store), boots(store)[4], f"00000005-{'0' * 16}.quote.json"), b"{")
    verdict = judged(store)
    assert (verdict.verdict, verdict.reason) == ("broken", "not_json")


# -- whole fleets ------------------------------------------------------------------------------------------------------


def test_the_worst_of_none_is_consistent() -> None:
    assert worst([]) == "consistent"


def test_hosts_that_are_asked_for_are_judged_in_an_empty_store(tmp_path: Path) -> None:
    result = verify_fleet(support.new_store(tmp_path), ["h"], 0, [])
    assert (result["verdict"], result["hosts"]["h"]["reason"]) == ("broken", "no_shard")


def test_a_host_is_judged_once_it_was_present_or_while_it_is_asked_for(store: DirectoryStore) -> None:
    """Nobody waits for a name that was never more than a mistake in an older inventory."""
    shutil.rmtree(support.base(store))
    claim = {"claim": store.run(store.runs()[2])["hosts"]["h"]}
    lost = missing("unreachable")
    support.write_fleet(store, 4, {"gone": claim, "once": claim, "mistake": lost})
    support.write_fleet(store, 5, {"once": lost, "mistake": lost})
    support.write_fleet(store, 6, {"new": lost})
    hosts = verify_fleet(store, None, 0, [])["hosts"]
    assert {host: said["reason"] for host, said in hosts.items()} == dict.fromkeys(
        ("gone", "h", "new", "once"), "no_shard"
    )


# -- the names in the store --------------------------------------------------------------------------------------------


def test_a_first_delivery_that_was_interrupted_is_no_fault(tmp_path: Path, store: DirectoryStore) -> None:
    """A shard file came, its manifest did not: there is nothing yet that could be judged."""
    sealed, new = support.take(store)[0], support.new_store(tmp_path / "new")
    support.write(support.paths(new, sealed)[0], support.zipped(sealed.raw))
    for newest_boot in (False, True):
        verdict = judged(new, newest_boot=newest_boot)
        assert (verdict.verdict, verdict.shards, verdict.records) == ("consistent", 0, 0)
        assert "interrupted" in verdict.warnings[0]


def test_a_second_file_of_the_newest_shard(store: DirectoryStore) -> None:
    path = support.paths(store, support.take(store)[4])[0]
    shutil.copy(path, path.replace("00000005-0-7", "00000005-0-8"))
    assert place(judged(store)) == ("repeated_shard", 5, 0, boots(store)[4])


def test_the_oldest_of_the_files_without_manifest_is_judged(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the newest one they are unfinished deliveries, before it they are second shards, in whatever order."""
    path = support.paths(store, support.take(store)[4])[0]
    for name in ("00000006-7-1", "00000007-8-1", "00000002-7-6"):
        shutil.copy(path, path.replace("00000005-0-7", name))
    names, other = store.names("h")
    for order in (sorted(names), sorted(names, reverse=True)):
        monkeypatch.setattr(store, "names", lambda host, order=order: (order, other))
        assert place(judged(store))[:3] == ("repeated_shard", 2, 7)


def test_what_contradicts_a_history_is_told_of_every_boot(store: DirectoryStore) -> None:
    store.keep_evidence("h", b"{}")
    for newest_boot in (False, True):
        verdict = judged(store, newest_boot=newest_boot)
        assert (verdict.verdict, verdict.reason, verdict.sound) == ("broken", "equivocation", True)


# -- a store that keeps versions ---------------------------------------------------------------------------------------


def test_what_was_written_again_with_other_bytes_is_named(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "rewritten", lambda host: {"c": True, "a": False, "b\n": True})
    verdict = judged(store)
    assert (verdict.verdict, verdict.reason) == ("broken", "rewritten")
    assert verdict.message.startswith("2 objects") and verdict.message.endswith("b\\n first")


@pytest.mark.parametrize(
    ("names", "word"), [({"a": False, "b": False}, "removed 2 objects"), (None, "does not show them"), ({}, "")]
)
def test_what_was_put_back_or_is_not_shown_is_a_warning(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch, names: dict[str, bool] | None, word: str
) -> None:
    before = judged(store).warnings
    monkeypatch.setattr(store, "rewritten", lambda host: names)
    verdict = judged(store)
    new = [warning for warning in verdict.warnings if warning not in before]
    assert verdict.verdict == "consistent" and len(new) == bool(word) and all(word in warning for warning in new)


# -- boots -------------------------------------------------------------------------------------------------------------


def test_another_fault_does_not_excuse_a_list_that_began_anew(store: DirectoryStore) -> None:
    history = support.take(store)
    history[4].manifest["reset_count"] = history[3].manifest["reset_count"]
    history[4].manifest["faults"] = [fault("foreign_trim", history[4].manifest["boot_id"], False)]
    support.forge(store, history)
    assert place(judged(store)) == ("kexec", 5, 28, history[3].manifest["boot_id"])


# -- records and anchors -----------------------------------------------------------------------------------------------


def test_a_bad_record_in_a_file_that_was_not_sealed_is_the_files_fault(tmp_path: Path) -> None:
    """The first record is read before the end of the file, where its digest is known."""
    host, store = support.Host(tmp_path / "h", shard_records=2000), support.new_store(tmp_path / "store")
    host.grow(700)
    host.rotate(store)
    (sealed,) = support.take(store)
    assert len(sealed.raw) > 1 << 16
    raw = bytearray(sealed.raw)
    raw[5] ^= 1  # in its template digest
    support.write(support.paths(store, sealed)[0], support.zipped(bytes(raw)))
    assert place(judged(store))[:3] == ("edited_shard", 1, 0)
    sealed.raw = bytes(raw)
    support.forge(store, [sealed], pcrs=False)
    assert place(judged(store))[0] == "bad_record"


@pytest.mark.parametrize("sequence", [4, 5, 6])
def test_an_anchor_of_a_shard_that_is_not_before_it(store: DirectoryStore, sequence: int) -> None:
    """Whatever record it names: no shard can hold what follows from it."""
    history = support.take(store)
    history[3].manifest["anchors"] = [{"index": 22, "sequence": sequence, "sha256": "0" * 64}]
    support.forge(store, history)
    verdict = judged(store)
    assert place(verdict) == ("anchor", 4, 21, boots(store)[3])
    assert "not before it" in verdict.message


@pytest.mark.parametrize("field", [None, 0, 1], ids=["as it is", "digest", "name"])
def test_an_anchor_is_its_content_and_its_name(store: DirectoryStore, field: int | None) -> None:
    history = support.take(store)
    records = history[3].records
    record = parse(records[0])[0]
    values = ml.fields(record, ml.SHA1.byte_order)
    if field is not None:
        values[field] = values[field][:-2] + b"0" + values[field][-1:]
    records[0] = ml.encode(record.pcr, record.template, values, ml.SHA1)
    history[3].raw = b"".join(records)
    support.forge(store, history)
    verdict = judged(store)
    if field is None:
        assert verdict.verdict == "consistent"
    else:
        assert place(verdict) == ("anchor", 4, 21, boots(store)[3])


def test_the_first_record_of_a_boot_has_a_place(store: DirectoryStore) -> None:
    history = support.take(store)
    records = history[0].records
    history[0].raw = b"".join([records[1], *records[1:]])
    for sealed in history:
        sealed.manifest["anchors"] = []
    support.forge(store, history)
    assert place(judged(store)) == ("no_boot_aggregate", 1, 0, boots(store)[0])


def test_pcr_values_that_do_not_replay_have_a_place(store: DirectoryStore) -> None:
    history = support.take(store)
    history[1].manifest["violations"] = 1
    history[3].manifest["anchors"] = []
    support.forge(store, history)
    assert place(judged(store)) == ("pcr_mismatch", 2, 7, boots(store)[1])


def test_a_host_with_a_padded_bank_is_replayed_so(tmp_path: Path) -> None:
    host = support.Host(tmp_path / "h", banks=["sha1", "sha256"], padded=["sha256"])
    host.grow(3)
    store = support.new_store(tmp_path / "store")
    host.rotate(store)
    assert judged(store).verdict == "consistent"
    (sealed,) = support.take(store)
    assert sealed.manifest["padded"] == ["sha256"]
    rewrite(store, sealed, padded=[])
    assert judged(store).reason == "pcr_mismatch"


# -- the TPM's values that the host read -------------------------------------------------------------------------------


def values_after(sealed: support.Sealed, count: int) -> support.Json:
    return support.replayed(b"".join(sealed.records[:count]), {})


ZEROS = {"10": {"sha1": "00" * 20, "sha256": "00" * 32}}


@pytest.mark.parametrize("count", [0, 1, 4, 7])
def test_observed_values_hold_where_the_manifest_says(store: DirectoryStore, count: int) -> None:
    last = support.take(store)[4]
    pcrs = values_after(last, count) or ZEROS
    rewrite(store, last, observed={"index": count, "pcrs": pcrs})
    assert judged(store).verdict == "consistent"
    for index in {0, 1, 4, 7, 8} - {count}:
        rewrite(store, last, observed={"index": index, "pcrs": pcrs})
        assert place(judged(store)) == ("pcr_mismatch", 5, index, boots(store)[4])


def test_observed_values_hold_where_the_shard_is_not_the_first(store: DirectoryStore) -> None:
    history = support.take(store)[:4]
    support.forge(store, history)
    rewrite(store, history[3], observed={"index": 28, "pcrs": history[3].manifest["pcrs_end"]})
    assert judged(store).verdict == "consistent"
    rewrite(store, history[3], observed={"index": 7, "pcrs": history[3].manifest["pcrs_end"]})
    assert place(judged(store)) == ("pcr_mismatch", 4, 7, boots(store)[3])


@pytest.mark.parametrize("count", [0, 1, 7])
def test_observed_values_that_hold_nowhere_need_a_fault(store: DirectoryStore, count: int) -> None:
    """Without an index the host says that the list never reached them; only a fault that it names explains that."""
    last = support.take(store)[4]
    observed = {"index": None, "pcrs": values_after(last, count) or ZEROS}
    rewrite(store, last, observed=observed)
    assert place(judged(store)) == ("pcr_mismatch", 5, None, boots(store)[4])
    faults = [fault("foreign_trim", boots(store)[4], False), fault("kexec", boots(store)[4], True)]
    rewrite(store, last, observed=observed, faults=faults[:1])
    assert place(judged(store)) == ("pcr_mismatch", 5, None, boots(store)[4])
    rewrite(store, last, observed=observed, faults=faults)
    assert place(judged(store)) == ("kexec", 5, 3, boots(store)[4])


def test_a_fault_does_not_excuse_observed_values_that_are_said_to_hold(store: DirectoryStore) -> None:
    last = support.take(store)[4]
    rewrite(store, last, observed={"index": 7, "pcrs": ZEROS}, faults=[fault("foreign_trim", boots(store)[4], True)])
    assert place(judged(store))[:3] == ("pcr_mismatch", 5, 7)


@pytest.mark.parametrize("which", ["first", "later", "boot before"])
def test_a_fault_lasts_as_long_as_its_boot(store: DirectoryStore, which: str) -> None:
    """After it the list leads nowhere any more; the next boot begins a sound one."""
    history = support.take(store)
    at, unreached = {"first": (0, 0), "later": (1, 3), "boot before": (3, 4)}[which]
    history[at].manifest["faults"] = [fault("foreign_trim", history[at].manifest["boot_id"], True)]
    for sealed in history:
        sealed.manifest.update(observed=None, anchors=[])
    history[unreached].manifest["observed"] = {"index": None, "pcrs": ZEROS}
    support.forge(store, history, pcrs=False)
    expected = ("pcr_mismatch", 5) if which == "boot before" else ("foreign_trim", at + 1)
    assert place(judged(store))[:2] == expected


def test_what_expired_explains_no_values_that_hold_nowhere(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = support.take(store)[:4]
    support.forge(store, history)
    rewrite(store, history[3], observed={"index": None, "pcrs": ZEROS})
    monkeypatch.setattr(store, "expired", lambda host: 3)
    assert place(judged(store))[:2] == ("pcr_mismatch", 4)


@pytest.mark.parametrize(
    ("pcrs", "good"),
    [
        ({}, False),
        ({"10": {}}, False),
        ({"10": {"sha384": "00" * 48}}, False),
        ({"10": {"sha1": "", "sha384": "00" * 48}}, True),
        ({"10": {"sha1": ""}, "11": {"sha256": "11" * 32}}, True),
        ({"10": {"sha1": "", "sha256": "00" * 32}}, False),
    ],
    ids=["none", "no bank", "a bank of no record", "another bank, too", "another PCR, too", "one of two"],
)
def test_observed_values_count_where_they_are_replayed(store: DirectoryStore, pcrs: support.Json, good: bool) -> None:
    """Of what no record extends nothing is known; at least one value must be, and all that are must hold."""
    last = support.take(store)[4]
    end = last.manifest["pcrs_end"]
    filled = {pcr: {bank: value or end[pcr][bank] for bank, value in row.items()} for pcr, row in pcrs.items()}
    rewrite(store, last, observed={"index": 7, "pcrs": filled})
    assert judged(store).verdict == ("consistent" if good else "broken")


def test_what_boot_aggregate_must_be_needs_all_of_its_pcrs() -> None:
    """PCRs 0 to 7 for SHA-1, 0 to 9 for the others; a quote that lacks one of them tells nothing of that bank."""
    rows = {str(number): {"sha1": f"{number:02x}" * 20, "sha256": f"{number:02x}" * 32} for number in range(10)}
    sha1 = hashlib.sha1(b"".join(bytes([number]) * 20 for number in range(8))).digest()
    sha256 = hashlib.sha256(b"".join(bytes([number]) * 32 for number in range(10))).digest()

    def found(boot_id: str = "boot") -> dict[str, bytes]:
        points = [_Point(1, "another", {}), _Point(2, "boot", rows)]
        return _Epochs(points)._boot_aggregates({"boot_id": boot_id})

    assert found() == {"sha1": sha1, "sha256": sha256}
    assert not found("a third one")
    del rows["9"]["sha256"]
    assert found() == {"sha1": sha1}
    del rows["0"]
    assert found() == {}


# -- quotes ------------------------------------------------------------------------------------------------------------


class Quoted:
    """A host of two boots, each in one shard of three records, whose software TPM signs what a test wants."""

    def __init__(self, directory: Path) -> None:
        self.store, self.host = support.new_store(directory / "store"), support.Host(directory / "h")
        self.tpm = SoftTpm(self.host, self.store)
        self.tpm.enroll()
        self.rotate()

    def rotate(self) -> None:
        self.host.grow(2)
        self.host.rotate(self.store)

    def reboot(self) -> None:
        """Begin the next boot with a shard of its own."""
        _emulated.reboot(self.host.kernel)
        self.rotate()

    def quote(self, pcrs: support.Json | None = None, **said: t.Any) -> None:
        """Put a quote there that follows the newest shard, or what is said; of the kernel's PCRs, or these."""
        head, describe, nonce = self.store.head("h"), _emulated.describe, os.urandom(32).hex()
        assert head is not None
        other = head._replace(manifest=dict(head.manifest, **said))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.tpm.store, "head", lambda host: other)
            if pcrs is not None:
                patch.setattr(_emulated, "describe", lambda directory: dict(describe(directory), pcrs=pcrs))
            quote = self.tpm.quote(nonce)
        self.store.put_quote("h", quote)

    def judged(self, **options: t.Any) -> Verdict:
        return verify(self.store, "h", (), **options)

    def boots(self) -> list[str]:
        return boots(self.store)


@pytest.fixture(name="quoted")
def _quoted(tmp_path: Path) -> Quoted:
    return Quoted(tmp_path)


NEVER = {"10": {"sha1": "12" * 20, "sha256": "34" * 32}}


def test_a_quote_that_cannot_be_believed_has_a_place(quoted: Quoted) -> None:
    """It follows a shard of the first boot."""
    quoted.quote()
    quoted.reboot()
    identity = Path(support.base(quoted.store), "identity.json")
    good = identity.read_bytes()
    where = (1, None, quoted.boots()[0])
    identity.unlink()
    assert place(quoted.judged()) == ("quote_identity", *where)
    identity.write_bytes(good.replace(quoted.tpm.machine_id.encode(), b"0" * 32))
    assert place(quoted.judged()) == ("quote_identity", *where)
    identity.write_bytes(good)
    assert quoted.judged().verdict == "consistent"


@pytest.mark.parametrize("said", [{"sequence": 9}, {"boot_id": "13b0692a-94e1-4061-890d-87c47d9ca675"}], ids=str)
def test_a_quote_of_a_shard_that_is_not_here_has_a_place(quoted: Quoted, said: support.Json) -> None:
    quoted.quote(**said)
    expected = dict({"sequence": 1, "boot_id": quoted.boots()[0]}, **said)
    quoted.reboot()
    assert place(quoted.judged()) == ("missing_shard", expected["sequence"], None, expected["boot_id"])


def test_a_quote_that_the_list_never_reaches_has_a_place(quoted: Quoted) -> None:
    quoted.quote(NEVER)
    quoted.reboot()
    assert place(quoted.judged()) == ("quote_not_reached", 1, None, quoted.boots()[0])


def test_a_quote_of_the_boot_before_does_not_attest_this_one(quoted: Quoted) -> None:
    quoted.quote()
    assert quoted.judged().verdict == "attested"
    quoted.reboot()
    verdict = quoted.judged()
    assert (verdict.verdict, verdict.attested_to, verdict.quotes) == ("consistent", None, 1)
    assert any("not covered" in warning for warning in verdict.warnings)


def test_quotes_that_are_gone_are_missed_if_the_host_is_enrolled(quoted: Quoted) -> None:
    quoted.quote()
    attested = quoted.judged()
    assert (attested.verdict, attested.warnings) == ("attested", [])
    (kept,) = Path(support.base(quoted.store)).glob("*/*.quote.json")
    kept.unlink()
    for options in ({}, {"newest_boot": True}):
        verdict = quoted.judged(**options)
        assert (verdict.verdict, verdict.quotes) == ("consistent", 0)
        assert verdict.warnings == ["this host is enrolled, but its newest shards are not covered by a quote"]
    Path(support.base(quoted.store), "identity.json").unlink()
    assert quoted.judged().warnings == [], "nobody promised a quote"


def test_a_quote_of_the_first_shard_attests_the_newest_boot(quoted: Quoted) -> None:
    """What was never reached in the boot before does not count; the newest boot needs no quote before it."""
    quoted.quote(NEVER)
    quoted.reboot()
    quoted.tpm.resets += 1
    quoted.quote()
    verdict = quoted.judged(newest_boot=True)
    assert (verdict.verdict, verdict.attested_to, verdict.quotes) == ("attested", 3, 2)
    assert quoted.judged().reason == "quote_not_reached"


def test_a_first_quote_in_the_second_boot(quoted: Quoted) -> None:
    """Nothing is known of the counter before."""
    quoted.reboot()
    quoted.quote()
    assert quoted.judged().verdict == "attested"


def test_a_reset_counter_that_goes_back_is_another_tpm(quoted: Quoted) -> None:
    quoted.quote()
    quoted.reboot()
    quoted.tpm.resets -= 1
    quoted.quote()
    assert place(quoted.judged()) == ("reset_count", 2, 3, quoted.boots()[0])


def test_a_list_that_began_anew_without_a_reset_has_a_place(quoted: Quoted) -> None:
    quoted.quote()
    quoted.reboot()
    quoted.quote()
    assert place(quoted.judged()) == ("kexec", 2, 3, quoted.boots()[0])


def test_a_boot_aggregate_of_other_pcrs_has_a_place(quoted: Quoted) -> None:
    quoted.tpm.others["3"] = {"sha1": "01" * 20, "sha256": "01" * 32}
    quoted.quote()
    quoted.reboot()
    assert place(quoted.judged()) == ("boot_aggregate", 1, 0, quoted.boots()[0])


def test_a_quote_is_reached_from_the_end_of_the_shard_before_it_on(quoted: Quoted) -> None:
    """The TPM may be behind the list, not behind what was exported before; and all values hold, or none do."""
    (first,) = support.take(quoted.store)
    quoted.rotate()
    quotes = Path(support.base(quoted.store), quoted.boots()[0])
    end = first.manifest["pcrs_end"]["10"]
    for pcrs, index in (
        (values_after(first, 3), 3),
        (values_after(first, 2), None),
        ({"10": dict(end, sha256="00" * 32)}, None),
        ({"10": dict(end, sha1="00" * 20)}, None),
    ):
        for path in quotes.glob("*.quote.json"):
            path.unlink()
        quoted.quote(pcrs)
        verdict = quoted.judged()
        assert (verdict.attested_to, verdict.verdict) == (index, "attested" if index else "consistent")


@pytest.mark.parametrize("expired", [0, 1])
def test_a_quote_may_have_been_reached_in_a_shard_that_expired(
    quoted: Quoted, monkeypatch: pytest.MonkeyPatch, expired: int
) -> None:
    """The TPM may be behind the list: then the values hold in the shard that the quote follows."""
    (sealed,) = support.take(quoted.store)
    quoted.quote(values_after(sealed, 2) if expired else NEVER)
    quoted.rotate()
    assert quoted.judged().reason == ("" if expired else "quote_not_reached")
    monkeypatch.setattr(quoted.store, "expired", lambda host: 1)
    os.unlink(support.paths(quoted.store, sealed)[0])
    verdict = quoted.judged()
    assert (verdict.verdict, verdict.expired) == ("consistent", 1)
