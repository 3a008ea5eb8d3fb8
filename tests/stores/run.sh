#!/usr/bin/env bash
# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# usage: run.sh BIN [PYTEST ARGUMENT ...]
# The stores against real servers: see tests/tools/suite.sh. STORES_WORKERS=n (2).

set -euo pipefail

here=$(dirname "${BASH_SOURCE[0]}")
SUITE_WORKERS=${STORES_WORKERS:-2} exec "$here/../tools/suite.sh" "$here" "$@"
