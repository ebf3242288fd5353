"""The machine of a test: one a release, booted once and used by all its tests in their order."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Generator, Iterator

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.machines.debian import CACHE
from tests.machines.image import RELEASES, image
from tests.machines.internet import Internet
from tests.machines.machine import Machine


class OneProcessAMachine(LoadScopeScheduling):  # type: ignore[misc]
    """All tests of a release run in one process, because they share its machine; one release runs beside the other."""

    def _split_scope(self, nodeid: str) -> str:
        return next((release for release in RELEASES if f"[{release}" in nodeid), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneProcessAMachine | None:
    """Take `--dist loadgroup` for a machine a group: pytest 9.2 ignores the groups that marks name."""
    return OneProcessAMachine(config, log) if config.getvalue("dist") == "loadgroup" else None


_broken: dict[str, str] = {}
"""By release: the first test of its story that failed."""


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    """Note where a story breaks off."""
    outcome = yield
    if outcome.get_result().failed and (story := _story(item)):
        _broken.setdefault(story, item.name)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Each test finds the machine as the one before has left it: after a failure the rest cannot pass."""
    if first := _broken.get(_story(item)):
        pytest.fail(f"not tried, because {first} had failed", pytrace=False)


def _story(item: pytest.Item) -> str:
    """Return the release of a test that continues a story, or an empty string."""
    releases = RELEASES if item.get_closest_marker("machines") else ()
    return next((release for release in releases if f"[{release}" in item.nodeid), "")


@pytest.fixture(scope="session", params=RELEASES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A running machine, as its image has it."""
    # One at a time: the name of its namespace says which release it is, and nothing more.
    with (CACHE / f"{request.param}.lock").open("w") as lock, contextlib.ExitStack() as stack:
        fcntl.flock(lock, fcntl.LOCK_EX)
        internet = stack.enter_context(contextlib.closing(Internet(f"machine-{request.param}")))
        made = stack.enter_context(contextlib.closing(Machine(image(request.param), internet)))
        made.await_boot()
        yield made
