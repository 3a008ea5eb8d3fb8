# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The controller's half of a rotation: rounds of one module call, what they bring put into a store, the claim.

Everything that a host sends is data of an adversary. It is bounded and checked against the schema before it is used.
"""

from __future__ import annotations

import base64
import binascii
import secrets
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, StoreError, printable
from ansible_collections.integrity.ima.plugins.module_utils._fleet import claim
from ansible_collections.integrity.ima.plugins.module_utils._schema import (
    ANSWER,
    IDENTITY,
    LEAST_CHUNK,
    QUOTE,
    canonical,
    check,
    parse,
)
from ansible_collections.integrity.ima.plugins.module_utils._shard import Manifest, digest, entry_of
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import utc_now
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Head, Store
from ansible_collections.integrity.ima.plugins.module_utils._tpm import QuoteError, check_document
from ansible_collections.integrity.ima.plugins.module_utils._verifier import ATTESTED, CONSISTENT, claims_of, verify

MOST_ROUNDS = 100000
MOST_BYTES = 16 << 30  # of compressed shards that one host may bring in one rotation
Answer = t.Dict[str, t.Any]
Call = t.Callable[[t.Dict[str, t.Any]], Answer]


class HostFailed(ImaError):
    """The module on the host failed; the details are what it said, bounded."""

    default_reason = "host_failed"


class HostUnreachable(ImaError):
    """The connection was lost; ``raw`` is what Ansible said."""

    default_reason = "unreachable"

    def __init__(self, raw: dict[str, t.Any]) -> None:
        super().__init__(str(raw.get("msg", ""))[:2000])
        self.raw = raw


def answer_of(raw: t.Any) -> Answer:
    """Return a host's answer to a round. Raises as :func:`checked`."""
    return checked(raw, ANSWER, "pending")


def checked(raw: t.Any, schema: dict[str, t.Any], member: str) -> Answer:
    """Return a host's answer, checked; one without ``member`` is no answer of the module's.

    Raises :class:`HostUnreachable`, :class:`HostFailed` (it failed) or :class:`StoreError` ``bad_answer``.
    """
    if isinstance(raw, dict) and raw.get("unreachable"):
        raise HostUnreachable(raw)
    if not isinstance(raw, dict) or raw.get("failed") or member not in raw:
        raise _failure(raw if isinstance(raw, dict) else {})
    answer = {key: raw[key] for key in schema["properties"] if key in raw}
    wrong = check(answer, schema)
    if wrong:
        raise StoreError(
            f"The host's answer is not what the module gives: {wrong}",
            reason="bad_answer",
            kept="everything",
            hint="look at that host: another program answered for the module",
        )
    return answer


def _failure(raw: dict[str, t.Any]) -> HostFailed:
    reason, message = raw.get("reason"), raw.get("msg")
    if not isinstance(message, str):
        message = "the module gave no message"
    if "deserialization failed" in message:
        message = "the module ended without an answer: it was killed (out of memory?), or Python is broken on the host"
    message = printable(message[:2000])
    known = check(reason, {"type": "string", "pattern": "^[a-z0-9_]{1,40}$"}) == ""
    where = {
        key: raw[key]
        for key, schema in (("index", {"$ref": "#/$defs/index"}), ("boot_id", {"$ref": "#/$defs/boot_id"}))
        if key in raw and not check(raw[key], schema)
    }
    return HostFailed(message[:2000], reason=reason if known and isinstance(reason, str) else "host_failed", **where)


