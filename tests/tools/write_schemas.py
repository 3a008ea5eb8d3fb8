# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Write docs/*.schema.json from the schemas that the library checks with; with --check only compare."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import sys
import types

ROOT = pathlib.Path(__file__).resolve().parents[2]
UTILS = ROOT / "plugins" / "module_utils"
PACKAGE = "ansible_collections.integrity.ima.plugins.module_utils"
DOCUMENTS = {
    "manifest.schema.json": "MANIFEST",
    "fleet.schema.json": "FLEET",
    "quote.schema.json": "QUOTE",
    "identity.schema.json": "IDENTITY",
    "status.schema.json": "STATUS",
}


def load(name: str) -> types.ModuleType:
    """Import a file of the library from this checkout, wherever it lies."""
    full = f"{PACKAGE}.{name}"
    spec = importlib.util.spec_from_file_location(full, UTILS / f"{name}.py")
    if spec is None or spec.loader is None:
        raise ImportError(name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    spec.loader.exec_module(module)
    return module


def main() -> int:
    """Write or compare."""
    packages = PACKAGE.split(".")
    for length in range(1, len(packages) + 1):
        package = types.ModuleType(".".join(packages[:length]))
        package.__path__ = [str(UTILS)] if length == len(packages) else []
        sys.modules[package.__name__] = package
    load("_errors")
    schemas = load("_schema")
    status = 0
    for name, variable in DOCUMENTS.items():
        path, text = ROOT / "docs" / name, json.dumps(getattr(schemas, variable), indent=2) + "\n"
        if "--check" not in sys.argv[1:]:
            path.write_text(text, "utf-8")
        elif not path.exists() or path.read_text("utf-8") != text:
            print(f"docs/{name} is not what plugins/module_utils/_schema.py says: run tests/tools/write_schemas.py")
            status = 1
    if not status:
        print("The schemas in docs are those of the library.")
    return status


if __name__ == "__main__":
    sys.exit(main())
