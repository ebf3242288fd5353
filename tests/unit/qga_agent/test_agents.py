"""Both ways to an agent: what holds for either, and what is particular to each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import tempfile
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from cpm.protocol.model import PortRange
from qga_agent.agent_libvirt import LibvirtAgents
from qga_agent.agent_socket import MAX_UNSOLICITED, SocketAgents
from qga_agent.announcement import DEFAULT_PATH, Announcement, announce
from qga_agent.guest_agent import (
    MAX_REPLY_BYTES,
    AgentAbsent,
    AgentError,
    AgentRefused,
    Agents,
    AgentSilent,
    InvalidReply,
    read_figures,
)
from tests.fakes.guest import UUID, FakeGuest, FakeLibvirtAgents, Request, Say, served

SHALL_KNOW = Announcement(IPv4Address("203.0.113.1"), PortRange(20000, 20511), local_port_range=True)


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


@pytest.fixture(params=["libvirt", "socket"])
async def agents(
    request: pytest.FixtureRequest, guest: FakeGuest, libvirt: FakeLibvirtAgents, directory: Path
) -> AsyncIterator[Agents]:
    if request.param == "libvirt":
        yield (through := LibvirtAgents(libvirt))
        through.close()
        return
    async with served(directory / f"{UUID}.sock", guest):
        yield at_sockets(directory)


def at_sockets(directory: Path, timeout_s: float = 5.0) -> SocketAgents:
    return SocketAgents(f"{directory}/{{uuid}}.sock", timeout_s)


# Either way


async def test_figures_are_read_and_ports_told(agents: Agents, guest: FakeGuest) -> None:
    for _ in range(2):
        async with agents.visit(UUID) as agent:
            assert await announce(agent, SHALL_KNOW) == ()
            figures = await read_figures(agent)
        assert (figures.connections, figures.established) == (12, 9)
    assert json.loads(guest.files[DEFAULT_PATH])["last_port"] == 20511
    assert guest.open_files == 0


async def test_a_refusal_is_one_and_the_visit_goes_on(agents: Agents, guest: FakeGuest) -> None:
    guest.disabled = {"guest-file-open"}
    async with agents.visit(UUID) as agent:
        with pytest.raises(AgentRefused, match="guest-file-open has been disabled"):
            await agent.execute("guest-file-open", {"path": "/x", "mode": "r"})
        assert await agent.execute("guest-network-get-interfaces") == guest.interfaces


async def test_a_visit_that_asks_nothing_touches_nothing(agents: Agents, guest: FakeGuest) -> None:
    async with agents.visit(UUID):
        pass
    assert guest.asked == []


# libvirt


async def test_how_long_libvirt_waits_is_put_back_after_each_visit(libvirt: FakeLibvirtAgents) -> None:
    agents = LibvirtAgents(libvirt, 3)
    async with agents.visit(UUID) as agent:
        await agent.execute("guest-network-get-interfaces")
        assert libvirt.waits == [3]
    assert libvirt.waits == [3, None]
    agents = LibvirtAgents(libvirt, set_timeout=False)
    async with agents.visit(UUID) as agent:
        await agent.execute("guest-network-get-interfaces")
    assert libvirt.waits == [3, None]


async def test_a_vm_that_libvirt_does_not_know_has_no_agent(libvirt: FakeLibvirtAgents, guest: FakeGuest) -> None:
    guest.trouble = AgentAbsent("libvirt has no such VM")
    async with LibvirtAgents(libvirt).visit(UUID) as agent:
        with pytest.raises(AgentAbsent, match="no such VM"):
            await agent.execute("guest-network-get-interfaces")
    assert libvirt.waits == []


async def test_leaving_waits_for_a_call_that_hangs_and_nobody_else_does(
    libvirt: FakeLibvirtAgents, guest: FakeGuest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qga_agent.agent_libvirt._MARGIN_S", -0.5)
    agents, told = LibvirtAgents(libvirt), asyncio.Event()
    guest.frozen = True

    async def hang() -> None:
        async with agents.visit(UUID) as agent:
            with pytest.raises(AgentSilent, match="libvirt did not answer"):
                await agent.execute("guest-network-get-interfaces")
            told.set()

    hanging = asyncio.ensure_future(hang())
    await told.wait()
    other = LibvirtAgents(FakeLibvirtAgents(FakeGuest()))
    monkeypatch.setattr("qga_agent.agent_libvirt._MARGIN_S", 2.0)
    async with other.visit(UUID) as agent:
        await agent.execute("guest-network-get-interfaces")
    assert not hanging.done()
    libvirt.released.set()
    await hanging
    assert libvirt.waits == [1, None]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"error": {}}', "[" * 9999, '{"return": ' + "9" * 999 + "}x", "x" * MAX_REPLY_BYTES * 2],
)  # fmt: skip
async def test_what_libvirt_passes_on_is_checked(libvirt: FakeLibvirtAgents, text: str) -> None:
    libvirt.text = text
    async with LibvirtAgents(libvirt).visit(UUID) as agent:
        with pytest.raises(InvalidReply):
            await agent.execute("guest-network-get-interfaces")


# Sockets


async def test_no_socket_no_agent(directory: Path) -> None:
    agents = at_sockets(directory)
    assert not agents.has(UUID)
    async with agents.visit(UUID) as agent:
        with pytest.raises(AgentAbsent, match="No such file"):
            await agent.execute("guest-network-get-interfaces")
    (directory / f"{UUID}.sock").write_text("no socket")
    assert not agents.has(UUID)


async def test_a_frozen_agent_is_given_up_and_its_late_answers_are_passed_over(
    directory: Path, guest: FakeGuest
) -> None:
    """QEMU hands every answer to whoever is connected when it comes."""
    late: list[bytes] = []
    frozen = True

    def say(request: Request) -> bytes:
        reply = json.dumps(guest.answer(request)).encode() + b"\n"
        late.append(reply)
        if frozen:
            return b""
        told, late[:] = b"".join(late), []
        return told

    async with served(directory / f"{UUID}.sock", guest, say):
        for _ in range(3):
            async with at_sockets(directory, 0.05).visit(UUID) as agent:
                with pytest.raises(AgentSilent, match="no answer in time"):
                    await agent.execute("guest-network-get-interfaces")
                with pytest.raises(AgentSilent):
                    await agent.execute("guest-network-get-interfaces")
        frozen = False
        async with at_sockets(directory).visit(UUID) as agent:
            assert (await read_figures(agent)).connections == 12
    assert guest.asked.count("guest-sync") == 3 + 2, "once more after a former visit's answer"


HOSTILE: dict[str, Say] = {
    "garbage": lambda _: b"\xff\xfe{}}}\n",
    "no JSON object": lambda _: b"[1, 2]\n",
    "deep": lambda _: b"[" * 100_000 + b"\n",
    "endless line": lambda _: b"x" * (MAX_REPLY_BYTES * 3),
    "events": lambda _: b'{"event": "RESET", "timestamp": {"seconds": 1, "microseconds": 1}}\n' * 50_000,
    "strays": lambda _: b'{"return": 1, "id": "somebody else"}\n' * 50_000,
    "empty objects": lambda _: b"{}\n" * 100_000,
    "impossible id": lambda _: b'{"return": 1, "id": []}\n',
    "error without words": lambda request: json.dumps({"error": 1, "id": request["id"]}).encode() + b"\n",
    "twice": lambda request: (json.dumps({"return": 1, "id": request["id"]}).encode() + b"\n") * 3,
    "huge number": lambda _: b'{"return": ' + b"9" * 5000 + b"}\n",
    "hangs up": lambda _: None,
}


@pytest.mark.parametrize("after_sync", [False, True])
@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_guest_is_left_in_peace(
    directory: Path, guest: FakeGuest, kind: str, after_sync: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def say(request: Request) -> bytes | None:
        if after_sync and request["execute"] == "guest-sync":
            return json.dumps(guest.answer(request)).encode() + b"\n"
        return HOSTILE[kind](request)

    async with served(directory / f"{UUID}.sock", guest, say), at_sockets(directory).visit(UUID) as agent:
        with pytest.raises(AgentError) as trouble:
            await read_figures(agent)
        assert isinstance(trouble.value, InvalidReply if after_sync and kind != "hangs up" else AgentSilent)
    await asyncio.sleep(0)
    assert caplog.text == "", "a guest that fills the host's log"


async def test_a_guest_that_talks_all_the_time_is_heard_for_a_few_messages(directory: Path, guest: FakeGuest) -> None:
    async with served(directory / f"{UUID}.sock", guest, lambda _: b"{}\n" * 10_000):
        agents = at_sockets(directory)
        async with agents.visit(UUID) as agent:
            with pytest.raises(AgentSilent):
                await agent.execute("guest-network-get-interfaces")
            client = agent._client
        assert client is None or client._received <= MAX_UNSOLICITED + 3


async def test_answers_cut_off_or_changed_anywhere_end_in_trouble_or_figures(directory: Path, guest: FakeGuest) -> None:
    dice = random.Random(11)

    def say(request: Request) -> bytes | None:
        reply = bytearray(json.dumps(guest.answer(request)).encode() + b"\n")
        if dice.random() < 0.1:
            where = dice.randrange(len(reply))
            if dice.random() < 0.3:
                return None
            reply[where] = dice.randrange(256)
        return bytes(reply)

    well = 0
    async with served(directory / f"{UUID}.sock", guest, say):
        for _ in range(150):
            async with at_sockets(directory, 0.05).visit(UUID) as agent:
                with contextlib.suppress(AgentError):
                    await read_figures(agent)
                    well += 1
    assert 0 < well < 150
