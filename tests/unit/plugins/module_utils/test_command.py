# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command ima-snapshot on emulated hosts: what it seals, deletes, prints, and how it ends."""

from __future__ import annotations

import hashlib
import io
import json
import os
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _command, _emulated, _status
from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._protocol import Lock
from ansible_collections.integrity.ima.plugins.module_utils._schema import STATUS, parse
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import utc_now
from ansible_collections.integrity.ima.plugins.module_utils._spool import FORMAT, Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import (
    FLAVOURS,
    TRIMMING,
    Host,
    oracle,
)


class Ran(t.NamedTuple):
    code: int
    out: str
    raw: bytes
    err: str


@pytest.fixture(name="run")
def fixture_run(capfdbinary: pytest.CaptureFixture[bytes]) -> t.Callable[..., Ran]:
    def run(host: Host, *words: str) -> Ran:
        capfdbinary.readouterr()
        code = _command.main(["--config", host.conf, *words])
        out, err = capfdbinary.readouterr()
        return Ran(code, out.decode("utf-8", "replace"), out, err.decode())

    return run


def schedule(host: Host, **limits: int) -> None:
    """Rewrite the config with a section [schedule]."""
    host.configure()
    with open(host.conf, "a", encoding="utf-8") as file:
        file.write("[schedule]\n" + "".join(f"{key} = {value}\n" for key, value in limits.items()))


def said(ran: Ran) -> dict[str, t.Any]:
    assert ran.code == 0, ran
    return parse(ran.raw.rstrip(b"\n"), STATUS, "the status", ImaError)


def ascii_of(raw: bytes) -> bytes:
    return b"".join(ml.to_ascii(record, ml.SHA1.byte_order) for record in ml.read(io.BytesIO(raw).read))


# -- export ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_export_seals_all_and_deletes_what_policy_local_lets_go(tmp_path, run, flavour):
    host = Host(tmp_path, flavour, "local", count=40)
    ran = run(host, "export")
    oracle(host)
    # The staged list is deleted as a whole, and nothing came meanwhile; the others leave nothing either.
    left = b"" if flavour in TRIMMING else host.truth()
    assert (ran.code, host.held(), host.sealed()) == (0, left, host.truth())
    deleted = 41 if flavour in TRIMMING else 0
    assert ran.out == f"exported 41 records in 6 shards, deleted {deleted}, the cut is 41\n"
    before = host.files()
    again = run(host, "export")
    assert (again.code, again.out) == (0, "exported 0 records in 0 shards, deleted 0, the cut is 41\n")
    assert host.files() == before


@pytest.mark.parametrize("flavour", TRIMMING)
def test_export_deletes_only_what_the_store_acknowledged_before(tmp_path, run, flavour):
    host = Host(tmp_path, flavour, "central", count=20)
    assert "deleted 0" in run(host, "export").out
    host.acknowledge()
    host.grow(3)
    ran = run(host, "export")
    oracle(host)
    assert host.sealed() == host.truth()
    # A witness of what was deleted stays while the export looks for its place.
    assert len(host.held()) < len(host.truth()) / 2
    assert "exported 3 records in 1 shard, deleted 2" in ran.out


@pytest.mark.parametrize("command", ["export", "status", "read", "verify"])
def test_the_config_may_stand_before_or_behind_the_command(tmp_path, capfdbinary, command):
    host = Host(tmp_path, count=4)
    assert _command.main(["--config", host.conf, "export"]) == 0
    said = []
    for words in (["--config", host.conf, command], [command, "--config", host.conf]):
        capfdbinary.readouterr()
        assert _command.main(words) == 0
        said.append(capfdbinary.readouterr().out)
    assert said[0] == said[1] != b""


def test_a_first_export_that_failed_leaves_nothing_broken(tmp_path, run):
    host = Host(tmp_path, count=4)
    os.makedirs(os.path.join(host.spool, "shards", host.state().boot_id))
    with open(os.path.join(host.spool, "format.json"), "wb") as file:
        file.write(FORMAT)
    ran = run(host, "verify")
    assert ran.code == 0 and ran.out.startswith("consistent: 0 records in 0 shards")


