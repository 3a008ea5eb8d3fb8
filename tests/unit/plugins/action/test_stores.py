# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import types
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.action import ima_enroll, ima_prune, ima_rotate
from ansible_collections.integrity.ima.tests.unit.plugins.module_utils import _store_support as support

GIVEN = {"name": "web1", "config": "/etc/ima/snapshot.conf"}
ROTATED = {"chunk_bytes": 4096, "delivery": "controller", "most_bytes": 1 << 30, "anchor": False}


@pytest.mark.parametrize(
    ("plugin", "more"), [(ima_rotate, dict(ROTATED, key="/root/verifier.key")), (ima_prune, {}), (ima_enroll, {})]
)
def test_a_host_learns_the_name_of_the_store_and_no_path_of_a_key(
    tmp_path: Path, plugin: types.ModuleType, more: dict[str, t.Any]
) -> None:
    support.new_store(tmp_path / "store")
    action = plugin.ActionModule.__new__(plugin.ActionModule)
    action._variables, action._task = {}, types.SimpleNamespace(check_mode=False, diff=False)
    asked: list[dict[str, t.Any]] = []

    def ask(args: dict[str, t.Any], module: str = "") -> dict[str, t.Any]:
        asked.append(args)
        return {"failed": True, "msg": "no"}

    action.ask = ask
    result = action.act(dict(GIVEN, store=str(tmp_path / "store"), **more))
    assert result["failed"] is True
    (args,) = asked
    assert args["store"] == f"directory:{tmp_path / 'store'}"
    assert args.get("key") is None
    assert "verifier.key" not in str(args)
