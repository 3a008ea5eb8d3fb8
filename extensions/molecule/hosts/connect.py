# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""usage: ip netns exec NETWORK python3 connect.py HOST PORT: hands ssh a connection there (ProxyUseFdpass)."""

import socket
import sys

connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
with socket.socket(fileno=sys.stdout.fileno()) as ssh:
    socket.send_fds(ssh, [b"\0"], [connection.fileno()])
