# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The config, the lock, and the generation counter, as other programs meet them."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import threading
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _protocol
from ansible_collections.integrity.ima.plugins.module_utils._errors import ConfigError, ImaError, LockError
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool

MINIMAL = "[snapshot]\nspool = /var/lib/ima\n"


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "snapshot.conf"


def write(path: Path, text: str | bytes) -> str:
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    path.chmod(0o644)
    return str(path)


def config_error(path: Path, text: str | bytes) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        _protocol.load(write(path, text))
    error = caught.value
    assert str(path) in str(error) and error.details["path"] == str(path)
    return error


# --- the config -------------------------------------------------------------------------------------------------------


def test_defaults(path: Path) -> None:
    config = _protocol.load(write(path, MINIMAL))
    assert config == _protocol.Config(
        path=str(path),
        name=socket.gethostname(),
        spool="/var/lib/ima",
        lock="/var/lib/ima/lock",
        lock_timeout=60,
        trim_after="central",
        shard_records=50000,
        source="kernel",
        directory="/sys/kernel/security/integrity/ima",
        busy_timeout=30,
    )


def test_every_key(path: Path) -> None:
    text = """
# a comment
; another
[snapshot]
name = host.example, the first: 100%
spool = /a/b/
lock = /run/lock/ima
lock_timeout = 0
trim_after = verified
shard_records = 10000000
[list]
source = emulated
directory = /a/emulated
busy_timeout = 3600
"""
    config = _protocol.load(write(path, text))
    assert (config.name, config.spool, config.lock) == ("host.example, the first: 100%", "/a/b", "/run/lock/ima")
    assert (config.lock_timeout, config.trim_after, config.shard_records) == (0, "verified", 10000000)
    assert (config.source, config.directory, config.busy_timeout) == ("emulated", "/a/emulated", 3600)
    assert config.lists().files.emulated


@pytest.mark.parametrize(
    ("text", "section", "key"),
    [
        (MINIMAL + "spol = /x\n", "snapshot", "spol"),
        (MINIMAL + "[list]\nspool = /x\n", "list", "spool"),
        (MINIMAL + "[other]\n", "other", ""),
        (MINIMAL + "[other]\nname = x\n", "other", "name"),
        ("[DEFAULT]\nspool = /x\n" + MINIMAL, "", "spool"),
        ("[DEFAULT]\nelse = /x\n" + MINIMAL, "", "else"),
        (MINIMAL + "sp\u00f6ol\x07 = /x\n", "snapshot", "sp\u00f6ol\\x07"),
    ],
)
def test_unknown(path: Path, text: str, section: str, key: str) -> None:
    error = config_error(path, text)
    assert error.reason == "config_unknown"
    assert error.details["section"] == section or not section
    assert error.details["key"] == key
    assert f"[{error.details['section']}]" in str(error)
    assert repr(key) in str(error) or not key


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("spool", ""),
        ("spool", "relative/path"),
        ("spool", "/a/../b"),
        ("spool", "/a/./b"),
        ("spool", "/a//b"),
        ("spool", "/a/.."),
        ("spool", "/"),
        ("lock", "lock"),
        ("lock", "/a/../lock"),
        ("name", "x" * 254),
        ("name", "a\x07b"),
        ("lock_timeout", ""),
        ("lock_timeout", "-1"),
        ("lock_timeout", "86401"),
        ("lock_timeout", "1.5"),
        ("lock_timeout", "1e3"),
        ("lock_timeout", "0x10"),
        ("lock_timeout", "1_0"),
        ("lock_timeout", "\u0661"),
        ("lock_timeout", "9" * 100),
        ("shard_records", "0"),
        ("shard_records", "10000001"),
        ("shard_records", "many"),
        ("trim_after", ""),
        ("trim_after", "Central"),
        ("trim_after", "central ; the default"),
        ("trim_after", "always"),
    ],
)
def test_bad_values(path: Path, key: str, value: str) -> None:
    values = dict({"spool": "/x"}, **{key: value})
    error = config_error(path, "[snapshot]\n" + "".join(f"{name} = {text}\n" for name, text in values.items()))
    assert error.reason == "config_value"
    assert (error.details["section"], error.details["key"]) == ("snapshot", key)
    assert "[snapshot]" in str(error) and repr(key) in str(error)
    assert "\x07" not in str(error) and len(str(error)) < 600


@pytest.mark.parametrize(
    ("key", "value"),
    [("source", "file"), ("source", ""), ("directory", "sys"), ("busy_timeout", "3601"), ("busy_timeout", "-")],
)
def test_bad_values_of_the_list(path: Path, key: str, value: str) -> None:
    error = config_error(path, f"{MINIMAL}[list]\n{key} = {value}\n")
    assert (error.reason, error.details["section"], error.details["key"]) == ("config_value", "list", key)


