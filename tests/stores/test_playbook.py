# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real sshd hosts, ansible-playbook and the action plugins: three hosts into each of the stores, and nothing leaks."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import typing as t
from pathlib import Path

import places
import pytest
from conftest import MakePlace
from places import Place
from servers import Sshd

from ansible_collections.integrity.ima import plugins

HERE = Path(__file__).resolve().parent
FLEET = {"delete": "delete_n", "stage": "staged", "export": "export_only"}
CONFIG = """[defaults]
host_key_checking = false
retry_files_enabled = false
local_tmp = {0}/tmp
forks = 3
timeout = 60
[ssh_connection]
pipelining = true
control_path_dir = {0}/cp
ssh_args = -F /dev/null -o ControlMaster=auto -o ControlPersist=10s -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR
"""


class Syslog:
    """What the modules write into the system's log, where this machine has none of its own."""

    PATH = "/dev/log"

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.here = os.geteuid() == 0 and not self._answers()
        if self.here:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.PATH)  # a killed test left it
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._socket.bind(self.PATH)
            threading.Thread(target=self._read, daemon=True).start()

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
            return probe.connect_ex(self.PATH) not in (errno.ENOENT, errno.ECONNREFUSED)

    def _read(self) -> None:
        while True:
            try:
                self.lines.append(self._socket.recv(1 << 20).decode("utf-8", "replace"))
            except OSError:
                return

    def close(self) -> None:
        """Give the name back."""
        if self.here:
            os.unlink(self.PATH)
            self._socket.close()


@pytest.fixture
def syslog() -> t.Iterator[Syslog]:
    made = Syslog()
    yield made
    made.close()


@pytest.fixture
def login() -> t.Iterator[Sshd]:
    """An sshd that lets this account log in."""
    sshd = Sshd(shell=True)
    yield sshd.start()
    sshd.remove()


class Playbook:
    """An inventory of three hosts, and ansible-playbook on it."""

    def __init__(self, directory: Path, sshd: Sshd, stores: list[tuple[str, Place, str]]) -> None:
        self.directory = directory
        for name in ("fleet", "cp"):
            (directory / name).mkdir()
        (directory / "ansible.cfg").write_text(CONFIG.format(directory))
        lines = ["[fleet]"]
        for name, flavour in FLEET.items():
            lines.append(f"{name} ansible_host=127.0.0.1 ansible_port={sshd.port} flavour={flavour}")
        lines += ["[fleet:vars]", f"ansible_user={sshd.user}", f"ansible_ssh_private_key_file={sshd.root}/key"]
        lines += [
            f"ansible_python_interpreter={sys.executable}",
            f"base={directory}/fleet/{{{{ inventory_hostname }}}}",
        ]
        (directory / "inventory").write_text("\n".join([*lines, ""]))
        said = [{"name": name, "store": place.address, "delivery": delivery} for name, place, delivery in stores]
        (directory / "stores.json").write_text(json.dumps({"stores": said}))

    def run(self, *arguments: str) -> str:
        """Return all of its output at the verbosity at which Ansible shows what it sends."""
        collections = Path(next(iter(plugins.__path__))).parents[3]
        environment = dict(
            {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")},
            ANSIBLE_CONFIG=str(self.directory / "ansible.cfg"),
            ANSIBLE_HOME=str(self.directory / "home"),
            ANSIBLE_COLLECTIONS_PATH=str(collections),
            ANSIBLE_LOCALHOST_WARNING="false",
        )
        command = [os.path.join(os.path.dirname(sys.executable), "ansible-playbook"), "-vvv", "-i"]
        command += [str(self.directory / "inventory"), str(HERE / "playbooks" / "stores.yml")]
        command += ["-e", f"@{self.directory}/stores.json", *arguments]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
        output = done.stdout.decode("utf-8", "replace")
        assert done.returncode == 0, output[output.find("\nfatal: ") :][:3000] + output[-2000:]
        return output

    def files(self) -> dict[str, bytes]:
        """Everything that the three hosts have, the lock's file apart."""
        found = places.files_below(str(self.directory / "fleet"))
        return {name: data for name, data in found.items() if not name.endswith("/lock")}


def test_three_hosts_into_each_store(tmp_path: Path, make_place: MakePlace, login: Sshd, syslog: Syslog) -> None:
    stores = [("directory", make_place("directory"), "controller"), ("sftp", make_place("sftp"), "controller")]
    stores += [("s3", make_place("s3"), "controller"), ("direct", make_place("s3"), "direct")]
    book = Playbook(tmp_path, login, stores)
    output = book.run("-e", "only_check=true")
    assert [place.files() for _name, place, _delivery in stores] == [{}] * 4, "check mode writes nothing into a store"
    assert [name for name in book.files() if "/spool/" in name] == [], "check mode writes nothing on a host"
    output += book.run("-e", "only_check=false")
    trees = [place.tree() for _name, place, _delivery in stores]
    assert len(trees[0]) == 1 + 3 * 4 * 2 and trees[1:] == trees[:1] * 3, "names and bytes are the same in all of them"
    left = [name for name in book.files() if name.endswith(".ima.gz")]
    assert len(left) == 1 + 1 + 4, "pruned to one shard where the kernel could be trimmed"
    state = tmp_path / "state"
    kept = [path for path in state.rglob("*") if path.is_file() and path.name != ".lock"]
    assert kept == [], "no bytes of shards are left on the controller"
    for text in (output, *syslog.lines):
        assert "X-Amz-Signature" not in text and "X-Amz-Credential" not in text
    if syslog.here:
        assert any("ima_rotate" in line and "_urls" in line for line in syslog.lines), "the log was read"
