# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the requests to a bucket look like, with boto3 as the judge, and what answers that are none lead to."""

from __future__ import annotations

import http.server
import threading
import typing as t
import urllib.parse

import boto3
import pytest
from botocore.config import Config

from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError
from ansible_collections.integrity.ima.plugins.module_utils._store._s3 import S3Objects
from ansible_collections.integrity.ima.plugins.module_utils._store._s3_client import S3Client

KEY = "fleet/hosts/web~1/a+b c%d/é.json"
LIST = '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{}</ListBucketResult>'


class Server(http.server.ThreadingHTTPServer):
    """Answers with what it is given, in order, the last one for ever; remembers what it was asked."""

    def __init__(self, answers: list[tuple[int, str]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = answers, t.cast("list[tuple[str, dict[str, str]]]", [])
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def objects(self) -> S3Objects:
        """Open it as a store."""
        return S3Objects(f"s3://bucket/fleet?endpoint=http://127.0.0.1:{self.server_address[1]}")


class Handler(http.server.BaseHTTPRequestHandler):
    """See Server."""

    def log_message(self, *_args: t.Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        """Answer."""
        server = t.cast(Server, self.server)
        parts = urllib.parse.urlsplit(self.path)
        server.asked.append((parts.path, dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))))
        status, text = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(name="serve")
def _serve() -> t.Iterator[t.Callable[..., Server]]:
    servers: list[Server] = []

    def serve(*answers: str | tuple[int, str]) -> Server:
        servers.append(Server([each if isinstance(each, tuple) else (200, each) for each in answers]))
        return servers[-1]

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


NO_FORMAT = (404, "<Error><Code>NoSuchKey</Code></Error>")
EMPTY = LIST.format("<IsTruncated>false</IsTruncated>")


def reason_of(function: t.Callable[[], t.Any]) -> StoreError:
    with pytest.raises(StoreError) as caught:
        function()
    return caught.value


@pytest.mark.parametrize(
    ("bucket", "options"),
    [
        ("evidence", {"region": "eu-central-1"}),
        ("evi.dence", {"region": "eu-west-3"}),
        ("evidence", {"region": "cn-north-1"}),
        ("evidence", {"region": "eu-central-1", "endpoint": "https://s3.example.org:8443"}),
        ("evidence", {"region": "eu-central-1", "endpoint": "http://127.0.0.1:8333/"}),
    ],
)
def test_an_address_is_signed_as_boto3_signs_it(
    bucket: str, options: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import datetime

    import botocore.auth

    fixed = datetime.datetime(2026, 1, 2, 3, 4, 5)
    if hasattr(botocore.auth, "get_current_datetime"):
        monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda *_a, **_k: fixed)
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token/of+a session")
    headers = {"if-none-match": "*", "x-amz-checksum-sha256": "A" * 43 + "=", "content-length": "7"}
    ours = S3Client("s3://x", bucket, options).presigned(KEY, headers, 900)
    endpoint = options.get("endpoint")
    style = {"addressing_style": "path" if endpoint else "virtual" if "." not in bucket else "path"}
    config = Config(signature_version="s3v4", s3=t.cast(t.Any, style))
    client = boto3.client("s3", region_name=options["region"], endpoint_url=endpoint, config=config)
    wanted = {"IfNoneMatch": "*", "ChecksumSHA256": "A" * 43 + "=", "ContentLength": 7}
    theirs = client.generate_presigned_url("put_object", Params=dict(Bucket=bucket, Key=KEY, **wanted), ExpiresIn=900)

    def parts(url: str) -> tuple[str, str, str, dict[str, str]]:
        split = urllib.parse.urlsplit(url)
        return split.scheme, split.netloc, split.path, dict(urllib.parse.parse_qsl(split.query))

    assert parts(ours) == parts(theirs)


def test_lists_are_read_to_their_end(serve: t.Callable[..., Server]) -> None:
    def page(names: t.Sequence[str], more: str) -> str:
        found = "".join(f"<Contents><Key>fleet%2Fhosts/{name}</Key><Size>7</Size></Contents>" for name in names)
        return LIST.format(f"<EncodingType>url</EncodingType>{found}{more}")

    first = page(
        ["a+b", "%01"], "<IsTruncated>true</IsTruncated><NextContinuationToken>1/2+%2B=</NextContinuationToken>"
    )
    second = page(["c%2Bd", ".hidden", "folder/"], "<IsTruncated>false</IsTruncated>")
    server = serve(NO_FORMAT, EMPTY, first, second)
    assert server.objects().sizes("hosts/") == {"a b": 7, "\x01": 7, "c+d": 7}
    assert [query.get("continuation-token") for _path, query in server.asked[2:]] == [None, "1/2+%2B="]
    assert server.asked[3] == (
        "/bucket/",
        {"list-type": "2", "encoding-type": "url", "prefix": "fleet/hosts/", "continuation-token": "1/2+%2B="},
    )


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "no list",
        LIST.format("<Contents>")[:-30],
        "<html><body>please log in</body></html>",
        '<!DOCTYPE x [<!ENTITY a "aaaa">]>' + LIST.format("&a;"),
        LIST.format("<IsTruncated>true</IsTruncated>"),
    ],
    ids=["empty", "text", "cut", "portal", "entities", "goes-on-nowhere"],
)
def test_an_answer_that_is_no_list_is_not_an_empty_one(serve: t.Callable[..., Server], answer: str) -> None:
    objects = serve(NO_FORMAT, EMPTY, answer).objects()
    assert reason_of(lambda: objects.sizes("hosts/")).reason == "bad_answer"
    objects = serve(NO_FORMAT, EMPTY, answer.replace("ListBucketResult", "ListVersionsResult")).objects()
    assert reason_of(lambda: objects.rewritten("hosts/")).reason == "bad_answer"


