# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""The command ``ima-snapshot``: what a host does for itself, without a controller."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import typing as t

from ansible_collections.integrity.ima.plugins.module_utils._errors import HistoryError, ImaError, SpoolError, printable
from ansible_collections.integrity.ima.plugins.module_utils._host import cycle_of, save
from ansible_collections.integrity.ima.plugins.module_utils._measurement_list import SHA1, Layout, read, to_ascii
from ansible_collections.integrity.ima.plugins.module_utils._module import failure_of
from ansible_collections.integrity.ima.plugins.module_utils._pcr import search
from ansible_collections.integrity.ima.plugins.module_utils._protocol import CONFIG, Config, Lock, load
from ansible_collections.integrity.ima.plugins.module_utils._schema import canonical
from ansible_collections.integrity.ima.plugins.module_utils._shard import Entry, layout_of
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import Cycle
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool
from ansible_collections.integrity.ima.plugins.module_utils._status import due, status
from ansible_collections.integrity.ima.plugins.module_utils._store._spool import SpoolStore
from ansible_collections.integrity.ima.plugins.module_utils._verifier import BROKEN, Broken, Verdict, verify

DONE, FAILED, USAGE, BLOCKED = 0, 1, 2, 3
_TAIL = 16 << 20  # bytes of the list's tail that are kept in memory, and not in a temporary file
_PIECE = 1 << 16

Source = t.Callable[[int], bytes]


