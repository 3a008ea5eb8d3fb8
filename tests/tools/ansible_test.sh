#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: ansible_test.sh VENV COLLECTION_DIRECTORY {sanity|units|units-oldest} [arguments of ansible-test]
# Runs ansible-test in the staged copy of the collection: sanity with every Python that the machine has, units with that of VENV
# or with the oldest target Python.

set -euo pipefail

venv=$(cd "$1" && pwd) collection=$2 command=$3
shift 3
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
unset "${!GIT_@}"
unset PYTHONPATH ANSIBLE_CONFIG

everywhere() { # every Python of the machine, on the PATH
    local pythons rest
    pythons=$(cd "$collection/../../.." && pwd)/pythons
    "$here/get_pip_shim.sh" "$venv/bin/python"
    "$here/pythons.sh" "$venv/bin/python" "$pythons"
    # the shims of pyenv pretend to be every Python: the links to the real ones stand in for them
    rest=$(printf '%s' "$PATH" | tr ':' '\n' | grep -v '/pyenv[^/]*/shims/*$\|/\.pyenv/shims/*$' | paste -sd :)
    export PATH=$venv/bin:$pythons:$rest
}

version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
export PATH=$venv/bin:$PATH
case $command in
    sanity)
        everywhere
        # fixtures are bytes as the kernel wrote them, file names in any encoding among them: no text to check
        if [ -e "$collection/tests/fixtures" ]; then
            set -- --exclude tests/fixtures/ "$@"
        fi
        set -- --local "$@"
        ;;
    units)
        set -- --local --python "$version" "$@"
        ;;
    units-oldest)
        everywhere
        command=units
        oldest=$(cd "$collection/../../../pythons" && printf '%s\n' python* | sort -V | head -n 1)
        set -- --controller "origin:python=$version" --target-python "venv/${oldest#python}" "$@"
        ;;
esac
if [ "$command" = units ] && [ "${REQUIRE_ALL:-0}" = 1 ]; then
    # ansible-test hands few variables on: tests/unit/conftest.py looks for this file instead
    mkdir -p "$collection/tests/output"
    touch "$collection/tests/output/require_all"
fi

cd "$collection"
exec ansible-test "$command" --color no "$@"
