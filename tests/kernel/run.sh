#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: run.sh BIN [PYTEST ARGUMENT ...]
# The tests on real kernels, with the pytest and the ansible-core in BIN. They take minutes each, so they are nice;
# two VMs run at a time, a virtual processor each.

set -euo pipefail

bin=$1
shift
cd "$(dirname "${BASH_SOURCE[0]}")"
# The collection under test is the installed one; no settings of the user and no other conftest have a say.
exec nice -n 19 "$bin/python" -m pytest -c /dev/null --rootdir . -p no:cacheprovider -n "${KERNEL_VMS:-2}" --dist worksteal \
    -v --tb=short --durations=0 --durations-min=1 "$@" .
