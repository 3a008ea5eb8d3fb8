# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures: the servers, once a session; a place in each of them for every test."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import typing as t
from pathlib import Path

import places
import pytest
from servers import ADMIN, Front, Sshd, Weed

from ansible_collections.integrity.ima.plugins.module_utils import _upload
from ansible_collections.integrity.ima.plugins.module_utils._store import _s3_client

# A skipped test has failed where REQUIRE_ALL=1, as with the unit tests.
from ansible_collections.integrity.ima.tests.unit import conftest as units
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

pytest_make_collect_report = units.pytest_make_collect_report
pytest_runtest_makereport = units.pytest_runtest_makereport

KINDS = ("directory", "sftp", "s3")
_NUMBERS = itertools.count(1)
_PROXIES = ("http_proxy", "https_proxy", "no_proxy", "all_proxy")
_TRUST = ("SSL_CERT_FILE", "SSL_CERT_DIR", "AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "AWS_PROFILE", "AWS_SESSION_TOKEN")
_PLACE = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials from the environment, deliveries in progress below the test's directory, no waiting between tries."""
    for name in (*_PROXIES, *map(str.upper, _PROXIES), *_TRUST, *_PLACE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ADMIN[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", ADMIN[1])
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr(_upload, "sleep", lambda seconds: None)
    monkeypatch.setattr(_s3_client, "sleep", lambda seconds: None)


@pytest.fixture(scope="session")
def s3() -> t.Iterator[Weed]:
    """SeaweedFS."""
    root = tempfile.mkdtemp(prefix="ima-s3-")
    weed = Weed(root)
    try:
        yield weed.start()
    finally:
        weed.kill()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def sftp() -> t.Iterator[Sshd]:
    """OpenSSH's server, SFTP only."""
    sshd = Sshd()
    try:
        yield sshd.start()
    finally:
        sshd.remove()


@pytest.fixture
def bucket(s3: Weed) -> str:
    """A new bucket."""
    name = f"bucket{next(_NUMBERS)}"
    places.s3_client(s3.url).create_bucket(Bucket=name)
    return name


@pytest.fixture
def locked_bucket(s3: Weed) -> str:
    """A new bucket with versions, in which nothing can be deleted for a day."""
    name = f"locked{next(_NUMBERS)}"
    client = places.s3_client(s3.url)
    client.create_bucket(Bucket=name, ObjectLockEnabledForBucket=True)
    rule = {"DefaultRetention": {"Mode": "COMPLIANCE", "Days": 1}}
    client.put_object_lock_configuration(
        Bucket=name, ObjectLockConfiguration={"ObjectLockEnabled": "Enabled", "Rule": rule}
    )
    return name


@pytest.fixture
def front(s3: Weed) -> t.Iterator[Front]:
    """A front before SeaweedFS that does what a test wants."""
    server = Front(s3.port)
    yield server
    server.close()


@pytest.fixture
def fronted(s3: Weed, front: Front, bucket: str) -> places.Place:
    """A store in a new bucket, behind the front."""
    return places.s3_place(s3, bucket, front.url)


MakePlace = t.Callable[[str], places.Place]


@pytest.fixture
def make_place(tmp_path: Path, request: pytest.FixtureRequest) -> MakePlace:
    """Return a function that makes an empty store of a kind."""

    def make(kind: str) -> places.Place:
        name = f"{kind}{next(_NUMBERS)}"
        if kind == "directory":
            (tmp_path / name).mkdir()
            return places.directory_place(str(tmp_path / name))
        if kind == "sftp":
            sshd = request.getfixturevalue("sftp")
            return places.sftp_place(sshd, sshd.new_directory(name))
        weed = request.getfixturevalue("s3")
        places.s3_client(weed.url).create_bucket(Bucket=name)
        return places.s3_place(weed, name)

    return make


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, make_place: MakePlace) -> places.Place:
    """An empty store, one of each kind."""
    return make_place(request.param)


@pytest.fixture
def host(tmp_path: Path) -> support.Host:
    """A host with two shards, each of more than one chunk of 4096 bytes."""
    made = support.Host(tmp_path / "h", shard_records=100)
    made.grow(199)
    return made


@pytest.fixture
def big_host(tmp_path: Path) -> support.Host:
    """A host with one shard of some 100 KiB: more than one block on any wire."""
    made = support.Host(tmp_path / "h", shard_records=4000)
    made.grow(2999)
    return made
