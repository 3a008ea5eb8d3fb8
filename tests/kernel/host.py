# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A VM with the collection run against it, and checks that share no code with the collection."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import typing as t
from pathlib import Path

from lab import VM, LabError, write_inventory

HERE = Path(__file__).resolve().parent
COLLECTIONS = os.environ.get("ANSIBLE_COLLECTIONS_PATH", str(HERE.parents[1] / "build/collections"))
Result = t.Dict[str, t.Any]

CONFIG = """[snapshot]
name = {name}
spool = /var/lib/ima-snapshot
trim_after = {trim_after}
shard_records = {shard_records}
[list]
busy_timeout = {busy_timeout}
"""


class Record(t.NamedTuple):
    """A record of the binary list with SHA-1 digests."""

    raw: bytes
    pcr: int
    digest: bytes
    template: bytes
    data: bytes

    @property
    def violation(self) -> bool:
        return not any(self.digest)

    @property
    def path(self) -> bytes:
        """The path: the second field of the template data."""
        if self.template == b"ima":
            return self.data[20:].rstrip(b"\0")
        first = struct.unpack_from("<I", self.data)[0]
        size = struct.unpack_from("<I", self.data, 4 + first)[0]
        return self.data[8 + first : 8 + first + size].rstrip(b"\0")


def records(data: bytes) -> list[Record]:
    """Cut a binary list into records. Knows the legacy template ``ima``, too."""
    found, at = [], 0
    while at < len(data):
        start = at
        pcr, digest, size = struct.unpack_from("<I20sI", data, at)
        template = data[at + 28 : at + 28 + size]
        at += 28 + size
        if template == b"ima":  # digest, length, name: hashed with the name filled up to 256 bytes
            name_size = struct.unpack_from("<I", data, at + 20)[0]
            name = data[at + 24 : at + 24 + name_size]
            body = data[at : at + 20] + name + b"\0" * (256 - len(name))
            at += 24 + name_size
        else:
            length = struct.unpack_from("<I", data, at)[0]
            body = data[at + 4 : at + 4 + length]
            at += 4 + length
        found.append(Record(data[start:at], pcr, digest, template, body))
    assert at == len(data), "the list ends within a record"
    return found


def replay(data: bytes, bank: str, padded: bool = False) -> dict[int, str]:
    """Return the PCR values to which a list leads from zero."""
    size = hashlib.new(bank).digest_size
    values: dict[int, bytes] = {}
    for record in records(data):
        if record.violation:
            extend = b"\xff" * size
        else:
            assert hashlib.sha1(record.data).digest() == record.digest, "a record does not hash to its digest"
            extend = record.digest.ljust(size, b"\0") if padded else hashlib.new(bank, record.data).digest()
        values[record.pcr] = hashlib.new(bank, values.get(record.pcr, bytes(size)) + extend).digest()
    return {pcr: value.hex() for pcr, value in values.items()}


