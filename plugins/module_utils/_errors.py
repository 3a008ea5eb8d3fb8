# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The errors of the library: each says what happened, what was kept and what to do next."""

from __future__ import annotations

import typing as t


def printable(raw: bytes | str) -> str:
    """Text that is safe in a result or a log: foreign bytes become ``\\xNN``, control characters too."""
    text = raw if isinstance(raw, str) else raw.decode("utf-8", "backslashreplace")
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in text)


class ImaError(Exception):
    """An expected condition.

    ``reason`` is for machines; it is one word per condition and never changes its meaning.
    ``kept`` says what is safe, ``hint`` what to do next; ``details`` are JSON values (path, index, offset, ...).
    """

    default_reason = "error"

    def __init__(self, msg: str, *, reason: str = "", kept: str = "", hint: str = "", **details: t.Any) -> None:
        super().__init__(msg)
        self.msg = msg
        self.reason = reason or self.default_reason
        self.kept = kept
        self.hint = hint
        self.details = details

    def __str__(self) -> str:
        parts = [self.msg.rstrip(".") + "."]
        if self.kept:
            parts.append(f"Kept: {self.kept.rstrip('.')}.")
        if self.hint:
            parts.append(f"Next: {self.hint.rstrip('.')}{'' if self.hint.endswith('?') else '.'}")
        return printable(" ".join(parts))

    def result(self) -> dict[str, t.Any]:
        """The arguments of ``fail_json``: ``msg``, ``reason`` and the details."""
        return dict(self.details, msg=str(self), reason=self.reason)


class KernelError(ImaError):
    """The kernel's files (or the emulated ones) refused, or are not there."""

    default_reason = "kernel"


class ListError(ImaError):
    """A measurement list is not what the kernel writes. Details: ``index`` (record), ``offset`` (byte)."""

    default_reason = "malformed_list"


class ConfigError(ImaError):
    """The well-known config is missing, unsafe, or says what nobody understands."""

    default_reason = "config"


class LockError(ImaError):
    """The lock could not be had, or is not a lock."""

    default_reason = "locked"


class SpoolError(ImaError):
    """The shards and manifests on the host are not usable as they are."""

    default_reason = "spool"


class HistoryError(ImaError):
    """The kernel's list does not continue what the spool holds: somebody trimmed, or records are lost."""

    default_reason = "history"


class TrimError(ImaError):
    """A trim was asked for that would lose a record, or cannot be done on this flavour."""

    default_reason = "trim_refused"


class ManifestError(ImaError):
    """A manifest is not canonical, not of the schema, or does not continue the chain."""

    default_reason = "manifest"


class StoreError(ImaError):
    """The central storage refused, or holds something else under a name of ours."""

    default_reason = "store"


class EmulatorError(ImaError):
    """The emulated kernel was asked for something that it cannot do."""

    default_reason = "emulator"


class WriteError(ImaError):
    """A durable write did not happen, or its outcome is not known; nothing that was sealed is touched."""

    default_reason = "write_failed"
