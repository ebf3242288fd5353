"""How the server ends sessions and streams."""

from __future__ import annotations

import asyncio
import json
from ipaddress import IPv4Address
from typing import cast

import aiohttp
import aiohttp.web
import pytest

from cpm.api.server import NodeConnection
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.messages import Attach, Delta, ManagerMessage, Refused
from cpm.protocol.model import DomainUUID
from tests.fakes import cpmd

WEB = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")


@pytest.mark.parametrize("pad", range(4))
async def test_a_reason_fits_a_close_frame_in_whole_characters_and_keeps_its_remedy(pad: int) -> None:
    """A node may have any name; the error repeats what it sent."""
    kind = "x" * pad + "\N{EURO SIGN}" * 100
    async with cpmd.running() as site, site.session() as session:
        await session.send_str(json.dumps({"type": kind}))
        frame = await session.receive()
    assert (frame.type, frame.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.POLICY_VIOLATION)
    assert frame.extra is not None
    assert 118 < len(frame.extra.encode()) <= 123
    assert frame.extra.endswith("\N{EURO SIGN}' - at `$.type`; both sides must run the same version")


async def test_a_client_that_disconnects_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async with cpmd.running() as site:
        assert (await site.lines("/v1/events?follow=1", 0)).status == 200
        async with site.node("host1", "172.30.0.11") as node:
            await site.ask("POST", "/v1/pool", b'{"addresses":["203.0.113.1"]}')
            await node.say(Attach(WEB, "web1"))
            await site.settle()
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


class _Socket:
    """A node's socket that takes nothing before it is told to."""

    def __init__(self) -> None:
        self.is_taking = asyncio.Event()
        self.sent = 0
        self.is_closed = False

    async def send_bytes(self, _: bytes) -> None:
        await self.is_taking.wait()
        self.sent += 1

    async def close(self) -> None:
        self.is_closed = True


_ENTRY = EdgeIntent(WEB, "web1", IPv4Address("100.64.0.1"), None, ())


@pytest.mark.parametrize(
    ("message", "count"),
    [
        (Refused(1, WEB, "ports-exhausted", "no port is free"), NodeConnection.MOST_MESSAGES),
        (Delta(1, 1, edge=(_ENTRY,) * 10_000), NodeConnection.MOST_ENTRIES // 10_000),
    ],
)
async def test_a_node_that_takes_nothing_costs_limited_memory_and_its_session(
    message: ManagerMessage, count: int
) -> None:
    socket = _Socket()
    connection = NodeConnection(cast("aiohttp.web.WebSocketResponse", socket), "172.30.0.11")
    running = asyncio.create_task(connection.run())
    connection.send(message)
    await asyncio.sleep(0)
    for _ in range(count):
        connection.send(message)
    assert len(connection._queue) == count
    for _ in range(3 * count):
        connection.send(message)
    assert len(connection._queue) == 0
    socket.is_taking.set()
    await asyncio.wait_for(running, 60)
    assert (socket.sent, socket.is_closed) == (1, True)


async def test_a_session_that_is_closed_sends_what_was_queued_before() -> None:
    socket = _Socket()
    socket.is_taking.set()
    connection = NodeConnection(cast("aiohttp.web.WebSocketResponse", socket), "172.30.0.11")
    for _ in range(3):
        connection.send(Refused(1, WEB, "ports-exhausted", "no port is free"))
    connection.close()
    connection.send(Refused(1, WEB, "ports-exhausted", "no port is free"))
    await asyncio.wait_for(connection.run(), 60)
    assert (socket.sent, socket.is_closed) == (3, True)


class _Gone:
    """A node's socket whose peer has closed the connection, as when cpmd was stopped for longer than a heartbeat."""

    async def pong(self, _: bytes) -> None:
        raise aiohttp.ClientConnectionResetError("Cannot write to closing transport")


async def test_a_ping_of_a_peer_that_is_gone_is_no_error() -> None:
    connection = NodeConnection(cast("aiohttp.web.WebSocketResponse", _Gone()), "172.30.0.11")
    assert await connection.on_control(aiohttp.WSMessage(aiohttp.WSMsgType.PING, b"", None))
