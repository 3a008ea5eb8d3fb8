# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# In the guest as sitecustomize.py: SIGKILL to the process at one instant, which the environment names.
#   KILL_AT=shard          a shard has its name, its manifest does not exist yet
#   KILL_AT=before-delete  the journal says what is going to be deleted, the kernel has not been asked yet
#   KILL_AT=after-delete   the kernel has deleted, the journal does not say so yet
#   KILL_AT=before-D, after-D   the same around the deletion of a staged list

import os
import re
import signal

where, link, write = os.environ.get("KILL_AT"), os.link, os.write


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def deadly_link(source, target, **options):
    link(source, target, **options)
    if where == "shard" and os.fspath(target).endswith(".ima.gz"):
        die()


def deadly_write(descriptor, data):
    what = "D" if bytes(data) == b"D\n" else "delete" if re.match(rb"[0-9]+\n\Z", bytes(data)) else ""
    deletes = what and "/security/" in os.readlink(f"/proc/self/fd/{descriptor}")
    if deletes and where == f"before-{what}":
        die()
    written = write(descriptor, data)
    if deletes and where == f"after-{what}":
        die()
    return written


os.link, os.write = deadly_link, deadly_write