@pytest.mark.parametrize("text", ["", "[retention]\n", "[retention]\nkeep_days =\nkeep_shards =\nkeep_bytes =\n"])
def test_without_a_number_there_is_no_limit(path: Path, text: str) -> None:
    config = _protocol.load(write(path, MINIMAL + text))
    assert (config.keep_days, config.keep_shards, config.keep_bytes) == (None, None, None)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("keep_days", 0),
        ("keep_days", 36500),
        ("keep_shards", 1),
        ("keep_shards", 100000000),
        ("keep_bytes", 0),
        ("keep_bytes", 1125899906842624),
    ],
)
def test_limits_of_the_retention(path: Path, key: str, value: int) -> None:
    config = _protocol.load(write(path, f"{MINIMAL}[retention]\n{key} = {value}\n"))
    limits = {name: getattr(config, name) for name in ("keep_days", "keep_shards", "keep_bytes")}
    assert limits == dict(dict.fromkeys(limits), **{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("keep_days", "-1"),
        ("keep_days", "36501"),
        ("keep_days", "7d"),
        ("keep_days", "0.5"),
        ("keep_days", "none"),
        ("keep_shards", "0"),
        ("keep_shards", "100000001"),
        ("keep_shards", "+1"),
        ("keep_bytes", "-1"),
        ("keep_bytes", "1125899906842625"),
        ("keep_bytes", "10G"),
        ("keep_bytes", "\u0661"),
    ],
)
def test_bad_limits_of_the_retention(path: Path, key: str, value: str) -> None:
    """A limit that was misread could remove too much: it is an error."""
    error = config_error(path, f"{MINIMAL}[retention]\n{key} = {value}\n")
    assert error.reason == "config_value"
    assert (error.details["section"], error.details["key"]) == ("retention", key)


@pytest.mark.parametrize(
    ("text", "section"),
    [("[retention]\nkeep = 1\n", "retention"), ("[list]\nkeep_days = 1\n", "list"), ("keep_days = 1\n", "snapshot")],
)
def test_limits_stand_in_their_section(path: Path, text: str, section: str) -> None:
    error = config_error(path, MINIMAL + text)
    assert (error.reason, error.details["section"]) == ("config_unknown", section)


@pytest.mark.parametrize("text", ["", "[snapshot]\n", "[list]\n", "[snapshot]\nname = x\n"])
def test_no_spool(path: Path, text: str) -> None:
    error = config_error(path, text)
    assert (error.reason, error.details["section"], error.details["key"]) == ("config_value", "snapshot", "spool")


@pytest.mark.parametrize(
    "text",
    [
        b"[snapshot]\nspool = /x\xff\n",
        "[snapshot]\nspool = /x\n".encode("utf-16"),
        b"spool = /x\n",
        b"[snapshot]\nspool\n",
        b"[snapshot]\nspool: /x\n",
        b"[snapshot]\nspool = /x\nspool = /y\n",
        b"[snapshot]\nspool = /x\n[snapshot]\nname = y\n",
        b"[snapshot\nspool = /x\n",
    ],
    ids=["not UTF-8", "UTF-16", "no section", "no value", "colon", "key twice", "section twice", "open bracket"],
)
def test_syntax(path: Path, text: bytes) -> None:
    assert config_error(path, text).reason == "config_syntax"


def test_missing(path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        _protocol.load(str(path))
    assert caught.value.reason == "config_missing"
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o620])
def test_writable_by_others(path: Path, mode: int) -> None:
    write(path, MINIMAL)
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        _protocol.load(str(path))
    assert caught.value.reason == "config_unsafe"
    assert f"{mode:04o}" in str(caught.value)


def test_of_another_owner(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(path, MINIMAL)
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        values = list(real(descriptor))
        values[4] = 65533
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(ConfigError) as caught:
        _protocol.load(str(path))
    assert caught.value.reason == "config_unsafe"
    assert "65533" in str(caught.value)


def test_not_a_file(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o755)
    with pytest.raises(ConfigError) as caught:
        _protocol.load(str(tmp_path / "folder"))
    assert caught.value.reason == "config_unsafe"


def test_a_config_that_is_too_long_is_not_cut(path: Path) -> None:
    """What stands behind the limit counts, or is refused: it could say "never"."""
    text = MINIMAL + "# padding\n" * 7000 + "trim_after = never\n"
    try:
        assert _protocol.load(write(path, text)).trim_after == "never"
    except ConfigError as error:
        assert error.reason in ("config_syntax", "config_unsafe", "config_value")


# --- local file systems -----------------------------------------------------------------------------------------------


def mounts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *lines: tuple[str, str]) -> None:
    text = "".join(
        f"{number} 1 0:{number} / {point} rw,relatime shared:1 - {kind} source rw\n"
        for number, (point, kind) in enumerate([("/", "ext4"), *lines], 20)
    )
    (tmp_path / "mountinfo").write_text(text)
    monkeypatch.setattr(_protocol, "MOUNTINFO", str(tmp_path / "mountinfo"))


