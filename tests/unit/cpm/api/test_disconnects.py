"""Peers that vanish: at each step of a session's beginning and of a request, against a real cpmd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path

import aiohttp
import pytest

from cpm.api import server
from cpm.protocol import codec
from cpm.protocol.messages import PROTOCOL, Hello
from cpm.protocol.model import NodeName, Role
from tests.fakes import cpmd
from tests.fakes.certificates import Certificates
from tests.fakes.cpmd import Site

LIMIT_S = 60.0
ADDRESS = IPv4Address("172.30.0.11")
ROLES = frozenset({Role.HOST})


def frame(opcode: int, payload: bytes = b"") -> bytes:
    """Return a frame of RFC 6455, masked with zeros."""
    size = bytes((0x80 | len(payload),)) if len(payload) < 126 else b"\xfe" + struct.pack(">H", len(payload))
    return bytes((0x80 | opcode,)) + size + bytes(4) + payload


UPGRADE = (
    b"GET /v1/session HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)
HELLO = frame(2, codec.encode(Hello(PROTOCOL, NodeName("host1"), ROLES, ADDRESS, "0", 0, ())))
CLOSE = frame(8)
QUESTION = b"GET /v1/nodes HTTP/1.1\r\nHost: localhost\r\n\r\n"
METRICS = b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n"
FOLLOWING = b"GET /v1/events?follow=1 HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF_A_BODY = b'POST /v1/pool HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"addresses":'

SESSIONS = {
    "connected": (b"", b""),
    "half a request": (UPGRADE[:40], b""),
    "before the upgrade": (UPGRADE, b""),
    "hello before the upgrade": (UPGRADE + HELLO, b""),
    "after the upgrade": (UPGRADE, b"\r\n\r\n"),
    "after half of hello": (UPGRADE + HELLO[:30], b"\r\n\r\n"),
    "after a close frame": (UPGRADE + CLOSE, b"\r\n\r\n"),
    "after hello": (UPGRADE + HELLO, b"\r\n\r\n"),
    "while it is welcomed": (UPGRADE + HELLO, b"\r\n\r\n\x82"),
}
"""What the peer sends, and what it has read when it vanishes."""
REQUESTS = {
    "half a request": (QUESTION[:20], b""),
    "before the answer": (QUESTION, b""),
    "before the metrics": (METRICS, b""),
    "before the stream": (FOLLOWING, b""),
    "in the stream": (FOLLOWING, b"\r\n\r\n"),
    "in its body": (HALF_A_BODY, b""),
}


@contextlib.asynccontextmanager
async def quiet(site: Site, caplog: pytest.LogCaptureFixture) -> AsyncIterator[None]:
    """Check what a peer that vanishes inside has cost: a line at level debug and those of its session, nothing else."""
    await site.ask("GET", "/v1/nodes")
    before = asyncio.all_tasks()
    caplog.clear()
    with caplog.at_level(logging.DEBUG):
        yield
        async with asyncio.timeout(LIMIT_S):
            while any("session to" in task.get_name() for task in asyncio.all_tasks() - before):
                await asyncio.sleep(0.002)
            while '"connected":true' in (await site.ask("GET", "/v1/nodes")).body:
                await asyncio.sleep(0.002)
        # One more turn of the event loop for a connection that was closed before its request was served.
        await asyncio.sleep(0.05)
    lines = [record for record in caplog.records if record.name.startswith(("cpm.", "aiohttp", "asyncio"))]
    assert [each.getMessage() for each in lines if each.levelno > logging.INFO or each.exc_info] == []
    assert len([each for each in lines if each.name.startswith("cpm.api")]) <= 1


async def vanish(path: str | int, context: ssl.SSLContext | None, said: bytes, read: bytes, *, resets: bool) -> None:
    """
    Connect, send, read and be gone.

    :param path: A socket, or a TCP port.
    :param resets: By a reset in place of an orderly end.
    """
    if isinstance(path, str):
        reader, writer = await asyncio.open_unix_connection(path)
    else:
        reader, writer = await asyncio.open_connection("127.0.0.1", path, ssl=context)
    if resets and isinstance(path, int):
        raw: socket.socket = writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.write(said)
    if read:
        async with asyncio.timeout(LIMIT_S):
            await reader.readuntil(read)
    if resets:
        writer.transport.abort()
    else:
        writer.close()


@pytest.mark.parametrize("resets", [False, True], ids=["closes", "resets"])
@pytest.mark.parametrize("step", SESSIONS)
@pytest.mark.parametrize("listener", ["unix", "tls"])
async def test_a_node_that_vanishes_costs_a_line_and_leaves_no_session(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, listener: str, step: str, *, resets: bool
) -> None:
    certificates = Certificates(tmp_path)
    async with cpmd.running() as site:
        await site.approve("host1", str(ADDRESS), ROLES)
        port = await site.listen_tls(certificates.manager())
        path = site.path if listener == "unix" else port
        async with quiet(site, caplog):
            await vanish(path, certificates.node("host1"), *SESSIONS[step], resets=resets)
        async with site.node("host1", str(ADDRESS), ROLES):
            await site.settle()


async def test_a_peer_that_breaks_off_the_handshake_of_tls_costs_nothing(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    async with cpmd.running() as site:
        port = await site.listen_tls(Certificates(tmp_path).manager())
        async with quiet(site, caplog):
            for said in (b"", b"\x16\x03\x01\x02\x00\x01\x00", QUESTION):
                for resets in (False, True):
                    await vanish(port, None, said, b"", resets=resets)
        assert not [each for each in caplog.records if each.name.startswith(("cpm.api", "aiohttp"))]


@pytest.mark.parametrize("resets", [False, True], ids=["closes", "resets"])
@pytest.mark.parametrize("step", REQUESTS)
async def test_an_operator_who_hangs_up_costs_a_line(
    caplog: pytest.LogCaptureFixture, step: str, *, resets: bool
) -> None:
    async with cpmd.running() as site:
        async with quiet(site, caplog):
            await vanish(site.path, None, *REQUESTS[step], resets=resets)
        assert json.loads((await site.ask("GET", "/v1/pool")).body) == []


async def test_a_node_that_answers_no_ping_loses_its_session_and_may_come_back_at_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its machine stood still, or the network between: nothing that it said was wrong."""
    monkeypatch.setattr(server, "HEARTBEAT_S", 0.2)
    async with cpmd.running() as site:
        await site.approve("host1", str(ADDRESS), ROLES)
        async with quiet(site, caplog):
            reader, writer = await asyncio.open_unix_connection(site.path)
            writer.write(UPGRADE + HELLO)
            async with asyncio.timeout(LIMIT_S):
                await reader.read()
        writer.close()
        async with site.node("host1", str(ADDRESS), ROLES):
            await site.settle()


async def test_a_peer_that_says_nothing_is_told_so_and_let_go(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HELLO_LIMIT_S", 0.1)
    async with cpmd.running() as site, quiet(site, caplog), site.session() as session:
        frame = await session.receive(LIMIT_S)
        assert (frame.type, frame.data) == (aiohttp.WSMsgType.CLOSE, aiohttp.WSCloseCode.POLICY_VIOLATION)
        assert "no hello" in (frame.extra or "")


async def test_frames_that_are_none_are_the_nodes_fault(caplog: pytest.LogCaptureFixture) -> None:
    async with cpmd.running() as site:
        await site.approve("host1", str(ADDRESS), ROLES)
        reader, writer = await asyncio.open_unix_connection(site.path)
        writer.write(UPGRADE + HELLO)
        async with asyncio.timeout(LIMIT_S):
            await reader.readuntil(b"\r\n\r\n\x82")
            writer.write(b"\xff" * 8)
            while "both sides must run the same version" not in caplog.text:
                await asyncio.sleep(0.002)
        assert "node host1 is kept out for 1 s" in caplog.text
        writer.close()
