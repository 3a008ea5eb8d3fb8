#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_prune
short_description: Remove from a host the shards that its retention lets go and that the store confirms
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Removes shard files from the host's spool, oldest first, by the limits C(keep_days), C(keep_shards) and
    C(keep_bytes) in the section C(retention) of the host's config. Without a limit there, nothing is removed.
  - A shard is removed only if the store acknowledged it (and the verifier accepted it, where C(trim_after) is
    C(verified)), and if the store, asked now, has the shard and its manifest with the sizes and digests that
    the host knows. The newest shard stays, and so do those whose records the kernel may still hold.
  - Manifests stay, so that the host can always prove its chain. Nothing in the store is ever removed.
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.actiongroup_ima
  - integrity.ima._attributes.actiongroup_stores
  - integrity.ima._config
  - integrity.ima._store
attributes:
  action_group:
    membership:
      - integrity.ima.ima
      - integrity.ima.stores
  check_mode:
    support: full
  diff_mode:
    support: none
    details:
      - The counts are in the result.
  idempotent:
    support: full
  safe_file_operations:
    support: full
  action:
    description: Runs on the controller too.
    support: full
options:
  name:
    description:
      - The name of the host in the store. If this is not given, it is the inventory's name.
    type: str
  _round:
    description:
      - Private. It is filled in by the controller.
    type: dict
seealso:
  - module: integrity.ima.ima_rotate
  - module: integrity.ima.ima_verify
"""

EXAMPLES = r"""
- name: Remove what the store has and retention lets go
  integrity.ima.ima_prune:
    store: /srv/ima
  become: true
"""

RETURN = r"""
pruned:
  description: The number of shard files that were removed, or would be in check mode.
  returned: success
  type: int
kept:
  description: The number of shards whose files stay.
  returned: success
  type: int
reason:
  description: What went wrong, as one word.
  returned: failure
  type: str
  sample: not_confirmed
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._host import prune
from ansible_collections.integrity.ima.plugins.module_utils._module import CONFIG_SPEC, run_on_host


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            CONFIG_SPEC,
            store={"type": "str", "required": True},
            name={"type": "str"},
            _round={"type": "dict"},
        ),
        supports_check_mode=True,
    )
    if module.params["_round"] is None:
        module.fail_json(msg="This module works only together with its action plugin", reason="no_action_plugin")
    confirmed, after = (module.params["_round"][key] for key in ("confirmed", "after"))
    run_on_host(module, lambda config: prune(config, confirmed, module.check_mode, after))


if __name__ == "__main__":
    main()
