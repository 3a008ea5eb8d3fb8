#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: get_pip_shim.sh PYTHON
# PYTHON has ansible-test. Its sanity tests make environments of their own and put pip into them with a "get-pip" script, which
# ansible-test downloads once from a server of the Ansible project. Where that server is out of reach but a package index is not,
# this puts an equivalent script into ansible-test's cache: it installs the same version of pip, fetched by pip itself.
# A script that is there already stays.

set -euo pipefail

python=$1
cache=${HOME:?}/.ansible/test/cache

version=$("$python" - << 'PYTHON'
import pathlib
import re

import ansible_test

source = pathlib.Path(ansible_test.__path__[0], "_internal", "python_requirements.py").read_text(encoding="utf-8")
print(re.search(r"\bpip='([0-9.]+)'", source)[1])
PYTHON
)
script=$cache/get_pip_${version//./_}.py

if [ -e "$script" ]; then
    exit 0
fi

mkdir -p "$cache"
"$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary :all: --dest "$cache" "pip==$version"
cat > "$script.new" << PYTHON
"""Stands in for get-pip.py: installs pip $version from the wheel beside it."""

import os
import runpy
import sys

wheel = os.path.join(os.path.dirname(os.path.abspath(__file__)), "pip-$version-py3-none-any.whl")
sys.path.insert(0, wheel)
sys.argv = ["pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", wheel]
runpy.run_module("pip", run_name="__main__", alter_sys=True)
PYTHON
mv "$script.new" "$script"
printf 'pip %s for the environments of ansible-test: %s\n' "$version" "$script"
