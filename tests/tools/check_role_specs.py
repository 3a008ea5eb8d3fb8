# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Compare every role's argument_specs.yml with its defaults, its tasks files and its README.

Same variables, same values, each one described. A tasks file that no other one takes in is an entry point with a spec.
"""

from __future__ import annotations

import pathlib
import re
import sys
import typing as t

import yaml

ROLES = pathlib.Path(__file__).resolve().parents[2] / "roles"


def inner(role: pathlib.Path) -> set[str]:
    """Return the tasks files that others take in and nobody is meant to: main takes in entry points."""
    texts = [path.read_text("utf-8") for path in (role / "tasks").glob("*.yml") if path.stem != "main"]
    return {name for text in texts for name in re.findall(r"(?:_tasks|file): (\w+)\.yml", text)}


def told(readme: str) -> dict[str, set[str]]:
    """Return which entry points the README's table of variables names for each."""
    table = readme.partition("## Variables")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| .* \| ([^|]*) \|$", table, re.MULTILINE)
    return {name: {word.strip() for word in words.split(",")} for name, words in rows}


def misnamed(specs: dict[str, t.Any], readme: str) -> list[str]:
    """Return where the README's table differs from the specs."""
    unnamed = [entry for entry in sorted(specs) if f"| `{entry}` |" not in readme]
    found = [f"README.md does not name the entry point {entry}" for entry in unnamed]
    for name, entries in sorted(told(readme).items()):
        # main takes what the entry points take that it takes in
        real = {entry for entry, spec in specs.items() if name in spec["options"]} - {"main"}
        if entries != real:
            found.append(f"README.md: {name} is of {', '.join(sorted(real))}, not of {', '.join(sorted(entries))}")
    return found


def problems(role: pathlib.Path) -> list[str]:
    """Return what differs."""
    specs = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text("utf-8"))["argument_specs"]
    defaults = yaml.safe_load((role / "defaults" / "main.yml").read_text("utf-8"))
    files = {path.stem for path in (role / "tasks").glob("*.yml")}
    found = [f"entry point {entry} has no tasks file" for entry in sorted(set(specs) - files)]
    found += [f"{entry} is an entry point and has no spec" for entry in sorted(files - inner(role) - set(specs))]
    described = {name for spec in specs.values() for name in spec["options"]}
    found += [f"{name} has a default and no description" for name in sorted(set(defaults) - described)]
    found += [f"{name} is described and has no default" for name in sorted(described - set(defaults))]
    readme = (role / "README.md").read_text("utf-8")
    found += [f"{name} is not in README.md" for name in sorted(described) if f"`{name}`" not in readme]
    found += misnamed(specs, readme)
    for entry, spec in sorted(specs.items()):
        for name, option in sorted(spec["options"].items()):
            if name in defaults and option.get("default") != defaults[name]:
                found.append(f"{entry}: {name} is {option.get('default')!r} here, {defaults[name]!r} in the defaults")
            if not (option.get("description") and option.get("type")):
                found.append(f"{entry}: {name} lacks a description or a type")
            if not name.startswith(f"{role.name}_"):
                found.append(f"{entry}: {name} does not begin with {role.name}_")
    return [f"{role.name}: {text}" for text in found]


def main() -> int:
    """Check all roles."""
    found = [text for role in sorted(ROLES.iterdir()) if role.is_dir() for text in problems(role)]
    print("\n".join(found) or "The specs of the roles and their defaults agree.")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
