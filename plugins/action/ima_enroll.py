# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Records a host's attestation key in the store."""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._module import failure_of
from ansible_collections.integrity.ima.plugins.module_utils._rotation import record_identity
from ansible_collections.integrity.ima.plugins.module_utils._store._open import open_store


class ActionModule(ActionBase):
    """The action plugin of ``integrity.ima.ima_enroll``."""

    _supports_check_mode = True
    _supports_async = False
    _requires_connection = True

    def run(self, tmp: t.Any = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Ask the host for its key, and record it."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        _validated, args = t.cast(t.Any, self).validate_argument_spec(
            argument_spec={
                "config": {"type": "path", "default": "/etc/ima/snapshot.conf"},
                "store": {"type": "str", "required": True},
                "name": {"type": "str", "default": variables.get("inventory_hostname")},
            }
        )
        try:
            store = open_store(args["store"])
            answer = self._execute_module(module_name="integrity.ima.ima_enroll", module_args=args, task_vars=variables)
            if answer.get("failed") or answer.get("unreachable"):
                return t.cast("dict[str, t.Any]", answer)
            return record_identity(store, args["name"], answer, self._task.check_mode)
        except (ImaError, OSError) as error:
            return dict(failure_of(error), failed=True, msg=f"{args['name']}: {failure_of(error)['msg']}")
        finally:
            t.cast(t.Any, self)._remove_tmp_path(self._connection._shell.tmpdir)
