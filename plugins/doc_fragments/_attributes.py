# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

from __future__ import annotations


class ModuleDocFragment:
    # For every module. "platform" and "async" are the same everywhere; a module states "support" (and, where it is
    # not full, "details") of the other attributes itself, or takes INFO_MODULE, in any order.
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Predicts in check mode what it would do, and changes nothing on the host, not even a lock file.
  diff_mode:
    description: Shows in diff mode how the state differs before and after, as counts and digests, never as contents.
  idempotent:
    description:
      - A second run with the same options changes nothing.
      - This assumes that the kernel measured nothing between the two runs. A system at work measures all the time.
  async:
    description: Can be run with the C(async) keyword.
    support: full
  platform:
    description: The systems that it runs on.
    platforms: posix
    support: full
  safe_file_operations:
    description: Writes files so that a crash leaves the old one or the new one, with the final mode from the start.
"""

    # For modules that only read. Used together with DOCUMENTATION.
    INFO_MODULE = r"""
options: {}
attributes:
  check_mode:
    support: full
    details:
      - It only reads, and does the same in check mode.
  diff_mode:
    support: N/A
    details:
      - It only reads.
  idempotent:
    support: full
    details:
      - It only reads.
  safe_file_operations:
    support: N/A
    details:
      - It writes no files.
"""

    # For the members of the action groups (meta/runtime.yml): each module of a group has the option that it is for.
    # Used together with DOCUMENTATION. A module of both groups names both fragments, and states the membership itself.
    ACTIONGROUP_IMA = r"""
options: {}
attributes:
  action_group:
    description:
      - Takes the default of an option from C(module_defaults), C(config) from C(group/integrity.ima.ima) and C(store)
        from C(group/integrity.ima.stores).
    membership:
      - integrity.ima.ima
    support: full
"""

    ACTIONGROUP_STORES = r"""
options: {}
attributes:
  action_group:
    description:
      - Takes the default of an option from C(module_defaults), C(config) from C(group/integrity.ima.ima) and C(store)
        from C(group/integrity.ima.stores).
    membership:
      - integrity.ima.stores
    support: full
"""
