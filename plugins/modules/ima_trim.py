#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_trim
short_description: Delete saved records from the front of the kernel's IMA measurement list
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Deletes records from the kernel's measurement list, never more than what is sealed in shards, acknowledged as the
    policy C(trim_after) of the config demands, and byte-identical in the kernel and in the shards.
  - The comparison and the deletion happen on one exclusive descriptor. A deletion is never tried again. After any
    doubt the next run finds out by content what the kernel holds.
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.actiongroup_ima
  - integrity.ima._config
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: partial
    details:
      - With O(to=records) each run deletes that many records.
  safe_file_operations:
    support: full
options:
  to:
    description:
      - V(cut) deletes all that may be deleted.
      - V(records) deletes the first O(records) records, and V(anchor) all before an anchor. Both refuse to delete
        anything if they cannot delete all of that.
    type: str
    choices: [cut, records, anchor]
    default: cut
  records:
    description:
      - How many records to delete with O(to=records).
    type: int
  anchor:
    description:
      - Which anchor becomes the first record that is left with O(to=anchor), counted from the newest one, which is
        V(1).
    type: int
    default: 1
  make_anchor:
    description:
      - Makes an anchor first, and seals the records before it, so that it can become the first record that is left.
      - If nothing was measured since the newest anchor, that one is used.
      - What C(trim_after) demands holds for the records before it all the same.
    type: bool
    default: false
seealso:
  - module: integrity.ima.ima_export
  - module: integrity.ima.ima_rotate
"""

EXAMPLES = r"""
- name: Delete what was saved and acknowledged
  integrity.ima.ima_trim:

- name: Leave an anchor as the first record of the list
  integrity.ima.ima_trim:
    to: anchor
    make_anchor: true
"""

RETURN = r"""
trimmed:
  description: The number of records that were deleted, or would be in check mode.
  returned: success
  type: int
  sample: 812
base:
  description: The index of the first record that the kernel still holds.
  returned: success
  type: int
cut:
  description: The index up to which records are sealed in shards.
  returned: success
  type: int
anchor:
  description: The anchor that was made with O(make_anchor=true), else null.
  returned: success
  type: dict
reason:
  description: Why nothing was deleted, as one word.
  returned: failure
  type: str
  sample: not_acknowledged
index:
  description: The index of the first record for which that is so, where there is one.
  returned: failure
  type: int
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._host import trim
from ansible_collections.integrity.ima.plugins.module_utils._module import CONFIG_SPEC, run_on_host


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            CONFIG_SPEC,
            to={"type": "str", "choices": ["cut", "records", "anchor"], "default": "cut"},
            records={"type": "int"},
            anchor={"type": "int", "default": 1},
            make_anchor={"type": "bool", "default": False},
        ),
        required_if=[("to", "records", ["records"])],
        supports_check_mode=True,
    )
    want = {key: module.params[key] for key in ("to", "records", "anchor", "make_anchor")}
    run_on_host(module, lambda config: trim(config, check=module.check_mode, **want))


if __name__ == "__main__":
    main()