def main(argv: t.Sequence[str] | None = None, config: str = CONFIG) -> int:
    """Run the command; return its exit code. ``config``: the default of ``--config``."""
    parser = _parser(config)
    args = parser.parse_args(argv)
    if args.act is _read and not args.ascii and sys.stdout.isatty():
        parser.error("the list is binary: send it into a file or a program, or read it with --ascii")
    act: t.Callable[[Config, argparse.Namespace], int] = args.act
    try:
        code = act(load(args.config), args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Who read our output has had enough; nothing must be written when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (ImaError, OSError) as error:
        failure = failure_of(error)
        sys.stderr.write(f"ima-snapshot: {failure['msg']} ({failure['reason']})\n")
        lost = isinstance(error, HistoryError) and error.reason == "foreign_trim"
        return BLOCKED if lost and args.act is _export else FAILED


def _parser(config: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ima-snapshot", description="Exports the kernel's IMA measurement list of this host, and tells about it."
    )
    parser.add_argument("--config", default=config, help="the config (default: %(default)s)")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    each = commands.add_parser("export", help="save new records in shards; delete from the kernel what may go")
    each.add_argument(
        "--due", action="store_true", help="only if a limit of the config's section [schedule] is reached"
    )
    each.set_defaults(act=_export)
    each = commands.add_parser("status", help="how far the shards are behind the kernel; the list is not read")
    each.add_argument("--json", action="store_true", help="as one line of JSON")
    each.set_defaults(act=_status)
    each = commands.add_parser("read", help="write the whole list, as if nothing had ever been trimmed")
    each.add_argument("--ascii", action="store_true", help="as the kernel's ASCII list")
    each.add_argument(
        "--boot", default="", metavar="BOOT_ID", help="of another boot; it ends with that boot's last shard"
    )
    each.set_defaults(act=_read)
    each = commands.add_parser("verify", help="check every shard, the chain, the kernel's list and the TPM's PCRs")
    each.set_defaults(act=_verify)
    for each in commands.choices.values():
        # Behind the command as well; what stands before it is the default.
        each.add_argument("--config", default=argparse.SUPPRESS, help="the config")
    return parser


def _say(line: str) -> None:
    sys.stdout.write(printable(line) + "\n")


# -- export -------------------------------------------------------------------------------------------------


def _export(config: Config, args: argparse.Namespace) -> int:
    if args.due and not due(config):
        _say("nothing is due")
        return DONE
    done = save(config)
    what = f"{_counted(done['records'], 'record')} in {_counted(done['shards'], 'shard')}"
    text = f"exported {what}, deleted {done['trimmed']}, the cut is {done['cut']}"
    if done["fault"]:
        text += f"; nothing is deleted in this boot: {done['fault']['reason']} at index {done['fault']['index']}"
    _say("; ".join([text, *done["notes"]]))
    if done["busy"]:
        sys.stderr.write(f"ima-snapshot: {done['busy']} (list_busy)\n")
        return FAILED
    return DONE


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


# -- status -------------------------------------------------------------------------------------------------


def _status(config: Config, args: argparse.Namespace) -> int:
    found = status(config)
    if args.json:
        _say(canonical(found).decode("ascii"))
        return DONE
    held = ", ".join(f"{holder['command']} (pid {holder['pid']})" for holder in found["holders"])
    shown = dict(found, holders=held or "nobody", due="yes" if found["due"] else "no")
    fault = found["fault"]
    shown["fault"] = f"{fault['reason']}: {fault['message']}" if fault else "none"
    for key in sorted(set(shown) - {"version"}):
        _say(f"{key}: {'not known' if shown[key] is None else shown[key]}")
    return DONE


# -- read ---------------------------------------------------------------------------------------------------


def _read(config: Config, args: argparse.Namespace) -> int:
    """Shards never change, so they are written without the lock; the live tail is copied first, under it.

    Neither lock nor list is held while somebody is slow to take our output.
    """
    out = sys.stdout.buffer
    with tempfile.SpooledTemporaryFile(max_size=_TAIL) as tail:
        with Lock(config, shared=True, create=False):
            cycle = cycle_of(config)
            entries = _entries(cycle, args.boot, tail)
            for entry in entries:
                cycle.spool.path(entry)
        for entry in entries:
            file, reader = cycle.spool.reader(entry)
            with file:
                _write(out, reader.read, layout_of(cycle.spool.manifest(entry)), args.ascii)
        tail.seek(0)
        _write(out, tail.read, SHA1, args.ascii)
    out.flush()
    return DONE


def _entries(cycle: Cycle, boot_id: str, copy: t.IO[bytes]) -> list[Entry]:
    """Return the shards of the list that was asked for, from index 0 on; copy what of it only the kernel holds."""
    there = cycle.spool.check()
    if boot_id and boot_id != cycle.boot_id:
        return _of_boot(cycle.spool if there else None, boot_id)
    with cycle.tail() as tail:
        for record in tail.records:
            copy.write(record.raw)
    return cycle.spool.epoch if tail.place.cut else []


def _of_boot(spool: Spool | None, boot_id: str) -> list[Entry]:
    """Return the shards that make up a boot's list: a kexec that carried it over makes it begin in an earlier boot."""
    found: list[Entry] = []
    epoch: list[Entry] = []
    for entry in spool.entries if spool else []:
        epoch = [entry] if entry.first == 0 else [*epoch, entry]
        found = list(epoch) if entry.boot_id == boot_id else found
    if not found:
        raise SpoolError(
            f"The spool has no shard of boot {printable(boot_id)[:80]}",
            reason="no_shard",
            hint="the boots are the directories below 'shards' in the spool",
        )
    return found


def _write(out: t.BinaryIO, source: Source, layout: Layout, text: bool) -> None:
    if text:
        for record in read(source, layout, verify=False):
            out.write(to_ascii(record, layout.byte_order))
        return
    for piece in iter(lambda: source(_PIECE), b""):
        out.write(piece)


# -- verify -------------------------------------------------------------------------------------------------


def _verify(config: Config, _args: argparse.Namespace) -> int:
    """The lock is held shared throughout, so that no shard comes or goes."""
    with Lock(config, shared=True, create=False):
        cycle = cycle_of(config)
        verdict = Verdict()
        # A first export that failed leaves the boot's directory, and no shard.
        store = SpoolStore(cycle.spool)
        if cycle.spool.check() and os.path.isdir(cycle.spool.shards) and any(store.names(config.name)):
            verdict = verify(store, config.name, [])
        said = ""
        if verdict.verdict != BROKEN:
            try:
                said = _live(cycle)
            except (HistoryError, SpoolError, Broken) as fault:
                verdict.broken(fault)
    for warning in verdict.warnings:
        _say(f"note: {warning}")
    if verdict.verdict == BROKEN:
        where = "" if verdict.index is None else f" at index {verdict.index}"
        _say(f"broken: {verdict.reason}{where}: {verdict.message}")
        return FAILED
    _say(f"consistent: {_counted(verdict.records, 'record')} in {_counted(verdict.shards, 'shard')}; {said}")
    return DONE


def _live(cycle: Cycle) -> str:
    """Say how what the kernel holds goes on from the shards. Raises :class:`HistoryError`, :class:`Broken`."""
    with cycle.tail() as tail:
        place = tail.place
        match = search(tail.records, [], place.start, tail.observed, padded=place.padded)
    lost = [fault for fault in [*place.faults, cycle.blocked()] if fault and fault["lost"]]
    if lost:
        raise Broken(lost[0]["message"], reason=lost[0]["reason"], index=lost[0]["index"], boot_id=lost[0]["boot_id"])
    more = f"the kernel holds {_counted(match.records, 'record')} more"
    if tail.observed is None:
        return f"{more}, and no TPM was asked"
    if match.reached_at is None:
        raise Broken(
            "the shards and what the kernel holds do not replay to the TPM's PCRs",
            # Where the list begins is then the journal's word alone: records left it that no shard holds.
            reason="pcr_mismatch" if place.proven else "foreign_trim",
            index=place.cut,
            boot_id=cycle.boot_id,
        )
    return f"{more}, and they lead to the TPM's PCRs"
