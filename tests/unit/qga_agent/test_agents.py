"""What holds for both adapters: the behaviour of qemu-ga, which tests/e2e/test_fakes.py checks in a real guest."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import PortRange
from qga_agent.announcement import DEFAULT_PATH, Announcement, announce
from qga_agent.guest_agent import Agent, AgentRefused, Agents, read_figures
from tests.fakes.conformance.guest_agent import CHECKS
from tests.fakes.guest import UUID, FakeGuest

ANNOUNCEMENT = Announcement(IPv4Address("203.0.113.1"), PortRange(20000, 20511), local_port_range=True)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_the_fake_behaves_as_qemu_ga(agents: Agents, check: Callable[[Agent], Awaitable[None]]) -> None:
    async with agents.visit(UUID) as agent:
        await check(agent)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
async def test_so_does_the_fake_without_an_adapter(check: Callable[[Agent], Awaitable[None]]) -> None:
    await check(FakeGuest())


async def test_figures_are_read_and_ports_announced(agents: Agents, guest: FakeGuest) -> None:
    for _ in range(2):
        async with agents.visit(UUID) as agent:
            assert await announce(agent, ANNOUNCEMENT) == ()
            figures = await read_figures(agent)
        assert (figures.connections, figures.established) == (12, 9)
    assert json.loads(guest.files[DEFAULT_PATH])["last_port"] == 20511
    assert guest.open_files == 0


async def test_a_refusal_does_not_end_the_visit(agents: Agents, guest: FakeGuest) -> None:
    guest.disabled = {"guest-file-open"}
    async with agents.visit(UUID) as agent:
        with pytest.raises(AgentRefused, match="guest-file-open"):
            await agent.execute("guest-file-open", {"path": "/x", "mode": "r"})
        assert await agent.execute("guest-network-get-interfaces") == guest.interfaces


async def test_a_visit_without_calls_sends_nothing(agents: Agents, guest: FakeGuest) -> None:
    async with agents.visit(UUID):
        pass
    assert guest.asked == []
