# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Everything that parses foreign bytes, fed with real inputs that were damaged, and with plain noise.

Whatever comes in: an input is accepted, or refused with a reason that docs/verdicts.md explains. Nothing else is
raised, no more is read than is there, and an input of 1 MiB takes at most 64 MiB of memory. What was accepted and is
written out again gives the same bytes.

``fuzz/<target>.json`` holds one small input for each reason that a target can give; they are always replayed.
``FUZZ_CORPUS=1`` adds what is missing there.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import copy
import functools
import gzip
import importlib
import io
import itertools
import json
import os
import re
import secrets
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import tracemalloc
import typing as t
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils import _protocol, _rotation, _saved_list, _securityfs, _tpm
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, ListError, StoreError
from ansible_collections.integrity.ima.plugins.module_utils._fleet import member
from ansible_collections.integrity.ima.plugins.module_utils._schema import IDENTITY, QUOTE, canonical, parse
from ansible_collections.integrity.ima.plugins.module_utils._shard import (
    ShardReader,
    aggregate_text,
    anchor_content,
    digest,
    entry_of,
    parse_manifest,
    parse_name,
)
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._store._base import follows
from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import Unfit, claims_of, verify, verify_fleet
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa

LONG = os.environ.get("LONG") == "1"
SECONDS = float(os.environ.get("FUZZ_SECONDS", "45"))  # for each target, with LONG=1
MOST_MEMORY = 64 << 20
LARGEST = 1 << 20
MOST_INPUT = 1 << 16  # of what is mutated; larger inputs have a test of their own
ACCEPTED = "accepted"

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).resolve().parent / "fuzz"
CAPTURES = ROOT / "tests" / "fixtures" / "captures"
PLUGINS = ROOT / "plugins" / "module_utils"
PARSERS = (
    "_measurement_list",
    "_pcr",
    "_protocol",
    "_rotation",
    "_saved_list",
    "_schema",
    "_shard",
    "_tpm",
    "_verifier",
)
NONCE = "ab" * 32

Json = t.Any
Tally = t.Callable[[str, float], None]


def documented() -> set[str]:
    """Every reason in the first column of a table in docs/verdicts.md, and those of the last paragraph."""
    lines = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8").splitlines()
    cells = [line.split("|")[1] if line.startswith("|") else line for line in lines if line[:1] in ("|", "`")]
    return {reason for cell in cells for reason in re.findall(r"`([a-z0-9_]+)`", cell)}


DOCUMENTED = documented()


def reason_of(act: t.Callable[[], object], *, files: bool = False) -> str:
    """Say how it ended. With ``files``, the system's own errors are among what the modules answer (``system``)."""
    try:
        act()
    except ImaError as error:
        assert str(error).isprintable()
        if isinstance(error, _rotation.HostFailed):
            assert re.match(r"[a-z0-9_]{1,40}\Z", error.reason)
            return error.default_reason  # the word itself is the host's
        assert error.reason in DOCUMENTED, f"{error.reason} is not documented"
        json.dumps(error.result())
        return error.reason
    except OSError:
        if not files:
            raise
        return "system"
    return ACCEPTED


class Source:
    """Bytes as a ``read(size)`` source that counts: pieces of odd sizes, and no more than a few reads at the end."""

    def __init__(self, data: bytes, piece: int = 4099) -> None:
        self._data, self._at, self._piece, self._reads = data, 0, piece, 0

    def __call__(self, size: int) -> bytes:
        self._reads += 1
        assert self._reads <= len(self._data) // self._piece + 4, "more is read than there is"
        piece = self._data[self._at : self._at + min(size, self._piece)]
        self._at += len(piece)
        return piece

    read = __call__


# --- damage -----------------------------------------------------------------------------------------------------------

WORDS = (0, 1, 2, 20, 23, 24, 255, 256, 4096, 65535, 65536, (8 << 20) - 1, 8 << 20, (8 << 20) + 1, 1 << 24, 1 << 31)
EDGES = WORDS + ((1 << 31) - 1, (1 << 32) - 1, (1 << 32) - 4, (1 << 32) - 28)
VALUES: tuple[Json, ...] = (
    None, True, False, 0, 1, -1, 2, 1.5, "", "x", "\0", "/", "..", "../../x", "\ud800", "x" * 3000, [], {}, [[]],
    [0] * 20, 1 << 40, (1 << 53) - 1, 1 << 53, (1 << 53) + 1, 1 << 63, 1 << 64, 10**19, -(10**19), 10**30, 99999999,
    100000000, "00" * 20, "00" * 32, "ff" * 32, "0" * 64 + "\n", "00000000-0000-0000-0000-000000000000", {"x": 1},
    "=", "AA==", "é", "9999-99-99T99:99:99Z", "0000-00-00T00:00:00Z", "sha512", {"24": {}}, {"10": {"sha1": "0"}},
)  # fmt: skip


class Edit(t.NamedTuple):
    """One change of an input; what ``place`` and ``size`` mean depends on the kind and on the input's length."""

    kind: int
    place: int
    size: int
    number: int
    data: bytes


def damage(data: bytes, edits: t.Sequence[Edit], others: t.Sequence[bytes]) -> bytes:
    """Flip, cut, remove, duplicate, splice, insert, overwrite, and put numbers where lengths may be."""
    for edit in edits:
        at = edit.place % (len(data) + 1)
        end = min(len(data), at + edit.size % 97 + 1)
        word = EDGES[edit.number % len(EDGES)]
        other = others[edit.number % len(others)]
        start = edit.size % (len(other) + 1)
        data = _damaged(edit, data, at, end, word, other[start : start + 300])[:MOST_INPUT]
    return data


