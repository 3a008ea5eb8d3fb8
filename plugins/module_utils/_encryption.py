# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""Shards that only the verifiers can read: CMS (RFC 5652) to the certificates of a directory, with the openssl program.

Encrypting hides paths and digests from the store and from who carries them. It proves nothing: what a shard is, its
manifest says, and that stays readable.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils import _durable
from ansible_collections.integrity.ima.plugins.module_utils._errors import ConfigError, StoreError, printable

CMS = "cms"
_ENCRYPT = ["cms", "-encrypt", "-binary", "-stream", "-aes-256-cbc", "-outform", "DER"]
_DECRYPT = ["cms", "-decrypt", "-binary", "-inform", "DER"]
_SAID = 2000


def recipients_in(directory: str) -> list[str]:
    """Return the certificates below ``directory``, sorted. Raises :class:`ConfigError` ``no_recipients``."""
    found = sorted(name for name in _durable.names(directory) if name.endswith(".pem"))
    if not found:
        what = "holds no certificate (*.pem) to encrypt shards to"
        if not os.path.isdir(directory):
            # By hand it is there, and to the timer it is not.
            what = "is not a directory that can be seen from here (a unit of systemd may not see /home and /root)"
        raise ConfigError(
            f"{directory} {what}",
            reason="no_recipients",
            path=directory,
            kept="everything: nothing was exported in the clear instead",
            hint="put the verifiers' certificates there, or take 'recipients' out of the config",
        )
    return [os.path.join(directory, name) for name in found]


def encrypt(path: str, recipients: list[str], write: t.Callable[[bytes], t.Any]) -> None:
    """Encrypt a file to all ``recipients``, in constant memory. Raises :class:`StoreError` ``not_encrypted``."""
    with open(path, "rb") as source, _openssl([*_ENCRYPT, *recipients], source, "not_encrypted") as output:
        for chunk in iter(lambda: output.read(_durable.CHUNK), b""):
            write(chunk)


@contextlib.contextmanager
def decrypted(source: t.BinaryIO, key: str | None, what: str) -> t.Iterator[t.BinaryIO]:
    """Yield what was encrypted, decrypted with the private key in the file ``key``.

    openssl holds the whole of it in memory. Raises :class:`StoreError` ``no_key``, ``not_decrypted``.
    """
    if not key:
        raise StoreError(
            f"Shard {what} is encrypted, and no key was given to read it",
            reason="no_key",
            kept="everything",
            hint="give the private key of one of the recipients ('key')",
        )
    with tempfile.TemporaryFile() as copy:  # openssl reads from a file of its own, and no error of the store is lost
        for chunk in iter(lambda: source.read(_durable.CHUNK), b""):
            copy.write(chunk)
        copy.seek(0)
        with _openssl([*_DECRYPT, "-inkey", key], copy, "not_decrypted") as output:
            yield output


@contextlib.contextmanager
def _openssl(words: list[str], source: t.Any, reason: str) -> t.Iterator[t.BinaryIO]:
    """Run openssl over ``source``; what it says goes to a file, so that it never waits for us to read it."""
    with tempfile.TemporaryFile() as said:
        try:
            # run_command is a module's, which the command is not, and it would keep a whole shard in memory
            # pylint: disable-next=ansible-bad-function
            process = subprocess.Popen(["openssl", *words], stdin=source, stdout=subprocess.PIPE, stderr=said)
        except OSError as error:
            raise StoreError(
                f"Cannot run openssl: {error.strerror}",
                reason="no_openssl",
                kept="everything",
                hint="install the openssl program",
            ) from error
        output = t.cast(t.BinaryIO, process.stdout)
        try:
            yield output
            output.read()
            if process.wait():
                said.seek(0)
                raise StoreError(
                    f"openssl {words[0]} {words[1]} failed: {printable(said.read(_SAID)).strip()}",
                    reason=reason,
                    kept="everything",
                )
        finally:
            output.close()
            process.kill()
            process.wait()
