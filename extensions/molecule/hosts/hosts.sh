#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: hosts.sh up DIRECTORY NETWORK {namespace|systemd} NAME=ADDRESS...      hosts.sh down DIRECTORY NETWORK
# Hosts with an sshd, without a container engine. Each has a network namespace, processes and a file system of its own: a layer in memory
# over this machine's root (namespace), or over a Debian with systemd as PID 1 (systemd, ROOT=/its/root), which may reboot.
# Their bridge is in the network namespace NETWORK, so nothing of this machine's network is touched.

set -euo pipefail

command=$1 directory=$2 network=$3
shift 3
memory=$directory/memory

wire() { # NAMESPACE ADDRESS NUMBER
    ip netns add "$1"
    ip -n "$network" link add "v$3" type veth peer name eth0 netns "$1"
    ip -n "$network" link set "v$3" master bridge up
    ip -n "$1" link set lo up
    ip -n "$1" address add "$2/24" dev eth0
    ip -n "$1" link set eth0 up
}

layer() { # LOWER HOST: the lines of a shell that lay a root over LOWER
    printf 'mount --make-rprivate /\nmount -t overlay overlay -o "lowerdir=%s,upperdir=%s/upper,workdir=%s/work" "%s/root"\n' \
        "$1" "$2" "$2" "$2"
}

keys() { # ROOT: the same sshd everywhere
    cat << LINES
mkdir -p "$1/etc/ssh/molecule"
cp "$directory/host_key" "$directory/key.pub" "$1/etc/ssh/molecule/"
chmod 0600 "$1/etc/ssh/molecule/host_key"
LINES
}

# An empty home: the profile that root has on this machine is no part of a host.
sshd_config() { # ADDRESS
    cat << LINES
ListenAddress $1:22
HostKey /etc/ssh/molecule/host_key
AuthorizedKeysFile /etc/ssh/molecule/key.pub
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
SetEnv HOME=/molecule
Subsystem sftp internal-sftp
LINES
}

start_namespace() { # NAME NAMESPACE HOST ADDRESS
    local name=$1 namespace=$2 host=$3 root=$3/root
    {
        echo 'set -e'
        layer / "$host"
        cat << LINES
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys"
mount --rbind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/run"
mount -t tmpfs tmpfs "$root/tmp"
mkdir -p "$root/run/sshd"
hostname $name
LINES
        keys "$root"
        echo "exec chroot '$root' /usr/sbin/sshd -D -e -f /etc/ssh/molecule/sshd_config"
    } > "$host/start"
    mkdir -p "$host/upper/etc/ssh/molecule"
    sshd_config "$4" > "$host/upper/etc/ssh/molecule/sshd_config"
    setsid ip netns exec "$namespace" unshare --mount --uts --pid --fork --kill-child bash "$host/start" > "$host/log" 2>&1 < /dev/null &
    echo $! > "$host/pid"
}

# shellcheck disable=SC2153 # ROOT comes from the environment
start_systemd() { # NAME NAMESPACE HOST ADDRESS
    local name=$1 namespace=$2 host=$3 root=$3/root
    {
        echo 'set -e'
        layer "$ROOT" "$host"
        echo 'mount -t proc proc /proc'
        keys "$root"
        # a systemd takes the control group it is in for its own
        cat << LINES
for hierarchy in /sys/fs/cgroup /sys/fs/cgroup/unified /sys/fs/cgroup/systemd; do
    if [ -e "\$hierarchy/cgroup.procs" ]; then
        mkdir -p "\$hierarchy/$namespace"
        echo \$\$ > "\$hierarchy/$namespace/cgroup.procs"
    fi
done
LINES
        # what nspawn keeps for itself, out of the machine's sight
        printf 'mkdir -p /run/systemd/nspawn\nmount -t tmpfs tmpfs /run/systemd/nspawn\n'
        # 133: it reboots; the layer stays
        cat << LINES
status=133
while [ "\$status" = 133 ]; do
    status=0
    systemd-nspawn --register=no --keep-unit --quiet --directory="$root" --machine=$name --hostname=$name \\
        --network-namespace-path=/run/netns/$namespace --console=pipe --boot || status=\$?
done
LINES
    } > "$host/start"
    mkdir -p "$host/upper/etc/ssh"
    sshd_config "$4" > "$host/upper/etc/ssh/sshd_config"
    setsid unshare --mount --pid --fork --kill-child bash "$host/start" > "$host/log" 2>&1 < /dev/null &
    echo $! > "$host/pid"
}

answers() { # ADDRESS
    ip netns exec "$network" bash -c "exec 3<> /dev/tcp/$1/22 && read -r -t 5 _banner <&3" 2> /dev/null
}

up() { # KIND NAME=ADDRESS...
    local kind=$1 each name host number=0
    shift
    mkdir -p "$memory"
    mount -t tmpfs -o size=2g,mode=0700 tmpfs "$memory"
    for each in key host_key; do
        ssh-keygen -q -t ed25519 -N '' -C molecule -f "$directory/$each"
    done
    ip netns add "$network"
    ip -n "$network" link set lo up
    ip -n "$network" link add bridge type bridge
    ip -n "$network" address add 10.77.0.1/24 dev bridge
    ip -n "$network" link set bridge up
    for each in "$@"; do
        name=${each%%=*} number=$((number + 1)) host=$memory/${each%%=*}
        mkdir -p "$host/upper/molecule" "$host/work" "$host/root"
        wire "$network-$number" "${each#*=}" "$number"
        "start_$kind" "$name" "$network-$number" "$host" "${each#*=}"
    done
    for each in "$@"; do
        for _try in $(seq 600); do
            if answers "${each#*=}"; then continue 2; fi
            sleep 0.1
        done
        echo "error: ${each%%=*} does not answer" >&2
        tail -n 30 "$memory/${each%%=*}/log" >&2
        exit 1
    done
}

down() {
    local file namespace
    for file in "$memory"/*/pid; do
        if [ -e "$file" ]; then kill -KILL -- "-$(cat "$file")" 2> /dev/null || true; fi
    done
    for _try in $(seq 50); do # they are empty once the processes are gone
        find /sys/fs/cgroup -depth -type d -path "*/$network-*" -exec rmdir {} + 2> /dev/null || true
        if [ -z "$(find /sys/fs/cgroup -type d -path "*/$network-*" -print -quit)" ]; then break; fi
        sleep 0.1
    done
    for namespace in $(ip netns list | awk -v network="$network" '$1 == network || index($1, network "-") == 1 { print $1 }'); do
        ip netns delete "$namespace"
    done
    for _try in $(seq 50); do
        if ! mountpoint -q "$memory" || umount "$memory" 2> /dev/null; then break; fi
        sleep 0.1
    done
    rm -rf "$directory"
}

"$command" "$@"
