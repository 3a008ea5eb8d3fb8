#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: venv.sh PYTHON DIRECTORY REQUIREMENTS
# A virtual environment with exactly the pinned requirements: made when it is missing or of another Python, else updated.

set -euo pipefail

python=$1 directory=$2 requirements=$3

fail() {
    printf 'error: %s\n' "$@" >&2
    exit 1
}

command -v "$python" > /dev/null || fail "there is no $python here." \
    "Install Python 3.11 or newer (Debian: apt-get install python3 python3-venv), or name yours: make PYTHON=/path/to/python3 ..."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $("$python" --version 2>&1), but the controller side of ansible-core 2.19 needs 3.11 or newer." \
        "Name a newer one: make PYTHON=python3.12 ..."
"$python" -c 'import ensurepip, venv' 2> /dev/null ||
    fail "$python has no venv module." "Install it (Debian and Ubuntu: apt-get install python3-venv) and run make again."

version() {
    "$1" -c 'import sys; print(sys.version_info[:3], sys.base_prefix)' 2> /dev/null || true
}

if [ "$(version "$directory/bin/python")" != "$(version "$python")" ]; then
    printf 'Making %s with %s\n' "$directory" "$("$python" --version 2>&1)"
    "$python" -m venv --clear "$directory"
fi
printf 'Installing %s into %s\n' "$requirements" "$directory"
"$directory/bin/python" -m pip install -qq --disable-pip-version-check -r "$requirements" ||
    fail "pip could not install $requirements: see above. Is a package index within reach?"
