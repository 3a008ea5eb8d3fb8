# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What one rotation of a large backlog takes on a host: memory, rounds, time.

usage: rotation_memory.py [--records N] [--flavour FLAVOUR] [--chunk-bytes N] [--shard-records N]

The host is emulated. Each round runs in a process of its own, as a module does; the floor is such a process that
imports the library and does nothing. Figures are of this machine: compare them with each other only.
The collection must be importable as ansible_collections.integrity.ima (PYTHONPATH).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import typing as t

CONFIG = """[snapshot]
name = host
spool = {0}/spool
shard_records = {1}
[list]
source = emulated
directory = {0}/kernel
"""


def peak_kib() -> int:
    """Return the peak resident set of this process: VmHWM, since ru_maxrss is inherited over fork and exec."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child(what: str) -> None:
    """Do one thing in a process of its own: what is wanted comes as JSON, the result goes back as JSON."""
    request = json.load(sys.stdin)
    from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _host, _protocol

    answer: t.Any = None
    if what == "create":
        _emulated.create(request["kernel"], flavour=request["flavour"])
        _emulated.grow(request["kernel"], request["records"] - 1)
    elif what == "round":
        answer = _host.rotate(_protocol.load(request["config"]), request["params"], False)
    json.dump({"answer": answer, "peak": peak_kib()}, sys.stdout)


def run(what: str, request: t.Any) -> t.Any:
    """Run :func:`child` in another process."""
    done = subprocess.run(
        [sys.executable, os.path.abspath(__file__), "--child", what],
        input=json.dumps(request).encode("ascii"),
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def measure(options: argparse.Namespace, directory: str) -> None:
    """Rotate once, and print what it took."""
    from ansible_collections.integrity.ima.plugins.module_utils._rotation import Rotation
    from ansible_collections.integrity.ima.plugins.module_utils._store._directory import DirectoryStore

    kernel, config, store = (os.path.join(directory, name) for name in ("kernel", "snapshot.conf", "store"))
    for name in ("spool", "store"):
        os.mkdir(os.path.join(directory, name))
    with open(config, "w", encoding="utf-8") as file:
        file.write(CONFIG.format(directory, options.shard_records))
    os.chmod(config, 0o644)
    floor = run("nothing", {})["peak"]
    start = time.monotonic()
    run("create", {"kernel": kernel, "flavour": options.flavour, "records": options.records})
    print(f"{options.records} records made in {time.monotonic() - start:.1f} s, flavour {options.flavour}", flush=True)
    peaks = []

    def call(one_round: t.Any) -> t.Any:
        params = dict(one_round, anchor=False, chunk_bytes=options.chunk_bytes)
        done = run("round", {"config": config, "params": params})
        peaks.append(done["peak"])
        return done["answer"]

    start = time.monotonic()
    rotation = Rotation(DirectoryStore(store), "host", call, {"anchor": False, "chunk_bytes": options.chunk_bytes})
    rotation.run()
    took = time.monotonic() - start
    result = rotation.result()
    if result["claim"]["index"] != options.records:
        raise SystemExit(f"error: {result['claim']['index']} of {options.records} records are in the store")
    print(f"host:       peak {max(peaks) / 1024:.1f} MiB, floor {floor / 1024:.1f} MiB, ratio {max(peaks) / floor:.2f}")
    print(f"controller: peak {peak_kib() / 1024:.1f} MiB")
    print(f"{result['rounds']} rounds, {result['delivered']} shards, {result['trimmed']} records trimmed")
    print(f"{took:.1f} s, {options.records / took:.0f} records/s")


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--records", type=int, default=1000000)
    parser.add_argument("--flavour", choices=("export_only", "delete_n", "staged"), default="delete_n")
    parser.add_argument("--chunk-bytes", type=int, default=524288)
    parser.add_argument("--shard-records", type=int, default=50000)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    with tempfile.TemporaryDirectory(prefix="ima-memory-") as directory:
        measure(options, directory)


if __name__ == "__main__":
    main()