def test_the_age_of_a_shard_from_the_future_is_not_known_and_counts_as_reached(tmp_path, run, monkeypatch):
    host = Host(tmp_path, count=4)
    schedule(host, export_seconds=3600)
    run(host, "export")
    host.grow(3)
    assert json.loads(run(host, "status", "--json").out)["due"] is False
    real = _status.time.time
    monkeypatch.setattr(_status.time, "time", lambda: real() - 86400)
    said = json.loads(run(host, "status", "--json").out)
    assert said["age"] is None and said["due"] is True


def test_an_export_after_a_foreign_trim_exits_with_3_and_keeps_everything(tmp_path, run):
    host = Host(tmp_path, count=10)
    run(host, "export")
    host.grow(6)
    _emulated.foreign_trim(host.kernel, 3)
    before = host.sealed(), host.held()
    ran = run(host, "export")
    assert (ran.code, ran.out) == (3, "")
    assert ran.err.startswith("ima-snapshot: ") and "(foreign_trim)" in ran.err and "Kept: " in ran.err
    assert (host.sealed(), host.held()) == before


def test_errors_name_their_reason_and_what_was_kept(tmp_path, run):
    host = Host(tmp_path, count=3)
    with Lock(host.config()):
        ran = run(host, "export")
    assert (ran.code, ran.out) == (1, "")
    assert "(locked)" in ran.err and "Kept: " in ran.err and "Next: " in ran.err


def test_usage_is_2(tmp_path, run):
    for words in ([], ["trim"], ["export", "--everything"]):
        with pytest.raises(SystemExit) as caught:
            run(Host(tmp_path / str(len(words)) / "".join(words)), *words)
        assert caught.value.code == 2


# -- due ------------------------------------------------------------------------------------------------------------


def test_without_limits_due_is_always(tmp_path, run):
    host = Host(tmp_path, count=3)
    assert "exported 4 records" in run(host, "export", "--due").out
    assert "exported 0 records" in run(host, "export", "--due").out


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_due_by_records(tmp_path, run, flavour):
    host = Host(tmp_path, flavour, "central")
    schedule(host, export_records=5)
    host.grow(3)
    assert run(host, "export", "--due").out == "nothing is due\n"
    assert host.spans() == []
    host.grow(1)
    assert "exported 5 records" in run(host, "export", "--due").out
    for _round in range(3):
        host.grow(4)
        assert run(host, "export", "--due").out == "nothing is due\n"
        host.grow(1)
        assert "exported 5 records" in run(host, "export", "--due").out
        oracle(host)


def test_due_by_bytes_is_estimated_from_the_newest_shard(tmp_path, run):
    host = Host(tmp_path, count=9)
    run(host, "export")
    manifest = Spool(host.spool).manifest(Spool(host.spool).head)
    mean = manifest["size"] // manifest["count"]
    schedule(host, export_bytes=mean * 6)
    host.grow(4)
    assert run(host, "export", "--due").out == "nothing is due\n"
    host.grow(3)
    assert "exported 7 records" in run(host, "export", "--due").out


def test_due_by_age_and_never_without_anything_new(tmp_path, run, monkeypatch):
    host = Host(tmp_path, count=2)
    schedule(host, export_seconds=3600)
    assert "exported 3" in run(host, "export", "--due").out, "a host without a shard has waited long enough"
    host.grow(1)
    assert run(host, "export", "--due").out == "nothing is due\n"
    later = time.time() + 3700
    monkeypatch.setattr(_status.time, "time", lambda: later)
    assert "exported 1 record " in run(host, "export", "--due").out
    assert run(host, "export", "--due").out == "nothing is due\n"


