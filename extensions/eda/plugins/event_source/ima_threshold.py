# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An event source for ansible-rulebook: hosts whose IMA measurement list should be rotated."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import typing as t

DOCUMENTATION = r"""
---
short_description: Put an event when a host's IMA measurement list should be rotated.
description:
  - Asks each host every O(interval) seconds with C(ima-snapshot status --json), which does not read the list.
  - An event is put when a host passes one of the thresholds, or has a fault, and not again before that has changed - a
    threshold that was passed must first be kept again, a fault must become another one.
  - A host that does not answer makes an event, too, with V(unreachable) as the reason.
  - Hosts are asked with the OpenSSH client, in batch mode, with the keys and the configuration of the user who runs
    this. What they answer is bounded and checked. In text of theirs a question mark stands for what cannot be printed,
    for each opening brace and for a hash sign at the beginning, so that no template of a host gets into a playbook.
options:
  hosts:
    description:
      - What to ask. V(local) is this machine, everything else a destination of C(ssh), such as V(root@web1) or the name
        of a host in its configuration.
    type: list
    elements: str
    required: true
  interval:
    description: Seconds between two questions to a host.
    type: float
    default: 60
  records:
    description: Put an event when at least so many records are not exported. With none of the three thresholds, it is
      put when the host itself says that an export is due.
    type: int
  bytes:
    description: The same by the estimated size of these records.
    type: int
  age:
    description: The same by the age of the newest shard in seconds, if there are records that are not exported.
    type: int
  command:
    description: The command on the host, as one word or a list of words.
    type: raw
    default: [sudo, -n, /usr/local/sbin/ima-snapshot]
  ssh:
    description: The OpenSSH client and its options, as a list of words.
    type: list
    elements: str
    default: [ssh]
  timeout:
    description: Seconds that one question may take.
    type: float
    default: 30
  parallel:
    description: How many hosts are asked at a time.
    type: int
    default: 16
notes:
  - An event has the key C(ima) with C(host) (as given in O(hosts)), C(reason) (V(records), V(bytes), V(age), V(due),
    V(fault) or V(unreachable)), C(detail) and C(status), which is what the host answered, or null.
"""

EXAMPLES = r"""
- integrity.ima.ima_threshold:
    hosts: [root@web1, root@web2]
    interval: 60
    records: 5000
    age: 3600
"""

_LONGEST = 1 << 16  # bytes of an answer
_MOST = 1 << 53
_WORD = re.compile(r"[a-z0-9_]{1,40}\Z")
# A destination is a word of the command line: it must not be taken for an option.
_DESTINATION = re.compile(r"[A-Za-z0-9_.@:\[\]%/+-]{1,255}\Z")
_NUMBERS = ("count", "cut", "base", "lag", "lag_bytes", "sequence", "generation", "acknowledged", "age")
Status = t.Dict[str, t.Any]
Found = t.Dict[str, str]


class Unanswered(Exception):
    """A host did not answer, or not as ima-snapshot does. The text is ours, not the host's."""


class Options(t.NamedTuple):
    """The options, checked."""

    hosts: list[str]
    interval: float
    limits: dict[str, int]
    command: list[str]
    ssh: list[str]
    timeout: float
    parallel: int


def options(args: dict[str, t.Any]) -> Options:
    """Check the arguments. Raises ValueError."""
    known = {"hosts", "interval", "records", "bytes", "age", "command", "ssh", "timeout", "parallel"}
    unknown = sorted(set(args) - known)
    if unknown:
        raise ValueError(f"ima_threshold has no option {unknown[0]!r}")
    hosts = args.get("hosts")
    if not isinstance(hosts, list) or not hosts:
        raise ValueError("ima_threshold needs 'hosts', a list of destinations of ssh, or 'local'")
    for host in hosts:
        if not isinstance(host, str) or not _DESTINATION.match(host) or host.startswith("-"):
            raise ValueError(f"{host!r:.80} is not a destination of ssh")
    limits = {key: _number(args, key, 1) for key in ("records", "bytes", "age") if args.get(key) is not None}
    return Options(
        list(dict.fromkeys(hosts)),
        _number(args, "interval", 60),
        {key: int(value) for key, value in limits.items()},
        _words(args.get("command", ["sudo", "-n", "/usr/local/sbin/ima-snapshot"]), "command"),
        _words(args.get("ssh", ["ssh"]), "ssh"),
        _number(args, "timeout", 30),
        int(_number(args, "parallel", 16)),
    )


def _number(args: dict[str, t.Any], key: str, default: float) -> float:
    value = args.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < _MOST:
        raise ValueError(f"'{key}' must be a number above 0")
    return value


def _words(value: t.Any, key: str) -> list[str]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not all(isinstance(word, str) and word for word in words):
        raise ValueError(f"'{key}' must be a list of words")
    return words


async def ask(given: Options, host: str) -> Status:
    """Return what the host says, checked. Raises :class:`Unanswered`."""
    words = [*given.command, "status", "--json"]
    if host != "local":
        # ssh hands the words to a shell on the host.
        quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
        words = [*given.ssh, "-o", "BatchMode=yes", "-T", "--", host, quoted]
    code, data = await _run(words, given.timeout)
    if code:
        if code == 255 and host != "local":
            raise Unanswered("ssh ended with exit code 255: it could not connect, or log in")
        raise Unanswered(f"the command ended with exit code {code}")
    return checked(data)


