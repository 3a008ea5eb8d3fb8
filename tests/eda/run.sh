#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: run.sh BIN   (make test-eda; BIN has ansible-rulebook, the collection is installed below ANSIBLE_COLLECTIONS_PATH)
# The rulebook of the collection in a real ansible-rulebook, on three emulated hosts over real ssh: it rotates the one that grows,
# names the one with a fault and the one that is away, and leaves the one that keeps its threshold alone. What it cannot do without
# is a reason to skip all of it; with REQUIRE_ALL=1 that is a failure. KEEP=1 keeps the directory of a run that fails.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
bin=$(cd "$1" && pwd)
hosts=$here/../../extensions/molecule/hosts/hosts.sh
export PATH=$bin:$PATH:/usr/local/sbin:/usr/sbin:/sbin LC_ALL=C.UTF-8

lacks() { # what this machine has not
    local tool
    "$bin/ansible-rulebook" --version > /dev/null 2>&1 || { echo 'ansible-rulebook needs Java 17 or newer (Debian: openjdk-17-jre-headless)' && return; }
    if [ "$(id -u)" != 0 ]; then echo 'only root can make network namespaces' && return; fi
    for tool in ip unshare setsid ssh ssh-keygen /usr/sbin/sshd; do
        command -v "$tool" > /dev/null || { echo "there is no $tool" && return; }
    done
    if ! ip netns add "ima-probe-$$" 2> /dev/null; then echo 'network namespaces cannot be made here' && return; fi
    ip netns delete "ima-probe-$$"
}

reason=$(lacks)
if [ -n "$reason" ]; then
    echo "SKIPPED: tests/eda: $reason"
    if [ "${REQUIRE_ALL:-0}" = 1 ]; then exit 1; fi
    exit 0
fi

work=$(mktemp -d /tmp/ima-eda.XXXXXX)
network=ie$$ rulebook=''