@pytest.mark.parametrize(
    "answer", [EMPTY, (403, ""), (501, "<Error><Code>NotImplemented</Code></Error>"), (405, "")], ids=str
)
def test_a_server_that_tells_nothing_of_versions(serve: t.Callable[..., Server], answer: t.Any) -> None:
    assert serve(NO_FORMAT, EMPTY, answer).objects().rewritten("hosts/") is None


def test_a_list_that_repeats_itself_ends(serve: t.Callable[..., Server]) -> None:
    again = "<IsTruncated>true</IsTruncated><NextContinuationToken>1</NextContinuationToken>"
    objects = serve(NO_FORMAT, EMPTY, LIST.format(again)).objects()
    assert reason_of(lambda: objects.folders("hosts/")).reason == "bad_answer"


@pytest.mark.parametrize(
    ("answer", "reason", "asked"),
    [
        ((403, "<Error><Code>AccessDenied</Code><Message>no</Message></Error>"), "store_denied", 1),
        ((403, ""), "store_denied", 1),
        ((404, "<Error><Code>NoSuchBucket</Code></Error>"), "store_missing", 1),
        ((301, "<Error><Code>PermanentRedirect</Code></Error>"), "store_address", 1),
        ((400, "<Error><Code>AuthorizationHeaderMalformed</Code></Error>"), "store_address", 1),
        ((507, ""), "store_full", 1),
        ((500, "<Error><Code>InternalError</Code></Error>"), "store_unavailable", 3),
        ((503, "<Error><Code>SlowDown</Code></Error>"), "store_unavailable", 3),
        ((400, "<Error><Code>RequestTimeout</Code></Error>"), "store_unavailable", 3),
    ],
)
def test_refusals_have_names(serve: t.Callable[..., Server], answer: t.Any, reason: str, asked: int) -> None:
    server = serve(answer)
    error = reason_of(server.objects)
    assert error.reason == reason and len(server.asked) == asked
    assert f"it answered {answer[0]}" in str(error)


@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"])
def test_the_endpoint_of_the_aws_tools(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "https://s3.example.org")
    assert S3Client("s3://x", "bucket", {}).url("key", {}) == "https://s3.example.org/bucket/key"
    assert S3Client("s3://x", "bucket", {"endpoint": "http://own"}).url("key", {}) == "http://own/bucket/key"


def test_without_credentials_nothing_is_asked(serve: t.Callable[..., Server], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    server = serve(EMPTY)
    error = reason_of(server.objects)
    assert error.reason == "store_denied" and "credentials" in str(error) and not server.asked


@pytest.mark.parametrize(
    "address",
    [
        "s3://",
        "s3:///prefix",
        "s3://key:secret@bucket/prefix",
        "s3://buck et/",
        "s3://..",
        "s3://bucket?endpoint=127.0.0.1:1",
        "s3://bucket?endpoint=file:///etc",
        "s3://bucket?endpoint=http://",
        "s3://bucket?unknown=1",
        "s3://bucket#part",
    ],
)
def test_addresses_that_are_none(address: str) -> None:
    assert reason_of(lambda: S3Objects(address)).reason == "store_address"


def test_a_profile_that_is_not_there() -> None:
    error = reason_of(lambda: S3Objects("s3://bucket?profile=nobody"))
    assert error.reason == "store_denied" and "nobody" in str(error)
