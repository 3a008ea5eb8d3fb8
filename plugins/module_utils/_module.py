# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The one place where the library meets AnsibleModule: call, then result or ``fail_json``."""

from __future__ import annotations

import errno
import socket
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError, printable
from ansible_collections.integrity.ima.plugins.module_utils._protocol import CONFIG, Config, load

CONFIG_SPEC: dict[str, t.Any] = {"config": {"type": "path", "default": CONFIG}}


def failure_of(error: Exception) -> dict[str, t.Any]:
    """Return the arguments of ``fail_json`` for an error: ours, or one of the system's that nobody expected there."""
    if isinstance(error, ImaError):
        return error.result()
    if not isinstance(error, OSError):
        raise error
    name = errno.errorcode.get(error.errno or 0, "?")
    where = f" ({printable(str(error.filename))})" if error.filename else ""
    return {"msg": f"The system answered: {error.strerror}{where}.", "reason": "system", "errno": name}


def run(module: t.Any, act: t.Callable[[], dict[str, t.Any]]) -> t.NoReturn:
    """Exit with what ``act`` returns (``diff`` only if it was asked for), or fail with the error that it raises."""
    try:
        result = act()
    except (ImaError, OSError) as error:
        details = failure_of(error)
        details["msg"] = f"{printable(socket.gethostname())}: {details['msg']}"
        module.fail_json(**details)
    else:
        if not module._diff:
            result.pop("diff", None)
        module.exit_json(**result)
    raise AssertionError("exit_json and fail_json do not return")


def run_on_host(module: t.Any, act: t.Callable[[Config], dict[str, t.Any]]) -> t.NoReturn:
    """The same for what needs the host's config."""
    run(module, lambda: act(load(module.params["config"])))
