# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One signed PUT against a real server on loopback: what is sent, what an answer means, and what nobody may read."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import socket
import ssl
import struct
import sys
import threading
import time
import traceback
import tracemalloc
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _upload
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError

SECRET = "7d1f0a5c9e"
QUERY = f"X-Amz-Expires=900&X-Amz-Signature={SECRET}"
TARGET = f"/ima/hosts/web1/00000001-0-7.ima.gz?{QUERY}"
PATIENCE = 10.0  # seconds after which the server gives a test up
LARGE = 8 << 20  # more than the sockets' buffers hold
NEW_SSL = sys.version_info >= (3, 10)  # which names an end of file in an error of its own

# A key for 127.0.0.1 that is worth nothing: everybody has it.
_KEY = """
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgvmA4ykqi/kZUHSaU
t4JfXIjFUCuaWdTCbXDprui2ZTOhRANCAARRTFx+yY8UgMO/LBSKPB0E3F+l2Eou
Uqa//7IqXatRzTnBz0/SpWSnrvl6ZVWmvAOBLNCyr/lbyk9bYJvDSziX
"""
_CERTIFICATE = """
MIIBiDCCAS6gAwIBAgIBATAKBggqhkjOPQQDAjAQMQ4wDAYDVQQDDAVzdG9yZTAg
Fw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowEDEOMAwGA1UEAwwFc3Rv
cmUwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAARRTFx+yY8UgMO/LBSKPB0E3F+l
2EouUqa//7IqXatRzTnBz0/SpWSnrvl6ZVWmvAOBLNCyr/lbyk9bYJvDSziXo3cw
dTASBgNVHRMBAf8ECDAGAQH/AgEAMA8GA1UdEQQIMAaHBH8AAAEwHQYDVR0OBBYE
FBlPy5RDBba272xkDrCU9qqFysvrMB8GA1UdIwQYMBaAFBlPy5RDBba272xkDrCU
9qqFysvrMA4GA1UdDwEB/wQEAwIBhjAKBggqhkjOPQQDAgNIADBFAiBHWfVDrShF
fKJPMzjmrVIcr9EyD4NxxDaNkVRV46nJ7gIhAKu//IDC9/wyEvdS+6kjVHXkpz2r
Nafn1QgsVK5mVqgM
"""


# --- the server -------------------------------------------------------------------------------------------------------


class Request(t.NamedTuple):
    """What a server got: the request line, the headers as they came, and the body as far as it was read."""

    line: str
    headers: list[tuple[str, str]]
    body: bytes


