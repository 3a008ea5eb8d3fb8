# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The store in a bucket, with boto3: AWS, and every server that speaks S3.

Every object is created with ``If-None-Match: *`` and its SHA-256 for the server to check. Credentials come from where
the AWS tools look for them, never from the address.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import time
import typing as t
import urllib.parse

from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError, printable
from ansible_collections.integrity.ima.plugins.module_utils._store._objects import (
    FORMAT,
    FORMAT_NAME,
    Check,
    Signing,
    Source,
    exists_different,
    hashed,
    library_missing,
    query_of,
    require_format,
)

EXPIRES = 900  # seconds for which a signed address can be used
_CONFLICTS = 4
_REASONS = {
    "AccessDenied": "store_denied",
    "InvalidAccessKeyId": "store_denied",
    "SignatureDoesNotMatch": "store_denied",
    "NoSuchBucket": "store_missing",
    "InvalidBucketName": "store_address",
    "BadDigest": "checksum_refused",
    "XAmzContentChecksumMismatch": "checksum_refused",
    "InvalidDigest": "checksum_refused",
    "QuotaExceeded": "store_full",
    "XMinioStorageFull": "store_full",
}
# what boto3 raises when it never came to an answer
_KINDS = {
    "SSLError": "store_untrusted",
    "NoCredentialsError": "store_denied",
    "PartialCredentialsError": "store_denied",
    "CredentialRetrievalError": "store_denied",
    "ProfileNotFound": "store_denied",
}
_HINTS = {
    "store_denied": "look at the credentials of the controller and at the bucket's policy",
    "store_missing": "create the bucket (integrity.ima.ima_store), or correct its name",
    "store_untrusted": "compare the server's certificate, then name its authority in AWS_CA_BUNDLE",
    "checksum_refused": "something between the controller and the store changes bytes",
    "store_full": "make room in the store and rotate again",
    "store_unavailable": "look at the store and the network, and rotate again",
}