def _damaged(edit: Edit, data: bytes, at: int, end: int, word: int, other: bytes) -> bytes:
    """One change at ``at``, or of what lies between ``at`` and ``end``."""
    before, inside, after = data[:at], data[at:end], data[end:]
    kinds: tuple[t.Callable[[], bytes], ...] = (
        lambda: before + bytes(byte ^ 1 << edit.number % 8 for byte in inside[:1]) + inside[1:] + after,
        lambda: before,
        lambda: inside + after,
        lambda: before + after,
        lambda: before + inside + inside + after,
        lambda: before + other + inside + after,
        lambda: before + edit.data + inside + after,
        lambda: before + edit.data + data[at + len(edit.data) :],
        lambda: before + struct.pack("<I", word) + data[at + 4 :],
        lambda: before + struct.pack(">I", word) + data[at + 4 :],
        lambda: before + struct.pack(">H", word & 0xFFFF) + data[at + 2 :],
        lambda: before + inside * (edit.number % 40) + after,
        lambda: before + b"%d" % (word << edit.size % 40) + after,
    )
    return kinds[edit.kind % len(kinds)]()


def restamped(data: bytes, layout: ml.Layout = ml.SHA1) -> bytes:
    """A damaged list with the template digests that its records ought to have, as a forger would make them."""
    stamped = []
    with contextlib.suppress(ListError):
        for record in ml.read(Source(data), layout, verify=False):
            stamped.append(
                record.raw if record.violation else ml.convert(record, layout.byte_order, layout.digest_size)
            )
    return b"".join(stamped)


def paths(document: Json, here: tuple[t.Any, ...] = ()) -> t.Iterator[tuple[t.Any, ...]]:
    """The path of everything in a document."""
    yield here
    items = (
        document.items() if isinstance(document, dict) else enumerate(document) if isinstance(document, list) else ()
    )
    for key, value in items:
        yield from paths(value, (*here, key))


def rewrite(data: bytes, edits: t.Sequence[Edit], others: t.Sequence[bytes]) -> bytes:
    """Change members of a document: another value, none, one more; strings within it may be documents themselves."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return damage(data, edits, others)
    for edit in edits:
        document = _rewritten(document, edit)
    return canonical(document)[: 4 * MOST_INPUT]


def _rewritten(document: Json, edit: Edit) -> Json:
    known = list(paths(document))
    path = known[edit.place % len(known)]
    if not path:
        return VALUES[edit.number % len(VALUES)] if edit.kind % 16 == 15 else document
    parent = document
    for key in path[:-1]:
        parent = parent[key]
    key, old = path[-1], parent[path[-1]]
    value = copy.deepcopy(VALUES[edit.number % len(VALUES)])
    kind = edit.kind % 8
    if isinstance(old, str) and old.startswith("{") and kind < 5:
        with contextlib.suppress(ValueError):
            # A manifest or a quote within an answer: change that one.
            value = canonical(_rewritten(json.loads(old), edit._replace(place=edit.size))).decode("ascii")
    elif isinstance(old, str) and old and kind < 2:
        at = edit.size % len(old)
        value = old[:at] + chr(33 + edit.number % 90) + old[at + 1 :]
    elif isinstance(old, int) and kind < 2:
        value = old + edit.number % 5 - 2
    if kind == 7 and isinstance(parent, dict):
        parent[str(value)[:40]] = parent.pop(key)
    elif kind == 6:
        del parent[key]
    elif kind == 5 and isinstance(parent, list):
        parent.insert(key, old)
    else:
        parent[key] = value
    return document


EDITS = st.lists(
    st.builds(
        Edit,
        st.integers(0, 207),
        st.integers(0, 65535),
        st.integers(0, 65535),
        st.integers(0, 65535),
        st.binary(max_size=9),
    ),
    min_size=1,
    max_size=5,
)


def inputs(samples: t.Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Damaged samples, rewritten ones where they are documents, and noise."""

    # By number: hypothesis would print every sample with each failure.
    def sample(number: int) -> bytes:
        return samples[number]

    some = st.integers(0, len(samples) - 1).map(sample)
    damaged = st.builds(lambda data, edits: damage(data, edits, samples), some, EDITS)
    rewritten = st.builds(lambda data, edits: rewrite(data, edits, samples), some, EDITS)
    likely = rewritten if samples[0][:1] in (b"{", b"[") else damaged
    return st.one_of(damaged, likely, likely, some, st.binary(max_size=400))


# --- one host, one store, from which the samples are taken ------------------------------------------------------------


class Key(t.NamedTuple):
    """A key that signs as a TPM does, and the identity document that names it."""

    sign: t.Callable[[bytes], bytes]
    identity: dict[str, t.Any]


