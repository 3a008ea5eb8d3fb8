# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The command as one file: the same bytes each time, and the same shards under every Python that hosts have."""

from __future__ import annotations

import ast
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.plugin_utils import _zipapp
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import Host, oracle

CONFIG = "/etc/ima/snapshot.conf"
MANAGED = {"3.8": "delete_n", "3.9": "staged", "3.11": "staged", "3.13": "delete_n"}


def python(version: str) -> str:
    """A Python of that version, on the PATH or among those of pyenv."""
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    names = [shutil.which(f"python{version}"), *sorted(root.glob(f"versions/{version}.*/bin/python"))]
    for name in filter(None, names):
        told = subprocess.run(
            [name, "-c", "import sys, zlib; print(sys.executable)"], capture_output=True, text=True, check=False
        )
        if told.returncode == 0:
            return told.stdout.strip()
    return pytest.skip(f"there is no Python {version} on this machine")


def installed(directory: Path, interpreter: str) -> str:
    path = directory / "ima-snapshot"
    path.write_bytes(_zipapp.build(interpreter, "/nowhere.conf"))
    path.chmod(0o755)
    return str(path)


def run(*words: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(words, capture_output=True, env={"PYTHONPATH": "/nowhere"}, cwd="/", check=False)


def test_built_twice_the_bytes_are_equal(monkeypatch):
    first = _zipapp.build("/usr/bin/python3", CONFIG)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert _zipapp.build("/usr/bin/python3", CONFIG) == first
    assert first.startswith(b"#!/usr/bin/python3 -I\n")


def test_it_holds_what_the_command_imports_and_nothing_of_ansible_or_of_the_controller():
    names = zipfile.ZipFile(io.BytesIO(_zipapp.build(sys.executable, CONFIG))).namelist()
    assert names == sorted(names)
    library = [Path(name).name for name in names if "module_utils/" in name]
    assert {"_command.py", "_snapshot.py", "_stitched.py", "_verifier.py"} <= set(library)
    assert not {"_s3.py", "_sftp.py", "_rotation.py", "_fleet.py"} & set(library)
    for name, source in _zipapp.contents(CONFIG).items():
        tree = ast.parse(source)
        froms = [each.module or "" for each in ast.walk(tree) if isinstance(each, ast.ImportFrom)]
        assert not [module for module in froms if module.split(".")[0] == "ansible"], name
        assert name.endswith("__init__.py") or b"GPL-3.0-or-later" in source, name


@pytest.mark.parametrize("path", ["python3", "/opt/my python", "/x" * 61, "/usr/bin/python3\n", ""])
def test_an_interpreter_that_the_kernel_cannot_start_is_refused(path):
    assert not _zipapp.fits(path)


@pytest.mark.parametrize(("version", "flavour"), MANAGED.items())
def test_it_gives_the_same_shards_as_the_module(tmp_path, version, flavour):
    command = installed(tmp_path, python(version))
    host = Host(tmp_path / "host", flavour, "local", count=20)
    twin = tmp_path / "twin"
    shutil.copytree(host.kernel, twin / "ima")
    other = Host.__new__(Host)
    other.__dict__.update(host.__dict__, root=str(twin), kernel=str(twin / "ima"), spool=str(twin / "spool"))
    other.conf = str(twin / "snapshot.conf")
    os.mkdir(other.spool)
    other.configure()
    for _round in range(2):
        ran = run(command, "--config", host.conf, "export")
        assert (ran.returncode, ran.stderr) == (0, b"")
        other.run()
        assert shards(host) == shards(other)
        host.grow(9)
        shutil.rmtree(other.kernel)
        shutil.copytree(host.kernel, other.kernel)
    oracle(host)
    assert run(command, "--config", host.conf, "read").stdout == host.truth()
    assert run(command, "--config", host.conf, "verify").stdout.startswith(b"consistent: ")
    assert run(command, "--config", host.conf, "status", "--json").stdout.startswith(b'{"acknowledged":0,')


def shards(host: Host) -> dict[str, bytes]:
    """Name and bytes of every shard."""
    spool = Spool(host.spool)
    return {entry.stem: Path(spool.path(entry)).read_bytes() for entry in spool.entries}


def test_its_default_config_is_the_given_one(tmp_path):
    host = Host(tmp_path / "host", count=3)
    path = tmp_path / "ima-snapshot"
    path.write_bytes(_zipapp.build(sys.executable, host.conf))
    ran = run(sys.executable, str(path), "status", "--json")
    assert (ran.returncode, ran.stdout.count(b'"lag":4,')) == (0, 1)


def test_the_environment_and_the_working_directory_have_no_say(tmp_path):
    command = installed(tmp_path, sys.executable)
    host = Host(tmp_path / "host", count=3)
    evil = tmp_path / "evil"
    (evil / "ansible_collections").mkdir(parents=True)
    for name in ("ansible_collections/__init__.py", "argparse.py", "sitecustomize.py"):
        (evil / name).write_text("raise SystemExit(99)\n")
    ran = subprocess.run(
        [command, "--config", host.conf, "export"],
        cwd=evil,
        env={"PYTHONPATH": str(evil)},
        capture_output=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert _emulated.recorded(host.kernel)
