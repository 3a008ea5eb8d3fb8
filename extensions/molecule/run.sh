#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: run.sh [SCENARIO...]   (make molecule; molecule on the PATH)
# Each scenario of the collection around this file, in its turn, and at the end one line for each. KEEP=1 leaves the hosts of one that fails.

set -uo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
logs=${MOLECULE_LOGS:-$PWD/../../../molecule}
mkdir -p "$logs"
unset ANSIBLE_CONFIG PYTHONPATH ANSIBLE_INVENTORY
# Molecule's own choice is the same for every checkout: two runs would share their hosts.
home=$HOME/.ansible/tmp/molecule.$(pwd -P | sha256sum | head -c 8)
export NO_COLOR=1 ANSIBLE_NOCOLOR=1 ANSIBLE_NOCOWS=1 LC_ALL=C.UTF-8
if [ $# -eq 0 ]; then set -- default stores faults upgrade schedule; fi

lacks() { # what this machine has not: it goes without the scenario then
    local tool
    if [ "$(id -u)" != 0 ]; then echo 'only root can make network namespaces' && return; fi
    for tool in ip unshare ssh ssh-keygen /usr/sbin/sshd; do
        command -v "$tool" > /dev/null || { echo "there is no $tool" && return; }
    done
    if ! ip netns add "ima-probe-$$" 2> /dev/null; then echo 'network namespaces cannot be made here' && return; fi
    ip netns delete "ima-probe-$$"
    if [ "$1" = schedule ]; then
        for tool in systemd-nspawn mmdebstrap; do
            command -v "$tool" > /dev/null || { echo "there is no $tool (Debian: systemd-container, mmdebstrap)" && return; }
        done
    fi
}

kept() { [ "${KEEP:-0}" = 1 ]; }

outcomes=() failed=0
for scenario in "$@"; do
    reason=$(lacks "$scenario")
    if [ -n "$reason" ]; then
        outcomes+=("$(printf 'SKIPPED: molecule %-10s %s' "$scenario" "$reason")")
        if [ "${REQUIRE_ALL:-0}" = 1 ]; then failed=1; fi
        continue
    fi
    printf -- '--- molecule %s\n' "$scenario"
    began=$SECONDS
    export MOLECULE_EPHEMERAL_DIRECTORY=$home.$scenario
    # "never" would go on with what an earlier run left
    if kept; then molecule destroy --scenario-name "$scenario" > "$logs/$scenario.log" 2>&1; fi
    if molecule test --scenario-name "$scenario" --destroy "$(kept && echo never || echo always)" > "$logs/$scenario.log" 2>&1; then
        outcomes+=("$(printf 'PASSED: molecule %-10s %4d s' "$scenario" $((SECONDS - began)))")
        grep -o 'Overall exposure level.*' "$logs/$scenario.log" | sort -u | sed 's/"\?,\?$//'
        if kept; then molecule destroy --scenario-name "$scenario" >> "$logs/$scenario.log" 2>&1; fi
    else
        failed=1
        tail -n 100 "$logs/$scenario.log"
        outcomes+=("$(printf 'FAILED: molecule %-10s %4d s  %s' "$scenario" $((SECONDS - began)) "$logs/$scenario.log")")
        if kept; then outcomes+=("its hosts: export MOLECULE_EPHEMERAL_DIRECTORY=$MOLECULE_EPHEMERAL_DIRECTORY"); fi
    fi
done
printf '\n'
printf '%s\n' "${outcomes[@]}"
exit "$failed"
