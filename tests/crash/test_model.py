# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Random histories of one host and its store, against a model that knows what the kernel recorded.

After each step: what we deleted is in shards where the policy demands it, each shard holds what the kernel recorded at
its index, nothing sealed or stored ever changes. In between and at the end a rotation without faults: where nothing was
done to the host that loses records, it succeeds and the verdict is ``consistent``; where it says ``consistent``, the
store holds the truth.
"""

from __future__ import annotations

import collections
import contextlib
import gzip
import os
import shutil
import tempfile
import typing as t
from pathlib import Path

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _host, _protocol, _snapshot, _verifier
from ansible_collections.integrity.ima.plugins.module_utils._emulated import EmulatedFiles
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import Verdict, verify
from ansible_collections.integrity.ima.tests.crash import model, shim
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

LONG = os.environ.get("LONG") == "1"
POLICIES = ("local", "central", "verified", "never")
KINDS = ("delete_n", "staged", "flushing", "export_only")
BANKS: tuple[list[str], ...] = (["sha1", "sha256"], ["sha1", "sha256"], ["sha256", "sha384"], [])
ODD = ("/a b", "/new\nline", "/" + "x" * 300, "/\udcff\udcfe", "/ü", "boot_aggregate", "/")
BETWEEN = ("fresh", "usual", "violation", "export", "other", "hold", "release", "reboot", "kexec", "policy", "foreign")
BREAKS = ("lost", "unsent", "torn", "dropped", "dropped after")
# What a step without a fault may answer on a host to which nothing was done.
REFUSALS = frozenset(
    ("export_only", "policy_never", "not_sealed", "not_acknowledged", "no_anchor", "staged_whole", "no_shard")
)
# What one may answer besides when the network, a process or a disk fails meanwhile.
FAILURES = frozenset(
    (
        "delete_unknown",
        "fewer_records",
        "unreachable",
        "host_failed",
        "list_busy",
        "store_busy",
        "locked",
        "killed",
        "dropped",
    )
)
STEPS: t.Counter[str] = collections.Counter()


class Target(t.NamedTuple):
    """Where a child is struck."""

    spool: str


class History(RuleBasedStateMachine):
    """One host, one store, and everything that can happen to them."""

    def __init__(self) -> None:
        super().__init__()
        self.root = tempfile.mkdtemp(prefix="model-", dir=model.MEMORY)
        self.agent: t.Any = None
        self.backups: list[str] = []
        self.ready = False

    @initialize(
        kind=st.sampled_from(KINDS),
        banks=st.sampled_from(BANKS),
        padded=st.booleans(),
        policy=st.sampled_from(POLICIES),
        shard_records=st.integers(1, 7),
        dangers=st.sampled_from(("", "foreign", "kexec", "spool", "foreign kexec spool", "")),
    )
    def begin(self, kind: str, banks: list[str], padded: bool, policy: str, shard_records: int, dangers: str) -> None:
        model.Identities.number, model.Clock.second = 0, 0
        flushing = kind == "flushing"
        self.store = support.new_store(os.path.join(self.root, "store"))
        self.host = support.Host(
            os.path.join(self.root, "h"),
            flavour="staged" if flushing else kind,
            trim_after=policy,
            shard_records=shard_records,
            flush_htable=flushing,
            banks=banks,
            padded=["sha256"] if padded and banks else [],
        )
        self.shard_records, self.dangers = shard_records, dangers.split()
        self.ledger = model.Ledger(self.host, self.store, policy)
        self.ready = True

    def teardown(self) -> None:
        try:
            if self.ready:
                self.settle()
                STEPS["records deleted"] += self.ledger.deleted
                STEPS["shards"] += self.ledger.shards
                STEPS["histories"] += 1
        finally:
            self.release()
            shutil.rmtree(self.root)

    @invariant()
    def holds(self) -> None:
        if self.ready:
            STEPS["steps"] += 1
            self.ledger.note()

    # -- the kernel -------------------------------------------------------------------------------------------------

    @rule(count=st.integers(1, 9))
    def fresh(self, count: int = 2) -> None:
        _emulated.grow(self.host.kernel, count)

    @rule(first=st.integers(0, 5), count=st.integers(1, 5))
    def usual(self, first: int = 0, count: int = 3) -> None:
        """The same files in the same order, as after each boot."""
        files = [{"path": f"/usr/bin/{number}", "content": "x"} for number in range(first, first + count)]
        _emulated.feed(self.host.kernel, records=files)

    @rule(count=st.integers(1, 4))
    def violation(self, count: int = 1) -> None:
        for _number in range(count):
            _emulated.violation(self.host.kernel, "/v")

    @rule(name=st.sampled_from(ODD), pcr=st.sampled_from((None, 11)), template=st.sampled_from(("", "ima-sig", "ima")))
    def odd(self, name: str, pcr: int | None, template: str) -> None:
        _emulated.feed(self.host.kernel, records=[{"path": name, "content": "y", "pcr": pcr, "template": template}])
        if name == "boot_aggregate":
            self.ledger.looks_like_a_boot()

    @rule()
    def reboot(self) -> None:
        self.release()
        self.ledger.reboot()

    @rule(carry_over=st.booleans())
    def kexec(self, carry_over: bool = True) -> None:
        self.release()
        lossless = self.ledger.tpm and self.ledger.sealed_to() == len(self.ledger.boot)
        self.ledger.kexec(carry_over or not ("kexec" in self.dangers or lossless))

    @rule(writing=st.booleans())
    def hold(self, writing: bool = False) -> None:
        """An agent opens the list and keeps it."""
        self.release()
        if not writing or self.host.flavour != "export_only":
            flags = os.O_RDWR if writing else os.O_RDONLY
            self.agent = EmulatedFiles(self.host.kernel).open("ascii_runtime_measurements", flags)

    @rule()
    def release(self) -> None:
        if self.agent is not None:
            self.agent.close()
            self.agent = None

    @precondition(lambda self: "foreign" in self.dangers)
    @rule(count=st.integers(1, 12))
    def foreign(self, count: int = 3) -> None:
        self.release()
        if "foreign" in self.dangers and self.ledger.foreign_trim(count):
            STEPS["foreign trims"] += 1

    @precondition(lambda self: "foreign" in self.dangers)
    @rule(count=st.integers(1, 3), more=st.integers(0, 2))
    def hidden(self, count: int, more: int) -> None:
        """All was trimmed, and somebody else deletes what came then: the list looks as if it went on at the cut."""
        self.settle()
        self.fresh(count + more)
        self.foreign(count)

    # -- the host's modules -----------------------------------------------------------------------------------------

    def on_host(self, work: t.Callable[[_protocol.Config], t.Any], *also: str) -> str:
        """Call a module; the reason that it gives."""
        try:
            work(_protocol.load(self.host.config))
        except ImaError as error:
            assert error.reason and error.msg
            self.expected(error.reason, REFUSALS | set(also), error.msg)
            return error.reason
        finally:
            self.ledger.note()
        return ""

    def expected(self, reason: str, allowed: t.Collection[str], message: str = "") -> None:
        """A host to which nothing was done gives no other reasons."""
        busy = ("list_busy",) if self.agent is not None else ()
        if reason and self.ledger.sound and reason not in allowed and reason not in busy:
            assert self.ambiguous(reason), f"{reason}: {message}"
        if reason in ("foreign_trim", "kexec", "pcr_mismatch"):
            self.ledger.named = reason

    def ambiguous(self, reason: str) -> bool:
        """docs/verdicts.md, ambiguous_base: equal records follow each other, and no TPM tells which is the first."""
        if reason != "ambiguous_base" or self.ledger.tpm or not (self.ledger.crashed or self.ledger.touched):
            return False
        self.ledger.hazards.append("ambiguous_base")
        return True

    @rule()
    def export(self) -> None:
        self.on_host(lambda config: _host.export(config, False))

    @rule(anchor=st.booleans())
    def aggregate(self, anchor: bool) -> None:
        self.on_host(lambda config: _host.aggregate(config, anchor, False))

    @rule(
        to=st.sampled_from(("cut", "cut", "records", "anchor")),
        number=st.integers(1, 6),
        make_anchor=st.booleans(),
    )
    def trim(self, to: str, number: int, make_anchor: bool) -> None:
        self.on_host(lambda config: _host.trim(config, to, number, 1, make_anchor, False))

    @rule(number=st.integers(1, 3))
    def look(self, number: int) -> None:
        """Check modes and ima_info change nothing."""
        before = model.everything(self.host)
        self.on_host(_host.info)
        self.on_host(lambda config: _host.export(config, True))
        self.on_host(lambda config: _host.trim(config, "records", number, 1, False, True))
        assert model.everything(self.host) == before

    @rule(policy=st.sampled_from(POLICIES), shard_records=st.integers(1, 7))
    def policy(self, policy: str = "local", shard_records: int = 3) -> None:
        self.ledger.note()
        self.host.configure(policy, shard_records)
        self.ledger.policy = policy

    @rule(second=st.integers(0, 1000))
    def clock(self, second: int) -> None:
        model.Clock.second = second

    # -- rotations --------------------------------------------------------------------------------------------------

    def rotated(self, plan: dict[int, str] | None = None, **options: t.Any) -> model.Outcome:
        """Rotate; ``plan`` says what happens at which round."""
        events, rounds = plan or {}, 0

        def call(one_round: model.Json) -> t.Any:
            nonlocal rounds
            rounds += 1
            event = events.get(rounds, "")
            if event == "unsent":
                return {"unreachable": True, "msg": "No route to host"}
            if event == "dropped":
                raise model.Dropped
            if event in BETWEEN:
                self.happens(event)
            answer = self.host.answer(one_round, **options)
            self.ledger.note()
            if event == "lost":
                return {"unreachable": True, "msg": "Connection reset"}
            if event == "torn":
                return {"failed": True, "msg": "Module result deserialization failed: no JSON"}
            if event == "dropped after":
                raise model.Dropped
            return answer

        outcome = model.rotate(self.host, self.store, call, **options)
        self.ledger.note()
        self.ledger.store_kept()
        return outcome

    def happens(self, event: str) -> None:
        """Something between two rounds."""
        STEPS["between rounds"] += 1
        if event == "other":
            other = model.rotate(self.host, self.store)
            assert other.reason == "store_busy", "two rotations of one host at once"
        else:
            getattr(self, event)()

    @rule(
        plan=st.dictionaries(st.integers(1, 6), st.sampled_from(BETWEEN + BREAKS), max_size=3),
        anchor=st.sampled_from((False, False, True)),
        chunk_bytes=st.sampled_from((4096, 4096, 400, 150)),
    )
    def rotate(self, plan: dict[int, str], anchor: bool, chunk_bytes: int) -> None:
        outcome = self.rotated(plan, anchor=anchor, chunk_bytes=chunk_bytes)
        self.expected(outcome.reason, FAILURES if plan else (), str(outcome.result.get("msg")))

    @rule()
    def settle(self) -> None:
        """A rotation without any fault, and what it must come to."""
        self.release()
        outcome = self.rotated()
        ledger, host = self.ledger, self.host
        self.expected(outcome.reason, (), str(outcome.result.get("msg")))
        if ledger.sound:
            for _again in range(2):
                outcome = self.rotated()
                assert not outcome.reason, outcome
            state = ledger.state()
            trims = host.flavour != "export_only" and ledger.policy != "never"
            assert not trims or (state.count == 0 and state.staged is None), "something stays in the kernel"
        self.judge(outcome.reason)

    def judge(self, reason: str) -> None:
        """The verdict, held against the truth."""
        ledger, name = self.ledger, self.host.name
        verdict = verify(self.store, name, model.claims(self.store, name))
        STEPS[f"verdict {verdict.verdict} {verdict.reason}".strip()] += 1
        if ledger.sound:
            assert (verdict.verdict, ledger.untrue()) == ("consistent", ""), verdict
        elif verdict.verdict == "consistent" and not ledger.blind:
            assert not ledger.named, f"{ledger.named} was named, and is forgotten"
            assert not reason, f"the rotation failed with {reason}, the verdict is consistent"
            assert ledger.untrue() == ""
            assert ledger.boot_id not in ledger.lost, f"{ledger.lost} was not found"

    @rule()
    def verify(self) -> None:
        name = self.host.name
        verdict = verify(self.store, name, model.claims(self.store, name))
        if self.ledger.sound:
            assert verdict.verdict == "consistent" or verdict.reason == "no_shard", verdict

    # -- death and disks --------------------------------------------------------------------------------------------

    def work(self, what: str) -> t.Callable[[t.Any], object]:
        """What a child does until it is struck."""

        def rotation(_target: t.Any) -> None:
            outcome = model.rotate(self.host, self.store)
            if outcome.reason:
                raise ImaError("", reason=outcome.reason)

        def trim(_target: t.Any) -> None:
            _host.trim(_protocol.load(self.host.config), "cut", 0, 1, False, False)

        def export(_target: t.Any) -> None:
            _host.export(_protocol.load(self.host.config), False)

        return {"rotate": rotation, "trim": trim, "export": export}[what]

    @rule(
        what=st.sampled_from(("rotate", "rotate", "trim", "export")),
        number=st.integers(1, 150),
        mode=st.sampled_from((*shim.KILLS, "EIO once", "EIO for ever", "ENOSPC for ever", "EROFS for ever")),
        where=st.sampled_from(("spool", "spool", "store")),
    )
    def struck(self, what: str, number: int, mode: str, where: str) -> None:
        """A process dies, or a disk or the store fails, is full or read-only, from some call on."""
        self.release()
        target = Target(self.host.spool if where == "spool" else self.store.directory)
        run = shim.strike(t.cast(t.Any, target), self.work(what), number, mode)
        self.took(run)

    def took(self, run: shim.Run) -> None:
        STEPS["faults delivered"] += run.state == shim.HIT
        # The modules and the action give these the reason "system" (docs/verdicts.md).
        STEPS["errors of the system"] += run.answer.startswith("OSError")
        self.ledger.crashed = self.ledger.crashed or run.state == shim.HIT
        self.ledger.note()
        self.ledger.store_kept()
        # A disk may fail in many ways; none of them is a hole in the history.
        if run.state != shim.HIT or run.answer in _verifier._FATAL:
            self.expected(run.answer, REFUSALS)

    @rule(
        what=st.sampled_from(("rotate", "trim")),
        fault=st.sampled_from(("kill_before_delete", "kill_after_delete", "kill_after_stage", "lost_reply", "enoent")),
    )
    def kernel_fault(self, what: str, fault: str) -> None:
        """A process dies at a deletion, or its answer is lost."""
        self.release()
        _emulated.fail_next(self.host.kernel, fault)
        run = shim.strike(t.cast(t.Any, Target(self.host.spool)), self.work(what))
        with _emulated._changing(self.host.kernel) as state:
            used, state.faults = fault not in state.faults, []
        self.took(run._replace(state=shim.HIT if used else run.state))

    # -- the spool --------------------------------------------------------------------------------------------------

    @rule()
    def back_up(self) -> None:
        self.backups.append(model.back_up(self.host))

    @rule(shards=st.integers(1, 3))
    def prune(self, shards: int) -> None:
        """Shard files go that the store confirms."""
        self.ledger.note()
        STEPS["pruned shards"] += self.ledger.prune(shards, self.expected)
        self.ledger.note()

    @precondition(lambda self: "spool" in self.dangers and self.backups)
    @rule(number=st.integers(0, 3))
    def restore(self, number: int) -> None:
        self.ledger.note()
        model.restore(self.host, self.backups[number % len(self.backups)])
        self.ledger.spool_replaced("restored spool")

    @precondition(lambda self: "spool" in self.dangers)
    @rule(back=st.booleans())
    def lose_spool(self, back: bool) -> None:
        self.ledger.note()
        if back:
            model.put_back(self.host, self.store)
        else:
            model.lose(self.host)
        self.ledger.spool_replaced("put back spool" if back else "lost spool")


def run(examples: int, steps: int, **more: t.Any) -> None:
    settled = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
        report_multiple_bugs=False,
        **more,
    )
    with model.quick():
        run_state_machine_as_test(History, settings=settled)


def counted(tally: t.Any, least: int) -> None:
    steps = STEPS.pop("steps", 0)
    tally("model steps", steps)
    for name, number in STEPS.items():
        tally(f"model: {name}", number)
    assert STEPS["faults delivered"] > 0 and STEPS["records deleted"] > 0
    assert steps >= least


@pytest.mark.parametrize("number", range(40) if LONG else (6, 8))
def test_histories(number: int, tally: t.Any) -> None:
    STEPS.clear()
    seed(number)(History)
    run(160 if LONG else 85, 40)
    counted(tally, 5000 if LONG else 2400)


# -- what the model found -------------------------------------------------------------------------------------------
# Each is the shortest history that showed it. One that is not mended has a mark.


@pytest.fixture(name="fast")
def _fast() -> t.Iterator[None]:
    with model.quick():
        yield


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> DirectoryStore:
    return support.new_store(tmp_path / "store")


def config_of(host: support.Host) -> _protocol.Config:
    return _protocol.load(host.config)


def verdict_on(host: support.Host, store: DirectoryStore) -> Verdict:
    return verify(store, host.name, model.claims(store, host.name))


def usual_files(host: support.Host, count: int, pcr: int | None = None) -> None:
    records = [{"path": f"/usr/bin/{number}", "content": "x", "pcr": pcr} for number in range(count)]
    assert _emulated.feed(host.kernel, records=records) == count


@pytest.mark.parametrize("flavour", ["delete_n", "staged"])
def test_a_trim_right_after_a_reboot_deletes_nothing(tmp_path: Path, flavour: str, fast: None) -> None:
    """The new boot measured the same files in the same order; no shard has its records."""
    host = support.Host(tmp_path / "h", flavour=flavour, trim_after="local")
    usual_files(host, 5)
    _host.export(config_of(host), False)
    _emulated.reboot(host.kernel)
    usual_files(host, 5)
    with contextlib.suppress(ImaError):
        _host.trim(config_of(host), "cut", 0, 1, False, False)
    assert host.live() == 6


def test_what_was_pruned_is_looked_for_in_the_store() -> None:
    """An equal record of a pruned shard stands for one that somebody deleted unsealed; without a TPM nobody sees it."""
    state = History()
    state.begin(kind="delete_n", banks=[], padded=False, policy="local", shard_records=1, dangers="foreign")
    state.hidden(count=1, more=0)
    state.usual(count=1, first=0)
    state.export()
    state.prune(shards=1)
    state.hidden(count=1, more=0)
    state.teardown()


def test_records_that_come_while_the_list_is_read_are_no_fault(
    tmp_path: Path, store: DirectoryStore, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than one shard is sealed, and all of the last one was measured after the PCRs were read."""
    host = support.Host(tmp_path / "h", shard_records=4)
    host.grow(3)
    real, late = _snapshot.Cycle.observe, [6]

    def observe(cycle: _snapshot.Cycle) -> t.Any:
        values = real(cycle)
        if late:
            host.grow(late.pop())
        return values

    monkeypatch.setattr(_snapshot.Cycle, "observe", observe)
    assert _host.export(config_of(host), False)["records"] == 10 and not late
    assert model.rotate(host, store).reason == ""
    assert verdict_on(host, store).verdict == "consistent"


