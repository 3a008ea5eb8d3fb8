#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: run.sh   (make integration; ansible on the PATH, the collection installed below ANSIBLE_COLLECTIONS_PATH)
# The modules on real connections: sshd on ports of 127.0.0.1, three emulated hosts behind them, become, pipelining on and off;
# then every module on its own: check, diff, run, run again, and its failures. Everything lies in one temporary directory.
# As root it makes a user and a rule for sudo, and removes both at the end; as another user it connects as that user.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
captures=$here/../fixtures/captures/kernel-lab
work=$(mktemp -d /tmp/ima-integration.XXXXXX)
user='' sudoers='' made_run_sshd=0
pids=()

cleanup() {
    local status=$? pid
    trap - EXIT
    for pid in "${pids[@]}"; do
        kill "$pid" 2> /dev/null || true
    done
    # masters of shared connections
    for socket in "$work"/cp/*; do
        if [ -S "$socket" ]; then ssh -o ControlPath="$socket" -O exit x > /dev/null 2>&1 || true; fi
    done
    if [ -n "$sudoers" ]; then rm -f "$sudoers"; fi
    if [ -n "$user" ]; then
        for _try in 1 2 3 4 5; do
            userdel "$user" 2> /dev/null && break
            sleep 0.5
        done
    fi
    if [ "$made_run_sshd" = 1 ]; then rmdir /run/sshd 2> /dev/null || true; fi
    if [ "$status" -ne 0 ]; then
        printf '\nFAILED: tests/integration\n'
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

play() { # quiet when it succeeds
    local log=$work/log.$RANDOM
    if ! ansible-playbook "$@" > "$log" 2>&1; then
        tail -n 120 "$log"
        printf 'error: ansible-playbook %s\n' "$*" >&2
        return 1
    fi
    if grep -nE '\[(WARNING|DEPRECATION WARNING|ERROR)\]' "$log" | grep -vE "$expected_warnings"; then
        printf 'error: warnings in ansible-playbook %s\n' "$*" >&2
        return 1
    fi
    grep -E '^(PLAY RECAP|[a-z]+ +: ok=)' "$log" | sed 's/ *\*\**//'
}
# nobody promises anything about the Python that a host happens to have
expected_warnings='interpreter|No inventory was parsed|provided hosts list is empty|Using a template for task args|Connection refused|would remove the shards of|exists already with other bytes'

section 'the machine'
unset ANSIBLE_CONFIG
export ANSIBLE_CONFIG=$work/ansible.cfg ANSIBLE_HOME=$work/ansible ANSIBLE_LOCALHOST_WARNING=false ANSIBLE_INVENTORY_UNPARSED_WARNING=false
export LC_ALL=C.UTF-8
cat > "$ANSIBLE_CONFIG" << CONFIG
[defaults]
host_key_checking = false
retry_files_enabled = false
local_tmp = $work/tmp
timeout = 10
[ssh_connection]
control_path_dir = $work/cp
retries = 0
ssh_args = -F /dev/null -o ControlMaster=auto -o ControlPersist=20s -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR
CONFIG
chmod 0755 "$work"
mkdir -m 0755 "$work/fleet" "$work/home" "$work/store"
python=${ANSIBLE_PYTHON_INTERPRETER:-$(command -v python3)}
managed=${MANAGED_PYTHON:-}
# newer ones manage 3.9 and up
if [ -z "$managed" ] && ansible --version | grep -q 'core 2\.19\.'; then
    for candidate in $(type -ap python3.8) "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.8*/bin/python; do
        if "$candidate" -c 'import ctypes, zlib' 2> /dev/null; then managed=$candidate && break; fi
    done
fi
if [ -z "$managed" ]; then
    for minor in 9 10 11 12 13 14; do
        if command -v "python3.$minor" > /dev/null && "python3.$minor" -c 'import zlib' 2> /dev/null; then
            managed=$(command -v "python3.$minor")
            break
        fi
    done
    managed=${managed:-$python}
fi
managed=$("$managed" -c 'import os, sys; print(os.path.realpath(sys.executable))')
printf 'ansible %s, managed Python %s\n' "$(ansible --version | sed -n '1s/.*core \(.*\)\]/\1/p')" "$("$managed" --version)"

