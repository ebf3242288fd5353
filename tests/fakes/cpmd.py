"""
A real cpmd inside the test's own event loop, and a node whose kernel accepts everything at once.

The clock stands still, so that two runs of the same requests give the same answers to the byte.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import ssl
import tempfile
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Address
from pathlib import Path

import aiohttp
import pytest

from cpm import settings
from cpm.api.requests import ApproveRequest
from cpm.daemon import Cpmd
from cpm.protocol import codec
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Delta,
    Hello,
    NodeMessage,
    Snapshot,
    Welcome,
)
from cpm.protocol.model import NodeName, Role
from cpm.protocol.own_ports import OwnAddresses
from cpm.protocol.walltime import UtcSeconds, WallTime
from cpm.service import clock

NOW = UtcSeconds(1763879880.0)  # 2025-11-23T06:38:00Z
SINCE_BOOT_S = 5000.0
SESSION = "http://localhost/v1/session"


class Answer:
    """What came back: status, type and body."""

    def __init__(self, status: int, content_type: str, body: str) -> None:
        self.status = status
        self.content_type = content_type
        self.body = body


class Time:
    """The clocks, which stand still unless somebody moves them."""

    def __init__(self) -> None:
        self.passed_s = 0.0
        self.set_by_s = 0.0
        """By which somebody set the wall clock."""

    def now(self) -> float:
        return SINCE_BOOT_S + self.passed_s

    def wall(self) -> WallTime:
        return WallTime(UtcSeconds(NOW + self.passed_s + self.set_by_s))


class Site:
    """A running manager with nodes; ``path`` is its socket."""

    def __init__(self, http: aiohttp.ClientSession, path: str, directory: Path, cpmd: Cpmd, time: Time) -> None:
        self._http = http
        self.cpmd = cpmd
        self.time = time
        self._server = cpmd._server
        self.path = path
        self.directory = directory

    async def listen_tls(self, context: ssl.SSLContext) -> int:
        """Serve sessions on 127.0.0.1 as well; return the port."""
        await self._server.listen_tls("127.0.0.1", 0, context)
        port: int = self._server._runners[-1].addresses[0][1]
        return port

    async def ask(self, method: str, target: str, body: bytes | None = None) -> Answer:
        async with self._http.request(method, f"http://localhost{target}", data=body) as response:
            text = await response.text()
            return Answer(response.status, response.headers.get("Content-Type", ""), text)

    async def lines(self, target: str, count: int, started: asyncio.Event | None = None) -> Answer:
        """Read the first lines of a stream that may never end, then hang up; ``started``: set once it is open."""
        async with self._http.get(f"http://localhost{target}") as response:
            if started is not None:
                started.set()
            text = "".join([(await response.content.readline()).decode() for _ in range(count)])
            return Answer(response.status, response.headers.get("Content-Type", ""), text)

    def session(self) -> contextlib.AbstractAsyncContextManager[aiohttp.ClientWebSocketResponse]:
        """Open a session in which nothing was said yet."""
        return self._http.ws_connect(SESSION)

    def node(
        self, name: str, address: str, roles: frozenset[Role] = frozenset(Role), own: OwnAddresses = ()
    ) -> contextlib.AbstractAsyncContextManager[Node]:
        """Open a node's session; it applies all that it is told."""
        return connected_node(self._http, name, address, roles, own)

    async def approve(self, name: str, address: str, roles: frozenset[Role] = frozenset(Role)) -> None:
        """Have the operator approve a node."""
        await _approve(self._http, name, address, roles)

    async def settle(self) -> None:
        """Wait until every connected node has confirmed all it was told."""
        while any(n["connected"] and not n["synced"] for n in json.loads((await self.ask("GET", "/v1/nodes")).body)):
            await asyncio.sleep(0.002)


class Node:
    """A machine whose kernel accepts everything at once."""

    def __init__(self, session: aiohttp.ClientWebSocketResponse) -> None:
        self._session = session
        self.epoch = self.generation = 0

    async def say(self, message: NodeMessage) -> None:
        await self._session.send_bytes(codec.encode(message))

    async def obey(self) -> None:
        async for frame in self._session:
            message = codec.decode_manager_message(frame.data)
            if isinstance(message, Welcome):
                self.epoch = message.epoch
            elif isinstance(message, (Snapshot, Delta)):
                self.generation = message.generation
                await self.say(Applied(message.epoch, message.generation))


async def _approve(http: aiohttp.ClientSession, name: str, address: str, roles: frozenset[Role]) -> None:
    approval = codec.encode(ApproveRequest(tuple(sorted(roles)), IPv4Address(address)))
    async with http.put(f"http://localhost/v1/nodes/{name}/approval", data=approval) as answer:
        assert answer.status == 200, await answer.text()


@contextlib.asynccontextmanager
async def connected_node(
    http: aiohttp.ClientSession,
    name: str,
    address: str,
    roles: frozenset[Role] = frozenset(Role),
    own: OwnAddresses = (),
) -> AsyncIterator[Node]:
    """Approve a node as what it is, and open its session with the manager to which ``http`` leads."""
    await _approve(http, name, address, roles)
    async with http.ws_connect(SESSION) as session:
        node = Node(session)
        await node.say(Hello(PROTOCOL, NodeName(name), roles, IPv4Address(address), "0", 0, (), own))
        obeying = asyncio.create_task(node.obey())
        try:
            yield node
        finally:
            await session.close()
            await asyncio.wait_for(obeying, 60)


@contextlib.contextmanager
def _short_directory() -> Iterator[Path]:
    """Return a directory of its own; its name is short because a socket's path may have 107 bytes only."""
    directory = Path(tempfile.mkdtemp(prefix="vpt-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextlib.asynccontextmanager
async def running(
    *,
    edge_grace_s: float = 10.0,
    edge_wait_s: float = 5.0,
    read_socket: bool = False,
    admin_group: str = "",
    events: settings.EventsSettings | None = None,
    page: settings.PageSettings | None = None,
) -> AsyncIterator[Site]:
    """Run a manager with an empty ledger, whose clock stands still unless :attr:`Site.time` moves it."""
    with _short_directory() as directory, pytest.MonkeyPatch.context() as patch:
        time = Time()
        patch.setattr(clock, "now", time.now)
        patch.setattr(clock, "wall", time.wall)
        path = directory / "cpmd.sock"
        cpmd = Cpmd(
            settings.Settings(
                listen=settings.ListenSettings(
                    socket=str(path),
                    read_socket=str(directory / "read.sock") if read_socket else "",
                    admin_group=admin_group,
                ),
                events=events or settings.EventsSettings(),
                page=page or settings.PageSettings(),
                ledger=settings.LedgerSettings(path=str(directory / "ledger.db")),
                nodes=settings.NodesSettings(edge_grace_s=edge_grace_s, edge_wait_s=edge_wait_s),
            )
        )
        await cpmd.start()
        try:
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as http:
                yield Site(http, str(path), directory, cpmd, time)
        finally:
            await cpmd.stop()