def test_shards_of_nothing_but_another_pcr_are_no_fault(tmp_path: Path, store: DirectoryStore, fast: None) -> None:
    host = support.Host(tmp_path / "h", shard_records=1)
    usual_files(host, 3, pcr=11)
    _host.export(config_of(host), False)
    assert model.rotate(host, store).reason == ""
    assert verdict_on(host, store).verdict == "consistent"


@pytest.mark.parametrize("flavour", support.FLAVOURS)
def test_two_kexecs_without_an_export_between(tmp_path: Path, store: DirectoryStore, fast: None, flavour: str) -> None:
    """Everything was sealed before the first, and the second carried the list over: nothing is lost."""
    host = support.Host(tmp_path / "h", flavour=flavour, trim_after="never")
    assert model.rotate(host, store).reason == ""
    _emulated.kexec(host.kernel, False)
    _emulated.kexec(host.kernel, True)
    assert model.rotate(host, store).reason == ""
    assert verdict_on(host, store).verdict == "consistent"


def test_a_whole_boot_that_somebody_trimmed_is_a_hole(tmp_path: Path, store: DirectoryStore, fast: None) -> None:
    host = support.Host(tmp_path / "h")
    assert model.rotate(host, store).reason == ""
    _emulated.reboot(host.kernel)
    host.grow(4)
    _emulated.foreign_trim(host.kernel, 5)
    assert model.rotate(host, store).reason == "empty_list"
    assert verdict_on(host, store).verdict == "broken"


