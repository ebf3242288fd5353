"""Agents through libvirt's channel: its timeouts, its threads, and what it passes on."""

from __future__ import annotations

import asyncio

import pytest

from qga_agent.agent_libvirt import LibvirtAgents
from qga_agent.guest_agent import MAX_REPLY_BYTES, AgentAbsent, AgentSilent, InvalidReply
from qga_agent.libvirt_stats import AgentChannel
from tests.fakes.guest import UUID, FakeGuest, FakeLibvirtAgents


async def test_each_command_has_the_timeout_and_nothing_is_set_for_other_users_of_the_agent(
    libvirt: FakeLibvirtAgents,
) -> None:
    agents = LibvirtAgents(libvirt, 3)
    async with agents.visit(UUID) as agent:
        await agent.execute("guest-network-get-interfaces")
    assert libvirt.timeouts == [3]
    assert not any("timeout" in name.casefold() for name in vars(AgentChannel)), "a channel has no such setting"


async def test_a_vm_unknown_to_libvirt_has_no_agent(libvirt: FakeLibvirtAgents, guest: FakeGuest) -> None:
    guest.error = AgentAbsent("libvirt has no such VM")
    async with LibvirtAgents(libvirt).visit(UUID) as agent:
        with pytest.raises(AgentAbsent):
            await agent.execute("guest-network-get-interfaces")
    assert libvirt.timeouts == []


async def test_only_the_visit_whose_call_hangs_waits_for_it(
    libvirt: FakeLibvirtAgents, guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qga_agent.agent_libvirt._MARGIN_S", -4.5)
    agents, timed_out = LibvirtAgents(libvirt), asyncio.Event()
    guest.frozen = True

    async def hang() -> None:
        async with agents.visit(UUID) as agent:
            with pytest.raises(AgentSilent):
                await agent.execute("guest-network-get-interfaces")
            timed_out.set()

    hanging = asyncio.ensure_future(hang())
    await timed_out.wait()
    other = LibvirtAgents(FakeLibvirtAgents(FakeGuest()))
    monkeypatch.setattr("qga_agent.agent_libvirt._MARGIN_S", 2.0)
    async with other.visit(UUID) as agent:
        await agent.execute("guest-network-get-interfaces")
    assert not hanging.done()
    libvirt.released.set()
    await hanging
    assert libvirt.timeouts == [1]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"error": {}}', "[" * 9999, '{"return": ' + "9" * 999 + "}x", "x" * MAX_REPLY_BYTES * 2],
)  # fmt: skip
async def test_a_malformed_reply_is_invalid(libvirt: FakeLibvirtAgents, text: str) -> None:
    libvirt.text = text
    async with LibvirtAgents(libvirt).visit(UUID) as agent:
        with pytest.raises(InvalidReply):
            await agent.execute("guest-network-get-interfaces")
