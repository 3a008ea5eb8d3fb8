# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: PYTHONPATH=tests/stores serve.py DIRECTORY: the servers of the store tests on loopback, until SIGTERM.

Their stores' addresses are in DIRECTORY/stores.json once they answer.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile

import boto3
from servers import ADMIN, Sshd, Weed

(directory,) = sys.argv[1:]
signal.signal(signal.SIGTERM, lambda *_unused: sys.exit())
root = tempfile.mkdtemp(prefix="ima-s3-")
sshd, weed = Sshd(), Weed(root)
try:
    sshd.start()
    weed.start()
    keys = {"aws_access_key_id": ADMIN[0], "aws_secret_access_key": ADMIN[1], "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=weed.url, **keys).create_bucket(Bucket="fleet")
    stores = {
        "sftp": sshd.store(sshd.new_directory("store")),
        "s3": f"s3://fleet?endpoint={weed.url}&region=us-east-1",
    }
    with open(f"{directory}/stores.new", "w", encoding="utf-8") as file:
        json.dump(stores, file)
    os.rename(f"{directory}/stores.new", f"{directory}/stores.json")
    signal.pause()
finally:
    sshd.remove()
    weed.kill()
    shutil.rmtree(root, ignore_errors=True)
