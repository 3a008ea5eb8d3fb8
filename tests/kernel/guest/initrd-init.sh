#!/bin/sh
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# In the initrd: load the modules in the order of their names, mount the disk, go on there.
b=/bin/busybox
$b mount -t devtmpfs dev /dev
$b mount -t proc proc /proc
for module in /mod/*.ko; do
    [ ! -f "$module" ] || $b insmod "$module"
done
tries=0
while [ ! -b /dev/vda ] && [ $tries -lt 600 ]; do
    $b usleep 100000
    tries=$((tries + 1))
done
$b mount -t ext4 /dev/vda /root || $b poweroff -f
$b mount --move /dev /root/dev
$b umount /proc
exec $b switch_root /root /usr/sbin/init
