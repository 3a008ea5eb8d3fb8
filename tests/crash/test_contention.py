# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Eight processes on one host at once: two export, two trim, one anchors, one measures, two read.

Run as a program it is one of them: ``test_contention.py ROLE ROOT SECONDS``.
"""

from __future__ import annotations

import collections
import gzip
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _protocol
from ansible_collections.integrity.ima.plugins.module_utils import _host as host_side
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._shard import parse_manifest
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils._support import Host, documented_reader, oracle

LONG = os.environ.get("LONG") == "1"
SECONDS = 30.0 if LONG else 4.0  # for each flavour
ROLES = ("export", "export", "trim", "trim", "anchor", "measure", "read", "shell")
# What a process that comes too late, or too early, may be told. Everything else is a fault.
EXPECTED = {
    "export": {"locked", "list_busy"},
    "trim": {"locked", "list_busy"},
    "anchor": {"locked", "list_busy", "no_shard"},
    "measure": set(),
    "read": {"locked", "list_busy"},
    "shell": set(),
}
LEAST = 5  # operations of each process, however busy the machine is; it gets PATIENCE more seconds for them
PATIENCE = 60.0
# Readers that overlap without end would keep everybody else out: flock(2) is not fair.
PAUSES = {"measure": 0.02, "read": 0.06, "shell": 0.06}

# Under the shared lock: every shard that a manifest names is whole, each manifest names the one before it, and each
# shard goes on where the one before it ended. Prints the number of shards.
CHECK = r"""
set -eu
exec 9< "$2"
flock -s -w 60 9
cd "$1/shards"
find . -name '*.json' | awk -F/ '{ print $3, $0 }' | sort | awk '{ print $2 }' > "$3.names"
xargs -r sha256sum < "$3.names" > "$3.digests"
xargs -r awk '{ print FILENAME, $0 }' < "$3.names" > "$3.manifests"
awk -v sums="$3.sums" '
    function value(key, found) {
        match($0, "\"" key "\":\"?[0-9a-f]*")
        found = substr($0, RSTART, RLENGTH)
        sub(/.*:"?/, "", found)
        return found
    }
    FNR == NR { digest[$2] = $1; next }
    {
        if (value("reset_count\":[^,]*,\"sequence") + 0 != shards + 1) { print "sequence", $1; exit 1 }
        if (shards && value("previous") != digest[before]) { print "previous", $1; exit 1 }
        if (value("first") + 0 != end + 0) { print "first", $1, end; exit 1 }
        end = value("first") + value("count"); before = name = $1; shards++
        sub(/[.]json$/, ".ima.gz", name)
        print value("stored_sha256") "  " name > sums
    }
    END { print shards + 0 }' "$3.digests" "$3.manifests" > "$3.count" || { cat "$3.count" >&2; exit 3; }
[ ! -s "$3.names" ] || sha256sum --check --quiet --strict "$3.sums"
cat "$3.count"
"""

Tally = t.Callable[[str, float], None]


# --- the processes ----------------------------------------------------------------------------------------------------


class Torn(AssertionError):
    """A reader saw what nobody may see."""


class Reader:
    """Reads shards with the shared lock and without any, and the kernel's list under the lock."""

    def __init__(self, config: _protocol.Config, kernel: str) -> None:
        self.config, self.kernel = config, kernel
        self.generation = self.shards = 0

    def __call__(self, number: int) -> None:
        if number % 3 == 2:
            self.hold()
        elif number % 3:
            self.unlocked()
        else:
            self.locked()

    def locked(self) -> None:
        """Shards and list together are a prefix of what was recorded, in order, and nothing comes or goes."""
        with _protocol.Lock(self.config, shared=True):
            spool = Spool(self.config.spool)
            entries = list(spool.entries) if spool.check() else []
            sealed = b"".join(spool.raw_from(0)) if entries else b""
            with self.config.lists().view() as file:
                held = b"".join(iter(lambda: file.read(65536), b""))
            state = _emulated._load(self.kernel)
            recorded = Path(self.kernel, state.recorded).read_bytes()[: state.size]
            offset = state.staged[1] if state.staged else state.live_offset
            if sealed != recorded[: len(sealed)] or held != recorded[offset : offset + len(held)]:
                raise Torn("shards or list are not what was recorded")
            if offset > len(sealed):
                raise Torn(f"{offset - len(sealed)} bytes are neither in a shard nor in the kernel")
            if len(entries) < self.shards or (entries and list(Spool(self.config.spool).entries) != entries):
                raise Torn("shards went away, or came under the lock")
            if _protocol.generation(self.config.spool) != len(entries):
                raise Torn("the generation counter is not the number of the newest shard")
            self.shards = len(entries)

    def unlocked(self) -> None:
        """A shard whose manifest was seen is complete, and the counter never goes back."""
        generation = _protocol.generation(self.config.spool)
        if generation < self.generation:
            raise Torn(f"the generation counter went from {self.generation} back to {generation}")
        self.generation = generation
        found = sorted(Path(self.config.spool, "shards").glob("*/*.json"))
        if len(found) < generation:
            raise Torn(f"the generation counter says {generation}, {len(found)} manifests are there")
        for path in found[-20:]:
            manifest = parse_manifest(path.read_bytes(), str(path))
            stored = path.with_name(path.name[: -len(".json")] + ".ima.gz").read_bytes()
            if hashlib.sha256(stored).hexdigest() != manifest["stored_sha256"]:
                raise Torn(f"the shard of {path} is not whole")
            if hashlib.sha256(gzip.decompress(stored)).hexdigest() != manifest["sha256"]:
                raise Torn(f"the records of {path} are not whole")

    def hold(self) -> None:
        """As an agent does that knows nothing of the lock: hold the list open for a moment."""
        with self.config.lists().view() as file:
            file.read(4096)
            time.sleep(0.2)


class Shell:
    """The documented shell reader, and a check of the whole spool with ``flock``, ``sha256sum`` and ``awk``."""

    def __init__(self, config: _protocol.Config, root: str) -> None:
        self.config, self.root = config, root
        self.script = os.path.join(root, "whole-list")
        self.sizes = Path(root, "whole-list.seen")

    def __call__(self, number: int) -> None:
        if not number % 2 and not os.path.exists(os.path.join(self.config.spool, "format.json")):
            return
        if number % 2:
            self.run(["sh", "-c", CHECK, "sh", self.config.spool, self.config.lock, os.path.join(self.root, "seen")])
            return
        whole = self.run(["sh", self.script])
        with self.sizes.open("a", encoding="ascii") as file:
            file.write(f"{len(whole)} {hashlib.sha256(whole).hexdigest()}\n")

    def run(self, words: list[str]) -> bytes:
        """Run a reader; whatever it complains of is a fault."""
        environment = dict(os.environ, IMA_SNAPSHOT_CONFIG=self.config.path)
        done = subprocess.run(words, capture_output=True, env=environment, check=False)
        if done.returncode or done.stderr:
            raise Torn(f"{words[:2]} ended with {done.returncode}: {done.stderr.decode()[-400:]}")
        return done.stdout


def measure(kernel: str, dice: random.Random) -> None:
    """Record some files, or an open_writers violation."""
    if dice.random() < 0.2:
        _emulated.violation(kernel, "/v")
    else:
        _emulated.grow(kernel, dice.randrange(1, 40))


def operation(role: str, root: str) -> t.Callable[[int], object]:
    """What a process does again and again; the argument counts up."""
    config = _protocol.load(os.path.join(root, "snapshot.conf"))
    kernel, dice = os.path.join(root, "ima"), random.Random(os.getpid())
    operations: dict[str, t.Callable[[int], object]] = {
        "export": lambda number: host_side.export(config, False),
        "trim": lambda number: host_side.trim(config, "cut", 0, 0, False, False),
        "anchor": lambda number: host_side.aggregate(config, True, False),
        "measure": lambda number: measure(kernel, dice),
        "read": Reader(config, kernel),
        "shell": Shell(config, root),
    }
    return operations[role]


def work(role: str, root: str, seconds: float) -> None:
    """Say that we are ready, wait for the word, work until the time is over, say what was done and what was refused."""
    act = operation(role, root)
    print("ready", flush=True)
    sys.stdin.readline()
    done, refused, deadline = 0, collections.Counter[str](), time.monotonic() + seconds
    number, latest = 0, deadline + PATIENCE
    while time.monotonic() < (deadline if done >= LEAST else latest):
        try:
            act(number)
            done += 1
        except ImaError as error:
            if error.reason not in EXPECTED[role]:
                raise
            refused[error.reason] += 1
            time.sleep(random.uniform(0.01, 0.06))
        number += 1
        time.sleep(PAUSES.get(role, 0.005))
    print(json.dumps({"done": done, "refused": refused}), flush=True)


# --- the test ---------------------------------------------------------------------------------------------------------


class Process(t.NamedTuple):
    role: str
    child: subprocess.Popen[str]


def start(host: Host) -> list[Process]:
    """Start all of them, and let them go at once when each is ready."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(filter(None, sys.path)))
    processes = [
        Process(
            role,
            subprocess.Popen(
                [sys.executable, __file__, role, host.root, str(SECONDS)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            ),
        )
        for role in ROLES
    ]
    for process in processes:
        assert process.child.stdout and process.child.stdout.readline() == "ready\n", ended(process)
    for process in processes:
        assert process.child.stdin
        process.child.stdin.write("go\n")
        process.child.stdin.flush()
    return processes


def ended(process: Process) -> str:
    """How a process ended: what it printed last."""
    out, err = process.child.communicate(timeout=SECONDS * 4 + 2 * PATIENCE)
    assert process.child.returncode == 0, f"{process.role}: {err[-3000:]}"
    return out


def prefixes(path: Path, truth: bytes) -> int:
    """Check that everything the documented reader wrote was a prefix of what was recorded; return how often."""
    lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    sizes = [int(size) for size, _digest in lines]
    assert sizes == sorted(sizes)
    for size, (_size, digest) in zip(sizes, lines):
        assert hashlib.sha256(truth[:size]).hexdigest() == digest
    return len(sizes)


@pytest.fixture(name="root")
def _root() -> t.Iterator[Path]:
    """A directory in memory where there is one: nothing here is about the disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as directory:
        yield Path(directory)


@pytest.mark.skipif(not shutil.which("flock"), reason="flock (util-linux) is not installed")
@pytest.mark.parametrize("flavour", ["delete_n", "staged"])
def test_eight_processes_at_once(root: Path, flavour: str, tally: Tally) -> None:
    host = Host(root, flavour, "local", shard_records=200)
    Path(host.root, "whole-list").write_text(documented_reader(), encoding="utf-8")
    processes = start(host)
    try:
        said = [json.loads(ended(process)) for process in processes]
    finally:
        for process in processes:
            process.child.kill()
            process.child.wait()
    oracle(host)
    assert prefixes(Path(host.root, "whole-list.seen"), host.truth()) > 0
    host.run()
    oracle(host)
    assert host.sealed() == host.truth(), "the end of the list was not sealed"
    assert host.faults() == []
    for process, each in zip(processes, said):
        assert each["done"] >= LEAST, f"{process.role} did too little: {each}"
    refused = sum((collections.Counter(each["refused"]) for each in said), collections.Counter[str]())
    assert refused["list_busy"], "nobody ever met a list that was held open"
    print(flavour, [(process.role, each) for process, each in zip(processes, said)], len(host.spans()), "shards")
    tally("seconds of contention", SECONDS)


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], float(sys.argv[3]))
