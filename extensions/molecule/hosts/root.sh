#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: root.sh DIRECTORY
# A Debian root file system with systemd, made once: the hosts of the scenario "schedule" boot from it and do not change it.
# The packages come from the mirror that this machine's own apt uses, or from MOLECULE_MIRROR=URI. Another directory is another cache.

set -euo pipefail

directory=$1
suite=trixie
packages=systemd,systemd-sysv,dbus,openssh-server,iproute2,python3,kmod
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
made="$suite $packages"

if [ "$(cat "$directory/root.made" 2> /dev/null || true)" = "$made" ]; then
    exit 0
fi
# shellcheck disable=SC2016 # apt-get fills these in
mirror=${MOLECULE_MIRROR:-$(apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(REPO_URI)' | sed -n 's/^Debian|Debian|//p' | head -n 1)}
if [ -z "$mirror" ]; then
    echo 'error: this machine names no Debian mirror: run apt-get update, or give MOLECULE_MIRROR=URI' >&2
    exit 1
fi
mkdir -p "$directory"
rm -rf "$directory/root.made" "$directory/root" "$directory/root.new"
options=()
for name in man doc locale info; do
    options+=("--dpkgopt=path-exclude=/usr/share/$name/*")
done
nice -n 19 mmdebstrap --quiet --variant=minbase "${options[@]}" "--include=$packages" '--aptopt=Acquire::Languages "none"' \
    "$suite" "$directory/root.new" "deb [signed-by=$keyring] $mirror $suite main"
# No identity of its own, no password, nothing that waits for hardware or a network that is there from the start.
root=$directory/root.new
rm -f "$root"/etc/ssh/ssh_host_*
: > "$root/etc/machine-id"
for unit in systemd-timesyncd.service systemd-networkd.service systemd-resolved.service apt-daily.timer apt-daily-upgrade.timer \
    dpkg-db-backup.timer fstrim.timer e2scrub_all.timer getty.target console-getty.service ssh.socket; do
    ln -sfn /dev/null "$root/etc/systemd/system/$unit"
done
systemctl --root="$root" --quiet enable ssh.service
mv "$root" "$directory/root"
printf '%s\n' "$made" > "$directory/root.made"