def test_counts_that_contradict_each_other_are_due(tmp_path, run):
    host = Host(tmp_path, trim_after="never", count=20)
    run(host, "export")
    schedule(host, export_records=1000)
    _emulated.foreign_trim(host.kernel, 5)
    assert said(run(host, "status", "--json"))["lag"] is None
    # All that is gone is in shards: noted, and the export goes on.
    assert run(host, "export", "--due").code == 0
    assert host.faults() == []
    assert run(host, "export", "--due").out == "nothing is due\n"


def test_nothing_due_does_not_open_the_list(tmp_path, run, monkeypatch):
    host = Host(tmp_path, "staged", "central", count=20)
    run(host, "export")
    schedule(host, export_records=10)
    host.grow(2)
    opened = []
    real = _emulated.EmulatedFiles.open
    monkeypatch.setattr(
        _emulated.EmulatedFiles, "open", lambda self, name, flags: opened.append(name) or real(self, name, flags)
    )
    assert run(host, "export", "--due").out == "nothing is due\n"
    assert set(opened) == {"runtime_measurements_count"}


def test_a_reboot_makes_the_whole_list_new(tmp_path, run):
    host = Host(tmp_path, count=20)
    run(host, "export")
    schedule(host, export_records=3)
    host.reboot()
    host.grow(1)
    assert run(host, "export", "--due").out == "nothing is due\n"
    host.grow(1)
    assert "exported 3 records" in run(host, "export", "--due").out
    oracle(host)


# -- status ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_the_lag_is_exact_while_nothing_runs_beside_it(tmp_path, run, flavour):
    host = Host(tmp_path, flavour, "central", count=20)
    assert said(run(host, "status", "--json"))["lag"] == 21
    for number in range(3):
        host.grow(number + 1)
        run(host, "export")
        assert said(run(host, "status", "--json"))["lag"] == 0
        if number == 1:
            host.acknowledge()
        host.grow(4)
        status = said(run(host, "status", "--json"))
        assert (status["lag"], status["cut"]) == (4, host.spans()[-1][1] + host.spans()[-1][2])


def test_status_tells_the_place_and_the_store_s_word(tmp_path, run):
    host = Host(tmp_path, "delete_n", "central", count=20)
    run(host, "export")
    host.acknowledge(sequence=2)
    run(host, "export")
    host.grow(2)
    status = said(run(host, "status", "--json"))
    assert {key: status[key] for key in status if key not in ("boot_id", "age", "lag_bytes")} == {
        "version": 1,
        "name": "host",
        "flavour": "delete_n",
        "emulated": True,
        "count": 23 - 14 + 0,
        "cut": 21,
        "base": 14,
        "lag": 2,
        "sequence": 3,
        "generation": 3,
        "acknowledged": 2,
        "holders": [],
        "fault": None,
        "due": True,
    }
    assert status["boot_id"] == host.config().lists().files.boot_id()
    text = run(host, "status").out
    assert "lag: 2\n" in text and "holders: nobody\n" in text and "due: yes\n" in text


def test_status_writes_nothing_not_even_a_lock(tmp_path, run):
    host = Host(tmp_path, count=3)
    assert said(run(host, "status", "--json"))["sequence"] == 0
    assert host.files() == {}


def test_status_tells_a_fault_and_a_spool_that_cannot_be_used(tmp_path, run):
    host = Host(tmp_path, count=10)
    run(host, "export")
    host.grow(6)
    _emulated.foreign_trim(host.kernel, 3)
    run(host, "export")
    fault = said(run(host, "status", "--json"))["fault"]
    assert (fault["reason"], fault["index"]) == ("foreign_trim", 11)
    head = Spool(host.spool).head
    os.unlink(Spool(host.spool).path(head))
    status = said(run(host, "status", "--json"))
    assert (status["fault"]["reason"], status["lag"]) == ("shard_missing", None)


# -- read -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_read_gives_what_the_kernel_would_give_if_nothing_had_been_trimmed(tmp_path, run, flavour):
    host = Host(tmp_path, flavour, count=20)
    assert run(host, "read").raw == host.truth()
    for _round in range(3):
        run(host, "export")
        host.grow(5)
        host.violation()
    assert run(host, "read").raw == host.truth()
    assert run(host, "read", "--ascii").raw == ascii_of(host.truth())


