#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: lint.sh VENV COLLECTION_DIRECTORY CACHE_DIRECTORY
# ruff, mypy, yamllint and ansible-lint on the staged copy of the collection. Stops at the first that finds something.

set -euo pipefail

venv=$(cd "$1" && pwd) collection=$(cd "$2" && pwd)
mkdir -p "$3"
cache=$(cd "$3" && pwd)
root=$(cd "$collection/../../.." && pwd)
unset "${!GIT_@}"
unset PYTHONPATH ANSIBLE_CONFIG
export PATH=$venv/bin:$PATH

section() {
    printf -- '--- %s\n' "$1"
}

cd "$collection"
section ruff
RUFF_CACHE_DIR=$cache/ruff ruff check .

section mypy
if [ -n "$(find plugins -name '*.py' -print -quit)" ]; then
    (cd "$root" && mypy --config-file "$collection/mypy.ini" --cache-dir "$cache/mypy" ansible_collections/integrity/ima/plugins)
fi

section yamllint
yamllint --strict .

section ansible-lint
ANSIBLE_HOME=$cache/ansible ANSIBLE_COLLECTIONS_PATH=$root ansible-lint --offline --profile production --strict --nocolor