class Peer:
    """The server's end of one connection."""

    def __init__(self, server: Server, connection: socket.socket) -> None:
        self.server, self.socket = server, connection
        connection.settimeout(PATIENCE)
        self._file = connection.makefile("rb")
        self._line, self._headers = "", t.cast(t.List[t.Tuple[str, str]], [])

    def head(self) -> str:
        """Read up to the body; return the request line."""
        self._line = self._file.readline().decode("latin-1").rstrip("\r\n")
        for line in iter(self._file.readline, b"\r\n"):
            if not line:
                break
            name, _colon, value = line.decode("latin-1").partition(":")
            self._headers.append((name, value.strip()))
        self.server.requests.append(Request(self._line, self._headers, b""))
        return self._line

    def body(self, size: int | None = None) -> bytes:
        """Read the body, or ``size`` bytes of it."""
        lengths = [int(value) for name, value in self._headers if name.lower() == "content-length"]
        body = self._file.read(lengths[0] if size is None else size)
        self.server.requests[-1] = Request(self._line, self._headers, body)
        return body

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self, status: int, body: bytes = b"", more: bytes = b"") -> None:
        head = b"HTTP/1.1 %d Said\r\nContent-Length: %d\r\nConnection: close\r\n" % (status, len(body))
        self.send(head + more + b"\r\n" + body)

    def reset(self) -> None:
        """Hang up so that the other side hears of it at once."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def wait(self) -> None:
        """Say nothing until the other side hangs up."""
        with contextlib.suppress(OSError):
            while self.socket.recv(65536):
                pass

    def close(self) -> None:
        self._file.close()
        self.socket.close()


Script = t.Callable[[Peer], None]


class Server:
    """Plays one script for each connection, the last one for all that follow."""

    def __init__(self, *scripts: Script, context: ssl.SSLContext | None = None) -> None:
        self._scripts, self._context = scripts, context
        self.requests: list[Request] = []
        self.connections = self.broken = 0  # broken: connections that the client left before the script's end
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def url(self, scheme: str = "http", host: str = "127.0.0.1") -> str:
        return f"{scheme}://{host}:{self.port}{TARGET}"

    def _serve(self) -> None:
        while True:
            try:
                connection = self._listener.accept()[0]
            except OSError:
                return
            self.connections += 1
            # As servers do. An answer that waits until TLS's tickets are acknowledged is lost if the server hangs up.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            script = self._scripts[min(self.connections, len(self._scripts)) - 1]
            try:
                if self._context is not None:
                    connection.settimeout(PATIENCE)
                    connection = self._context.wrap_socket(connection, server_side=True)
                with contextlib.closing(Peer(self, connection)) as peer:
                    script(peer)
            except (OSError, ValueError):
                self.broken += 1
                connection.close()

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_unused: t.Any) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


def says(status: int, body: bytes = b"") -> Script:
    """Take the whole request, then answer."""

    def script(peer: Peer) -> None:
        peer.head()
        peer.body()
        peer.answer(status, body)

    return script


def hangs_up(peer: Peer) -> None:
    peer.head()
    peer.reset()


def error(code: str, message: str = "") -> bytes:
    """What S3 says in the body of an error."""
    return f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>{message}</Message></Error>'.encode()


# --- the client -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy", "ssl_cert_file", "ssl_cert_dir"):
        for each in (name, name.upper()):
            monkeypatch.delenv(each, raising=False)


@pytest.fixture(name="pauses", autouse=True)
def _pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(_upload, "sleep", pauses.append)
    return pauses


@pytest.fixture(name="shard")
def _shard(tmp_path: Path) -> Path:
    path = tmp_path / "shard"
    path.write_bytes(os.urandom(200001))
    return path


@pytest.fixture(name="tls")
def _tls(tmp_path: Path) -> tuple[ssl.SSLContext, str]:
    """The server's side of TLS, and the file with the authority that vouches for it."""
    for name, kind, text in (("key", "PRIVATE KEY", _KEY), ("ca", "CERTIFICATE", _CERTIFICATE)):
        (tmp_path / name).write_text(f"-----BEGIN {kind}-----{text}-----END {kind}-----\n", encoding="ascii")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(str(tmp_path / "ca"), str(tmp_path / "key"))
    return context, str(tmp_path / "ca")


def signed(data: bytes) -> dict[str, str]:
    """The headers that a store signs for ``data``."""
    checksum = base64.b64encode(hashlib.sha256(data).digest()).decode("ascii")
    return {"if-none-match": "*", "x-amz-checksum-sha256": checksum, "content-length": str(len(data))}


def put(url: str, path: Path, timeout: float = 5.0, headers: dict[str, str] | None = None) -> bool:
    return _upload.put(url, headers or signed(path.read_bytes()), str(path), timeout)


def large(directory: Path) -> Path:
    """A shard that no socket takes at once."""
    shard = directory / "shard"
    shard.write_bytes(bytes(LARGE))
    return shard


def refused(url: str, path: Path, timeout: float = 5.0, headers: dict[str, str] | None = None) -> ImaError:
    """The error that it raises, which tells nobody the address."""
    with pytest.raises(ImaError) as caught:
        put(url, path, timeout, headers)
    said = caught.value
    printed = "".join(traceback.format_exception(type(said), said, said.__traceback__))
    told: list[str] = [printed, str(said), repr(said), repr(said.result()), said.kept, said.hint]
    behind: BaseException | None = said
    while behind is not None:  # what Python would not print, because it was suppressed, is looked at too
        told += [str(behind), repr(behind)]
        behind = behind.__cause__ or behind.__context__
    assert not [text for text in told if SECRET in text or "X-Amz" in text]
    assert said.kept and said.hint and said.details["path"] == str(path)
    return said