class S3Objects(Signing):
    """Objects of a bucket below a prefix: ``s3://bucket/prefix?endpoint=URL&region=NAME&profile=NAME``."""

    def __init__(self, address: str) -> None:
        self._address(address)
        try:
            found = self.read(FORMAT_NAME, len(FORMAT) + 1)
        except FileNotFoundError:
            with self._asking("list"):
                some = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix, MaxKeys=1)
            if not some.get("KeyCount"):
                return
            found = b""
        require_format(found, self.name)

    def _address(self, address: str) -> None:
        """Take an address apart, and make a client; nothing is asked of the server."""
        parts = urllib.parse.urlsplit(address)
        self._options = query_of(parts, ("endpoint", "region", "profile"))
        if not parts.netloc or "@" in parts.netloc:
            raise StoreError(
                "An S3 store is named s3://bucket/prefix, without credentials",
                reason="store_address",
                hint="the credentials come from the environment or the files of the AWS tools",
            )
        self._bucket = parts.netloc
        path = urllib.parse.unquote(parts.path).strip("/")
        self._prefix = f"{path}/" if path else ""
        self.name = f"s3://{parts.netloc}{parts.path.rstrip('/')}"
        self._write_once = False  # not seen yet
        self._client = self._new_client()

    def _new_client(self) -> t.Any:
        try:
            import boto3
            import botocore.config
        except ImportError as error:
            raise library_missing("boto3", "S3") from error
        with self._asking("open"):
            session = boto3.session.Session(profile_name=self._options.get("profile"))
            endpoint = self._options.get("endpoint")
            config = botocore.config.Config(
                # without this boto3 signs addresses by the old way, which binds neither header nor length
                signature_version="s3v4",
                retries={"total_max_attempts": 3, "mode": "standard"},
                connect_timeout=10,
                read_timeout=60,
                s3={"addressing_style": "path" if endpoint else "auto"},
            )
            region = self._options.get("region") or session.region_name or "us-east-1"
            return session.client("s3", endpoint_url=endpoint, region_name=region, config=config)

    @contextlib.contextmanager
    def _asking(self, what: str) -> t.Iterator[None]:
        """Turn what boto3 raises into ``FileNotFoundError`` or :class:`StoreError`."""
        try:
            yield
        except Exception as error:
            module = type(error).__module__
            if not module.startswith(("botocore", "boto3", "urllib3")) and not isinstance(error, RecursionError):
                raise
            said = getattr(error, "response", None) or {}
            code = str(said.get("Error", {}).get("Code", ""))
            status = said.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if code in ("NoSuchKey", "404", "NotFound") or (status == 404 and code != "NoSuchBucket"):
                raise FileNotFoundError(2, "no such object", what) from error
            reason = _REASONS.get(code) or ("store_denied" if status in (401, 403) else "store_unavailable")
            kind = type(error).__name__
            if kind in _KINDS:
                reason = _KINDS[kind]
            elif status == 412:
                reason = "exists"
            elif status == 409:
                reason = "conflict"  # somebody else writes the same name at this moment
            raise StoreError(
                f"Cannot {what} in {self.name}: {printable(str(error))[:300]}",
                reason=reason,
                kept="the shard on the host, and what was delivered before",
                hint=_HINTS.get(reason, ""),
                code=printable(code)[:64],
                status=status,
            ) from error

    def _key(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    # -- reading ----------------------------------------------------------------------------------------------------

    def folders(self, prefix: str) -> list[str]:
        """See :class:`Objects`."""
        found = []
        start = self._prefix + prefix
        with self._asking("list"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=start, Delimiter="/"):
                found += [each["Prefix"][len(start) :].rstrip("/") for each in page.get("CommonPrefixes", [])]
        return found

    def sizes(self, prefix: str) -> dict[str, int]:
        """See :class:`Objects`."""
        sizes = {}
        start = self._prefix + prefix
        with self._asking("list"):
            pages = self._client.get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self._bucket, Prefix=start):
                for each in page.get("Contents", []):
                    name = each["Key"][len(start) :]
                    if name and not name.startswith(".") and not name.endswith("/"):
                        sizes[name] = int(each["Size"])
        return sizes

    def read(self, name: str, limit: int) -> bytes:
        """See :class:`Objects`."""
        with self._asking(f"read {name}"), contextlib.closing(
            self._client.get_object(**self._key(name))["Body"]
        ) as body:
            return bytes(body.read(limit))

    def open(self, name: str) -> t.BinaryIO:
        """See :class:`Objects`."""
        with self._asking(f"read {name}"):
            body = self._client.get_object(**self._key(name))["Body"]
        return t.cast(
            t.BinaryIO, io.BufferedReader(Source(body.read, body.close, lambda: self._asking(f"read {name}")))
        )

    def rewritten(self, prefix: str) -> dict[str, bool] | None:
        """See :class:`Objects`: in a bucket with versions a removed name is free again, but what it was stays."""
        written: dict[str, list[tuple[str, int]]] = {}
        start, removed = self._prefix + prefix, set()
        try:
            with self._asking("list versions"):
                pages = self._client.get_paginator("list_object_versions")
                for page in pages.paginate(Bucket=self._bucket, Prefix=start):
                    for each in page.get("Versions", []):
                        written.setdefault(each["Key"][len(start) :], []).append((each["ETag"], each["Size"]))
                    removed |= {each["Key"][len(start) :] for each in page.get("DeleteMarkers", [])}
        except StoreError as error:
            if error.reason == "store_unavailable" and error.details.get("status") != 501:
                raise
            return None
        again = {name for name, versions in written.items() if len(versions) > 1}
        return {name: len(set(written.get(name, []))) > 1 for name in again | removed}

    def confirms(self, name: str, size: int, sha256: str) -> bool:
        """See :class:`Objects`: by the checksum that the server keeps, else by reading the object."""
        try:
            with self._asking(f"look at {name}"):
                head = self._client.head_object(**self._key(name), ChecksumMode="ENABLED")
            if head["ContentLength"] != size:
                return False
            if "-" not in head.get("ChecksumSHA256", "-"):  # else it is that of the parts, or none
                return bool(head["ChecksumSHA256"] == _base64(sha256))
            with self.open(name) as file:
                return hashed(file) == (size, sha256)
        except FileNotFoundError:
            return False

    # -- writing ----------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bool:
        """See :class:`Objects`."""
        made = self._put(name, io.BytesIO(data), len(data), hashlib.sha256(data).hexdigest())
        if name == FORMAT_NAME and not self._write_once:
            self._require_write_once(data)
        return made

    def create_from(self, name: str, part: str, check: Check, size: int, sha256: str) -> bool:
        """See :class:`Objects`."""
        with open(part, "rb") as file:
            check(file)
            return self._put(name, file, size, sha256)

    def _put(self, name: str, body: t.BinaryIO, size: int, sha256: str) -> bool:
        """Create it; whatever the answer was, what the store then has decides."""
        made = self._put_once(name, body, size, sha256)
        if not self.confirms(name, size, sha256):
            raise exists_different(f"{self.name}/{name}", sha256)
        return made

    def _put_once(self, name: str, body: t.BinaryIO, size: int, sha256: str) -> bool:
        """Ask for it once, and again while somebody else is creating it at the same moment. False: it is there."""
        for attempt in range(_CONFLICTS):
            body.seek(0)
            try:
                with self._asking(f"write {name}"):
                    self._client.put_object(
                        **self._key(name),
                        Body=body,
                        ContentLength=size,
                        ChecksumSHA256=_base64(sha256),
                        IfNoneMatch="*",
                    )
                return True
            except StoreError as error:
                if error.reason == "exists":
                    return False
                if error.reason != "conflict" or attempt == _CONFLICTS - 1:
                    raise
                time.sleep(0.2 * 2**attempt)
        raise AssertionError("the last attempt returns or raises")

    def _require_write_once(self, data: bytes) -> None:
        """Create an object again that is there: some servers know the condition, and overwrite all the same."""
        if self._put_once(FORMAT_NAME, io.BytesIO(data), len(data), hashlib.sha256(data).hexdigest()):
            raise StoreError(
                f"{self.name} ignores If-None-Match: what is there could be overwritten",
                reason="not_write_once",
                kept="everything on the hosts",
                hint="use a server that supports conditional writes; the page on stores names some",
            )
        self._write_once = True

    def settle(self, prefix: str) -> None:
        """See :class:`Objects`: an object is there as a whole or not at all."""

    # -- what protects the bucket -------------------------------------------------------------------------------------

    @classmethod
    def make_bucket(cls, address: str, check: bool) -> bool:
        """Create the bucket, with object lock, if it is not there; say whether that was, or would be, needed."""
        objects = cls.__new__(cls)
        objects._address(address)
        try:
            with objects._asking("look at the bucket"):
                objects._client.head_bucket(Bucket=objects._bucket)
            return False
        except FileNotFoundError:
            pass
        if not check:
            with objects._asking("create the bucket"):
                region = objects._client.meta.region_name
                where = {"LocationConstraint": region} if region != "us-east-1" else None
                options = {"CreateBucketConfiguration": where} if where else {}
                objects._client.create_bucket(Bucket=objects._bucket, ObjectLockEnabledForBucket=True, **options)
        return True

    def protection(self) -> dict[str, t.Any]:
        """Return whether versions are kept and how objects are locked; None for what the account may not know."""
        state: dict[str, t.Any] = {"versioning": None, "lock": None}
        with contextlib.suppress(StoreError), self._asking("look at versioning"):
            state["versioning"] = self._client.get_bucket_versioning(Bucket=self._bucket).get("Status", "Disabled")
        with contextlib.suppress(StoreError, FileNotFoundError), self._asking("look at object lock"):
            found = self._client.get_object_lock_configuration(Bucket=self._bucket)["ObjectLockConfiguration"]
            rule = found.get("Rule", {}).get("DefaultRetention", {})
            days = rule.get("Days") or 365 * rule.get("Years", 0)
            state["lock"] = {"mode": rule.get("Mode", ""), "days": days}
        return state

    def enable_versioning(self) -> None:
        """Keep every version of every object."""
        with self._asking("enable versioning"):
            self._client.put_bucket_versioning(Bucket=self._bucket, VersioningConfiguration={"Status": "Enabled"})

    def set_lock(self, mode: str, days: int) -> None:
        """Lock what is created from now on, for so many days."""
        retention = {"Mode": mode, "Days": days}
        with self._asking("set the object lock"):
            self._client.put_object_lock_configuration(
                Bucket=self._bucket,
                ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": {"DefaultRetention": retention}},
            )

    # -- for a host that writes by itself ---------------------------------------------------------------------------

    def sign(self, name: str, size: int, sha256: str) -> tuple[str, dict[str, str]]:
        """Return an address at which whoever has it can create this one object, and the headers that go with it.

        Length, SHA-256 and ``If-None-Match`` are signed: other bytes, or a second time, are refused by the store.
        """
        headers = {"if-none-match": "*", "x-amz-checksum-sha256": _base64(sha256), "content-length": str(size)}
        parameters = dict(self._key(name), IfNoneMatch="*", ChecksumSHA256=_base64(sha256), ContentLength=size)
        with self._asking(f"sign {name}"):
            url = str(self._client.generate_presigned_url("put_object", Params=parameters, ExpiresIn=EXPIRES))
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
        signed = set(query.get("X-Amz-SignedHeaders", [""])[0].split(";"))
        if not {"host", *headers} <= signed:
            raise StoreError(
                f"An address for {self.name} would not bind {', '.join(sorted(set(headers) - signed))}",
                reason="not_signed",
                hint="update boto3",
            )
        return url, headers


def _base64(sha256: str) -> str:
    return base64.b64encode(bytes.fromhex(sha256)).decode("ascii")