async def _run(words: list[str], timeout: float) -> tuple[int, bytes]:
    """Run a command; return exit code and output, no more of it than an honest answer has.

    The pipe is ours: with asyncio's own, the end of a process that was killed is not seen while a child of it holds it.
    """
    end, into = os.pipe()
    reader = asyncio.StreamReader(limit=_LONGEST)
    transport, _protocol = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(end, "rb", 0)
    )
    try:
        try:
            process = await asyncio.create_subprocess_exec(
                *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=into,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            raise Unanswered(f"{words[0]} cannot be started: {error.strerror}") from error
        finally:
            os.close(into)
        try:
            return await asyncio.wait_for(_answer(process, reader), timeout)
        except asyncio.TimeoutError as error:
            raise Unanswered(f"no answer within {timeout:g} s") from error
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
    finally:
        transport.close()


async def _answer(process: asyncio.subprocess.Process, reader: asyncio.StreamReader) -> tuple[int, bytes]:
    data = b""
    while True:
        piece = await reader.read(_LONGEST)
        if not piece:
            break
        data += piece
        if len(data) > _LONGEST:
            raise Unanswered(f"the answer is longer than {_LONGEST} bytes")
    return await process.wait(), data


def _require(true: object) -> None:
    """Raise ``ValueError`` unless it holds."""
    if not true:
        raise ValueError


def _counts(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def checked(data: bytes) -> Status:
    """Return the members of an answer that events need, each checked; whatever else a host sends is left out."""
    try:
        document = json.loads(data.decode("ascii"))
        _require(isinstance(document, dict) and document["version"] == 1)
        numbers = {key: document[key] for key in _NUMBERS}
        for value in numbers.values():
            _require(value is None or _counts(value))
        _require(isinstance(document["due"], bool) and isinstance(document["emulated"], bool))
        texts = {key: _text(document[key], 253) for key in ("name", "boot_id", "flavour")}
        fault = document["fault"]
        if fault is not None:
            _require(isinstance(fault["reason"], str) and _WORD.match(fault["reason"]))
            _require(fault["index"] is None or _counts(fault["index"]))
            fault = {
                "reason": fault["reason"],
                "index": fault["index"],
                "boot_id": None if fault["boot_id"] is None else _text(fault["boot_id"], 64),
                "message": _text(fault["message"], 2000),
            }
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Unanswered("the answer is not that of ima-snapshot status --json") from None
    return dict(numbers, **texts, fault=fault, due=document["due"], emulated=document["emulated"])


def _text(value: t.Any, longest: int) -> str:
    _require(isinstance(value, str) and len(value) <= longest)
    # ansible-rulebook hands events to playbooks as extra variables, and Ansible takes those for templates.
    # None begins without a brace, but for a text with a header of its own ("#jinja2:").
    plain = "".join(char if char.isprintable() and char != "{" else "?" for char in value)
    return "?" + plain[1:] if plain.startswith("#") else plain


def reasons(status: Status, limits: dict[str, int]) -> Found:
    """Return why a host should be looked at: reason to detail."""
    found: Found = {}
    values = {"records": status["lag"], "bytes": status["lag_bytes"], "age": status["age"]}
    for key, limit in limits.items() if status["lag"] != 0 else ():
        value = values[key]
        if value is not None and value >= limit:
            found[key] = f"{value} of {limit}"
    if status["due"] and not limits:
        found["due"] = "an export is due"
    if status["fault"]:
        found["fault"] = f"{status['fault']['reason']} at index {status['fault']['index']}"
    return found


async def _watch(queue: t.Any, given: Options, host: str, turn: asyncio.Semaphore) -> None:
    told: Found = {}
    while True:
        status: Status | None = None
        async with turn:
            try:
                status = await ask(given, host)
                found = reasons(status, given.limits)
            except Unanswered as error:
                found = {"unreachable": str(error)}
        for reason, detail in found.items():
            # How far a threshold is passed changes all the time; which fault it is matters.
            if reason not in told or (reason == "fault" and told[reason] != detail):
                event = {"host": host, "reason": reason, "detail": detail, "status": status}
                await queue.put({"ima": event})
        if "unreachable" in found:
            # What was told before is as true as it was: a host that was away for a moment is not told of again.
            found = dict(told, **found)
        told = found
        await asyncio.sleep(given.interval)


async def main(queue: t.Any, args: dict[str, t.Any]) -> None:
    """Watch the hosts until cancelled."""
    given = options(args)
    turn = asyncio.Semaphore(given.parallel)
    await asyncio.gather(*(_watch(queue, given, host, turn) for host in given.hosts))


if __name__ == "__main__":

    class _Printed:
        """Instead of a queue: what would be put."""

        async def put(self, event: dict[str, t.Any]) -> None:
            """Print it."""
            print(json.dumps(event, sort_keys=True))

    asyncio.run(main(_Printed(), {"hosts": ["local"], "interval": 5}))
