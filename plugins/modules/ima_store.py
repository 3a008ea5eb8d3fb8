#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_store
short_description: Check a central store, and prepare it
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Looks whether a place can be a central store for M(integrity.ima.ima_rotate), that is, whether it can be reached,
    is empty or a store already, and refuses to write anything twice. An empty place becomes a store
    (C(format.json)). With O(create) it makes the directory or bucket that is missing.
  - A bucket is created with object lock, which keeps all versions of an object. Nothing is ever removed.
  - Run it on the controller, with the account that the rotations use.
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.actiongroup_stores
  - integrity.ima._store
attributes:
  check_mode:
    support: full
    details:
      - Whether the store refuses to overwrite can only be seen by writing, so check mode does not say it.
  diff_mode:
    support: none
    details:
      - What was found is in the result.
  idempotent:
    support: full
  safe_file_operations:
    support: full
options:
  create:
    description:
      - Whether to make what is missing. For a directory that is itself and the mode 0700, for an SFTP store its
        directory, for a bucket itself, the versioning and the object lock.
    type: bool
    default: false
  lock_days:
    description:
      - For how many days nobody can remove a version of a new object from the bucket. With V(0), the default
        retention of the bucket is left as it is.
    type: int
    default: 0
  lock_mode:
    description:
      - Whether accounts with a special right can remove a locked version (V(GOVERNANCE)), or nobody can
        (V(COMPLIANCE)).
    type: str
    choices: [GOVERNANCE, COMPLIANCE]
    default: GOVERNANCE
  shard_days:
    description:
      - For how many days the store keeps shard files, if a lifecycle of its own removes older ones. Manifests must
        stay. It is recorded in the store, so that M(integrity.ima.ima_verify) can tell an expired shard from a lost
        one.
      - This records the number only. The lifecycle is for you to set. It cannot be changed here later.
    type: int
    default: 0
seealso:
  - module: integrity.ima.ima_rotate
  - module: integrity.ima.ima_verify
"""

EXAMPLES = r"""
- name: Prepare a bucket whose objects nobody can remove for two years
  integrity.ima.ima_store:
    store: s3://ima-evidence/fleet1
    create: true
    lock_days: 730
    lock_mode: COMPLIANCE
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
kind:
  description: The kind of store, which is V(directory), V(sftp) or V(s3).
  returned: success
  type: str
write_once:
  description: Whether the store was seen to refuse a second write. It is null where that was not tried.
  returned: success
  type: bool
versioning:
  description: The versioning of the bucket. It is null for other stores, and if the account may not know it.
  returned: success
  type: str
lock:
  description: The default retention of the bucket, as C(mode) and C(days). It is null where there is none.
  returned: success
  type: dict
fsync:
  description: Whether the SFTP server makes a file durable when asked. It is null if that was not tried.
  returned: success, for an SFTP store
  type: bool
mode:
  description: The mode of the directory before.
  returned: success, for a directory
  type: str
reason:
  description: What went wrong, as one word.
  returned: failure
  type: str
  sample: not_write_once
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._module import run
from ansible_collections.integrity.ima.plugins.module_utils._store._prepare import prepare


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "store": {"type": "str", "required": True},
            "create": {"type": "bool", "default": False},
            "lock_days": {"type": "int", "default": 0},
            "shard_days": {"type": "int", "default": 0},
            "lock_mode": {"type": "str", "choices": ["GOVERNANCE", "COMPLIANCE"], "default": "GOVERNANCE"},
        },
        supports_check_mode=True,
    )
    options = {key: module.params[key] for key in ("create", "lock_days", "lock_mode", "shard_days")}
    run(module, lambda: prepare(module.params["store"], check=module.check_mode, **options))


if __name__ == "__main__":
    main()