def test_read_writes_nothing_binary_to_a_terminal(tmp_path, capsys, monkeypatch):
    host = Host(tmp_path, count=3)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    with pytest.raises(SystemExit) as ended:
        _command.main(["--config", host.conf, "read"])
    assert ended.value.code == _command.USAGE
    said = capsys.readouterr()
    assert said.out == "" and "--ascii" in said.err


def test_read_follows_the_list_over_a_kexec_and_gives_earlier_boots(tmp_path, run):
    host = Host(tmp_path, count=9)
    first = host.config().lists().files.boot_id()
    run(host, "export")
    before = host.truth()
    host.kexec(carry_over=True)
    host.grow(4)
    assert run(host, "read").raw == host.truth()
    run(host, "export")
    second = host.config().lists().files.boot_id()
    whole = host.truth()
    host.reboot()
    host.grow(2)
    assert run(host, "read").raw == host.truth()
    assert run(host, "read", "--boot", first).raw == before
    assert run(host, "read", "--boot", second).raw == whole
    assert run(host, "read", "--boot", host.config().lists().files.boot_id()).raw == host.truth()
    ran = run(host, "read", "--boot", "../../etc")
    assert (ran.code, ran.raw) == (1, b"") and "(no_shard)" in ran.err


def test_read_writes_nothing_where_a_shard_was_pruned_and_names_the_store(tmp_path, run):
    host = Host(tmp_path, count=20)
    run(host, "export")
    host.acknowledge()
    spool = Spool(host.spool)
    spool.prune(spool.entries[1], "sftp://vault/fleet", utc_now())
    ran = run(host, "read")
    assert (ran.code, ran.raw) == (1, b"")
    assert "(pruned)" in ran.err and "take it from the store" in ran.err


def test_read_does_not_hold_lock_or_list_while_its_reader_is_slow(tmp_path):
    host = Host(tmp_path, trim_after="central", count=3000, shard_records=1000)
    host.export()
    host.grow(50)
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(out)
        sys.stdout = os.fdopen(into, "w")
        os._exit(_command.main(["--config", host.conf, "read"]))
    os.close(into)
    with os.fdopen(out, "rb") as pipe:
        got = pipe.read(100)
        truth = host.truth()
        # The pipe is full, and the child waits for us.
        assert host.run()[0].records == 50
        got += pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    assert got == truth


# -- verify ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_verify_replays_shards_and_list_to_the_pcrs(tmp_path, run, flavour):
    host = Host(tmp_path, flavour, count=20)
    assert run(host, "verify").out.startswith("consistent: 0 records in 0 shards; the kernel holds 21 records more")
    run(host, "export")
    host.grow(5)
    before = host.files()
    ran = run(host, "verify")
    assert ran.code == 0
    assert ran.out == (
        "consistent: 21 records in 3 shards; the kernel holds 5 records more, and they lead to the TPM's PCRs\n"
    )
    assert host.files() == before
    assert "attested" not in ran.out


def test_verify_without_a_tpm_says_so(tmp_path, run):
    host = Host(tmp_path, count=5, banks=[])
    run(host, "export")
    assert "no TPM was asked" in run(host, "verify").out


def test_verify_names_an_altered_shard(tmp_path, run):
    host = Host(tmp_path, count=20)
    run(host, "export")
    spool = Spool(host.spool)
    path = Path(spool.path(spool.entries[1]))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    ran = run(host, "verify")
    assert (ran.code, ran.out.split(" at ")[0]) == (1, "broken: edited_shard")