class Host:
    """One VM, its store on the controller, and the modules of the collection."""

    def __init__(self, vm: VM, work: Path) -> None:
        self.vm, self.name, self.work = vm, vm.name, work
        self.store = work / "store"
        self.store.mkdir(parents=True)
        (work / "ansible.cfg").write_text("")  # no settings of the user's
        self.facts: Result = {"rotations": 0, "exported": 0, "trimmed": 0}
        self.base = 0  # index of the kernel's first record in this boot, by what the rotations said
        self.vm.start()
        self.boot_seconds = self.vm.wait_ssh()
        self.inventory()

    def inventory(self, **variables: t.Any) -> Path:
        """Write the inventory anew: the VM with ``variables`` on top, and the controller."""
        path = write_inventory(self.work / "inventory.json", [self.vm])
        found = json.loads(path.read_text())
        found["all"]["hosts"][self.name].update(variables)
        found["all"]["hosts"]["localhost"] = {
            "ansible_connection": "local",
            "ansible_python_interpreter": sys.executable,
        }
        path.write_text(json.dumps(found, indent=1))
        return path

    # -- Ansible ----------------------------------------------------------------------------------------------------

    def _ansible(self, program: str, *words: str) -> tuple[int, str]:
        unwanted = ("ANSIBLE_", "PYTHONPATH")
        environment = {key: value for key, value in os.environ.items() if not key.startswith(unwanted)}
        environment.update(
            ANSIBLE_COLLECTIONS_PATH=COLLECTIONS,
            ANSIBLE_CONFIG=str(self.work / "ansible.cfg"),
            ANSIBLE_HOME=str(self.work / "ansible"),
            ANSIBLE_NOCOLOR="1",
            ANSIBLE_HOST_KEY_CHECKING="True",
        )
        command = [str(Path(sys.executable).with_name(program)), "-i", str(self.work / "inventory.json"), *words]
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="surrogateescape",
            check=False,
            timeout=3600,
        )
        with open(self.work / "ansible.log", "a", encoding="utf-8", errors="backslashreplace") as log:
            log.write(f"\n$ {program} {' '.join(words)}\n{done.stdout}{done.stderr}")
        return done.returncode, done.stdout + done.stderr

    def module(self, name: str, where: str = "", /, **arguments: t.Any) -> Result:
        """Run a module of the collection on the VM (or ``where``); return its result, also when it failed."""
        words = ["-a", json.dumps(arguments)] if arguments else []
        _code, output = self._ansible("ansible", where or self.name, "-m", f"integrity.ima.{name}", *words)
        found = re.search(r"^\S+ \| (\S+) => (\{.*^\})$", output, re.M | re.S)
        assert found, f"no result of {name}:\n{output[-3000:]}"
        result: Result = json.loads(found.group(2))
        # The callback tells these by the word before the arrow.
        return dict(result, failed=found.group(1) == "FAILED!", unreachable=found.group(1) == "UNREACHABLE!")

    def good(self, name: str, where: str = "", /, **arguments: t.Any) -> Result:
        """The same, for what has to succeed."""
        result = self.module(name, where, **arguments)
        assert not result.get("failed") and not result.get("unreachable"), f"{name} failed: {result.get('msg')}"
        return result

    def role(self, entry: str, **variables: t.Any) -> str:
        """Run an entry point of the role ima_snapshot on the VM; return the output."""
        task = {"ansible.builtin.include_role": {"name": "integrity.ima.ima_snapshot", "tasks_from": entry}}
        values = dict(variables, ima_snapshot_store=str(self.store))
        path = self.work / f"{entry}.json"
        path.write_text(json.dumps([{"hosts": self.name, "gather_facts": False, "tasks": [task], "vars": values}]))
        code, output = self._ansible("ansible-playbook", str(path))
        assert code == 0, f"role entry point {entry} failed:\n{output[-3000:]}"
        return output

    def install(self, trim_after: str = "central", busy_timeout: int = 30, shard_records: int = 50000) -> None:
        """Config and spool in one command: what the role's entry point ``install`` makes, without its 30 seconds."""
        self.vm.ssh("mkdir -p /etc/ima && mkdir -m 700 -p /var/lib/ima-snapshot")
        values = {"trim_after": trim_after, "busy_timeout": busy_timeout, "shard_records": shard_records}
        self.vm.put("/etc/ima/snapshot.conf", CONFIG.format(name=self.name, **values).encode())
        self.vm.ssh("sync")  # a power cut is not about this file
        self.good("ima_enroll", store=str(self.store))

    def rotate(self, good: bool = True, **options: t.Any) -> Result:
        """Rotate into the store, and keep count."""
        result = self.module("ima_rotate", store=str(self.store), **options)
        assert not (good and result.get("failed")), f"rotation failed: {result.get('reason')}: {result.get('msg')}"
        if "delivered" in result:
            self.facts["rotations"] += 1
            self.facts["exported"] += result["exported"]
            self.facts["trimmed"] += result["trimmed"]
            self.base += result["trimmed"]
        return result

    def reboot(self) -> float:
        """Reboot the VM: a new boot of IMA."""
        seconds = self.vm.reboot()
        self.base = 0
        return seconds

    def verdict(self) -> Result:
        """Return what ima_verify says of this host."""
        result = self.module("ima_verify", "localhost", store=str(self.store), hosts=[self.name], fail_on=[])
        assert self.name in result.get("hosts", {}), result
        said: Result = result["hosts"][self.name]
        self.facts["verdict"] = said["verdict"]
        self.facts["reason"] = said["reason"]
        return said

    # -- work in the guest ------------------------------------------------------------------------------------------

    def measure(self, count: int, tag: str) -> None:
        """Have ``count`` new files measured."""
        self.vm.python(_MEASURE, str(count), tag)

    # -- checks -----------------------------------------------------------------------------------------------------

    def shards(self, boot_id: str) -> list[Path]:
        """Return the shard files of one boot in the store, in order."""
        return sorted((self.store / "hosts" / self.name / boot_id).glob("*.ima.gz"))

    def history(self, boot_id: str) -> bytes:
        """Return the records of one boot as the store has them, with nothing but gzip."""
        return b"".join(gzip.decompress(path.read_bytes()) for path in self.shards(boot_id))

    def whole(self, capture: Result) -> bytes:
        """Join the store and the kernel's list: the kernel must go on byte for byte where the shards say."""
        saved = self.history(capture["boot_id"])
        at = sum(len(record.raw) for record in records(saved)[: self.base])
        overlap = saved[at:]
        assert capture["list"][: len(overlap)] == overlap, f"the kernel's list does not begin at record {self.base}"
        live: bytes = capture["list"]
        return saved + live[len(overlap) :]

    def check_pcrs(self, capture: Result | None = None, padded: t.Sequence[str] = ()) -> Result:
        """Compare store + live list, replayed, with every PCR that the TPM has; then the same with evmctl."""
        capture = capture or self.vm.capture()
        whole = self.whole(capture)
        matches = {}
        for bank, values in capture["pcrs"].items():
            found = replay(whole, bank, bank in padded)
            for pcr, value in found.items():
                assert values[str(pcr)] == value, f"PCR {pcr} of {bank}: TPM {values[str(pcr)]}, replayed {value}"
            matches[bank] = "match"
        left = len(records(capture["list"]))
        assert left == capture["count"] + capture.get("staged", 0)
        self.facts.update(left=left, pcr10=matches, evmctl=self.evmctl(whole, capture["pcrs"], padded))
        return capture

    def evmctl(self, data: bytes, pcrs: dict[str, dict[str, str]], padded: t.Sequence[str] = ()) -> str:
        """Have evmctl replay a list against PCR values."""
        if not shutil.which("evmctl"):
            return "absent"
        path = self.work / "whole.binary"
        path.write_bytes(data)
        for bank, values in pcrs.items():  # one at a time: it takes two at most
            if bank in padded or bank not in ("sha1", "sha256"):  # 1.4 knows no other bank in a file
                continue
            file = self.work / f"pcrs.{bank}"
            file.write_text("".join(f"PCR-{int(n):02}: {value.upper()}\n" for n, value in values.items()))
            words = ["evmctl", "ima_measurement", "--ignore-violations", "--pcrs", f"{bank},{file}", str(path)]
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
            assert done.returncode == 0 and "Matched per TPM bank" in done.stderr, f"evmctl, {bank}: {done.stderr}"
        return "match"

    def check_quotes(self) -> int:
        """Have tpm2_checkquote check every quote in the store, with values put together here; return how many."""
        folder = self.store / "hosts" / self.name
        identity = json.loads((folder / "identity.json").read_text())
        (self.work / "ak.pem").write_text(identity["ak"])
        quotes = sorted(folder.glob("*/*.quote.json"))
        for path in quotes:
            quote = json.loads(path.read_text())
            signed = (quote[key] for key in ("nonce", "machine_id", "boot_id", "sequence", "manifest"))
            extra = hashlib.sha256("\n".join(["integrity.ima quote 1", *map(str, signed)]).encode()).hexdigest()
            files = {key: self.work / f"quote.{key}" for key in ("attest", "signature")}
            for key, file in files.items():
                file.write_bytes(base64.b64decode(quote[key]))
            words = ["tpm2_checkquote", "-u", "ak.pem", "-m", files["attest"].name, "-s", files["signature"].name]
            words += ["-g", "sha256", "-q", extra]
            done = subprocess.run(words, cwd=self.work, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"tpm2_checkquote refuses {path.name}: {done.stderr}"
            manifest = next(path.parent.glob(f"{quote['sequence']:08d}-*-*.json"))
            assert hashlib.sha256(manifest.read_bytes()).hexdigest() == quote["manifest"], "it follows another shard"
        self.facts["quotes"] = f"{len(quotes)} tpm2_checkquote ok"
        return len(quotes)

    def keylime(self, boot_id: str, pcr10: str) -> str:
        """Have Keylime's verifier replay the stitched ASCII list of a boot up to a value of PCR 10 (SHA-256)."""
        python = os.environ.get("KEYLIME_PYTHON", "")
        if not os.path.exists(python):
            return "absent"
        path = self.work / "stitched.ascii"
        self.good("ima_stitch", "localhost", store=str(self.store), host=self.name, boot_id=boot_id, ascii=str(path))
        words = [python, str(HERE / "keylime_judge.py"), str(path), pcr10]
        done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        assert done.returncode == 0, f"Keylime does not accept the list: {done.stdout}{done.stderr}"
        self.facts["keylime"] = "accepts"
        return "accepts"

    def keep(self, title: str, capture: Result | None = None) -> None:
        """Copy store, live list and PCRs into a directory of ``KERNEL_CAPTURES``, for fixtures; nothing without it."""
        if not os.environ.get("KERNEL_CAPTURES"):
            return
        capture = dict(capture or self.vm.capture(), kernel=self.vm.release, cmdline=self.vm.cmdline, base=self.base)
        name = re.sub(r"[^a-z0-9]+", "-", self.facts["test"][len("test_") :]).strip("-")
        into = Path(os.environ["KERNEL_CAPTURES"]) / f"{name}.{title}"
        shutil.rmtree(into, ignore_errors=True)
        shutil.copytree(self.store, into / "store", ignore=shutil.ignore_patterns(".*"))
        (into / "live.binary").write_bytes(capture.pop("list"))
        (into / "meta.json").write_text(json.dumps(capture, indent=1, sort_keys=True) + "\n")

    def check_stitched(self, boot_id: str = "") -> Result:
        """Compare what ima_stitch writes with the shards, joined by hand."""
        path = self.work / "stitched.binary"
        wanted = {"store": str(self.store), "host": self.name, "boot_id": boot_id, "binary": str(path)}
        result = self.good("ima_stitch", "localhost", **wanted)
        assert path.read_bytes() == self.history(result["boot_id"]), "the stitched list is not the shards in order"
        assert result["records"] == len(records(path.read_bytes()))
        return result


_MEASURE = """
import os, sys
directory = "/root/measured"
os.makedirs(directory, exist_ok=True)
for number in range(int(sys.argv[1])):
    path = "%s/%s-%d" % (directory, sys.argv[2], number)
    with open(path, "w") as file:
        file.write(path)
    with open(path) as file:
        file.read()
"""

__all__ = ["Host", "LabError", "Record", "records", "replay"]
