# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The command ima-snapshot as one file: a zip of the library's files that it needs, with a line for the kernel."""

from __future__ import annotations

import ast
import io
import os
import re
import zipfile

from ansible_collections.integrity.ima.plugins.module_utils import _errors

_PACKAGE = "ansible_collections.integrity.ima.plugins.module_utils"
_LIBRARY = os.path.dirname(os.path.abspath(_errors.__file__))
_LICENCE = """\
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
"""
_MAIN = """{licence}
import sys

from {package}._command import main

sys.exit(main(config={config!r}))
"""
_OLDEST = (1980, 1, 1, 0, 0, 0)  # what a zip file can tell
_LONGEST = 120  # of the path: kernels before 5.1 read 127 bytes of the first line
# -I: neither the environment nor the user's own packages have a say in what runs as root.
_ISOLATED = " -I"


def fits(interpreter: str) -> bool:
    """Say whether the kernel can start a file with this interpreter: an absolute path without blanks."""
    return bool(re.match(r"/[!-~]+\Z", interpreter)) and len(interpreter) <= _LONGEST


def build(interpreter: str, config: str) -> bytes:
    """Return the file's bytes. They depend on the library, on ``interpreter`` and on the default of ``--config`` alone.

    Nothing is compressed: each zlib does that its own way.
    """
    out = io.BytesIO(f"#!{interpreter}{_ISOLATED}\n".encode())
    out.seek(0, os.SEEK_END)
    with zipfile.ZipFile(out, "a", zipfile.ZIP_STORED) as archive:
        for name, text in sorted(contents(config).items()):
            entry = zipfile.ZipInfo(name, _OLDEST)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # Unix
            archive.writestr(entry, text)
    return out.getvalue()


def contents(config: str) -> dict[str, bytes]:
    """Return name and bytes of every file in the zip: what ``_command`` imports, and what that imports."""
    found: dict[str, bytes] = {
        "__main__.py": _MAIN.format(licence=_LICENCE, package=_PACKAGE, config=config).encode(
            "ascii", "backslashreplace"
        )
    }
    waiting = ["_command"]
    while waiting:
        module = waiting.pop()
        name = f"{_PACKAGE}.{module}".replace(".", "/") + ".py"
        if name in found:
            continue
        with open(os.path.join(_LIBRARY, *module.split(".")) + ".py", "rb") as file:
            found[name] = file.read()
        waiting += imported(found[name])
    for name in [name for name in found if "/" in name]:
        parts = name.split("/")[:-1]
        for length in range(1, len(parts) + 1):
            found["/".join([*parts[:length], "__init__.py"])] = b""
    return found


def imported(source: bytes) -> list[str]:
    """Return the files of the library that ``source`` imports anywhere in it, relative to the library."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and f"{node.module}.".startswith(f"{_PACKAGE}."):
            within = node.module[len(_PACKAGE) + 1 :]
            names = [f"{within}.{alias.name}".lstrip(".") for alias in node.names]
            found.update(name for name in [within, *names] if _is_file(name))
    return sorted(found)


def _is_file(module: str) -> bool:
    return bool(module) and os.path.isfile(os.path.join(_LIBRARY, *module.split(".")) + ".py")
