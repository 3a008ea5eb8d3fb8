# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""What a store is built on: objects under names with slashes, each written once and never again."""

from __future__ import annotations

import abc
import typing as t

FORMAT_NAME = "format.json"
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

    @abc.abstractmethod
    def settle(self, prefix: str) -> None:
        """Make durable, or remove, what a dead writer left below ``prefix``; the caller keeps others away."""
