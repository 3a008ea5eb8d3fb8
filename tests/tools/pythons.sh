#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: pythons.sh PYTHON DIRECTORY
# PYTHON has ansible-test. Fills DIRECTORY with one link pythonX.Y for each Python that its ansible-core supports and that this machine
# has, be it on the PATH or among the versions of pyenv,
# and says which are missing.

set -euo pipefail
shopt -s nullglob

python=$1 directory=$2

versions=$("$python" - << 'PYTHON'
import pathlib
import re

import ansible_test

source = pathlib.Path(ansible_test.__path__[0], "_util", "target", "common", "constants.py").read_text(encoding="utf-8")
print(*sorted(set(re.findall(r"'(3\.\d+)'", source)), key=lambda version: int(version[2:])))
PYTHON
)

usable() { # prints the real path of an interpreter that is of version $2, works, and can make environments
    "$1" - "$2" << 'PYTHON' 2> /dev/null
import ctypes
import ssl
import sys
import venv

if "%d.%d" % sys.version_info[:2] != sys.argv[1]:
    sys.exit(1)
print(sys.executable)
PYTHON
}

rm -rf "$directory"
mkdir -p "$directory"
found=() missing=()
for version in $versions; do
    for candidate in $(type -ap "python$version") "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/"python$version"; do
        if path=$(usable "$candidate" "$version"); then
            ln -s "$path" "$directory/python$version"
            found+=("$version")
            continue 2
        fi
    done
    missing+=("$version")
done
printf 'Target Pythons: %s\n' "${found[*]}"
if [ ${#missing[@]} -gt 0 ]; then
    printf 'SKIPPED target Pythons (not on this machine): %s\n' "${missing[*]}"
fi
