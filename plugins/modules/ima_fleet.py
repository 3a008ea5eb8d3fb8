#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_fleet
short_description: Write the fleet document of a rotation, what each host claimed, into the store
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Collects what M(integrity.ima.ima_rotate) found on each host into one JSON document in the store, which
    M(integrity.ima.ima_verify) later compares with the shards. Every host is in it, with its claim or with the reason
    why it is missing.
  - The document is written whole or not at all, beside those of earlier rotations.
  - It runs on the controller alone, once for all hosts.
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.actiongroup_stores
  - integrity.ima._store
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
    details:
      - Each document is new.
  idempotent:
    support: none
    details:
      - Each run writes a document of its own.
  safe_file_operations:
    support: full
  action:
    description: Runs on the controller only.
    support: full
options:
  hosts:
    description:
      - The inventory names of the hosts that the rotation was for.
    type: list
    elements: str
    required: true
  variable:
    description:
      - The name of the variable in which each host's result of M(integrity.ima.ima_rotate) was registered.
    type: str
    default: ima_snapshot_rotation
seealso:
  - module: integrity.ima.ima_rotate
  - module: integrity.ima.ima_verify
"""

EXAMPLES = r"""
- name: Rotate
  integrity.ima.ima_rotate:
    store: /srv/ima
  become: true
  register: ima_snapshot_rotation

- name: Collect what the hosts claimed
  integrity.ima.ima_fleet:
    store: /srv/ima
    hosts: "{{ ansible_play_hosts_all }}"
  run_once: true
"""

RETURN = r"""
run:
  description: The name of the document, without its ending.
  returned: success
  type: str
  sample: 20261121T103000Z-1f9a2c3d
path:
  description: The path of the document on the controller.
  returned: success
  type: str
sha256:
  description: The SHA-256 of the document.
  returned: success
  type: str
present:
  description: The number of hosts with a claim.
  returned: success
  type: int
missing:
  description: The hosts without a claim, and the reason for each.
  returned: success
  type: dict
  sample: {"web3": "unreachable"}
"""