section 'sshd on ports of its own'
sshd=$(PATH=$PATH:/usr/sbin:/sbin type -p sshd || true)
if [ -z "$sshd" ] || ! command -v ssh > /dev/null; then
    echo 'SKIPPED: there is no sshd or no ssh here (Debian: openssh-server, openssh-client)'
    connection=local remote_user=$(id -un)
else
    connection=ssh
    ssh-keygen -q -t ed25519 -N '' -f "$work/key"
    ssh-keygen -q -t ed25519 -N '' -f "$work/host_key"
    chmod 0644 "$work/key.pub"
    cp "$work/key.pub" "$work/authorized_keys"
    if [ "$(id -u)" = 0 ]; then
        if [ ! -d /run/sshd ]; then mkdir -m 0755 /run/sshd && made_run_sshd=1; fi
        if command -v sudo > /dev/null && command -v useradd > /dev/null; then
            user=imait$$
            useradd --no-create-home --home-dir "$work/home" --shell /bin/sh --password '*' "$user"
            chown "$user" "$work/home"
            sudoers=/etc/sudoers.d/$user
            printf '%s ALL=(ALL) NOPASSWD: ALL\nDefaults:%s !requiretty\n' "$user" "$user" > "$sudoers"
            chmod 0440 "$sudoers"
            remote_user=$user become=true method=sudo
        else
            echo 'SKIPPED: nobody to become root: there is no sudo or no useradd here (Debian: sudo, passwd). As root, become by su'
            remote_user=root become=true method=su
        fi
    else
        remote_user=$(id -un)
        if sudo -n true 2> /dev/null; then become=true method=sudo; else become=false method=sudo; fi
    fi
fi
become=${become:-false} method=${method:-sudo}
mapfile -t ports < <("$python" - << 'PYTHON'
import socket

sockets = [socket.create_server(("127.0.0.1", 0)) for _number in range(3)]
print(*(each.getsockname()[1] for each in sockets), sep="\n")
PYTHON
)
names=(export delete stage) flavours=(export_only delete_n staged)
{
    echo '[fleet]'
    for number in 0 1 2; do
        echo "${names[$number]} ansible_host=127.0.0.1 ansible_port=${ports[$number]} flavour=${flavours[$number]}"
    done
    echo '[fleet:vars]'
    echo "ansible_connection=$connection"
    echo "ansible_user=$remote_user"
    echo "ansible_ssh_private_key_file=$work/key"
    echo "ansible_python_interpreter=$managed"
    echo "ansible_become=$become"
    echo "ansible_become_method=$method"
    echo "base=$work/fleet/{{ inventory_hostname }}"
    echo '[all:vars]'
    echo "store=$work/store"
    echo "work=$work"
    echo "captures=$captures"
    echo "controller_python=$python"
} > "$work/inventory"
if [ "$connection" = ssh ]; then
    for number in 0 1 2; do
        cat > "$work/sshd.$number" << CONFIG
Port ${ports[$number]}
ListenAddress 127.0.0.1
HostKey $work/host_key
AuthorizedKeysFile $work/authorized_keys
PidFile none
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
Subsystem sftp internal-sftp
CONFIG
        "$sshd" -D -e -f "$work/sshd.$number" 2> "$work/sshd.$number.log" &
        pids+=($!)
    done
    for number in 0 1 2; do
        for _try in $(seq 50); do
            if (exec 3<> "/dev/tcp/127.0.0.1/${ports[$number]}") 2> /dev/null; then continue 2; fi
            sleep 0.1
        done
        echo "error: sshd on port ${ports[$number]} does not answer" >&2
        cat "$work/sshd.$number.log"
        exit 1
    done
    printf 'as %s, become %s by %s, ports %s\n' "$remote_user" "$become" "$method" "${ports[*]}"
fi
cp "$captures/6.1-ima-ng-t2-violations/binary_runtime_measurements" "$work/odd"
chmod 0644 "$work/odd"

section 'install on three hosts'
play -i "$work/inventory" "$here/playbooks/install.yml"
section 'install again'
play -i "$work/inventory" "$here/playbooks/install.yml" -e again=true

round=0
for pipelining in true false true; do
    round=$((round + 1))
    section "rotation $round, pipelining $pipelining"
    ANSIBLE_PIPELINING=$pipelining play -i "$work/inventory" "$here/playbooks/rotate.yml" -e "number=$round"
