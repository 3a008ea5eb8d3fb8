# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An emulated host in a directory, the cycle on it, and the oracle: nothing lost, nothing twice, nothing changed."""

from __future__ import annotations

import hashlib
import io
import os
import re
import typing as t
from pathlib import Path

import pytest

from ansible_collections.integrity.ima.plugins.module_utils import _emulated, _protocol
from ansible_collections.integrity.ima.plugins.module_utils import _measurement_list as ml
from ansible_collections.integrity.ima.plugins.module_utils._errors import ImaError
from ansible_collections.integrity.ima.plugins.module_utils._pcr import Replay, Values
from ansible_collections.integrity.ima.plugins.module_utils._snapshot import Anchor, Cycle, Export
from ansible_collections.integrity.ima.plugins.module_utils._spool import Spool

FLAVOURS = ("export_only", "delete_n", "staged")
TRIMMING = ("delete_n", "staged")
CAPTURES = Path(__file__).resolve().parents[3] / "fixtures" / "captures"
_PROTOCOL = Path(__file__).resolve().parents[4] / "docs" / "PROTOCOL.md"

T = t.TypeVar("T")


def documented_reader() -> str:
    """The shell reader, as it stands in docs/PROTOCOL.md."""
    (script,) = re.findall(r"```sh\n(#!/bin/sh\n.*?)```", _PROTOCOL.read_text(encoding="utf-8"), re.DOTALL)
    return t.cast(str, script)


class Host:
    """A host with an emulated kernel, a spool and a config below ``root``."""

    def __init__(
        self,
        root: Path | str,
        flavour: str = "delete_n",
        trim_after: str = "local",
        *,
        count: int = 0,
        shard_records: int = 7,
        **kernel: t.Any,
    ) -> None:
        self.root = str(root)
        self.kernel = os.path.join(self.root, "ima")
        self.spool = os.path.join(self.root, "spool")
        self.conf = os.path.join(self.root, "snapshot.conf")
        self.before = b""  # what the epoch's earlier boots recorded, up to the kexec
        self.carried = 0  # bytes of it that this boot's recorded file begins with
        self.keys = {"trim_after": trim_after, "shard_records": str(shard_records), "lock_timeout": "0"}
        os.makedirs(self.spool)
        _emulated.create(self.kernel, flavour=flavour, **kernel)
        self.configure()
        self.grow(count)

    def configure(self, **keys: str) -> None:
        self.keys.update(keys)
        lines = "".join(f"{key} = {value}\n" for key, value in self.keys.items())
        Path(self.conf).write_text(
            f"[snapshot]\nname = host\nspool = {self.spool}\n{lines}"
            f"[list]\nsource = emulated\ndirectory = {self.kernel}\nbusy_timeout = 0\n",
            encoding="utf-8",
        )
        os.chmod(self.conf, 0o644)

    # -- the kernel ---------------------------------------------------------------------------------------------------

    def grow(self, count: int) -> None:
        _emulated.grow(self.kernel, count)

    def violation(self, count: int = 1, path: str = "/v") -> None:
        for _number in range(count):
            _emulated.violation(self.kernel, path)

    def reboot(self) -> None:
        _emulated.reboot(self.kernel)
        self.before, self.carried = b"", 0

    def kexec(self, carry_over: bool, *, same_epoch: bool = True) -> None:
        truth, held = self.truth(), self.held()
        _emulated.kexec(self.kernel, carry_over)
        self.before = truth if same_epoch else b""
        self.carried = len(held) if carry_over and same_epoch else 0

    def state(self) -> _emulated.State:
        return _emulated._load(self.kernel)

    def truth(self) -> bytes:
        """Everything that was recorded since the epoch began."""
        _boot_id, path, size = _emulated.recorded(self.kernel)[-1]
        return self.before + Path(path).read_bytes()[:size][self.carried :]

    def held(self) -> bytes:
        """What the kernel still holds: the staged list and the live one."""
        with self.config().lists().view() as file:
            return b"".join(iter(lambda: file.read(65536), b""))

    # -- the cycle ----------------------------------------------------------------------------------------------------

    def config(self) -> _protocol.Config:
        return _protocol.load(self.conf)

    def cycle(self) -> Cycle:
        config = self.config()
        return Cycle(config, config.lists(), Spool(config.spool))

    def locked(self, work: t.Callable[[Cycle], T]) -> T:
        with _protocol.Lock(self.config()):
            return work(self.cycle())

    def export(self, **arguments: t.Any) -> Export:
        return self.locked(lambda cycle: cycle.export(**arguments))

    def trim(self, target: int | None = None) -> int:
        return self.locked(lambda cycle: cycle.trim(target))

    def anchor(self) -> Anchor:
        return self.locked(lambda cycle: cycle.anchor())

    def run(self) -> tuple[Export, int]:
        """Export and trim what the policy lets go."""

        def work(cycle: Cycle) -> tuple[Export, int]:
            done = cycle.export()
            try:
                return done, cycle.trim()
            except ImaError as error:
                if error.reason not in ("export_only", "policy_never"):
                    raise
                return done, 0

        return self.locked(work)

    def acknowledge(self, verdict: str = "", sequence: int | None = None) -> int:
        spool = Spool(self.spool)
        entries = [each for each in spool.entries if sequence is None or each.sequence <= sequence]
        head = entries[-1]
        return self.locked(lambda cycle: cycle.acknowledge(head.sequence, spool.digest(head), "test", verdict))

    # -- looking ------------------------------------------------------------------------------------------------------

    def spans(self) -> list[tuple[int, int, int]]:
        return [(each.sequence, each.first, each.count) for each in Spool(self.spool).entries]

    def faults(self) -> list[tuple[str, int, bool]]:
        """The faults in all manifests, in order."""
        spool = Spool(self.spool)
        found = [fault for each in spool.entries for fault in spool.manifest(each)["faults"]]
        return [(fault["reason"], fault["index"], fault["lost"]) for fault in found]

    def sealed(self) -> bytes:
        return b"".join(Spool(self.spool).raw_from(0))

    def files(self) -> dict[str, str]:
        """The digest of every file in the spool."""
        found = {}
        for folder, _folders, names in os.walk(self.spool):
            for name in names:
                path = os.path.join(folder, name)
                found[os.path.relpath(path, self.spool)] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return found

    def journal(self, content: bytes | None) -> None:
        """Overwrite the journal, or remove it."""
        path = Path(self.spool, "journal.json")
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)


