# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The cycle on an emulated host: every flavour and policy, and everything that can go wrong with the kernel's list."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _host, _snapshot
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._securityfs import File
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import (
    CAPTURES,
    FLAVOURS,
    TRIMMING,
    Host,
    oracle,
    parse,
    reason_of,
)

NO_TPM: list[str] = []
TPM = ["sha1", "sha256"]


@pytest.fixture(autouse=True)
def _no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reaches the disk is not the matter here, and a slow disk would make these tests slow."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def in_child(work: t.Callable[[], object]) -> int:
    """Run it in another process; the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


# --- flavours and policies --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("banks", [TPM, ["sha1"], ["sha256", "sha384", "sha512"], NO_TPM], ids=str)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_export_and_trim(tmp_path: Path, flavour: str, banks: list[str]) -> None:
    host = Host(tmp_path, flavour, count=20, banks=banks)
    done, trimmed = host.run()
    assert host.spans() == [(1, 0, 7), (2, 7, 7), (3, 14, 7)]
    assert (done.records, done.base, done.cut, done.more) == (21, 0, 21, False)
    assert trimmed == (0 if flavour == "export_only" else 21)
    assert len(parse(host.held())) == 21 - trimmed
    oracle(host)
    for number in range(3):
        host.grow(number)
        host.violation()
        host.run()
        oracle(host)
    assert host.faults() == []
    assert host.cycle().predict()[1] == 0


@pytest.mark.parametrize("trim_after", ["local", "central", "verified", "never"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_second_run_changes_no_byte(tmp_path: Path, flavour: str, trim_after: str) -> None:
    host = Host(tmp_path, flavour, trim_after, count=9)
    host.run()
    files = host.files()
    done, trimmed = host.run()
    assert (done.entries, done.records, done.cut, trimmed) == ([], 0, 10, 0)
    if flavour != "export_only" and trim_after == "local":
        assert done.base == 10
    again = host.files()
    host.run()
    assert host.files() == again
    changed = {name for name in files if files[name] != again[name]}
    assert changed <= {"journal.json"} and files.keys() == again.keys()
    oracle(host)


@pytest.mark.parametrize("flavour", TRIMMING)
def test_central(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, "central", count=20)
    assert host.run()[1] == 0
    assert host.acknowledge(sequence=2) == 2
    expected = 14 if flavour == "delete_n" else 0
    assert host.run()[1] == expected
    oracle(host)
    assert host.acknowledge() == 1
    assert host.acknowledge() == 0
    assert host.run()[1] == 21 - expected
    assert host.held() == b""
    oracle(host)


@pytest.mark.parametrize("flavour", TRIMMING)
def test_verified(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, "verified", count=20)
    host.run()
    assert host.acknowledge() == 3
    assert host.run()[1] == 0
    assert host.acknowledge("consistent") == 3
    assert host.run()[1] == 21
    oracle(host)


@pytest.mark.parametrize("flavour", TRIMMING)
def test_never(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, "never", count=20)
    host.run()
    host.acknowledge("attested")
    error = reason_of(host.trim)
    assert error.reason == "policy_never"
    assert host.state().staged is None
    assert len(parse(host.held())) == 21
    oracle(host)


def test_acknowledging_what_is_not_here(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "central", count=20)
    assert reason_of(lambda: host.locked(lambda c: c.acknowledge(1, "0" * 64, "s"))).reason == "spool_behind_store"
    host.export()
    assert reason_of(lambda: host.locked(lambda c: c.acknowledge(4, "0" * 64, "s"))).reason == "spool_behind_store"
    assert reason_of(lambda: host.locked(lambda c: c.acknowledge(3, "0" * 64, "s"))).reason == "store_diverged"
    assert host.trim() == 0


def test_an_acknowledgement_that_died_half_way_is_completed(tmp_path: Path) -> None:
    """The oldest shard has the store's word, those behind it do not: the next word must reach them."""
    host = Host(tmp_path, "delete_n", "central", count=20)
    host.export()
    spool = Spool(host.spool)
    spool.acknowledge(spool.entries[0], "test", "", "2026-01-01T00:00:00Z")
    host.acknowledge()
    host.grow(1)
    host.export()
    host.acknowledge()
    assert host.trim() == 22


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_trim_on_export_only(tmp_path: Path) -> None:
    host = Host(tmp_path, "export_only", count=3)
    host.export()
    assert reason_of(host.trim).reason == "export_only"


@pytest.mark.parametrize("flavour", TRIMMING)
def test_not_sealed_and_not_acknowledged(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, "central", count=9)
    host.export()
    held = host.held()
    error = reason_of(lambda: host.trim(11))
    assert (error.reason, error.details["index"]) == ("not_sealed", 0)
    error = reason_of(lambda: host.trim(10))
    assert (error.reason, error.details["index"]) == ("not_acknowledged", 0)
    host.acknowledge(sequence=1)
    error = reason_of(lambda: host.trim(8))
    assert (error.reason, error.details["index"]) == ("not_acknowledged", 7)
    assert host.held() == held
    oracle(host)


def test_trim_by_number(tmp_path: Path) -> None:
    host = Host(tmp_path, count=20)
    host.export()
    for target in (1, 3, 8, 21):
        host.trim(target)
        assert len(parse(host.held())) == 21 - target
        oracle(host)
        assert host.export().base == target


