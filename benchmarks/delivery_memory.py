# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the controller's memory does while one large shard is delivered, compared with ``ansible -m ping``.

usage: delivery_memory.py [--mib N] [--chunk-bytes N] [--only WORD]

The host is emulated, behind a real sshd of this machine; the stores are a directory, a real SFTP server and SeaweedFS.
The same shard is delivered into each. A figure is the peak resident set of the largest process below one run of
Ansible on the controller's side; what runs on the host is a child of sshd and does not count.
The collection must be importable as ansible_collections.integrity.ima (PYTHONPATH).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(os.path.dirname(HERE), "tests", "stores"))

from servers import ADMIN, Sshd, Weed

GOAL = 1.3
CONFIG = """[snapshot]
name = host
spool = {0}/spool
shard_records = 100000
trim_after = never
[list]
source = emulated
directory = {0}/kernel
"""
ANSIBLE = """[defaults]
host_key_checking = false
forks = 1
local_tmp = {0}/tmp
[ssh_connection]
control_path_dir = {0}/cp
pipelining = true
ssh_args = -F /dev/null -o ControlMaster=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR
"""
# ru_maxrss of children that were waited for, from a process that is small itself
MEASURE = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
if done.returncode:
    sys.exit(done.stdout.decode("utf-8", "replace")[-3000:])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def make_host(directory: str, mib: int) -> int:
    """Make a host with one sealed shard of about ``mib`` MiB that cannot be compressed; return its bytes."""
    from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _host, _protocol
    from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
    from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool

    kernel, config, block = os.path.join(directory, "kernel"), os.path.join(directory, "snapshot.conf"), 256 << 10
    os.mkdir(os.path.join(directory, "spool"))
    with open(config, "w", encoding="utf-8") as file:
        file.write(CONFIG.format(directory))
    os.chmod(config, 0o644)
    _emulated.create(kernel, flavour="delete_n")
    capture = os.path.join(directory, "capture")
    with open(capture, "wb") as saved:
        for number in range(mib * 4):
            buffer = secrets.token_bytes(block)
            fields = [b"sha256:\0" + hashlib.sha256(buffer).digest(), b"random-%d\0" % number, buffer]
            saved.write(ml.encode(10, "ima-buf", fields, ml.SHA1))
    _emulated.feed(kernel, capture=capture)
    os.unlink(capture)
    _host.export(_protocol.load(config), False)
    spool = Spool(os.path.join(directory, "spool"))
    return max(spool.manifest(entry)["stored_size"] for entry in spool.entries)


def measure(command: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """Run Ansible; return MiB and seconds."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], env=environment, capture_output=True, check=False)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)}\n{done.stderr.decode('utf-8', 'replace')}")
    return int(done.stdout) / 1024, time.monotonic() - start


def environment_of(directory: str) -> dict[str, str]:
    """Return the environment in which Ansible runs: this collection, and nobody's settings."""
    from ansible_collections.integrity.ima import plugins

    with open(os.path.join(directory, "ansible.cfg"), "w", encoding="utf-8") as file:
        file.write(ANSIBLE.format(directory))
    collections = os.path.abspath(os.path.join(list(plugins.__path__)[0], *[os.pardir] * 4))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ANSIBLE_", "AWS_"))}
    return dict(
        kept,
        ANSIBLE_CONFIG=os.path.join(directory, "ansible.cfg"),
        ANSIBLE_HOME=os.path.join(directory, "home"),
        ANSIBLE_COLLECTIONS_PATH=collections,
        XDG_STATE_HOME=os.path.join(directory, "state"),
        AWS_ACCESS_KEY_ID=ADMIN[0],
        AWS_SECRET_ACCESS_KEY=ADMIN[1],
        AWS_EC2_METADATA_DISABLED="true",
        AWS_CONFIG_FILE="/dev/null",
        AWS_SHARED_CREDENTIALS_FILE="/dev/null",
    )


def create_bucket(url: str) -> None:
    """Create the bucket, out of this process."""
    code = (
        f"import boto3\nboto3.client('s3', endpoint_url={url!r}, region_name='us-east-1', "
        f"aws_access_key_id={ADMIN[0]!r}, aws_secret_access_key={ADMIN[1]!r}).create_bucket(Bucket='ima')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def run(options: argparse.Namespace, directory: str, weed: Weed, login: Sshd, sftp: Sshd) -> None:
    """Measure ping, then each way of delivery."""
    size = make_host(directory, options.mib)
    environment = environment_of(directory)
    create_bucket(weed.url)
    os.mkdir(os.path.join(directory, "store"))
    inventory = os.path.join(directory, "inventory")
    with open(inventory, "w", encoding="utf-8") as file:
        file.write(
            f"host ansible_host=127.0.0.1 ansible_port={login.port} ansible_user={login.user} "
            f"ansible_ssh_private_key_file={login.root}/key ansible_python_interpreter={sys.executable}\n"
        )
    ansible = [os.path.join(os.path.dirname(sys.executable), "ansible"), "host", "-i", inventory, "-m"]
    floor, _seconds = measure([*ansible, "ansible.builtin.ping"], environment)
    print(
        f"shard {size / (1 << 20):.0f} MiB, chunks of {options.chunk_bytes} bytes; ping: peak {floor:.1f} MiB",
        flush=True,
    )
    bucket = f"endpoint={weed.url}&region=us-east-1"
    wanted = [
        ("directory, controller", os.path.join(directory, "store"), "controller"),
        ("sftp, controller", sftp.store(sftp.new_directory("store")), "controller"),
        ("s3, controller", f"s3://ima/controller?{bucket}", "controller"),
        ("s3, direct", f"s3://ima/direct?{bucket}", "direct"),
    ]
    for name, store, delivery in wanted:
        if options.only and options.only not in name:
            continue
        arguments = (
            f"store={store} delivery={delivery} config={directory}/snapshot.conf chunk_bytes={options.chunk_bytes}"
        )
        peak, took = measure([*ansible, "integrity.ima.ima_rotate", "-a", arguments], environment)
        ratio = peak / floor
        print(
            f"{name}: peak {peak:.1f} MiB, {ratio:.2f} times ping ({'met' if ratio < GOAL else 'MISSED'}: {GOAL}), "
            f"{took:.1f} s",
            flush=True,
        )


def main() -> None:
    """Read the options, start the servers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--mib", type=int, default=200)
    parser.add_argument("--chunk-bytes", type=int, default=524288)
    parser.add_argument("--only", default="", help="deliveries whose names hold this word")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_args: sys.exit(143))
    directory = tempfile.mkdtemp(prefix="ima-delivery-")
    os.mkdir(os.path.join(directory, "s3"))
    weed, login, sftp = Weed(os.path.join(directory, "s3")), Sshd(shell=True), Sshd()
    try:
        weed.start()
        login.start()
        sftp.start()
        run(options, directory, weed, login, sftp)
    finally:
        weed.kill()
        login.remove()
        sftp.remove()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
