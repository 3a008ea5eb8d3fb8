# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs rounds of the module ima_rotate on the host, and puts what they bring into the store."""

from __future__ import annotations

import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._fleet import missing
from ansible_collections.integrity.ima.plugins.module_utils._module import failure_of
from ansible_collections.integrity.ima.plugins.module_utils._rotation import HostFailed, HostUnreachable, Rotation
from ansible_collections.integrity.ima.plugins.module_utils._store._open import open_store
from ansible_collections.integrity.ima.plugins.plugin_utils._host_action import StoreAction


class ActionModule(StoreAction):
    """The action plugin of ``integrity.ima.ima_rotate``."""

    MODULE = "ima_rotate"
    OPTIONS = {
        "key": {"type": "path", "no_log": False},
        "anchor": {"type": "bool", "default": False},
        "chunk_bytes": {"type": "int", "default": 524288},
        "delivery": {"type": "str", "choices": ["controller", "direct"], "default": "controller"},
        "most_bytes": {"type": "int", "default": 16 << 30},
    }

    def act(self, args: dict[str, t.Any]) -> dict[str, t.Any]:
        """Rotate the host's list."""
        if not 4096 <= args["chunk_bytes"] <= 16 << 20:
            return {"failed": True, "reason": "value", "msg": "'chunk_bytes' must be from 4096 to 16777216"}

        def call(one_round: dict[str, t.Any]) -> dict[str, t.Any]:
            urls = one_round.pop("urls", [])
            return self.ask(dict(args, store=store.name, key=None, _round=one_round, _urls=urls))

        try:
            store = open_store(args["store"], args["key"])
            rotation = Rotation(
                store,
                args["name"],
                call,
                dict(args, direct=args["delivery"] == "direct"),
            )
        except (ImaError, OSError) as error:
            return _failed(args["name"], error, {})
        try:
            if self._task.check_mode:
                rotation.predict()
            else:
                rotation.run()
        except HostUnreachable as error:
            return dict(error.raw, claim=missing("unreachable", error.msg))
        except (ImaError, OSError) as error:
            return _failed(args["name"], error, rotation.result())
        result = rotation.result()
        if rotation.warnings:
            result["warnings"] = [f"{args['name']}: {said}" for said in rotation.warnings]
        if not self._task.diff:
            del result["diff"]
        return _faulty(args["name"], result) if result["fault"] else result


def _failed(host: str, error: Exception, result: dict[str, t.Any]) -> dict[str, t.Any]:
    details = failure_of(error)
    where = {key: details.get(key) for key in ("index", "boot_id")}
    claim = missing(details["reason"], details["msg"], **where)
    # What the host itself said begins with its own name.
    message = details["msg"] if isinstance(error, HostFailed) else f"{host}: {details['msg']}"
    return dict(result, **dict(details, failed=True, msg=message, claim=claim))


def _faulty(host: str, result: dict[str, t.Any]) -> dict[str, t.Any]:
    """The shards were delivered, but the host's history has a fault: nothing is trimmed, and somebody has to know."""
    fault = result["fault"]
    message = f"{host}: delivered, but nothing is deleted in this boot: {fault['message']} (index {fault['index']})"
    return dict(
        result, failed=True, reason=fault["reason"], msg=message, index=fault["index"], boot_id=fault["boot_id"]
    )
