# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""Requests to one bucket: credentials, signatures and connections are botocore's.

Not the client of boto3: that keeps a description of every region and operation in memory, a third of what Ansible
itself needs, in each fork of a controller. Sources: Amazon S3 API Reference; "Authenticating Requests (AWS Signature
Version 4)".
"""

from __future__ import annotations

import random
import time
import typing as t
import urllib.parse
from xml.etree import ElementTree

from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError, printable
from ansible_collections.integrity.ima.plugins.module_utils._store._objects import library_missing

TIMEOUTS = (10.0, 60.0)  # seconds to connect, and without a byte
ATTEMPTS = 3
_ANSWER = 1 << 24  # bytes of an answer that is no object; a page of a list has at most 1,000 names of 1,024 bytes
_AGAIN = frozenset((429, 500, 502, 503, 504))
_AGAIN_CODES = frozenset(("RequestTimeout", "SlowDown", "InternalError"))
_REASONS = {
    "AccessDenied": "store_denied",
    "InvalidAccessKeyId": "store_denied",
    "SignatureDoesNotMatch": "store_denied",
    "ExpiredToken": "store_denied",
    "RequestTimeTooSkewed": "store_denied",
    "NoSuchBucket": "store_missing",
    "InvalidBucketName": "store_address",
    "PermanentRedirect": "store_address",
    "AuthorizationHeaderMalformed": "store_address",
    "BadDigest": "checksum_refused",
    "XAmzContentChecksumMismatch": "checksum_refused",
    "XAmzContentSHA256Mismatch": "checksum_refused",
    "InvalidDigest": "checksum_refused",
    "QuotaExceeded": "store_full",
    "XMinioStorageFull": "store_full",
}
_STATUSES = {
    301: "store_address",
    401: "store_denied",
    403: "store_denied",
    # somebody else writes the same name at this moment
    409: "conflict",
    412: "exists",
    507: "store_full",
}
# what botocore raises when it never came to an answer
_KINDS = {
    "SSLError": "store_untrusted",
    "PartialCredentialsError": "store_denied",
    "CredentialRetrievalError": "store_denied",
    "ProfileNotFound": "store_denied",
    "ConfigParseError": "store_denied",
}
_HINTS = {
    "bad_answer": "look at what answers at that address: it does not speak S3, or its answer is cut off",
    "store_address": "correct the name of the bucket, its region or its endpoint",
    "store_denied": "look at the credentials of the controller, at its clock, and at the bucket's policy",
    "store_missing": "create the bucket (integrity.ima.ima_store), or correct its name",
    "store_untrusted": "compare the server's certificate, then name its authority in AWS_CA_BUNDLE",
    "checksum_refused": "something between the controller and the store changes bytes",
    "store_full": "make room in the store and rotate again",
    "store_unavailable": "look at the store and the network, and rotate again",
}
# what a test replaces
sleep = time.sleep


class S3Client:
    """Signed requests to ``bucket``; ``name`` is what messages call the store.

    Raises :class:`StoreError` ``library_missing``, or ``store_denied`` when the AWS tools' settings cannot be read.
    """

    def __init__(self, name: str, bucket: str, options: dict[str, str]) -> None:
        try:
            import botocore.httpsession
            import botocore.session
            import botocore.utils
        except ImportError as error:
            raise library_missing("botocore (boto3 has it)", "S3") from error
        self._name = name
        try:
            session = botocore.session.Session(profile=options.get("profile"))
            self.region = options.get("region") or session.get_config_variable("region") or "us-east-1"
            self._base = _base(bucket, options.get("endpoint") or _configured(session), self.region)
            self._credentials = session.get_credentials()
            self._http = botocore.httpsession.URLLib3Session(
                verify=session.get_config_variable("ca_bundle") or True,
                proxies=botocore.utils.get_environ_proxies(self._base),
                timeout=TIMEOUTS,
            )
        except Exception as error:
            raise self.unanswered(error, "open") from error

    # -- requests -----------------------------------------------------------------------------------------------------

    def request(
        self,
        what: str,
        method: str,
        key: str = "",
        query: t.Mapping[str, str] | None = None,
        headers: t.Mapping[str, str] | None = None,
        body: t.Any = None,
        *,
        stream: bool = False,
    ) -> Answer:
        """Send it, again if that may help; return the answer, whose body is not read yet with ``stream``.

        ``what``: what cannot be done without it, for messages. Raises ``FileNotFoundError``, or :class:`StoreError`
        with ``status`` and ``code``; reason ``store_unavailable`` says nothing about whether it was done.
        """
        for attempt in range(ATTEMPTS):
            last = attempt == ATTEMPTS - 1
            if attempt:
                sleep(0.5 * 2**attempt * random.uniform(0.5, 1.5))
            try:
                answer = self._send(method, key, query or {}, headers or {}, body, stream)
            except Exception as error:
                refusal = self.unanswered(error, what)
                if last or refusal.reason != "store_unavailable":
                    raise refusal from error
                continue
            if answer.status < 300:
                return answer
            code = answer.code()
            if last or not (answer.status in _AGAIN or code in _AGAIN_CODES) or _REASONS.get(code):
                raise self._refused(answer.status, code, answer.text("Message"), what)
        raise AssertionError("the last attempt returns or raises")

    def document(self, what: str, query: t.Mapping[str, str], name: str) -> ElementTree.Element:
        """Return the document ``name`` that the bucket answers to ``query``; see :meth:`request`.

        Reason ``bad_answer`` for anything else: an answer that cannot be read is not an empty one.
        """
        found = self.request(what, "GET", query=query).xml()
        if found.tag != name:
            raise self._error("bad_answer", what, f"it answered something else than {name}", found=found.tag)
        return found

    def _send(
        self, method: str, key: str, query: t.Mapping[str, str], headers: t.Mapping[str, str], body: t.Any, stream: bool
    ) -> Answer:
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        if body is not None and not isinstance(body, bytes):
            body.seek(0)
        request = AWSRequest(method, self.url(key, query), dict(headers), body, stream_output=True)
        S3SigV4Auth(self._frozen(), "s3", self.region).add_auth(request)
        return Answer(self._http.send(request.prepare()), stream, bodiless=method == "HEAD")

    def presigned(self, key: str, headers: dict[str, str], expires: int) -> str:
        """Return an address for a PUT with exactly these ``headers``, for ``expires`` seconds."""
        from botocore.auth import S3SigV4QueryAuth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest("PUT", self.url(key, {}), dict(headers))
        try:
            S3SigV4QueryAuth(self._frozen(), "s3", self.region, expires=expires).add_auth(request)
        except Exception as error:
            raise self.unanswered(error, "sign") from error
        return str(request.url)

    def url(self, key: str, query: t.Mapping[str, str]) -> str:
        """Return the address of an object, or of the bucket."""
        path = self._base + urllib.parse.quote(key, safe="/~")
        return f"{path}?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}" if query else path

    def _frozen(self) -> t.Any:
        if self._credentials is None:
            raise self._error("store_denied", "sign", "there are no credentials: the AWS tools would find none either")
        return self._credentials.get_frozen_credentials()

    # -- what went wrong ----------------------------------------------------------------------------------------------

    def unanswered(self, error: Exception, what: str) -> StoreError:
        """Return the error for what botocore raised; what is nobody's failure but ours is raised again."""
        if isinstance(error, StoreError):
            return error
        kind = type(error)
        if not kind.__module__.startswith(("botocore", "urllib3")) and not isinstance(error, OSError):
            raise error
        return self._error(_KINDS.get(kind.__name__, "store_unavailable"), what, printable(str(error))[:300])

    def _refused(self, status: int, code: str, message: str, what: str) -> Exception:
        if code in ("NoSuchKey", "NoSuchVersion") or (status == 404 and code != "NoSuchBucket"):
            return FileNotFoundError(2, "no such object", what)
        reason = _REASONS.get(code) or _STATUSES.get(status, "store_unavailable")
        said = f"it answered {status} {printable(code)[:64]} {printable(message)[:200]}".rstrip()
        return self._error(reason, what, said, code=printable(code)[:64], status=status)

    def _error(self, reason: str, what: str, said: str, **details: t.Any) -> StoreError:
        return StoreError(
            f"Cannot {what} in {self._name}: {said}",
            reason=reason,
            kept="the shard on the host, and what was delivered before",
            hint=_HINTS.get(reason, ""),
            **details,
        )


