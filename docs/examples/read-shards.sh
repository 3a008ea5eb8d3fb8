#!/bin/sh
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: read-shards.sh [-f] [AFTER] > records
# Writes the records of the shards behind number AFTER (0: all) to standard output, in order. With -f it goes on as new shards are
# sealed. The number of the last shard that was written goes to standard error: give it as AFTER the next time.
# It needs util-linux for flock, and runs as root, as the spool is root's.
set -eu

follow=''
if [ "${1:-}" = -f ]; then
    follow=1
    shift
fi
after=${1:-0}
config=${IMA_SNAPSHOT_CONFIG:-/etc/ima/snapshot.conf}
value() { sed -n "s/^$1[[:space:]]*=[[:space:]]*//p" "$config"; }
spool=$(value spool)
lock=$(value lock)
grep -qxF '{"format":"integrity.ima spool","version":1}' "$spool/format.json"

new_shards() { # number and path without suffix of each sealed shard behind $after; it is sealed when its manifest is there
    find "$spool/shards" -name '*-*-*.json' | awk -F/ -v after="$after" '
        { split($NF, part, "-"); if (part[1] + 0 > after + 0) print part[1] + 0, substr($0, 1, length($0) - 5) }' | sort -n
}

while :; do
    # Read without the lock: it tells whether there is anything new.
    generation=$(cat "$spool/generation" 2> /dev/null || echo 0)
    if [ "$generation" -gt "$after" ]; then
        exec 9< "${lock:-$spool/lock}"
        flock -s -w 60 9
        shards=$(new_shards)
        while read -r number stem; do
            if [ "$number" -ne "$((after + 1))" ]; then
                echo "read-shards.sh: between the shards $after and $number something is missing" >&2
                exit 1
            fi
            file=$stem.ima.gz
            if [ -e "$stem.plain.gz" ]; then file=$stem.plain.gz; fi # an encrypted shard's readable half
            if [ ! -e "$file" ]; then
                echo "read-shards.sh: shard $number was pruned: take it from the store" >&2
                exit 1
            fi
            zcat "$file"
            after=$number
        done << SHARDS
$shards
SHARDS
        exec 9<&-
        echo "$after" >&2
    fi
    if [ -z "$follow" ]; then break; fi
    sleep 1
done
