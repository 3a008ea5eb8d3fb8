# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

from __future__ import annotations


class ModuleDocFragment:
    # Which central store.
    DOCUMENTATION = r"""
options:
  store:
    description:
      - The central store. An absolute path is a directory of the controller or of a shared mount; it must exist.
      - C(sftp://user@host:port/path) is a directory of an SFTP server. Its host key must be known to the controller,
        and the login is by key or agent. C(?known_hosts=) and C(&key=) name other files than those in C(~/.ssh). It
        needs the Python library paramiko on the controller.
      - C(s3://bucket/prefix) is a bucket of AWS or of any server that speaks S3. C(?endpoint=), C(&region=) and
        C(&profile=) say where it is. What is not given there comes from the environment and the configuration files
        of the AWS tools, and so do the credentials. It needs the Python library botocore on the controller (boto3 has
        it).
    type: str
    required: true
"""

    # For what reads shards.
    KEY = r"""
options:
  key:
    description:
      - The file of a private key, in PEM, that opens encrypted shards. It is needed only where hosts encrypt them.
    type: path
"""
