#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_info
short_description: Show what the kernel's IMA measurement list holds and offers
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Shows which way of trimming the kernel offers, how many records of which templates the list holds, which PCR banks
    there are, which boot this is, how far the shards in the spool reach, and who has the list open.
  - It reads the measurement list, and returns counts and digests only, never the file names in it.
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.info_module
  - integrity.ima._attributes.actiongroup_ima
  - integrity.ima._config
seealso:
  - module: integrity.ima.ima_export
"""

EXAMPLES = r"""
- name: Look at the measurement list
  integrity.ima.ima_info:
  register: ima

- name: Warn about hosts whose list grows without being exported
  ansible.builtin.debug:
    msg: "{{ ima.lag }} records are in the kernel only"
  when: ima.lag > 100000
"""

RETURN = r"""
flavour:
  description: What the kernel offers, V(export_only), V(delete_n) or V(staged).
  returned: success
  type: str
  sample: delete_n
emulated:
  description: Whether this is an emulated kernel.
  returned: success
  type: bool
release:
  description: The kernel's release.
  returned: success
  type: str
  sample: 7.3.4+deb13-cloud-amd64
boot_id:
  description: The UUID of this boot.
  returned: success
  type: str
machine_id:
  description: The machine id.
  returned: success
  type: str
reset_count:
  description: The TPM's reset counter, or null if it is not known.
  returned: success
  type: int
name:
  description: The name under which this host's shards are kept.
  returned: success
  type: str
banks:
  description: The PCR banks for which values are computed.
  returned: success
  type: list
  elements: str
  sample: [sha1, sha256]
tpm_banks:
  description: The PCR banks that the TPM has. It is empty without a TPM.
  returned: success
  type: list
  elements: str
count:
  description: The number of records in the live list, as the kernel counts them.
  returned: success
  type: int
held:
  description: The number of records that the kernel holds, those in a staged list included.
  returned: success
  type: int
bytes:
  description: Their size in the binary list with SHA-1 digests.
  returned: success
  type: int
violations:
  description: The number of violations since the boot.
  returned: success
  type: int
templates:
  description: How many records there are of each template.
  returned: success
  type: dict
  sample: {"ima-ng": 90, "ima-sig": 1}
trim_after:
  description: The policy of when records may leave the kernel.
  returned: success
  type: str
  sample: central
cut:
  description: The index up to which records are sealed in shards. It is null if there is no usable spool.
  returned: success
  type: int
base:
  description: The index of the first record that the kernel still holds. It is null if there is no usable spool.
  returned: success
  type: int
lag:
  description: The number of records that no shard holds yet. It is null if that cannot be told.
  returned: success
  type: int
sequence:
  description: The sequence number of the newest shard, V(0) if there is none. It is null if the spool cannot be used.
  returned: success
  type: int
generation:
  description: The generation counter of the spool. It is null if the spool cannot be used.
  returned: success
  type: int
holders:
  description: The processes that have a measurement list open.
  returned: success
  type: list
  elements: dict
  contains:
    pid:
      description: The process id.
      type: int
    command:
      description: The name of the command.
      type: str
fault:
  description: Why nothing is deleted in this boot, or why the spool does not fit the list. It is null if all is well.
  returned: success
  type: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._host import info
from ansible_collections.integrity.ima.plugins.module_utils._module import CONFIG_SPEC, run_on_host


def main() -> None:
    module = AnsibleModule(argument_spec=CONFIG_SPEC, supports_check_mode=True)
    run_on_host(module, info)


if __name__ == "__main__":
    main()
