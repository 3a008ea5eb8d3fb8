# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Compare every role's argument_specs.yml with its defaults: same variables, same values, each one described."""

from __future__ import annotations

import pathlib
import sys

import yaml

ROLES = pathlib.Path(__file__).resolve().parents[2] / "roles"


def problems(role: pathlib.Path) -> list[str]:
    """Return what differs."""
    specs = yaml.safe_load((role / "meta" / "argument_specs.yml").read_text("utf-8"))["argument_specs"]
    defaults = yaml.safe_load((role / "defaults" / "main.yml").read_text("utf-8"))
    files = {path.stem for path in (role / "tasks").glob("*.yml")}
    found = [f"entry point {entry} has no tasks file" for entry in sorted(set(specs) - files)]
    described = {name for spec in specs.values() for name in spec["options"]}
    found += [f"{name} has a default and no description" for name in sorted(set(defaults) - described)]
    found += [f"{name} is described and has no default" for name in sorted(described - set(defaults))]
    readme = (role / "README.md").read_text("utf-8")
    found += [f"{name} is not in README.md" for name in sorted(described) if f"`{name}`" not in readme]
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