def test_the_lost_first_record_of_another_pcr_is_not_found(tmp_path: Path, store: DirectoryStore, fast: None) -> None:
    """As docs/concepts.md says under "Limits": others extend that PCR, too. When it can be found, that page changes."""
    host = support.Host(tmp_path / "h")
    assert model.rotate(host, store).reason == "" and host.live() == 0
    usual_files(host, 1, pcr=11)
    _emulated.foreign_trim(host.kernel, 1)
    host.grow(1)
    model.rotate(host, store)
    assert verdict_on(host, store).verdict == "consistent"


def test_a_kexec_that_lost_a_record_of_another_pcr_is_found(tmp_path: Path, store: DirectoryStore, fast: None) -> None:
    """Shards have records of that PCR already."""
    host = support.Host(tmp_path / "h")
    usual_files(host, 1, pcr=11)
    assert model.rotate(host, store).reason == ""
    _emulated.feed(host.kernel, records=[{"path": "/lost", "content": "x", "pcr": 11}])
    _emulated.kexec(host.kernel, False)
    model.rotate(host, store)
    assert verdict_on(host, store).verdict == "broken"


def test_a_single_candidate_is_not_ambiguous(tmp_path: Path, store: DirectoryStore, fast: None) -> None:
    """Somebody else trimmed sealed records only; with a TPM there is one place where the list can go on."""
    host = support.Host(tmp_path / "h", trim_after="never")
    assert model.rotate(host, store).reason == ""
    _emulated.foreign_trim(host.kernel, 1)
    usual_files(host, 1, pcr=11)
    assert model.rotate(host, store).reason == ""