# --- what is sent -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 300000])
def test_the_store_gets_the_bytes_and_the_signed_headers_and_nothing_else(tmp_path: Path, size: int) -> None:
    shard = tmp_path / "shard"
    shard.write_bytes(os.urandom(size))
    with Server(says(200)) as server:
        put(server.url(), shard)
    (request,) = server.requests
    assert request.line == f"PUT {TARGET} HTTP/1.1"
    assert request.body == shard.read_bytes()
    expected = dict(signed(request.body), host=f"127.0.0.1:{server.port}")
    assert {name.lower(): value for name, value in request.headers} == expected
    assert len(request.headers) == len(expected), "a header came twice"


@pytest.mark.parametrize("status", [200, 201, 204])
def test_a_yes_is_a_yes(shard: Path, pauses: list[float], status: int) -> None:
    with Server(says(status)) as server:
        put(server.url(), shard)
    assert server.connections == 1 and pauses == []


@pytest.mark.parametrize("named", [True, False])
def test_an_answer_may_name_the_digest_of_what_was_stored(shard: Path, named: bool) -> None:
    checksum = signed(shard.read_bytes())["x-amz-checksum-sha256"].encode("ascii")

    def script(peer: Peer) -> None:
        peer.head()
        peer.body()
        peer.answer(200, more=b"X-Amz-Checksum-SHA256: %b\r\n" % checksum if named else b"")

    with Server(script) as server:
        assert put(server.url(), shard) is named


def test_a_yes_to_other_bytes_is_none(shard: Path, pauses: list[float]) -> None:
    checksum = signed(b"other bytes")["x-amz-checksum-sha256"].encode("ascii")

    def script(peer: Peer) -> None:
        peer.head()
        peer.body()
        peer.answer(200, more=b"x-amz-checksum-sha256: %b\r\n" % checksum)

    with Server(script) as server:
        assert refused(server.url(), shard).reason == "checksum_refused"
    assert len(server.requests) == 1 and pauses == []


def test_a_file_of_another_length_than_was_signed_is_not_sent(shard: Path) -> None:
    headers = signed(shard.read_bytes())
    for change in (b"", b"longer"):
        shard.write_bytes(shard.read_bytes()[:-1] + change)
        with Server(says(200)) as server:
            assert refused(server.url(), shard, headers=headers).reason == "store_diverged"
        assert server.requests == []


def test_a_file_that_shrinks_on_its_way_is_not_taken_for_sent(tmp_path: Path) -> None:
    shard = large(tmp_path)
    headers, got = signed(bytes(LARGE)), []

    def script(peer: Peer) -> None:
        peer.head()
        os.truncate(str(shard), 10)
        peer.socket.settimeout(0.5)
        with contextlib.suppress(OSError):
            while True:
                got.append(len(peer.body(65536)))
        peer.answer(400, error("IncompleteBody"))

    with Server(script) as server:
        said = refused(server.url(), shard, headers=headers)
    assert said.reason == "checksum_refused" and server.connections == 1
    assert sum(got) < LARGE, "the fault was not delivered"


@pytest.mark.parametrize("url", [f"ftp://store{TARGET}", f"file://{TARGET}", TARGET, f"https://{TARGET}"])
def test_only_http_addresses_are_used(shard: Path, pauses: list[float], url: str) -> None:
    assert refused(url, shard).reason == "upload_refused" and pauses == []


@pytest.mark.parametrize("odd", ["\r\nX-Injected: 1", " ", "\x00"])
def test_an_address_that_would_break_the_request_is_not_sent(shard: Path, odd: str) -> None:
    """The library's own error for it quotes the whole address. (Line ends are dropped by ``urlsplit`` already.)"""
    with Server(says(200)) as server:
        url = server.url() + odd
        if "\n" in odd:
            with contextlib.suppress(ImaError):
                put(url, shard)
            assert [name for each in server.requests for name, _value in each.headers if name == "X-Injected"] == []
        else:
            refused(url, shard)
            assert server.requests == []


