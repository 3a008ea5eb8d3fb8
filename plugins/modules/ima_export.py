#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_export
short_description: Export the kernel's IMA measurement list into sealed shards
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Saves the records that the kernel has measured since the last export as shards in the spool. Each shard is sealed by
    a manifest that names the one before it.
  - Every record is parsed and hashed again on the way, and the list's head is compared with the shards, so that a
    trim by somebody else, a reboot or a kexec is found.
  - Nothing is deleted from the kernel.
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
    support: full
  safe_file_operations:
    support: full
seealso:
  - module: integrity.ima.ima_aggregate
  - module: integrity.ima.ima_trim
  - module: integrity.ima.ima_rotate
"""

EXAMPLES = r"""
- name: Save what was measured since the last time
  integrity.ima.ima_export:
  register: saved

- name: Show how much that was
  ansible.builtin.debug:
    msg: "{{ saved.records }} records in {{ saved.shards | length }} shards"
"""

RETURN = r"""
records:
  description: The number of records that were sealed, or would be in check mode.
  returned: success
  type: int
  sample: 812
cut:
  description: The index up to which records are sealed in shards.
  returned: success
  type: int
base:
  description: The index of the first record that the kernel still holds.
  returned: success
  type: int
more:
  description: Whether more records are waiting.
  returned: success
  type: bool
notes:
  description: What was done about the leftovers of a run that died, and about the stitched lists.
  returned: success
  type: list
  elements: str
shards:
  description: The shards that were sealed, the newest 16 of them.
  returned: success
  type: list
  elements: dict
  contains:
    sequence:
      description: The sequence number.
      type: int
    boot_id:
      description: The UUID of the boot.
      type: str
    first:
      description: The index of the first record.
      type: int
    count:
      description: The number of records.
      type: int
    violations:
      description: The number of violations among them.
      type: int
    size:
      description: The size of the records in bytes.
      type: int
    sha256:
      description: The SHA-256 of the records.
      type: str
    stored_size:
      description: The size of the file in bytes.
      type: int
    stored_sha256:
      description: The SHA-256 of the file.
      type: str
    manifest_sha256:
      description: The SHA-256 of the manifest.
      type: str
reason:
  description: What went wrong, as one word.
  returned: failure
  type: str
  sample: foreign_trim
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._host import export
from ansible_collections.integrity.ima.plugins.module_utils._module import CONFIG_SPEC, run_on_host


def main() -> None:
    module = AnsibleModule(argument_spec=CONFIG_SPEC, supports_check_mode=True)
    run_on_host(module, lambda config: export(config, module.check_mode))


if __name__ == "__main__":
    main()
