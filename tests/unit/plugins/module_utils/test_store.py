# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The store in a directory: names, write-once, what a foreign hand left in it, and deliveries that were cut off."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import typing as t
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils import _host as host_side
from ansible_collections.integrity.ima.plugins.module_utils._errors import (
    ImaError,
    ManifestError,
    StoreError,
    WriteError,
)
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._shard import digest
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Head, decode_name, encode_name
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import verify
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

FORMAT = b'{"format":"integrity.ima store","version":1}'
quick = settings(deadline=None, max_examples=200)


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> DirectoryStore:
    return support.new_store(tmp_path / "store")


@pytest.fixture(name="host")
def _host(tmp_path: Path) -> support.Host:
    return support.Host(tmp_path / "h")


class Died(BaseException):
    """The controller's process is gone."""


def dies(*_args: t.Any, **_options: t.Any) -> t.NoReturn:
    raise Died


# -- names -------------------------------------------------------------------------------------------------------


@quick
@given(st.text(min_size=1, max_size=80))
@example(".")
@example("..")
@example(".hidden")
@example("../../etc/passwd")
@example("/etc/passwd")
@example("a/b")
@example("a\0b")
@example("%2E")
@example("%")
@example("evidence")
@example("a b\n\t")
@example("\u00e9\u4e16\U0001f600")
def test_a_name_round_trips_and_is_one_safe_path_component(name: str) -> None:
    try:
        component = encode_name(name)
    except StoreError as error:
        assert error.reason == "host_name" and len(name.encode("utf-8")) > 80
        return
    assert decode_name(component) == name
    assert component.isascii() and component.isprintable() and "/" not in component and not component.startswith(".")
    assert 0 < len(component) <= 250
    assert os.path.normpath(os.path.join("/store/hosts", component)) == "/store/hosts/" + component


@quick
@given(st.text(max_size=30), st.text(max_size=30))
def test_two_names_never_share_a_directory(one: str, other: str) -> None:
    if one and other and one != other:
        assert encode_name(one) != encode_name(other)


@pytest.mark.parametrize("name", ["", "a" * 251, "\u00e9" * 100, "\udcff"], ids=["empty", "long", "long-utf8", "lone"])
def test_a_name_that_has_no_component_is_refused_by_reason(name: str) -> None:
    with pytest.raises(StoreError) as caught:
        encode_name(name)
    assert caught.value.reason == "host_name"


@pytest.mark.parametrize("component", ["%2e", "%41", "a%2Fb%2f", "..", ".lock", "%FF", "%zz", "a b", "", "a" * 251])
def test_a_component_that_is_not_ours_is_none(component: str) -> None:
    assert decode_name(component) is None


def test_a_component_of_bytes_that_are_not_utf8_is_none() -> None:
    assert decode_name(os.fsdecode(b"\xff\xfe")) is None


# -- what is a store ---------------------------------------------------------------------------------------------


def test_the_layout_is_what_the_documentation_says(tmp_path: Path) -> None:
    host = support.Host(tmp_path / "h", name="web 1/ä")
    store = support.new_store(tmp_path / "store")
    host.grow(9)
    result = host.rotate(store)
    assert result["delivered"] == 2
    boot = result["claim"]["boot_id"]
    directory = tmp_path / "store" / "hosts" / "web%201%2F%C3%A4"
    assert sorted(os.listdir(directory / boot)) == [
        "00000001-0-7.ima.gz",
        "00000001-0-7.json",
        "00000002-7-3.ima.gz",
        "00000002-7-3.json",
    ]
    assert (tmp_path / "store" / "format.json").read_bytes() == FORMAT
    assert store.hosts() == ["web 1/ä"]
    assert os.listdir(directory / ".incoming") == []
    assert [(entry.sequence, entry.first, entry.count) for entry in store.entries(host.name)] == [(1, 0, 7), (2, 7, 3)]
    assert digest((directory / boot / "00000002-7-3.json").read_bytes()) == result["aggregate_digest"]