def key_of(machine_id: str, elliptic: bool = False) -> Key:
    """Make an attestation key."""
    private: t.Any = ec.generate_private_key(ec.SECP256R1()) if elliptic else rsa.generate_private_key(65537, 1024)
    form = (serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    pem = private.public_key().public_bytes(*form).decode("ascii")

    def sign(attest: bytes) -> bytes:
        if not elliptic:
            data = private.sign(attest, padding.PKCS1v15(), hashes.SHA256())
            return struct.pack(">HHH", 0x0014, 0x000B, len(data)) + t.cast(bytes, data)
        from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

        pair = decode_dss_signature(private.sign(attest, ec.ECDSA(hashes.SHA256())))
        return struct.pack(">HH", 0x0018, 0x000B) + b"".join(
            struct.pack(">H", 32) + number.to_bytes(32, "big") for number in pair
        )

    identity = {"version": 1, "machine_id": machine_id, "ak": pem, "ek": pem, "ak_name": "000b" + "11" * 32}
    return Key(sign, dict(identity, time="2026-01-01T00:00:00Z"))


def quote_by(key: Key, manifest: dict[str, t.Any], head: str) -> dict[str, t.Any]:
    """A quote that follows a manifest."""
    pcrs = {str(n): {bank: "00" * size for bank, size in (("sha1", 20), ("sha256", 32))} for n in range(10)}
    pcrs.update(manifest["pcrs_end"])
    order = [(bank, sorted(int(pcr) for pcr in pcrs)) for bank in ("sha1", "sha256")]
    extra = _tpm.qualifying_data(NONCE, manifest["machine_id"], manifest["boot_id"], manifest["sequence"], head)
    signed = _tpm.pcr_digest(pcrs, order, "sha256")
    bits = sum(1 << int(pcr) for pcr in pcrs).to_bytes(3, "little")
    attest = struct.pack(">IHH", 0xFF544347, 0x8018, 2) + b"xx" + struct.pack(">H", len(extra)) + extra
    attest += struct.pack(">QIIB", 1, 7, 0, 1) + bytes(8) + struct.pack(">I", 2)
    attest += b"".join(struct.pack(">HB", name, 3) + bits for name in (0x0004, 0x000B))
    attest += struct.pack(">H", len(signed)) + signed
    said = {key: manifest[key] for key in ("machine_id", "boot_id", "sequence")}
    encoded = {"attest": attest, "signature": key.sign(attest)}
    return dict(
        {name: base64.b64encode(value).decode("ascii") for name, value in encoded.items()},
        version=1, nonce=NONCE, manifest=head, pcrs=pcrs, time="2026-01-01T00:00:00Z", **said,
    )  # fmt: skip


class World:
    """An honest host and its store in a directory, and room to try things out."""

    def __init__(self, root: Path) -> None:
        self.root = root
        names = {"machine_id": "5e" * 16, "boot_id": "5eed5eed-5eed-5eed-5eed-5eed5eed5eed"}
        self.host = support.Host(root / "h", flavour="export_only", shard_records=3, **names)
        self.host.grow(2)
        self.store = support.new_store(root / "store")
        self.answers: list[Json] = []
        self.rotate()
        self.host.grow(3)
        self.rotate()
        self.sealed = support.take(self.store)
        manifest = self.sealed[0].manifest
        self.key, self.other = key_of(manifest["machine_id"]), key_of(manifest["machine_id"], elliptic=True)
        self.quotes = [quote_by(each, manifest, digest(canonical(manifest))) for each in (self.key, self.other)]
        self.spool = Spool(self.host.spool)
        run = support.write_fleet(self.store, 1, {"h": self.last.result(), "gone": {"unreachable": True, "msg": "x"}})
        self.fleet = Path(self.store.directory, "fleet", f"{run}.json")

    def rotate(self) -> None:
        def call(one_round: Json) -> Json:
            self.answers.append(self.host.answer(one_round))
            return copy.deepcopy(self.answers[-1])

        self.last = self.host.rotation(self.store, call=call)
        self.last.run()

    def stored(self, number: int = 0) -> bytes:
        """The file of a shard."""
        return Path(support.paths(self.store, self.sealed[number])[0]).read_bytes()

    @contextlib.contextmanager
    def room(self) -> t.Iterator[Path]:
        """An empty directory for one input."""
        path = self.root / "room"
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path)

    @contextlib.contextmanager
    def copy_of(self, original: str) -> t.Iterator[str]:
        """A copy of a spool or a store for one input."""
        with self.room() as room:
            yield str(shutil.copytree(original, room / "copy"))


# --- the targets: an input's bytes in, its reason out -----------------------------------------------------------------


class Target:
    """Something that parses foreign bytes: real inputs, and what to do with one."""

    examples = 300
    elsewhere: t.ClassVar[set[str]] = set()  # reasons that depend on more than the input: they cannot be kept

    def __init__(self, world: World) -> None:
        self.world = world
        self.samples = self.real()

    def real(self) -> list[bytes]:
        raise NotImplementedError

    def run(self, data: bytes) -> str:
        raise NotImplementedError


def captures(pattern: str) -> list[bytes]:
    """Real lists of all kernels, the shortest first; of long ones the beginning."""
    found = sorted(CAPTURES.glob(pattern), key=lambda path: (path.stat().st_size, str(path)))
    return [path.read_bytes()[:5000] for path in found if path.stat().st_size]


class BinaryList(Target):
    """A binary list of any bank and byte order, and what is done with each of its records."""

    def real(self) -> list[bytes]:
        kept = captures("fixtures/*.binary_*")[:16] + captures("kernel-lab/*/binary_runtime_measurements*")[::5]
        records = [record for data in kept[:1] for record in ml.read(Source(data))]
        other = ml.Layout(32, "big")
        for record in records[:3]:
            kept.append(ml.encode(record.pcr, record.template, ml.fields(record, "little"), other))
        for template in ("d-ng|n-ng|iuid|imode", "new|fields", "ima"):
            kept.append(
                ml.encode(10, template, [b"\1" * 20, b"x"] if template == "ima" else [b"sha1:\0", b"x\0"], ml.SHA1)
            )
        return kept

    def run(self, data: bytes) -> str:
        layouts = [ml.SHA1]
        with contextlib.suppress(ListError):
            layouts.append(ml.detect(data[:65536]) or ml.SHA1)
        for layout in layouts:
            reason_of(functools.partial(self.walk, data, layout, False))
        forged = restamped(data, layouts[-1])
        reason_of(lambda: self.walk(forged, layouts[-1], True))
        return reason_of(lambda: self.walk(data, layouts[-1], True))

    @staticmethod
    def walk(data: bytes, layout: ml.Layout, verify: bool) -> None:
        """Read it all; what was read is what was there, record by record."""
        raws = []
        try:
            for record in ml.read(Source(data), layout, verify=verify):
                raws.append(record.raw)
                reason_of(functools.partial(BinaryList.use, record, layout, verify))
        finally:
            assert b"".join(raws) == data[: sum(map(len, raws))]
        assert b"".join(raws) == data

    @staticmethod
    def use(record: ml.Record, layout: ml.Layout, verified: bool) -> None:
        """Render it, convert it, and read that again."""
        order = layout.byte_order
        ml.event_name(record, order)
        ml.file_digest(record, order)
        ml.starts_boot(record, order)
        values = ml.fields(record, order)
        again = ml.encode(record.pcr, record.template, values, layout, violation=record.violation)
        assert (
            record.violation or not verified or again[4 + layout.digest_size :] == record.raw[4 + layout.digest_size :]
        )
        for size in ml.DIGEST_SIZES:
            (other,) = ml.read(Source(ml.convert(record, order, size)), ml.Layout(size, order), verify=verified)
            assert (other.pcr, other.template, other.data) == (record.pcr, record.template, record.data)
        assert ml.to_ascii(record, order).endswith(b"\n")


