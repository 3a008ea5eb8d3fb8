#!/usr/bin/python
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

DOCUMENTATION = r"""
module: ima_emulator
short_description: Emulate the kernel's IMA measurement lists in a directory
version_added: 0.1.0
author:
  - The integrity.ima authors (@integrity-ima)
description:
  - Creates, feeds and removes an emulated kernel, which is a directory that the other modules of this collection use as
    if it were the securityfs directory of IMA.
  - It answers as Linux 7.3 does, with the same errors, keeps soft PCRs, and can be told to fail.
  - Use it for tests, and for trying out a rotation on hosts whose kernel cannot delete records.
    It protects nothing and attests nothing. Every manifest that is made from it says that it was emulated.
extends_documentation_fragment:
  - integrity.ima._attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: partial
    details:
      - Creating, removing, O(feed), and those values of O(fault) that only set a condition are idempotent.
      - O(feed_capture), O(grow), and the other values of O(fault) happen every time.
  safe_file_operations:
    support: full
options:
  directory:
    description:
      - The directory of the emulated kernel. It is created if it does not exist.
    type: path
    required: true
  state:
    description:
      - V(present) creates the emulated kernel if there is none, and then does what the other options say.
      - V(absent) removes it with all that it recorded. Foreign files in the directory stay.
    type: str
    choices: [present, absent]
    default: present
  flavour:
    description:
      - What the emulated kernel offers. If there is an emulated kernel already, it must have the flavour given here.
      - A new emulated kernel is V(delete_n) if this option is not given.
    type: str
    choices: [export_only, delete_n, staged]
  banks:
    description:
      - The PCR banks of the emulated TPM. An empty list means that there is no TPM.
      - A new emulated kernel has V(sha1) and V(sha256) if this option is not given.
    type: list
    elements: str
    choices: [sha1, sha256, sha384, sha512]
  padded:
    description:
      - Those of the O(banks) that are extended with the SHA-1 template digest, filled with zeros.
    type: list
    elements: str
    choices: [sha256, sha384, sha512]
  template:
    description:
      - The template of new records. A new emulated kernel uses V(ima-ng) if this option is not given.
    type: str
    choices: [ima, ima-ng, ima-sig, ima-ngv2, ima-sigv2, ima-modsig]
  file_hash:
    description:
      - The hash of the content of measured files. A new emulated kernel uses V(sha256) if this option is not given.
    type: str
    choices: [sha1, sha256, sha512]
  capture:
    description:
      - The path of a saved binary measurement list on the host, of any bank and byte order.
      - A new emulated kernel starts with exactly these records. Otherwise it starts with one C(boot_aggregate) record.
    type: path
  feed:
    description:
      - Files and events for the emulated kernel to record. What it has already recorded is not recorded again.
    type: list
    elements: dict
    suboptions:
      path:
        description:
          - The path of the file, or the name of the event if O(feed[].template=ima-buf).
        type: str
        required: true
      content:
        description:
          - The content of the file, or the buffer of the event. The file itself is neither read nor written.
        type: str
        default: ''
      template:
        description:
          - The template of the record. It is that of the emulated kernel if this option is not given.
        type: str
        choices: [ima, ima-ng, ima-sig, ima-ngv2, ima-sigv2, ima-modsig, ima-buf]
      pcr:
        description:
          - The number of the PCR that is extended.
        type: int
        default: 10
  feed_capture:
    description:
      - The path of a saved binary measurement list on the host, of any bank and byte order, all of whose records are
        recorded, even those that have been recorded already.
    type: path
  grow:
    description:
      - How many synthetic records to add. Each of them is unique.
    type: int
    default: 0
  fault:
    description:
      - Something that happens to the emulated kernel, after everything else was done.
      - V(foreign_trim) means that another process deletes the first O(count) records.
      - V(reboot) starts a new boot with a new list and empty PCRs. V(kexec) starts a new kernel with a new list and
        keeps the PCRs. V(kexec_carry_over) does the same and takes the list along.
      - V(suspend) refuses deletions as a kernel does that has begun to reboot. V(resume) ends that.
      - V(phantom_reader) makes the emulated kernel count a reader that does not exist, until the next reboot.
      - V(enoent) lets the next deletion of records fail without deleting anything.
      - V(kill_before_delete), V(kill_after_delete) and V(kill_after_stage) kill the process that next deletes or
        stages, just before or just after it was done.
      - V(lost_reply) does the next deletion, and reports an input/output error all the same.
    type: str
    choices:
      - foreign_trim
      - reboot
      - kexec
      - kexec_carry_over
      - suspend
      - resume
      - phantom_reader
      - enoent
      - kill_before_delete
      - kill_after_delete
      - kill_after_stage
      - lost_reply
  count:
    description:
      - How many records O(fault=foreign_trim) deletes.
    type: int
    default: 1
seealso:
  - module: integrity.ima.ima_info
  - module: integrity.ima.ima_rotate
"""

