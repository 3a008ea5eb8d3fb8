# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""VMs of the kernel lab: one of Debian's kernels with IMA and a software TPM under QEMU, reachable with ssh.

usage: lab.py up NAME [--kernel bookworm|trixie|backports|staging] [--cmdline TEXT] [--banks sha1,sha256] [--memory MB]
       lab.py ssh NAME [COMMAND ...] | reboot NAME | kill NAME | down NAME [--purge] | inventory NAME ... | list | clean
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path

LAB = Path(os.environ.get("KERNEL_LAB") or Path.home() / ".cache/integrity-ima/kernel-lab").absolute()
TCB = "ima_policy=tcb ima_hash=sha256"
BANKS = ("sha1", "sha256")
# TCG is used everywhere, so that a run does not depend on /dev/kvm.
MACHINE = "-M pc -accel tcg,tb-size=128 -cpu max -smp 1 -display none -nodefaults".split()


class LabError(Exception):
    """The lab could not do what was asked; says where to look."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _alive(pid: int, word: str) -> bool:
    """Say whether process ``pid`` is still the one that we started: its command line has ``word`` in it."""
    try:
        return word.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


class VM:
    """One VM. Its disk (an overlay) and its TPM live in ``$KERNEL_LAB/vm/NAME`` until :meth:`purge`.

    What is not given is as it was at the last start, or else: the newest kernel, the tcb policy, two banks, 512 MB.
    """

    def __init__(
        self,
        name: str,
        kernel: str | None = None,
        cmdline: str | None = None,
        banks: t.Sequence[str] | None = None,
        memory: int | None = None,
    ) -> None:
        self.name = name
        self.directory = LAB / "vm" / name
        self.console = self.directory / "console.log"
        self.disk = self.directory / "disk.qcow2"
        self._state = self.directory / "state.json"
        known = json.loads(self._state.read_text()) if self._state.exists() else {}
        self.kernel: str = kernel or known.get("kernel", "backports")
        self.cmdline: str = cmdline or known.get("cmdline", TCB)
        self.banks: list[str] = list(banks or known.get("banks", BANKS))
        self.memory: int = memory or known.get("memory", 512)
        self.port: int = known.get("port", 0)
        self.sockets: str = known.get("sockets", "")

    # -- life -------------------------------------------------------------------------------------------------------

    @property
    def release(self) -> str:
        """The release of the kernel that it boots."""
        return (LAB / "kernels" / self.kernel / "release").read_text().strip()

    def running(self) -> bool:
        """Say whether QEMU is alive."""
        return _alive(self._pid("qemu"), f"{self.directory}/")

    def _pid(self, what: str) -> int:
        try:
            return int((self.directory / f"{what}.pid").read_text())
        except (OSError, ValueError):
            return 0

    def start(self) -> VM:
        """Boot it, with the disk and the TPM state that it had, if there are any."""
        if self.running():
            raise LabError(f"{self.name} runs already")
        files = LAB / "kernels" / self.kernel
        if not (files / "vmlinuz").exists() or not (LAB / "root.ext4").exists():
            raise LabError(f"kernel {self.kernel!r} is not in {LAB}: run make kernel-lab")
        (self.directory / "tpm").mkdir(parents=True, exist_ok=True)
        if not self.disk.exists():
            self._tool("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", LAB / "root.ext4", self.disk)
        self.sockets = tempfile.mkdtemp(prefix="kernel-lab-")  # a socket's path is short
        self._start_tpm()
        command_line = f"console=ttyS0 quiet loglevel=4 net.ifnames=0 panic=-1 lab.name={self.name} {self.cmdline}"
        for attempt in range(5):
            self.port = _free_port()
            try:
                self._tool(
                    "qemu-system-x86_64", *MACHINE, "-m", self.memory, "-daemonize",
                    "-pidfile", self.directory / "qemu.pid",
                    "-serial", f"file:{self.console}",
                    "-drive", f"file={self.disk},format=qcow2,if=virtio",
                    "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{self.port}-:22",
                    "-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci",
                    "-chardev", f"socket,id=tpm,path={self.sockets}/tpm",
                    "-tpmdev", "emulator,id=tpm0,chardev=tpm", "-device", "tpm-tis,tpmdev=tpm0",
                    "-kernel", files / "vmlinuz", "-initrd", files / "initrd", "-append", command_line,
                )  # fmt: skip
                break
            except LabError:
                if attempt == 4:
                    raise
                self._start_tpm()
        host_key = " ".join((LAB / "host_key.pub").read_text().split()[:2])
        (self.directory / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {host_key}\n")
        keys = ("kernel", "cmdline", "banks", "memory", "port", "sockets")
        self._state.write_text(json.dumps({key: getattr(self, key) for key in keys}))
        return self

    def _start_tpm(self) -> None:
        """Start swtpm; it ends with QEMU."""
        state = self.directory / "tpm"
        if _alive(self._pid("swtpm"), str(state)):
            return
        if not (state / "tpm2-00.permall").exists():
            banks = ",".join(self.banks)
            self._tool("swtpm_setup", "--tpm2", "--tpmstate", state, "--pcr-banks", banks, "--createek", "--overwrite")
        self._tool(
            "swtpm", "socket", "--tpm2", "--tpmstate", f"dir={state}", "--ctrl", f"type=unixio,path={self.sockets}/tpm",
            "--flags", "startup-clear", "--terminate", "--daemon", "--pid", f"file={self.directory / 'swtpm.pid'}",
            "--log", f"file={self.directory / 'swtpm.log'},level=1",
        )  # fmt: skip

    @staticmethod
    def _tool(*words: t.Any) -> None:
        command = ["nice", "-n", "19", *map(str, words)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode:
            raise LabError(f"{words[0]} failed ({done.returncode}): {done.stdout[-2000:]}")

    def wait_ssh(self, timeout: float = 600, not_boot: str = "") -> float:
        """Wait until it answers (with another boot id than ``not_boot``); return how many seconds that took."""
        began = time.monotonic()
        while time.monotonic() - began < timeout:
            if not self.running():
                raise LabError(f"{self.name} died; the end of {self.console}:\n{self.console_tail()}")
            with contextlib.suppress(LabError):
                boot = self.ssh("cat /proc/sys/kernel/random/boot_id", timeout=60).strip()
                if boot and boot != not_boot:
                    return time.monotonic() - began
                self.disconnect()
            time.sleep(0.5)
        raise LabError(f"{self.name} did not answer in {timeout:.0f} s; {self.console} ends:\n{self.console_tail()}")

    def console_tail(self, lines: int = 15) -> str:
        """Return the last lines of the console."""
        text = self.console.read_text(errors="replace") if self.console.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def boot_id(self) -> str:
        """Return the guest's boot id."""
        return self.ssh("cat /proc/sys/kernel/random/boot_id").strip()

    def reboot(self, timeout: float = 600) -> float:
        """Reboot from inside (the TPM is reset, too); return the seconds until it answers again."""
        before = self.boot_id()
        self.ssh("busybox reboot")
        self.disconnect()
        return self.wait_ssh(timeout, not_boot=before)

    def kill(self) -> None:
        """SIGKILL to QEMU, as a power cut; :meth:`start` boots it again from what reached the disk."""
        pid = self._pid("qemu")
        if _alive(pid, f"{self.directory}/"):
            os.kill(pid, signal.SIGKILL)
        self._gone()

    def stop(self) -> None:
        """Power off from inside; if that takes too long, kill."""
        if self.running():
            with contextlib.suppress(LabError):
                self.ssh("busybox poweroff", timeout=20)
            deadline = time.monotonic() + 20
            while self.running() and time.monotonic() < deadline:
                time.sleep(0.2)
        self.kill()

    def _gone(self) -> None:
        """Wait for QEMU and swtpm to end, and remove what only lives with them."""
        self.disconnect()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and (self.running() or _alive(self._pid("swtpm"), str(self.directory))):
            time.sleep(0.1)
        pid = self._pid("swtpm")
        if _alive(pid, str(self.directory)):
            os.kill(pid, signal.SIGTERM)
        if self.sockets:
            shutil.rmtree(self.sockets, ignore_errors=True)

    def purge(self) -> None:
        """Stop it, and forget its disk and its TPM."""
        self.kill()
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> VM:
        return self

    def __exit__(self, *_unused: t.Any) -> None:
        self.kill()

    # -- talking to it ----------------------------------------------------------------------------------------------

    @property
    def _options(self) -> list[str]:
        options = {
            "ControlMaster": "auto",
            "ControlPersist": "600",
            "ControlPath": f"{self.sockets}/ssh",
            "UserKnownHostsFile": self.directory / "known_hosts",
            "StrictHostKeyChecking": "yes",
            "IdentitiesOnly": "yes",
            "KexAlgorithms": "curve25519-sha256",
            "ConnectTimeout": "30",
            "ServerAliveInterval": "15",
            "ServerAliveCountMax": "8",
            "LogLevel": "ERROR",
        }
        return [word for key, value in options.items() for word in ("-o", f"{key}={value}")]

    @property
    def ssh_command(self) -> list[str]:
        """The words of an ssh command up to the host, for those who want to run it themselves."""
        key = str(LAB / "key")
        return ["ssh", "-F", "none", "-i", key, "-p", str(self.port), *self._options, "root@127.0.0.1"]

    def disconnect(self) -> None:
        """End the shared connection."""
        words = [*self.ssh_command[:-1], "-O", "exit", self.ssh_command[-1]]
        if self.sockets and os.path.exists(f"{self.sockets}/ssh"):
            subprocess.run(words, capture_output=True, check=False, timeout=30)

    def ssh(self, command: str, stdin: bytes = b"", timeout: float = 600, check: bool = True) -> str:
        """Run a shell command in the guest; return what it wrote to stdout, foreign bytes as surrogates."""
        try:
            words = [*self.ssh_command, command]
            done = subprocess.run(words, input=stdin, capture_output=True, timeout=timeout, check=False)
        except subprocess.TimeoutExpired as error:
            raise LabError(f"{self.name}: {command[:200]!r} took more than {timeout:.0f} s") from error
        if check and done.returncode:
            said = done.stderr.decode(errors="replace")[-2000:]
            raise LabError(f"{self.name}: {command[:200]!r} ended with {done.returncode}: {said}")
        return os.fsdecode(done.stdout)

    def python(self, program: str, *arguments: str, timeout: float = 600) -> str:
        """Run a Python program in the guest (nothing is written there); return its stdout."""
        words = " ".join(shlex.quote(each) for each in arguments)
        return self.ssh(f"/usr/bin/python3 - {words}", program.encode(), timeout=timeout)

    def put(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Write a file in the guest; it closes before anybody reads it."""
        self.ssh(f"umask 077; cat > {shlex.quote(path)} && chmod {mode:o} {shlex.quote(path)}", data)

    # -- Ansible ----------------------------------------------------------------------------------------------------

    def host_vars(self) -> dict[str, t.Any]:
        """Return the variables with which Ansible reaches it."""
        return {
            "ansible_host": "127.0.0.1",
            "ansible_port": self.port,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(LAB / "key"),
            "ansible_python_interpreter": "/usr/bin/python3",
            "ansible_ssh_args": shlex.join(["-F", "none", *self._options]),
            "ansible_control_path": f"{self.sockets}/ssh",
            "ansible_pipelining": True,
            "ansible_ssh_retries": 0,
            "ansible_timeout": 120,
        }

    # -- what the kernel says ---------------------------------------------------------------------------------------

    def capture(self) -> dict[str, t.Any]:
        """Return one consistent view: PCRs (bank -> PCR -> hex), count, violations, all records that the kernel holds.

        PCRs are read before and after the list until they agree; nothing is written, so little is measured.
        """
        found: dict[str, t.Any] = json.loads(self.python(_CAPTURE))
        found["list"] = base64.b64decode(found["list"])
        return found


_CAPTURE = """
import base64, glob, json, os
ima, tpm = "/sys/kernel/security/ima/", "/sys/class/tpm/tpm0/"
def text(path):
    with open(path) as file:
        return file.read().strip()
def pcrs():
    banks = sorted(glob.glob(tpm + "pcr-*"))
    return {os.path.basename(bank)[4:]: {str(n): text(f"{bank}/{n}").lower() for n in range(24)} for bank in banks}
def state():
    return pcrs(), int(text(ima + "runtime_measurements_count"))
names = ["binary_runtime_measurements_staged", "binary_runtime_measurements"]
names = [name for name in names if os.path.exists(ima + name)]
for attempt in range(20):
    before = state()
    data = b""
    for name in names:
        with open(ima + name, "rb") as file:
            data += file.read()
    if state() == before:
        break
else:
    raise SystemExit("the list does not come to rest")
found = dict(pcrs=before[0], count=before[1], violations=int(text(ima + "violations")), attempts=attempt + 1)
found.update(boot_id=text("/proc/sys/kernel/random/boot_id"), list=base64.b64encode(data).decode())
print(json.dumps(found))
"""


def inventory(vms: t.Iterable[VM]) -> str:
    """Return an Ansible inventory (JSON, which is YAML) with the VMs in it."""
    return json.dumps({"all": {"hosts": {vm.name: vm.host_vars() for vm in vms}}}, indent=1)


def write_inventory(path: Path, vms: t.Iterable[VM]) -> Path:
    """Write the inventory into a file."""
    path.write_text(inventory(vms) + "\n")
    return path


# -- command line ----------------------------------------------------------------------------------------------------


def known_vms() -> list[VM]:
    """Return the VMs that have a directory."""
    return [VM(path.parent.name) for path in sorted((LAB / "vm").glob("*/state.json"))]


def _up(options: argparse.Namespace) -> None:
    banks = options.banks.split(",") if options.banks else None
    vm = VM(options.name, options.kernel, options.cmdline, banks, options.memory).start()
    seconds = vm.wait_ssh()
    path = write_inventory(vm.directory / "inventory.json", [vm])
    print(f"{vm.name}: {vm.release}, ssh on 127.0.0.1:{vm.port} after {seconds:.1f} s")
    print(f"inventory: {path}\nconsole: {vm.console}")


def _ssh(options: argparse.Namespace) -> None:
    command = VM(options.name).ssh_command
    os.execvp(command[0], [*command, *options.words])


def _list(_options: argparse.Namespace) -> None:
    for vm in known_vms():
        print(f"{vm.name:<20} {vm.kernel:<10} {'up, port ' + str(vm.port) if vm.running() else 'down'}   {vm.cmdline}")


def _clean(_options: argparse.Namespace) -> None:
    """Forget everything that was built, after a look at what it is."""
    for vm in known_vms():
        vm.purge()
    names = "apt kernels stamps vm source root.tar root.ext4 busybox key key.pub host_key.pub"
    for path in [LAB / name for name in names.split()]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if LAB.is_dir() and not list(LAB.iterdir()):
        LAB.rmdir()
    print(f"removed the kernel lab from {LAB}")


def _down(options: argparse.Namespace) -> None:
    vm = VM(options.name)
    vm.stop()
    if options.purge:
        vm.purge()


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, act: t.Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        found = commands.add_parser(name)
        found.set_defaults(act=act)
        if name not in ("list", "clean"):
            found.add_argument("name", **({"nargs": "+"} if name == "inventory" else {}))  # type: ignore[arg-type]
        return found

    up = command("up", _up)
    up.add_argument("--kernel", choices=["bookworm", "trixie", "backports", "staging"])
    up.add_argument("--cmdline", help=f"of the kernel; at first {TCB!r}")
    up.add_argument("--banks", help="of the TPM, with commas; only at the first start")
    up.add_argument("--memory", type=int, help="in MB")
    command("ssh", _ssh).add_argument("words", nargs=argparse.REMAINDER)
    command("reboot", lambda options: print(f"{VM(options.name).reboot():.1f} s"))
    command("kill", lambda options: VM(options.name).kill())
    command("down", _down).add_argument("--purge", action="store_true", help="forget its disk and its TPM, too")
    command("inventory", lambda options: print(inventory(VM(name) for name in options.name)))
    command("list", _list)
    command("clean", _clean)
    options = parser.parse_args()
    try:
        options.act(options)
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