class SavedList(Target):
    """A saved list of any form, ASCII too, replayed in two banks."""

    def real(self) -> list[bytes]:
        kept = captures("fixtures/*.ascii")[:10] + captures("kernel-lab/*/ascii_runtime_measurements*")[::6]
        zeros = b"10 " + b"0" * 40 + b" ima-ng sha1:" + b"0" * 40 + b" /v\n"
        named = b"10 " + b"1" * 40 + b" d-ng|n-ng|iuid sha1:" + b"0" * 40 + b" /v 7\n"
        return [*kept, zeros * 3, named, *captures("fixtures/*.binary_*")[:4], b""]

    def run(self, data: bytes) -> str:
        self.again(data)
        return reason_of(
            lambda: _saved_list._replay(io.BytesIO(data), ["sha1", "sha256"], {}, {"10": {"sha256": "00" * 32}})
        )

    @staticmethod
    def again(data: bytes) -> None:
        """A text that was accepted, written out and read again, holds the same records."""
        records: list[ml.Record] = []

        def accept() -> None:
            records.extend(ml.read_ascii(Source(data)))

        if reason_of(accept) == ACCEPTED:
            order = next((each for each in ("little", "big") if _reads_as(records, each)), "")
            assert order, "the text does not give the same records again"


def _reads_as(records: list[ml.Record], order: str) -> bool:
    try:
        text = b"".join(ml.to_ascii(record, order) for record in records)
        again = list(ml.read_ascii(Source(text), byte_order=order))
    except ListError:
        return False
    return [record.raw for record in again] == [record.raw for record in records]


class Manifest(Target):
    """A manifest, as a host sends it."""

    def real(self) -> list[bytes]:
        manifests = [sealed.manifest for sealed in self.world.sealed]
        fault = {"boot_id": manifests[0]["boot_id"], "found": manifests[0]["boot_id"], "index": 1, "lost": True}
        anchors = [{"index": 1, "sequence": 1, "sha256": "00" * 32}]
        full = dict(manifests[1], anchors=anchors, faults=[dict(fault, reason="kexec", message="x")], padded=["sha256"])
        return [canonical(each) for each in [*manifests, full]]

    def run(self, data: bytes) -> str:
        def use() -> None:
            manifest = parse_manifest(data, "the manifest")
            assert canonical(manifest) == data
            entry = entry_of(manifest)
            assert parse_name(entry.boot_id, os.path.basename(entry.manifest)) == (entry, ".json")
            follows(manifest, None)
            follows(manifest, self.world.store.head("h"))
            assert aggregate_text(manifest).encode("ascii") in anchor_content(manifest, digest(data))
            reason_of(lambda: self.world.store.accept("h", data, None))
            with self.world.room() as room:
                support.new_store(room).accept("h", data, None)

        return reason_of(use)


class Acknowledgement(Target):
    """The store's word in the spool: what cannot be read is none, and it never allows a trim."""

    def real(self) -> list[bytes]:
        word = {"version": 1, "sequence": 1, "manifest": "DIGEST", "store": "s", "verdict": ""}
        return [canonical(dict(word, time="2026-01-01T00:00:00Z"))]

    def run(self, data: bytes) -> str:
        entry = self.world.spool.entries[0]
        path = Path(self.world.spool.shards, entry.stem + ".ack")
        data = data.replace(b"DIGEST", self.world.spool.digest(entry).encode("ascii"))
        path.write_bytes(data)
        word = self.world.spool.acknowledgement(entry)
        assert self.world.spool.allowed(entry, "central") is bool(word)
        assert word is None or canonical(word) == data
        return ACCEPTED if word else "ignored"


class Journal(Target):
    """The journal: what cannot be read is none."""

    def real(self) -> list[bytes]:
        head = self.world.sealed[1].manifest
        trim = {"base": 0, "target": 3, "manifest": "00" * 32}
        fault = {"reason": "kexec", "boot_id": head["boot_id"], "index": 0, "found": head["boot_id"], "lost": True}
        journal = {"version": 1, "boot_id": head["boot_id"], "base": 0, "trim": trim, "seal": head}
        return [
            canonical(dict(journal, faults=[dict(fault, message="x")])),
            canonical(dict(journal, seal=None, faults=[])),
        ]

    def run(self, data: bytes) -> str:
        with self.world.room() as room:
            (room / "journal.json").write_bytes(data)
            (room / "generation").write_bytes(data[-30:])
            assert _protocol.generation(str(room)) >= 0
            journal = Spool(str(room)).journal()
        return ACCEPTED if canonical(journal) == data else "ignored"


class Config(Target):
    """The well-known config; where it is accepted, the lock and the spool that it names are looked for."""

    def real(self) -> list[bytes]:
        own = Path(self.world.host.config).read_bytes().replace(os.fsencode(self.world.root), b"/nowhere")
        lines = [b"[snapshot]", b"spool = /nowhere/spool", b"lock = /nowhere/lock", b"# x", b"", b"name = a b"]
        return [own, b"\n".join(lines), b"[snapshot]\nspool=/nowhere\n[list]\nsource=kernel\nbusy_timeout=3600\n"]

    def run(self, data: bytes) -> str:
        def use() -> None:
            with self.world.room() as room:
                path = room / "snapshot.conf"
                path.write_bytes(data)
                os.chmod(path, 0o644)
                config = _protocol.load(str(path))
                assert config.name and os.path.isabs(config.spool) and 0 <= config.lock_timeout <= 86400
                if "\0" in config.spool + config.lock + config.directory:
                    return  # see test_a_path_with_a_nul_in_the_config
            with contextlib.suppress(ImaError), _protocol.Lock(config, shared=True, create=False):
                pass
            with contextlib.suppress(ImaError):
                Spool(config.spool).check()

        return reason_of(use)


class Attest(Target):
    """What a TPM signed."""

    def real(self) -> list[bytes]:
        kept = [path.read_bytes() for path in sorted(CAPTURES.glob("kernel-lab/*/quote*.msg"))[::7]]
        return kept + [base64.b64decode(quote["attest"]) for quote in self.world.quotes]

    def run(self, data: bytes) -> str:
        def use() -> None:
            attest = _tpm.parse_attest(data)
            values = {str(pcr): {"sha1": "00" * 20, "sha256": "00" * 32} for pcr in range(24)}
            reason_of(lambda: _tpm.pcr_digest(values, attest.selection, "sha256"))
            assert all(0 <= pcr < 32 for _bank, pcrs in attest.selection for pcr in pcrs)
            assert attest.pcr_digest == data[len(data) - len(attest.pcr_digest) :]

        return reason_of(use)


