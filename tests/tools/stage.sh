#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: stage.sh COLLECTION_DIRECTORY
# Copies the collection as it is now (tracked files, and new ones that git does not ignore) to a real path
# .../ansible_collections/integrity/ima: ansible-test, ansible-lint and mypy want that path, and take no symbolic link.

set -euo pipefail

destination=$1
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
unset "${!GIT_@}"

case $destination in
    */ansible_collections/integrity/ima) ;;
    *)
        echo "error: $destination does not end in ansible_collections/integrity/ima" >&2
        exit 1
        ;;
esac

files() {
    if git rev-parse --is-inside-work-tree > /dev/null 2>&1 && [ -e .git ]; then
        git ls-files -coz --exclude-standard
    else # an unpacked archive
        find . \( -path ./.venv -o -path ./build -o -path ./.git -o -path ./tests/output -o -name __pycache__ -o -name '.*_cache' \
            -o -path ./.ansible -o -path ./.nox -o -name .hypothesis -o -name .plugin-cache.yaml \) -prune -o \( -type f -o -type l \) -printf '%P\0'
    fi
}

existing() { # git also names files that are deleted, but not yet so in its index
    local file
    while IFS= read -r -d '' file; do
        if [ -e "$file" ] || [ -L "$file" ]; then
            printf '%s\0' "$file"
        fi
    done
}

rm -rf "$destination"
mkdir -p "$destination"
files | existing | tar --create --null --no-recursion --files-from=- --file=- | tar --extract --directory="$destination" --file=-

# The tools ask git which files there are. Without a repository of its own the copy would count as
# an ignored directory of the checkout around it, and they would find nothing.
if command -v git > /dev/null; then
    git -C "$destination" init --quiet
fi
