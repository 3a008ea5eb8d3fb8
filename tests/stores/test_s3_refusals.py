# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a real S3 server refuses, by its reason; the shard stays on the host, and its records in the kernel."""

from __future__ import annotations

import os
import time
import typing as t
import urllib.parse
from pathlib import Path

import places
import pytest
from places import Place
from servers import WRITER, Exchange, Front, Weed

from ansible_collections.integrity.ima.plugins.module_utils import _host as host_side
from ansible_collections.integrity.ima.plugins.module_utils import _upload
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, StoreError
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._store import _s3
from ansible_collections.integrity.ima.plugins.module_utils._verifier import verify
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

Round = t.Callable[[support.Json], None]


@pytest.fixture(name="place")
def _place(s3: Weed, bucket: str) -> Place:
    return places.s3_place(s3, bucket)


def shards_on(host: support.Host) -> list[str]:
    return sorted(str(path) for path in Path(host.spool, "shards").rglob("*.ima.gz"))


def refused(host: support.Host, place: Place, *, tamper: Round | None = None, direct: bool = True) -> ImaError:
    """Rotate with ``tamper`` done to each round that holds addresses; it must fail, and everything must be kept."""
    struck: list[int] = []

    def call(one_round: support.Json) -> support.Json:
        if one_round.get("uploads") and tamper is not None:
            struck.append(len(one_round["uploads"]))
            tamper(one_round)
        return host.answer(one_round, chunk_bytes=1 << 20)

    with pytest.raises(ImaError) as caught:
        host.rotation(place.open(), call=call, direct=direct, chunk_bytes=1 << 20).run()
    assert bool(struck) is (tamper is not None), "the fault was not delivered"
    assert host.live() == 200 and places.held(host) == host.recorded()
    assert len(shards_on(host)) >= 1 and "X-Amz" not in str(caught.value)
    return caught.value


def kept_whole(host: support.Host, place: Place, *, direct: bool = True) -> None:
    """What was refused is delivered by the next rotation."""
    result = places.delivered(host, place, direct=direct)
    assert result["claim"]["index"] == 200 and verify(place.open(), "h", ()).verdict == "consistent"


def first_order(one_round: support.Json, what: str = "shard") -> tuple[support.Json, str]:
    """The part of a round that orders the first upload, and its address."""
    order = one_round["uploads"][0][what]
    return order, one_round["urls"][order["url"]]


# -- addresses that were signed ---------------------------------------------------------------------------------------


def test_a_second_put_is_refused_and_changes_nothing(place: Place, host: support.Host) -> None:
    used: list[tuple[str, dict[str, str], str]] = []

    def note(one_round: support.Json) -> None:
        for upload in one_round["uploads"]:
            path = next(path for path in shards_on(host) if f"/{upload['sequence']:08d}-" in path)
            used.append((one_round["urls"][upload["shard"]["url"]], upload["shard"]["headers"], path))

    def call(one_round: support.Json) -> support.Json:
        if one_round.get("uploads"):
            note(one_round)
        return host.answer(one_round)

    host.rotation(place.open(), call=call, direct=True).run()
    files = place.files()
    assert used and host.live() == 0
    for url, headers, path in used:
        with pytest.raises(StoreError) as caught:
            _upload.put(url, headers, path)
        assert caught.value.reason == "exists" and "X-Amz" not in str(caught.value)
    assert place.files() == files


def sending(monkeypatch: pytest.MonkeyPatch, change: t.Callable[[bytes], bytes], directory: Path) -> list[str]:
    """Let the host send other bytes than those that it sealed; return the list of what it sent so."""
    sent = []

    def put(url: str, headers: dict[str, str], path: str) -> bool:
        if path.endswith(".gz"):
            sent.append(path)
            (directory / "other").write_bytes(change(Path(path).read_bytes()))
            path = str(directory / "other")
        return _upload.put(url, headers, path)

    monkeypatch.setattr(host_side, "put", put)
    return sent


