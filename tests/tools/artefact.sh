#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: artefact.sh PYTHON COLLECTION_DIRECTORY ARTEFACT DIRECTORY
# What a newcomer gets: installs ARTEFACT in an environment with nothing but ansible-core and the artefact's own requirements.txt,
# with an empty HOME, then follows docs/tutorial.md as it is written, from an empty HOME again. COLLECTION_DIRECTORY, from which the artefact
# was built, stands in for the repository that the page names; both must give the same files. Everything lies in DIRECTORY.

set -euo pipefail

python=$1 source=$2 artefact=$(realpath "$3") directory=$4
tools=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$tools/../.." && pwd)
python=$("$python" -c 'import os, sys; print(os.path.realpath(sys._base_executable))')

section() {
    printf -- '--- %s (%s s)\n' "$1" "$SECONDS"
}

rm -rf "$directory"
mkdir -p "$directory/bin" "$directory/home"
directory=$(cd "$directory" && pwd)
unset PYTHONPATH PYTHONHOME VIRTUAL_ENV "${!ANSIBLE_@}" "${!GIT_@}"
ln -s "$python" "$directory/bin/python3"
export PATH=$directory/bin:/usr/local/bin:/usr/bin:/bin HOME=$directory/home LC_ALL=C.UTF-8
# the versions that make test has, whatever is the newest today
export PIP_CONSTRAINT=$root/requirements/demo.txt PIP_DISABLE_PIP_VERSION_CHECK=1 ANSIBLE_NOCOWS=1 ANSIBLE_NOCOLOR=1

section 'an empty environment, and the artefact in it'
"$python" -m venv "$directory/venv"
"$directory/venv/bin/pip" install --quiet ansible-core
"$directory/venv/bin/ansible-galaxy" collection install --offline "$artefact" > "$directory/install.log" 2>&1 || {
    cat "$directory/install.log"
    exit 1
}
installed=$HOME/.ansible/collections/ansible_collections/integrity/ima
"$directory/venv/bin/pip" install --quiet --requirement "$installed/requirements.txt"
# not from here, where a galaxy.yml lies
cd "$directory"
"$directory/venv/bin/ansible-galaxy" collection verify --offline integrity.ima 2>&1 | tail -n 1

section 'everything that is in it has documentation'
for type in module role; do
    "$directory/venv/bin/ansible-doc" --json --type "$type" --list integrity.ima > "$directory/$type.json"
done
"$directory/venv/bin/python" - "$installed" "$directory" << 'PYTHON'
import json
import pathlib
import sys

installed, directory = map(pathlib.Path, sys.argv[1:])
documented = {kind: set(json.loads((directory / f"{kind}.json").read_text())) for kind in ("module", "role")}
there = {
    "module": {f"integrity.ima.{path.stem}" for path in (installed / "plugins/modules").glob("*.py")},
    "role": {f"integrity.ima.{path.name}" for path in (installed / "roles").iterdir()},
}
if documented != there:
    sys.exit(f"error: in the artefact: {there}, documented: {documented}")
print(f"{len(there['module'])} modules, {len(there['role'])} role")
PYTHON

section 'the same files from the repository'
cp -R "$source" "$directory/repository"
(
    cd "$directory/repository"
    git init --quiet
    git add --all
    git -c user.name=test -c user.email=test@example.org -c commit.gpgsign=false commit --quiet --message test
)
address=$(sed -n 's/^repository: //p' "$source/galaxy.yml")
export GIT_CONFIG_COUNT=1 GIT_CONFIG_KEY_0=url.file://$directory/repository.insteadOf GIT_CONFIG_VALUE_0=$address
"$directory/venv/bin/ansible-galaxy" collection install --collections-path "$directory/cloned" "git+$address" \
    > "$directory/clone.log" 2>&1 || {
    cat "$directory/clone.log"
    exit 1
}
diff -r "$installed" "$directory/cloned/ansible_collections/integrity/ima"
printf '%s files\n' "$(find "$installed" -type f | wc -l)"

section 'the tutorial, as it is written'
rm -rf "$HOME"
mkdir "$HOME"
"$python" "$tools/tutorial.py" "$root/docs/tutorial.md"
if [ -e "$HOME/ima-tutorial" ]; then
    echo 'error: the tutorial left its directory behind' >&2
    exit 1
fi
printf 'PASSED: the artefact and the tutorial in %d s\n' "$SECONDS"
