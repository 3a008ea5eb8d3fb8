#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_spool
short_description: Remove the spool of a host whose shards the store has
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Removes the spool with all that is in it, under the exclusive lock, if its newest manifest is the one that
    O(aggregate_digest) names. What another program exported meanwhile is then in no store, and nothing is removed.
  - It asks no store. The entry point C(remove) of the role P(integrity.ima.ima_snapshot#role) delivers what is left,
    has the verifier read the store again, and gives this module what that said.
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.actiongroup_ima
  - integrity.ima._config
attributes:
  check_mode:
    support: full
    details:
      - It does not compare then, since what would be delivered before is still in the spool.
  diff_mode:
    support: none
    details:
      - The counts are in the result.
  idempotent:
    support: full
  safe_file_operations:
    support: full
options:
  state:
    description:
      - There is only this one. A spool is made by the role or by hand, as an empty directory.
    type: str
    choices: [absent]
    required: true
  aggregate_digest:
    description:
      - The SHA-256 of the newest manifest in the store, as M(integrity.ima.ima_verify) returns it.
    type: str
    required: true
  expired:
    description:
      - How many shards expired in the store, as M(integrity.ima.ima_verify) returns it. The records of those are
        nowhere else but in this spool, unless it has pruned them, too.
    type: int
    default: 0
seealso:
  - module: integrity.ima.ima_verify
"""

EXAMPLES = r"""
- name: Remove the spool
  integrity.ima.ima_spool:
    state: absent
    aggregate_digest: "{{ verified.hosts[inventory_hostname].aggregate_digest }}"
    expired: "{{ verified.hosts[inventory_hostname].expired }}"
"""

RETURN = r"""
shards:
  description: How many shards were in the spool.
  returned: success
  type: int
reason:
  description: What went wrong, as one word.
  returned: failure
  type: str
  sample: not_delivered
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._host import remove_spool
from ansible_collections.integrity.ima.plugins.module_utils._module import CONFIG_SPEC, run_on_host


def main() -> None:
    """Run the module."""
    module = AnsibleModule(
        argument_spec=dict(
            CONFIG_SPEC,
            state={"type": "str", "choices": ["absent"], "required": True},
            aggregate_digest={"type": "str", "required": True},
            expired={"type": "int", "default": 0},
        ),
        supports_check_mode=True,
    )
    want = {key: module.params[key] for key in ("aggregate_digest", "expired")}
    run_on_host(module, lambda config: remove_spool(config, check=module.check_mode, **want))


if __name__ == "__main__":
    main()
