# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""TPM quotes: making them with tpm2-tools on the host, and checking them on the controller.

Structures: TCG TPM 2.0 Library, part 2: TPMS_ATTEST (10.12.8), TPMS_QUOTE_INFO (10.12.1), TPML_PCR_SELECTION (10.9.7),
TPMT_SIGNATURE (11.3.4), TPMS_CLOCK_INFO (10.11.1). All integers are big-endian.
"""

from __future__ import annotations

import base64
import hashlib
import os
import struct
import subprocess
import tempfile
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, printable
from ansible_collections.integrity.ima.plugins.module_utils._pcr import BANKS, Values

HANDLE = "0x81010a1a"
_MAGIC = 0xFF544347  # TPM_GENERATED_VALUE: only the TPM itself signs what begins like this
_ATTEST_QUOTE = 0x8018
_HASHES = {0x0004: "sha1", 0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
_RSASSA, _RSAPSS, _ECDSA = 0x0014, 0x0016, 0x0018
_TIMEOUT = 120  # seconds for one command of tpm2-tools


class QuoteError(ImaError):
    """A quote is malformed, is not signed by the key, or does not say what it was asked for."""

    default_reason = "quote"


class TpmError(ImaError):
    """The TPM, or tpm2-tools, did not do what was asked."""

    default_reason = "tpm"


class Attest(t.NamedTuple):
    """A parsed TPMS_ATTEST of a quote."""

    signer: bytes
    extra: bytes
    clock: int
    reset_count: int
    restart_count: int
    safe: bool
    selection: list[tuple[str, list[int]]]
    pcr_digest: bytes


class _Reader:
    """Bytes taken from the front, never beyond the end."""

    def __init__(self, data: bytes, what: str) -> None:
        self._data, self._at, self._what = data, 0, what

    def take(self, size: int) -> bytes:
        piece = self._data[self._at : self._at + size]
        if len(piece) != size:
            raise QuoteError(f"{self._what} ends too early", reason="malformed_quote")
        self._at += size
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def sized(self) -> bytes:
        return self.take(self.number(2))

    def end(self) -> None:
        if self._at != len(self._data):
            raise QuoteError(f"{self._what} has bytes behind its end", reason="malformed_quote")


def parse_attest(data: bytes) -> Attest:
    """Return the quote in ``data``. Raises :class:`QuoteError` ``malformed_quote``."""
    reader = _Reader(data, "the attestation")
    if reader.number(4) != _MAGIC or reader.number(2) != _ATTEST_QUOTE:
        raise QuoteError("This is not a quote that a TPM made", reason="malformed_quote")
    signer, extra = reader.sized(), reader.sized()
    clock, resets, restarts, safe = struct.unpack(">QIIB", reader.take(17))
    reader.take(8)  # firmware version
    selection = [_selected(reader) for _number in range(min(reader.number(4), 17))]
    pcr_digest = reader.sized()
    reader.end()
    return Attest(signer, extra, clock, resets, restarts, safe == 1, selection, pcr_digest)


def _selected(reader: _Reader) -> tuple[str, list[int]]:
    algorithm = reader.number(2)
    if algorithm not in _HASHES:
        raise QuoteError(f"The quote covers a bank with algorithm 0x{algorithm:04x}", reason="malformed_quote")
    bits = int.from_bytes(reader.take(reader.number(1)), "little")
    return _HASHES[algorithm], [pcr for pcr in range(32) if bits >> pcr & 1]


def qualifying_data(nonce: str, machine_id: str, boot_id: str, sequence: int, manifest: str) -> bytes:
    """Return what the TPM signs beside the PCRs: who, when (``nonce``, hex), and the shard that it follows."""
    text = "\n".join(("integrity.ima quote 1", nonce, machine_id, boot_id, str(sequence), manifest))
    return hashlib.sha256(text.encode("ascii")).digest()


def pcr_digest(values: Values, selection: t.Sequence[tuple[str, list[int]]], algorithm: str) -> bytes:
    """Return the digest over the selected PCRs (TPM 2.0 part 1, 17.5). Raises :class:`QuoteError` ``quote_pcrs``."""
    digest = hashlib.new(algorithm)
    for bank, pcrs in selection:
        for pcr in pcrs:
            value = values.get(str(pcr), {}).get(bank)
            if value is None:
                raise QuoteError(
                    f"The quote covers PCR {pcr} of bank {bank}, whose value is not given", reason="quote_pcrs"
                )
            digest.update(bytes.fromhex(value))
    return digest.digest()


def check_quote(attest: bytes, signature: bytes, key: str, extra: bytes, values: Values) -> Attest:
    """Check a quote wholly: signature by ``key`` (PEM), qualifying data, and that it covers just ``values``.

    Raises :class:`QuoteError` with reason ``malformed_quote``, ``quote_signature``, ``quote_nonce``, ``quote_pcrs`` or
    ``quote_coverage``; ``no_cryptography`` where the library is missing or too old.
    """
    quote = parse_attest(attest)
    algorithm = _check_signature(attest, signature, key)
    if quote.extra != extra:
        raise QuoteError("The quote was made for another nonce, host or shard", reason="quote_nonce")
    if quote.pcr_digest != pcr_digest(values, quote.selection, algorithm):
        raise QuoteError("The PCR values beside the quote are not those that it signs", reason="quote_pcrs")
    covered = {(str(pcr), bank) for bank, pcrs in quote.selection for pcr in pcrs}
    if covered != {(pcr, bank) for pcr, banks in values.items() for bank in banks}:
        raise QuoteError("Values are given that the quote does not cover", reason="quote_coverage")
    return quote


def check_document(quote: dict[str, t.Any], identity: dict[str, t.Any]) -> Attest:
    """Check a quote document (of the schema) against a host's recorded identity. Raises as :func:`check_quote`."""
    if identity.get("machine_id") != quote["machine_id"]:
        raise QuoteError("The quote is of a machine whose attestation key is not known", reason="quote_identity")
    extra = qualifying_data(quote["nonce"], quote["machine_id"], quote["boot_id"], quote["sequence"], quote["manifest"])
    try:
        attest, signature = (base64.b64decode(quote[key], validate=True) for key in ("attest", "signature"))
    except ValueError as error:
        raise QuoteError("The quote is not base64", reason="malformed_quote") from error
    return check_quote(attest, signature, identity["ak"], extra, quote["pcrs"])