class Quote(Target):
    """A quote document and the identity that it is checked against."""

    def real(self) -> list[bytes]:
        keys = (self.world.key, self.world.other)
        pairs = list(zip(self.world.quotes, keys)) + [(self.world.quotes[0], self.world.other)]
        return [canonical({"quote": quote, "identity": key.identity}) for quote, key in pairs]

    def run(self, data: bytes) -> str:
        try:
            document = json.loads(data)
            parts = [canonical(document[name]) for name in ("quote", "identity")]
        except (ValueError, TypeError, KeyError, RecursionError):
            parts = [data, data]

        def use() -> None:
            quote = parse(parts[0], QUOTE, "the quote", _tpm.QuoteError)
            identity = parse(parts[1], IDENTITY, "the identity", StoreError)
            _tpm.check_document(quote, identity)
            assert canonical(quote) == parts[0] and canonical(identity) == parts[1]

        return reason_of(use)


class Identity(Target):
    """identity.json in the store, and what a host says of its key."""

    def real(self) -> list[bytes]:
        return [canonical(key.identity) for key in (self.world.key, self.world.other)]

    def run(self, data: bytes) -> str:
        def use() -> None:
            with self.world.room() as room:
                store = support.new_store(room)
                with contextlib.suppress(ValueError, RecursionError):
                    said = json.loads(data)
                    if isinstance(said, dict):
                        reason_of(lambda: _rotation.record_identity(store, "other", dict(said, changed=True), False))
                (room / "format.json").write_bytes(b'{"format":"integrity.ima store","version":1}')
                os.makedirs(room / "hosts" / "h")
                (room / "hosts" / "h" / "identity.json").write_bytes(data)
                identity = store.identity("h")
                assert canonical(identity) == data
                assert verify(store, "h", ()).reason in DOCUMENTED
                for quote in self.world.quotes:
                    reason_of(functools.partial(_tpm.check_document, quote, identity or {}))

        return reason_of(use)


class Shard(Target):
    """The file of a shard against an honest manifest."""

    elsewhere: t.ClassVar[set[str]] = {ACCEPTED}  # another zlib makes another file

    def real(self) -> list[bytes]:
        good, raw = self.world.stored(), self.world.sealed[0].raw
        bomb, half = gzip.compress(bytes(1 << 20)), len(raw) // 2
        members = gzip.compress(raw[:half], mtime=0) + gzip.compress(raw[half:], mtime=0)
        return [
            good,
            self.world.stored(1),
            members,
            bomb[:4000],
            good + b"x",
            good + good,
            good[:-9],
            gzip.compress(b""),
        ]

    def run(self, data: bytes) -> str:
        manifest = self.world.sealed[0].manifest

        def use() -> None:
            reader = ShardReader(t.cast(t.BinaryIO, Source(data, 61)), manifest, "1")
            given_out = 0
            for piece in iter(lambda: reader.read(97), b""):
                given_out += len(piece)
                assert len(piece) <= 97 and given_out <= manifest["size"]
            assert data == self.world.stored()

        return reason_of(use)


class Sealed(Target):
    """Bytes that a host sealed though they are no records, or not those of its manifest: what the verifier says."""

    def real(self) -> list[bytes]:
        raw = self.world.sealed[0].raw
        return [raw, raw + self.world.sealed[1].raw, *captures("fixtures/*.binary_sha1")[:3]]

    def run(self, data: bytes) -> str:
        sealed = support.Sealed(copy.deepcopy(self.world.sealed[0].manifest), data)
        if len(data) % 2:
            sealed.raw = restamped(data)
            sealed.manifest["count"] = sum(1 for _record in ml.read(Source(sealed.raw), verify=False)) or 1
            sealed.manifest["pcrs_end"] = support.replayed(sealed.raw, {}) or sealed.manifest["pcrs_end"]
        support.describe(sealed)
        with self.world.room() as room:
            store = support.new_store(room)
            (room / "format.json").write_bytes(b'{"format":"integrity.ima store","version":1}')
            support.put(store, sealed)
            verdict = verify(store, "h", ())
        assert verdict.reason in DOCUMENTED | {""}
        assert verdict.reason or len(data) % 2 or data == self.world.sealed[0].raw
        return verdict.reason or ACCEPTED


class Fleet(Target):
    """A fleet document in the store."""

    def real(self) -> list[bytes]:
        return [self.world.fleet.read_bytes()]

    def run(self, data: bytes) -> str:
        original = self.world.fleet.read_bytes()

        def use() -> None:
            self.world.fleet.write_bytes(data)
            try:
                document = self.world.store.run(self.world.fleet.stem)
                assert canonical(document) == data
                assert set(claims_of(self.world.store)) == set(document["hosts"])
                with contextlib.suppress(Unfit):
                    verify_fleet(self.world.store, None, 0, ["broken"])
                for said in document["hosts"].values():
                    assert member({"claim": said}) == said
            finally:
                self.world.fleet.write_bytes(original)

        with contextlib.suppress(ValueError, RecursionError):
            assert member(json.loads(data))["status"] in ("present", "missing")
        return reason_of(use)