class Rotation:
    """One host's rotation into ``store``; ``call`` runs one round on the host and returns its raw answer."""

    def __init__(self, store: Store, host: str, call: Call, options: dict[str, t.Any]) -> None:
        self._store, self._host, self._call, self._options = store, host, call, options
        self._head: Head | None = store.head(host)
        self._nonce: str | None = None
        self._quote = ""
        self._verdict = ""
        self._wants_verdict = False
        self._rounds = self._bytes = 0
        self._goal: int | None = None  # the last shard of this rotation; others may go on sealing meanwhile
        self._reached = False  # what comes next was sealed behind the goal
        self._doubted = False  # the host was told that a name is taken, and gets one more try
        self._orders: list[tuple[Manifest, dict[str, t.Any]]] = []  # signed for, not yet known to be in the store
        self.delivered = self.records = self.exported = self.trimmed = 0
        self.fault: dict[str, t.Any] | None = None
        self._busy = ""  # who keeps the host from deleting
        self.diff: dict[str, t.Any] = {}
        self.flavour = ""
        self.quoted = False
        self.warnings: list[str] = []
        self.changed = False

    def run(self) -> None:
        """Run rounds until the host has nothing left to say. Raises :class:`ImaError`.

        :class:`HostFailed` ``list_busy`` comes at the end: all was delivered, and nothing could be deleted.
        """
        with self._store.delivering(self._host):
            self._head = self._store.head(self._host)
            self._nonce = secrets.token_hex(32) if self._store.identity(self._host) else None
            answer = self._round(export=True)
            while True:
                before = self._progress()
                if self._options.get("direct"):
                    self._take_uploads(answer)
                    self._sign(answer)
                else:
                    self._take(answer)
                news = self._progress() != before or bool(self._orders)
                pending = answer["pending"] and not self._reached
                if not pending and not answer["more"] and (not news or self._told(answer)):
                    self._keep_quote()
                    if not self._newly_verified():
                        break
                elif not news:
                    raise StoreError(f"{self._host} says that there is more, and gives nothing", reason="bad_answer")
                answer = self._round(export=answer["more"])
        if self._busy:
            raise HostFailed(self._busy, reason="list_busy")

    def _told(self, answer: Answer) -> bool:
        """Say whether the host knows already that the store has all: it was there when the store said so."""
        return self._head is not None and answer["uploaded"] == self._head.manifest["sequence"]

    def _progress(self) -> tuple[str, int]:
        """Return what must grow from round to round: the newest shard here, and the bytes of the next one."""
        unfinished = self._store.unfinished(self._host)
        return (self._head.digest if self._head else "", unfinished[1] if unfinished else 0)

    def predict(self) -> None:
        """Ask the host what a rotation would do (check mode); nothing is written on either side."""
        self._round(export=True)

    def _keep_quote(self) -> None:
        """Check the quote that came, now that the shard it follows is here, and keep it."""
        if not self._quote:
            return
        quote = parse(self._quote.encode("ascii", "replace"), QUOTE, f"the quote that {self._host} sent", QuoteError)
        if quote["nonce"] != self._nonce:
            raise QuoteError(f"The quote of {self._host} was not made for this rotation", reason="quote_nonce")
        check_document(quote, self._store.identity(self._host) or {})
        place = (quote["sequence"], quote["boot_id"])
        here = [entry for entry in self._store.entries(self._host) if (entry.sequence, entry.boot_id) == place]
        if not here or digest(self._store.manifest_bytes(self._host, here[0])) != quote["manifest"]:
            raise QuoteError(f"The quote of {self._host} follows no shard that is here", reason="quote_nonce")
        self._store.put_quote(self._host, quote)
        self._quote, self.quoted = "", True

    def _newly_verified(self) -> bool:
        """Under the policy ``verified`` let the verifier judge once all is here; True: the host should hear of it."""
        if self._verdict or self._head is None or not self._wants_verdict:
            return False
        verdict = verify(self._store, self._host, claims_of(self._store).get(self._host, []), newest_boot=True)
        if verdict.verdict not in (ATTESTED, CONSISTENT):
            raise StoreError(
                f"All of {self._host} was delivered, but the verifier says {verdict.verdict}: {verdict.message}",
                reason=verdict.reason or verdict.verdict,
                kept="everything; nothing was deleted on its word",
                boot_id=verdict.boot_id,
                index=verdict.index,
            )
        self._verdict = verdict.verdict
        return True

    def _round(self, *, export: bool) -> Answer:
        self._rounds += 1
        if self._rounds > MOST_ROUNDS:
            raise StoreError(f"{self._host} kept answering for {MOST_ROUNDS} rounds", reason="too_many_rounds")
        have = None
        if self._head is not None:
            have = {
                "sequence": self._head.manifest["sequence"],
                "manifest": self._head.digest,
                "store": self._store.name,
                "verdict": self._verdict,
            }
        unfinished = self._store.unfinished(self._host)
        part = {"manifest": unfinished[0], "offset": unfinished[1]} if unfinished else None
        asked: dict[str, t.Any] = {
            "have": have,
            "part": part,
            "export": export,
            "nonce": self._nonce,
            "busy": self._busy,
        }
        if self._options.get("direct"):
            asked.update(direct=True, **_without_urls([order for _manifest, order in self._orders]))
        answer = answer_of(self._call(asked))
        if export and not answer["more"]:
            self._goal = answer["position"]["after"]["sequence"]
        self.changed = self.changed or answer["changed"]
        self.exported += answer["exported"]
        self.trimmed += answer["trimmed"]
        self.fault, self.flavour = answer["fault"], answer["flavour"]
        if self.fault:
            self.fault = dict(self.fault, message=printable(self.fault["message"]))
        self._busy = printable(answer["busy"])
        self._quote = answer["quote"] or self._quote
        self.warnings += [printable(said) for said in answer["warnings_said"]]
        self._wants_verdict = answer["trim_after"] == "verified"
        position = answer["position"]
        self.diff = dict(position, before=self.diff.get("before", position["before"]))
        return answer

    def _next(self, data: bytes, head: Head | None) -> Manifest | None:
        """Accept the manifest that comes next. None: it was sealed behind the goal, and is the next rotation's.

        A busy host would keep this one for ever.
        """
        manifest = self._store.accept(self._host, data, head)
        self._reached = self._goal is not None and manifest["sequence"] > self._goal
        return None if self._reached else manifest

    def _take(self, answer: Answer) -> None:
        """Put what came into the store, shard by shard, in order."""
        for text, chunk in zip(answer["manifests"], answer["chunks"]):
            data = text.encode("utf-8", "replace")
            manifest = self._next(data, self._head)
            if manifest is None:
                return
            if not chunk["offset"]:
                self._count(manifest["stored_size"])
            if not self._take_chunk(manifest, digest(data), chunk):
                return
            self._store.finish(self._host, manifest)
            self._head, self._verdict = Head(manifest, digest(data)), ""
            self.delivered += 1
            self.records += manifest["count"]

    def _sign(self, answer: Answer) -> None:
        """Accept the manifests that come next and sign for them and their shards: a few, and at the last moment."""
        head = self._head
        for text in answer["manifests"]:
            data = text.encode("utf-8", "replace")
            manifest = self._next(data, head)
            if manifest is None:
                return
            self._count(manifest["stored_size"])
            order = self._store.sign(self._host, manifest)
            if order is None:
                raise StoreError(
                    f"{self._store.name} cannot take shards from hosts themselves",
                    reason="no_direct_delivery",
                    hint="deliver through the controller (delivery: controller)",
                )
            self._orders.append((manifest, order))
            head = Head(manifest, digest(data))

    def _take_uploads(self, answer: Answer) -> None:
        """Look in the store for what the host was to put there. Raises the reason for the first that is not there."""
        orders, self._orders = self._orders, []
        fault = answer["upload_fault"]
        for manifest, order in orders:
            entry = entry_of(manifest)
            if not self._store.has(self._host, entry, order["manifest"]):
                # The yes got lost, or somebody else was first: signing anew looks which.
                if fault and (fault["sequence"], fault["reason"]) == (entry.sequence, "exists") and not self._doubted:
                    self._doubted = True
                    return
                raise self._not_uploaded(entry.sequence, fault)
            self._doubted = False
            self._head, self._verdict = Head(manifest, order["manifest"]), ""
            self.delivered += 1
            self.records += manifest["count"]

    def _not_uploaded(self, sequence: int, fault: dict[str, t.Any] | None) -> StoreError:
        said = fault["message"] if fault else "the host gave no reason"
        return StoreError(
            f"Shard {sequence} of {self._host} did not reach {self._store.name}: {printable(said)}",
            reason=fault["reason"] if fault else "bad_answer",
            sequence=sequence,
            kept="the shard on the host, and its records in the kernel",
            hint="rotate again; what the store has is not sent again",
        )

    def _count(self, size: int) -> None:
        """Bound what one host may bring in one rotation."""
        self._bytes += size
        most = self._options.get("most_bytes", MOST_BYTES)
        if self._bytes > most:
            raise StoreError(
                f"{self._host} brings more than {most} bytes in one rotation",
                reason="quota",
                kept="what was delivered so far; the rest on the host",
                hint="if that is right, rotate again, or raise most_bytes",
            )

    def _take_chunk(self, manifest: Manifest, manifest_digest: str, chunk: dict[str, t.Any]) -> bool:
        """Take one chunk of a shard; True when the shard is complete."""
        unfinished = self._store.unfinished(self._host)
        here = unfinished[1] if unfinished and unfinished[0] == manifest_digest else 0
        try:
            data = base64.b64decode(chunk["data"], validate=True)
        except (binascii.Error, ValueError) as error:
            raise StoreError("A chunk is not base64", reason="bad_answer") from error
        end = chunk["offset"] + len(data)
        if chunk["sequence"] != manifest["sequence"] or chunk["offset"] != here or end > manifest["stored_size"]:
            raise StoreError(
                f"A chunk of shard {manifest['sequence']} of {self._host} is not the one that comes next",
                reason="bad_answer",
                sequence=manifest["sequence"],
            )
        if len(data) > self._options["chunk_bytes"] or (len(data) < LEAST_CHUNK and end < manifest["stored_size"]):
            raise StoreError(f"A chunk from {self._host} has {len(data)} bytes", reason="bad_answer")
        self._store.receive(self._host, manifest_digest, here, data)
        return bool(end == manifest["stored_size"])

    def claim(self) -> dict[str, t.Any] | None:
        """Return what the host claims at its cut, for the fleet document; None when it has no shard yet."""
        return claim(self._head.manifest, self._head.digest, self.records) if self._head else None

    def result(self) -> dict[str, t.Any]:
        """Return the action's result."""
        head = self._head
        return {
            "changed": self.changed or self.delivered > 0,
            "exported": self.exported,
            "trimmed": self.trimmed,
            "delivered": self.delivered,
            "quoted": self.quoted,
            "rounds": self._rounds,
            "flavour": self.flavour,
            "fault": self.fault,
            "claim": self.claim(),
            "aggregate_digest": head.digest if head else "",
            "diff": self.diff,
        }