def parse(raw: bytes) -> list[ml.Record]:
    return list(ml.read(io.BytesIO(raw).read))


def replayed(raw: bytes, banks: t.Sequence[str], padded: t.Sequence[str] = ()) -> Values:
    return Replay(banks, padded=padded).run(parse(raw)).values()


def oracle(host: Host, *, pcrs: bool = True) -> None:
    """The shards and what the kernel holds beyond the cut are all that was ever recorded; the chain holds."""
    spool = Spool(host.spool)
    truth, held, sealed = host.truth(), host.held(), host.sealed()
    assert sealed == truth[: len(sealed)], "the shards are not what the kernel recorded"
    assert held == truth[len(truth) - len(held) :], "the kernel does not hold the end of what it recorded"
    lost = len(truth) - len(held) - len(sealed)
    assert lost <= 0, f"{lost} bytes of records are neither in a shard nor in the kernel"
    cut = spool.epoch[-1].end if spool.epoch else 0
    assert len(parse(sealed)) == cut

    previous = None
    for entry in spool.entries:
        manifest = spool.manifest(entry)
        assert manifest["previous"] == previous, f"the chain is broken before shard {entry.sequence}"
        previous = spool.digest(entry)
    state = host.state()
    replay: Replay | None = None
    for entry in spool.epoch:
        manifest = spool.manifest(entry)
        banks = list(next(iter(manifest["pcrs_end"].values())))
        replay = replay or Replay(banks, padded=manifest["padded"])
        start = replay.values()
        records = parse(b"".join(spool.raw_from(entry.first, entry.end)))
        assert len(records) == entry.count
        violations = replay.violations
        end = replay.run(records).values()
        zeros = {bank: "00" * len(bytes.fromhex(value)) for bank, value in next(iter(end.values())).items()}
        assert manifest["pcrs_end"] == end
        assert manifest["pcrs_start"] == {pcr: start.get(pcr, zeros) for pcr in end}
        assert manifest["violations"] == replay.violations - violations
    if pcrs and state.banks:
        assert replayed(truth, state.banks, state.padded) == state.pcrs


def reason_of(function: t.Callable[[], object]) -> ImaError:
    """The error that it raises."""
    with pytest.raises(ImaError) as caught:
        function()
    return caught.value