def _check_signature(attest: bytes, signature: bytes, key: str) -> str:
    """Verify a TPMT_SIGNATURE over ``attest``; return its hash algorithm."""
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.backends import default_backend
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa, utils
    except ImportError as error:
        raise QuoteError(
            "Checking a quote needs the Python library cryptography",
            reason="no_cryptography",
            hint="run the verifier with the controller's own Python, which has it",
        ) from error
    reader = _Reader(signature, "the signature")
    scheme, algorithm = reader.number(2), _HASHES.get(reader.number(2), "")
    if algorithm not in ("sha256", "sha384", "sha512"):
        raise QuoteError("The signature's hash is not one that can be trusted", reason="quote_signature")
    chosen = {"sha256": hashes.SHA256(), "sha384": hashes.SHA384(), "sha512": hashes.SHA512()}[algorithm]
    try:
        # before 3.1 the library wants its backend named
        public = serialization.load_pem_public_key(key.encode("ascii"), default_backend())
        if isinstance(public, rsa.RSAPublicKey) and scheme in (_RSASSA, _RSAPSS):
            data = reader.sized()
            reader.end()
            if scheme == _RSASSA:
                public.verify(data, attest, padding.PKCS1v15(), chosen)
            elif hasattr(padding.PSS, "AUTO"):
                public.verify(data, attest, padding.PSS(padding.MGF1(chosen), padding.PSS.AUTO), chosen)
            else:  # a TPM's salt has one of two lengths, which an older library cannot find out
                raise QuoteError("Checking an RSA-PSS quote needs cryptography 37 or newer", reason="no_cryptography")
        elif isinstance(public, ec.EllipticCurvePublicKey) and scheme == _ECDSA:
            r, s = (int.from_bytes(reader.sized(), "big") for _part in "rs")
            reader.end()
            public.verify(utils.encode_dss_signature(r, s), attest, ec.ECDSA(chosen))
        else:
            raise QuoteError("The signature is not of the key's kind", reason="quote_signature")
    except (InvalidSignature, ValueError, UnsupportedAlgorithm) as error:
        raise QuoteError("The quote is not signed by the host's attestation key", reason="quote_signature") from error
    return algorithm


