"""
Who a node is: by its certificate, where it has one, and one machine at a time.

A real cpmd, and nodes that say what they like.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path

import aiohttp
import pytest

from cpm.protocol import codec
from cpm.protocol.messages import NOT_APPROVED, PROTOCOL, Hello, Snapshot, Welcome
from cpm.protocol.model import NodeName, Role
from cpm.serving import node_sessions
from tests.fakes import cpmd
from tests.fakes.certificates import Certificates
from tests.fakes.cpmd import Site

LIMIT_S = 60.0
HOST1 = NodeName("host1")
UNDERLAY = IPv4Address("172.30.0.11")


def hello(instance: str, name: NodeName = HOST1, machine: str = "") -> bytes:
    return codec.encode(
        Hello(PROTOCOL, name, frozenset({Role.HOST}), UNDERLAY, "0", 0, (), machine=machine, instance=instance)
    )


async def is_served(session: aiohttp.ClientWebSocketResponse) -> bool:
    """Return whether the manager answers by a snapshot; False: it closes the session."""
    seen = []
    async with asyncio.timeout(LIMIT_S):
        async for frame in session:
            seen.append(type(codec.decode_manager_message(frame.data)))
            if seen[-1] is Snapshot:
                return True
    assert seen == []
    return False


async def warnings(site: Site) -> list[str]:
    (node,) = json.loads((await site.ask("GET", "/v1/nodes")).body)
    assert node["connected"]
    found: list[str] = node["warnings"]
    return found


@contextlib.asynccontextmanager
async def approving() -> AsyncIterator[Site]:
    async with cpmd.running() as site:
        await site.approve(HOST1, str(UNDERLAY), frozenset({Role.HOST}))
        yield site


async def test_a_second_machine_is_refused_while_the_first_one_answers(caplog: pytest.LogCaptureFixture) -> None:
    async with approving() as site, site.session() as first:
        await first.send_bytes(hello("natd of the first"))
        assert await is_served(first)
        reading = asyncio.create_task(first.receive())  # answers pings
        for _ in range(2):
            async with site.session() as second:
                await second.send_bytes(hello("natd of the second"))
                assert not await is_served(second)
        assert any("a second machine, local peer, says that it is host1" in each for each in await warnings(site))
        metrics = (await site.ask("GET", "/metrics")).body
        assert 'virt_ports_node_sessions_refused_total{code="name-in-use"} 2' in metrics
        assert not reading.done()
        reading.cancel()
    said = [
        record.message for record in caplog.records if "is refused; give that machine another name" in record.message
    ]
    assert len(said) == 1


async def test_a_natd_that_restarts_is_back_at_once() -> None:
    async with approving() as site, site.session() as first:
        await first.send_bytes(hello("before"))
        assert await is_served(first)
        first._response.close()  # as the kernel does when the process dies
        async with site.session() as again:
            await again.send_bytes(hello("after"))
            assert await is_served(again)


async def test_a_natd_that_reconnects_replaces_its_own_session() -> None:
    async with approving() as site, site.session() as first, site.session() as again:
        await first.send_bytes(hello("the same"))
        assert await is_served(first)
        reading = asyncio.create_task(first.receive())  # answers pings
        await again.send_bytes(hello("the same"))
        assert await is_served(again)
        assert (await asyncio.wait_for(reading, LIMIT_S)).type is aiohttp.WSMsgType.CLOSE


async def test_a_machine_that_no_longer_answers_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_sessions, "ALIVE_S", 0.05)
    async with approving() as site, site.session() as first, site.session() as second:
        await first.send_bytes(hello("lost its power"))
        assert await is_served(first)
        # Nobody reads from the first session any more, so nobody answers its pings.
        await second.send_bytes(hello("booted again"))
        assert await is_served(second)


async def test_the_machine_that_had_a_name_first_keeps_it_over_restarts() -> None:
    async with approving() as site:
        for machine, is_first in (("aaaa", True), ("bbbb", False), ("aaaa", True)):
            async with site.session() as session:
                await session.send_bytes(hello(machine, machine=machine))
                assert await is_served(session) is is_first
            while '"connected":true' in (await site.ask("GET", "/v1/nodes")).body:
                await asyncio.sleep(0.002)


async def test_a_refusal_for_want_of_approval_has_a_code_of_its_own_and_is_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with cpmd.running() as site:
        for _ in range(3):
            async with site.session() as session:
                await session.send_bytes(hello("x"))
                frame = await session.receive()
                assert (frame.type, frame.data) == (aiohttp.WSMsgType.CLOSE, NOT_APPROVED)
                assert frame.extra is not None
                assert frame.extra.endswith("virt-ports node approve host1")
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        "host1 is not approved and asks to be host at 172.30.0.11; on the manager: virt-ports node approve host1"
    ]


# Certificates


@pytest.mark.parametrize(("said", "is_its_own"), [("host1", True), ("edge1", False), ("host10", False)])
async def test_a_certificate_is_good_for_its_own_name_only(tmp_path: Path, said: str, *, is_its_own: bool) -> None:
    certificates = Certificates(tmp_path)
    context = certificates.node("host1")
    async with cpmd.running() as site:
        for name in ("host1", "edge1", "host10"):
            # All of them are approved: it is the certificate that says who this is.
            await site.approve(
                name, {"host1": "172.30.0.11"}.get(name, f"172.30.1.{len(name)}"), frozenset({Role.HOST})
            )
        port = await site.listen_tls(certificates.manager())
        async with (
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as http,
            http.ws_connect(f"https://127.0.0.1:{port}/v1/session") as session,
        ):
            address = UNDERLAY if is_its_own else IPv4Address(f"172.30.1.{len(said)}")
            await session.send_bytes(
                codec.encode(Hello(PROTOCOL, NodeName(said), frozenset({Role.HOST}), address, "0", 0, ()))
            )
            frame = await session.receive()
            if is_its_own:
                assert isinstance(codec.decode_manager_message(frame.data), Welcome)
            else:
                assert frame.type is aiohttp.WSMsgType.CLOSE
                assert "to a name in its certificate" in (frame.extra or "")
