# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What goes wrong on real kernels: other readers, sudden death, odd names, violations, kexec, long lists."""

from __future__ import annotations

import json
import os
import time
import typing as t
from pathlib import Path

import pytest
from host import Host, records
from lab import LAB, TCB

Boot = t.Callable[..., Host]
GUEST = Path(__file__).resolve().parent / "guest"
LIST = "/sys/kernel/security/ima/binary_runtime_measurements"
WITHOUT_POLICY = "ima_hash=sha256"


def hold(host: Host) -> str:
    """Start a process in the guest that has the list open for reading; return its pid."""
    program = (
        "import os, time\n"
        f"list = open('{LIST}', 'rb')\n"
        "child = os.fork()\n"
        "if child: print(child, flush=True); os._exit(0)\n"
        "open('/proc/self/comm', 'w').write('list-holder')\n"
        "for descriptor in range(3): os.close(descriptor)\n"
        "time.sleep(3600)\n"
    )
    return host.vm.python(program).strip()


@pytest.mark.parametrize("kernel", ["backports", "staging"])
def test_list_held_open(boot: Boot, kernel: str) -> None:
    """A reader forbids every trim (EBUSY): it is named, nothing is lost, and the next rotation trims."""
    host = boot(kernel)
    host.install(busy_timeout=2)
    pid = hold(host)
    host.measure(10, "held")
    failed = host.rotate(good=False)
    assert failed.get("failed") and failed["reason"] == "list_busy", failed
    assert f"list-holder (pid {pid})" in failed["msg"], failed["msg"]
    assert "list-holder" in [each["command"] for each in host.good("ima_info")["holders"]]
    host.vm.ssh(f"kill {pid}")
    done = host.rotate()
    assert done["trimmed"] >= 10
    host.check_pcrs()
    assert host.verdict()["verdict"] == "attested"


INSTANTS = {
    "backports": ("shard", "before-delete", "after-delete"),
    "staging": ("shard", "before-D", "after-D", "before-delete"),
}


@pytest.mark.parametrize("kernel", ["backports", "staging"])
def test_killed_at_the_worst_instants(boot: Boot, kernel: str) -> None:
    """SIGKILL to the module: the next run recovers, nothing is lost, nothing is counted twice."""
    host = boot(kernel)
    host.install()
    killed = []
    host.vm.ssh("mkdir /root/kill")
    host.vm.put("/root/kill/sitecustomize.py", (GUEST / "killer.py").read_bytes())
    for instant in INSTANTS[kernel]:
        wrapper = f'#!/bin/sh\nKILL_AT={instant} PYTHONPATH=/root/kill exec /usr/bin/python3 "$@"\n'
        host.vm.put("/root/kill/python", wrapper.encode(), 0o755)
        host.measure(10, instant)
        host.inventory(ansible_python_interpreter="/root/kill/python")
        died = host.rotate(good=False)
        assert died.get("failed"), f"{instant}: it should have been killed: {died}"
        journal = json.loads(host.vm.ssh("cat /var/lib/ima-snapshot/journal.json 2>/dev/null || echo '{}'"))
        assert instant == "shard" or journal["trim"], f"{instant}: {journal}"
        if kernel == "staging" and instant in ("shard", "before-D"):
            assert "STAGED" in host.vm.ssh(f"head -c 1 {LIST}_staged | wc -c | sed s,1,STAGED,"), (
                "it died between A and D"
            )
        host.keep(f"killed-{instant}")
        host.inventory()
        host.rotate()
        host.base = host.good("ima_info")["base"]
        host.check_pcrs()
        assert host.verdict()["verdict"] == "attested", instant
        killed.append(instant)
    host.facts["note"] = f"killed at {', '.join(killed)}"


@pytest.mark.kernel("backports")
def test_power_cut(boot: Boot) -> None:
    """QEMU is killed after a rotation: what the disk holds is enough to go on, and the history has no hole in it."""
    host = boot("backports")
    host.install()
    host.measure(10, "before")
    host.rotate()
    host.measure(10, "lost-with-the-power")
    host.vm.kill()
    host.vm.start()
    host.vm.wait_ssh()
    host.inventory()
    host.base = 0
    host.rotate()
    host.check_pcrs()
    said = host.verdict()
    assert (said["verdict"], said["boots"]) == ("attested", 2), said


