# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Build the kernel lab: Debian's kernels, an initrd for each, one root file system, one key.

usage: build.py [--update] [KERNEL ...]      KERNEL: bookworm trixie backports (default: these three), staging

Everything comes from the mirror that this machine's own apt uses, through a private apt directory, and goes into
``$KERNEL_LAB`` (default ``~/.cache/integrity-ima/kernel-lab``). What is there is not made again: ``--update`` looks for
newer kernels. Nothing outside that directory is touched, but for tools that root lets apt-get install.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import time
import typing as t
from pathlib import Path

from lab import LAB, LabError, known_vms

HERE = Path(__file__).resolve().parent
# program: Debian package
TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "qemu-img": "qemu-utils",
    "swtpm": "swtpm",
    "swtpm_setup": "swtpm-tools",
    "evmctl": "ima-evm-utils",
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "ssh-keygen": "openssh-client",
}
STAGING_TOOLS = {"gcc": "gcc", "make": "make", "flex": "flex", "bison": "bison", "bc": "bc", "xz": "xz-utils"}
STAGING_HEADERS = {"/usr/include/libelf.h": "libelf-dev", "/usr/include/openssl/opensslv.h": "libssl-dev"}
SUITES = {"bookworm": "bookworm", "trixie": "trixie", "backports": "trixie-backports", "staging": "trixie-backports"}
KERNELS = ("bookworm", "trixie", "backports")
MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_rng", "ext4")
ROOT_SUITE = "trixie"
ROOT_PACKAGES = "python3 openssh-server tpm2-tools iproute2 attr busybox-static kexec-tools"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"


