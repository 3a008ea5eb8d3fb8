# Copyright (c) 2026, The integrity.ima authors
# GNU General Public License v3.0+ (see LICENSES/GPL-3.0-or-later.txt or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

# This file is private to the collection: it may change without notice.

"""With REQUIRE_ALL=1 a test that is skipped has failed, unless tests/allowed-skips.txt knows the reason."""

from __future__ import annotations

import os
import pathlib
import re

import pytest

TESTS = pathlib.Path(__file__).resolve().parent.parent
# ansible-test hands few environment variables on; tests/tools/ansible_test.sh leaves a file for it.
REQUIRE_ALL = os.environ.get("REQUIRE_ALL") == "1" or (TESTS / "output" / "require_all").exists()


def allowed_skips() -> list[str]:
    """Regular expressions of the reasons that may be given, one a line."""
    lines = (TESTS / "allowed-skips.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


def forbid_skip(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure that gives the reason; an expected failure (xfail) is none."""
    if not REQUIRE_ALL or not report.skipped or hasattr(report, "wasxfail"):
        return
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if any(re.search(pattern, reason) for pattern in allowed_skips()):
        return
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid}: skipped, but REQUIRE_ALL=1 allows no skip: {reason}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport():
    outcome = yield
    forbid_skip(outcome.get_result())


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report():
    outcome = yield
    forbid_skip(outcome.get_result())