def test_a_file_that_cannot_be_read_is_not_the_stores_fault(tmp_path: Path, pauses: list[float]) -> None:
    with Server(says(200)) as server:
        said = refused(server.url(), tmp_path / "gone", headers=signed(b""))
    assert server.requests == []
    assert said.reason != "store_unavailable" and pauses == []


# --- what an answer means ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (412, error("PreconditionFailed"), "exists"),
        (412, b"", "exists"),
        (400, error("BadDigest"), "checksum_refused"),
        (400, error("XAmzContentChecksumMismatch"), "checksum_refused"),
        (400, error("XAmzContentSHA256Mismatch"), "checksum_refused"),
        (400, error("InvalidDigest"), "checksum_refused"),
        (400, error("IncompleteBody"), "checksum_refused"),
        (403, error("AccessDenied", "Request has expired"), "url_expired"),
        (403, b"<html>This link EXPIRED yesterday</html>", "url_expired"),
        (400, error("ExpiredToken"), "url_expired"),
        (403, error("AccessDenied"), "store_denied"),
        (403, error("SignatureDoesNotMatch"), "store_denied"),
        (401, b"", "store_denied"),
        (404, error("NoSuchBucket"), "store_missing"),
        (507, b"", "store_full"),
        (507, error("XMinioStorageFull"), "store_full"),
        (403, error("QuotaExceeded"), "store_full"),
        (503, error("QuotaExceeded"), "store_full"),
        (400, b"", "upload_refused"),
        (405, b"\xff\x00<Code>", "upload_refused"),
        (413, b"<Code>" + b"A" * 1000 + b"</Code>", "upload_refused"),
        (301, error("PermanentRedirect"), "upload_refused"),
        (307, error("TemporaryRedirect"), "upload_refused"),
        (202, b"", "upload_refused"),
        (501, error("NotImplemented"), "upload_refused"),
    ],
)
def test_each_refusal_has_its_reason_and_is_not_tried_again(
    shard: Path, pauses: list[float], status: int, body: bytes, reason: str
) -> None:
    with Server(says(status, body), says(200)) as server:
        said = refused(server.url(), shard)
    assert said.reason == reason and str(status) in str(said)
    assert len(server.requests) == 1 and pauses == []


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504])
def test_what_may_pass_is_tried_again_a_few_times_with_growing_pauses(
    shard: Path, pauses: list[float], status: int
) -> None:
    with Server(says(status, error("SlowDown"))) as server:
        said = refused(server.url(), shard)
    assert said.reason == "store_unavailable" and str(status) in str(said)
    assert len(server.requests) == _upload.ATTEMPTS == len(pauses) + 1
    assert [request.body for request in server.requests] == [shard.read_bytes()] * _upload.ATTEMPTS
    assert all(0.5 * 2**number <= pause <= 1.5 * 2**number for number, pause in enumerate(pauses))


@pytest.mark.parametrize("fault", [says(503), hangs_up], ids=["says 503", "hangs up"])
def test_each_attempt_begins_at_the_files_start(shard: Path, pauses: list[float], fault: Script) -> None:
    with Server(fault, fault, fault, says(200)) as server:
        put(server.url(), shard)
    assert len(server.requests) == 4 and len(pauses) == 3
    assert server.requests[-1].body == shard.read_bytes()


def test_what_an_unanswered_attempt_left_shows_as_exists(shard: Path) -> None:
    """The store had taken it when the line broke: the next attempt hears so, and the controller compares."""

    def takes_and_dies(peer: Peer) -> None:
        peer.head()
        peer.body()
        peer.reset()

    with Server(takes_and_dies, says(412)) as server:
        assert refused(server.url(), shard).reason == "exists"
    assert server.requests[0].body == shard.read_bytes()


def test_a_request_that_was_too_slow_for_the_store_is_tried_again(shard: Path) -> None:
    with Server(says(400, error("RequestTimeout")), says(200)) as server:
        put(server.url(), shard)
    assert len(server.requests) == 2


