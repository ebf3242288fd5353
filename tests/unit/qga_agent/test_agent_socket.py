"""Agents behind unix sockets: late answers, and guests that mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from pathlib import Path

import pytest

from qga_agent.agent_socket import MAX_UNSOLICITED
from qga_agent.guest_agent import MAX_REPLY_BYTES, AgentAbsent, AgentError, AgentSilent, InvalidReply, read_figures
from tests.fakes.guest import UUID, FakeGuest, Request, Say, served
from tests.unit.qga_agent.conftest import at_sockets


async def test_without_a_socket_the_agent_is_absent(directory: Path) -> None:
    agents = at_sockets(directory)
    assert not agents.has(UUID)
    async with agents.visit(UUID) as agent:
        with pytest.raises(AgentAbsent):
            await agent.execute("guest-network-get-interfaces")
    (directory / f"{UUID}.sock").write_text("no socket")
    assert not agents.has(UUID)


async def test_late_replies_of_a_frozen_agent_are_skipped(directory: Path, guest: FakeGuest) -> None:
    """QEMU passes each reply to the client that is connected when it comes."""
    late: list[bytes] = []
    frozen = True

    def say(request: Request) -> bytes:
        reply = json.dumps(guest.answer(request)).encode() + b"\n"
        late.append(reply)
        if frozen:
            return b""
        replies, late[:] = b"".join(late), []
        return replies

    async with served(directory / f"{UUID}.sock", guest, say):
        for _ in range(3):
            async with at_sockets(directory, 0.05).visit(UUID) as agent:
                for _ in range(2):
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
async def test_a_hostile_guest_ends_its_own_visit_only(
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


@pytest.mark.parametrize(("strays", "error"), [(MAX_UNSOLICITED, None), (MAX_UNSOLICITED + 1, AgentSilent)])
async def test_a_bounded_number_of_unsolicited_messages_is_tolerated(
    directory: Path, guest: FakeGuest, strays: int, error: type[AgentError] | None
) -> None:
    def say(request: Request) -> bytes:
        before = b"" if guest.asked else b'{"return": 1, "id": "another"}\n' * strays
        return before + json.dumps(guest.answer(request)).encode() + b"\n"

    async with served(directory / f"{UUID}.sock", guest, say), at_sockets(directory).visit(UUID) as agent:
        with pytest.raises(error) if error is not None else contextlib.nullcontext():
            await agent.execute("guest-network-get-interfaces")


async def test_damaged_replies_give_figures_or_an_agent_error(directory: Path, guest: FakeGuest) -> None:
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