@pytest.mark.parametrize("kind", ["nfs", "nfs4", "cifs", "fuse.sshfs", "9p", "ceph", "lustre"])
def test_remote_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    mounts(monkeypatch, tmp_path, (str(tmp_path), kind))
    config = config_of(tmp_path, spool=str(spool))
    for work in (lambda: Spool(str(spool)).check(), _protocol.Lock(config).__enter__):
        with pytest.raises(ConfigError) as caught:
            work()
        assert caught.value.reason == "remote_file_system"
        assert caught.value.details["file_system"] == kind
    assert os.listdir(spool) == []


def test_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spaced = tmp_path / "a b"
    spaced.mkdir()
    mounts(
        monkeypatch,
        tmp_path,
        (str(tmp_path / "x"), "nfs4"),
        (str(tmp_path / "x" / "local"), "xfs"),
        (str(tmp_path / "hidden"), "nfs4"),
        (str(tmp_path / "hidden"), "btrfs"),
        (str(spaced).replace(" ", "\\040"), "cifs"),
    )
    for path, kind in {
        "x": "nfs4",
        "x/deep/er": "nfs4",
        "x/local/deep": "xfs",
        "xy": "ext4",
        "hidden/y": "btrfs",
        "a b/c": "cifs",
    }.items():
        assert _protocol.file_system(str(tmp_path / path)) == kind
    (tmp_path / "link").symlink_to(tmp_path / "x")
    assert _protocol.file_system(str(tmp_path / "link" / "deep")) == "nfs4"


def test_this_machine() -> None:
    assert _protocol.file_system("/proc/self") == "proc"
    _protocol.require_local("/")


# --- the lock ---------------------------------------------------------------------------------------------------------


def config_of(tmp_path: Path, **keys: t.Any) -> _protocol.Config:
    spool = tmp_path / "spool"
    spool.mkdir(exist_ok=True)
    config = _protocol.load(write(tmp_path / "c", f"[snapshot]\nspool = {spool}\nlock_timeout = 0\n"))
    return config._replace(**keys)


