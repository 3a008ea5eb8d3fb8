# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What these tests share: an emulated host in a store, the oracle, and readers that know nothing of the collection."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
import stat
import typing as t

from servers import ADMIN, Sshd, Weed

from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils import _protocol
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._store._base import Store
from ansible_collections.integrity.ima.plugins.module_utils._store._open import open_store
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

Files = t.Dict[str, bytes]
_SHARD = re.compile(r"hosts/([^/]+)/([^/]+)/([0-9]{8})-[^/]*\.ima\.gz\Z")
_CHUNK = 1 << 20


class Place:
    """Where a store lies: its address, and all that is there as another program reads it, name by name."""

    def __init__(self, kind: str, address: str, files: t.Callable[[], Files], write: t.Callable[[str, bytes], None]):
        self.kind, self.address, self.files, self.write = kind, address, files, write

    def open(self) -> Store:
        """Open it as the action plugins do."""
        return open_store(self.address)

    def tree(self) -> dict[str, str]:
        """Names and SHA-256 of everything."""
        return {name: hashlib.sha256(data).hexdigest() for name, data in self.files().items()}

    @property
    def modes(self) -> tuple[bool, ...]:
        """Ways of delivery that it has: direct or not."""
        return (False, True) if self.kind == "s3" else (False,)


def files_below(directory: str) -> Files:
    """Read a directory: what a store keeps for itself (names with a leading dot) is left out."""
    found = {}
    for root, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                path = os.path.join(root, name)
                with open(path, "rb") as file:
                    found[os.path.relpath(path, directory)] = file.read()
    return found


def directory_place(directory: str) -> Place:
    """A store in a directory."""

    def write(name: str, data: bytes) -> None:
        support.write(os.path.join(directory, name), data)

    return Place("directory", directory, lambda: files_below(directory), write)


def sftp_place(sshd: Sshd, path: str) -> Place:
    """A store on an SFTP server, read by a client of its own."""

    def files() -> Files:
        with _sftp_client(sshd) as sftp:
            return dict(_sftp_files(sftp, sshd.remote(path), ""))

    def write(name: str, data: bytes) -> None:
        with _sftp_client(sshd) as sftp, sftp.open(f"{sshd.remote(path)}/{name}", "w") as file:
            file.set_pipelined(True)
            file.write(data)

    return Place("sftp", sshd.store(path), files, write)


@contextlib.contextmanager
def _sftp_client(sshd: Sshd) -> t.Iterator[t.Any]:
    import paramiko

    client = paramiko.SSHClient()
    client.load_host_keys(sshd.known_hosts)
    client.connect(sshd.address, sshd.port, sshd.user, key_filename=f"{sshd.root}/key", look_for_keys=False)
    try:
        yield client.open_sftp()
    finally:
        client.close()


def _sftp_files(sftp: t.Any, root: str, below: str) -> t.Iterator[tuple[str, bytes]]:
    for each in sftp.listdir_attr(f"{root}/{below}"):
        if each.filename.startswith("."):
            continue
        if stat.S_ISDIR(each.st_mode):
            yield from _sftp_files(sftp, root, f"{below}{each.filename}/")
        else:
            into = io.BytesIO()
            sftp.getfo(f"{root}/{below}{each.filename}", into)
            yield below + each.filename, into.getvalue()


def s3_client(url: str, pair: tuple[str, str] = ADMIN, **config: t.Any) -> t.Any:
    """Return a plain boto3 client."""
    import boto3
    from botocore.config import Config

    chosen = Config(signature_version="s3v4", s3={"addressing_style": "path"}, **config)
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=pair[0],
        aws_secret_access_key=pair[1],
        config=chosen,
    )


def s3_files(client: t.Any, bucket: str, prefix: str = "") -> Files:
    """Read a bucket."""
    found = {}
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for each in page.get("Contents", []):
            body = client.get_object(Bucket=bucket, Key=each["Key"])["Body"]
            found[each["Key"][len(prefix) :]] = body.read()
    return found


def s3_place(weed: Weed, bucket: str, endpoint: str = "") -> Place:
    """A store in a bucket, at ``endpoint`` (the server itself), read past whatever is before the server."""
    client = s3_client(weed.url)
    return Place(
        "s3",
        f"s3://{bucket}?endpoint={endpoint or weed.url}&region=us-east-1",
        lambda: s3_files(client, bucket),
        lambda name, data: client.put_object(Bucket=bucket, Key=name, Body=data),
    )


# -- hosts and the oracle ----------------------------------------------------------------------------------------------


def held(host: support.Host) -> bytes:
    """What the emulated kernel still holds."""
    with _protocol.load(host.config).lists().view() as file:
        return b"".join(iter(lambda: file.read(65536), b""))


def stored(files: Files, name: str = "h") -> bytes:
    """The records of a host in a store, in order, by nothing but names and gzip."""
    found: dict[tuple[int, str], bytes] = {}
    for path, data in files.items():
        matched = _SHARD.match(path)
        if matched and matched.group(1) == name:
            found[int(matched.group(3)), path] = data
    return b"".join(gzip.decompress(found[key]) for key in sorted(found))


def nothing_lost(host: support.Host, files: Files) -> int:
    """What left the kernel is in the store, byte for byte; return how many records the store has."""
    recorded, here, there = host.recorded(), held(host), stored(files, host.name)
    assert recorded.endswith(here), "the kernel does not hold the end of what it recorded"
    assert recorded.startswith(there), "the store's records are not what the kernel recorded"
    assert len(recorded) <= len(here) + len(there), "records are neither in the kernel nor in the store"
    return sum(1 for _record in ml.read(io.BytesIO(there).read, verify=False))


def failing(host: support.Host, place: Place, *, direct: bool = False, **options: t.Any) -> ImaError | OSError:
    """Rotate, which must fail; return the error. Nothing is trimmed that the store does not have."""
    try:
        host.rotate(place.open(), direct=direct, chunk_bytes=_CHUNK, **options)
    except (ImaError, OSError) as error:
        return error
    raise AssertionError("the rotation did not fail")


def rotate(host: support.Host, place: Place, *, direct: bool = False, **options: t.Any) -> support.Json:
    """Rotate in big chunks; return the result."""
    return host.rotate(place.open(), direct=direct, **{"chunk_bytes": _CHUNK, **options})


def delivered(host: support.Host, place: Place, *, direct: bool = False) -> support.Json:
    """Rotate, now that all is well: everything is in the store, and gone from the kernel."""
    result = rotate(host, place, direct=direct)
    assert host.live() == 0 and stored(place.files(), host.name) == host.recorded()
    assert rotate(host, place, direct=direct)["changed"] is False
    return result


def json_of(document: t.Any) -> str:
    """A document as text."""
    return json.dumps(document)