cleanup() {
    local status=$?
    trap - EXIT
    if [ -n "$rulebook" ]; then kill -KILL -- "-$rulebook" 2> /dev/null || true; fi
    "$hosts" down "$work/hosts" "$network" || true
    if [ "$status" -ne 0 ]; then
        if [ -e "$work/rulebook.log" ]; then tail -n 60 "$work/rulebook.log"; fi
        printf '\nFAILED: tests/eda\n'
        if [ "${KEEP:-0}" = 1 ]; then
            printf 'kept: %s\n' "$work"
            exit "$status"
        fi
    fi
    rm -rf "$work"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

section() {
    printf '\n--- %s (%s s)\n' "$1" "$SECONDS"
}

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

within() { # SECONDS WHAT COMMAND...: waits until it succeeds
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        if [ "$SECONDS" -ge "$end" ]; then fail "waited in vain until $what"; fi
        sleep 0.2
    done
    printf 'seen: %s\n' "$what"
}

here_too() { # in the network of the hosts
    ip netns exec "$network" "$@"
}

quietly() { # unless it fails
    "$@" > "$work/log" 2>&1 || { tail -n 80 "$work/log" && fail "$*"; }
}

shards() { # HOST: how many are in the store
    find "$work/store/hosts/$1" -name '*.json' -path '*-*' ! -name identity.json | wc -l
}

has_shards() {
    [ "$(shards "$1")" = "$2" ]
}

collected() { # COUNT: the fleet documents, the last thing that a rotation writes
    [ "$(find "$work/store/fleet" -name '*.json' | wc -l)" = "$1" ]
}

section 'three hosts'
mkdir -m 0700 "$work/store" "$work/bin" "$work/tmp"
export TMPDIR=$work/tmp
"$hosts" up "$work/hosts" "$network" namespace ima-grows=10.77.0.11 ima-quiet=10.77.0.12 ima-robbed=10.77.0.13
# In the place of ~/.ssh/config: Ansible and the event source find the same hosts under the same names.
cat > "$work/ssh_config" << CONFIG
Host ima-*
    User root
    IdentityFile $work/hosts/key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    ConnectTimeout 5
Host ima-grows
    HostName 10.77.0.11
Host ima-quiet
    HostName 10.77.0.12
Host ima-robbed
    HostName 10.77.0.13
Host ima-away
    HostName 10.77.0.99
CONFIG
# the ssh that the PATH had
printf '#!/bin/sh\nexec %q -F %q "$@"\n' "$(command -v ssh)" "$work/ssh_config" > "$work/bin/ssh"
chmod 0755 "$work/bin/ssh"
export PATH=$work/bin:$PATH
unset ANSIBLE_INVENTORY
export ANSIBLE_CONFIG=$work/ansible.cfg ANSIBLE_HOME=$work/ansible
cat > "$ANSIBLE_CONFIG" << CONFIG
[defaults]
local_tmp = $work/tmp
nocolor = true
[ssh_connection]
pipelining = true
# no connection outlives the hosts
ssh_args = -o ControlMaster=no
CONFIG
cat > "$work/inventory.yml" << INVENTORY
all:
  vars:
    ima_snapshot_store: $work/store
    run_directory: $work
  children:
    fleet:
      vars:
        ansible_python_interpreter: /usr/bin/python3
        kernel: /var/lib/ima-kernel
        ima_snapshot_target: fleet
        ima_snapshot_source: emulated
        ima_snapshot_directory: "{{ kernel }}"
      hosts:
        ima-grows: {flavour: delete_n}
        ima-quiet: {flavour: staged}
        ima-robbed: {flavour: delete_n}
    controller:
      hosts:
        localhost:
          ansible_connection: local
          ansible_python_interpreter: $bin/python
INVENTORY
quietly here_too ansible-playbook -i "$work/inventory.yml" -e ima_snapshot_target=fleet "$here/prepare.yml"
for host in ima-grows ima-quiet ima-robbed; do
    has_shards "$host" 1 || fail "$host was not rotated"
done

section 'the rulebook of the collection'
cat > "$work/vars.yml" << VARS
ima_snapshot_store: $work/store
measured: [ima-grows, ima-quiet, ima-robbed, ima-away]
ima_threshold_interval: 1
ima_threshold_records: 50
ima_threshold_command: [/usr/local/sbin/ima-snapshot]
VARS
grow() { # HOST COUNT
    quietly here_too ansible "$1" -i "$work/inventory.yml" -m integrity.ima.ima_emulator -a "directory=/var/lib/ima-kernel grow=$2"
}
said() {
    grep -q "$1" "$work/rulebook.log"
}
cd "$work"
setsid ip netns exec "$network" ansible-rulebook -i "$work/inventory.yml" --rulebook integrity.ima.rotate --vars "$work/vars.yml" \
    > "$work/rulebook.log" 2>&1 < /dev/null &
rulebook=$!
within 90 'the host with a fault is named' said "'foreign_trim at index 31'"
within 30 'the host that is away is named' said "'reason': 'unreachable'"
grow ima-quiet 30
grow ima-grows 30
sleep 4 # several questions
if said 'PLAY \['; then fail 'a rotation began below the threshold'; fi
grow ima-grows 30
within 90 'a rotation brought the host that passed the threshold' has_shards ima-grows 2
within 60 'its fleet document is written' collected 2
grow ima-grows 60
within 90 'the next time it passed the threshold, too' has_shards ima-grows 3
within 60 'its fleet document is written' collected 3
kill -TERM "$rulebook"
gone() { ! kill -0 -- "-$rulebook" 2> /dev/null; }
within 60 'all of it ends when it is told to' gone
rulebook=''
if [ "$(grep -c 'PLAY \[Rotate\]' "$work/rulebook.log")" != 2 ]; then fail 'not two rotations'; fi
for host in ima-quiet ima-robbed; do
    has_shards "$host" 1 || fail "$host was rotated"
done

section 'what the store holds'
quietly here_too ansible-playbook -i "$work/inventory.yml" "$here/verify.yml"
grep -E '^ *"?ima-(grows|quiet) ' "$work/log" || true

section 'a host that says templates'
cat > "$work/hostile" << HOSTILE
#!/bin/sh
cat << 'ANSWER'
{"version":1,"name":"{{ lookup('ansible.builtin.pipe', 'touch $work/owned') }}","boot_id":"0","flavour":"delete_n","emulated":true,
 "count":99,"cut":0,"base":0,"lag":99,"lag_bytes":9,"sequence":0,"generation":0,"acknowledged":0,"age":0,"due":true,"holders":[],
 "fault":{"reason":"pcr_mismatch","index":1,"boot_id":null,"message":"{{ lookup('ansible.builtin.pipe', 'touch $work/owned') }}"}}
ANSWER
HOSTILE
chmod 0755 "$work/hostile"
printf 'hostile: %s\nsay: %s\n' "$work/hostile" "$here/say.yml" > "$work/hostile.yml"
timeout 90 ansible-rulebook -i "$work/inventory.yml" --rulebook "$here/hostile.yml" --vars "$work/hostile.yml" > "$work/rulebook.log" 2>&1 < /dev/null ||
    fail 'the rulebook failed'
said '?? lookup' || fail 'the playbook did not say what the host said'
if [ -e "$work/owned" ]; then fail 'a command of the host ran on the controller'; fi
echo 'seen: what it says is text'

printf '\nPASSED: tests/eda in %d s\n' "$SECONDS"