def run(*command: t.Any, **options: t.Any) -> str:
    """Run a program at the lowest priority; return what it printed."""
    words = ["nice", "-n", "19", *map(str, command)]
    pipe: dict[str, t.Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done: subprocess.CompletedProcess[str] = subprocess.run(words, check=False, **pipe, **options)
    if done.returncode:
        raise LabError(f"{' '.join(words[3:])[:300]} failed ({done.returncode}):\n{done.stdout[-3000:]}")
    return done.stdout


def megabytes(path: Path) -> str:
    """Return the room that a file or directory takes."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return f"{sum(each.lstat().st_blocks * 512 for each in files) / 1e6:.1f} MB"


class Step:
    """A step whose result stays: skipped while the stamp says that it was made from the same inputs."""

    def __init__(self, name: str, result: Path, *inputs: str) -> None:
        self.name, self.result = name, result
        self.stamp = LAB / "stamps" / name
        self.key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()

    def needed(self) -> bool:
        """Say whether it has to be done, and say so to the user."""
        made = self.stamp.exists() and self.stamp.read_text() == self.key and self.result.exists()
        if made:
            print(f"  have  {self.name:<18} {megabytes(self.result):>10}")
        else:
            print(f"  make  {self.name} ...", flush=True)
            self.began = time.monotonic()
            self.stamp.unlink(missing_ok=True)
        return not made

    def done(self, more: str = "") -> None:
        """Remember that it is done."""
        self.stamp.parent.mkdir(parents=True, exist_ok=True)
        self.stamp.write_text(self.key)
        seconds = time.monotonic() - self.began
        print(f"  made  {self.name:<18} {megabytes(self.result):>10} {seconds:6.1f} s  {more}", flush=True)


# -- tools and mirror ------------------------------------------------------------------------------------------------


def install_tools(staging: bool) -> None:
    """Install what is missing, as root; else say what it is."""
    tools = dict(TOOLS, **(STAGING_TOOLS if staging else {}))
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    missing = {package for tool, package in tools.items() if not shutil.which(tool, path=path)}
    missing |= {package for file, package in STAGING_HEADERS.items() if staging and not find_header(file)}
    missing |= {"debian-archive-keyring"} if not os.path.exists(KEYRING) else set()
    if not missing:
        return
    names = " ".join(sorted(missing))
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LabError(f"missing packages: {names}\nInstall them: apt-get install {names}")
    print(f"  apt-get install {names}", flush=True)
    run("apt-get", "update", "-q")
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    run("apt-get", "install", "-q", "-y", "--no-install-recommends", *sorted(missing), env=environment)


def find_header(file: str) -> bool:
    """Say whether a header is installed (Debian has some of them in a directory of the architecture)."""
    directory, name = file.split("/include/")
    return any((Path(directory) / "include" / each / name).exists() for each in ("", "x86_64-linux-gnu"))


def mirrors() -> dict[str, str]:
    """Return the archives that this machine's apt uses, by label: ``Debian``, perhaps ``Debian-Security``."""
    chosen = os.environ.get("KERNEL_LAB_MIRROR")
    if chosen:
        return {"Debian": chosen}
    if not shutil.which("apt-get"):
        raise LabError("there is no apt-get here: name a Debian mirror with KERNEL_LAB_MIRROR=URI")
    found: dict[str, str] = {}
    for line in run("apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)").splitlines():
        origin, _bar, rest = line.partition("|")
        label, _bar, uri = rest.partition("|")
        if origin == "Debian" and uri:
            found.setdefault(label, uri)
    if "Debian" not in found:
        raise LabError("apt-get indextargets names no Debian archive: run apt-get update, or set KERNEL_LAB_MIRROR=URI")
    return found


def sources(suite: str) -> list[str]:
    """Return the lines of a sources.list for one suite, with its security updates where this machine has them."""
    archives = mirrors()
    lines = [f"deb [signed-by={KEYRING}] {archives['Debian']} {suite} main"]
    if "Debian-Security" in archives and not suite.endswith("-backports"):
        lines.append(f"deb [signed-by={KEYRING}] {archives['Debian-Security']} {suite}-security main")
    return lines


class Apt:
    """An apt of its own for one suite: the machine's own state is neither read nor changed."""

    def __init__(self, suite: str) -> None:
        self.directory = LAB / "apt" / suite
        for name in ("lists/partial", "cache/archives/partial"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        (self.directory / "sources.list").write_text("\n".join(sources(suite)) + "\n")
        settings = {
            "Dir::Etc::sourcelist": self.directory / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State::lists": self.directory / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": self.directory / "cache",
            "APT::Architecture": "amd64",
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Debug::NoLocking": "1",
        }
        self.options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]

    def update(self, afresh: bool) -> None:
        """Fetch the package lists, unless there are some already."""
        if afresh or not list((self.directory / "lists").glob("*Packages*")):
            run("apt-get", *self.options, "update", "-q")

    def depends(self, package: str) -> list[str]:
        """Return the names that the newest version depends on."""
        text = run("apt-cache", *self.options, "show", "--no-all-versions", package)
        found = re.search(r"^Depends: (.*)$", text, re.M)
        return re.findall(r"(?:^|, |\| )([a-z0-9][a-z0-9.+-]+)", found.group(1)) if found else []

    def closure(self, package: str, wanted: str) -> list[str]:
        """Return ``package`` and those below it whose names match ``wanted``."""
        found, todo = [], [package]
        while todo:
            name = todo.pop()
            if name not in found:
                found.append(name)
                todo += [each for each in self.depends(name) if re.match(wanted, each)]
        return found

    def download(self, packages: t.Sequence[str], directory: Path) -> list[Path]:
        """Download packages, checked against the signed lists."""
        directory.mkdir(parents=True, exist_ok=True)
        run("apt-get", *self.options, "download", *packages, cwd=directory)
        return sorted(directory.glob("*.deb"))


# -- kernels ---------------------------------------------------------------------------------------------------------


def kernel(label: str, update: bool) -> None:
    """Take vmlinuz and the few modules out of Debian's cloud kernel of one suite."""
    result = LAB / "kernels" / label
    step = Step(f"kernel-{label}", result, SUITES[label], *MODULES)
    if update:
        step.stamp.unlink(missing_ok=True)
    if not step.needed():
        return
    apt = Apt(SUITES[label])
    apt.update(update)
    with tempfile.TemporaryDirectory(dir=LAB) as scratch:
        names = apt.closure("linux-image-cloud-amd64", r"linux-(image|binary|modules)-[0-9]")
        for deb in apt.download(names, Path(scratch) / "debs"):
            run("dpkg-deb", "-x", deb, Path(scratch) / "tree")
        tree = Path(scratch) / "tree"
        # Before 7.1 the image is in boot, since then it lies beside its modules.
        modules = next(each for each in (*tree.glob("usr/lib/modules/*"), *tree.glob("lib/modules/*")))
        image = next(each for each in (*tree.glob("boot/vmlinuz-*"), *modules.glob("vmlinuz*")))
        config = next(iter((*tree.glob("boot/config-*"), *modules.glob("config"))), None)
        publish(result, modules.name, image, modules, config)
    step.done(" ".join((result / "release").read_text().split()))


def publish(result: Path, release: str, image: Path, modules: Path | None, config: Path | None) -> None:
    """Put a kernel and the modules of its initrd where the VMs look for them, all at once."""
    new = result.with_name(result.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    (new / "modules").mkdir(parents=True)
    shutil.copy(image, new / "vmlinuz")
    if config:
        shutil.copy(config, new / "config")
    (new / "release").write_text(release + "\n")
    for number, (name, data) in enumerate(with_dependencies(modules, MODULES) if modules else []):
        (new / "modules" / f"{number:02}-{name}.ko").write_bytes(data)
    shutil.rmtree(result, ignore_errors=True)
    new.rename(result)


def initrds() -> None:
    """Make the initrd of every kernel that is there; that takes no time, so it is always done."""
    for kernel_directory in sorted((LAB / "kernels").glob("*/vmlinuz")):
        result = kernel_directory.with_name("initrd")
        data = initrd(sorted(result.with_name("modules").glob("*.ko")))
        if not result.exists() or result.read_bytes() != data:
            new = result.with_name("initrd.new")
            new.write_bytes(data)
            new.rename(result)


def with_dependencies(directory: Path, names: t.Iterable[str]) -> list[tuple[str, bytes]]:
    """Return modules in the order in which they have to be loaded; those that are built in are left out."""
    files = {}
    for path in directory.rglob("*.ko*"):
        files[path.name.split(".ko")[0].replace("-", "_")] = path
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        path = files.get(name)
        if name in found or path is None:
            return
        data = path.read_bytes()
        data = lzma.decompress(data) if path.suffix == ".xz" else data
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in depends.group(1).decode().split(",") if depends else []:
            add(other.replace("-", "_"))
        found[name] = data

    for name in (*names, "crc32c_generic"):
        add(name)
    return list(found.items())


def initrd(modules: list[Path]) -> bytes:
    """Return an initrd (cpio, newc) that loads the modules and mounts the disk."""
    file, link, directory = stat.S_IFREG | 0o755, stat.S_IFLNK | 0o777, stat.S_IFDIR | 0o755
    entries: list[tuple[str, int, bytes, int]] = [
        *((name, directory, b"", 0) for name in ("bin", "dev", "proc", "mod", "root")),
        ("dev/console", stat.S_IFCHR | 0o600, b"", os.makedev(5, 1)),
        ("bin/busybox", file, (LAB / "busybox").read_bytes(), 0),
        ("bin/sh", link, b"busybox", 0),
        ("init", file, (HERE / "guest/initrd-init.sh").read_bytes(), 0),
        *((f"mod/{path.name}", file, path.read_bytes(), 0) for path in modules),
        ("TRAILER!!!", 0, b"", 0),
    ]
    archive = b"".join(cpio_entry(number, *entry) for number, entry in enumerate(entries, 1))
    return gzip.compress(archive, 6, mtime=0)


def cpio_entry(inode: int, name: str, mode: int, data: bytes, device: int) -> bytes:
    """Return one member of a newc archive."""
    # inode mode uid gid nlink mtime size, device of the file, of the special file, length of the name, checksum
    fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, os.major(device), os.minor(device), len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
    return head + b"\0" * (-len(head) % 4) + data + b"\0" * (-len(data) % 4)


# -- a kernel with CONFIG_IMA_STAGING --------------------------------------------------------------------------------


def staging(update: bool) -> None:
    """Build Debian's newest backported source with CONFIG_IMA_STAGING=y, without a patch."""
    result = LAB / "kernels" / "staging"
    wanted = (HERE / "staging.config").read_text()
    step = Step("kernel-staging", result, wanted)
    if update:
        step.stamp.unlink(missing_ok=True)
    if not step.needed():
        return
    apt = Apt(SUITES["staging"])
    apt.update(update)
    source = apt.closure("linux-source", r"linux-source-[0-9]")[-1]
    work = LAB / "source"
    tree = work / source
    if not (tree / ".unpacked").exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for deb in apt.download([source], work / "debs"):
            run("dpkg-deb", "-x", deb, work / "tree")
        run("tar", "-xf", work / f"tree/usr/src/{source}.tar.xz", "-C", work)
        shutil.rmtree(work / "tree")
        shutil.rmtree(work / "debs")
        (tree / ".unpacked").touch()
        print(f"        {source}: {megabytes(work)} unpacked", flush=True)
    (tree / "allnoconfig.base").write_text(wanted)
    run("make", "-C", tree, "allnoconfig", f"KCONFIG_ALLCONFIG={tree}/allnoconfig.base")
    got = (tree / ".config").read_text()
    # What another version of the source may have renamed: everything that is asked for must have been taken.
    for word in re.findall(r"^CONFIG_(\w+)=y$", wanted, re.M):
        if f"CONFIG_{word}=y" not in got:
            raise LabError(f"the configuration lost CONFIG_{word}=y: see {tree}/.config")
    print(f"        make bzImage: about 12 minutes on two idle cores; log in {work}/log", flush=True)
    with open(work / "log", "w", encoding="utf-8") as log:
        words = ["nice", "-n", "19", "make", "-C", str(tree), f"-j{os.cpu_count() or 1}", "bzImage"]
        if subprocess.run(words, stdout=log, stderr=subprocess.STDOUT, check=False).returncode:
            raise LabError(f"the kernel did not build: see {work}/log")
    release = (tree / "include/config/kernel.release").read_text().strip()
    publish(result, release, tree / "arch/x86/boot/bzImage", None, tree / ".config")
    shutil.rmtree(work)
    step.done(release)


# -- root file system ------------------------------------------------------------------------------------------------


def root(update: bool) -> None:
    """Make the root file system: Debian's packages, busybox as init, one host key, one user key."""
    tar = LAB / "root.tar"
    step = Step("root-packages", tar, ROOT_SUITE, ROOT_PACKAGES)
    if update:
        step.stamp.unlink(missing_ok=True)
    if step.needed():
        options = [f"--dpkgopt=path-exclude=/usr/share/{name}/*" for name in ("man", "doc", "locale", "info")]
        options += [f"--include={','.join(ROOT_PACKAGES.split())}", '--aptopt=Acquire::Languages "none"']
        run("mmdebstrap", "--variant=minbase", *options, ROOT_SUITE, tar, *sources(ROOT_SUITE))
        step.done()
    image = LAB / "root.ext4"
    guest = [(HERE / "guest" / name).read_text() for name in ("rc.sh", "inittab", "sshd_config")]
    step = Step("root-image", image, hashlib.sha256(tar.read_bytes()).hexdigest(), *guest)
    if not step.needed():
        return
    running = [each for each in known_vms() if each.running()]
    if running:
        raise LabError(f"VMs run on the root file system that is to be replaced: {', '.join(v.name for v in running)}")
    shutil.rmtree(LAB / "vm", ignore_errors=True)  # overlays of the old one
    key = LAB / "key"
    if not key.exists():
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "kernel-lab", "-f", key)
    with tempfile.TemporaryDirectory(dir=LAB) as scratch:
        tree = Path(scratch) / "root"
        tree.mkdir()
        run("tar", "-C", tree, "--numeric-owner", "-xpf", tar, "--exclude=./dev/*")
        furnish(tree, key)
        new = Path(scratch) / "root.ext4"
        # No checksums: bookworm's initrd would need another module for them.
        run("/sbin/mke2fs", "-q", "-F", "-t", "ext4", "-O", "^metadata_csum", "-L", "lab", "-d", tree, new, "2G")
        shutil.copy(tree / "usr/bin/busybox", LAB / "busybox")
        new.rename(image)
    step.done()


def furnish(tree: Path, key: Path) -> None:
    """Make the tree of packages a machine: init, network, sshd with keys."""
    init = tree / "usr/sbin/init"
    init.unlink(missing_ok=True)
    init.symlink_to("/usr/bin/busybox")
    for name, target in (("inittab", "etc/inittab"), ("rc.sh", "etc/lab-rc"), ("sshd_config", "etc/ssh/sshd_config")):
        shutil.copy(HERE / "guest" / name, tree / target)
        (tree / target).chmod(0o644)
    for old in (tree / "etc/ssh").glob("ssh_host_*"):
        old.unlink()
    run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", tree / "etc/ssh/ssh_host_ed25519_key")
    shutil.copy(tree / "etc/ssh/ssh_host_ed25519_key.pub", LAB / "host_key.pub")
    (tree / "root/.ssh").mkdir(exist_ok=True)
    (tree / "root/.ssh").chmod(0o700)
    shutil.copy(f"{key}.pub", tree / "root/.ssh/authorized_keys")
    (tree / "etc/machine-id").write_text("")  # each VM makes its own
    shutil.rmtree(tree / "var/lib/apt/lists", ignore_errors=True)
    shutil.rmtree(tree / "var/cache/apt", ignore_errors=True)


def main() -> int:
    """Build what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--update", action="store_true", help="look for newer packages")
    options = parser.parse_args()
    options.kernels = options.kernels or list(KERNELS)
    if not set(options.kernels) <= set(SUITES):
        parser.error(f"the kernels are {', '.join(SUITES)}")
    began = time.monotonic()
    print(f"kernel lab in {LAB}")
    try:
        LAB.mkdir(parents=True, exist_ok=True)
        install_tools("staging" in options.kernels)
        if os.geteuid() != 0 and not (LAB / "root.ext4").exists():
            raise LabError("run this as root: the files of the root file system belong to root")
        root(options.update)
        for label in options.kernels:
            if label == "staging":
                staging(options.update)
            else:
                kernel(label, options.update)
        initrds()
    except LabError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"kernel lab: {megabytes(LAB)} in {LAB}, {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