# -- on the host --


def _tool(directory: str, *words: str) -> bytes:
    """Run one command of tpm2-tools in ``directory``. Raises :class:`TpmError` ``no_tpm2_tools`` or ``tpm``."""
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "LC_ALL": "C",
        "TPM2TOOLS_TCTI": os.environ.get("TPM2TOOLS_TCTI", "device:/dev/tpmrm0"),
    }
    try:
        # run_command is a module's, which the command is not
        done = subprocess.run(  # pylint: disable=ansible-bad-function
            words,
            cwd=directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except FileNotFoundError as error:
        raise TpmError(
            f"{words[0]} is not installed",
            reason="no_tpm2_tools",
            hint="install the package tpm2-tools on this host",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise TpmError(f"{words[0]} did not answer within {_TIMEOUT} s", reason="tpm") from error
    if done.returncode:
        said = printable(done.stderr)[-400:]
        raise TpmError(f"{words[0]} failed with status {done.returncode}: {said}", reason="tpm")
    return done.stdout


def _file(directory: str, name: str) -> bytes:
    with open(os.path.join(directory, name), "rb") as file:
        return file.read(1 << 16)


def enroll(handle: str = HANDLE, create: bool = True) -> dict[str, t.Any] | None:
    """Return the attestation key at a persistent handle: ``ak`` (PEM), ``ak_name``, ``ek`` (PEM) and ``made``.

    Made with the default RSA endorsement key when the handle is free; None then if ``create`` is false.
    """
    with tempfile.TemporaryDirectory() as work:
        handles = _tool(work, "tpm2_getcap", "handles-persistent").decode("ascii", "replace").lower()
        made = handle.lower() not in handles
        if made and not create:
            return None
        _tool(work, "tpm2_createek", "-Q", "-c", "ek.ctx", "-G", "rsa", "-u", "ek.pub")
        if made:
            _tool(
                work,
                "tpm2_createak",
                "-Q",
                "-C",
                "ek.ctx",
                "-c",
                "ak.ctx",
                "-G",
                "rsa",
                "-g",
                "sha256",
                "-s",
                "rsassa",
                "-u",
                "ak.pub",
                "-n",
                "ak.made",
            )
            _tool(work, "tpm2_evictcontrol", "-Q", "-C", "o", "-c", "ak.ctx", handle)
        _tool(work, "tpm2_readpublic", "-Q", "-c", handle, "-f", "pem", "-o", "ak.pem", "-n", "ak.name")
        _tool(work, "tpm2_readpublic", "-Q", "-c", "ek.ctx", "-f", "pem", "-o", "ek.pem")
        return {
            "ak": _file(work, "ak.pem").decode("ascii"),
            "ak_name": _file(work, "ak.name").hex(),
            "ek": _file(work, "ek.pem").decode("ascii"),
            "made": made,
        }


def quote(handle: str, extra: bytes, banks: t.Sequence[str], pcrs: t.Sequence[int]) -> tuple[bytes, bytes]:
    """Return a TPM2_Quote over ``pcrs`` of every bank, with ``extra`` as qualifying data: attestation and signature."""
    numbers = ",".join(str(pcr) for pcr in sorted(pcrs))
    selection = "+".join(f"{bank}:{numbers}" for bank in BANKS if bank in banks)
    with tempfile.TemporaryDirectory() as work:
        _tool(
            work,
            "tpm2_quote",
            "-Q",
            "-c",
            handle,
            "-l",
            selection,
            "-q",
            extra.hex(),
            "-m",
            "msg",
            "-s",
            "sig",
            "-g",
            "sha256",
        )
        return _file(work, "msg"), _file(work, "sig")
