# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Builds the command ima-snapshot from the collection's own library, and has it copied to the host."""

from __future__ import annotations

import os
import tempfile

from ansible_collections.integrity.ima.plugins.plugin_utils._host_action import HostAction, Result
from ansible_collections.integrity.ima.plugins.plugin_utils._zipapp import build, fits


class ActionModule(HostAction):
    """The action plugin of ``integrity.ima.ima_command``."""

    MODULE = "ima_command"
    OPTIONS = {
        "path": {"type": "path", "default": "/usr/local/sbin/ima-snapshot"},
        "interpreter": {"type": "str"},
        "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
    }

    def act(self, args: Result) -> Result:
        """Install it, or remove it."""
        return self._install(args) if args["state"] == "present" else self._remove(args["path"])

    def _install(self, args: Result) -> Result:
        answer = self.ask(args)
        if answer.get("failed") or answer.get("unreachable"):
            return answer
        interpreter = answer.get("interpreter")
        if not isinstance(interpreter, str) or not fits(interpreter):
            message = "The path of the host's Python is longer than 120 characters, has blanks, or is not absolute"
            return {"failed": True, "reason": "interpreter", "msg": f"{message}: give another one in 'interpreter'."}
        owner = {"owner": "root"} if answer.get("root") else {}
        result = self._copy(build(interpreter, args["config"]), dict(owner, dest=args["path"], mode="0755"))
        return dict(result, path=args["path"], interpreter=interpreter, state="present")

    def _copy(self, data: bytes, args: Result) -> Result:
        """Let ``ansible.builtin.copy`` do it: it compares, predicts, and replaces the file at once."""
        with tempfile.TemporaryDirectory(prefix="ima-command-") as directory:
            source = os.path.join(directory, "ima-snapshot")
            with open(source, "wb") as file:
                file.write(data)
            task = self._task.copy()
            task.args = dict(args, src=source)
            action = self._shared_loader_obj.action_loader.get(
                "ansible.builtin.copy",
                task=task,
                connection=self._connection,
                play_context=self._play_context,
                loader=self._loader,
                templar=self._templar,
                shared_loader_obj=self._shared_loader_obj,
            )
            result: Result = action.run(task_vars=self._variables)
        kept = ("changed", "failed", "msg", "unreachable", "exception", "diff", "warnings", "deprecations")
        return {key: value for key, value in result.items() if key in kept}

    def _remove(self, path: str) -> Result:
        wanted = {"path": path, "follow": False, "get_checksum": False, "get_mime": False}
        found = self.ask(wanted, "ansible.builtin.stat")
        if found.get("failed") or found.get("unreachable"):
            return found
        if found["stat"].get("isdir"):
            return {"failed": True, "reason": "directory", "msg": f"{path} is a directory: nothing was removed"}
        result = self.ask({"path": path, "state": "absent"}, "ansible.builtin.file")
        return dict(result, path=path, state="absent")