class Rotation(Target):
    """The answers of a host: it can neither break the store nor reach beyond its own directory."""

    examples = 150
    # What the verifier must never say of a store that only a host wrote to.
    STORES_FAULT = frozenset(
        (
            "missing_shard",
            "missing_manifest",
            "repeated_shard",
            "edited_manifest",
            "swapped_manifest",
            "foreign_manifest",
        )
        + (
            "edited_shard",
            "swapped_shard",
            "chain",
            "claim_mismatch",
            "unreadable",
            "quote_identity",
            "malformed_quote",
        )
    )

    def real(self) -> list[bytes]:
        quoted = copy.deepcopy(self.world.answers[:1])
        quoted[0]["quote"] = canonical(self.world.quotes[0]).decode("ascii")
        identity = self.world.key.identity
        answers = self.world.answers
        own = [dict(answers[0], manifests=answers[0]["manifests"] * 2, chunks=answers[0]["chunks"] * 2)]
        failed = {"failed": True, "msg": "x", "reason": "locked", "index": 3, "pending": 0}
        said = [answers, answers[:1], own, [*answers[:1], failed], [{"unreachable": True, "msg": "x"}]]
        return [
            canonical({"identity": identity, "answers": [*quoted, *answers[1:]]}),
            *(canonical({"identity": None, "answers": each}) for each in said),
        ]

    def run(self, data: bytes) -> str:
        try:
            document = json.loads(data)
            answers, identity = list(document["answers"]), document["identity"]
        except (ValueError, TypeError, KeyError, RecursionError):
            answers, identity = [data.decode("latin-1")], None
        asked = 0

        def call(one_round: Json) -> Json:
            nonlocal asked
            asked += 1
            assert asked <= 50, "it asks for ever"
            return copy.deepcopy(answers[min(asked, len(answers)) - 1]) if answers else None

        with self.world.room() as room:
            store = support.new_store(room)
            with contextlib.suppress(ImaError):
                store.put_identity("h", canonical(parse(canonical(identity), IDENTITY, "it", StoreError)))
            reason = reason_of(lambda: self.rotate(store, call))
            assert set(os.listdir(room)) <= {"format.json", "hosts"} and set(os.listdir(room / "hosts")) <= {"h"}
            verdict = verify(store, "h", ())
            # For the exception see test_a_quote_that_follows_no_shard_of_the_store.
            told = verdict.reason not in self.STORES_FAULT
            assert told, verdict.message
            assert verdict.reason in DOCUMENTED | {""}
        return reason

    @staticmethod
    def rotate(store: DirectoryStore, call: _rotation.Call) -> None:
        rotation = _rotation.Rotation(store, "h", call, {"anchor": False, "chunk_bytes": support.CHUNK})
        try:
            rotation.run()
        finally:
            json.dumps(rotation.result())


class Kernel(Target):
    """securityfs and sysfs: counts, the list, a PCR, in one input with lines of dashes between."""

    def real(self) -> list[bytes]:
        raw = self.world.sealed[0].raw
        value = b"AB" * 32 + b"\n"
        return [b"\n--\n".join(each) for each in ([b"12\n", b"0\n", raw, value], [b"x", b"1 \n", b"", b"zz"])]

    def run(self, data: bytes) -> str:
        count, violations, held, value = ([*data.split(b"\n--\n", 3), b"", b"", b""])[:4]
        with self.world.room() as room:
            for name, content in (("runtime_measurements_count", count), ("violations", violations)):
                (room / name).write_bytes(content)
            (room / "binary_runtime_measurements").write_bytes(held)
            os.makedirs(room / "pcr-sha256")
            (room / "pcr-sha256" / "10").write_bytes(value)
            files = _securityfs.KernelFiles(str(room))
            lists = _securityfs.Lists(files, 0)
            reasons = [reason_of(lists.count), reason_of(lists.violations)]
            with lists.view() as file:
                reasons.append(reason_of(lambda: list(ml.read(file.read))))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(_securityfs, "TPM_DIRECTORY", str(room))
                reasons.append(reason_of(lambda: files.pcr("sha256", 10)))
        return next((reason for reason in reasons if reason != ACCEPTED), ACCEPTED)


class Names(Target):
    """Names of any kind in a store and in a spool: files, directories and links, one a line, the kind in front."""

    examples = 150

    def real(self) -> list[bytes]:
        manifest = self.world.sealed[1].manifest
        boot, stem = manifest["boot_id"], entry_of(manifest).stem
        names = [
            f"f{stem}.json",
            f"f{stem}.ima.gz",
            f"f{boot}/00000003-6-1.json",
            f"d{boot}/00000004-7-1.ima.gz",
            f"f{stem}.ack",
        ]
        names += [
            f"l{boot}/00000005-8-1.json",
            "fidentity.json",
            "d.incoming",
            "fevidence/x.json",
            f"f.incoming/{'a' * 64}.part",
        ]
        names += [
            f"f{boot}/00000001-0000000000000000.quote.json",
            "f..x/y",
            f"f{boot}/.x.tmp",
            "d00000000-0000-0000-0000-000000000000",
        ]
        names += [f"f{boot}/00000001-1-3.json", "fjournal.json", "fgeneration", "dlock", f"d{boot}/.y.tmp", f"f{boot}"]
        return ["\n".join(names[at : at + 3]).encode() for at in range(len(names))]

    def run(self, data: bytes) -> str:
        looks: tuple[t.Callable[[], None], ...] = (
            lambda: self.look_at_store(data, "hosts/h"),
            lambda: self.look_at_store(data, "hosts"),
            lambda: self.look_at_store(data, "fleet"),
            lambda: self.look_at_spool(data, "shards"),
            lambda: self.look_at_spool(data, ""),
        )
        return reason_of(looks[len(data) % len(looks)], files=True)

    @staticmethod
    def strew(base: str, data: bytes) -> None:
        """Make the names; what the file system does not take is left out."""
        for line in data.split(b"\n")[:12]:
            words = [word for word in line[1:].split(b"/") if word not in (b"", b".", b"..") and b"\0" not in word]
            path = os.path.join(os.fsencode(base), *words[:4])
            with contextlib.suppress(OSError):
                os.makedirs(os.path.dirname(path), exist_ok=True)
                if line[:1] == b"d":
                    os.mkdir(path)
                elif line[:1] == b"l":
                    os.symlink(b"/proc/self/nothing", path)
                else:
                    with open(path, "xb") as file:
                        file.write(line)

    def look_at_store(self, data: bytes, below: str) -> None:
        with self.world.copy_of(self.world.store.directory) as directory:
            self.strew(os.path.join(directory, below), data)
            store = DirectoryStore(directory)
            for host in {*store.hosts(), "h"}:
                store.names(host)
                verdict = verify(store, host, ())
                assert verdict.reason in DOCUMENTED | {""}
                json.dumps(verdict.warnings)
                reason_of(functools.partial(store.head, host), files=True)
            store.runs()
            with contextlib.suppress(Unfit):
                verify_fleet(store, None, 0, ["broken"])
            with store.delivering("h"):
                store.unfinished("h")

    def look_at_spool(self, data: bytes, below: str) -> None:
        with self.world.copy_of(self.world.host.spool) as directory:
            self.strew(os.path.join(directory, below), data)
            spool = Spool(directory)
            spool.recover()
            for entry in spool.entries:
                spool.manifest(entry)
            list(spool.raw_from(0))