@pytest.mark.parametrize("kernel", ["bookworm", "trixie"])
def test_old_kernels_open_for_write(boot: Boot, kernel: str) -> None:
    """The 0440 lists of old kernels: root may open them for write, only write() fails. They are told by their mode."""
    host = boot(kernel)
    host.install()
    facts = host.vm.python(
        "import errno, os\n"
        f"path = '{LIST}'\n"
        "print(oct(os.stat(path).st_mode & 0o7777))\n"
        "descriptor = os.open(path, os.O_RDWR)\n"
        "try: os.write(descriptor, b'1\\n')\n"
        "except OSError as error: print(errno.errorcode[error.errno])\n"
    ).split()
    assert facts == ["0o440", "EINVAL"], facts
    count = int(host.vm.ssh("cat /sys/kernel/security/ima/runtime_measurements_count"))
    info = host.good("ima_info")
    host.facts["flavour"] = info["flavour"]
    assert info["flavour"] == "export_only" and info["count"] >= count
    host.rotate()
    refused = host.module("ima_trim")
    assert refused.get("failed") and refused["reason"] == "export_only", refused
    host.check_pcrs()
    assert host.verdict()["verdict"] == "attested"


@pytest.mark.parametrize("kernel", ["bookworm", "backports"])
def test_records_on_another_pcr(boot: Boot, kernel: str) -> None:
    """A rule with ``pcr=11``: both PCRs are followed, in every bank."""
    host = boot(kernel, WITHOUT_POLICY)
    host.install()
    policy = (
        "dont_measure fsmagic=0x9fa0\ndont_measure fsmagic=0x62656572\ndont_measure fsmagic=0x73636673\n"
        "dont_measure fsmagic=0x01021994\n"
        "measure func=FILE_CHECK mask=MAY_READ fowner=4711 pcr=11\n"
        "measure func=BPRM_CHECK\nmeasure func=FILE_CHECK mask=MAY_READ uid=0\n"
    )
    host.vm.ssh("cat > /sys/kernel/security/ima/policy", policy.encode())
    for number in range(2):
        host.measure(5, f"ten-{number}")
        each = "f=/root/eleven/$i; echo $f > $f; chown 4711 $f; cat $f"
        host.vm.ssh(f"mkdir -p /root/eleven; for i in {number}1 {number}2 {number}3; do {each}; done")
        host.rotate()
    capture = host.check_pcrs()
    whole = records(host.whole(capture))
    assert sum(record.pcr == 11 for record in whole) == 6
    said = host.verdict()
    assert said["verdict"] == "attested" and set(said["pcrs"]) == {"10", "11"}, said


NAMES = [b"sp ace", b"new\nline", b"tab\there", b"latin1-\xe9\xff", b"utf8-\xc3\xa4", b'quote"\\back', b"trail "]
NAMES.append(b"n" * 255)
ODD = """
import os, sys
directory = b"/root/odd/"
os.makedirs(directory)
for name in eval(sys.argv[1]):
    with open(directory + name, "wb") as file: file.write(name)
    with open(directory + name, "rb") as file: file.read()
for number in range(2):
    path = directory + b"tomtou%d" % number  # opened for write while a reader that was measured has it
    with open(path, "wb") as file: file.write(path)
    with open(path, "rb") as reader:
        reader.read()
        with open(path, "ab") as writer: writer.write(b"more")
    path = directory + b"writer%d" % number  # opened for read while a writer has it
    with open(path, "wb") as writer:
        writer.write(path)
        writer.flush()
        with open(path, "rb") as reader: reader.read()
deep = directory + b"/".join([b"d" * 200] * 5)
os.makedirs(deep)
with open(deep + b"/file", "wb") as file: file.write(b"deep")
with open(deep + b"/file", "rb") as file: file.read()
"""


@pytest.mark.parametrize("kernel", ["bookworm", "trixie", "backports"])
def test_odd_names_and_violations(boot: Boot, kernel: str) -> None:
    """Any bytes in a path, and violations of both kinds: stitched lists are byte for byte what the kernel shows."""
    host = boot(kernel)
    host.install(trim_after="never")
    host.rotate()
    host.vm.python(ODD, repr(NAMES))
    host.rotate()
    capture = host.check_pcrs()
    whole = records(host.whole(capture))
    paths = [record.path for record in whole]
    for name in NAMES:
        assert b"/root/odd/" + name.replace(b" ", b"_") in paths, name
    assert sum(record.violation for record in whole) == capture["violations"] >= 4
    said = host.verdict()
    assert said["verdict"] == "attested", said
    text = host.work / "stitched.ascii"
    stitched = host.good("ima_stitch", "localhost", store=str(host.store), host=host.name, ascii=str(text))
    assert stitched["violations"] == sum(record.violation for record in whole[: stitched["records"]])
    shown = os.fsencode(host.vm.ssh(f"cat {LIST.replace('binary', 'ascii')}"))
    assert shown.startswith(text.read_bytes()), "the ASCII list is not the kernel's"


