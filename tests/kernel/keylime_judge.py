# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: keylime_judge.py ASCII_LIST PCR10_SHA256: Keylime's verifier replays the list, in its own environment."""

from __future__ import annotations

import logging
import pathlib
import sys
import types

# Only Debian packages the GnuPG binding, and nothing here signs.
sys.modules["gpg"] = types.ModuleType("gpg")

from keylime.agentstates import AgentAttestState
from keylime.common.algorithms import Hash
from keylime.ima import ima

logging.disable(logging.CRITICAL)
path, wanted = sys.argv[1:]
lines = pathlib.Path(path).read_bytes().decode("utf-8", "surrogateescape").splitlines(True)
found, failure = ima.process_measurement_list(
    AgentAttestState("host"), lines, None, pcrval=wanted, hash_alg=Hash.SHA256
)
print(found)
sys.exit(0 if found == wanted and not failure else 1)
