# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Servers that die, fill up, answer nonsense or cannot be reached: resumed, nothing lost, nothing trimmed too early."""

from __future__ import annotations

import functools
import http.client
import itertools
import os
import shutil
import subprocess
import tempfile
import time
import typing as t
from pathlib import Path

import places
import pytest
from places import Place
from servers import Exchange, Fault, Front, Sshd, Weed, self_signed

from ansible_collections.integrity.ima.plugins.module_utils import _host as host_side
from ansible_collections.integrity.ima.plugins.module_utils import _upload
from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError
from ansible_collections.integrity.ima.plugins.module_utils._store import _s3_client, _sftp
from ansible_collections.integrity.ima.plugins.module_utils._verifier import verify
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

both = pytest.mark.parametrize("direct", [False, True], ids=["controller", "direct"])
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts and network namespaces need root")
DEAF = 1.0  # seconds without a byte, in place of 60, where a test is about silence


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon: nothing here is about how long a minute is."""
    monkeypatch.setattr(host_side, "put", functools.partial(_upload.put, timeout=DEAF))
    monkeypatch.setattr(_s3_client, "TIMEOUTS", (DEAF, DEAF))
    monkeypatch.setattr(_sftp, "TIMEOUT", 3 * DEAF)


def shards_only(exchange: Exchange) -> bool:
    return exchange.method == "PUT" and ".ima.gz" in exchange.path


def rotation_fails(host: support.Host, place: Place, *, direct: bool) -> str:
    """Rotate, which fails by a named reason; nothing left the kernel."""
    records = host.live()
    error = places.failing(host, place, direct=direct)
    assert isinstance(error, StoreError), error
    assert host.live() == records and places.held(host) == host.recorded()
    assert "X-Amz" not in str(error)
    return str(error.reason)


def resumed(host: support.Host, place: Place, *, direct: bool) -> None:
    """The next rotation delivers everything. What the controller had of it is not asked for again."""
    before, host.sent = place.files(), 0
    unfinished = place.open().unfinished("h")
    places.nothing_lost(host, before)
    places.delivered(host, place, direct=direct)
    after = place.files()
    assert {name: after[name] for name in before} == before, "what was there is unchanged"
    sizes = sum(len(data) for name, data in after.items() if name.endswith(".gz"))
    assert host.sent == (0 if direct else sizes - (unfinished[1] if unfinished else 0))
    assert verify(place.open(), "h", ()).verdict == "consistent"


# -- the server dies --------------------------------------------------------------------------------------------------


@both
def test_seaweedfs_is_killed_in_the_middle_of_an_upload(
    s3: Weed, front: Front, fronted: Place, big_host: support.Host, direct: bool
) -> None:
    def kill(exchange: Exchange) -> None:
        half = exchange.body(exchange.length // 2)
        connection = exchange.begin()
        connection.send(half)
        s3.kill()
        exchange.body()
        connection.close()
        exchange.hang_up()

    front.matches, front.faults = shards_only, [kill]
    try:
        assert rotation_fails(big_host, fronted, direct=direct) == "store_unavailable"
        assert len(front.struck) == 1 and s3.process is None
    finally:
        s3.start()
    assert places.stored(fronted.files()) == b""
    resumed(big_host, fronted, direct=direct)


@both
def test_seaweedfs_is_killed_after_it_took_an_upload_and_before_it_said_so(
    s3: Weed, front: Front, fronted: Place, big_host: support.Host, direct: bool
) -> None:
    def kill(exchange: Exchange) -> None:
        assert exchange.ask()[0] == 200
        s3.kill()
        exchange.hang_up()

    front.matches, front.faults = shards_only, [kill]
    try:
        assert rotation_fails(big_host, fronted, direct=direct) == "store_unavailable"
        assert len(front.struck) == 1
    finally:
        s3.start()
    assert places.stored(fronted.files()) == big_host.recorded(), "it is there, and nobody was told"
    resumed(big_host, fronted, direct=direct)


def when_written(monkeypatch: pytest.MonkeyPatch, count: int, strike: t.Callable[[], t.Any]) -> list[int]:
    """Strike at the ``count``-th block that goes to the SFTP server."""
    import paramiko

    real, seen = paramiko.SFTPFile.write, []

    def write(self: t.Any, data: bytes) -> None:
        seen.append(len(data))
        if len(seen) == count:
            strike()
        real(self, data)

    monkeypatch.setattr(paramiko.SFTPFile, "write", write)
    return seen


def test_sshd_is_killed_in_mid_transfer(sftp: Sshd, big_host: support.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    place = places.sftp_place(sftp, sftp.new_directory("killed"))
    with monkeypatch.context() as patch:
        seen = when_written(patch, 4, sftp.kill)  # the first is format.json
        try:
            assert rotation_fails(big_host, place, direct=False) == "store_unavailable"
            assert len(seen) == 4 and sftp.process is None
        finally:
            sftp.start()
    left = [name for _root, _dirs, names in os.walk(f"{sftp.root}/root/killed") for name in names]
    assert any(name.startswith(".") and ".ima.gz" in name for name in left), "half a file, under no name of a shard"
    resumed(big_host, place, direct=False)


# -- full disks -------------------------------------------------------------------------------------------------------


def mount(directory: str, size: int, more: str = "") -> None:
    os.makedirs(directory, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}{more}", "ima-stores", directory], check=True)


@as_root
def test_the_disk_of_the_sftp_server_is_full(sftp: Sshd, big_host: support.Host) -> None:
    path = sftp.new_directory("small")
    mount(path, 128 << 10, f",uid={os.stat(path).st_uid},mode=700")
    try:
        place = places.sftp_place(sftp, path)
        assert rotation_fails(big_host, place, direct=False) == "store_full"
        left = [name for _root, _dirs, names in os.walk(path) for name in names]
        assert left == ["format.json"], "what did not fit is removed"
        subprocess.run(["mount", "-o", f"remount,size={4 << 20}", path], check=True)
        resumed(big_host, place, direct=False)
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def test_a_directory_of_the_sftp_server_that_the_account_may_not_write(sftp: Sshd, big_host: support.Host) -> None:
    path = sftp.new_directory("read-only")
    place = places.sftp_place(sftp, path)
    os.chmod(path, 0o500)
    try:
        assert rotation_fails(big_host, place, direct=False) == "store_denied"
    finally:
        os.chmod(path, 0o700)
    resumed(big_host, place, direct=False)


def bucket_and_host(weed: Weed, directory: Path, name: str) -> tuple[support.Host, Place]:
    """A new bucket, and a host with one shard's worth of records for it."""
    host = support.Host(directory / name, shard_records=4000)
    host.grow(2999)
    places.s3_client(weed.url).create_bucket(Bucket=name)
    return host, places.s3_place(weed, name)