TARGETS: dict[str, type[Target]] = {
    "binary_list": BinaryList,
    "saved_list": SavedList,
    "manifest": Manifest,
    "acknowledgement": Acknowledgement,
    "journal": Journal,
    "config": Config,
    "attest": Attest,
    "quote": Quote,
    "identity": Identity,
    "shard": Shard,
    "sealed": Sealed,
    "fleet": Fleet,
    "rotation": Rotation,
    "kernel": Kernel,
    "names": Names,
}


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(name="world", scope="module")
def _world() -> t.Iterator[World]:
    """In memory where there is one, and without fsync: nothing here dies."""
    token = secrets.token_hex
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(secrets, "token_hex", lambda size: NONCE if size == 32 else token(size))
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
            yield World(Path(directory))


def corpus(name: str) -> dict[str, bytes]:
    """The kept inputs of a target, by the reason that each gives."""
    path = CORPUS / f"{name}.json"
    kept = json.loads(path.read_text(encoding="ascii")) if path.exists() else {}
    return {reason: base64.b64decode(text) for reason, text in kept.items()}


def smaller(target: Target, data: bytes, reason: str) -> bytes:
    """Leave out what can be left out, as long as the reason stays; half a minute is enough."""
    size, deadline = len(data) // 2, time.monotonic() + 30
    while size and time.monotonic() < deadline:
        at = 0
        while at < len(data):
            shorter = data[:at] + data[at + size :]
            if target.run(shorter) == reason:
                data = shorter
            else:
                at += size
        size //= 2
    return data


def keep(name: str, target: Target, found: dict[str, bytes]) -> None:
    """Add an input for each reason that the corpus does not have."""
    kept = corpus(name)
    for reason in found.keys() - kept.keys() - target.elsewhere:
        # What is accepted stays as it is: the least of it would be nothing.
        kept[reason] = found[reason] if reason == ACCEPTED else smaller(target, found[reason], reason)
    text = {reason: base64.b64encode(data).decode("ascii") for reason, data in sorted(kept.items())}
    (CORPUS / f"{name}.json").write_text(json.dumps(text, indent=1) + "\n", encoding="ascii")


def explore(target: Target, number: int, examples: int, found: dict[str, bytes]) -> int:
    """Run some inputs; return how many. ``found`` gets the shortest for each reason."""
    count = 0

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(inputs(target.samples))
    def run(data: bytes) -> None:
        nonlocal count
        count += 1
        reason = target.run(data)
        if data and len(data) < len(found.get(reason, data + b"x")):
            found[reason] = data

    run()
    return count


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_inputs(world: World, name: str, tally: Tally) -> None:
    target = TARGETS[name](world)
    found: dict[str, bytes] = {}
    executions = explore(target, 0, target.examples, found)
    if LONG:
        # Other seeds with every run, named so that a failure can be had again.
        first = int.from_bytes(os.urandom(3), "big")
        print(f"{name}: seeds from {first} on")
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            first += 1
            executions += explore(target, first, 1000, found)
    if os.environ.get("FUZZ_CORPUS") == "1":
        keep(name, target, found)
    print(f"{name}: {executions} executions, {sorted(found)}")
    assert len(found) > 1, "it all ended in the same way: that is no test"
    tally("fuzz executions", executions)


@pytest.mark.parametrize("name", TARGETS)
def test_kept_inputs(world: World, name: str, tally: Tally) -> None:
    """One small input for each reason gives that reason."""
    target, kept = TARGETS[name](world), corpus(name)
    assert kept
    assert {reason: target.run(data) for reason, data in kept.items()} == {reason: reason for reason in kept}
    tally("fuzz executions", len(kept))


@pytest.mark.parametrize("name", TARGETS)
def test_real_inputs(world: World, name: str, tally: Tally) -> None:
    """What was not damaged: the first real input is accepted where the target has one that can be."""
    target = TARGETS[name](world)
    found = [target.run(sample) for sample in target.samples]
    assert ACCEPTED in found or name == "names"
    tally("fuzz executions", len(found))


