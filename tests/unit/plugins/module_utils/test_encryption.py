# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Encrypted shards: what leaves the host cannot be read without a key, and is judged like any other with one."""

from __future__ import annotations

import datetime
import gzip
import os
import shutil
import subprocess
import typing as t
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from ansible_collections.integrity.ima.plugins.module_utils import _durable, _encryption
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._stitch import stitch
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import verify
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import documented_reader


def recipient(directory: Path, name: str) -> str:
    """Make a key, and its certificate among the recipients; return the key's file."""
    key = rsa.generate_private_key(65537, 2048)
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime(2026, 1, 1)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=36500))
    certificate = builder.sign(key, hashes.SHA256())
    recipients = directory / "recipients"
    recipients.mkdir(exist_ok=True)
    (recipients / f"{name}.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    path = directory / f"{name}.key"
    form = serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    return str(path)


@pytest.fixture(name="keys")
def _keys(tmp_path: Path) -> list[str]:
    return [recipient(tmp_path, name) for name in ("audit", "escrow")]


@pytest.fixture(name="store")
def _store(tmp_path: Path) -> DirectoryStore:
    return support.new_store(tmp_path / "store")


@pytest.fixture(name="host")
def _host(tmp_path: Path, keys: list[str]) -> support.Host:
    host = support.Host(tmp_path / "h")
    with open(host.config, "a", encoding="ascii") as file:
        file.write(f"[encryption]\nrecipients = {tmp_path}/recipients\n")
    return host


def judged(store: DirectoryStore, key: str | None) -> t.Any:
    store.key = key
    return verify(store, "h", ())


def test_the_cycle_with_encrypted_shards(host: support.Host, store: DirectoryStore, keys: list[str]) -> None:
    host.grow(9)
    assert host.rotate(store)["trimmed"] == 10 and host.live() == 0
    host.grow(3)
    assert host.rotate(store)["trimmed"] == 3
    assert host.rotate(store)["changed"] is False
    for key in keys:
        assert judged(store, key).verdict == "consistent"
    with pytest.raises(ImaError) as caught:
        judged(store, None)
    assert caught.value.reason == "no_key"


def test_no_path_and_no_record_can_be_read_in_the_store(
    host: support.Host, store: DirectoryStore, keys: list[str], tmp_path: Path
) -> None:
    host.grow(9)
    host.rotate(store)
    store.key = keys[0]
    list_of_all = tmp_path / "whole"
    stitch(store, "h", "", str(list_of_all), None, False)
    whole = list_of_all.read_bytes()
    assert len(whole) > 500
    for entry in store.entries("h"):
        data = Path(store.directory, "hosts/h", entry.shard).read_bytes()
        assert store.manifest("h", entry)["encryption"] == "cms"
        with pytest.raises(gzip.BadGzipFile):
            gzip.decompress(data)
    assert not [name for name in support.tree(store.directory) if "plain" in name]
    assert whole == host.recorded()


@pytest.mark.skipif(not shutil.which("flock"), reason="flock (util-linux) is not installed")
@pytest.mark.parametrize("encrypted", [True, False])
def test_the_documented_shell_reader_reads_them_and_stops_at_one_that_is_gone(
    host: support.Host, store: DirectoryStore, encrypted: bool
) -> None:
    if not encrypted:
        host.configure()
    host.grow(20)
    host.rotate(store)

    def read() -> subprocess.CompletedProcess[bytes]:
        environment = dict(os.environ, IMA_SNAPSHOT_CONFIG=host.config)
        return subprocess.run(["sh", "-c", documented_reader()], env=environment, capture_output=True, check=False)

    whole = read()
    assert (whole.returncode, whole.stdout, whole.stderr) == (0, host.recorded(), b"")
    spool = Spool(host.spool)
    assert len(spool.entries) == 3
    second = spool.path(spool.entries[1])
    for name in (second, second.replace(".ima.gz", ".plain.gz")) if encrypted else (second,):
        os.unlink(name)
    short = read()
    assert short.returncode == 1 and short.stdout == b"" and b"is not here" in short.stderr


def test_another_key_opens_nothing(host: support.Host, store: DirectoryStore, tmp_path: Path) -> None:
    host.grow(3)
    host.rotate(store)
    (tmp_path / "other").mkdir()
    verdict = judged(store, recipient(tmp_path / "other", "stranger"))
    assert (verdict.verdict, verdict.reason) == ("broken", "not_decrypted")


@pytest.mark.parametrize("flip", [100, -100])
def test_an_altered_encrypted_shard_is_found_without_a_key_too(
    host: support.Host, store: DirectoryStore, flip: int
) -> None:
    host.grow(3)
    host.rotate(store)
    path = Path(store.directory, "hosts/h", store.entries("h")[0].shard)
    data = bytearray(path.read_bytes())
    data[flip] ^= 1
    path.write_bytes(data)
    verdict = judged(store, None)
    assert (verdict.verdict, verdict.reason) == ("broken", "edited_shard")


def test_without_a_certificate_nothing_is_exported_in_the_clear(
    host: support.Host, store: DirectoryStore, tmp_path: Path
) -> None:
    for name in os.listdir(tmp_path / "recipients"):
        os.unlink(tmp_path / "recipients" / name)
    host.grow(3)
    with pytest.raises(ImaError) as caught:
        host.rotate(store)
    assert caught.value.reason == "no_recipients" and host.live() == 4
    assert not [name for name in support.tree(host.spool) if name.endswith((".gz", ".tmp"))]


@pytest.mark.parametrize(
    ("name", "said"), [("empty", "holds no certificate"), ("gone", "seen from here"), ("file", "seen from here")]
)
def test_a_directory_that_is_not_there_is_not_called_an_empty_one(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(ImaError, match=said) as caught:
        _encryption.recipients_in(str(tmp_path / name))
    assert caught.value.reason == "no_recipients"


def test_openssl_that_fails_leaves_the_records_in_the_kernel(
    host: support.Host, store: DirectoryStore, tmp_path: Path
) -> None:
    (tmp_path / "recipients" / "audit.pem").write_text("no certificate")
    host.grow(3)
    with pytest.raises(ImaError) as caught:
        host.rotate(store)
    assert caught.value.reason == "not_encrypted" and host.live() == 4


def test_no_openssl(host: support.Host, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_words: t.Any, **_options: t.Any) -> t.NoReturn:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(_encryption.subprocess, "Popen", missing)
    host.grow(3)
    with pytest.raises(ImaError) as caught:
        host.rotate(store)
    assert caught.value.reason == "no_openssl" and host.live() == 4


def test_a_run_that_died_before_the_manifest_is_finished(
    host: support.Host, store: DirectoryStore, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Died(BaseException):
        pass

    def die(*_args: t.Any) -> t.NoReturn:
        raise Died

    host.grow(3)
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "_seal_manifest", die)
        with pytest.raises(Died):
            host.rotate(store)
    assert host.rotate(store)["trimmed"] == 4
    assert judged(store, keys[1]).verdict == "consistent"
    assert not [name for name in support.tree(host.spool) if "broken" in name]


class Died(BaseException):
    """The run was killed."""


def names_of(host: support.Host) -> list[str]:
    return sorted(path.name for path in Path(host.spool, "shards").glob("*/*"))


def test_a_run_that_died_with_another_manifest_leaves_nothing_in_the_way(
    host: support.Host, store: DirectoryStore, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_args: t.Any) -> t.NoReturn:
        raise Died

    host.grow(3)
    with monkeypatch.context() as patch:
        patch.setattr(Spool, "_seal_manifest", die)
        with pytest.raises(Died):
            host.rotate(store)
    # The journal is a hint: it may be gone. The records of the shard were never sealed, and others have its name now.
    os.unlink(os.path.join(host.spool, "journal.json"))
    plain = next(Path(host.spool).rglob("*.plain.gz"))
    plain.write_bytes(gzip.compress(b"other bytes", mtime=0))
    assert host.rotate(store)["trimmed"] == 4
    assert judged(store, keys[0]).verdict == "consistent"
    stem = plain.name[: -len(".plain.gz")]
    assert names_of(host) == sorted(
        f"{stem}.{suffix}" for suffix in ("ack", "ima.gz", "ima.gz.broken", "json", "plain.gz", "plain.gz.broken")
    )


def test_a_run_that_died_between_the_two_names_of_a_shard_leaves_no_readable_file_behind(
    host: support.Host, store: DirectoryStore, keys: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    publish, calls = _durable.NewFile.publish_as, []

    def die(self: _durable.NewFile, name: str) -> bool:
        if name.endswith(".ima.gz"):
            raise Died
        calls.append(name)
        return publish(self, name)

    host.grow(3)
    with monkeypatch.context() as patch:
        patch.setattr(_durable.NewFile, "publish_as", die)
        with pytest.raises(Died):
            host.rotate(store)
    assert names_of(host) == calls and calls[0].endswith("-4.plain.gz")
    host.grow(2)
    done = host.rotate(store)
    assert done["trimmed"] == 6
    assert judged(store, keys[0]).verdict == "consistent"
    assert [name for name in names_of(host) if "plain" in name] == [
        f"{calls[0]}.broken",
        calls[0].replace("-4.", "-6."),
    ]
