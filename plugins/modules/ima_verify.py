#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_verify
short_description: Verify the history of hosts in a store
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Reads every shard of a host again, hashes every record, replays from zero to the end of every boot, checks the
    chain of manifests, and compares what the host claimed at earlier rotations (the fleet documents in the store)
    with what is there.
  - Run it where the store is, usually on the controller.
  - V(consistent) means that all of this holds. V(attested) says in addition that a TPM signed it, which needs quotes.
    V(stale) means that it holds, but that the host has not answered for too long. V(broken) names the fault and its
    place.
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.info_module
  - integrity.ima._attributes.actiongroup_stores
  - integrity.ima._store
  - integrity.ima._store.key
options:
  hosts:
    description:
      - The inventory names of the hosts. If this is not given, they are all hosts of the store, and those that its
        fleet documents name.
    type: list
    elements: str
  max_age:
    description:
      - How many seconds ago a host may last have answered without being stale. V(0) means any time.
    type: int
    default: 0
  fail_on:
    description:
      - The verdicts for which the module fails.
    type: list
    elements: str
    choices: [broken, stale, consistent]
    default: [broken]
seealso:
  - module: integrity.ima.ima_rotate
  - module: integrity.ima.ima_stitch
"""

EXAMPLES = r"""
- name: Verify the whole fleet
  integrity.ima.ima_verify:
    store: /srv/ima
    max_age: 172800
    fail_on: [broken, stale]
  delegate_to: localhost
  run_once: true
"""

RETURN = r"""
verdict:
  description: The worst of the verdicts.
  returned: always
  type: str
  sample: consistent
counts:
  description: How many hosts have which verdict.
  returned: always
  type: dict
  sample: {"attested": 0, "broken": 1, "consistent": 2, "stale": 0}
reason:
  description: The reason of the first host for which it fails.
  returned: failure
  type: str
  sample: missing_shard
hosts:
  description: What is said of each host, by inventory name.
  returned: always
  type: dict
  contains:
    verdict:
      description: V(attested), V(consistent), V(stale) or V(broken).
      type: str
    reason:
      description: The fault as one word. It is empty if there is none.
      type: str
    message:
      description: The fault in a sentence.
      type: str
    boot_id:
      description: The boot of the fault, else the newest one.
      type: str
    index:
      description: The index of the first record that is concerned, null if there is no fault.
      type: int
    sequence:
      description: The shard that is concerned.
      type: int
    shards:
      description: The number of shards that were checked.
      type: int
    records:
      description: The number of records in them.
      type: int
    boots:
      description: The number of boots.
      type: int
    emulated:
      description: Whether any of them comes from an emulated kernel.
      type: bool
    aggregate_digest:
      description: The SHA-256 of the newest manifest.
      type: str
    pcrs:
      description: The PCR values at the newest cut.
      type: dict
    seen:
      description: When the host last answered.
      type: str
    sound:
      description: Whether the chain itself is whole and unaltered, whatever the host reported.
      type: bool
    quotes:
      description: The number of quotes that were checked.
      type: int
    expired:
      description: The number of shards whose files the store's lifecycle removed. Their records were not read again.
      type: int
    attested_to:
      description: The index up to which a TPM's quote speaks for the records, null if there is none.
      type: int
    warnings:
      description: What does not change the verdict but should be known.
      type: list
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._module import run
from ansible_collections.integrity.ima.plugins.module_utils._store._open import open_store
from ansible_collections.integrity.ima.plugins.module_utils._verifier import verify_fleet


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "store": {"type": "str", "required": True},
            "key": {"type": "path", "no_log": False},
            "hosts": {"type": "list", "elements": "str"},
            "max_age": {"type": "int", "default": 0},
            "fail_on": {
                "type": "list",
                "elements": "str",
                "choices": ["broken", "stale", "consistent"],
                "default": ["broken"],
            },
        },
        supports_check_mode=True,
    )
    store, hosts, max_age, fail_on = (module.params[key] for key in ("store", "hosts", "max_age", "fail_on"))
    run(module, lambda: verify_fleet(open_store(store, module.params["key"]), hosts, max_age, fail_on))


if __name__ == "__main__":
    main()
