# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Quotes: real ones of a software TPM are accepted, every change of them is refused, and verdicts follow from them."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import struct
import subprocess
import typing as t
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _tpm
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._fleet import new_run
from ansible_collections.integrity.ima.plugins.module_utils._rotation import record_identity
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._tpm import QuoteError, check_quote, parse_attest
from ansible_collections.integrity.ima.plugins.module_utils._verifier import verify
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

CAPTURES = Path(__file__).resolve().parents[3] / "fixtures" / "captures" / "kernel-lab"
QUOTES = sorted((path.parent, path.stem) for path in CAPTURES.glob("*/quote*.msg"))
IDS = [f"{directory.name}-{name}" for directory, name in QUOTES]


class Real(t.NamedTuple):
    attest: bytes
    signature: bytes
    key: str
    extra: bytes
    values: dict[str, dict[str, str]]


def real(directory: Path, name: str) -> Real:
    meta = json.loads((directory / "meta.json").read_text())
    attest = (directory / f"{name}.msg").read_bytes()
    values: dict[str, dict[str, str]] = {}
    for bank, pcrs in parse_attest(attest).selection:
        for pcr in pcrs:
            values.setdefault(str(pcr), {})[bank] = meta["pcrs"][bank][str(pcr)].lower()
    signature, key = (directory / f"{name}.sig").read_bytes(), (directory / "ak.pem").read_text()
    return Real(attest, signature, key, bytes.fromhex(meta["nonce"]), values)


def test_there_are_quotes():
    assert len(QUOTES) == 38


@pytest.mark.parametrize(("directory", "name"), QUOTES, ids=IDS)
def test_real_quotes_are_accepted(directory: Path, name: str) -> None:
    quote = check_quote(*real(directory, name))
    assert quote.safe and quote.reset_count > 0


@pytest.mark.parametrize(("directory", "name"), QUOTES[:4], ids=IDS[:4])
def test_what_was_changed_is_refused(directory: Path, name: str) -> None:
    good = real(directory, name)
    for position in range(len(good.attest)):
        changed = bytearray(good.attest)
        changed[position] ^= 1
        with pytest.raises(QuoteError):
            check_quote(*good._replace(attest=bytes(changed)))
    for position in range(len(good.signature)):
        changed = bytearray(good.signature)
        changed[position] ^= 1
        with pytest.raises(QuoteError):
            check_quote(*good._replace(signature=bytes(changed)))
    for size in range(len(good.attest)):
        with pytest.raises(QuoteError):
            check_quote(*good._replace(attest=good.attest[:size]))


def refused(quote: Real) -> str:
    with pytest.raises(QuoteError) as caught:
        check_quote(*quote)
    return caught.value.reason