def test_staged_goes_as_a_whole(tmp_path: Path) -> None:
    host = Host(tmp_path, "staged", count=9)
    host.export()
    held = host.held()
    assert reason_of(lambda: host.trim(5)).reason == "staged_whole"
    assert host.held() == held
    assert host.trim(10) == 10
    host.configure(trim_after="never")
    host.grow(8)
    host.export()
    host.configure(trim_after="local")
    assert host.trim(13) == 3  # nothing is staged: by number
    oracle(host)


def test_flush_htable(tmp_path: Path) -> None:
    """Booted with ima_flush_htable the kernel refuses N: without staging it can only be exported."""
    host = Host(tmp_path / "a", "delete_n", count=5, flush_htable=True)
    host.export()
    assert reason_of(host.trim).reason == "export_only"
    host = Host(tmp_path / "b", "staged", count=5, flush_htable=True)
    assert host.run()[1] == 6
    host.configure(trim_after="never")
    host.grow(2)
    host.export()
    host.configure(trim_after="local")
    assert host.trim() == 0
    assert reason_of(lambda: host.trim(7)).reason == "staged_whole"
    assert host.run()[1] == 2
    oracle(host)


def test_head_changed(tmp_path: Path) -> None:
    host = Host(tmp_path, count=20)
    host.export()
    _emulated.foreign_trim(host.kernel, 2)
    held = host.held()
    error = reason_of(host.trim)
    assert (error.reason, error.details["index"]) == ("head_changed", 0)
    assert host.held() == held
    assert host.run()[1] == 19
    oracle(host)


def test_head_changed_staged(tmp_path: Path) -> None:
    """Somebody else deleted the staged list and staged what came after it."""
    host = Host(tmp_path, "staged", count=5)
    host.export()
    files = host.config().lists()
    with files.writer(staged=True) as file:
        file.write(b"D\n")
        host.grow(6)
        file.write(b"A\n")
    assert reason_of(host.trim).reason == "head_changed"
    assert len(parse(host.held())) == 6
    host.run()
    oracle(host)


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_trimming_before_the_first_export(tmp_path: Path, flavour: str) -> None:
    """There is nothing to trim, and the empty spool stays one that can be used."""
    host = Host(tmp_path, flavour, count=3)
    for check in (True, False):
        try:
            assert _host.trim(host.config(), "cut", 0, 0, False, check)["trimmed"] == 0
        except ImaError as error:
            assert error.reason in ("no_shard", "export_only")
    host.export()
    oracle(host)


def test_numbers_of_another_boot(tmp_path: Path) -> None:
    """Trimming without looking first, after a reboot: the numbers of the last boot delete nothing in this one."""
    host = Host(tmp_path, count=20)
    host.export()
    host.reboot()
    host.grow(30)
    assert host.trim() == 0
    assert reason_of(lambda: host.trim(5)).reason == "not_sealed"
    assert len(parse(host.held())) == 31


# --- somebody else trims ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("banks", [TPM, NO_TPM], ids=str)
@pytest.mark.parametrize("gone", [1, 7, 20])
@pytest.mark.parametrize("flavour", TRIMMING)
def test_foreign_trim_of_sealed_records(tmp_path: Path, flavour: str, gone: int, banks: list[str]) -> None:
    host = Host(tmp_path, flavour, "never", count=20, banks=banks)
    host.export()
    _emulated.foreign_trim(host.kernel, gone)
    host.grow(2)
    assert host.export().base == gone
    assert host.faults() == [("foreign_trim", gone, False)]
    oracle(host)
    host.configure(trim_after="local")
    host.run()
    assert len(parse(host.held())) == 0 if flavour == "delete_n" else True
    oracle(host)
    assert host.faults() == [("foreign_trim", gone, False)]


def test_foreign_trim_of_exactly_what_is_sealed_is_noted(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "central", count=20)
    host.export()
    _emulated.foreign_trim(host.kernel, 21)
    host.grow(3)
    assert host.export().cut == 24
    oracle(host)
    assert host.faults() == [("foreign_trim", 21, False)]


def test_foreign_trim_without_new_records_is_noted_later(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "central", count=20)
    host.export()
    _emulated.foreign_trim(host.kernel, 5)
    host.export()
    assert host.faults() == []
    host.grow(1)
    host.export()
    assert host.faults() == [("foreign_trim", 5, False)]
    oracle(host)


# Without a TPM nothing tells that a list does not begin at the cut, when all before it had been trimmed.
@pytest.mark.parametrize(("banks", "trimmed"), [(TPM, False), (TPM, True), (NO_TPM, False)], ids=str)
@pytest.mark.parametrize("flavour", TRIMMING)
def test_foreign_trim_of_unsealed_records(tmp_path: Path, flavour: str, banks: list[str], trimmed: bool) -> None:
    host = Host(tmp_path, flavour, "local" if trimmed else "never", count=9, banks=banks)
    host.run()
    host.configure(trim_after="never")
    host.grow(12)
    _emulated.foreign_trim(host.kernel, 2 + (0 if trimmed else 10))
    spans, held = host.spans(), host.held()
    for _time in range(2):
        error = reason_of(host.export)
        assert (error.reason, error.details["index"]) == ("foreign_trim", 10)
        assert "kernel" in error.kept
    host.configure(trim_after="local")
    for _time in range(2):
        assert reason_of(host.export).reason == "foreign_trim"
        assert reason_of(host.trim).reason == "foreign_trim"
    assert (host.spans(), host.held()) == (spans, held)

    host.reboot()
    host.grow(3)
    done, gone = host.run()
    assert (done.records, gone) == (4, 4)
    assert host.faults() == [("foreign_trim", 10, True)]
    oracle(host)
    spool = Spool(host.spool)
    assert spool.manifest(spool.entries[-1])["faults"][0]["boot_id"] == spool.entries[0].boot_id
    host.grow(2)
    host.run()
    assert len(host.faults()) == 1, "the fault is told once"


