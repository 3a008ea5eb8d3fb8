# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""What the actions share that run a module on their host: options that are checked first, and nothing left behind."""

from __future__ import annotations

import abc
import typing as t

from ansible.plugins.action import ActionBase

Result = t.Dict[str, t.Any]


class HostAction(ActionBase):
    """An action that runs its module on the host, once or in rounds."""

    _supports_check_mode = True
    _supports_async = False
    _requires_connection = True
    MODULE: str
    # The options that only this action has.
    OPTIONS: Result = {}

    @abc.abstractmethod
    def act(self, args: Result) -> Result:
        """Do it, with checked options; return the result."""

    def run(self, tmp: t.Any = None, task_vars: Result | None = None) -> Result:
        """Check the options, act, and leave nothing on the host."""
        super().run(tmp, task_vars)
        self._variables = task_vars or {}
        spec = dict(self.common(), **self.OPTIONS)
        _validated, args = t.cast(t.Any, self).validate_argument_spec(argument_spec=spec)
        try:
            return self.act(args)
        finally:
            t.cast(t.Any, self)._remove_tmp_path(self._connection._shell.tmpdir)

    def common(self) -> Result:
        """Return the options that all actions of this kind have."""
        return {"config": {"type": "path", "default": "/etc/ima/snapshot.conf"}}

    def ask(self, args: Result, module: str = "") -> Result:
        """Run the module, or another one, on the host; return what came back, unchecked."""
        name = module or f"integrity.ima.{self.MODULE}"
        answer: Result = self._execute_module(module_name=name, module_args=args, task_vars=self._variables)
        return answer


class StoreAction(HostAction):
    """An action that speaks for its host to a store."""

    def common(self) -> Result:
        """See :class:`HostAction`."""
        return dict(
            super().common(),
            store={"type": "str", "required": True},
            name={"type": "str", "default": self._variables.get("inventory_hostname")},
        )