EXAMPLES = r"""
- name: Emulate a kernel that deletes records
  integrity.ima.ima_emulator:
    directory: /var/lib/ima/emulated
    flavour: delete_n

- name: Let it measure a file and ten thousand others
  integrity.ima.ima_emulator:
    directory: /var/lib/ima/emulated
    feed:
      - path: /usr/bin/true
        content: "true"
    grow: 10000

- name: Continue a real list, on a host with a third PCR bank
  integrity.ima.ima_emulator:
    directory: /var/lib/ima/emulated-capture
    banks: [sha1, sha256, sha384]
    capture: /var/tmp/binary_runtime_measurements

- name: Lose records to another process
  integrity.ima.ima_emulator:
    directory: /var/lib/ima/emulated
    fault: foreign_trim
    count: 3

- name: Remove it
  integrity.ima.ima_emulator:
    directory: /var/lib/ima/emulated
    state: absent
"""

RETURN = r"""
flavour:
  description: What the emulated kernel offers.
  returned: when there is an emulated kernel
  type: str
  sample: delete_n
boot_id:
  description: The identity of the emulated boot.
  returned: when there is an emulated kernel
  type: str
  sample: 40b97169-68fb-46a6-9248-4bb94184235e
machine_id:
  description: The identity of the emulated host.
  returned: when there is an emulated kernel
  type: str
  sample: c31f77053f1047cdb9e9c8404437ef91
count:
  description: The number of records in the live list.
  returned: when there is an emulated kernel
  type: int
  sample: 10002
violations:
  description: The number of violations since the emulated boot.
  returned: when there is an emulated kernel
  type: int
  sample: 0
pcrs:
  description: The soft PCRs that were extended, by number and bank, in lower-case hexadecimal digits.
  returned: when there is an emulated kernel
  type: dict
  sample:
    "10":
      sha1: 51ce4d5865c2baa909ba3abf6d00f23d2343fe54
records_recorded:
  description: The number of records since the emulated boot, those that were deleted included.
  returned: when there is an emulated kernel
  type: int
  sample: 10002
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.integrity.ima.plugins.module_utils import _emulated
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError

_TEMPLATES = ["ima", "ima-ng", "ima-sig", "ima-ngv2", "ima-sigv2", "ima-modsig"]
_PARAMETERS = ("flavour", "banks", "padded", "template", "file_hash", "capture")


def argument_spec() -> dict[str, t.Any]:
    """The options, as DOCUMENTATION describes them."""
    record = {
        "path": {"type": "str", "required": True},
        "content": {"type": "str", "default": ""},
        "template": {"type": "str", "choices": [*_TEMPLATES, "ima-buf"]},
        "pcr": {"type": "int", "default": 10},
    }
    return {
        "directory": {"type": "path", "required": True},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        "flavour": {"type": "str", "choices": ["export_only", "delete_n", "staged"]},
        "banks": {"type": "list", "elements": "str", "choices": ["sha1", "sha256", "sha384", "sha512"]},
        "padded": {"type": "list", "elements": "str", "choices": ["sha256", "sha384", "sha512"]},
        "template": {"type": "str", "choices": _TEMPLATES},
        "file_hash": {"type": "str", "choices": ["sha1", "sha256", "sha512"]},
        "capture": {"type": "path"},
        "feed": {"type": "list", "elements": "dict", "options": record},
        "feed_capture": {"type": "path"},
        "grow": {"type": "int", "default": 0},
        "fault": {"type": "str", "choices": list(_emulated.ACTIONS)},
        "count": {"type": "int", "default": 1},
    }


def main() -> None:
    """One call, one result."""
    module = AnsibleModule(argument_spec=argument_spec(), supports_check_mode=True)
    options = module.params
    request = _emulated.Request(
        {name: options[name] for name in _PARAMETERS},
        feed_capture=options["feed_capture"] or "",
        feed=options["feed"] or (),
        grow=options["grow"],
        fault=options["fault"] or "",
        trim=options["count"],
    )
    try:
        if options["state"] == "absent":
            outcome = _emulated.withdraw(options["directory"], check=module.check_mode)
        else:
            run = _emulated.predict if module.check_mode else _emulated.apply
            outcome = run(options["directory"], request)
    except ImaError as error:
        module.fail_json(**error.result())
    except OSError as error:
        module.fail_json(msg=f"The emulated kernel cannot be changed: {error.strerror}.", reason="io")
    module.exit_json(changed=outcome.changed, diff=outcome.diff(), **outcome.after)


if __name__ == "__main__":
    main()
