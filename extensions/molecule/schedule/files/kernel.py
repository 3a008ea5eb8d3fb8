# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: kernel.py boot|run DIRECTORY: what happens to the emulated kernel when its host boots, runs and stops.

``boot`` starts a new boot of the kernel. ``run`` has it record three files a second, and forty when the host stops it:
the last records before a shutdown.
"""

from __future__ import annotations

import signal
import sys
import threading

from ansible_collections.integrity.ima.plugins.module_utils import _emulated

command, directory = sys.argv[1:]
if command == "boot":
    _emulated.reboot(directory)
else:
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_unused: stop.set())
    while not stop.wait(1):
        _emulated.grow(directory, 3)
    _emulated.grow(directory, 40)