def test_an_empty_directory_becomes_a_store_only_with_the_first_delivery(tmp_path: Path) -> None:
    store = support.new_store(tmp_path / "store")
    assert os.listdir(store.directory) == [] and store.hosts() == [] and store.runs() == []
    with store.delivering("h"):
        assert (tmp_path / "store" / "format.json").read_bytes() == FORMAT


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"format":"integrity.ima store","version":2}', "newer_version"),
        (b'{"format":"integrity.ima spool","version":1}', "store_foreign"),
        (b"", "store_foreign"),
        (b"\xff\0", "store_foreign"),
    ],
)
def test_a_store_of_another_program_or_version_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "format.json").write_bytes(content)
    with pytest.raises(StoreError) as caught:
        DirectoryStore(str(tmp_path))
    assert caught.value.reason == reason and caught.value.details["path"] == str(tmp_path)
    assert os.listdir(tmp_path) == ["format.json"]


def test_a_directory_with_something_else_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(StoreError) as caught:
        DirectoryStore(str(tmp_path))
    assert caught.value.reason == "store_foreign"


@pytest.mark.parametrize("path", ["/does/not/exist", "relative", "/dev/null", ""])
def test_a_missing_store_is_refused(path: str) -> None:
    with pytest.raises(StoreError) as caught:
        DirectoryStore(path)
    assert caught.value.reason == "store_missing" and caught.value.hint


def test_two_rotations_of_one_host_do_not_overlap(store: DirectoryStore, host: support.Host) -> None:
    host.grow(3)
    with store.delivering("h"):
        with pytest.raises(StoreError) as caught:
            host.rotate(DirectoryStore(store.directory))
        assert caught.value.reason == "store_busy"
        with store.delivering("another"):
            pass
    assert host.rotate(store)["delivered"] == 1


