# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The store in a bucket: AWS, and every server that speaks S3.

Every object is created with ``If-None-Match: *`` and its SHA-256 for the server to check. Credentials come from where
the AWS tools look for them, never from the address.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import re
import time
import typing as t
import urllib.parse
from xml.etree import ElementTree

from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError
from ansible_collections.integrity.ima.plugins.module_utils._shard import SHARD_SUFFIX
from ansible_collections.integrity.ima.plugins.module_utils._store._objects import (
    FORMAT_NAME,
    Check,
    Signing,
    Source,
    exists_different,
    hashed,
    query_of,
    require_store,
)
from ansible_collections.integrity.ima.plugins.module_utils._store._s3_client import S3Client

EXPIRES = 900  # seconds for which a signed address can be used
_CONFLICTS = 4
# "Bucket naming rules", the old ones included
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,254}\Z")
_LIST = "ListBucketResult"
_TAG = "ima=shard"
# "ListObjectsV2" and "ListObjectVersions": parameters of the next request, and the members that hold them
_TOKEN = {"continuation-token": "NextContinuationToken"}
_MARKERS = {"key-marker": "NextKeyMarker", "version-id-marker": "NextVersionIdMarker"}
_SIZE = re.compile(r"[0-9]{1,16}\Z")


class S3Objects(Signing):
    """Objects of a bucket below a prefix: ``s3://bucket/prefix?endpoint=URL&region=NAME&profile=NAME``."""

    def __init__(self, address: str) -> None:
        self._address(address)
        require_store(self, self.name, self._is_empty)

    def _is_empty(self) -> bool:
        query = {"list-type": "2", "prefix": self._prefix, "max-keys": "1"}
        return self._client.document("list", query, _LIST).find("Contents") is None

    def _address(self, address: str) -> None:
        """Take an address apart, and make a client; nothing is asked of the server."""
        parts = urllib.parse.urlsplit(address)
        options = query_of(parts, ("endpoint", "region", "profile"))
        endpoint = urllib.parse.urlsplit(options.get("endpoint", "https://aws"))
        if not _BUCKET.match(parts.netloc) or endpoint.scheme not in ("http", "https") or not endpoint.hostname:
            raise StoreError(
                "An S3 store is named s3://bucket/prefix, without credentials, its endpoint http:// or https://",
                reason="store_address",
                hint="the credentials come from the environment or the files of the AWS tools",
            )
        path = urllib.parse.unquote(parts.path).strip("/")
        self._prefix = f"{path}/" if path else ""
        self.name = f"s3://{parts.netloc}{parts.path.rstrip('/')}"
        self._write_once = False  # not seen yet
        self._client = S3Client(self.name, parts.netloc, options)

    # -- reading ----------------------------------------------------------------------------------------------------

    def _pages(
        self, what: str, kind: str, prefix: str, query: dict[str, str], turn: t.Mapping[str, str]
    ) -> t.Iterator[ElementTree.Element]:
        """Yield the pages of a list, documents ``kind``.

        ``turn``: by parameter of the next request, the member of a page that says where the list goes on. One that
        ends without saying so is not a shorter one.
        """
        query = {"encoding-type": "url", "prefix": self._prefix + prefix, **query}
        while True:
            page = self._client.document(what, query, kind)
            yield page
            if page.findtext("IsTruncated") != "true":
                return
            following = {key: page.findtext(member) or "" for key, member in turn.items()}
            if "key-marker" in following:  # a name; tokens are never encoded
                following["key-marker"] = _name(page, page, turn["key-marker"])
            if all(query.get(key, "") == value for key, value in following.items()):
                raise StoreError(
                    f"{self.name} says that a list goes on, and does not say where",
                    reason="bad_answer",
                    kept="everything",
                    hint="look at the store's log, or at a proxy before it",
                )
            query.update(following)

    def _listed(self, prefix: str, **more: str) -> t.Iterator[ElementTree.Element]:
        """Yield the pages of a list of objects; see "ListObjectsV2"."""
        return self._pages("list", _LIST, prefix, {"list-type": "2", **more}, _TOKEN)

    def folders(self, prefix: str) -> list[str]:
        """See :class:`Objects`."""
        start = len(self._prefix + prefix)
        return [
            _name(page, each, "Prefix")[start:].rstrip("/")
            for page in self._listed(prefix, delimiter="/")
            for each in page.iter("CommonPrefixes")
        ]

    def sizes(self, prefix: str) -> dict[str, int]:
        """See :class:`Objects`."""
        start = len(self._prefix + prefix)
        found = (
            (_name(page, each, "Key")[start:], each.findtext("Size") or "")
            for page in self._listed(prefix)
            for each in page.iter("Contents")
        )
        return {
            name: int(size)
            for name, size in found
            if name and not name.startswith(".") and not name.endswith("/") and _SIZE.match(size)
        }

    def read(self, name: str, limit: int) -> bytes:
        """See :class:`Objects`."""
        with self.open(name) as file:
            return file.read(limit)

    def open(self, name: str) -> t.BinaryIO:
        """See :class:`Objects`."""
        what = f"read {name}"
        body = self._client.request(what, "GET", self._prefix + name, stream=True).body
        return t.cast(t.BinaryIO, io.BufferedReader(Source(body.read, body.close, lambda: self._reading(what))))

    @contextlib.contextmanager
    def _reading(self, what: str) -> t.Iterator[None]:
        try:
            yield
        except Exception as error:
            raise self._client.unanswered(error, what) from error

    def rewritten(self, prefix: str) -> dict[str, bool] | None:
        """See :class:`Objects`: in a bucket with versions a removed name is free again, but what it was stays."""
        written: dict[str, list[tuple[str, str]]] = {}
        start, removed = len(self._prefix + prefix), set()
        try:
            # See "ListObjectVersions".
            for page in self._pages("list versions", "ListVersionsResult", prefix, {"versions": ""}, _MARKERS):
                for each in page.iter("Version"):
                    seen = each.findtext("ETag") or "", each.findtext("Size") or ""
                    written.setdefault(_name(page, each, "Key")[start:], []).append(seen)
                removed |= {_name(page, each, "Key")[start:] for each in page.iter("DeleteMarker")}
        except StoreError as error:
            # A server without versions says so, or answers as if it had not been asked for them.
            if error.reason == "store_denied" or error.details.get("status") in (400, 405, 501):
                return None
            if error.details.get("found") == _LIST:
                return None
            raise
        again = {name for name, versions in written.items() if len(versions) > 1}
        return {name: len(set(written.get(name, []))) > 1 for name in again | removed}

    def confirms(self, name: str, size: int, sha256: str) -> bool:
        """See :class:`Objects`: by the checksum that the server keeps, else by reading the object."""
        try:
            return self._is(name, size, sha256)
        except FileNotFoundError:
            return False

    def _is(self, name: str, size: int, sha256: str) -> bool:
        """Say whether what has the name has these bytes. Raises ``FileNotFoundError`` when nothing has it."""
        head = self._client.request(
            f"look at {name}", "HEAD", self._prefix + name, headers={"x-amz-checksum-mode": "ENABLED"}
        ).headers
        if head.get("content-length") != str(size):
            return False
        kept = head.get("x-amz-checksum-sha256", "-")
        if "-" not in kept:  # else it is that of the parts, or none
            return kept == _base64(sha256)
        with self.open(name) as file:
            return hashed(file) == (size, sha256)

    # -- writing ----------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bool:
        """See :class:`Objects`."""
        made = self._put(name, data, len(data), hashlib.sha256(data).hexdigest())
        if name == FORMAT_NAME and not self._write_once:
            self._require_write_once(data)
        return made

    def create_from(self, name: str, part: str, check: Check, size: int, sha256: str) -> bool:
        """See :class:`Objects`."""
        with open(part, "rb") as file:
            check(file)
            return self._put(name, file, size, sha256)

    def _put(self, name: str, body: t.Any, size: int, sha256: str) -> bool:
        """Create it; whatever the answer was, what the store then has decides."""
        made = self._put_once(name, body, size, sha256)
        if not self.confirms(name, size, sha256):
            raise exists_different(f"{self.name}/{name}", sha256)
        return made

    def _put_once(self, name: str, body: t.Any, size: int, sha256: str) -> bool:
        """Ask for it once, and again while somebody else is creating it at the same moment. False: it is there."""
        headers = _binding(name, size, sha256)
        if not isinstance(body, bytes):
            headers["expect"] = "100-continue"  # so that a refusal comes before the bytes go
        for attempt in range(_CONFLICTS):
            try:
                self._client.request(f"write {name}", "PUT", self._prefix + name, headers=headers, body=body)
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
        if self._put_once(FORMAT_NAME, data, len(data), hashlib.sha256(data).hexdigest()):
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
            objects._client.request("look at the bucket", "HEAD")
            return False
        except FileNotFoundError:
            pass
        if not check:
            region = objects._client.region
            body = _document("CreateBucketConfiguration", LocationConstraint=region) if region != "us-east-1" else b""
            lock = {"x-amz-bucket-object-lock-enabled": "true"}
            objects._client.request("create the bucket", "PUT", headers=lock, body=body)
        return True

    def protection(self) -> dict[str, t.Any]:
        """Return whether versions are kept and how objects are locked; None for what the account may not know."""
        state: dict[str, t.Any] = {"versioning": None, "lock": None}
        with contextlib.suppress(StoreError):
            found = self._client.document("look at versioning", {"versioning": ""}, "VersioningConfiguration")
            state["versioning"] = found.findtext("Status") or "Disabled"
        with contextlib.suppress(StoreError, FileNotFoundError):
            found = self._client.document("look at object lock", {"object-lock": ""}, "ObjectLockConfiguration")
            rule = found.find("Rule/DefaultRetention")
            days, years, mode = (
                (rule.findtext(each) or "" if rule is not None else "") for each in ("Days", "Years", "Mode")
            )
            state["lock"] = {"mode": mode, "days": int(days or 0) or 365 * int(years or 0)}
        return state

    def enable_versioning(self) -> None:
        """Keep every version of every object."""
        self._configure("enable versioning", "versioning", _document("VersioningConfiguration", Status="Enabled"))

    def set_lock(self, mode: str, days: int) -> None:
        """Lock what is created from now on, for so many days."""
        retention = {"DefaultRetention": {"Mode": mode, "Days": str(days)}}
        body = _document("ObjectLockConfiguration", ObjectLockEnabled="Enabled", Rule=retention)
        self._configure("set the object lock", "object-lock", body)

    def _configure(self, what: str, part: str, body: bytes) -> None:
        checksum = {"x-amz-checksum-sha256": _base64(hashlib.sha256(body).hexdigest())}
        self._client.request(what, "PUT", query={part: ""}, headers=checksum, body=body)

    # -- for a host that writes by itself ---------------------------------------------------------------------------

    def lacks(self, name: str, size: int, sha256: str) -> bool:
        """See :class:`Signing`."""
        try:
            if self._is(name, size, sha256):
                return False
        except FileNotFoundError:
            return True
        raise exists_different(f"{self.name}/{name}", sha256)

    def sign(self, name: str, size: int, sha256: str) -> tuple[str, dict[str, str]]:
        """Return an address at which whoever has it can create this one object, and the headers that go with it.

        Length, SHA-256 and ``If-None-Match`` are signed: other bytes, or a second time, are refused by the store.
        """
        headers = _binding(name, size, sha256)
        url = self._client.presigned(self._prefix + name, headers, EXPIRES)
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(url).query)
        signed = set(query.get("X-Amz-SignedHeaders", [""])[0].split(";"))
        if not {"host", *headers} <= signed:
            raise StoreError(
                f"An address for {self.name} would not bind {', '.join(sorted(set(headers) - signed))}",
                reason="not_signed",
                hint="update botocore",
            )
        return url, headers


