# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Fixtures: hosts that boot when a test asks for them and are gone after it; the table at the end."""

from __future__ import annotations

import os
import shutil
import typing as t
from pathlib import Path

import pytest
from host import Host
from lab import LAB, TCB, VM

# What each host showed, by test; the workers of xdist send theirs with the reports.
REPORT: dict[str, list[dict[str, t.Any]]] = {}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", default="", help="only these kernels, with commas between them")
    parser.addoption("--keep", action="store_true", help="leave the VMs of failed tests running")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the kernels that nobody asked for. One that is asked for and not built fails."""
    chosen = set(filter(None, config.getoption("--kernels").split(",")))
    unwanted = []
    for item in items:
        marker = item.get_closest_marker("kernel")
        kernel = marker.args[0] if marker else item.callspec.params["kernel"]  # type: ignore[attr-defined]
        if chosen and kernel not in chosen:
            unwanted.append(item)
    # The longest first, so that no worker is left with it at the end.
    items[:] = sorted((item for item in items if item not in unwanted), key=lambda item: "long_list" not in item.name)
    config.hook.pytest_deselected(items=unwanted)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "kernel(label): the kernel that this test boots")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> t.Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        item.stash[FAILED] = report.failed
    return report


FAILED = pytest.StashKey[bool]()
FACTS = "facts"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Gather what the hosts of a test showed, in the process that prints it."""
    if report.when == "teardown":
        REPORT[report.nodeid] = [facts for name, found in report.user_properties if name == FACTS for facts in found]


@pytest.fixture
def boot(request: pytest.FixtureRequest, tmp_path: Path) -> t.Iterator[t.Callable[..., Host]]:
    """Return a function that boots a host: ``boot(kernel, cmdline, banks, memory)``."""
    hosts: list[Host] = []
    vms: list[VM] = []

    def make(kernel: str, cmdline: str = TCB, banks: t.Sequence[str] = ("sha1", "sha256"), memory: int = 512) -> Host:
        title = request.node.originalname[5:25].strip("_")
        vm = VM(f"{title}-{kernel}-{os.getpid()}-{len(vms)}", kernel, cmdline, banks, memory)
        vms.append(vm)
        host = Host(vm, tmp_path / f"host{len(hosts)}")
        host.facts.update(test=request.node.name, kernel=vm.release)
        hosts.append(host)
        return host

    yield make
    request.node.user_properties.append((FACTS, [host.facts for host in hosts]))
    failed = request.node.stash.get(FAILED, True)
    for vm in vms:
        if failed:
            print(f"\nconsole of {vm.name}:\n{vm.console_tail(40)}\nlogs: {tmp_path}")
        if failed and request.config.getoption("--keep"):
            print(f"left running: python3 tests/kernel/lab.py ssh {vm.name}")
        else:
            vm.purge()
    if not failed:
        shutil.rmtree(tmp_path, ignore_errors=True)


def pytest_terminal_summary(terminalreporter: t.Any) -> None:
    """Say what was seen on each kernel."""
    if not REPORT:
        return
    terminalreporter.section(f"kernel lab ({LAB})")
    for facts in (facts for _test, found in sorted(REPORT.items()) for facts in found):
        pcrs = " ".join(f"{bank}:{said}" for bank, said in facts.get("pcr10", {}).items()) or "-"
        counts = f"{facts['exported']} exported, {facts['trimmed']} trimmed, {facts.get('left', '-')} left"
        words = [
            f"{facts['test']}: {facts['kernel']} {facts.get('flavour', '')}".rstrip(),
            f"{facts['rotations']} rotations: {counts}",
            f"PCR 10 {pcrs}",
            f"evmctl {facts.get('evmctl', '-')}",
            f"keylime {facts.get('keylime', '-')}",
            f"quotes: {facts.get('quotes', '-')}",
            f"{facts.get('verdict', '-')} {facts.get('reason', '')}".rstrip(),
            facts.get("note", ""),
        ]
        terminalreporter.write_line(" · ".join(filter(None, words)))