@as_root
def test_the_disk_of_seaweedfs_is_full(tmp_path: Path) -> None:
    root = tempfile.mkdtemp(prefix="ima-full-")
    mount(root, 8 << 30)  # it makes no volume on a small disk
    weed = Weed(root)
    try:
        weed.start()
        for number, direct in enumerate((False, True)):
            host, place = bucket_and_host(weed, tmp_path, f"full{number}")
            place.write("format.json", b'{"format":"integrity.ima store","version":1}')
            used = os.statvfs(root)
            room = (used.f_blocks - used.f_bfree) * used.f_frsize + (40 << 10)
            subprocess.run(["mount", "-o", f"remount,size={room}", root], check=True)
            assert rotation_fails(host, place, direct=direct) in ("store_unavailable", "store_full")
            subprocess.run(["mount", "-o", f"remount,size={8 << 30}", root], check=True)
            restart_if_read_only(weed, place)
            resumed(host, place, direct=direct)
    finally:
        weed.kill()
        subprocess.run(["umount", "-l", root], check=True)
        shutil.rmtree(root, ignore_errors=True)


def restart_if_read_only(weed: Weed, place: Place) -> None:
    """SeaweedFS takes a volume that could not grow for read-only until it is started again."""
    try:
        place.write("probe", b"x" * 1000)
        places.s3_client(weed.url).delete_object(Bucket=place.address[5:].partition("?")[0], Key="probe")
    except Exception:
        weed.kill()
        weed.start()


# -- answers of all kinds ---------------------------------------------------------------------------------------------


def status(code: int) -> Fault:
    def fault(exchange: Exchange) -> None:
        exchange.body()
        exchange.answer(code, b"<Error><Code>SlowDown</Code></Error>" if code == 503 else b"oops")

    return fault


def slow(exchange: Exchange) -> None:
    """It takes all, and says nothing for longer than anybody waits."""
    exchange.body()
    time.sleep(2 * DEAF)
    exchange.hang_up()


