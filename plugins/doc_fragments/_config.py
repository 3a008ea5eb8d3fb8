# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

from __future__ import annotations


class ModuleDocFragment:
    # Where the well-known config is. It names everything else: spool, lock, lists, policy.
    DOCUMENTATION = r"""
options:
  config:
    description:
      - The well-known config of the snapshot tools on the host, an INI file.
      - It names the spool, the lock file, the measurement lists, the retention and the policy, so that every tool
        on the host works with the same ones.
      - It must belong to root, and nobody else may be allowed to write to it. The modules only read it.
    type: path
    default: /etc/ima/snapshot.conf
"""
