# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The fleet's documents: what each host is said to claim, and that a document is written whole or not at all."""

from __future__ import annotations

import json
import os
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, StoreError
from ansible_collections.integrity.ima.plugins.module_utils._fleet import document, member, missing, new_run
from ansible_collections.integrity.ima.plugins.module_utils._schema import (
    CLAIM,
    FLEET,
    MISSING,
    canonical,
    check,
    parse,
)
from ansible_collections.integrity.ima.plugins.module_utils._store._base import RUN
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> DirectoryStore:
    return support.new_store(tmp_path / "store")


@pytest.fixture(name="result")
def _result(tmp_path: Path, store: DirectoryStore) -> support.Json:
    host = support.Host(tmp_path / "h")
    host.grow(9)
    return host.rotate(store)


def test_a_claim_says_where_the_host_stands(result: support.Json) -> None:
    claim = member(result)
    assert check(claim, CLAIM) == "" and claim == result["claim"]
    assert (claim["status"], claim["sequence"], claim["index"], claim["records"]) == ("present", 2, 10, 10)
    assert claim["aggregate_digest"] == result["aggregate_digest"] and claim["emulated"] is True


def test_a_rotation_with_nothing_new_claims_no_new_records(tmp_path: Path) -> None:
    host, store = support.Host(tmp_path / "h"), support.new_store(tmp_path / "store")
    host.grow(3)
    first = host.rotate(store)
    assert dict(host.rotate(store)["claim"], time="") == dict(first["claim"], time="", records=0)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (None, "not_run"),
        ({}, "not_run"),
        ("x", "not_run"),
        ([1], "not_run"),
        ({"unreachable": True, "msg": "no route"}, "unreachable"),
        ({"failed": True, "msg": "MODULE FAILURE"}, "failed"),
        ({"changed": False}, "no_shard"),
        ({"claim": None}, "no_shard"),
        ({"failed": True, "claim": {"status": "missing", "reason": "locked", "message": "busy"}}, "locked"),
        ({"claim": {"status": "missing", "reason": "../x", "message": "busy"}}, "no_shard"),
        ({"skipped": True, "claim": {"status": "present"}}, "no_shard"),
    ],
)
def test_why_a_host_is_missing(result: t.Any, reason: str) -> None:
    said = member(result)
    assert (said["status"], said["reason"]) == ("missing", reason) and check(said, MISSING) == ""


def test_a_claim_that_is_not_of_the_schema_is_not_believed(result: support.Json) -> None:
    for change in ({"sequence": 0}, {"pcrs": []}, {"extra": 1}, {"aggregate_digest": "x"}, {"boot_id": "../.."}):
        assert member(dict(result, claim=dict(result["claim"], **change)))["status"] == "missing"


def test_a_message_is_made_printable_and_bounded() -> None:
    said = missing("failed", "\x1b[31m\n\0" + "x" * 10**5, index=None, boot_id=None)
    assert check(said, MISSING) == "" and said["message"].isprintable() and len(said["message"]) == 2000
    assert sorted(said) == ["message", "reason", "status"]
    assert missing("kexec", "x", index=7)["index"] == 7
    json.dumps(missing("failed", "\udcff"), ensure_ascii=False).encode("utf-8")


def test_names_of_runs_sort_and_are_never_used_twice() -> None:
    runs = {new_run() for _number in range(50)}
    assert len(runs) == 50 and all(RUN.match(run) for run in runs)


def test_a_document_is_canonical_and_fits_its_schema(store: DirectoryStore, result: support.Json) -> None:
    run = new_run()
    whole = document(run, {"h": member(result), "web 1/ä": member(None)})
    store.write_run(whole)
    path = os.path.join(store.directory, "fleet", run + ".json")
    data = Path(path).read_bytes()
    assert data == canonical(whole) and data.isascii()
    assert parse(data, FLEET, "it", StoreError) == whole == store.run(run)
    assert store.runs() == [run] and os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "change",
    [
        {"run": "../../etc/x"},
        {"run": "20260102T030405Z-0000000G"},
        {"version": 2},
        {"time": "now"},
        {"hosts": []},
        {"hosts": {"": {"status": "missing", "reason": "x", "message": ""}}},
        {"hosts": {"h" * 254: {"status": "missing", "reason": "x", "message": ""}}},
        {"hosts": {"h": {"status": "fine"}}},
        {"hosts": {"h": None}},
    ],
    ids=str,
)
def test_what_is_not_of_the_schema_is_not_written(store: DirectoryStore, change: support.Json) -> None:
    before = support.tree(os.path.dirname(store.directory))
    with pytest.raises(StoreError):
        store.write_run(dict(document(new_run(), {}), **change))
    assert support.tree(os.path.dirname(store.directory)) == before


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
def test_a_document_is_written_whole_or_not_at_all(
    store: DirectoryStore, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    support.write_fleet(store, 1, {"h": None})
    before = support.tree(store.directory)

    def fails(*_args: t.Any, **_options: t.Any) -> t.NoReturn:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(_durable.os, call, fails)
        with pytest.raises(ImaError) as caught:
            support.write_fleet(store, 2, {"h": None})
    assert caught.value.reason == "no_space"
    assert support.tree(store.directory) == before and len(store.runs()) == 1


def test_a_large_fleet(store: DirectoryStore, result: support.Json) -> None:
    run = support.write_fleet(store, 1, {f"host{number}": result for number in range(2500)})
    assert os.path.getsize(os.path.join(store.directory, "fleet", run + ".json")) > 1 << 20
    assert len(store.run(run)["hosts"]) == 2500