@pytest.mark.parametrize("flavour", TRIMMING)
def test_foreign_trim_before_a_limited_export(tmp_path: Path, flavour: str) -> None:
    """All that was sealed is trimmed, then others trim unsealed records: a piece of the backlog must not be sealed."""
    host = Host(tmp_path, flavour, count=4, shard_records=5)
    host.run()
    host.grow(20)
    _emulated.foreign_trim(host.kernel, 3)
    error = reason_of(lambda: host.export(limit=1))
    assert (error.reason, error.details["index"]) == ("foreign_trim", 5)
    assert host.spans() == [(1, 0, 5)]


def test_foreign_trim_before_an_export_with_a_stop(tmp_path: Path) -> None:
    host = Host(tmp_path, count=4)
    host.run()
    host.grow(20)
    _emulated.foreign_trim(host.kernel, 3)
    with pytest.raises(ImaError, match="somebody else trimmed"):
        host.export(stop=b"/emulated/0000/0000000012")
    assert host.spans() == [(1, 0, 5)]


def test_foreign_trim_in_the_first_boot(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)
    _emulated.foreign_trim(host.kernel, 1)
    error = reason_of(host.export)
    assert (error.reason, error.details["index"]) == ("foreign_trim", 0)
    assert host.spans() == []
    host.reboot()
    host.export()
    assert host.faults() == [("foreign_trim", 0, True)]
    oracle(host)


@pytest.mark.parametrize("banks", [TPM, NO_TPM], ids=str)
def test_an_empty_list(tmp_path: Path, banks: list[str]) -> None:
    host = Host(tmp_path, banks=banks)
    _emulated.foreign_trim(host.kernel, 1)
    assert reason_of(host.export).reason == "empty_list"
    assert host.spans() == []
    host.reboot()
    host.run()
    assert host.held() == b""
    host.export()  # empty because we trimmed it
    oracle(host)


# --- equal records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("banks", [TPM, NO_TPM], ids=str)
@pytest.mark.parametrize("flavour", TRIMMING)
def test_equal_records_after_a_deletion_of_unknown_outcome(tmp_path: Path, flavour: str, banks: list[str]) -> None:
    """The list begins with new records that equal the deleted ones: they must not be taken for those.

    With a TPM its values decide. Without one nothing does, and the tool must say so.
    """
    host = Host(tmp_path, flavour, count=4, banks=banks)
    host.run()
    host.violation(2)
    host.export()
    _emulated.lost_reply(host.kernel)
    assert reason_of(host.trim).reason == "delete_unknown"
    host.violation(2)
    if banks:
        host.run()
        assert host.faults() == []
        assert len(parse(host.sealed())) == 9
    else:
        try:
            host.run()
        except ImaError as error:
            assert error.reason == "ambiguous_base"
    oracle(host)


@pytest.mark.parametrize("banks", [TPM, NO_TPM], ids=str)
def test_equal_records_after_a_partial_deletion_of_unknown_outcome(tmp_path: Path, banks: list[str]) -> None:
    host = Host(tmp_path, count=4, banks=banks)
    host.violation(4)
    host.export()
    host.trim(5)
    _emulated.lost_reply(host.kernel)
    assert reason_of(lambda: host.trim(7)).reason == "delete_unknown"
    host.violation(2)
    try:
        host.run()
        assert host.faults() == []
    except ImaError as error:
        assert not banks and error.reason == "ambiguous_base"
    oracle(host)


