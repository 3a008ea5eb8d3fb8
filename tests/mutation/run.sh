#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: run.sh BIN [OPTION ...] [FILE ...]
# The mutation check of _spool, _verifier and _snapshot (or of those among them that are named), with the Python in BIN:
# each mutant against the unit tests that reach it. It goes on where it was stopped; what is known lies in
# $MUTATION_STATE (default: build/mutation). --report prints it. README.md tells the rest.

set -euo pipefail

bin=$(cd "$1" && pwd)
shift
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
places=/dev/shm
[ -w "$places" ] || places=${TMPDIR:-/tmp}
MUTATION_TMP=$(mktemp -d "$places/mutation.XXXXXX")
trap 'rm -rf "$MUTATION_TMP"' EXIT
# A test that gives up its privileges must still reach its files.
chmod 0755 "$MUTATION_TMP"
mkdir -p "$MUTATION_TMP/path/ansible_collections/integrity"
ln -s "$root" "$MUTATION_TMP/path/ansible_collections/integrity/ima"
export MUTATION_TMP TMPDIR=$MUTATION_TMP PYTHONPATH=$MUTATION_TMP/path
# Nothing is left beside the files under test.
export PYTHONDONTWRITEBYTECODE=1
nice -n "${MUTATION_NICE:-10}" "$bin/python" "$here/runner.py" --state "${MUTATION_STATE:-$root/build/mutation}" "$@"