@pytest.mark.parametrize("later", ["unreachable", "busy"])
def test_a_named_hole_is_not_forgotten(tmp_path: Path, store: DirectoryStore, fast: None, later: str) -> None:
    """The rotation after the one that found it does not get through."""
    host = support.Host(tmp_path / "h")
    assert model.rotate(host, store).reason == ""
    host.grow(3)
    _emulated.foreign_trim(host.kernel, 2)
    assert model.rotate(host, store).reason == "foreign_trim"
    assert verdict_on(host, store).reason == "foreign_trim"
    if later == "unreachable":
        lost = {"unreachable": True, "msg": "Connection reset"}
        assert model.rotate(host, store, lambda one_round: lost).reason == "unreachable"
    else:
        agent = EmulatedFiles(host.kernel).open("ascii_runtime_measurements", os.O_RDWR)
        assert model.rotate(host, store).reason == "list_busy"
        agent.close()
    assert verdict_on(host, store).verdict == "broken"


def test_a_hole_that_was_found_for_an_anchor_is_not_forgotten(
    tmp_path: Path, store: DirectoryStore, fast: None
) -> None:
    """The host is asked for an anchor, says foreign_trim, and reboots before anything is exported."""
    host = support.Host(tmp_path / "h")
    assert model.rotate(host, store).reason == ""
    _emulated.reboot(host.kernel)
    _emulated.foreign_trim(host.kernel, 1)
    with pytest.raises(ImaError) as caught:
        _host.aggregate(config_of(host), True, False)
    assert caught.value.reason == "foreign_trim"
    _emulated.reboot(host.kernel)
    model.rotate(host, store)
    assert verdict_on(host, store).reason == "foreign_trim"


