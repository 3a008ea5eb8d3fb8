# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Stores of real hosts, with TPM quotes, and what kernel and TPM held at that moment (tests/fixtures/stores)."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _tpm
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import SHA1, read
from ansible_collections.integrity.ima.plugins.module_utils._pcr import Replay
from ansible_collections.integrity.ima.plugins.module_utils._stitch import stitch
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import verify

STORES = Path(__file__).resolve().parents[3] / "fixtures" / "stores"
NAMES = sorted(path.name for path in STORES.iterdir() if path.is_dir())
ATTESTED = [name for name in NAMES if "killed" not in name]


class Real:
    """A copy of one of them."""

    def __init__(self, name: str, tmp_path: Path) -> None:
        shutil.copytree(STORES / name / "store", tmp_path / "store")
        self.store = DirectoryStore(str(tmp_path / "store"))
        (self.host,) = self.store.hosts()
        self.meta = json.loads((STORES / name / "meta.json").read_text(encoding="ascii"))
        self.live = (STORES / name / "live.binary").read_bytes()
        self.folder = tmp_path / "store" / "hosts" / self.host

    def verdict(self) -> t.Any:
        return verify(self.store, self.host, ())

    def boot(self) -> list[Path]:
        """The shard files of the boot that runs."""
        return sorted((self.folder / self.meta["boot_id"]).glob("*.ima.gz"))

    def whole(self) -> bytes:
        """The store's records of the boot that runs, and what the kernel holds beyond them."""
        saved = b"".join(gzip.decompress(path.read_bytes()) for path in self.boot())
        ends = [0]
        for record in read(_source(saved), SHA1):
            ends.append(ends[-1] + len(record.raw))
        overlap = saved[ends[self.meta["base"]] :]
        assert self.live.startswith(overlap), "the kernel's list does not begin at the base"
        return saved + self.live[len(overlap) :]


def _source(data: bytes) -> t.Callable[[int], bytes]:
    position = 0

    def read_some(size: int) -> bytes:
        nonlocal position
        piece = data[position : position + size]
        position += len(piece)
        return piece

    return read_some


@pytest.fixture(name="real", params=ATTESTED)
def _real(request: pytest.FixtureRequest, tmp_path: Path) -> Real:
    return Real(request.param, tmp_path)


def test_there_are_such_stores_of_every_flavour() -> None:
    flavours = set()
    for name in NAMES:
        for path in (STORES / name).glob("store/hosts/*/*/*-*-*.json"):
            flavours.add(json.loads(path.read_bytes())["flavour"])
    assert flavours == {"export_only", "delete_n", "staged"}


def test_a_real_host_is_attested(real: Real) -> None:
    said = real.verdict()
    assert said.verdict == "attested" and said.quotes >= 3 and not said.emulated, said


@pytest.mark.parametrize("name", NAMES)
def test_store_and_kernel_together_replay_to_the_tpm(name: str, tmp_path: Path) -> None:
    """Also for the host whose rotation had been killed at that moment."""
    real = Real(name, tmp_path)
    padded = json.loads(next(iter(sorted(real.folder.glob("*/*-*-*.json")))).read_bytes())["padded"]
    replay = Replay(sorted(real.meta["pcrs"]), {}, padded=padded)
    for _row in replay.steps(read(_source(real.whole()), SHA1)):
        pass
    for pcr, row in replay.values().items():
        assert row == {bank: real.meta["pcrs"][bank][pcr] for bank in row}, f"PCR {pcr}"


def test_the_stitched_list_is_the_shards(real: Real, tmp_path: Path) -> None:
    path = tmp_path / "stitched"
    stitch(real.store, real.host, real.meta["boot_id"], str(path), None, False)
    assert path.read_bytes() == b"".join(gzip.decompress(each.read_bytes()) for each in real.boot())


def test_what_a_real_tpm_signed_cannot_be_edited(real: Real) -> None:
    for path in sorted(real.folder.glob("*/*.quote.json")):
        whole = path.read_bytes()
        quote = json.loads(whole)
        for member, reasons in (("attest", "quote_signature malformed_quote"), ("signature", "quote_signature")):
            raw = bytearray(base64.b64decode(quote[member]))
            raw[-1] ^= 1
            changed = dict(quote, **{member: base64.b64encode(raw).decode()})
            path.write_bytes(json.dumps(changed, sort_keys=True, separators=(",", ":")).encode())
            said = real.verdict()
            assert said.verdict == "broken" and said.reason in reasons.split(), said
        path.write_bytes(whole)
    assert real.verdict().verdict == "attested"


def test_a_quoted_shard_cannot_be_taken_away(real: Real) -> None:
    """The newest shards are missing, and no fleet document tells of them: the quote does."""
    quoted = max(int(path.name[:8]) for path in real.folder.glob("*/*.quote.json"))
    for path in real.folder.glob("*/*"):
        if int(path.name[:8]) >= quoted and not path.name.endswith(".quote.json"):
            path.unlink()
    said = real.verdict()
    assert (said.verdict, said.reason) == ("broken", "missing_shard")


@pytest.mark.skipif(not shutil.which("tpm2_checkquote"), reason="tpm2_checkquote (tpm2-tools) is not installed")
def test_tpm2_checkquote_accepts_every_quote(real: Real, tmp_path: Path) -> None:
    identity = json.loads((real.folder / "identity.json").read_bytes())
    (tmp_path / "ak.pem").write_text(identity["ak"], encoding="ascii")
    for path in real.folder.glob("*/*.quote.json"):
        quote = json.loads(path.read_bytes())
        for member in ("attest", "signature"):
            (tmp_path / member).write_bytes(base64.b64decode(quote[member]))
        keys = ("nonce", "machine_id", "boot_id", "sequence", "manifest")
        extra = hashlib.sha256("\n".join(["integrity.ima quote 1", *(str(quote[key]) for key in keys)]).encode())
        assert extra.digest() == _tpm.qualifying_data(*(quote[key] for key in keys))
        words = ["tpm2_checkquote", "-u", "ak.pem", "-m", "attest", "-s", "signature", "-g", "sha256"]
        done = subprocess.run([*words, "-q", extra.hexdigest()], cwd=tmp_path, capture_output=True, check=False)
        assert done.returncode == 0, os.fsdecode(done.stderr)