def closes(exchange: Exchange) -> None:
    """It hangs up in the middle of the body."""
    exchange.body(exchange.length // 2)
    exchange.hang_up()


def closes_at_once(exchange: Exchange) -> None:
    exchange.hang_up()


def garbage(exchange: Exchange) -> None:
    exchange.body()
    exchange.raw(b"\x16\x03\x01 what is HTTP? \xff\n\n\0")


def short(exchange: Exchange) -> None:
    """An error page that ends before it said that it would."""
    exchange.body()
    exchange.raw(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 1000\r\n\r\n<html>")


def loses_the_answer(exchange: Exchange) -> None:
    """It is stored; who sent it never hears of it."""
    assert exchange.ask()[0] == 200
    exchange.hang_up()


PASSING: dict[str, list[Fault]] = {
    "500-503": [status(500), status(503)],
    "slow": [slow],
    "closes": [closes, closes_at_once],
    "garbage": [garbage],
    "short": [short],
}


@both
@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_tried_again_within_the_rotation(
    request: pytest.FixtureRequest, front: Front, fronted: Place, big_host: support.Host, name: str, direct: bool
) -> None:
    if name == "slow":
        request.getfixturevalue("impatient")
    front.matches, front.faults = shards_only, list(PASSING[name])
    places.delivered(big_host, fronted, direct=direct)
    assert len(front.struck) == len(PASSING[name]) and front.faults == []


@both
@pytest.mark.parametrize("fault", [status(500), closes, garbage], ids=["500", "closes", "garbage"])
def test_what_stays_ends_the_rotation_and_the_next_one_goes_on(
    front: Front, fronted: Place, big_host: support.Host, fault: Fault, direct: bool
) -> None:
    front.matches, front.faults = shards_only, [fault] * 20
    assert rotation_fails(big_host, fronted, direct=direct) == "store_unavailable"
    tried, front.faults = len(front.struck), []
    assert 2 < tried < 8, "it is tried again, and not for ever"
    assert places.stored(fronted.files()) == b""
    resumed(big_host, fronted, direct=direct)


@both
def test_an_answer_that_got_lost_is_not_a_second_shard(
    front: Front, fronted: Place, big_host: support.Host, direct: bool
) -> None:
    front.matches, front.faults = shards_only, [loses_the_answer]
    # A host may not look into the store: the controller does, and signs for what is missing still.
    places.delivered(big_host, fronted, direct=direct)
    assert front.struck and len([name for name in fronted.files() if name.endswith(".gz")]) == 1


@both
def test_a_redirect_is_not_followed_with_the_shard(
    s3: Weed, front: Front, fronted: Place, big_host: support.Host, direct: bool
) -> None:
    """Who answers for the store could send the shard anywhere, or have it lost there."""
    elsewhere = Front(s3.port)
    try:
        front.matches = shards_only
        front.faults = [lambda exchange: exchange.swallow(307, headers={"Location": elsewhere.url + exchange.path})] * 9
        assert rotation_fails(big_host, fronted, direct=direct) in ("upload_refused", "store_unavailable")
        assert front.struck and [each for each in elsewhere.seen if each.startswith("PUT")] == []
    finally:
        elsewhere.close()
    front.faults = []
    resumed(big_host, fronted, direct=direct)


def test_a_yes_that_was_not_the_stores_is_found_by_the_controller(
    front: Front, fronted: Place, big_host: support.Host
) -> None:
    """Something between host and store says 200 to everything; the store has nothing."""
    front.matches = lambda exchange: exchange.method == "PUT" and "/hosts/" in exchange.path
    front.faults = [lambda exchange: exchange.swallow(200, b"<html>Log in</html>")] * 20
    error = places.failing(big_host, fronted, direct=True)
    assert isinstance(error, StoreError) and front.struck
    front.faults = []
    places.rotate(big_host, fronted, direct=True)
    assert places.stored(fronted.files()) == big_host.recorded()


def test_a_yes_that_was_not_the_stores_lets_nothing_go(front: Front, fronted: Place, big_host: support.Host) -> None:
    """The store names the digest that it took in its answer; what does not name it is not believed by the host."""
    front.matches = lambda exchange: exchange.method == "PUT" and "/hosts/" in exchange.path
    front.faults = [lambda exchange: exchange.swallow(200, b"<html>Log in</html>")] * 20
    assert rotation_fails(big_host, fronted, direct=True)


def test_a_store_that_does_not_name_the_digest_is_asked_by_the_controller(
    front: Front, fronted: Place, big_host: support.Host
) -> None:
    def silent(exchange: Exchange) -> None:
        status_, data, _headers = exchange.ask()
        exchange.answer(status_, data)

    front.matches = lambda exchange: exchange.method == "PUT" and "/hosts/" in exchange.path
    front.faults = [silent] * 20
    places.delivered(big_host, fronted, direct=True)
    assert len(front.struck) == 2


def test_a_yes_that_names_another_digest_is_refused(front: Front, fronted: Place, big_host: support.Host) -> None:
    def other(exchange: Exchange) -> None:
        exchange.swallow(200, headers={"x-amz-checksum-sha256": "A" * 43 + "="})

    front.matches, front.faults = shards_only, [other]
    assert rotation_fails(big_host, fronted, direct=True) == "checksum_refused" and front.struck
    resumed(big_host, fronted, direct=True)


def test_the_controller_believes_no_yes_that_it_did_not_see_confirmed(
    front: Front, fronted: Place, big_host: support.Host
) -> None:
    front.matches = lambda exchange: exchange.method == "PUT" and "/hosts/" in exchange.path
    front.faults = [lambda exchange: exchange.swallow(200)] * 20
    assert rotation_fails(big_host, fronted, direct=False) == "exists_different" and front.struck
    front.faults = []
    resumed(big_host, fronted, direct=False)


@pytest.mark.parametrize("fault", [short, garbage, closes_at_once, slow], ids=["short", "garbage", "closes", "slow"])
def test_what_is_read_from_the_store_may_fail_too(
    request: pytest.FixtureRequest, front: Front, fronted: Place, big_host: support.Host, fault: Fault
) -> None:
    if fault is slow:
        request.getfixturevalue("impatient")
    places.rotate(big_host, fronted)
    big_host.grow(5)
    front.matches, front.faults = (lambda exchange: exchange.method in ("GET", "HEAD")), [fault] * 40
    live = big_host.live()
    error = places.failing(big_host, fronted)
    assert isinstance(error, StoreError) and error.reason in ("store_unavailable", "unreadable") and front.struck
    assert big_host.live() == live
    front.faults = []
    places.delivered(big_host, fronted)


# -- the network is cut -----------------------------------------------------------------------------------------------


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)


WIRES = itertools.count()


@pytest.fixture
def wire() -> t.Iterator[tuple[str, str, str]]:
    """A network namespace behind a pair of interfaces: its name, its address, and the interface on this side."""
    # The interfaces of the test before may still be there: the kernel removes them behind our back.
    number = (os.getpid() + 97 * next(WIRES)) % 10000
    namespace, here, there = f"imas{number}", f"imaa{number}", f"imab{number}"
    net = f"198.18.{number % 250 + 1}"  # for such tests (RFC 2544); workers may run at once
    ip("netns", "add", namespace)
    try:
        ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", namespace)
        ip("addr", "add", f"{net}.1/30", "dev", here)
        ip("link", "set", here, "up")
        ip("-n", namespace, "addr", "add", f"{net}.2/30", "dev", there)
        ip("-n", namespace, "link", "set", there, "up")
        ip("-n", namespace, "link", "set", "lo", "up")
        yield namespace, f"{net}.2", here
    finally:
        ip("netns", "del", namespace)


@as_root
@pytest.mark.usefixtures("impatient")
def test_the_network_is_cut_in_the_middle_of_an_upload_to_s3(
    tmp_path: Path, wire: tuple[str, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace, address, interface = wire
    root = tempfile.mkdtemp(prefix="ima-cut-")
    weed = Weed(root, address, namespace)
    try:
        weed.start()
        for number, direct in enumerate((False, True)):
            host, place = bucket_and_host(weed, tmp_path, f"cut{number}")
            with monkeypatch.context() as patch:
                cut = when_sent(patch, 60000, lambda: ip("link", "set", interface, "down"))
                assert rotation_fails(host, place, direct=direct) == "store_unavailable" and len(cut) == 1
            ip("link", "set", interface, "up")
            resumed(host, place, direct=direct)
    finally:
        weed.kill()
        shutil.rmtree(root, ignore_errors=True)


def when_sent(monkeypatch: pytest.MonkeyPatch, many: int, strike: t.Callable[[], None]) -> list[int]:
    """Strike after ``many`` bytes have been sent by HTTP on one connection."""
    struck: list[int] = []
    real = http.client.HTTPConnection.send

    def send(self: t.Any, data: t.Any) -> None:
        if hasattr(data, "read"):  # botocore hands over the file
            for block in iter(lambda: data.read(16384), b""):
                send(self, block)
            return
        self.sent_here = getattr(self, "sent_here", 0) + len(data)
        if self.sent_here > many and not struck:
            struck.append(self.sent_here)
            strike()
        real(self, data)

    monkeypatch.setattr(http.client.HTTPConnection, "send", send)
    return struck


@as_root
@pytest.mark.usefixtures("impatient")
def test_the_network_is_cut_in_mid_transfer_to_sftp(
    wire: tuple[str, str, str], big_host: support.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace, address, interface = wire
    sshd = Sshd(address, namespace)
    try:
        sshd.start()
        place = places.sftp_place(sshd, sshd.new_directory("cut"))
        with monkeypatch.context() as patch:
            seen = when_written(patch, 4, lambda: ip("link", "set", interface, "down"))
            assert rotation_fails(big_host, place, direct=False) == "store_unavailable" and len(seen) == 4
        ip("link", "set", interface, "up")
        resumed(big_host, place, direct=False)
    finally:
        sshd.remove()


# -- TLS and proxies --------------------------------------------------------------------------------------------------


@pytest.fixture
def secure(s3: Weed, tmp_path: Path) -> t.Iterator[tuple[Front, str]]:
    """A front that speaks TLS, and its certificate, for which nobody vouches."""
    context, certificate = self_signed(str(tmp_path))
    server = Front(s3.port, context)
    yield server, certificate
    server.close()


def test_a_certificate_that_nobody_vouches_for_is_refused_until_it_is_named(
    s3: Weed, bucket: str, secure: tuple[Front, str], big_host: support.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    front, certificate = secure
    place = places.s3_place(s3, bucket, front.url)
    with pytest.raises(StoreError) as caught:
        place.open()
    assert caught.value.reason == "store_untrusted", "the controller does not trust it"
    monkeypatch.setenv("AWS_CA_BUNDLE", certificate)
    assert rotation_fails(big_host, place, direct=True) == "store_untrusted", "the host does not trust it"
    assert [each for each in front.seen if "/hosts/" in each and each.startswith("PUT")] == []
    monkeypatch.setenv("SSL_CERT_FILE", certificate)
    resumed(big_host, place, direct=True)


def test_an_unknown_host_key_and_a_wrong_one_are_refused(sftp: Sshd, big_host: support.Host, tmp_path: Path) -> None:
    path = sftp.new_directory("untrusted")
    nobody, wrong = tmp_path / "nobody", tmp_path / "wrong"
    nobody.write_text("")
    wrong.write_text(
        f"[{sftp.address}]:{sftp.port} " + " ".join(Path(sftp.root, "other_key.pub").read_text().split()[:2])
    )
    for known in (nobody, wrong):
        place = Place("sftp", sftp.store(path, known_hosts=str(known)), dict, lambda name, data: None)
        assert rotation_fails(big_host, place, direct=False) == "store_untrusted"
    place = Place("sftp", sftp.store(path, key=f"{sftp.root}/other_key"), dict, lambda name, data: None)
    assert rotation_fails(big_host, place, direct=False) == "store_denied"
    resumed(big_host, places.sftp_place(sftp, path), direct=False)


@pytest.mark.parametrize("tls", [False, True], ids=["http", "https"])
def test_the_host_goes_through_the_proxy_of_its_environment_or_past_it(
    s3: Weed,
    bucket: str,
    secure: tuple[Front, str],
    front: Front,
    big_host: support.Host,
    monkeypatch: pytest.MonkeyPatch,
    tls: bool,
) -> None:
    server, certificate = secure
    for variable in ("AWS_CA_BUNDLE", "SSL_CERT_FILE"):
        monkeypatch.setenv(variable, certificate)
    place = places.s3_place(s3, bucket, server.url if tls else "")
    real = _upload.put

    def put(*arguments: t.Any, **options: t.Any) -> bool:
        with monkeypatch.context() as patch:  # the host's environment, not the controller's
            patch.setenv("https_proxy" if tls else "http_proxy", front.url)
            return real(*arguments, **options)

    monkeypatch.setattr(host_side, "put", put)
    places.delivered(big_host, place, direct=True)
    through = front.tunnels if tls else [each for each in front.seen if each.startswith(f"PUT {s3.url}/")]
    assert through, "the proxy was asked"
    if tls:
        assert set(through) == {f"127.0.0.1:{server.port}"}
    before = len(front.tunnels), len(front.seen)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    big_host.grow(5)
    places.delivered(big_host, place, direct=True)
    assert (len(front.tunnels), len(front.seen)) == before, "it was asked for what is past it"
