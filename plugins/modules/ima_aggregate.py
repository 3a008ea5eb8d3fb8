#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_aggregate
short_description: Show the aggregate of a measurement list, and have it measured as an anchor
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Shows the PCR values that replaying all records before the cut gives, per PCR and bank, with the counts and the
    digest that commits to the host's whole history.
  - With O(anchor) it has the kernel measure a file that holds the aggregate, so that the aggregate's digest becomes a
    record of the list and a part of PCR 10.
  - With O(path) it replays a saved list instead, binary or ASCII. Digest size and byte order are found out.
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.actiongroup_ima
  - integrity.ima._config
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
    details:
      - The aggregate is in the result. The anchor is a file that is new each time.
  idempotent:
    support: full
  safe_file_operations:
    support: full
options:
  anchor:
    description:
      - Writes a file with the aggregate, has the kernel measure it, and looks for its record in the list.
      - An anchor that was made at this very cut before is found again.
    type: bool
    default: false
  path:
    description:
      - The path of a saved measurement list on the host.
    type: path
  banks:
    description:
      - The PCR banks for which the saved list is replayed.
      - If this is not given, they are the banks of O(expect) and O(start), else V(sha1) and V(sha256).
    type: list
    elements: str
    choices: [sha1, sha256, sha384, sha512]
  start:
    description:
      - The PCR values before the first record of the saved list, by PCR number and bank. What is not given is zero.
    type: dict
  expect:
    description:
      - PCR values that the saved list must reach, by PCR number and bank. It fails if it never reaches them all at
        once.
      - Banks other than SHA-1 are tried as a kernel extends them and as one that pads SHA-1 digests does.
    type: dict
seealso:
  - module: integrity.ima.ima_export
  - module: integrity.ima.ima_verify
"""

EXAMPLES = r"""
- name: Show the aggregate at the cut
  integrity.ima.ima_aggregate:
  register: aggregate

- name: Bind the aggregate to PCR 10
  integrity.ima.ima_aggregate:
    anchor: true

- name: Check a saved list against the TPM's value
  integrity.ima.ima_aggregate:
    path: /var/tmp/binary_runtime_measurements
    expect:
      "10":
        sha256: "{{ pcr10 }}"
"""

RETURN = r"""
records:
  description: The number of records before the cut of all boots in the spool, or in the saved list.
  returned: success
  type: int
violations:
  description: The number of violations among those of this boot, or of the saved list.
  returned: success
  type: int
pcrs:
  description: The PCR values, by PCR number and bank.
  returned: success
  type: dict
  sample: {"10": {"sha1": "9be8d1ae6f94b0aaaa5ab1f6d9f1ea1ea7a1d7ad"}}
padded:
  description: The banks that are extended with the padded SHA-1 digest.
  returned: success
  type: list
  elements: str
sequence:
  description: The sequence number of the newest shard.
  returned: success, without O(path)
  type: int
index:
  description:
    - The index of the cut.
    - If it fails because of a record, the index of that record.
  returned: success, without O(path), or failure
  type: int
boot_id:
  description: The UUID of the boot.
  returned: success, without O(path)
  type: str
machine_id:
  description: The machine id.
  returned: success, without O(path)
  type: str
aggregate_digest:
  description: The SHA-256 of the newest manifest, which commits to the host's whole history.
  returned: success, without O(path)
  type: str
text:
  description: The aggregate in the form of the proposal of 2023.
  returned: success, without O(path)
  type: str
  sample: Snapshot_Attempt_Count=3;sha1:PCR10:9be8d1ae6f94b0aaaa5ab1f6d9f1ea1ea7a1d7ad;
anchor:
  description: The anchor, null if none was asked for.
  returned: success, without O(path)
  type: dict
  contains:
    index:
      description: The index of its record. It is null if the kernel's policy did not measure the file.
      type: int
    bound:
      description: Whether the kernel recorded it.
      type: bool
    sha256:
      description: The SHA-256 of its content.
      type: str
reached_at:
  description: The number of records after which all of O(expect) holds. It is null if nothing was expected.
  returned: success, with O(path)
  type: int
templates:
  description: How many records there are of each template.
  returned: success, with O(path)
  type: dict
digest_size:
  description: The size of the list's template digests in bytes.
  returned: success, with O(path)
  type: int
byte_order:
  description: The list's byte order, V(little) or V(big). It is null for an ASCII list.
  returned: success, with O(path)
  type: str
form:
  description: The list's form, V(binary) or V(ascii).
  returned: success, with O(path)
  type: str
offset:
  description: The offset in bytes of the record because of which it fails.
  returned: failure
  type: int
reason:
  description: What went wrong, as one word.
  returned: failure
  type: str
  sample: digest_mismatch
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._host import aggregate
from ansible_collections.integrity.ima.plugins.module_utils._module import CONFIG_SPEC, run, run_on_host
from ansible_collections.integrity.ima.plugins.module_utils._pcr import BANKS
from ansible_collections.integrity.ima.plugins.module_utils._saved_list import aggregate_saved


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            CONFIG_SPEC,
            anchor={"type": "bool", "default": False},
            path={"type": "path"},
            banks={"type": "list", "elements": "str", "choices": list(BANKS)},
            start={"type": "dict"},
            expect={"type": "dict"},
        ),
        required_by={"banks": ["path"], "start": ["path"], "expect": ["path"]},
        supports_check_mode=True,
    )
    path, banks, start, expect, anchor = (module.params[key] for key in ("path", "banks", "start", "expect", "anchor"))
    if path and anchor:
        module.fail_json(msg="'anchor' cannot be used with 'path'", reason="value")
    if path:
        run(module, lambda: aggregate_saved(path, banks, start, expect))
    run_on_host(module, lambda config: aggregate(config, anchor, module.check_mode))


if __name__ == "__main__":
    main()
