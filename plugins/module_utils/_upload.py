# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""From a file to an address that somebody else signed: HTTP PUT with the standard library, on the managed host.

The address is a secret: whoever has it can create that one object until it expires. No message holds its query.
Proxies and certificate authorities come from the environment (``HTTPS_PROXY``, ``NO_PROXY``, ``SSL_CERT_FILE``).
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import socket
import ssl
import threading
import time
import typing as t
import urllib.parse
import urllib.request

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError, printable

TIMEOUT = 60  # seconds without a byte
DEADLINE = 900  # seconds for one attempt: the address is good for no longer
ATTEMPTS = 4
_PAUSE = 1.0  # seconds before the second attempt; doubles
_ANSWER = 1 << 16
_BLOCK = 1 << 16
_CHECKSUM = "x-amz-checksum-sha256"
# HTTP status, or the code in S3's answer (API reference, "Error responses") -> reason
_CODES = {
    "PreconditionFailed": "exists",
    "BadDigest": "checksum_refused",
    "XAmzContentChecksumMismatch": "checksum_refused",
    "XAmzContentSHA256Mismatch": "checksum_refused",
    "InvalidDigest": "checksum_refused",
    "IncompleteBody": "checksum_refused",
    "ExpiredToken": "url_expired",
    "QuotaExceeded": "store_full",
    "XMinioStorageFull": "store_full",
}
_STATUSES = {401: "store_denied", 403: "store_denied", 404: "store_missing", 412: "exists", 507: "store_full"}
# Whether the object is there now is not known; the next attempt, or the store itself, tells.
_AGAIN = frozenset((408, 409, 425, 429, 500, 502, 503, 504))
_HINTS = {
    "exists": "the controller asks the store what it has",
    "checksum_refused": "the file changed on its way: look for a proxy that rewrites, and at the host's disk",
    "url_expired": "compare the clocks of controller, host and store; the next rotation signs anew",
    "store_denied": "look at the store's policy for the account that signed",
    "proxy": "correct HTTP_PROXY or HTTPS_PROXY",
    "store_full": "make room in the store and rotate again",
    "store_unavailable": "look at the store and the network between it and this host, and rotate again",
}
_HUNG_UP = (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError, ssl.SSLZeroReturnError)
# what a test replaces
sleep = time.sleep