def test_each_refusal_has_its_reason() -> None:
    directory, name = QUOTES[0]
    good = real(directory, name)
    other = real(*next(each for each in QUOTES if (each[0] / "ak.pem").read_text() != good.key))
    pcr = dict(good.values, **{"10": {bank: "00" * (len(v) // 2) for bank, v in good.values["10"].items()}})
    assert refused(good._replace(extra=b"another")) == "quote_nonce"
    assert refused(good._replace(key=other.key)) == "quote_signature"
    assert refused(good._replace(key="no key")) == "quote_signature"
    assert refused(good._replace(values=pcr)) == "quote_pcrs"
    assert refused(good._replace(values={})) == "quote_pcrs"
    assert refused(good._replace(values=dict(good.values, **{"23": {"sha256": "00" * 32}}))) == "quote_coverage"
    assert refused(good._replace(attest=b"\xffTCG\x80\x14" + good.attest[6:])) == "malformed_quote"


def test_an_old_library_checks_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distributions have it without PSS.AUTO beside Python 3.9, and with a backend to be named beside Python 3.8."""
    load = serialization.load_pem_public_key

    def load_as_of_old(data: bytes, backend: t.Any) -> t.Any:
        return load(data, backend)

    monkeypatch.setattr(serialization, "load_pem_public_key", load_as_of_old)
    monkeypatch.delattr(padding.PSS, "AUTO", raising=False)
    good = real(*QUOTES[0])
    assert check_quote(*good).safe
    pss = good.signature[:1] + b"\x16" + good.signature[2:]
    assert good.signature[:2] == b"\x00\x14" and refused(good._replace(signature=pss)) == "no_cryptography"


@pytest.mark.skipif(not shutil.which("tpm2_checkquote"), reason="tpm2_checkquote (tpm2-tools) is not installed")
@pytest.mark.parametrize(("directory", "name"), QUOTES[:6], ids=IDS[:6])
def test_tpm2_checkquote_agrees(directory: Path, name: str) -> None:
    nonce = json.loads((directory / "meta.json").read_text())["nonce"]
    files = [str(directory / part) for part in ("ak.pem", f"{name}.msg", f"{name}.sig", f"{name}.pcrs")]
    words = ["tpm2_checkquote", "-u", files[0], "-m", files[1], "-s", files[2], "-f", files[3], "-g", "sha256"]
    assert subprocess.run([*words, "-q", nonce], capture_output=True, check=False).returncode == 0
    assert subprocess.run([*words, "-q", "00" * 32], capture_output=True, check=False).returncode != 0


# --- verdicts ------------------------------------------------------------------------------------------------


class SoftTpm:
    """A key that signs what a TPM would, about the emulated kernel's PCRs."""

    def __init__(self, host: support.Host, store: DirectoryStore) -> None:
        self.key = rsa.generate_private_key(65537, 2048)
        public = self.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        self.host, self.store, self.resets = host, store, 7
        self.others: dict[str, dict[str, str]] = {}
        self.machine_id = _emulated.describe(host.kernel)["machine_id"]
        answer = {"changed": True, "machine_id": self.machine_id, "ak": public.decode(), "ak_name": "000b" + "11" * 32}
        self.answer = dict(answer, ek=public.decode())

    def enroll(self) -> dict[str, t.Any]:
        return record_identity(self.store, "h", self.answer, False)

    def quote(self, nonce: str = "ab" * 32, **changes: t.Any) -> dict[str, t.Any]:
        head = self.store.head("h")
        manifest = head.manifest
        pcrs = {str(n): {bank: "00" * size for bank, size in (("sha1", 20), ("sha256", 32))} for n in range(10)}
        pcrs.update(self.others)
        pcrs.update(_emulated.describe(self.host.kernel)["pcrs"])
        bits = sum(1 << int(pcr) for pcr in pcrs).to_bytes(3, "little")
        selection = struct.pack(">I", 2) + b"".join(struct.pack(">HB", a, 3) + bits for a in (0x0004, 0x000B))
        order = [(bank, sorted(int(pcr) for pcr in pcrs)) for bank in ("sha1", "sha256")]
        said = dict(boot_id=manifest["boot_id"], sequence=manifest["sequence"], manifest=head.digest, **changes)
        extra = _tpm.qualifying_data(nonce, self.machine_id, said["boot_id"], said["sequence"], said["manifest"])
        digest = _tpm.pcr_digest(pcrs, order, "sha256")
        attest = struct.pack(">IH", 0xFF544347, 0x8018) + struct.pack(">H", 2) + b"xx"
        attest += struct.pack(">H", len(extra)) + extra + struct.pack(">QIIB", 1, self.resets, 0, 1) + bytes(8)
        attest += selection + struct.pack(">H", len(digest)) + digest
        signature = self.key.sign(attest, padding.PKCS1v15(), hashes.SHA256())
        packed = struct.pack(">HHH", 0x0014, 0x000B, len(signature)) + signature
        return {
            "version": 1, "machine_id": self.machine_id, "nonce": nonce, "pcrs": pcrs, "time": "2026-01-01T00:00:00Z",
            "attest": base64.b64encode(attest).decode(), "signature": base64.b64encode(packed).decode(), **said,
        }  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    (tmp_path / "store").mkdir()
    return DirectoryStore(str(tmp_path / "store"))


@pytest.fixture
def host(tmp_path: Path) -> support.Host:
    return support.Host(tmp_path / "h")


def rotate(host: support.Host, store: DirectoryStore, count: int) -> None:
    host.grow(count)
    host.rotate(store)


def test_a_quote_attests_up_to_its_index(host: support.Host, store: DirectoryStore) -> None:
    tpm = SoftTpm(host, store)
    assert tpm.enroll()["changed"] is True and tpm.enroll() == dict(tpm.enroll(), changed=True)
    rotate(host, store, 5)
    assert verify(store, "h", ()).verdict == "consistent"
    store.put_quote("h", tpm.quote())
    verdict = verify(store, "h", ())
    assert (verdict.verdict, verdict.attested_to, verdict.quotes) == ("attested", 6, 1)
    rotate(host, store, 4)
    assert (verify(store, "h", ()).verdict, verify(store, "h", ()).attested_to) == ("attested", 6)
    rotate(host, store, 3)
    verdict = verify(store, "h", ())
    assert verdict.verdict == "consistent" and any("not covered" in warning for warning in verdict.warnings)


def test_a_quote_whose_values_the_list_never_reaches(host: support.Host, store: DirectoryStore) -> None:
    tpm = SoftTpm(host, store)
    tpm.enroll()
    rotate(host, store, 5)
    quote = tpm.quote()
    quote["pcrs"]["10"]["sha256"] = hashlib.sha256(b"other").hexdigest()
    store.put_quote("h", quote)
    assert verify(store, "h", ()).reason == "quote_pcrs"


def test_records_that_the_tpm_signed_and_nobody_has(host: support.Host, store: DirectoryStore) -> None:
    """The list that was exported is not the one that the TPM extended: another host's PCRs are signed."""
    tpm = SoftTpm(host, store)
    tpm.enroll()
    rotate(host, store, 5)
    twin = support.Host(Path(host.kernel).parent.parent / "twin")
    twin.grow(50)
    tpm.host = twin
    store.put_quote("h", tpm.quote())
    assert verify(store, "h", ()).verdict == "consistent", "it may be what the next shard holds"
    tpm.host = host
    rotate(host, store, 2)
    verdict = verify(store, "h", ())
    assert (verdict.verdict, verdict.reason, verdict.sequence) == ("broken", "quote_not_reached", 1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sequence": 9}, "missing_shard"),
        ({"manifest": "00" * 32}, "missing_shard"),
        ({"machine_id": "0" * 32}, "quote_identity"),
    ],
)
def test_a_quote_about_something_else(
    host: support.Host, store: DirectoryStore, changes: dict[str, t.Any], reason: str
) -> None:
    tpm = SoftTpm(host, store)
    tpm.enroll()
    rotate(host, store, 5)
    head = store.head("h")
    quote = signed_about(tpm, dict({"sequence": head.manifest["sequence"], "manifest": head.digest}, **changes))
    quote["machine_id"] = changes.get("machine_id", tpm.machine_id)
    store.put_quote("h", quote)
    assert (verify(store, "h", ()).verdict, verify(store, "h", ()).reason) == ("broken", reason)


def signed_about(tpm: SoftTpm, said: dict[str, t.Any]) -> dict[str, t.Any]:
    """A quote with a valid signature that names another shard."""
    real_head = tpm.store.head

    class Head(t.NamedTuple):
        manifest: dict[str, t.Any]
        digest: str

    head = real_head("h")
    fake = Head(dict(head.manifest, sequence=said["sequence"]), said["manifest"])
    tpm.store.head = lambda host: fake
    try:
        return tpm.quote()
    finally:
        del tpm.store.head


def test_a_key_on_record_is_made_durable_again(
    host: support.Host, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The enrolment before may have died between the name and its fsync."""
    tpm = SoftTpm(host, store)
    assert tpm.enroll()["changed"] is True
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    tpm.answer["changed"] = False
    assert tpm.enroll()["changed"] is False
    assert os.path.join(store.directory, "hosts", "h") in synced


def test_another_key_is_refused(host: support.Host, store: DirectoryStore) -> None:
    SoftTpm(host, store).enroll()
    with pytest.raises(ImaError) as caught:
        SoftTpm(host, store).enroll()
    assert caught.value.reason == "identity_changed"


def test_a_quote_without_identity_is_not_believed(host: support.Host, store: DirectoryStore) -> None:
    rotate(host, store, 5)
    store.put_quote("h", SoftTpm(host, store).quote())
    assert verify(store, "h", ()).reason == "quote_identity"


def test_a_kexec_shows_in_the_reset_counter(host: support.Host, store: DirectoryStore) -> None:
    """Even where the host says nothing: its TPM was not reset, and its list began anew."""
    tpm = SoftTpm(host, store)
    tpm.enroll()
    rotate(host, store, 5)
    store.put_quote("h", tpm.quote())
    _emulated.reboot(host.kernel)
    rotate(host, store, 5)
    store.put_quote("h", tpm.quote("cd" * 32))
    verdict = verify(store, "h", ())
    assert (verdict.verdict, verdict.reason, verdict.index) == ("broken", "kexec", 6)


def test_a_kexec_that_lost_records_is_named_before_the_quotes_that_nothing_reaches(
    host: support.Host, store: DirectoryStore
) -> None:
    """Seen on a real kernel: the quote of the new boot signs PCRs that begin with what was lost."""
    tpm = SoftTpm(host, store)
    tpm.enroll()
    rotate(host, store, 5)
    store.put_quote("h", tpm.quote())
    lost = host.grow(3)
    _emulated.kexec(host.kernel, False)
    rotate(host, store, 5)
    store.put_quote("h", tpm.quote("cd" * 32))
    rotate(host, store, 5)
    verdict = verify(store, "h", ())
    assert (verdict.verdict, verdict.reason, verdict.index) == ("broken", "kexec", 6), (verdict, lost)
    assert verify(store, "h", (), newest_boot=True).reason == "kexec"
    _emulated.reboot(host.kernel)
    rotate(host, store, 5)
    assert verify(store, "h", (), newest_boot=True).verdict == "consistent"


def test_a_reset_counter_that_rises_is_a_reboot(host: support.Host, store: DirectoryStore) -> None:
    tpm = SoftTpm(host, store)
    tpm.enroll()
    rotate(host, store, 5)
    store.put_quote("h", tpm.quote())
    _emulated.reboot(host.kernel)
    rotate(host, store, 5)
    tpm.resets += 1
    store.put_quote("h", tpm.quote("cd" * 32))
    assert verify(store, "h", ()).verdict == "attested"
    assert canonical(store.identity("h")) and new_run()


def test_a_boot_aggregate_of_other_pcrs(host: support.Host, store: DirectoryStore) -> None:
    tpm = SoftTpm(host, store)
    tpm.enroll()
    rotate(host, store, 5)
    tpm.others["3"] = {"sha1": "01" * 20, "sha256": "01" * 32}
    store.put_quote("h", tpm.quote())
    assert verify(store, "h", ()).reason == "boot_aggregate"
