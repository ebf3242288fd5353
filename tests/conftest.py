"""What holds for every test run."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator, Iterator

import pytest
from hypothesis import HealthCheck, settings

from cpm.service import clock

# How long an example takes says more about what else the machine is doing than about the code.
settings.register_profile("virt-ports", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("virt-ports")

# A shell that starts us in the background has us, and all we start, ignore SIGINT; tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)

IN_CI = os.environ.get("CI", "").lower() not in ("", "0", "false")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    """In CI a skip is a failure: there everything a test needs is installed, so a skip hides a fault."""
    outcome = yield
    _refuse_skip(outcome.get_result(), item.nodeid)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, pytest.CollectReport]:
    """The same for a whole module that skips itself."""
    outcome = yield
    _refuse_skip(outcome.get_result(), collector.nodeid)


def _refuse_skip(report: pytest.TestReport | pytest.CollectReport, name: str) -> None:
    if IN_CI and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{name} was skipped, and in CI a skip is a failure: {reason}"


@pytest.fixture(autouse=True)
def _root_where_needed(request: pytest.FixtureRequest) -> None:
    """Skip, with the reason, what only root can do; each such test carries a marker that says so."""
    if os.geteuid() != 0 and any(request.node.get_closest_marker(name) for name in ("netns", "e2e")):
        pytest.skip("needs root: it makes network namespaces")


@pytest.fixture(autouse=True)
def _nobody_keeps_the_clock() -> Iterator[None]:
    """A test that replaces the clock, and leaves it replaced, would make others fail elsewhere."""
    now = clock.now
    yield
    assert clock.now is now
