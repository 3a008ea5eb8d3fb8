# shellcheck shell=sh
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# In the VM, before sshd: mounts, network, names. busybox only, so that the measurement list stays short.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sys /sys
$b mount -t securityfs securityfs /sys/kernel/security
$b grep -q ' /dev ' /proc/mounts || $b mount -t devtmpfs dev /dev
$b mkdir -p /dev/pts /dev/shm
$b mount -t devpts devpts /dev/pts
for directory in /dev/shm /run /tmp; do
    $b mount -t tmpfs tmpfs $directory
done
$b chmod 1777 /tmp
$b mkdir -p /run/sshd
$b mount -o remount,rw /
[ -s /etc/machine-id ] || $b sed 's/-//g' /proc/sys/kernel/random/uuid > /etc/machine-id
# shellcheck disable=SC2013  # words are what is wanted
for word in $($b cat /proc/cmdline); do
    case $word in
        lab.name=*) $b hostname "${word#lab.name=}" ;;
    esac
done
$b ip link set lo up
$b ip addr add 10.0.2.15/24 dev eth0
$b ip link set eth0 up
$b ip route add default via 10.0.2.2
[ ! -e /etc/lab-rc.local ] || $b sh /etc/lab-rc.local
$b sync
echo "LAB UP $($b hostname) after $($b cut -d' ' -f1 /proc/uptime) s" > /dev/console
