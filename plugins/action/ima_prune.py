# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Asks the store to confirm what the host would prune, and has the host remove it."""

from __future__ import annotations

import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._module import failure_of
from ansible_collections.integrity.ima.plugins.module_utils._retention import prune
from ansible_collections.integrity.ima.plugins.module_utils._rotation import HostUnreachable
from ansible_collections.integrity.ima.plugins.module_utils._store._open import open_store
from ansible_collections.integrity.ima.plugins.plugin_utils._host_action import StoreAction


class ActionModule(StoreAction):
    """The action plugin of ``integrity.ima.ima_prune``."""

    MODULE = "ima_prune"

    def act(self, args: dict[str, t.Any]) -> dict[str, t.Any]:
        """Prune the host's spool."""

        def call(one_round: dict[str, t.Any]) -> dict[str, t.Any]:
            return self.ask(dict(args, store=store.name, _round=one_round))

        try:
            store = open_store(args["store"])
            return prune(store, args["name"], call, self._task.check_mode)
        except HostUnreachable as error:
            return error.raw
        except (ImaError, OSError) as error:
            return dict(failure_of(error), failed=True)
