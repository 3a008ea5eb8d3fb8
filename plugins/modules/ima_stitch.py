#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_stitch
short_description: Write a host's whole IMA measurement list out of a store
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Joins the shards of one boot to the measurement list that the kernel would show if nothing had ever been trimmed,
    byte for byte, so that programs that know nothing of shards (C(evmctl), Keylime) can verify it.
  - Run it where the store is, usually on the controller.
  - Nothing is written unless the host's whole chain is sound and every record hashes and replays as the manifests say.
    A loss that the host itself reported does not forbid it, and is in the result.
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.actiongroup_stores
  - integrity.ima._store
  - integrity.ima._store.key
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
    details:
      - The lists hold file names, which are never shown.
  idempotent:
    support: full
  safe_file_operations:
    support: full
options:
  host:
    description:
      - The inventory name of the host.
    type: str
    required: true
  boot_id:
    description:
      - The UUID of the boot. If this is not given, it is the newest one.
    type: str
    default: ''
  binary:
    description:
      - Where to write the binary list with SHA-1 digests, as C(binary_runtime_measurements).
    type: path
  ascii:
    description:
      - Where to write the ASCII list, as C(ascii_runtime_measurements).
    type: path
seealso:
  - module: integrity.ima.ima_verify
"""

EXAMPLES = r"""
- name: Write the whole lists of a host
  integrity.ima.ima_stitch:
    store: /srv/ima
    host: web1
    binary: /tmp/web1.binary_runtime_measurements
    ascii: /tmp/web1.ascii_runtime_measurements
  delegate_to: localhost
"""

RETURN = r"""
verdict:
  description: The verdict on the host.
  returned: success
  type: str
  sample: consistent
boot_id:
  description: The UUID of the boot, the last one if a kexec carried the list over.
  returned: success
  type: str
records:
  description: The number of records.
  returned: success
  type: int
violations:
  description: The number of violations among them.
  returned: success
  type: int
shards:
  description: The number of shards that were joined.
  returned: success
  type: int
pcrs:
  description: The PCR values to which the list replays, by PCR number and bank.
  returned: success
  type: dict
padded:
  description: The banks that are extended with the padded SHA-1 digest.
  returned: success
  type: list
  elements: str
reason:
  description: Why nothing was written, as one word.
  returned: failure
  type: str
  sample: broken
fault:
  description: The reason of the verdict. It is empty if there is none.
  returned: success or failure
  type: str
  sample: missing_shard
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._module import run
from ansible_collections.integrity.ima.plugins.module_utils._stitch import stitch
from ansible_collections.integrity.ima.plugins.module_utils._store._open import open_store


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "store": {"type": "str", "required": True},
            "key": {"type": "path", "no_log": False},
            "host": {"type": "str", "required": True},
            "boot_id": {"type": "str", "default": ""},
            "binary": {"type": "path"},
            "ascii": {"type": "path"},
        },
        required_one_of=[("binary", "ascii")],
        supports_check_mode=True,
    )
    store, host, boot_id, binary, text = (module.params[key] for key in ("store", "host", "boot_id", "binary", "ascii"))
    run(module, lambda: stitch(open_store(store, module.params["key"]), host, boot_id, binary, text, module.check_mode))


if __name__ == "__main__":
    main()