done

section 'the command on three hosts'
play -i "$work/inventory" "$here/playbooks/command.yml"

section 'stitched lists, and evmctl on them'
if ! command -v evmctl > /dev/null; then
    echo 'SKIPPED: evmctl is not installed (package ima-evm-utils)'
fi
play -i "$work/inventory" "$here/playbooks/stitch.yml" -e "evmctl=$(command -v evmctl || true)"

# A fleet of its own: hosts/<name> has config, spool and kernel.
cat > "$work/role.json" << JSON
{"base": "$work/role/{{ inventory_hostname }}", "store": "$work/role-store", "ima_snapshot_store": "$work/role-store",
 "ima_snapshot_target": "fleet", "ima_snapshot_config": "{{ base }}/snapshot.conf", "ima_snapshot_spool": "{{ base }}/spool",
 "ima_snapshot_source": "emulated", "ima_snapshot_directory": "{{ base }}/kernel", "ima_snapshot_shard_records": 100}
JSON
mkdir -m 0755 "$work/role" "$work/role-store"
role() { # the kernels record, then a playbook, then a look at the newest fleet document, in one run
    local expect=$1 playbook=$2
    shift 2
    play -i "$work/inventory" -e "@$work/role.json" -e "{\"expect\": $expect}" "$@" \
        "$here/playbooks/grow.yml" "$playbook" "$here/playbooks/role.yml"
}
tree() { # as root: config, spool and kernel of every host, and the store
    local sudo=()
    if [ "$become" = true ] && [ "$(id -u)" != 0 ]; then sudo=(sudo); fi
    "${sudo[@]}" "$here/tree.sh" "$work/role" "$work/role-store"
}
section 'the role: strategies, batches, a limit, tags'
play -i "$work/inventory" -e "@$work/role.json" "$here/playbooks/install.yml"
role '{"documents": 1, "present": ["delete", "export", "stage"], "missing": []}' integrity.ima.rotate \
    -e ima_snapshot_strategy=free --tags ima_snapshot_rotate,untagged
role '{"documents": 2, "present": ["delete", "export", "stage"], "missing": []}' integrity.ima.rotate \
    -e ima_snapshot_strategy=host_pinned -e ima_snapshot_serial=2
role '{"documents": 3, "present": ["stage"], "missing": []}' integrity.ima.rotate --limit stage,localhost

section 'the role: check mode with diff'
before=$(tree)
play -i "$work/inventory" -e "@$work/role.json" --check --diff -e ima_snapshot_trim_after=never "$here/playbooks/main.yml"
if [ "$before" != "$(tree)" ]; then echo 'error: check mode has written' >&2 && exit 1; fi

section 'the role: only install, by its tag'
play -i "$work/inventory" -e "@$work/role.json" --tags ima_snapshot_install -e ima_snapshot_trim_after=never "$here/playbooks/main.yml"
if [ "$(grep -l '^trim_after = never$' "$work"/role/*/snapshot.conf | wc -l)" != 3 ]; then echo 'error: the tag did not install' >&2 && exit 1; fi
if [ "$(find "$work/role-store/fleet" -name '*.json' | wc -l)" != 3 ]; then echo 'error: the tag rotated' >&2 && exit 1; fi

section 'the role: one host fails, any_errors_fatal'
if role '{}' "$here/playbooks/main.yml" -e victim=delete > "$work/fatal" 2>&1; then
    echo 'error: a foreign trim did not fail the play' >&2 && exit 1
fi
grep -q 'somebody else trimmed' "$work/fatal" || { cat "$work/fatal" && exit 1; }
play -i "$work/inventory" -e "@$work/role.json" -e '{"expect": {"documents": 4, "present": ["export", "stage"], "missing": ["delete"]}}' \
    "$here/playbooks/role.yml"

section 'the role: one batch after the other, each with its document'
role '{"documents": 6, "present": ["export", "stage"], "missing": []}' "$here/playbooks/main.yml" -e batch=1 --limit export,stage,localhost

section 'the role: what is wrong in its variables is named'
# each mistake is an error, and is rescued
expected_warnings="$expected_warnings|ERROR.*Task failed" play -i localhost, "$here/playbooks/preflight.yml" \
    -e "work=$work controller_python=$python"

