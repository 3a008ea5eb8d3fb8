# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The whole cycle on every kernel: install, rotate, anchor, trim, reboot, verify, stitch, against the TPM's PCRs."""

from __future__ import annotations

import typing as t

import pytest
from host import Host

Boot = t.Callable[..., Host]
FLAVOURS = {"bookworm": "export_only", "trixie": "export_only", "backports": "delete_n", "staging": "staged"}
THREE = ("sha1", "sha256", "sha384")
VARIANTS = [
    pytest.param("backports", "ima_policy=tcb ima_hash=sha256", ("sha1", "sha256"), id="backports"),
    pytest.param("backports", "ima_policy=tcb ima_hash=sha384 ima_template=ima-ngv2", THREE, id="backports-ngv2"),
    pytest.param("trixie", "ima_policy=tcb ima_hash=sha256 ima_template=ima-ng", ("sha1", "sha256"), id="trixie-ng"),
    pytest.param("trixie", "ima_policy=tcb ima_hash=sha512", THREE, id="trixie-sha512-three-banks"),
    pytest.param("bookworm", "ima_policy=tcb ima_hash=sha1 ima_template=ima", ("sha1", "sha256"), id="bookworm-legacy"),
    pytest.param("bookworm", "ima_policy=tcb ima_hash=sha256", THREE, id="bookworm-padded-sha384"),
    pytest.param("staging", "ima_policy=tcb ima_hash=sha256", ("sha1", "sha256"), id="staging"),
    pytest.param("staging", "ima_policy=tcb ima_hash=sha256 ima_flush_htable", ("sha1", "sha256"), id="staging-flush"),
]


@pytest.mark.parametrize(("kernel", "cmdline", "banks"), VARIANTS)
def test_cycle(boot: Boot, kernel: str, cmdline: str, banks: t.Sequence[str]) -> None:
    host = boot(kernel, cmdline, banks)
    # Debian's 6.1 has no SHA-384 yet when IMA starts.
    padded = ["sha384"] if kernel == "bookworm" and "sha384" in banks else []
    host.role("install")
    host.role("enroll")
    before = host.good("ima_info")
    host.facts["flavour"] = before["flavour"]
    assert before["flavour"] == FLAVOURS[kernel]
    assert before["release"] == host.vm.release and not before["emulated"]
    assert before["tpm_banks"] == list(banks)

    for number in range(3):
        host.measure(20, f"rotation{number}")
        done = host.rotate(anchor=number == 1)
        assert done["exported"] >= 20 and done["delivered"] >= 1 and done["quoted"], done.get("warnings")
    after = host.good("ima_info")
    assert after["fault"] is None
    if kernel in ("bookworm", "trixie"):
        assert host.facts["trimmed"] == 0 and after["base"] == 0
    else:
        assert after["base"] == host.base
        # A staged list goes as a whole: what was measured after the staging is exported, too, but goes the next time.
        assert after["base"] == after["cut"] or kernel == "staging"
        assert host.facts["trimmed"] >= before["count"] + 40
    host.keep("trimmed", host.check_pcrs(padded=padded))
    first_boot = after["boot_id"]

    host.reboot()
    host.measure(5, "after-reboot")
    host.rotate()
    capture = host.check_pcrs(padded=padded)
    assert capture["boot_id"] != first_boot
    said = host.verdict()
    assert (said["verdict"], said["boots"], said["records"]) == ("attested", 2, host.facts["exported"]), said
    assert said["quotes"] == host.check_quotes() == 4
    host.keep("rebooted", capture)
    stitched = host.check_stitched(first_boot)
    assert stitched["padded"] == padded
    if "ngv2" not in cmdline:  # Keylime does not know that template
        assert host.keylime(first_boot, stitched["pcrs"]["10"]["sha256"]) == "accepts"
    assert host.check_stitched(capture["boot_id"])["boot_id"] == capture["boot_id"]
