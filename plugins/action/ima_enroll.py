# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Records a host's attestation key in the store."""

from __future__ import annotations

import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._module import failure_of
from ansible_collections.integrity.ima.plugins.module_utils._rotation import record_identity
from ansible_collections.integrity.ima.plugins.module_utils._store._open import open_store
from ansible_collections.integrity.ima.plugins.plugin_utils._host_action import StoreAction


class ActionModule(StoreAction):
    """The action plugin of ``integrity.ima.ima_enroll``."""

    MODULE = "ima_enroll"

    def act(self, args: dict[str, t.Any]) -> dict[str, t.Any]:
        """Ask the host for its key, and record it."""
        try:
            store = open_store(args["store"])
            answer = self.ask(dict(args, store=store.name))
            if answer.get("failed") or answer.get("unreachable"):
                return answer
            return record_identity(store, args["name"], answer, self._task.check_mode)
        except (ImaError, OSError) as error:
            return dict(failure_of(error), failed=True, msg=f"{args['name']}: {failure_of(error)['msg']}")