def put(url: str, headers: dict[str, str], path: str, timeout: float = TIMEOUT) -> bool:
    """Create the object at ``url`` from the file ``path``; return when the store has said yes.

    True: its answer names the digest that was sent. False: it does not, as some servers, and all that is no store.
    Raises :class:`StoreError`: ``exists``, ``checksum_refused``, ``url_expired``, ``store_denied``, ``store_missing``,
    ``store_full``, ``store_untrusted``, ``upload_refused``, ``store_unavailable`` (no attempt got an answer that
    counts: the object may be there all the same).
    """
    said = ""
    for attempt in range(ATTEMPTS):
        if attempt:
            sleep(_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
        try:
            status, body, found = _attempt(url, headers, path, timeout)
        except _HUNG_UP as error:
            said = _kind(error)
            continue
        except ssl.SSLError as error:
            raise _error("store_untrusted", url, path, f"{error.reason or 'no TLS'}") from None
        except (OSError, http.client.HTTPException) as error:
            # The error may quote the request: only its kind and the system's text are passed on.
            said = _kind(error)
            continue
        if status in (200, 201, 204):
            if found and found != headers.get(_CHECKSUM):
                raise _error("checksum_refused", url, path, "it answered with another checksum than the one sent")
            return bool(found)
        said = _refusal(status, body, url, path)
    raise _error("store_unavailable", url, path, f"{said}, {ATTEMPTS} times")


def _connect(parts: urllib.parse.SplitResult, path: str, timeout: float) -> tuple[http.client.HTTPConnection, str]:
    """Return a connection to the store or to the proxy before it, and what to ask it for."""
    target = f"{parts.path}?{parts.query}"
    proxy = urllib.request.getproxies().get(parts.scheme)
    host = t.cast(str, parts.hostname)
    if not proxy or urllib.request.proxy_bypass(host):
        proxy = ""
    first = urllib.parse.urlsplit(proxy if "//" in proxy else f"//{proxy}") if proxy else parts
    try:
        port = first.port
    except ValueError:
        raise _error(
            "proxy", parts.geturl(), path, "the proxy in the environment has a port that is no number"
        ) from None
    if parts.scheme == "http":
        plain = http.client.HTTPConnection(t.cast(str, first.hostname), port, timeout=timeout)
        return plain, urllib.parse.urlunsplit(parts) if proxy else target
    secure = http.client.HTTPSConnection(
        t.cast(str, first.hostname), port, timeout=timeout, context=ssl.create_default_context()
    )
    if proxy:
        secure.set_tunnel(host, parts.port)
    return secure, target


def _attempt(url: str, headers: dict[str, str], path: str, timeout: float) -> tuple[int, bytes, str]:
    """Send the whole file once, from its start; return the answer's status, the start of its body, and the checksum."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise _error("upload_refused", url, path, "the address is neither http nor https")
    connection, target = _connect(parts, path, timeout)
    with _durable.failing(path, "read"):
        opened = open(path, "rb")
    with opened as file, contextlib.closing(connection), _ending() as watched:
        if os.fstat(file.fileno()).st_size != int(headers["content-length"]):
            raise _error("store_diverged", url, path, "the file does not have the length that was signed")
        connection.putrequest("PUT", target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", parts.netloc.rpartition("@")[2])
        for name, value in headers.items():
            connection.putheader(name, value)
        hung_up: OSError | None = None
        try:
            connection.endheaders()
            watched.append(connection.sock)
            for block in iter(lambda: _block(file, path), b""):
                connection.send(block)
        except _HUNG_UP as error:
            hung_up = error  # the store may have answered before it hung up
        try:
            answer = connection.getresponse()
            return answer.status, answer.read(_ANSWER), answer.getheader(_CHECKSUM) or ""
        except (OSError, http.client.HTTPException) as error:
            raise hung_up or error from None


@contextlib.contextmanager
def _ending() -> t.Iterator[list[t.Any]]:
    """Shut the sockets in the yielded list at the deadline: who sends a byte now and then would keep us for ever."""
    watched: list[t.Any] = []

    def cut() -> None:
        for each in watched:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(each, socket.SHUT_RDWR)

    timer = threading.Timer(DEADLINE, cut)
    timer.daemon = True
    timer.start()
    try:
        yield watched
    finally:
        timer.cancel()


def _block(file: t.BinaryIO, path: str) -> bytes:
    """Read a block; an error of this host's disk is not one of the store's."""
    with _durable.failing(path, "read"):
        return file.read(_BLOCK)


def _refusal(status: int, body: bytes, url: str, path: str) -> str:
    """Raise what a refusal means; return its text when another attempt may help."""
    found = re.search(rb"<Code>([A-Za-z0-9]{1,64})</Code>", body)
    code = found.group(1).decode("ascii") if found else ""
    text = f"it answered {status} {code}".rstrip()
    if (status in _AGAIN and code not in _CODES) or code == "RequestTimeout":
        return text
    reason = _CODES.get(code) or _STATUSES.get(status, "upload_refused")
    if reason == "store_denied" and b"expired" in body.lower():
        reason = "url_expired"
    raise _error(reason, url, path, text)


def _kind(error: Exception) -> str:
    """Return what went wrong on the wire, without what was sent."""
    text = getattr(error, "strerror", None)
    if isinstance(text, str):
        return printable(text)
    # What a proxy answered to CONNECT is told in words only, by a bare OSError.
    return printable(str(error))[:200] if error.__class__ is OSError else type(error).__name__


def _error(reason: str, url: str, path: str, what: str) -> StoreError:
    parts = urllib.parse.urlsplit(url)
    where = f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"
    return StoreError(
        f"The store at {printable(where)} did not take {path}: {what}",
        reason=reason,
        kept="the shard on the host, and its records in the kernel",
        hint=_HINTS.get(reason, "look at the store's log"),
        path=path,
    )
