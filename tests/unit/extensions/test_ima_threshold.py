# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The event source: when it puts an event, when not again, and what it takes from a host."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import stat
import sys
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import Host

ROOT = Path(__file__).resolve().parents[3]
# As ansible-rulebook loads it: a file, not a module of the collection.
SOURCE = ROOT / "extensions/eda/plugins/event_source/ima_threshold.py"
PLUGIN: dict[str, t.Any] = {"__name__": "ima_threshold", "__file__": str(SOURCE)}
# Not runpy: ansible-test's own import hook claims everything below the collection.
exec(compile(SOURCE.read_text(encoding="utf-8"), str(SOURCE), "exec"), PLUGIN)
HONEST = {
    "version": 1,
    "name": "web1",
    "boot_id": "00000000-0000-0000-0000-000000000001",
    "flavour": "delete_n",
    "emulated": False,
    "count": 30,
    "cut": 20,
    "base": 0,
    "lag": 10,
    "lag_bytes": 900,
    "sequence": 3,
    "generation": 3,
    "acknowledged": 3,
    "age": 100,
    "due": False,
    "holders": [],
    "fault": None,
}
FAULT = {"reason": "foreign_trim", "message": "somebody trimmed", "index": 7, "boot_id": HONEST["boot_id"]}
SSH = """#!/bin/sh
# The answers to one host after the other question, as files; the words that were given are kept.
directory=$(dirname "$0")
for word; do printf '%s\\n' "$word"; done > "$directory/words"
echo x >> "$directory/asked"
number=$(wc -l < "$directory/asked")
if [ ! -e "$directory/answer.$number" ]; then touch "$directory/end"; exec sleep 60; fi
. "$directory/answer.$number"
"""


class Queue:
    def __init__(self) -> None:
        self.events: list[dict[str, t.Any]] = []

    async def put(self, event: dict[str, t.Any]) -> None:
        json.dumps(event)
        self.events.append(event["ima"])


@pytest.fixture(name="ssh")
def fixture_ssh(tmp_path, monkeypatch):
    """Put a fake ssh on the PATH that gives these answers in turn; each is a document, bytes or lines of shell."""

    def fake(*answers: t.Any) -> Path:
        directory = tmp_path / "bin"
        directory.mkdir()
        (directory / "ssh").write_text(SSH)
        (directory / "ssh").chmod(0o755)
        for number, answer in enumerate(answers, 1):
            if isinstance(answer, dict):
                answer = json.dumps(answer).encode()
            if isinstance(answer, bytes):
                (directory / f"data.{number}").write_bytes(answer)
                answer = f"cat {shlex.quote(str(directory))}/data.{number}\n"
            (directory / f"answer.{number}").write_text(answer)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")
        return directory

    return fake


def watched(until: t.Callable[[Queue], bool], **args: t.Any) -> list[dict[str, t.Any]]:
    """Run the source until that is true; return the events."""
    queue = Queue()

    async def run() -> None:
        task = asyncio.ensure_future(PLUGIN["main"](queue, dict({"interval": 0.01}, **args)))
        while not until(queue) and not task.done():
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    return queue.events


def told(fake: Path, **args: t.Any) -> list[tuple[str, str]]:
    """Reason and detail of every event until all answers were given."""
    events = watched(lambda _queue: (fake / "end").exists(), hosts=["root@web1"], **args)
    assert {event["host"] for event in events} <= {"root@web1"}
    return [(event["reason"], event["detail"]) for event in events]


def test_each_threshold_makes_one_event_until_it_was_kept_again(ssh):
    many, few = dict(HONEST, lag=50, lag_bytes=5000), HONEST
    fake = ssh(few, many, dict(many, lag=60), few, many)
    assert told(fake, records=50) == [("records", "50 of 50"), ("records", "50 of 50")]


def test_bytes_and_age_are_thresholds_of_their_own(ssh):
    fake = ssh(dict(HONEST, lag_bytes=5000), dict(HONEST, age=900), dict(HONEST, age=900, lag=0))
    assert told(fake, bytes=5000, age=900) == [("bytes", "5000 of 5000"), ("age", "900 of 900")]


def test_without_thresholds_the_host_says_when(ssh):
    assert told(ssh(HONEST, dict(HONEST, due=True), dict(HONEST, due=True))) == [("due", "an export is due")]


def test_a_fault_makes_one_event_until_it_changes(ssh):
    faulty, other = dict(HONEST, fault=FAULT), dict(HONEST, fault=dict(FAULT, reason="pcr_mismatch", index=None))
    assert told(ssh(faulty, faulty, other, HONEST, other), records=99) == [
        ("fault", "foreign_trim at index 7"),
        ("fault", "pcr_mismatch at index None"),
        ("fault", "pcr_mismatch at index None"),
    ]