def _without_urls(orders: list[dict[str, t.Any]]) -> dict[str, t.Any]:
    """Return the orders with numbers in place of their addresses, and the addresses: secrets, which no log may hold."""
    urls: list[str] = []
    uploads = []
    for order in orders:
        upload = dict(order)
        for what in ("shard", "document"):
            if order[what]:
                upload[what] = dict(order[what], url=len(urls))
                urls.append(order[what]["url"])
        uploads.append(upload)
    return {"uploads": uploads, "urls": urls}


def record_identity(store: Store, host: str, answer: t.Any, check_mode: bool) -> dict[str, t.Any]:
    """Record what a host says of its attestation key: trust on first use. Return the action's result.

    Raises :class:`StoreError` ``bad_answer``, or ``identity_changed`` when another key is on record.
    """
    said = {key: answer.get(key) for key in ("machine_id", "ak", "ak_name", "ek")}
    before = store.identity(host)
    made = bool(answer.get("changed"))
    if check_mode and made:
        return dict(said, changed=True)
    identity = dict(said, version=1, time=before["time"] if before else utc_now())
    wrong = check(identity, IDENTITY)
    if wrong:
        raise StoreError(f"The host's answer is not what the module gives: {wrong}", reason="bad_answer")
    if before is not None and before != identity:
        raise StoreError(
            f"{host} answers with another attestation key than the one on record",
            reason="identity_changed",
            kept="the key on record",
            hint="if the machine or its TPM was replaced, give the host a new name or a new store",
        )
    if not check_mode:
        # Also when it is there: an enrolment that died may have left the name without its fsync.
        store.put_identity(host, canonical(identity))
    return dict(said, changed=made or before is None)