def test_the_lock_is_released_when_a_rotation_fails(store: DirectoryStore, host: support.Host) -> None:
    with pytest.raises(ImaError):
        host.rotation(store, call=lambda one_round: {"failed": True, "msg": "no"}).run()
    descriptor = os.open(os.path.join(support.base(store), ".lock"), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


# -- write once --------------------------------------------------------------------------------------------------


def deliver(store: DirectoryStore, sealed: support.Sealed, stored: bytes) -> None:
    data = canonical(sealed.manifest)
    with store.delivering("h"):
        store.receive("h", digest(data), 0, stored)
        store.finish("h", sealed.manifest)


def second_shard(sealed: support.Sealed) -> support.Sealed:
    """Another shard under the same name."""
    records = sealed.records
    records[-1] = support.altered(records[-1])
    other = support.Sealed(dict(sealed.manifest), b"".join(records))
    support.describe(other)
    return other


def test_a_second_shard_under_a_name_is_never_written_over_the_first(store: DirectoryStore, host: support.Host) -> None:
    host.grow(3)
    host.rotate(store)
    before = support.tree(store.directory)
    first = support.take(store)[0]
    with pytest.raises(WriteError) as caught:
        other = second_shard(first)
        deliver(store, other, support.zipped(other.raw))
    assert caught.value.reason == "exists_different"
    assert caught.value.details["found"] != caught.value.details["expected"]
    assert support.tree(store.directory) == before


def test_a_second_manifest_under_a_name_is_never_written_over_the_first(
    store: DirectoryStore, host: support.Host
) -> None:
    host.grow(3)
    host.rotate(store)
    before = support.tree(store.directory)
    first = support.take(store)[0]
    other = support.Sealed(dict(first.manifest, time="2020-01-01T00:00:00Z"), first.raw)
    with pytest.raises(WriteError) as caught:
        deliver(store, other, Path(support.paths(store, first)[0]).read_bytes())
    assert caught.value.reason == "exists_different"
    kept = support.tree(store.directory)
    assert {name: kept[name] for name in before} == before


def test_the_same_shard_again_is_no_change(store: DirectoryStore, host: support.Host) -> None:
    host.grow(3)
    host.rotate(store)
    before = support.tree(store.directory)
    first = support.take(store)[0]
    deliver(store, first, Path(support.paths(store, first)[0]).read_bytes())
    assert support.tree(store.directory) == before


def test_a_fleet_document_is_never_overwritten(store: DirectoryStore) -> None:
    run = support.write_fleet(store, 1, {"h": None})
    before = support.tree(store.directory)
    with pytest.raises(WriteError) as caught:
        store.write_run(dict(store.run(run), time="2020-01-01T00:00:00Z"))
    assert caught.value.reason == "exists_different" and support.tree(store.directory) == before


def test_what_does_not_fit_its_manifest_is_dropped_and_nothing_is_published(
    store: DirectoryStore, host: support.Host
) -> None:
    host.grow(3)
    host.rotate(store)
    sealed = support.take(store)[0]
    other = support.new_store(os.path.join(host.directory, "other"))
    data = canonical(sealed.manifest)
    with other.delivering("h"):
        other.receive("h", digest(data), 0, b"x" * sealed.manifest["stored_size"])
        with pytest.raises(ManifestError) as caught:
            other.finish("h", sealed.manifest)
        assert caught.value.reason == "shard_altered"
        assert other.unfinished("h") is None
    assert other.names("h")[0] == set()


# -- deliveries that were cut off --------------------------------------------------------------------------------


def shard_size(host: support.Host) -> int:
    found = 0
    for root, _directories, files in os.walk(os.path.join(host.spool, "shards")):
        found += sum(os.path.getsize(os.path.join(root, name)) for name in files if name.endswith(".ima.gz"))
    return found


@pytest.fixture(name="big")
def _big(tmp_path: Path) -> support.Host:
    """A host with one shard that needs several chunks."""
    host = support.Host(tmp_path / "big", shard_records=1000)
    host.grow(399)
    return host


def test_between_chunks(store: DirectoryStore, big: support.Host) -> None:
    def dies_at_third(number: int, answer: t.Any) -> t.Any:
        if number == 3:
            raise Died
        return answer

    with pytest.raises(Died):
        big.rotation(store, call=support.Wire(big, dies_at_third)).run()
    assert store.entries("h") == [] and big.live() == 400
    assert store.unfinished("h") is not None and store.unfinished("h")[1] == 2 * support.CHUNK  # type: ignore[index]
    big.sent = 0
    assert big.rotate(store)["delivered"] == 1
    rest = shard_size(big) - 2 * support.CHUNK
    assert big.sent == rest, "what the store had is not sent again"
    assert big.live() == 0 and verify(store, "h", ()).verdict == "consistent"


@pytest.mark.parametrize("moment", ["all_here", "shard", "manifest"])
def test_while_publishing(
    store: DirectoryStore, big: support.Host, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    with monkeypatch.context() as patch:
        if moment == "all_here":  # before the shard has its name
            patch.setattr(_durable, "publish_part", dies)
        elif moment == "shard":  # after the shard, before the manifest
            whole, manifests = _durable.create, os.path.join(store.directory, "hosts")
            patch.setattr(
                _durable, "create", lambda path, *rest: dies() if path.startswith(manifests) else whole(path, *rest)
            )
        else:  # after the manifest, before the part is removed
            patch.setattr(_durable, "remove", dies)
        with pytest.raises(Died):
            big.rotate(store)
    assert big.live() == 400, "nothing is deleted before the store has said that it has it"
    names = {suffix for _entry, suffix in store.names("h")[0]}
    assert names == {"all_here": set(), "shard": {".ima.gz"}, "manifest": {".ima.gz", ".json"}}[moment]
    assert verify(store, "h", ()).reason in ("", "no_shard")
    big.sent = 0
    result = big.rotate(DirectoryStore(store.directory))
    assert big.sent == 0, "every byte was in the store"
    assert result["delivered"] == (0 if moment == "manifest" else 1)
    assert big.live() == 0 and verify(store, "h", ()).verdict == "consistent"
    assert verify(store, "h", ()).warnings == []


def test_temporary_files_of_dead_processes_are_swept_and_never_listed(
    store: DirectoryStore, host: support.Host
) -> None:
    host.grow(3)
    boot = host.rotate(store)["claim"]["boot_id"]
    left = [os.path.join(support.base(store), name, ".00000001-0-4.json.0123abcd.tmp") for name in (boot, ".incoming")]
    for path in left:
        support.write(path, b"torn")
    assert verify(store, "h", ()).warnings == []
    host.rotate(store)
    assert not any(map(os.path.exists, left))


def test_after_the_manifest_before_the_acknowledgement(store: DirectoryStore, big: support.Host) -> None:
    def call(one_round: t.Any) -> t.Any:
        if one_round["have"]:
            return {"unreachable": True, "msg": "gone"}
        return big.answer(one_round)

    with pytest.raises(ImaError) as caught:
        big.rotation(store, call=call).run()
    assert caught.value.reason == "unreachable"
    assert len(store.entries("h")) == 1 and big.live() == 400
    big.sent = 0
    result = big.rotate(store)
    assert (result["delivered"], result["trimmed"], big.sent, big.live()) == (0, 400, 0, 0)
    assert result["changed"] is True


def test_after_the_acknowledgement_before_the_trim(
    store: DirectoryStore, big: support.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            host_side,
            "_trim_what_may_go",
            lambda cycle, witness: cycle.spool.acknowledgement(cycle.spool.head) and dies() or 0,
        )
        with pytest.raises(Died):
            big.rotate(store)
    assert big.live() == 400
    big.sent = 0
    result = big.rotate(store)
    assert (result["delivered"], result["trimmed"], big.sent, big.live()) == (0, 400, 0, 0)
    assert big.rotate(store)["changed"] is False


def test_an_unfinished_delivery_of_another_history_is_begun_anew(store: DirectoryStore, big: support.Host) -> None:
    with store.delivering("h"):
        store.receive("h", "f" * 64, 0, b"x" * 5000)
    assert big.rotate(store)["delivered"] == 1
    assert store.unfinished("h") is None and verify(store, "h", ()).verdict == "consistent"


def test_damage_to_an_unfinished_delivery_is_found_and_sent_again(store: DirectoryStore, big: support.Host) -> None:
    with pytest.raises(Died):
        big.rotation(store, call=support.Wire(big, lambda number, answer: dies() if number == 3 else answer)).run()
    part, size = store.unfinished("h")  # type: ignore[misc]
    with open(store._part("h", part), "r+b") as file:
        file.write(b"damage")
    with pytest.raises(ManifestError) as caught:
        big.rotate(store)
    assert caught.value.reason == "shard_altered" and store.entries("h") == [] and big.live() == 400
    assert big.rotate(store)["delivered"] == 1 and big.live() == 0


# -- foreign files and symbolic links -----------------------------------------------------------------------------


FOREIGN = [
    "hosts/h/README",
    "hosts/h/{boot}/notes.txt",
    "hosts/h/{boot}/00000001-0-7.json.bak",
    "hosts/h/{boot}/1-0-7.json",
    "hosts/h/{boot}/00000000-0-7.json",
    "hosts/h/not-a-boot/00000001-0-7.json",
    "hosts/h/{boot}/00000009-٣-7.json",
    "hosts/h/{boot}/new\nline",
    "fleet/README",
    "fleet/20260102T030405Z-00000001.json.bak",
]


def test_foreign_files_are_listed_but_never_taken_for_ours(store: DirectoryStore, host: support.Host) -> None:
    host.grow(9)
    boot = host.rotate(store)["claim"]["boot_id"]
    before, clean = store.names("h")[0], verify(store, "h", ())
    for name in FOREIGN:
        support.write(os.path.join(store.directory, name.format(boot=boot)), b"x")
    known, other = store.names("h")
    assert known == before and len(other) == len([name for name in FOREIGN if name.startswith("hosts")])
    assert all(name.isprintable() for name in other)
    assert store.runs() == []
    verdict = verify(store, "h", ())
    assert verdict.verdict == clean.verdict == "consistent" and str(len(other)) in verdict.warnings[0]
    assert host.rotate(store)["changed"] is False


def test_a_name_that_is_not_utf8_in_the_store_hurts_nobody(store: DirectoryStore, host: support.Host) -> None:
    host.grow(3)
    boot = host.rotate(store)["claim"]["boot_id"]
    for path in ("hosts/h/" + boot, "hosts/h", "fleet"):
        os.makedirs(os.path.join(store.directory, path), exist_ok=True)
        support.write(os.path.join(store.directory, path, os.fsdecode(b"\xff\xfe")), b"x")
    assert verify(store, "h", ()).verdict == "consistent" and store.runs() == []


def test_a_directory_of_hosts_with_a_name_that_is_not_utf8_is_left_alone(
    store: DirectoryStore, host: support.Host
) -> None:
    host.grow(3)
    host.rotate(store)
    os.mkdir(os.path.join(store.directory, "hosts", os.fsdecode(b"\xff\xfe")))
    assert store.hosts() == ["h"]


@pytest.mark.parametrize("which", ["shard", "manifest"])
def test_a_symbolic_link_is_not_followed(store: DirectoryStore, host: support.Host, tmp_path: Path, which: str) -> None:
    host.grow(3)
    host.rotate(store)
    path = support.paths(store, support.take(store)[0])[which == "manifest"]
    os.rename(path, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", path)
    verdict = verify(store, "h", ())
    assert verdict.verdict == "broken" and verdict.sequence == 1
    if which == "manifest":
        with pytest.raises(ImaError):
            host.rotate(store)


@pytest.mark.parametrize("which", ["shard", "manifest"])
def test_a_directory_under_a_name_of_ours_is_a_verdict(store: DirectoryStore, host: support.Host, which: str) -> None:
    host.grow(3)
    host.rotate(store)
    path = support.paths(store, support.take(store)[0])[which == "manifest"]
    os.unlink(path)
    os.mkdir(path)
    assert verify(store, "h", ()).verdict == "broken"


def test_a_delivery_never_writes_through_a_symbolic_link(
    store: DirectoryStore, host: support.Host, tmp_path: Path
) -> None:
    host.grow(3)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    manifest = host.answer({"have": None, "part": None, "export": True})["manifests"][0]
    part = os.path.join(support.base(store), ".incoming", digest(manifest.encode()) + ".part")
    os.makedirs(os.path.dirname(part))
    (Path(store.directory) / "format.json").write_bytes(FORMAT)
    os.symlink(victim, part)
    with pytest.raises(ImaError):
        host.rotate(store)
    assert victim.read_bytes() == b"precious"


def test_the_store_may_lie_in_a_directory_that_cannot_be_read(tmp_path: Path) -> None:
    """Its user can enter what is above it, and no more."""
    directory = tempfile.mkdtemp()
    try:
        store = os.path.join(directory, "store")
        os.mkdir(store)
        os.chmod(directory, 0o311)
        if os.geteuid() == 0:
            os.chown(store, 65534, 65534)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                if os.geteuid() == 0:
                    os.setegid(65534)
                    os.seteuid(65534)
                with DirectoryStore(store).delivering("h"):
                    code = 0
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0 and sorted(os.listdir(store)) == ["format.json", "hosts"]
    finally:
        os.chmod(directory, 0o700)
        shutil.rmtree(directory)


# -- what may be added -------------------------------------------------------------------------------------------


def test_what_a_host_may_add(store: DirectoryStore, host: support.Host) -> None:
    host.grow(9)
    host.rotate(store)
    one, two = support.take(store)
    head = Head(one.manifest, digest(canonical(one.manifest)))

    def refused(manifest: t.Any, head: Head | None, host_name: str = "h") -> str:
        with pytest.raises(ImaError) as caught:
            store.accept(host_name, canonical(manifest), head)
        return caught.value.reason

    other = support.new_store(os.path.join(host.directory, "other"))
    assert other.accept("h", canonical(two.manifest), head) == two.manifest
    assert other.accept("h", canonical(one.manifest), None) == one.manifest
    store = other
    assert refused(two.manifest, None) == "chain"
    assert refused(one.manifest, head) == "chain"
    assert refused(dict(two.manifest, name="other"), head) == "host_name"
    assert refused(two.manifest, head, "other") == "host_name"
    assert refused(dict(two.manifest, machine_id="0" * 32), head) == "machine_changed"
    assert refused(dict(two.manifest, previous="0" * 64), head) == "chain"
    assert refused(dict(two.manifest, first=8), head) == "chain"
    assert refused(dict(two.manifest, first=0), head) == "chain"
    assert refused(dict(two.manifest, sequence=3), head) == "chain"
    assert refused(dict(two.manifest, pcrs_start=one.manifest["pcrs_start"]), head) == "chain"
    assert refused(dict(two.manifest, stored_size=5 << 30), head) == "too_large"
    assert refused(dict(one.manifest, first=1), None) == "chain"
    assert refused(dict(one.manifest, pcrs_start=one.manifest["pcrs_end"]), None) == "chain"


def test_a_chunk_may_not_leave_a_hole(store: DirectoryStore) -> None:
    with store.delivering("h"):
        store.receive("h", "0" * 64, 0, b"abc")
        with pytest.raises(WriteError):
            store.receive("h", "0" * 64, 4, b"d")
        store.receive("h", "0" * 64, 2, b"x")
        assert store.unfinished("h") == ("0" * 64, 3)