def test_a_host_that_is_away_for_a_moment_is_told_of_once(ssh):
    many = dict(HONEST, lag=50)
    events = told(ssh(many, "exit 255\n", "exit 255\n", many, "exit 255\n"), records=50)
    assert [reason for reason, _detail in events] == ["records", "unreachable", "unreachable"]


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"no json",
        b"[" * 5000,
        b"{}",
        b"null",
        dict(HONEST, version=2),
        dict(HONEST, lag=-1),
        dict(HONEST, lag=True),
        dict(HONEST, lag=1.5),
        dict(HONEST, lag="50"),
        dict(HONEST, age=1 << 60),
        dict(HONEST, due="yes"),
        dict(HONEST, name="x" * 300),
        dict(HONEST, fault={"reason": "{{ lookup('pipe', 'id') }}"}),
        dict(HONEST, fault="bad"),
        "yes | head -c 5000000\n",
        "echo '{}'; exit 3\n",
        "exec sleep 60\n",
    ],
    ids=lambda answer: str(answer)[:30],
)
def test_what_no_honest_host_sends_is_unreachable(ssh, answer):
    ssh(answer)
    events = watched(lambda queue: bool(queue.events), hosts=["web1"], records=1, timeout=2)
    assert [(event["reason"], event["status"]) for event in events] == [("unreachable", None)]


def test_only_known_members_reach_the_rules_and_text_is_printable(ssh):
    ssh(dict(HONEST, lag=50, name="web\x1b[31m1", command="rm -rf /", holders=[{"pid": 1, "command": "x"}]))
    (event,) = watched(lambda queue: bool(queue.events), hosts=["web1"], records=50)
    assert event["status"] == dict(
        {key: value for key, value in HONEST.items() if key not in ("version", "holders")}, lag=50, name="web?[31m1"
    )


def test_no_text_of_a_host_is_a_template(ssh):
    # ansible-rulebook hands the event to a playbook as extra variables, and those are templates for Ansible.
    template = "{{ lookup('pipe', 'id') }}{% raw %}{# #}"
    fault = dict(FAULT, message=template, boot_id=template)
    ssh(dict(HONEST, lag=50, name=template, boot_id=template, flavour=template, fault=fault))
    events = watched(lambda queue: len(queue.events) == 2, hosts=["web1"], records=50)
    for event in events:
        status, said = event["status"], event["status"]["fault"]
        texts = [status[key] for key in ("name", "boot_id", "flavour")] + [said["message"], said["boot_id"]]
        assert "{" not in "".join([event["detail"], *texts])
    assert events[0]["status"]["name"] == "?? lookup('pipe', 'id') }}?% raw %}?# #}"


def test_no_text_of_a_host_brings_delimiters_of_its_own(ssh):
    # Ansible takes any text with this header for a template, whatever follows.
    ssh(dict(HONEST, lag=50, name="#jinja2:variable_start_string:'[['", fault=dict(FAULT, message="#jinja2:x # 1")))
    first, second = watched(lambda queue: len(queue.events) == 2, hosts=["web1"], records=50)
    assert first["status"]["name"] == second["status"]["name"] == "?jinja2:variable_start_string:'[['"
    assert first["status"]["fault"]["message"] == "?jinja2:x # 1"


def test_ssh_gets_the_host_as_a_destination_and_the_command_as_one_word(ssh):
    fake = ssh(dict(HONEST, lag=50))
    told(fake, records=50, command=["/opt/it's/ima-snapshot", "--config", "/a b.conf"], ssh=["ssh", "-p", "2222"])
    assert (fake / "words").read_text().split("\n")[:-1] == [
        *("-p", "2222", "-o", "BatchMode=yes", "-T", "--", "root@web1"),
        "'/opt/it'\\''s/ima-snapshot' '--config' '/a b.conf' 'status' '--json'",
    ]


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"hosts": []},
        {"hosts": "web1"},
        {"hosts": ["-oProxyCommand=id"]},
        {"hosts": ["web1; id"]},
        {"hosts": [5]},
        {"hosts": ["web1"], "interval": 0},
        {"hosts": ["web1"], "records": "many"},
        {"hosts": ["web1"], "command": []},
        {"hosts": ["web1"], "recrods": 5},
    ],
    ids=str,
)
def test_wrong_options_are_refused(args):
    with pytest.raises(ValueError):
        asyncio.run(PLUGIN["main"](Queue(), args))


def test_a_real_host_is_asked_with_the_real_command(tmp_path):
    host = Host(tmp_path / "host", count=20)
    command = tmp_path / "ima-snapshot"
    search = os.pathsep.join(path for path in sys.path if path)
    command.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path[:0] = {search.split(os.pathsep)!r}\n"
        "from ansible_collections.integrity.ima.plugins.module_utils._command import main\n"
        f"sys.exit(main(config={host.conf!r}))\n"
    )
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    args = {"hosts": ["local"], "command": str(command), "timeout": 60}
    (event,) = watched(lambda queue: bool(queue.events), records=21, **args)
    assert (event["reason"], event["detail"], event["status"]["name"]) == ("records", "21 of 21", "host")
    host.run()
    host.grow(6)
    _emulated.foreign_trim(host.kernel, 3)
    with pytest.raises(Exception, match="somebody else trimmed"):
        host.export()
    (event,) = watched(lambda queue: bool(queue.events), records=21, **args)
    assert (event["reason"], event["detail"]) == ("fault", "foreign_trim at index 21")
    assert event["status"]["fault"]["index"] == 21


def test_many_hosts_are_asked_side_by_side_but_not_all_at_once(ssh):
    ssh(*[HONEST] * 6)
    events = watched(
        lambda queue: len(queue.events) >= 6, hosts=[f"web{n}" for n in range(6)], records=1, interval=60, parallel=2
    )
    # The fake counts its answers in a file without a lock: two at once may read the same number.
    assert {event["host"] for event in events} == {f"web{n}" for n in range(6)}