def test_an_altered_body_is_refused_by_its_checksum(
    tmp_path: Path, place: Place, host: support.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        sent = sending(patch, lambda data: data[:-1] + bytes([data[-1] ^ 1]), tmp_path)
        assert refused(host, place).reason == "checksum_refused" and len(sent) == 1
    assert places.stored(place.files()) == b""
    kept_whole(host, place)


def test_an_expired_address_is_refused(place: Place, host: support.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(_s3, "EXPIRES", 1)
        assert refused(host, place, tamper=lambda _one_round: time.sleep(2.2)).reason == "url_expired"
    assert places.stored(place.files()) == b""
    kept_whole(host, place)


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x"], ids=["shorter", "longer"])
def test_a_file_of_another_length_is_not_even_sent(
    tmp_path: Path,
    place: Place,
    host: support.Host,
    change: t.Callable[[bytes], bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        sent = sending(patch, change, tmp_path)
        assert refused(host, place).reason == "store_diverged" and len(sent) == 1
    assert places.stored(place.files()) == b""
    kept_whole(host, place)


def set_header(name: str, value: str | None) -> Round:
    def change(one_round: support.Json) -> None:
        headers = first_order(one_round)[0]["headers"]
        if value is None:
            del headers[name]
        else:
            headers[name] = value

    return change


def other_key(one_round: support.Json) -> None:
    order, url = first_order(one_round)
    one_round["urls"][order["url"]] = url.replace("/hosts/h/", "/hosts/other/")


def longer_life(one_round: support.Json) -> None:
    order, url = first_order(one_round)
    assert "X-Amz-Expires=900" in url
    one_round["urls"][order["url"]] = url.replace("X-Amz-Expires=900", "X-Amz-Expires=90000")


SIGNED: list[tuple[str, Round]] = [
    ("other-key", other_key),
    ("longer-life", longer_life),
    ("no-condition", set_header("if-none-match", None)),
    ("other-checksum", set_header("x-amz-checksum-sha256", "A" * 43 + "=")),
    ("more-headers", set_header("x-amz-acl", "public-read")),
]


@pytest.mark.parametrize("tamper", [change for _name, change in SIGNED], ids=[name for name, _change in SIGNED])
def test_an_address_is_good_for_what_was_signed_and_nothing_else(
    place: Place, host: support.Host, tamper: Round
) -> None:
    assert refused(host, place, tamper=tamper).reason == "store_denied"
    assert set(place.files()) == {"format.json"}
    kept_whole(host, place)


def test_the_signed_length_binds_on_the_wire(place: Place, host: support.Host) -> None:
    """A program of the host's own, that lies on the length in header and body, gets nothing stored."""
    store = place.open()
    url, headers = t.cast(t.Any, store)._objects.sign("hosts/h/x", 10, "00" * 32)
    parts = urllib.parse.urlsplit(url)
    for length in (9, 11):
        import http.client

        connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=10)
        said = dict(headers, **{"content-length": str(length)})
        connection.request("PUT", f"{parts.path}?{parts.query}", b"x" * length, said)
        assert connection.getresponse().status == 403
        connection.close()
    assert place.files() == {}


# -- for the bucket's lifecycle --------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_shards_have_a_tag_and_nothing_else_has(s3: Weed, place: Place, host: support.Host, direct: bool) -> None:
    places.delivered(host, place, direct=direct)
    client, bucket = places.s3_client(s3.url), place.address[5:].partition("?")[0].partition("/")[0]
    tags = {
        each["Key"]: client.get_object_tagging(Bucket=bucket, Key=each["Key"])["TagSet"]
        for each in client.list_objects_v2(Bucket=bucket)["Contents"]
    }
    shards = {name for name in tags if name.endswith(".ima.gz")}
    assert len(shards) > 0 and len(tags) > 2 * len(shards)
    assert tags == {name: [{"Key": "ima", "Value": "shard"}] if name in shards else [] for name in tags}


# -- names that are taken ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_a_name_that_holds_other_bytes_stops_the_rotation(place: Place, host: support.Host, direct: bool) -> None:
    host.answer({"have": None, "part": None, "export": True})
    entry = Spool(host.spool).entries[0]
    place.write(f"hosts/h/{entry.shard}", b"somebody was here first")
    files = place.files()
    place.write("format.json", b'{"format":"integrity.ima store","version":1}')
    error = places.failing(host, place, direct=direct)
    assert getattr(error, "reason", "") == "exists_different"
    assert host.live() == 200 and {name: place.files()[name] for name in files} == files


def test_a_name_that_somebody_takes_after_it_was_signed_for(place: Place, host: support.Host) -> None:
    """The host's word is ``exists``; the controller looks, and says what is there."""

    def taken(asked: dict[str, t.Any]) -> t.Any:
        if asked.get("uploads"):
            place.write(f"hosts/h/{Spool(host.spool).entries[0].shard}", b"somebody was faster")
        return host.answer(asked)

    rotation = host.rotation(place.open(), taken, direct=True)
    with pytest.raises(StoreError) as caught:
        rotation.run()
    assert caught.value.reason == "exists_different" and rotation._rounds == 2
    assert host.live() == 200
    assert [data for name, data in place.files().items() if name.startswith("hosts/")] == [b"somebody was faster"]


# -- credentials, policies, buckets -----------------------------------------------------------------------------------


def test_wrong_and_missing_credentials(place: Place, host: support.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in (("AWS_SECRET_ACCESS_KEY", "wrong"), ("AWS_ACCESS_KEY_ID", "NOBODY")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            assert reason_of(place.open) == "store_denied"
    with monkeypatch.context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        assert reason_of(place.open) == "store_denied"
    kept_whole(host, place)


def reason_of(function: t.Callable[[], t.Any]) -> str:
    with pytest.raises(StoreError) as caught:
        function()
    return str(caught.value.reason)


def test_credentials_that_are_taken_back_between_two_rounds(
    place: Place, host: support.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = place.open()
    t.cast(t.Any, store)._objects._client._credentials = type(
        "Credentials",
        (),
        {"access_key": "GONE", "secret_key": "x", "token": None, "get_frozen_credentials": lambda s: s},
    )()
    with pytest.raises(StoreError) as caught:
        host.rotation(store).run()
    assert caught.value.reason == "store_denied" and host.live() == 200
    kept_whole(host, place)


def test_a_missing_bucket(s3: Weed, host: support.Host) -> None:
    assert reason_of(places.s3_place(s3, "no-such-bucket").open) == "store_missing" and host.live() == 200
    assert "no-such-bucket" not in [each["Name"] for each in places.s3_client(s3.url).list_buckets()["Buckets"]]


@pytest.fixture(name="limited", scope="module")
def _limited(s3: Weed) -> Place:
    """The bucket in which the account "writer" may create below hosts/, and read."""
    places.s3_client(s3.url).create_bucket(Bucket="limited")
    return places.s3_place(s3, "limited")


def test_the_least_policy_suffices_and_what_it_forbids_is_refused(
    limited: Place, s3: Weed, host: support.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", WRITER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", WRITER[1])
    result = places.rotate(host, limited)
    assert (result["delivered"], host.live()) == (2, 0)
    host.grow(50)
    assert places.rotate(host, limited, direct=True)["delivered"] == 1
    files = limited.files()
    assert reason_of(lambda: support.write_fleet(t.cast(t.Any, limited.open()), 1, {"h": result})) == "store_denied"
    client = places.s3_client(s3.url, WRITER)
    for name in files:
        with pytest.raises(Exception, match="AccessDenied"):
            client.delete_object(Bucket="limited", Key=name)
    assert limited.files() == files


@pytest.mark.parametrize("direct", [False, True])
def test_an_account_that_may_only_read(
    s3: Weed, bucket: str, host: support.Host, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bucket's policy denies every PUT below hosts/, to whom it may concern."""
    place = places.s3_place(s3, bucket)
    client = places.s3_client(s3.url)
    deny = {"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", "Resource": f"arn:aws:s3:::{bucket}/hosts/*"}
    client.put_bucket_policy(Bucket=bucket, Policy=places.json_of({"Version": "2012-10-17", "Statement": [deny]}))
    error = places.failing(host, place, direct=direct)
    assert getattr(error, "reason", "") == "store_denied" and host.live() == 200
    assert set(place.files()) == {"format.json"}
    client.delete_bucket_policy(Bucket=bucket)
    kept_whole(host, place, direct=direct)


# -- versions and locks -----------------------------------------------------------------------------------------------


def test_a_locked_object_cannot_be_deleted_and_a_marker_hides_it_only(
    s3: Weed, locked_bucket: str, host: support.Host
) -> None:
    place = places.s3_place(s3, locked_bucket)
    for direct in (False, True):
        places.rotate(host, place, direct=direct)
        host.grow(50)
    files, client = place.files(), places.s3_client(s3.url)
    shards = [name for name in files if name.endswith(".gz")]
    versions = client.list_object_versions(Bucket=locked_bucket)["Versions"]
    assert sorted(each["Key"] for each in versions) == sorted(files)
    for each in versions:
        if each["Key"] in shards:
            with pytest.raises(Exception, match="AccessDenied"):
                client.delete_object(Bucket=locked_bucket, Key=each["Key"], VersionId=each["VersionId"])
    assert place.files() == files
    # S3 lets everybody hide a name, under a lock too: the bytes stay, and the host sends them again
    client.delete_object(Bucket=locked_bucket, Key=shards[-1])
    assert set(files) - set(place.files()) == {shards[-1]}
    assert verify(place.open(), "h", ()).reason == "missing_shard"
    assert places.rotate(host, place)["changed"] is True
    assert {name: place.files()[name] for name in files} == files
    versions = client.list_object_versions(Bucket=locked_bucket, Prefix=shards[-1])["Versions"]
    assert len(versions) == 2 and verify(place.open(), "h", ()).verdict == "consistent"


# -- servers that promise what they do not do -------------------------------------------------------------------------


class Overwriting:
    """Enough of S3 for a rotation, in memory: If-None-Match is accepted, and ignored."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.writes: list[str] = []

    def __call__(self, exchange: Exchange) -> None:
        path, _question, query = exchange.path.partition("?")
        key = urllib.parse.unquote(path).split("/", 2)[2] if path.count("/") > 1 else ""
        if exchange.method == "PUT":
            self.objects[key] = exchange.body()
            self.writes.append(key)
            exchange.answer(200)
        elif not key:
            start = urllib.parse.parse_qs(query).get("prefix", [""])[0]
            names = [name for name in self.objects if name.startswith(start)]
            entries = "".join(
                f"<Contents><Key>{name}</Key><Size>{len(self.objects[name])}</Size></Contents>" for name in names
            )
            exchange.answer(
                200, f"<ListBucketResult><KeyCount>{len(names)}</KeyCount>{entries}</ListBucketResult>".encode()
            )
        elif key in self.objects:
            exchange.answer(200, self.objects[key])
        else:
            exchange.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")


@pytest.mark.parametrize("direct", [False, True])
def test_a_server_that_ignores_the_condition_is_found_before_the_first_shard(
    s3: Weed, front: Front, host: support.Host, direct: bool
) -> None:
    server = front.instead = Overwriting()
    address = f"s3://fake?endpoint={front.url}&region=us-east-1"
    place = Place("s3", address, lambda: dict(server.objects), lambda name, data: None)
    error = places.failing(host, place, direct=direct)
    assert getattr(error, "reason", "") == "not_write_once"
    assert len(server.writes) > 1 and set(server.objects) == {"format.json"} and host.live() == 200
    assert os.listdir(host.spool) == [] or not shards_on(host)


@pytest.mark.parametrize("direct", [False, True])
def test_bytes_that_change_on_their_way_are_refused(
    s3: Weed, front: Front, fronted: Place, host: support.Host, direct: bool
) -> None:
    def flip(exchange: Exchange) -> None:
        body = exchange.body()
        connection = exchange.begin()
        connection.send(body[:-1] + bytes([body[-1] ^ 1]))
        answer = connection.getresponse()
        exchange.answer(answer.status, answer.read())
        connection.close()

    front.matches = lambda exchange: exchange.method == "PUT" and ".ima.gz" in exchange.path
    front.faults = [flip] * 3
    error = places.failing(host, fronted, direct=direct)
    assert getattr(error, "reason", "") == "checksum_refused" and front.struck
    assert host.live() == 200 and places.stored(fronted.files()) == b""
    front.faults = []
    kept_whole(host, fronted, direct=direct)
