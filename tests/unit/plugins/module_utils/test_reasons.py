# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Every reason that the code can give is explained in docs/verdicts.md."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[4]


def reasons() -> set[str]:
    """The string constants that are given as ``reason=`` or ``default_reason``, in the library and its actions."""
    found = set()
    for path in (ROOT / "plugins").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            value: ast.expr | None = None
            if isinstance(node, ast.keyword) and node.arg == "reason":
                value = node.value
            elif isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "default_reason" for t in node.targets):
                value = node.value
            for each in ast.walk(value) if value is not None else ():
                if (
                    isinstance(each, ast.Constant)
                    and isinstance(each.value, str)
                    and re.match(r"[a-z_0-9]{3,}\Z", each.value)
                ):
                    found.add(each.value)
    return found


def test_every_reason_is_explained():
    text = (ROOT / "docs" / "verdicts.md").read_text(encoding="utf-8")
    assert len(reasons()) > 80
    assert sorted(reason for reason in reasons() if f"`{reason}`" not in text) == []