class Answer:
    """An answer: its status and headers, and its body, whole or to be read."""

    def __init__(self, response: t.Any, stream: bool, *, bodiless: bool) -> None:
        from botocore.response import StreamingBody

        self.status: int = response.status_code
        self.headers: t.Mapping[str, str] = response.headers
        self.body: t.Any = StreamingBody(response.raw, self.headers.get("content-length"))
        self._data = b""
        if not stream or self.status >= 300:
            # The length that a HEAD is told is that of the object.
            self._data = b"" if bodiless else self.body.read(_ANSWER)
            self.body.close()

    def xml(self) -> ElementTree.Element:
        """Return the document in the body, names without their namespace; an empty one if there is none."""
        try:
            if b"<!DOCTYPE" in self._data:  # S3 has none; entities have no place here
                raise ElementTree.ParseError
            root = ElementTree.fromstring(self._data)
        except (ElementTree.ParseError, ValueError, LookupError, RecursionError):
            return ElementTree.Element("none")
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
        return root

    def text(self, name: str) -> str:
        """Return the text of a member of the document, else an empty one."""
        return self.xml().findtext(name) or ""

    def code(self) -> str:
        """Return the word with which S3 names an error, else an empty one."""
        return self.text("Code")


def _configured(session: t.Any) -> str | None:
    """Return the endpoint that the AWS tools would take (``AWS_ENDPOINT_URL_S3`` and its like)."""
    from botocore.configprovider import ConfiguredEndpointProvider

    provider = ConfiguredEndpointProvider(
        full_config=session.full_config, scoped_config=session.get_scoped_config(), client_name="s3"
    )
    return t.cast("str | None", provider.provide())


def _base(bucket: str, endpoint: str | None, region: str) -> str:
    """Return the address of a bucket: below an endpoint by its path, else by its name at AWS."""
    if endpoint:
        return f"{endpoint.rstrip('/')}/{bucket}/"
    domain = "amazonaws.com.cn" if region.startswith("cn-") else "amazonaws.com"
    # A certificate for *.s3.<region> does not cover a name with dots.
    if "." in bucket:
        return f"https://s3.{region}.{domain}/{bucket}/"
    return f"https://{bucket}.s3.{region}.{domain}/"
