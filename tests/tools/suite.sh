#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: suite.sh DIRECTORY BIN [PYTEST ARGUMENT ...]
# The tests in DIRECTORY, with the pytest in BIN. The collection under test is the one that PYTHONPATH leads to, else the
# one around this file. Paths among the arguments are relative to DIRECTORY. SUITE_WORKERS=n (2).

set -euo pipefail

directory=$(cd "$1" && pwd)
bin=$(cd "$2" && pwd)
shift 2
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
cd "$directory"
staged=''
cleanup() { if [ -n "$staged" ]; then rm -rf "$staged"; fi; }
trap cleanup EXIT
if [ -z "${PYTHONPATH:-}" ]; then
    staged=$(mktemp -d)
    mkdir -p "$staged/ansible_collections/integrity"
    ln -s "$root" "$staged/ansible_collections/integrity/ima"
    export PYTHONPATH=$staged
fi
# No settings of the user and no other conftest have a say. Tests only: nothing is left beside them.
export PYTHONDONTWRITEBYTECODE=1
nice -n 10 "$bin/python" -m pytest -c /dev/null --rootdir . -p no:cacheprovider -n "${SUITE_WORKERS:-2}" --dist worksteal \
    -q --tb=short --durations=5 --durations-min=1 "$@"