@pytest.mark.parametrize("banks", [TPM, NO_TPM], ids=str)
@pytest.mark.parametrize("order", [(1, 1), (2, 1), (1, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("flavour", TRIMMING)
def test_the_same_violation_again_and_again(
    tmp_path: Path, flavour: str, order: tuple[int, int], banks: list[str]
) -> None:
    """Nothing went wrong: all was trimmed, then the same violation is recorded anew. It is a new record."""
    host = Host(tmp_path, flavour, count=2, shard_records=2, banks=banks)
    total = 3
    for _time in range(4):
        for count in order:
            host.violation(count)
            total += count
            host.run()
            oracle(host)
            assert len(parse(host.sealed())) == total
    host.grow(1)
    host.run()
    assert host.faults() == []
    oracle(host)


def test_ambiguous_base(tmp_path: Path) -> None:
    """A foreign trim somewhere among equal records: without a TPM its place cannot be known."""
    host = Host(tmp_path, "delete_n", "never", count=2, banks=NO_TPM)
    host.violation(6)
    host.export()
    host.journal(None)
    _emulated.foreign_trim(host.kernel, 5)
    host.violation(3)
    spans = host.spans()
    assert reason_of(host.export).reason == "ambiguous_base"
    assert host.spans() == spans
    oracle(host)


def test_equal_records_and_a_tpm(tmp_path: Path) -> None:
    """The list may be ahead of the TPM, so several starts fit, until something else is measured."""
    host = Host(tmp_path, "delete_n", "never", count=2)
    host.violation(6)
    host.export()
    _emulated.foreign_trim(host.kernel, 5)
    host.violation(3)
    try:
        assert host.export().base == 5
    except ImaError as error:
        assert error.reason == "ambiguous_base"
    oracle(host)
    host.grow(1)
    assert host.export().base == 5
    oracle(host)
    assert host.faults() == [("foreign_trim", 5, False)]


# --- reboot and kexec -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("banks", [TPM, NO_TPM], ids=str)
@pytest.mark.parametrize("trim_after", ["local", "never"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_reboot(tmp_path: Path, flavour: str, trim_after: str, banks: list[str]) -> None:
    host = Host(tmp_path, flavour, trim_after, count=9, banks=banks)
    for _time in range(3):
        host.run()
        oracle(host)
        host.grow(2)
        host.reboot()
        host.grow(3)
    host.run()
    assert [first for _sequence, first, _count in host.spans()] == [0, 7, 0, 0, 0]
    assert host.faults() == []
    oracle(host)


@pytest.mark.parametrize("banks", [TPM, NO_TPM], ids=str)
def test_a_reboot_that_measures_the_same_again(tmp_path: Path, banks: list[str]) -> None:
    """Equal lists in two boots are two histories."""
    same = [{"path": f"/bin/{number}", "content": str(number)} for number in range(5)]
    host = Host(tmp_path, "export_only", banks=banks)
    _emulated.feed(host.kernel, records=same)
    host.run()
    host.reboot()
    _emulated.feed(host.kernel, records=same)
    host.run()
    assert host.spans() == [(1, 0, 6), (2, 0, 6)]
    oracle(host)


@pytest.mark.parametrize("banks", [TPM, NO_TPM], ids=str)
@pytest.mark.parametrize("pending", [0, 3])
@pytest.mark.parametrize("trim_after", ["local", "never"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_kexec_with_carry_over(tmp_path: Path, flavour: str, trim_after: str, pending: int, banks: list[str]) -> None:
    """The list goes on: one epoch over two boots, also when all of it had been trimmed."""
    host = Host(tmp_path, flavour, trim_after, count=9, banks=banks)
    host.run()
    host.grow(pending)
    # Without a TPM an empty list that begins with a boot_aggregate looks like any new boot.
    held = host.held()
    host.kexec(True, same_epoch=bool(banks or held))
    host.grow(2)
    host.run()
    oracle(host, pcrs=bool(banks))
    assert host.faults() == []
    if banks or held:
        assert host.spans()[-1][1] == 10
    host.kexec(True, same_epoch=bool(banks or host.held()))
    host.kexec(True, same_epoch=bool(banks or host.held()))
    host.grow(1)
    host.run()
    oracle(host, pcrs=bool(banks))


def test_kexec_with_a_staged_leftover(tmp_path: Path) -> None:
    host = Host(tmp_path, "staged", count=9)
    host.run()
    host.grow(3)
    _emulated.kill_next(host.kernel, "after_stage")
    assert in_child(host.export) == signal.SIGKILL
    host.grow(2)
    assert host.state().staged is not None
    host.kexec(True)
    host.grow(1)
    done, trimmed = host.run()
    assert (done.records, trimmed) == (3 + 2 + 1 + 1, 7)
    oracle(host)
    assert host.faults() == []


def test_kexec_between_sealing_and_deleting(tmp_path: Path) -> None:
    for number, flavour in enumerate(TRIMMING):
        host = Host(tmp_path / str(number), flavour, "central", count=9)
        host.run()
        host.acknowledge()
        host.kexec(True)
        host.grow(1)
        host.run()
        oracle(host)
        host.acknowledge()
        host.run()
        assert host.held() == b""
        oracle(host)
        assert host.faults() == []


def test_kexec_without_carry_over_that_lost_records(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", count=9)
    host.run()
    host.grow(3)
    host.kexec(False, same_epoch=False)
    host.grow(2)
    assert reason_of(host.run).reason == "kexec"
    assert host.spans() == [(1, 0, 7), (2, 7, 3), (3, 0, 3)]
    assert host.faults() == [("kexec", 10, True)]
    held = host.held()
    assert len(parse(held)) == 3
    host.grow(1)
    assert reason_of(host.run).reason == "kexec"
    oracle(host, pcrs=False)
    host.reboot()
    host.run()
    oracle(host)
    assert host.held() == b""
    assert host.faults() == [("kexec", 10, True)]


def test_kexec_without_carry_over_that_lost_nothing(tmp_path: Path) -> None:
    for number, flavour in enumerate(FLAVOURS):
        host = Host(tmp_path / str(number), flavour, count=9)
        host.run()
        host.kexec(False)
        host.carried = 0
        host.grow(2)
        host.run()
        assert host.spans()[-1] == (3, 10, 3)
        assert host.faults() == []
        oracle(host)


def test_kexec_and_no_journal(tmp_path: Path) -> None:
    """Without its hint the place is still found by content."""
    host = Host(tmp_path, "delete_n", "central", count=9)
    host.export()
    host.acknowledge(sequence=1)
    host.trim()
    host.kexec(True)
    host.journal(None)
    host.grow(1)
    assert host.export().base == 7
    oracle(host)


def test_an_unknown_start(tmp_path: Path) -> None:
    """The first list that is ever seen does not give the TPM's values: nothing is deleted in this boot."""
    host = Host(tmp_path, count=3)
    _emulated.kexec(host.kernel, False)
    assert reason_of(host.run).reason == "pcr_mismatch"
    assert host.faults() == [("pcr_mismatch", 0, True)]
    assert len(parse(host.held())) == 1


# --- the kernel refuses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", TRIMMING)
def test_suspended(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, count=9)
    host.export()
    _emulated.suspend(host.kernel, True)
    held = host.held()
    assert reason_of(host.trim).reason == "suspended"
    assert host.held() == held
    _emulated.suspend(host.kernel, False)
    assert host.run()[1] == 10
    oracle(host)


def test_suspended_before_staging(tmp_path: Path) -> None:
    host = Host(tmp_path, "staged", count=9)
    _emulated.suspend(host.kernel, True)
    assert reason_of(host.export).reason == "suspended"
    assert host.spans() == []
    host.kexec(True)
    host.run()
    oracle(host)


def test_fewer_records(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)
    host.export()
    _emulated.fail_next(host.kernel, "enoent")
    assert reason_of(host.trim).reason == "fewer_records"
    assert len(parse(host.held())) == 10
    assert host.run()[1] == 10
    oracle(host)


@pytest.mark.parametrize("flavour", TRIMMING)
def test_lost_reply(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, count=9)
    host.export()
    _emulated.lost_reply(host.kernel)
    assert reason_of(host.trim).reason == "delete_unknown"
    host.grow(4)
    done, trimmed = host.run()
    assert (done.base, done.records, trimmed) == (10, 4, 4)
    oracle(host)
    assert host.faults() == []


@pytest.mark.parametrize("flavour", TRIMMING)
def test_lost_reply_and_lost_journal(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, count=9)
    host.export()
    _emulated.lost_reply(host.kernel)
    assert reason_of(host.trim).reason == "delete_unknown"
    host.journal(None)
    host.grow(4)
    host.run()
    oracle(host)
    assert [lost for _reason, _index, lost in host.faults()] in ([], [False])


def busy(host: Host) -> ImaError:
    """Return why nothing can be deleted: asked for where that is a call of its own, else noted by an export."""
    if host.state().flavour == "delete_n":
        return reason_of(host.trim)
    cycle = host.cycle()
    done = cycle.export()
    assert done.records == 10 and done.notes == [f"nothing can be deleted: {cycle.busy.msg}"]
    return cycle.busy


@pytest.mark.parametrize("flavour", TRIMMING)
def test_phantom_reader(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, count=9)
    if flavour == "delete_n":
        host.export()
    _emulated.phantom(host.kernel)
    error = busy(host)
    assert error.reason == "list_busy" and error.details["holders"] == []
    assert "phantom" in error.hint
    assert len(parse(host.held())) == 10
    host.reboot()
    host.run()
    oracle(host)


@pytest.mark.parametrize("flavour", TRIMMING)
def test_list_held_by_another_process(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, count=9)
    if flavour == "delete_n":
        host.export()
    path = _emulated.recorded(host.kernel)[-1].path
    holder = subprocess.Popen(
        ["flock", "-s", "-o", path, "sh", "-c", "echo ready; exec sleep 60"], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"ready\n"
        error = busy(host)
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    assert error.reason == "list_busy"
    assert holder.pid in [each["pid"] for each in error.details["holders"]]
    assert "flock" in str(error)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            host.run()
            break
        except ImaError as again:
            assert again.reason == "list_busy"
    oracle(host)
    assert host.held() == b""


# --- a killed run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before_delete", "after_delete", "after_stage"])
@pytest.mark.parametrize("flavour", TRIMMING)
def test_killed_at_the_kernel(tmp_path: Path, flavour: str, moment: str) -> None:
    if (flavour, moment) == ("delete_n", "after_stage"):
        moment = "after_delete"
    host = Host(tmp_path, flavour, count=9)
    host.run()
    host.grow(8)
    _emulated.kill_next(host.kernel, moment)
    assert in_child(host.run) == signal.SIGKILL
    oracle(host)
    host.grow(3)
    done, _trimmed = host.run()
    if moment == "after_stage":
        assert done.notes == ["found a staged list that an earlier run left"]
    oracle(host)
    host.run()
    assert host.held() == b""
    assert host.faults() == []
    oracle(host)


# --- anchors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_anchor(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, count=9)
    assert reason_of(host.anchor).reason == "no_shard"
    host.run()
    made = host.anchor()
    assert (made.index, made.made) == (10, True)
    again = host.anchor()
    assert again == _snapshot.Anchor(made.name, made.sha256, 10, False)
    content = Path(host.spool, "anchors", made.name).read_bytes()
    spool = Spool(host.spool)
    text = host.cycle().aggregate()["text"]
    assert content.startswith(text.encode() + b"\n")
    assert text.startswith("Snapshot_Attempt_Count=2;sha1:PCR10:")
    assert spool.digest(spool.entries[-1]).encode() in content
    host.grow(1)
    host.run()
    manifest = Spool(host.spool).manifest(Spool(host.spool).entries[-1])
    assert manifest["anchors"] == [{"index": 10, "sequence": 2, "sha256": made.sha256}]
    oracle(host)
    assert host.anchor().name != made.name


def test_anchor_not_measured(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9, policy=False)
    host.run()
    made = host.anchor()
    assert (made.index, made.made) == (None, True)
    assert host.anchor().index is None
    error = reason_of(lambda: _host.trim(host.config(), "cut", 0, 0, True, False))
    assert error.reason == "anchor_not_measured"
    oracle(host)


def test_a_file_with_an_anchors_name_is_no_anchor(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)
    host.run()
    path = os.path.join(host.spool, "anchors", "00000001-0123456789abcdef.aggregate")
    Path(path).write_text("made up\n")
    _emulated.feed(host.kernel, records=[{"path": path, "content": "something else\n"}])
    host.run()
    spool = Spool(host.spool)
    assert [spool.manifest(entry)["anchors"] for entry in spool.entries] == [[], [], []]


@pytest.mark.parametrize("flavour", TRIMMING)
def test_an_anchor_becomes_the_first_record(tmp_path: Path, flavour: str) -> None:
    host = Host(tmp_path, flavour, "local", count=9)
    result = _host.trim(host.config(), "cut", 0, 0, True, False)
    assert result["anchor"]["index"] == 10
    assert (result["trimmed"], result["base"]) == (10, 10)
    first = parse(host.held())[0]
    assert b".aggregate" in first.data
    oracle(host)
    assert _host.trim(host.config(), "cut", 0, 0, True, False)["changed"] is False
    host.grow(2)
    host.run()
    oracle(host)


def test_the_nth_anchor(tmp_path: Path) -> None:
    host = Host(tmp_path, count=9)
    indexes = []
    for _number in range(3):
        host.export()
        indexes.append(host.anchor().index)
        host.grow(4)
    host.export()
    cycle = host.cycle()
    assert cycle.anchor_indexes() == indexes
    assert reason_of(lambda: _host.trim(host.config(), "anchor", 0, 4, False, False)).reason == "no_anchor"
    for number, index in ((3, indexes[0]), (2, indexes[1]), (1, indexes[2])):
        assert _host.trim(host.config(), "anchor", 0, number, False, False)["base"] == index
        assert b".aggregate" in parse(host.held())[0].data
        oracle(host)
    assert reason_of(lambda: _host.trim(host.config(), "anchor", 0, 1, False, False)).reason == "no_anchor"


@pytest.mark.parametrize("found", [False, True], ids=["not measured", "measured"])
def test_an_anchor_that_a_dead_run_made(tmp_path: Path, found: bool) -> None:
    host = Host(tmp_path, count=9)
    host.run()
    made = host.anchor()
    if not found:
        # The file is there, the record is not: as if we had died between the two.
        fresh = Host(tmp_path / "fresh", count=9)
        fresh.run()
        fresh_cycle = fresh.cycle()
        fresh_head = fresh_cycle.spool.head
        assert fresh_head is not None
        manifest, digest = fresh_cycle.spool.manifest(fresh_head), fresh_cycle.spool.digest(fresh_head)
        name = _snapshot.anchor_name(manifest, digest)
        Path(fresh.spool, "anchors", name).write_bytes(_snapshot.anchor_content(manifest, digest))
        host = fresh
        assert host.anchor() == _snapshot.Anchor(name, host.anchor().sha256, 10, False)
    else:
        assert host.anchor().index == made.index
    host.run()
    oracle(host)


# --- contents ---------------------------------------------------------------------------------------------------------


def test_records_of_another_pcr(tmp_path: Path) -> None:
    host = Host(tmp_path, count=3)
    host.run()
    for number in range(4):
        _emulated.feed(host.kernel, records=[{"path": f"/eleven/{number}", "content": "x", "pcr": 11}])
        host.grow(number)
        host.run()
        oracle(host)
    spool = Spool(host.spool)
    assert sorted(spool.manifest(spool.entries[-1])["pcrs_end"]) == ["10", "11"]
    observed = spool.manifest(spool.entries[-1])["observed"]
    assert observed["pcrs"] == {pcr: host.state().pcrs[pcr] for pcr in ("10", "11")}
    assert observed["index"] == spool.entries[-1].end


def test_padded_banks(tmp_path: Path) -> None:
    banks = ["sha1", "sha256", "sha384"]
    for number, padded in enumerate((["sha384"], ["sha256", "sha384"])):
        host = Host(tmp_path / str(number), count=9, banks=banks, padded=padded)
        host.run()
        host.violation(2)
        host.grow(3)
        host.run()
        spool = Spool(host.spool)
        assert {tuple(spool.manifest(entry)["padded"]) for entry in spool.entries} == {tuple(padded)}
        oracle(host)
        host.kexec(True)
        host.run()
        oracle(host)


@pytest.mark.parametrize("template", ["ima", "ima-ng", "ima-sig", "ima-ngv2", "ima-buf"])
def test_templates(tmp_path: Path, template: str) -> None:
    host = Host(tmp_path, count=5)
    _emulated.grow(host.kernel, 5, template)
    host.run()
    oracle(host)


@pytest.mark.parametrize("stage", ["A", "E"])
@pytest.mark.parametrize("release", ["6.1.192", "6.12.107", "7.3.4"])
def test_real_lists(tmp_path: Path, release: str, stage: str) -> None:
    capture = CAPTURES / "fixtures" / f"k{release}.A.binary_sha1"
    host = Host(tmp_path, "delete_n", capture=str(capture))
    host.run()
    if stage == "E":
        host.grow(10)
        host.run()
    oracle(host)
    assert host.sealed().startswith(capture.read_bytes())


def test_shard_records(tmp_path: Path) -> None:
    for size in (1, 3, 10, 11):
        host = Host(tmp_path / str(size), "export_only", count=9, shard_records=size)
        done = host.export(limit=2)
        assert len(done.entries) == (1 if size >= 10 else 2)
        assert done.more == (size < 5)
        while host.export(limit=1).records:
            oracle(host)
        full = [min(size, 10 - first) for first in range(0, 10, size)]
        assert [count for _sequence, _first, count in host.spans()] == full


def test_a_backlog_needs_no_descriptor_for_each_shard(tmp_path: Path) -> None:
    """A long list and small shards: the number of open files is not the number of shards."""
    host = Host(tmp_path, "export_only", count=199, shard_records=2)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (80, hard))
    try:
        host.export()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(host.spans()) == 100
    oracle(host)


def test_the_clock_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(tmp_path, count=3)
    for now in ("2038-01-20T00:00:00Z", "1970-01-01T00:00:00Z", "2026-11-21T00:00:00Z"):
        monkeypatch.setattr(_snapshot, "utc_now", lambda now=now: now)
        host.run()
        host.grow(2)
        oracle(host)
    assert host.spans() == [(1, 0, 4), (2, 4, 2), (3, 6, 2)]


# --- a list that is not what the kernel writes ------------------------------------------------------------------------


class Bent(File):
    """A list file whose bytes are changed on their way."""

    def __init__(self, file: File, change: t.Callable[[bytes], bytes]) -> None:
        self._file, self._change = file, change
        self._data: bytes | None = None
        self._at = 0

    def read(self, size: int) -> bytes:
        if self._data is None:
            self._data = self._change(b"".join(iter(lambda: self._file.read(65536), b"")))
        data = self._data[self._at : self._at + size]
        self._at += len(data)
        return data

    def write(self, data: bytes) -> int:
        return self._file.write(data)

    def rewind(self) -> None:
        self._file.rewind()
        self._at = 0

    def close(self) -> None:
        self._file.close()


def flip(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:] if data else data


BENT: dict[str, tuple[t.Callable[[bytes], bytes], str]] = {
    "cut in a record": (lambda data: data[:-1], "truncated"),
    "a bit": (flip, "digest_mismatch"),
    "zeros behind": (lambda data: data + bytes(60), "malformed_list"),
    "text": (lambda data: b"10 " + data.hex().encode(), "malformed_list"),
    "other byte order": (
        lambda data: b"".join(data[at : at + 4][::-1] for at in range(0, len(data), 4)),
        "",
    ),
}


@pytest.mark.parametrize("bent", BENT)
@pytest.mark.parametrize("later", [False, True], ids=["first", "later"])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_a_bent_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flavour: str, later: bool, bent: str) -> None:
    host = Host(tmp_path, flavour, "never", count=9)
    if later:
        host.run()
        host.grow(9)
    files, spans = host.files(), host.spans()
    change, reason = BENT[bent]
    real = _emulated.EmulatedFiles.open

    def opened(self: t.Any, name: str, flags: int) -> File:
        file = real(self, name, flags)
        return Bent(file, change) if name == "binary_runtime_measurements" else file

    with monkeypatch.context() as patch:
        patch.setattr(_emulated.EmulatedFiles, "open", opened)
        error = reason_of(host.export)
    assert error.reason == reason or not reason
    assert host.spans() == spans
    if later:
        kept = {name: digest for name, digest in host.files().items() if name != "journal.json"}
        assert kept == {name: digest for name, digest in files.items() if name != "journal.json"}
    host.run()
    oracle(host)


@pytest.mark.parametrize("change", ["record taken out", "records swapped", "record doubled"])
def test_a_list_that_does_not_replay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Every record is whole, but not all of them are there, or not in order: the TPM knows."""
    host = Host(tmp_path, "delete_n", count=9)

    def bend(data: bytes) -> bytes:
        raws = [record.raw for record in parse(data)]
        if change == "record taken out":
            del raws[4]
        elif change == "records swapped":
            raws[4], raws[5] = raws[5], raws[4]
        else:
            raws.insert(4, raws[4])
        return b"".join(raws)

    real = _emulated.EmulatedFiles.open
    with monkeypatch.context() as patch:
        patch.setattr(
            _emulated.EmulatedFiles,
            "open",
            lambda self, name, flags: (
                Bent(real(self, name, flags), bend)
                if name == "binary_runtime_measurements"
                else real(self, name, flags)
            ),
        )
        assert reason_of(host.run).reason == "pcr_mismatch"
    assert len(parse(host.held())) == 10, "nothing is deleted"


# --- journal and spool ------------------------------------------------------------------------------------------------


JOURNALS: dict[str, bytes | None] = {
    "gone": None,
    "empty": b"",
    "torn": b'{"base":0,"boot',
    "foreign": b"\x00\xff" * 100,
    "deep": b'{"base":0,"boot_id":null,"faults":[],"seal":'
    + b'{"a":' * 940
    + b"1"
    + b"}" * 940
    + b',"trim":null,"version":1}',
    "lies": b'{"base":3,"boot_id":null,"faults":[],"seal":null,"trim":null,"version":1}',
    "far": b'{"base":9007199254740992,"boot_id":null,"faults":[],"seal":null,"trim":null,"version":1}',
}


@pytest.mark.parametrize("journal", JOURNALS)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_journal_is_a_hint(tmp_path: Path, flavour: str, journal: str) -> None:
    host = Host(tmp_path, flavour, "central", count=9)
    host.export()
    for step in range(6):
        host.journal(JOURNALS[journal])
        if step == 1:
            host.acknowledge()
        if step == 4:
            host.acknowledge(sequence=2)
        if step % 2:
            host.grow(step)
        host.run()
        oracle(host)
    assert all(not lost for _reason, _index, lost in host.faults())
    assert host.spans()[-1][1] + host.spans()[-1][2] == 10 + 1 + 3 + 5


def test_a_true_journal_of_another_boot(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", count=9)
    host.run()
    journal = Path(host.spool, "journal.json").read_bytes()
    host.reboot()
    host.grow(30)
    host.journal(journal)
    host.run()
    oracle(host)
    assert host.faults() == []


@pytest.mark.parametrize("journal", ["old", "gone"])
@pytest.mark.parametrize("trimmed", [1, 5, 10])
def test_a_spool_from_a_backup(tmp_path: Path, trimmed: int, journal: str) -> None:
    """The spool is older than what was trimmed: records are missing, and no second history is begun."""
    host = Host(tmp_path, "delete_n", count=9)
    host.export()
    host.trim(trimmed)
    shutil.copytree(host.spool, tmp_path / "backup")
    host.grow(9)
    host.run()
    host.grow(3)
    shutil.rmtree(host.spool)
    shutil.copytree(tmp_path / "backup", host.spool)
    if journal == "gone":
        host.journal(None)
    spans, held = host.spans(), host.held()
    for _time in range(2):
        error = reason_of(host.run)
        assert (error.reason, error.details["index"]) == ("foreign_trim", 10)
    assert (host.spans(), host.held()) == (spans, held)
    host.reboot()
    host.run()
    assert host.faults() == [("foreign_trim", 10, True)]


def test_a_spool_from_a_backup_while_nothing_was_trimmed(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", "never", count=9)
    host.export()
    shutil.copytree(host.spool, tmp_path / "backup")
    host.grow(9)
    host.export()
    shards = {name: digest for name, digest in host.files().items() if name.endswith(".gz")}
    shutil.rmtree(host.spool)
    shutil.copytree(tmp_path / "backup", host.spool)
    host.export()
    assert {name: digest for name, digest in host.files().items() if name.endswith(".gz")} == shards
    oracle(host)


def test_a_spool_that_was_emptied(tmp_path: Path) -> None:
    host = Host(tmp_path, "delete_n", count=9)
    host.run()
    host.grow(3)
    shutil.rmtree(host.spool)
    assert reason_of(host.export).reason in ("lock_missing", "spool_missing")
    os.mkdir(host.spool)
    error = reason_of(host.export)
    assert (error.reason, error.details["index"]) == ("foreign_trim", 0)
    assert host.spans() == []
    assert len(parse(host.held())) == 3


def test_the_fault_is_told_once_whatever_dies(tmp_path: Path) -> None:
    """Sealed, and killed before the journal forgot the fault: several shards were sealed at once."""
    host = Host(tmp_path, "delete_n", "never", count=9)
    host.export()
    _emulated.foreign_trim(host.kernel, 4)
    host.export()
    journal = Path(host.spool, "journal.json").read_bytes()
    assert b"foreign_trim" in journal
    host.grow(20)
    host.export()
    host.journal(journal)
    host.grow(1)
    host.export()
    assert host.faults() == [("foreign_trim", 4, False)]


def test_predict_writes_nothing(tmp_path: Path) -> None:
    for number, flavour in enumerate(FLAVOURS):
        host = Host(tmp_path / str(number), flavour, count=9)
        assert host.cycle().predict()[1] == 10
        assert host.files() == {}
        host.run()
        host.grow(2)
        files, state = host.files(), host.state()
        assert host.cycle().predict()[1] == 2
        host.cycle().survey(write=False)
        assert (host.files(), host.state()) == (files, state)


# --- size -------------------------------------------------------------------------------------------------------------


BIG = """
import os, resource, sys
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
os.fsync = lambda descriptor: None
from ansible_collections.integrity.ima.plugins.module_utils import _host, _protocol
config = _protocol.load(sys.argv[1])
with _protocol.Lock(config):
    cycle = _host.cycle_of(config)
    done = cycle.export()
    print(done.records, len(done.entries), cycle.trim())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("count", [200000, 1000000] if os.environ.get("LONG") == "1" else [200000])
def test_a_big_list_in_little_memory(tmp_path: Path, count: int) -> None:
    host = Host(tmp_path, "delete_n", count=count - 1, shard_records=50000)
    # What a process that did nothing yet was forked from must not count: a child begins with its parent's peak.
    paths = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-c", BIG, host.conf]
    answer = subprocess.run(
        ["env", f"PYTHONPATH={paths}", *command], stdout=subprocess.PIPE, check=True, timeout=600
    ).stdout.decode()
    first, second = answer.splitlines()
    assert first == f"{count} {count // 50000} {count}"
    assert int(second) < 64 << 10, f"{second} KiB over the interpreter's own"
    assert host.held() == b""
    spans = host.spans()
    assert spans[-1][1] + spans[-1][2] == count


def test_a_measured_file_with_the_name_of_no_anchor_is_a_file(tmp_path: Path) -> None:
    """Sequence numbers begin at 1: as an anchor of shard 0 it would fit no manifest, and stop every export."""
    host = Host(tmp_path)
    host.run()
    path = Path(host.spool, "anchors", f"{0:08}-{'a' * 16}.aggregate")
    path.write_bytes(b"somebody's")
    assert _emulated.feed(host.kernel, records=[{"path": str(path), "content": "somebody's"}]) == 1
    host.run()
    spool = Spool(host.spool)
    assert spool.head and spool.manifest(spool.head)["anchors"] == []
    oracle(host)