def test_verify_names_an_edited_manifest_a_missing_shard_and_a_foreign_trim(tmp_path, run):
    def made(name: str) -> tuple[Host, Spool]:
        host = Host(tmp_path / name, count=20)
        run(host, "export")
        return host, Spool(host.spool)

    host, spool = made("edited")
    path = Path(spool.manifest_path(spool.entries[1]))
    manifest = json.loads(path.read_bytes())
    manifest["violations"] += 1
    path.write_bytes(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode())
    assert run(host, "verify").out.startswith("broken: edited_manifest at index 7: ")

    host, spool = made("missing")
    os.unlink(spool.path(spool.entries[1]))
    assert run(host, "verify").out.startswith("broken: missing_shard at index 7: ")

    host, spool = made("trimmed")
    host.grow(4)
    _emulated.foreign_trim(host.kernel, 2)
    assert run(host, "verify").out.startswith("broken: foreign_trim at index 21: ")


def test_verify_takes_pruned_shards_for_what_they_are(tmp_path, run):
    host = Host(tmp_path, count=20)
    run(host, "export")
    host.acknowledge()
    spool = Spool(host.spool)
    spool.prune(spool.entries[1], "test", utc_now())
    ran = run(host, "verify")
    assert ran.code == 0
    assert ran.out.startswith("note: 2 shards were pruned")


def test_verify_never_shows_the_names_of_files(tmp_path, run):
    host = Host(tmp_path, count=5)
    host.violation(path="/home/secret-\x1b[31m")
    run(host, "export")
    everything = [run(host, *words) for words in (["verify"], ["status"], ["export"], ["status", "--json"])]
    assert not any("secret" in ran.out + ran.err or "\x1b" in ran.out + ran.err for ran in everything)


def test_export_and_the_module_give_the_same_shards(tmp_path, run):
    one, two = Host(tmp_path / "one", count=0), Host(tmp_path / "two", count=0)
    for host in (one, two):
        _emulated.reboot(host.kernel)
    digests = []
    for host, export in ((one, lambda: run(one, "export")), (two, two.export)):
        host.grow(20)
        export()
        digests.append(hashlib.sha256(host.sealed()).hexdigest() == hashlib.sha256(host.truth()).hexdigest())
    assert digests == [True, True] and one.spans() == two.spans()


# -- the reader in docs/examples --------------------------------------------------------------------------------------

READER = Path(__file__).resolve().parents[4] / "docs" / "examples" / "read-shards.sh"


def test_the_shell_reader_follows_the_shards_while_exports_run(tmp_path):
    host = Host(tmp_path, count=10)
    host.configure(lock_timeout="60")
    host.run()
    with open(tmp_path / "out", "wb") as out:
        reader = subprocess.Popen(
            [str(READER), "-f"],
            env={"IMA_SNAPSHOT_CONFIG": host.conf, "PATH": os.environ["PATH"]},
            stdout=out,
            stderr=subprocess.PIPE,
        )
    try:
        for _round in range(8):
            host.grow(9)
            host.run()
        last = str(Spool(host.spool).head.sequence).encode()
        assert reader.stderr is not None
        assert last in iter(lambda: reader.stderr.readline().strip(), b""), "it ended before the last shard"
    finally:
        reader.kill()
        reader.wait()
    assert (tmp_path / "out").read_bytes() == host.truth()


def test_the_shell_reader_goes_on_from_a_number_and_names_what_is_missing(tmp_path):
    host = Host(tmp_path, count=20)
    host.run()

    def read(*words: str) -> subprocess.CompletedProcess[bytes]:
        env = {"IMA_SNAPSHOT_CONFIG": host.conf, "PATH": os.environ["PATH"]}
        return subprocess.run([str(READER), *words], env=env, capture_output=True, check=False)

    assert (read().stdout, read().stderr) == (host.truth(), b"3\n")
    spool = Spool(host.spool)
    assert read("2").stdout == b"".join(spool.raw_from(14))
    assert (read("3").stdout, read("3").stderr) == (b"", b"")
    spool.prune(spool.entries[0], "test", utc_now())
    assert (read().returncode, read().stdout, b"shard 1 was pruned" in read().stderr) == (1, b"", True)
    assert read("1").returncode == 0
    os.unlink(Spool(host.spool).manifest_path(spool.entries[1]))
    assert b"between the shards 1 and 3 something is missing" in read("1").stderr
