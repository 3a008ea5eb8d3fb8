#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_enroll
short_description: Make a host's attestation key known to the store
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Makes an attestation key in the host's TPM, if it has none of ours, and records its public part and its name, and
    the public part of the endorsement key, in the store on the controller. From then on M(integrity.ima.ima_rotate)
    asks the host for a quote, and M(integrity.ima.ima_verify) can say V(attested).
  - This is trust on first use. Nothing proves that the first answer came from a genuine TPM, unless you compare the
    recorded endorsement key with what the maker of the host says. A later answer with another key is refused.
  - The host needs tpm2-tools.
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
      - The keys are in the result.
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
seealso:
  - module: integrity.ima.ima_rotate
  - module: integrity.ima.ima_verify
"""

EXAMPLES = r"""
- name: Make the host's attestation key known
  integrity.ima.ima_enroll:
    store: /srv/ima
  become: true
"""

RETURN = r"""
machine_id:
  description: The machine id.
  returned: success
  type: str
ak:
  description: The public part of the attestation key, in PEM. It is empty in check mode if there is no key yet.
  returned: success
  type: str
ak_name:
  description: The TPM's name of the attestation key.
  returned: success
  type: str
ek:
  description: The public part of the endorsement key, in PEM.
  returned: success
  type: str
reason:
  description: What went wrong, as one word.
  returned: failure
  type: str
  sample: identity_changed
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._host import enroll
from ansible_collections.integrity.ima.plugins.module_utils._module import CONFIG_SPEC, run_on_host


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(CONFIG_SPEC, store={"type": "str", "required": True}, name={"type": "str"}),
        supports_check_mode=True,
    )
    run_on_host(module, lambda config: enroll(config, module.check_mode))


if __name__ == "__main__":
    main()