section 'the role: remove leaves evidence, unless told twice'
# ansible-core 2.21 does not say there what the store said
expected_warnings="$expected_warnings|'failed_when' expression evaluated" \
    play -i "$work/inventory" -e "@$work/role.json" --limit 'stage,export,localhost' "$here/playbooks/remove.yml"

section 'the role: shards that are encrypted'
mkdir -m 0755 "$work/sealed-store"
# that it refuses without the key is wanted, and rescued
expected_warnings="$expected_warnings|ERROR.*Task failed" play -i "$work/inventory" "$here/playbooks/encrypted.yml"

section 'the playbooks: a target that no host matches is an error'
for name in rotate prune enroll schedule remove; do
    if ansible-playbook -i "$work/inventory" "integrity.ima.$name" -e "@$work/role.json" -e ima_snapshot_target=nobody > "$work/nobody" 2>&1; then
        echo "error: $name did nothing, and says that all is well" >&2 && exit 1
    fi
    grep -q 'No host of the inventory matches nobody' "$work/nobody" || { cat "$work/nobody" && exit 1; }
done

section 'the playbooks: nor is it all well if a limit leaves nothing to do'
for name in rotate prune enroll schedule remove; do
    if ansible-playbook -i "$work/inventory" "integrity.ima.$name" -e "@$work/role.json" -e ima_snapshot_target=delete \
        --limit stage > "$work/nobody" 2>&1; then
        echo "error: $name did nothing within a limit, and says that all is well" >&2 && exit 1
    fi
    grep -q 'The limit leaves no host that matches delete' "$work/nobody" || { cat "$work/nobody" && exit 1; }
done
if ansible-playbook -i "$work/inventory" integrity.ima.remove --limit stage > "$work/nobody" 2>&1; then
    echo 'error: remove without a target did nothing within a limit, and says that all is well' >&2 && exit 1
fi
grep -q 'ima_snapshot_target, which must be given' "$work/nobody" || { cat "$work/nobody" && exit 1; }
if ansible-playbook -i "$work/inventory" integrity.ima.remove -e "@$work/role.json" -e ima_snapshot_remove_evidence=true \
    -e ima_snapshot_remove_confirm=stage > "$work/nobody" 2>&1; then
    echo 'error: remove takes evidence from several hosts' >&2 && exit 1
fi
grep -q 'is for one host, and 3 match. Nothing was removed' "$work/nobody" || { cat "$work/nobody" && exit 1; }
if ansible-playbook -i "$work/inventory" integrity.ima.verify -e "@$work/role.json" --limit stage > "$work/nobody" 2>&1; then
    echo 'error: a limited verification verified nothing, and says that all is well' >&2 && exit 1
fi
grep -q 'Nothing was verified: --limit leaves out localhost' "$work/nobody" || { cat "$work/nobody" && exit 1; }
if ! ansible-playbook -i "$work/inventory" integrity.ima.verify -e "@$work/role.json" -e '{"ima_snapshot_hosts": ["stage"]}' \
    --limit stage,localhost > "$work/nobody" 2>&1; then
    cat "$work/nobody" && exit 1
fi

section 'each module: check, check with diff, run, run again'
play -i localhost, -c local "$here/playbooks/modules.yml" -e "work=$work captures=$captures ansible_python_interpreter=$managed"

section 'names that are not UTF-8'
play -i localhost, -c local "$here/playbooks/names.yml" -e "work=$work captures=$captures ansible_python_interpreter=$managed"

if [ "$connection" = ssh ]; then
    section 'a host that cannot be reached'
    kill "${pids[1]}"
    wait "${pids[1]}" 2> /dev/null || true
    # the shared connections would outlive it
    for socket in "$work"/cp/*; do
        if [ -S "$socket" ]; then ssh -o ControlPath="$socket" -O exit x > /dev/null 2>&1 || true; fi
    done
    play -i "$work/inventory" "$here/playbooks/unreachable.yml"
fi

section 'each failure has a reason'
play -i localhost, -c local "$here/playbooks/failures.yml" -e "work=$work captures=$captures ansible_python_interpreter=$managed"

printf '\nPASSED: tests/integration in %d s\n' "$SECONDS"
