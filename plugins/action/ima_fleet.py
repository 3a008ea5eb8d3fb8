# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Writes what the hosts claimed at a rotation into the store, as one document."""

from __future__ import annotations

import hashlib
import os
import typing as t

from ansible.plugins.action import ActionBase

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._fleet import document, member, new_run
from ansible_collections.integrity.ima.plugins.module_utils._module import failure_of
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._store._open import open_store


class ActionModule(ActionBase):
    """The action plugin of ``integrity.ima.ima_fleet``; it never connects to a host."""

    _supports_check_mode = True
    _supports_async = False
    _requires_connection = False
    TRANSFERS_FILES = False

    def run(self, tmp: t.Any = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Write the document."""
        super().run(tmp, task_vars)
        _validated, args = t.cast(t.Any, self).validate_argument_spec(
            argument_spec={
                "store": {"type": "str", "required": True},
                "hosts": {"type": "list", "elements": "str", "required": True},
                "variable": {"type": "str", "default": "ima_snapshot_rotation"},
            }
        )
        hostvars = (task_vars or {}).get("hostvars", {})
        hosts = {
            host: member(hostvars[host].get(args["variable"]) if host in hostvars else None) for host in args["hosts"]
        }
        run = new_run()
        whole = document(run, hosts)
        try:
            store = open_store(args["store"])
            if not self._task.check_mode:
                store.write_run(whole)
        except (ImaError, OSError) as error:
            return dict(failure_of(error), failed=True)
        absent = {host: said["reason"] for host, said in hosts.items() if said["status"] == "missing"}
        place = args["store"].partition("?")[0] if "://" in args["store"] else args["store"]
        return {
            "changed": True,
            "run": run,
            "path": os.path.join(place, "fleet", f"{run}.json"),
            "sha256": hashlib.sha256(canonical(whole)).hexdigest(),
            "present": len(hosts) - len(absent),
            "missing": absent,
        }
