#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_command
short_description: Install the command ima-snapshot on the host
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - C(ima-snapshot) exports the measurement list of its host without a controller, tells how far the shards are behind
    the kernel, writes the whole list as if nothing had ever been trimmed, and verifies the spool.
  - It is one executable file, made on the controller from the library that the modules of this collection use. The host
    needs nothing but its Python. The same collection always makes the same bytes.
  - It works by the host's config, which the role P(integrity.ima.ima_snapshot#role) installs. O(config) is its default
    for C(--config).
extends_documentation_fragment:
  - integrity.ima._attributes
  - integrity.ima._attributes.actiongroup_ima
  - integrity.ima._config
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
    details:
      - Of the file it only says that it differs.
  idempotent:
    support: full
  safe_file_operations:
    support: full
  action:
    description: Runs on the controller too.
    support: full
options:
  path:
    description:
      - The absolute path of the command. Its directory must exist.
    type: path
    default: /usr/local/sbin/ima-snapshot
  interpreter:
    description:
      - The absolute path of the Python that runs the command, version 3.8 or newer, of at most 120 characters and
        without blanks.
      - If this is not given, it is the Python with which Ansible runs modules on the host.
    type: str
  state:
    description:
      - With V(absent) the command is removed, and nothing else.
    type: str
    choices: [present, absent]
    default: present
seealso:
  - module: integrity.ima.ima_export
  - module: integrity.ima.ima_info
"""

EXAMPLES = r"""
- name: Install the command
  integrity.ima.ima_command:
  become: true

- name: Export what is due
  ansible.builtin.command: /usr/local/sbin/ima-snapshot export --due
  register: exported
  changed_when: exported.stdout is not search('nothing is due|exported 0 records')
  become: true
"""

RETURN = r"""
path:
  description: The path of the command.
  returned: success
  type: str
  sample: /usr/local/sbin/ima-snapshot
interpreter:
  description: The Python that runs it.
  returned: when O(state=present)
  type: str
  sample: /usr/bin/python3.11
state:
  description: Whether it is there now.
  returned: success
  type: str
  sample: present
reason:
  description: What went wrong, as one word.
  returned: failure
  type: str
  sample: interpreter
"""

import os
import sys

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils._module import CONFIG_SPEC

VERSION = "import sys; print('%d %d' % sys.version_info[:2])"


def main() -> None:
    """Tell which Python is to run the command, and whether this is root; the action plugin does the rest."""
    module = AnsibleModule(
        argument_spec=dict(
            CONFIG_SPEC,
            path={"type": "path", "default": "/usr/local/sbin/ima-snapshot"},
            interpreter={"type": "str"},
            state={"type": "str", "choices": ["present", "absent"], "default": "present"},
        ),
        supports_check_mode=True,
    )
    path = module.params["interpreter"] or sys.executable
    try:
        code, out, _error = module.run_command([path, "-I", "-c", VERSION], handle_exceptions=False)
        fit = code == 0 and [int(word) for word in out.split()] >= [3, 8]
    except (OSError, ValueError):
        fit = False
    if not fit:
        module.fail_json(msg=f"{path} is not a Python of version 3.8 or newer.", reason="interpreter")
    module.exit_json(changed=False, interpreter=path, root=os.geteuid() == 0)


if __name__ == "__main__":
    main()
