#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: tree.sh DIRECTORY...   prints digests of every name and of every byte below

set -euo pipefail

for directory in "$@"; do
    [ -e "$directory" ] || continue
    find "$directory" -type f -exec sha256sum {} + | sort | sha256sum
    find "$directory" | sort | sha256sum
done
