"""The machine of a test: one a release, booted once and used by all its tests in their order."""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.machines.image import CACHE, RELEASES, image
from tests.machines.internet import Internet
from tests.machines.machine import Machine


class OneProcessAMachine(LoadScopeScheduling):  # type: ignore[misc]
    """All tests of a release run in one process, because they share its machine; one release runs beside the other."""

    def _split_scope(self, nodeid: str) -> str:
        return next((release for release in RELEASES if f"[{release}" in nodeid), nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneProcessAMachine | None:
    """Take `--dist loadgroup` for a machine a group: pytest 9.2 ignores the groups that marks name."""
    return OneProcessAMachine(config, log) if config.getvalue("dist") == "loadgroup" else None


@pytest.fixture(scope="session", params=RELEASES)
def machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A running machine, as its image has it."""
    with_package = any(item.get_closest_marker("machines") for item in request.session.items)
    # One at a time: the name of its namespace says which release it is, and nothing more.
    with (CACHE / f"{request.param}.lock").open("w") as lock, contextlib.ExitStack() as stack:
        fcntl.flock(lock, fcntl.LOCK_EX)
        internet = stack.enter_context(contextlib.closing(Internet(f"machine-{request.param}")))
        made = stack.enter_context(
            contextlib.closing(Machine(image(request.param), internet, with_package=with_package))
        )
        made.await_boot()
        yield made