class Holder:
    """``flock`` of util-linux holding the lock, until it is let go."""

    def __init__(self, path: str, *options: str) -> None:
        command = ["flock", *options, "-o", path, "sh", "-c", "echo ready; exec cat"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.process.stdout is not None and self.process.stdout.readline() == b"ready\n"

    def __enter__(self) -> Holder:
        return self

    def __exit__(self, *unused: object) -> None:
        self.process.communicate()


def flock_says(path: str, *options: str) -> int:
    """The exit status of ``flock -n``: 1 when the lock is held."""
    return subprocess.run(["flock", "-n", *options, path, "true"], check=False, timeout=60).returncode


def test_exclusive_and_shared(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with _protocol.Lock(config):
        for shared in (False, True):
            with pytest.raises(LockError) as caught, _protocol.Lock(config, shared=shared):
                pass
            assert caught.value.reason == "locked"
            assert os.getpid() in [each["pid"] for each in caught.value.details["holders"]]
        assert flock_says(config.lock) == flock_says(config.lock, "-s") == 1
    with _protocol.Lock(config, shared=True), _protocol.Lock(config, shared=True):
        assert flock_says(config.lock, "-s") == 0
        assert flock_says(config.lock) == 1
        with pytest.raises(LockError), _protocol.Lock(config):
            pass
    assert flock_says(config.lock) == 0
    assert os.stat(config.lock).st_size == 0


def test_held_by_another_program(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with _protocol.Lock(config):
        pass
    with Holder(config.lock, "-x") as holder:
        for shared in (False, True):
            with pytest.raises(LockError) as caught, _protocol.Lock(config, shared=shared):
                pass
            error = caught.value
            assert error.reason == "locked"
            assert error.details["holders"] == [{"pid": holder.process.pid, "command": "flock"}]
            assert f"flock (pid {holder.process.pid})" in str(error) and config.lock in str(error)
    with _protocol.Lock(config):
        pass
    with Holder(config.lock, "-s"):
        with _protocol.Lock(config, shared=True):
            pass
        with pytest.raises(LockError), _protocol.Lock(config):
            pass


def test_the_wait_is_bounded(tmp_path: Path) -> None:
    config = config_of(tmp_path, lock_timeout=1)
    with _protocol.Lock(config):
        begun = time.monotonic()
        with pytest.raises(LockError, match="waited 1 s"), _protocol.Lock(config):
            pass
        assert 0.9 < time.monotonic() - begun < 30


def test_the_wait_ends_when_the_holder_dies(tmp_path: Path) -> None:
    config = config_of(tmp_path, lock_timeout=60)
    with _protocol.Lock(config):
        pass
    holder = Holder(config.lock, "-x")
    timer = threading.Timer(0.2, holder.process.kill)
    timer.start()
    with _protocol.Lock(config):
        assert flock_says(config.lock) == 1
    timer.join()
    holder.process.communicate()


def test_the_lock_is_a_symlink(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    (tmp_path / "target").write_bytes(b"")
    os.symlink(tmp_path / "target", config.lock)
    with pytest.raises(LockError) as caught, _protocol.Lock(config):
        pass
    assert caught.value.reason == "lock_symlink"
    os.unlink(config.lock)
    os.symlink(tmp_path / "nowhere", config.lock)
    with pytest.raises(LockError) as caught, _protocol.Lock(config):
        pass
    assert caught.value.reason == "lock_symlink"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("how", ["replaced", "removed"])
def test_the_lock_changes_while_it_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    config = config_of(tmp_path)
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if how == "replaced":
            other = tmp_path / "other"
            other.write_bytes(b"")
            os.replace(other, config.lock)
        else:
            os.unlink(config.lock)
        real(descriptor, operation)

    descriptors = len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with pytest.raises(LockError) as caught, _protocol.Lock(config):
            pass
    assert caught.value.reason == "lock_replaced"
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with _protocol.Lock(config):
        pass


@pytest.mark.parametrize("what", ["fifo", "directory"])
def test_the_lock_is_no_file(tmp_path: Path, what: str) -> None:
    config = config_of(tmp_path)
    if what == "fifo":
        os.mkfifo(config.lock)
    else:
        os.mkdir(config.lock)
    with pytest.raises(LockError) as caught, _protocol.Lock(config):
        pass
    assert caught.value.reason in ("lock_replaced", "lock_missing")


def test_no_directory_for_the_lock(tmp_path: Path) -> None:
    config = config_of(tmp_path, lock=str(tmp_path / "no" / "lock"))
    with pytest.raises(LockError) as caught, _protocol.Lock(config):
        pass
    assert caught.value.reason == "lock_missing"


def test_without_create(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with _protocol.Lock(config, create=False):
        assert not os.path.exists(config.lock)
    with _protocol.Lock(config), pytest.raises(LockError), _protocol.Lock(config, create=False):
        pass


def test_flock_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(LockError) as caught, _protocol.Lock(config_of(tmp_path)):
        pass
    assert caught.value.reason == "lock_refused"


def test_the_lock_is_not_inherited(tmp_path: Path) -> None:
    """A program that is started under the lock does not hold it after us."""
    config = config_of(tmp_path)
    lock = _protocol.Lock(config)
    with lock:
        assert not os.get_inheritable(lock._descriptor)
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE, close_fds=False)
    try:
        assert flock_says(config.lock) == 0
    finally:
        child.communicate()


def test_freed_by_an_error(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ImaError), _protocol.Lock(config):
        raise ImaError("whatever")
    assert flock_says(config.lock) == 0


# --- the generation ---------------------------------------------------------------------------------------------------


def test_generation(tmp_path: Path) -> None:
    spool = str(tmp_path)
    assert _protocol.generation(spool) == 0
    _protocol.raise_generation(spool, 3)
    assert (tmp_path / "generation").read_bytes() == b"3\n"
    assert (tmp_path / "generation").stat().st_mode & 0o777 == 0o644
    before = (tmp_path / "generation").stat().st_ino
    _protocol.raise_generation(spool, 3)
    assert (tmp_path / "generation").stat().st_ino == before
    _protocol.raise_generation(spool, 12)
    assert _protocol.generation(spool) == 12


@pytest.mark.parametrize("content", [b"", b"3", b"-3\n", b"3\n\n", b" 3\n", b"x\n", b"9" * 30 + b"\n", b"\xff\n"])
def test_a_generation_that_cannot_be_read_is_written_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "generation").write_bytes(content)
    assert _protocol.generation(str(tmp_path)) == 0
    _protocol.raise_generation(str(tmp_path), 5)
    assert _protocol.generation(str(tmp_path)) == 5