def _binding(name: str, size: int, sha256: str) -> dict[str, str]:
    """Return the headers that bind a PUT to these bytes, and to a name that is free.

    A shard gets a tag: lifecycle rules choose by tag, not by the end of a name, and manifests have to stay.
    """
    headers = {"if-none-match": "*", "x-amz-checksum-sha256": _base64(sha256), "content-length": str(size)}
    return dict(headers, **{"x-amz-tagging": _TAG}) if name.endswith(SHARD_SUFFIX) else headers


def _base64(sha256: str) -> str:
    return base64.b64encode(bytes.fromhex(sha256)).decode("ascii")


def _name(page: ElementTree.Element, element: ElementTree.Element, member: str) -> str:
    """Return a name in a list, which the server encodes if it says so."""
    text = element.findtext(member) or ""
    return urllib.parse.unquote_plus(text) if page.findtext("EncodingType") == "url" else text


def _document(name: str, **members: t.Any) -> bytes:
    """Return the XML of a bucket's setting."""

    def fill(element: ElementTree.Element, values: dict[str, t.Any]) -> ElementTree.Element:
        for key, value in values.items():
            child = ElementTree.SubElement(element, key)
            if isinstance(value, dict):
                fill(child, value)
            else:
                child.text = value
        return element

    root = ElementTree.Element(name, xmlns="http://s3.amazonaws.com/doc/2006-03-01/")
    return ElementTree.tostring(fill(root, members))
