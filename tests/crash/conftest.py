# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The figures of the crash tests: each test adds its own to ``tally``, the last lines give the sums."""

from __future__ import annotations

import typing as t

import pytest

# A skipped test has failed where REQUIRE_ALL=1, as with the unit tests.
from ansible_collections.integrity.ima.tests.unit import conftest as units

pytest_make_collect_report = units.pytest_make_collect_report
pytest_runtest_makereport = units.pytest_runtest_makereport

Tally = t.Callable[[str, float], None]
FIGURE = "figure"
# How the last line says each of them; the other figures are in the list above it.
HEADLINE = {
    "crash points": "distinct crash points",
    "power-loss states": "power-loss states",
    "model steps": "model steps",
    "seconds of contention": "s of contention",
    "fuzz executions": "fuzz executions",
}
FAILURES = ("losses", "duplicates")
# The sums, in the process that prints them; the workers of xdist send theirs with the reports.
SUMS: dict[str, float] = {}
# By file of the product: how many statements its functions have, and which of their lines test_fuzz reached.
COVERED: dict[str, tuple[int, set[int]]] = {}


@pytest.fixture(scope="session")
def covered() -> dict[str, tuple[int, set[int]]]:
    """Return where to put what this process covered."""
    return COVERED


def pytest_sessionfinish(session: t.Any) -> None:
    """A worker of xdist sends what it covered."""
    if hasattr(session.config, "workeroutput"):
        said = {name: [count, sorted(lines)] for name, (count, lines) in COVERED.items()}
        session.config.workeroutput["covered"] = said


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: t.Any) -> None:
    """Add what a worker covered."""
    for name, (count, lines) in getattr(node, "workeroutput", {}).get("covered", {}).items():
        COVERED[name] = count, COVERED.get(name, (count, set()))[1] | set(lines)


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Return a function that adds to a figure: ``tally("crash points", 157)``."""
    figures: dict[str, float] = {}
    request.node.user_properties.append((FIGURE, figures))

    def add(name: str, number: float) -> None:
        figures[name] = figures.get(name, 0) + number

    return add


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Add what a test counted."""
    if report.when == "teardown":
        for name, figures in t.cast(t.Any, report.user_properties):
            if name == FIGURE:
                for figure, number in figures.items():
                    SUMS[figure] = SUMS.get(figure, 0) + number


def shown(number: float) -> str:
    """A figure as a person writes it."""
    return str(round(number)) if number >= 10 or number == int(number) else f"{number:.1f}"


def last_line(sums: t.Mapping[str, float], failed: bool) -> str:
    """What was tried and what it did; nobody reads a zero after a failure."""
    tried = ", ".join(f"{shown(sums[name])} {words}" for name, words in HEADLINE.items() if sums.get(name))
    if failed or any(sums.get(name) for name in FAILURES):
        return f"crash: {tried or 'nothing'}: FAILED"
    found = ", ".join(f"{shown(sums.get(name, 0))} {name}" for name in FAILURES)
    return f"crash: {tried or 'the figures above'}: {found}"


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: t.Any, exitstatus: int) -> None:
    """Print the sums."""
    if not SUMS and not exitstatus:
        return
    terminalreporter.section("crash tests")
    for name, number in sorted(SUMS.items()):
        terminalreporter.write_line(f"{name}: {shown(number)}")
    for name, (count, lines) in sorted(COVERED.items()):
        terminalreporter.write_line(f"fuzz coverage of {name}: {len(lines)} of {count} statements in functions")
    terminalreporter.write_line(last_line(SUMS, exitstatus != 0))
