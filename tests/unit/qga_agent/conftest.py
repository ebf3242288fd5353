"""A guest with an agent, and both ways to it."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from qga_agent.agent_libvirt import LibvirtAgents
from qga_agent.agent_socket import SocketAgents
from qga_agent.guest_agent import Agents
from tests.fakes.guest import UUID, FakeGuest, FakeLibvirtAgents, served


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path: a unix socket's has at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="vpt") as path:
        yield Path(path)


@pytest.fixture
def guest() -> FakeGuest:
    return FakeGuest()


@pytest.fixture
def libvirt(guest: FakeGuest) -> FakeLibvirtAgents:
    return FakeLibvirtAgents(guest)


def at_sockets(directory: Path, timeout_s: float = 5.0) -> SocketAgents:
    return SocketAgents(f"{directory}/{{uuid}}.sock", timeout_s)


@pytest.fixture(params=["libvirt", "socket"])
async def agents(
    request: pytest.FixtureRequest, guest: FakeGuest, libvirt: FakeLibvirtAgents, directory: Path
) -> AsyncIterator[Agents]:
    """The guest's agent by either adapter."""
    if request.param == "libvirt":
        yield (through := LibvirtAgents(libvirt))
        through.close()
        return
    async with served(directory / f"{UUID}.sock", guest):
        yield at_sockets(directory)