def large(target: Target) -> t.Iterator[bytes]:
    """Inputs of 1 MiB that cost the most: one sample again and again, deep and wide documents, a bomb."""
    sample = max(target.samples, key=len)
    yield (sample * (LARGEST // max(1, len(sample)) + 1))[:LARGEST]
    for unit in (b"\0", b"\xff", b"[", b"[],", b'{"', b"a", b"\n", b"f\n"):
        yield (unit * LARGEST)[:LARGEST]
    yield b"[" + b",".join([b'{"a":[]}'] * (LARGEST // 9 - 1)) + b"]"
    yield b"10 " + b"1" * 40 + b" ima-ng sha1:" + b"1" * 40 + b" " + b"a" * (LARGEST - 120)
    yield b"10 " + b"1" * 40 + b" " + b"t" * (LARGEST - 50) + b" x"
    yield gzip.compress(bytes(1 << 30 >> 2), 9)[:LARGEST]
    yield struct.pack("<I20sI", 10, b"x" * 20, 6) + b"ima-ng" + struct.pack("<I", 8 << 20) + bytes(LARGEST - 50)


@pytest.mark.parametrize("name", TARGETS)
def test_large_inputs_take_little_memory(world: World, name: str, tally: Tally) -> None:
    target = TARGETS[name](world)
    ran, most = 0, 0
    # Without LONG=1 a third of them, others for each target.
    for data in itertools.islice(large(target), 0 if LONG else list(TARGETS).index(name) % 3, None, 1 if LONG else 3):
        assert len(data) <= LARGEST
        tracemalloc.start()
        try:
            target.run(data)
            most = max(most, tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        assert most <= MOST_MEMORY, f"{most >> 20} MiB for {data[:60]!r}..."
        ran += 1
    print(f"{name}: at most {most >> 10} KiB")
    tally("fuzz executions", ran)


# --- what the inputs above led to -------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["spool", "lock", "directory"])
def test_a_path_with_a_nul_in_the_config(world: World, key: str) -> None:
    """No path has one: the config says so, and not a ValueError of whatever opens the path first."""
    paths = {"spool": "/nowhere", "lock": "/nowhere/lock", "directory": "/nowhere/ima"}
    paths[key] += "\0x"
    text = "[snapshot]\nspool={spool}\nlock={lock}\n[list]\nsource=emulated\ndirectory={directory}\n".format(**paths)
    assert Config(world).run(text.encode()) in ("config_syntax", "config_value")


@pytest.mark.parametrize("value", ["", "\n", "ab\n", "AB" * 31, "AB" * 33])
def test_a_pcr_file_of_another_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """It is no value of that bank: nothing must be compared with it, nor written into a manifest."""
    (tmp_path / "pcr-sha256").mkdir()
    (tmp_path / "pcr-sha256" / "10").write_text(value, encoding="ascii")
    monkeypatch.setattr(_securityfs, "TPM_DIRECTORY", str(tmp_path))
    assert reason_of(lambda: _securityfs.KernelFiles(str(tmp_path)).pcr("sha256", 10)) == "pcr_unreadable"


def test_a_long_message_of_a_host_takes_little_memory() -> None:
    """Of what a host says 2,000 characters are kept: no more of it should be made printable."""
    raw = {"failed": True, "msg": "\1" * (LARGEST >> 2)}
    tracemalloc.start()
    try:
        assert reason_of(lambda: _rotation.answer_of(raw)) == "host_failed"
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_an_ascii_list_takes_work_in_proportion_to_its_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long line whose digest does not fit, and short ones behind it: none of those may cost the long one again."""
    looked_at = 0
    build = ml._Text._build

    def counted(text: ml._Text, texts: list[bytes], order: str) -> ml.Record:
        nonlocal looked_at
        looked_at += len(text.line)
        return build(text, texts, order)

    monkeypatch.setattr(ml._Text, "_build", counted)
    data = b"10 " + b"1" * 40 + b" ima-ng sha1:" + b"1" * 40 + b" " + b"a" * (LARGEST >> 3) + b"\n" + b"b\n" * 200
    assert reason_of(lambda: list(ml.read_ascii(Source(data)))) == "digest_mismatch"
    assert looked_at < 20 * len(data)


@pytest.mark.parametrize(
    "wrong", [{"manifest": "00" * 32}, {"sequence": 7}, {"boot_id": "0" * 8 + "-0000" * 3 + "-" + "0" * 12}]
)
def test_a_quote_that_follows_no_shard_of_the_store(world: World, wrong: dict[str, t.Any]) -> None:
    """It is signed, for this rotation, and yet it is none to be kept: it would break the host's verdict for good."""
    manifest = dict(world.sealed[0].manifest, **{key: wrong[key] for key in wrong if key != "manifest"})
    quote = quote_by(world.key, manifest, wrong.get("manifest", digest(canonical(world.sealed[0].manifest))))
    answers = copy.deepcopy(world.answers)
    answers[0]["quote"] = canonical(quote).decode("ascii")
    with world.room() as room:
        store = support.new_store(room)
        store.put_identity("h", canonical(world.key.identity))
        reason = reason_of(lambda: Rotation.rotate(store, lambda one_round: answers.pop(0)))
        kept = store.quotes("h")
    assert kept == []
    assert reason == "quote_nonce"


DIALECTS = {
    "upper case": "[snapshot]\nSpool = /a\n",
    "indented": "[snapshot]\n  spool = /a\n",
    "two lines": "[snapshot]\nspool = /a\n  /b\n",
    "blanks behind": "[snapshot]\nspool = /a  \n",
    "carriage return": "[snapshot]\nspool = /a\r\n",
}


@pytest.mark.parametrize("text", DIALECTS.values(), ids=DIALECTS)
def test_the_documented_shell_reader_finds_the_same_lock(tmp_path: Path, text: str) -> None:
    """A config is refused, or the example in docs/PROTOCOL.md reads it as the tools do: else each has its own lock."""
    path = tmp_path / "snapshot.conf"
    path.write_bytes(text.encode())
    path.chmod(0o644)
    try:
        config = _protocol.load(str(path))
    except ImaError as error:
        assert error.reason in ("config_syntax", "config_unknown", "config_value")
        return
    (value,) = re.findall(r"^value\(\) .*$", (ROOT / "docs" / "PROTOCOL.md").read_text(encoding="utf-8"), re.MULTILINE)
    script = f'config=$1; {value}; spool=$(value spool); lock=$(value lock); printf %s "${{lock:-$spool/lock}}"'
    done = subprocess.run(["sh", "-c", script, "sh", str(path)], capture_output=True, check=True)
    assert done.stdout.decode() == config.lock


# --- coverage, with LONG=1 and where the package is installed ---------------------------------------------------------


def bodies(path: Path) -> set[int]:
    """The lines of the statements in functions; the others ran when the module was imported."""
    functions = [n for n in ast.walk(ast.parse(path.read_bytes())) if isinstance(n, (ast.FunctionDef, ast.Lambda))]
    statements = (
        each for f in functions if isinstance(f, ast.FunctionDef) for part in f.body for each in ast.walk(part)
    )
    documented = {f.body[0].lineno for f in functions if isinstance(f, ast.FunctionDef) and ast.get_docstring(f)}
    return {each.lineno for each in statements if isinstance(each, ast.stmt)} - documented


@pytest.fixture(autouse=LONG, scope="module")
def _coverage(covered: dict[str, tuple[int, set[int]]]) -> t.Iterator[None]:
    """Tell which part of the functions of each parsing module the inputs went through."""
    files = [PLUGINS / f"{name}.py" for name in PARSERS]
    try:
        coverage: t.Any = importlib.import_module("coverage")
    except ImportError:
        print("no coverage figures: the package coverage is not installed", file=sys.__stderr__)
        yield
        return
    measured = coverage.Coverage(data_file=None, include=[f"*/module_utils/{path.name}" for path in files])
    measured.start()
    try:
        yield
    finally:
        measured.stop()
        data = measured.get_data()
        ran = {Path(name).name: set(data.lines(name) or ()) for name in data.measured_files()}
        for path in files:
            lines = bodies(path)
            covered[path.name] = len(lines), lines & ran.get(path.name, set())
