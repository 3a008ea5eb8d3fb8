# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The house: each file of the library imports only from its left, and modules are thin."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PLUGINS = Path(__file__).resolve().parents[4] / "plugins"
PREFIX = "ansible_collections.integrity.ima.plugins."
ORDER = tuple(
    """
    _errors _schema _durable _encryption _securityfs _measurement_list _pcr _saved_list _emulated _protocol _shard
    _spool _stitched _tpm _upload _snapshot _host _status _store._objects _store._base _store._directory _store._spool
    _store._sftp _store._s3_client _store._s3 _store._open _store._prepare _verifier _fleet _rotation _retention
    _stitch _module _command
    """.split()
)
LONGEST = 60  # lines of a function: a screen
LIBRARY = sorted(path for path in (PLUGINS / "module_utils").rglob("*.py") if path.name != "__init__.py")
MODULES = sorted((PLUGINS / "modules").glob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PLUGINS / "module_utils").with_suffix("").parts)


def imported(path: Path) -> set[str]:
    """The library files that ``path`` imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        prefix = f"{PREFIX}module_utils."
        found |= {name[len(prefix) :] for name in names if name.startswith(prefix)} & set(ORDER)
    return found


def test_every_file_has_its_place():
    assert {name_of(path) for path in LIBRARY} <= set(ORDER)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_imports_only_from_its_left(path):
    here = ORDER.index(name_of(path))
    assert {name for name in imported(path) if ORDER.index(name) >= here} == set()


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_the_library_does_not_know_ansible(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.lstrip().startswith(("from ansible.", "import ansible."))] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_main_is_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 30, node.name


@pytest.mark.parametrize(("group", "option"), [("ima", "_config"), ("stores", "_store")])
def test_a_default_for_an_action_group_fits_all_of_its_modules(group, option):
    """What module_defaults gives to a group, each of its modules takes; and each that takes it belongs to the group."""
    text = (PLUGINS.parent / "meta" / "runtime.yml").read_text(encoding="utf-8")
    members = re.findall(r"^    - (\w+)$", text.partition(f"\n  {group}:\n")[2].partition(":\n")[0], re.M)
    fragments = {path.stem: path.read_text(encoding="utf-8") for path in MODULES}
    assert members == [name for name, said in fragments.items() if f"  - integrity.ima.{option}\n" in said]
    for name, said in fragments.items():
        assert (name in members) == (f"  - integrity.ima._attributes.actiongroup_{group}\n" in said)


@pytest.mark.parametrize("path", LIBRARY, ids=name_of)
def test_functions_fit_a_screen(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < LONGEST, node.name
