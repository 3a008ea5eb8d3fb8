# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""What a store is built on: objects under names with slashes, each written once and never again."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import io
import typing as t
import urllib.parse

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import StoreError

FORMAT_NAME = "format.json"
RETENTION_NAME = "retention.json"
FORMAT = b'{"format":"integrity.ima store","version":1}'
NO_FILE = -1  # the size of what has a name and is no regular file

Check = t.Callable[[t.BinaryIO], None]


class Objects(abc.ABC):
    """Objects under names such as ``hosts/web1/identity.json``.

    Every method raises :class:`OSError` (``FileNotFoundError`` for what is not there) or :class:`StoreError`.
    """

    name: str  # what acknowledgements call the store: no secret in it

    @abc.abstractmethod
    def folders(self, prefix: str) -> list[str]:
        """Return the names directly below ``prefix`` that have something below them."""

    @abc.abstractmethod
    def sizes(self, prefix: str) -> dict[str, int]:
        """Return name (relative to ``prefix``, up to two parts) and size in bytes of what is below ``prefix``.

        What is private to the store (unfinished deliveries, locks) is left out. What is no regular file has the size
        ``NO_FILE``; a directory's name ends with a slash.
        """

    @abc.abstractmethod
    def read(self, name: str, limit: int) -> bytes:
        """Return an object's first ``limit`` bytes, in no more memory than it has."""

    @abc.abstractmethod
    def open(self, name: str) -> t.BinaryIO:
        """Return an object's bytes as a stream."""

    @abc.abstractmethod
    def create(self, name: str, data: bytes) -> bool:
        """Create an object, durable when this returns. False: it was there with these bytes.

        Raises reason ``exists_different`` when it is there with others.
        """

    @abc.abstractmethod
    def create_from(self, name: str, part: str, check: Check, size: int, sha256: str) -> bool:
        """Create an object from the local file ``part``, as :meth:`create`.

        ``check`` reads it and raises for what it should not be; what the store has is compared with size and SHA-256
        from the store's side before this returns.
        """

    @abc.abstractmethod
    def confirms(self, name: str, size: int, sha256: str) -> bool:
        """Say, from what the store itself has now, whether an object has this size and SHA-256."""

    def rewritten(self, prefix: str) -> dict[str, bool] | None:
        """Return the names below ``prefix`` that were removed or written again; True: with other bytes.

        Only a store that keeps versions remembers. None: it does, but does not tell this account.
        """
        return {}

    @abc.abstractmethod
    def settle(self, prefix: str) -> None:
        """Make durable, or remove, what a dead writer left below ``prefix``; the caller keeps others away."""


class Signing(Objects):
    """Objects for whose creation somebody without credentials can be given an address."""

    @abc.abstractmethod
    def lacks(self, name: str, size: int, sha256: str) -> bool:
        """Say whether the name is free; False: it has these bytes. Raises reason ``exists_different``."""

    @abc.abstractmethod
    def sign(self, name: str, size: int, sha256: str) -> tuple[str, dict[str, str]]:
        """Return an address at which whoever has it can create this one object, and the headers that go with it."""


def require_store(objects: Objects, where: str, is_empty: t.Callable[[], bool]) -> None:
    """Refuse what is neither empty nor a store of this version: reason ``newer_version`` or ``store_foreign``."""
    found = _format(objects)
    if found is None:
        if is_empty():
            return
        # Another host's first rotation may have begun the store since it was asked.
        found = _format(objects)
    if found != FORMAT:
        newer = found is not None and found.startswith(FORMAT[:30])
        raise StoreError(
            f"{where} is {'a store of a newer version' if newer else 'not a store, and not empty'}",
            reason="newer_version" if newer else "store_foreign",
            path=where,
            hint="update the collection on this machine" if newer else "name an empty place of its own",
        )


def _format(objects: Objects) -> bytes | None:
    try:
        return objects.read(FORMAT_NAME, len(FORMAT) + 1)
    except FileNotFoundError:
        return None


def exists_different(where: str, ours: str) -> StoreError:
    """Return the error for a name that has other bytes already."""
    return StoreError(
        f"{where} exists already with other bytes (ours would have SHA-256 {ours})",
        reason="exists_different",
        kept="the object that was there",
        expected=ours,
        hint="two histories claim one name: keep both machines' spools and find out who wrote it",
    )


def library_missing(library: str, what: str) -> StoreError:
    """Return the error for a library that the controller lacks."""
    return StoreError(
        f"{what} needs the Python library {library}",
        reason="library_missing",
        hint=f"install {library} for the Python that runs ansible-playbook",
    )


def query_of(parts: urllib.parse.SplitResult, known: t.Sequence[str]) -> dict[str, str]:
    """Return the options behind the ``?`` of a store's address. Raises reason ``store_address``."""
    options = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - set(known))
    if unknown or parts.fragment:
        raise StoreError(
            f"A store's address {parts.scheme}:// has no option {', '.join(unknown) or '#'}",
            reason="store_address",
            hint=f"the options are {', '.join(known)}",
        )
    return options


def hashed(file: t.BinaryIO) -> tuple[int, str]:
    """Return size and SHA-256 of a stream, to its end."""
    digest, size = hashlib.sha256(), 0
    for chunk in iter(lambda: file.read(_durable.CHUNK), b""):
        digest.update(chunk)
        size += len(chunk)
    return size, digest.hexdigest()


class Source(io.RawIOBase):
    """A ``read(size)`` of a library as a raw stream, with its errors translated."""

    def __init__(
        self,
        read: t.Callable[[int], bytes],
        close: t.Callable[[], t.Any],
        asking: t.Callable[[], contextlib.AbstractContextManager[t.Any]],
    ) -> None:
        super().__init__()
        self._read, self._close, self._asking = read, close, asking

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: t.Any) -> int:
        """Fill ``buffer`` as far as one read goes."""
        with self._asking():
            data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Let go of what is behind it."""
        if not self.closed:
            self._close()
        super().close()
