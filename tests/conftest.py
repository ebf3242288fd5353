"""What holds for every test run."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    """In CI a skip is a failure: there everything a test needs is installed, so a skip hides a fault."""
    outcome = yield
    report = outcome.get_result()
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, and in CI a skip is a failure: {_reason(report)}"


def _reason(report: pytest.TestReport) -> str:
    return report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)


@pytest.fixture(autouse=True)
def _root_where_needed(request: pytest.FixtureRequest) -> None:
    """Skip, with the reason, what only root can do; each such test carries a marker that says so."""
    if os.geteuid() != 0 and any(request.node.get_closest_marker(name) for name in ("netns", "e2e")):
        pytest.skip("needs root: it makes network namespaces")
