# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later


"""Asks the store to confirm what the host would prune, and has the host remove it."""

from __future__ import annotations

import typing as t

from ansible.plugins.action import ActionBase

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._module import failure_of
from ansible_collections.integrity.ima.plugins.module_utils._retention import prune
from ansible_collections.integrity.ima.plugins.module_utils._rotation import HostUnreachable
from ansible_collections.integrity.ima.plugins.module_utils._store._open import open_store


class ActionModule(ActionBase):
    """The action plugin of ``integrity.ima.ima_prune``."""

    _supports_check_mode = True
    _supports_async = False
    _requires_connection = True

    def run(self, tmp: t.Any = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        """Prune the host's spool."""
        super().run(tmp, task_vars)
        variables = task_vars or {}
        _validated, args = t.cast(t.Any, self).validate_argument_spec(
            argument_spec={
                "config": {"type": "path", "default": "/etc/ima/snapshot.conf"},
                "store": {"type": "str", "required": True},
                "name": {"type": "str", "default": variables.get("inventory_hostname")},
            }
        )

        def call(one_round: dict[str, t.Any]) -> dict[str, t.Any]:
            answer: dict[str, t.Any] = self._execute_module(
                module_name="integrity.ima.ima_prune", module_args=dict(args, _round=one_round), task_vars=variables
            )
            return answer

        try:
            return prune(open_store(args["store"]), args["name"], call, self._task.check_mode)
        except HostUnreachable as error:
            return error.raw
        except (ImaError, OSError) as error:
            return dict(failure_of(error), failed=True)
        finally:
            t.cast(t.Any, self)._remove_tmp_path(self._connection._shell.tmpdir)
