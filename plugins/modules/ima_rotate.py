#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_rotate
short_description: Export, deliver to central storage, and trim an IMA measurement list
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Runs the whole cycle for a host. Its records are exported into sealed shards, the shards are delivered to the
    store on the controller, the store's acknowledgement is recorded on the host, and what the policy C(trim_after) of
    the host's config allows is deleted from the kernel.
  - The shards come through the connection in bounded chunks, with any connection plugin and with privilege
    escalation. What a host sends is checked before it is used, and nothing in the store is ever overwritten.
  - A rotation that was interrupted anywhere is taken up by the next one. What the store has is not sent again.
  - The host needs no credentials of the store. It learns the store's name, without logins, files of keys and the like.
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.actiongroup_ima
  - integrity.ima._attributes.actiongroup_stores
  - integrity.ima._config
  - integrity.ima._store
  - integrity.ima._store.key
attributes:
  action_group:
    membership:
      - integrity.ima.ima
      - integrity.ima.stores
  check_mode:
    support: full
  diff_mode:
    support: full
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
      - The name of the host in the store. If this is not given, it is the inventory's name. The config of the host
        must give it the same name.
    type: str
  anchor:
    description:
      - Has the kernel measure the aggregate after the export, and leaves that anchor as the first record of the list.
    type: bool
    default: false
  chunk_bytes:
    description:
      - How many bytes of shards one round trip may bring. Ansible needs about twelve times as much memory for it on
        the controller, for each host that is rotated at the same time.
    type: int
    default: 524288
  delivery:
    description:
      - How shards reach the store.
      - V(controller) takes them through the connection, in chunks of at most O(chunk_bytes). It works with every
        store and needs no way from the host to the store.
      - V(direct) has the host send them itself. For each shard and its manifest the controller signs an address that
        expires after 15 minutes, and at which nothing but these very bytes can be created, once. The host needs a way
        to the store, and neither credentials nor libraries. Proxies and certificate authorities are those of the
        environment (C(HTTPS_PROXY), C(NO_PROXY), C(SSL_CERT_FILE)). It works with C(s3://) stores.
    type: str
    choices: [controller, direct]
    default: controller
  most_bytes:
    description:
      - How many bytes of compressed shards a host may bring in one rotation. What is more is refused.
    type: int
    default: 17179869184
  _round:
    description:
      - Private. It is filled in by the controller.
    type: dict
  _urls:
    description:
      - Private. It is filled in by the controller.
    type: list
    elements: str
    default: []
seealso:
  - module: integrity.ima.ima_export
  - module: integrity.ima.ima_trim
  - module: integrity.ima.ima_fleet
  - module: integrity.ima.ima_verify
"""

EXAMPLES = r"""
- name: Rotate the measurement list into the store
  integrity.ima.ima_rotate:
    store: /srv/ima
  become: true
"""

RETURN = r"""
exported:
  description: The number of records that were sealed, or would be in check mode.
  returned: success
  type: int
trimmed:
  description: The number of records that were deleted from the kernel, or would be if the store takes all.
  returned: success
  type: int
delivered:
  description: The number of shards that the store took.
  returned: success
  type: int
quoted:
  description: Whether the store took a quote of the host's TPM.
  returned: success
  type: bool
rounds:
  description: The number of round trips.
  returned: success
  type: int
flavour:
  description: What the kernel offers.
  returned: success
  type: str
fault:
  description: Why nothing is deleted in this boot. It is null if all is well. The rotation fails when there is one.
  returned: success or failure
  type: dict
claim:
  description: What the host claims at its cut, for the fleet document. It is null if there is no shard yet.
  returned: success
  type: dict
aggregate_digest:
  description: The SHA-256 of the newest manifest in the store.
  returned: success
  type: str
reason:
  description: What went wrong, as one word.
  returned: failure
  type: str
  sample: foreign_trim
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._host import rotate
from ansible_collections.integrity.ima.plugins.module_utils._module import CONFIG_SPEC, run_on_host


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            CONFIG_SPEC,
            store={"type": "str", "required": True},
            name={"type": "str"},
            key={"type": "path", "no_log": False},
            anchor={"type": "bool", "default": False},
            chunk_bytes={"type": "int", "default": 524288},
            delivery={"type": "str", "choices": ["controller", "direct"], "default": "controller"},
            most_bytes={"type": "int", "default": 17179869184},
            _round={"type": "dict"},
            _urls={"type": "list", "elements": "str", "no_log": True, "default": []},
        ),
        supports_check_mode=True,
    )
    if module.params["_round"] is None:
        module.fail_json(msg="This module works only together with its action plugin", reason="no_action_plugin")
    keys = ("anchor", "chunk_bytes")
    params = dict(module.params["_round"], urls=module.params["_urls"], **{key: module.params[key] for key in keys})
    run_on_host(module, lambda config: rotate(config, params, module.check_mode))


if __name__ == "__main__":
    main()