# --- lines that break -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize(("status", "reason"), [(412, "exists"), (403, "store_denied")])
def test_an_answer_that_comes_before_the_body_was_read_is_heard(
    tmp_path: Path, pauses: list[float], status: int, reason: str, reset: bool
) -> None:
    shard = large(tmp_path)

    def script(peer: Peer) -> None:
        peer.head()
        peer.answer(status)
        if reset:  # first let the answer arrive: the reset would overtake nothing, but the kernel may drop it
            peer.body(1 << 16)
            peer.reset()

    with Server(script) as server:
        said = refused(server.url(), shard)
    assert said.reason == reason and len(server.requests) == 1 and pauses == []
    assert len(server.requests[0].body) < LARGE, "the fault was not delivered"


@pytest.mark.parametrize("read", [0, 1, 65536])
def test_a_store_that_hangs_up_without_an_answer_is_unavailable(tmp_path: Path, pauses: list[float], read: int) -> None:
    shard = large(tmp_path)

    def script(peer: Peer) -> None:
        peer.head()
        peer.body(read)
        peer.reset()

    with Server(script) as server:
        assert refused(server.url(), shard).reason == "store_unavailable"
    assert len(server.requests) == 4 and len(pauses) == 3


def test_nobody_listens(shard: Path, pauses: list[float]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    said = refused(f"http://127.0.0.1:{port}{TARGET}", shard)
    assert said.reason == "store_unavailable" and "refused" in str(said) and len(pauses) == 3


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("what", ["continue", "header", "body"])
def test_who_sends_a_byte_now_and_then_is_left_at_the_deadline(
    shard: Path, tls: t.Any, monkeypatch: pytest.MonkeyPatch, what: str, secure: bool
) -> None:
    def drips(peer: Peer) -> None:
        peer.head()
        peer.body()
        if what == "body":
            peer.send(b"HTTP/1.1 200 Yes\r\nContent-Length: 60000\r\nConnection: close\r\n\r\n")
        if what == "header":
            peer.send(b"HTTP/1.1 200 Yes\r\nX: ")
        for _number in range(int(PATIENCE / 0.02)):
            peer.send(b"HTTP/1.1 100 Continue\r\n\r\n" if what == "continue" else b"a")
            time.sleep(0.02)
        raise AssertionError("nobody hung up")

    monkeypatch.setattr(_upload, "DEADLINE", 1.5)
    monkeypatch.setattr(_upload, "ATTEMPTS", 1)
    monkeypatch.setenv("SSL_CERT_FILE", tls[1])
    with Server(drips, context=tls[0] if secure else None) as server:
        url = server.url("https" if secure else "http")
        if what == "continue":
            assert refused(url, shard).reason == "store_unavailable"
        else:  # a yes that names no digest: the controller asks the store
            assert _upload.put(url, signed(shard.read_bytes()), str(shard)) is False
    assert server.broken == 1


@pytest.mark.parametrize("when", ["at once", "after the body", "inside the status", "inside the headers"])
def test_a_store_that_falls_silent_is_given_up(shard: Path, pauses: list[float], when: str) -> None:
    def script(peer: Peer) -> None:
        if when != "at once":
            peer.head()
            peer.body()
        if when.startswith("inside"):
            peer.send(b"HTTP/1.1 2" if when.endswith("status") else b"HTTP/1.1 200 OK\r\nContent-Le")
        peer.wait()

    with Server(script) as server:
        assert refused(server.url(), shard, timeout=0.2).reason == "store_unavailable"
    assert server.connections == 4 and len(pauses) == 3


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00\xff\x00\xff\r\n\r\n",
        b"HTTP/1.1 abc def\r\n\r\n",
        b"HTTP/1.1 99999 x\r\n\r\n",
        b"<Code>PreconditionFailed</Code>",
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"A: 1\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 500 x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_garbage_is_no_answer(shard: Path, pauses: list[float], answer: bytes) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.body()
        peer.send(answer)

    with Server(script) as server:
        assert refused(server.url(), shard).reason == "store_unavailable"
    assert len(server.requests) == 4 and len(pauses) == 3


@pytest.mark.parametrize(
    ("start", "piece", "reason"),
    [
        (b"HTTP/1.1 403 x\r\n\r\n", b"<p>" * 20000, "store_denied"),
        (b"HTTP/1.1 403 x\r\nContent-Length: 99999999999\r\n\r\n", b"<p>" * 20000, "store_denied"),
        (b"HTTP/1.1 403 x\r\n", b"A: b\r\n" * 10000, "store_unavailable"),
        (b"HTTP/1.1 403 x\r\nA: ", b"b" * 60000, "store_unavailable"),
        (b"HTTP/1.1 ", b"4" * 60000, "store_unavailable"),
    ],
    ids=["body", "body with length", "headers", "header", "status"],
)
def test_an_answer_without_end_takes_little_memory(shard: Path, start: bytes, piece: bytes, reason: str) -> None:
    most = 200 << 20
    sent = []

    def script(peer: Peer) -> None:
        peer.head()
        peer.body()
        peer.send(start)
        for _number in range(most // len(piece)):
            peer.send(piece)
            sent.append(len(piece))

    with Server(script) as server:
        tracemalloc.start()
        try:
            assert refused(server.url(), shard).reason == reason
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert server.broken == server.connections, "the client listened to the end"
    assert sent and peak < 8 << 20


def test_sending_takes_little_memory(tmp_path: Path) -> None:
    shard, size = tmp_path / "shard", 48 << 20
    with open(str(shard), "wb") as file:
        file.truncate(size)
    headers = dict(signed(b""), **{"content-length": str(size)})
    left = [size]

    def script(peer: Peer) -> None:
        peer.head()
        while left[0] > 0:
            left[0] -= len(peer.socket.recv(1 << 16)) or left[0]
        peer.answer(200)

    with Server(script) as server:
        tracemalloc.start()
        try:
            put(server.url(), shard, headers=headers)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 4 << 20


# --- TLS --------------------------------------------------------------------------------------------------------------


def test_a_certificate_of_an_unknown_authority_is_not_trusted(
    shard: Path, tls: tuple[ssl.SSLContext, str], pauses: list[float]
) -> None:
    with Server(says(200), context=tls[0]) as server:
        assert refused(server.url("https"), shard).reason == "store_untrusted"
    assert server.requests == [] and server.connections == 1 and pauses == []


def test_the_environment_names_the_authorities(
    shard: Path, tls: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", tls[1])
    with Server(says(200), context=tls[0]) as server:
        put(server.url("https"), shard)
    assert server.requests[0].body == shard.read_bytes()
    assert ("Host", f"127.0.0.1:{server.port}") in server.requests[0].headers


def test_a_certificate_for_another_name_is_not_trusted(
    shard: Path, tls: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", tls[1])
    with Server(says(200), context=tls[0]) as server:
        assert refused(server.url("https", "localhost"), shard).reason == "store_untrusted"
    assert server.requests == []


def test_a_server_without_tls_is_not_spoken_to(shard: Path) -> None:
    with Server(lambda peer: peer.answer(200)) as server:
        refused(server.url("https"), shard)
    assert server.requests == []


def test_an_early_answer_is_heard_through_tls(
    tmp_path: Path, tls: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", tls[1])
    shard = large(tmp_path)

    def script(peer: Peer) -> None:
        peer.head()
        peer.answer(412)

    monkeypatch.setattr(_upload, "ATTEMPTS", 1)
    with Server(script, context=tls[0]) as server:
        assert refused(server.url("https"), shard).reason == "exists"
    assert len(server.requests[0].body) < LARGE, "the fault was not delivered"


def test_a_server_that_goes_away_in_the_handshake_is_unavailable(
    shard: Path, tls: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    """A store behind a load balancer that restarts: nothing was said about its certificate."""
    monkeypatch.setenv("SSL_CERT_FILE", tls[1])
    with Server(lambda peer: t.cast(None, peer.socket.recv(65536) and None)) as server:
        assert refused(server.url("https"), shard).reason == "store_unavailable"
    assert server.connections == 4 and len(pauses) == 3


def test_a_server_that_goes_away_within_tls_is_unavailable(
    tmp_path: Path, tls: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch, pauses: list[float]
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", tls[1])
    shard = large(tmp_path)

    def script(peer: Peer) -> None:
        peer.head()
        peer.body(65536)  # and then closes without a word of TLS

    with Server(script, context=tls[0]) as server:
        assert refused(server.url("https"), shard).reason == "store_unavailable"
    assert len(server.requests) == 4 and len(pauses) == 3


# --- proxies ----------------------------------------------------------------------------------------------------------


def tunnels(peer: Peer) -> None:
    """Do what CONNECT asks for."""
    host, _colon, port = peer.head().split()[1].partition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as store:
        peer.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        back = threading.Thread(target=pump, args=(store, peer.socket))
        back.start()
        pump(peer.socket, store)
        back.join(PATIENCE)


def pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        for data in iter(lambda: source.recv(65536), b""):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
@pytest.mark.parametrize("form", ["http://127.0.0.1:{}", "127.0.0.1:{}", "http://127.0.0.1:{}/"])
def test_a_forward_proxy_gets_the_whole_address(
    shard: Path, monkeypatch: pytest.MonkeyPatch, variable: str, form: str
) -> None:
    with Server(says(200)) as proxy:
        monkeypatch.setenv(variable, form.format(proxy.port))
        put(f"http://store.invalid:9000{TARGET}", shard)
    (request,) = proxy.requests
    assert request.line == f"PUT http://store.invalid:9000{TARGET} HTTP/1.1"
    assert ("Host", "store.invalid:9000") in request.headers and request.body == shard.read_bytes()


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "https_proxy"])
def test_a_proxy_before_https_sees_neither_path_nor_bytes(
    shard: Path, tls: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", tls[1])
    with Server(says(200), context=tls[0]) as server, Server(tunnels) as proxy:
        monkeypatch.setenv(variable, f"http://127.0.0.1:{proxy.port}")
        put(server.url("https"), shard)
    assert server.requests[0].body == shard.read_bytes()
    assert server.requests[0].line == f"PUT {TARGET} HTTP/1.1"
    assert proxy.requests[0].line.startswith(f"CONNECT 127.0.0.1:{server.port} HTTP/1.")
    assert SECRET not in repr(proxy.requests)


def test_a_proxy_cannot_stand_in_for_the_store(
    shard: Path, tls: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Server(says(200), context=tls[0]) as server, Server(tunnels) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        assert refused(server.url("https"), shard).reason == "store_untrusted"
    assert server.requests == [] and proxy.connections == 1


@pytest.mark.parametrize("status", [403, 407, 502])
def test_a_proxy_that_refuses_the_way_makes_the_store_unavailable(
    shard: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float], status: int
) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.answer(status)

    with Server(script) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        assert refused(f"https://store.invalid{TARGET}", shard).reason == "store_unavailable"
    assert proxy.connections == 4 and len(pauses) == 3
    assert SECRET not in repr(proxy.requests)


def test_the_message_says_what_the_proxy_answered(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def script(peer: Peer) -> None:
        peer.head()
        peer.answer(407)

    with Server(script) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        assert "407" in str(refused(f"https://store.invalid{TARGET}", shard))


@pytest.mark.parametrize("exception", ["127.0.0.1", "*", "example.org,127.0.0.1"])
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_no_proxy_leads_past_the_proxy(
    shard: Path, tls: tuple[ssl.SSLContext, str], monkeypatch: pytest.MonkeyPatch, scheme: str, exception: str
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", tls[1])
    with Server(says(200), context=tls[0] if scheme == "https" else None) as server, Server(hangs_up) as proxy:
        monkeypatch.setenv(f"{scheme.upper()}_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.setenv("NO_PROXY", exception)
        put(server.url(scheme), shard)
    assert len(server.requests) == 1 and proxy.connections == 0


def test_a_proxy_that_cannot_be_understood_is_an_error_of_the_library(
    shard: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:port")
    refused(f"https://store.invalid{TARGET}", shard)