def test_a_loss_before_the_first_export_is_gone_with_an_empty_list() -> None:
    """As docs/concepts.md says under "Limits": without a TPM, and a kexec that carries an empty list over."""
    state = History()
    state.begin(kind="delete_n", banks=[], padded=False, policy="local", shard_records=1, dangers="foreign")
    with model.quick():
        state.foreign(count=1)
        state.kexec(carry_over=True)
        state.settle()
        state.teardown()


@pytest.mark.parametrize("how", ["first of a list that is carried over", "second of a boot like the last"])
def test_a_file_called_boot_aggregate_deceives_without_a_tpm(how: str) -> None:
    """As docs/concepts.md says under "Limits": its records are exported, and counted as those of another boot."""
    state = History()
    state.begin(kind="delete_n", banks=[], padded=False, policy="local", shard_records=1, dangers="")
    with model.quick():
        if how.startswith("first"):
            state.rotate(anchor=False, chunk_bytes=4096, plan={})
            state.odd(name="boot_aggregate", pcr=None, template="")
            state.kexec(carry_over=True)
        else:
            state.kexec(carry_over=True)
            state.export()
            state.reboot()
            state.odd(name="boot_aggregate", pcr=None, template="")
        state.export()
        state.holds()
        assert state.host.recorded().endswith(gzip.decompress(newest(state)))
        state.teardown()


def newest(state: History) -> bytes:
    """The newest shard of the spool."""
    spool = Spool(state.host.spool)
    return Path(spool.path(spool.entries[-1])).read_bytes()