@pytest.mark.kernel("backports")
def test_trimmed_by_somebody_else(boot: Boot) -> None:
    """Records that no shard holds are deleted by another program: found, named, nothing is deleted any more."""
    host = boot("backports")
    host.install()
    host.measure(10, "mine")
    host.rotate()
    host.measure(10, "theirs")
    host.vm.ssh(f"echo 5 > {LIST}")
    failed = host.rotate(good=False)
    assert failed.get("failed") and failed["reason"] == "foreign_trim", failed
    host.rotate(good=False)
    host.reboot()
    after = host.rotate(good=False)
    said = host.verdict()
    host.facts["note"] = f"after the reboot: {after.get('reason', 'rotates again')}"
    assert (said["verdict"], said["reason"]) == ("broken", "foreign_trim"), said


@pytest.mark.kernel("backports")
def test_kexec_without_carry_over(boot: Boot) -> None:
    """Debian's kernels start a new list at kexec, while PCR 10 goes on: what was not exported is lost."""
    host = boot("backports")
    host.install()
    host.measure(10, "saved")
    host.rotate()
    host.measure(10, "lost")
    before = host.vm.boot_id()
    kexec(host)
    host.base = 0
    failed = host.rotate(good=False)
    said = host.verdict()
    assert failed.get("failed") and failed["reason"] == "kexec", failed
    assert (said["verdict"], said["reason"], said["boot_id"]) == ("broken", "kexec", before), said
    assert failed["trimmed"] == 0


def kexec(host: Host) -> None:
    """Start the same kernel again without a reset of the machine and its TPM."""
    before = host.vm.boot_id()
    for name in ("vmlinuz", "initrd"):
        host.vm.put(f"/tmp/{name}", (LAB / "kernels" / host.vm.kernel / name).read_bytes())
    host.vm.ssh("kexec -s -l /tmp/vmlinuz --initrd=/tmp/initrd --reuse-cmdline && sync")
    host.vm.ssh("(sleep 1; kexec -e) > /dev/null 2>&1 < /dev/null &")
    host.vm.disconnect()
    host.vm.wait_ssh(not_boot=before)


@pytest.mark.kernel("staging")
def test_kexec_with_carry_over(boot: Boot) -> None:
    """With CONFIG_IMA_KEXEC the next kernel's list begins with what this one still held, staged records first."""
    host = boot("staging")
    host.install()
    host.measure(10, "saved")
    host.rotate()
    host.measure(10, "carried")
    kexec(host)
    host.measure(10, "after")
    count = host.vm.capture()
    carried = [record for record in records(count["list"]) if record.path.startswith(b"/root/measured/carried-")]
    host.facts["note"] = f"{len(carried)} of 10 records carried over"
    assert len(carried) == 10
    host.rotate()
    said = host.verdict()
    assert said["verdict"] == "attested", said


@pytest.mark.parametrize("kernel", ["backports", "staging"])
def test_long_list(boot: Boot, kernel: str) -> None:
    """A long list: what it takes in kernel memory before and after the trim, and how long a rotation takes."""
    size = int(os.environ.get("KERNEL_LONG", "50000"))
    host = boot(kernel, TCB + " ima_flush_htable" * (kernel == "staging"), memory=1024)
    host.install(shard_records=10000)
    host.rotate()
    empty = unreclaimable(host)
    began = time.monotonic()
    for part in range(0, size, 5000):
        host.vm.python(LONG, str(min(5000, size - part)), f"long{part}", timeout=1800)
    measuring = time.monotonic() - began
    full, began = unreclaimable(host), time.monotonic()
    done = host.rotate()
    rotating = time.monotonic() - began
    after = unreclaimable(host)
    host.facts["note"] = (
        f"{size} records in {measuring:.0f} s, rotated in {rotating:.0f} s ({done['rounds']} rounds); "
        f"SUnreclaim {empty} kB empty, {full} kB full, {after} kB trimmed"
    )
    assert done["exported"] >= size and done["trimmed"] >= size
    host.check_pcrs()
    assert host.verdict()["verdict"] == "attested"


LONG = """
import os, sys
directory = "/root/usr/lib/python3/site-packages"
os.makedirs(directory, exist_ok=True)
for number in range(int(sys.argv[1])):
    path = "%s/%s-%06d.py" % (directory, sys.argv[2], number)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(descriptor, path.encode())
    os.close(descriptor)
    os.close(os.open(path, os.O_RDONLY))
    os.unlink(path)
"""


def unreclaimable(host: Host) -> int:
    """Return the kernel's unreclaimable slab memory in kB, with the caches dropped."""
    text = host.vm.ssh("sync; echo 3 > /proc/sys/vm/drop_caches; grep SUnreclaim /proc/meminfo")
    return int(text.split()[1])
