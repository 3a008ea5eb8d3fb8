#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: gates.sh VENV GALAXY_VENV COLLECTION_DIRECTORY INSTALLED ARTEFACT BUILD [STEP ...]
# The checks that the Ansible community asks of a collection, without a container engine. Runs all steps, prints what became of
# each, and fails if one did. COLLECTION_DIRECTORY: a staged copy; INSTALLED: the collections path with the built collection.

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=$(realpath "$1") galaxy=$(realpath "$2") collection=$(realpath "$3") installed=$(realpath "$4") artefact=$(realpath "$5")
build=$(realpath "$6")
shift 6
logs=$build/gates-logs
mkdir -p "$logs"
unset PYTHONPATH "${!ANSIBLE_@}" "${!GIT_@}"
export PATH=$venv/bin:$PATH ANSIBLE_HOME=$build/cache/ansible ANSIBLE_NOCOLOR=1
root=$(cd "$collection/../../.." && pwd)
cd "$collection"
# several tools look at what git knows
git add --all

exceptions() { # no rule is turned off anywhere in what Ansible reads, and no sanity test is ignored
    if grep -rnE '#\s*noqa' --include='*.yml' --include='*.yaml' .; then return 1; fi
    if grep -nE '^(skip_list|warn_list|exclude_paths):' .ansible-lint; then return 1; fi
    if compgen -G 'tests/sanity/ignore*'; then return 1; fi
    grep -qx 'profile: production' .ansible-lint
}

lint() { # ruff, mypy, yamllint, ansible-lint with the profile production, no exceptions
    "$here/lint.sh" "$venv" "$collection" "$build/cache"
}

nox_sessions() { # those that need neither an environment of their own nor a container engine; lint and docs stand in for the others
    CI=true nox --no-venv --no-color --session formatters codeqa yamllint antsibull-nox-config license-check extra-checks
}

changelog() {
    antsibull-changelog lint
    antsibull-changelog lint-changelog-yaml changelogs/changelog.yaml
}

docs() {
    ANSIBLE_COLLECTIONS_PATH=$root antsibull-docs lint-collection-docs --plugin-docs --validate-collection-refs all \
        --disallow-unknown-collection-refs --check-extra-docs-refs .
}

site() { # build/docs-site/build/html
    local destination=$build/docs-site
    rm -rf "$destination"
    mkdir -p "$destination"
    export ANSIBLE_COLLECTIONS_PATH=$installed
    antsibull-docs sphinx-init --use-current --fail-on-error --dest-dir "$destination" --project integrity.ima \
        --title integrity.ima --copyright 'The integrity.ima authors' integrity.ima
    cd "$destination"
    # the pages of other collections and of ansible-core are not within reach everywhere
    sed -i '/^intersphinx_mapping = {/,/^}/d' conf.py
    printf "nitpicky = False\nsuppress_warnings = ['ref.*']\n" >> conf.py
    ./build.sh
    local page
    for page in ima_rotate_module ima_snapshot_role docsite/guide_first_rotation; do
        test -s "build/html/collections/integrity/ima/$page.html"
    done
    printf '%s pages: %s\n' "$(find build/html/collections -name '*.html' | wc -l)" "$destination/build/html/index.html"
}

environment() { # what an execution environment would install
    local said
    test -e meta/execution-environment.yml
    said=$("$galaxy/bin/ansible-builder" introspect "$installed")
    printf '%s\n' "$said"
    grep -q 'integrity.ima' <<< "$said"
}

importer() {
    local work=$build/galaxy-importer log
    rm -rf "$work"
    mkdir -p "$work"
    cd "$work"
    printf '[galaxy-importer]\nCHECK_REQUIRED_TAGS = True\nRUN_ANSIBLE_DOC = True\nRUN_ANSIBLE_LINT = True\nRUN_ANSIBLE_TEST = False\n' > importer.cfg
    log=$work/log
    PATH=$galaxy/bin:$PATH GALAXY_IMPORTER_CONFIG=$work/importer.cfg python -m galaxy_importer.main "$artefact" 2>&1 | tee "$log"
    # it warns where others fail
    if grep -E '^(WARNING|ERROR)|\[(WARNING|ERROR)\]' "$log"; then return 1; fi
    grep -q 'Importer processing completed successfully' "$log"
}

run() {
    case $1 in
        exceptions) exceptions ;;
        lint) lint ;;
        nox) nox_sessions ;;
        changelog) changelog ;;
        docs) docs ;;
        site) site ;;
        environment) environment ;;
        importer) importer ;;
        *)
            echo "error: there is no step $1"
            return 1
            ;;
    esac
}

steps=(exceptions lint nox changelog docs site environment importer)
if [ $# -gt 0 ]; then steps=("$@"); fi
failed=0 table=''
for step in "${steps[@]}"; do
    start=$SECONDS
    # a function that is part of a condition would not stop at the first error
    set +e
    (
        set -e
        run "$step"
    ) > "$logs/$step.log" 2>&1
    status=$?
    set -e
    outcome=passed
    if [ $status -ne 0 ]; then
        outcome=FAILED failed=1
        tail -n 60 "$logs/$step.log"
    fi
    row=$(printf '%-14s %-8s %5d s  %s' "$step" "$outcome" $((SECONDS - start)) "$logs/$step.log")
    printf '%s\n' "$row"
    table+=$row$'\n'
done
printf '\ngates:\n%s' "$table"
exit $failed
