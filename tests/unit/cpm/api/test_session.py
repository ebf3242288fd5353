"""A node's side of the session against a real cpmd: it connects, receives messages, is closed and reconnects."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path

import aiohttp
import pytest

from cpm.api import session as session_
from cpm.api.session import Pauses, Session
from cpm.protocol.errors import Conflict
from cpm.protocol.messages import PROTOCOL, Applied, Hello, ManagerMessage, Snapshot, Welcome
from cpm.protocol.model import NodeName, Role
from tests.fakes import cpmd

LIMIT_S = 60.0


class Node:
    """Sends hello on every connection; keeps the events."""

    def __init__(self, protocol: int = PROTOCOL) -> None:
        self.session: Session
        self.messages: asyncio.Queue[ManagerMessage] = asyncio.Queue()
        self.reasons: asyncio.Queue[str] = asyncio.Queue()
        self.trouble: Conflict | None = None
        self._hello = Hello(protocol, NodeName("host1"), frozenset(Role), IPv4Address("172.30.0.11"), "0", 0, ())

    def on_connected(self) -> None:
        self.session.send(self._hello)

    def on_message(self, message: ManagerMessage) -> None:
        self.messages.put_nowait(message)
        trouble, self.trouble = self.trouble, None
        if trouble is not None:
            raise trouble

    def on_disconnected(self, reason: str) -> None:
        self.reasons.put_nowait(reason)


@contextlib.asynccontextmanager
async def running(node: Node, path: str) -> AsyncIterator[None]:
    node.session = Session(f"unix://{path}", node, None, lambda: 0.0)
    task = asyncio.create_task(node.session.run())
    try:
        async with asyncio.timeout(LIMIT_S):
            yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def approving() -> AsyncIterator[cpmd.Site]:
    """Run a cpmd that has approved the node."""
    async with cpmd.running() as site:
        await site.approve("host1", "172.30.0.11")
        yield site


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(session_, "APPROVAL_PAUSE_S", 0.002)


@pytest.mark.parametrize("jitter", [0.0, 0.5, 1.0])
def test_pauses_are_short_for_as_long_as_a_restart_of_the_manager_takes(
    jitter: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_, "FIRST_PAUSE_S", 0.2)
    pauses, passed, longest = Pauses(lambda: jitter), 0.0, 0.0
    while passed < session_.SHORT_FOR_S:
        longest = max(longest, pause := pauses.next())
        passed += pause
    assert longest == session_.SHORT_PAUSE_S * (0.5 + jitter)
    assert [pauses.next() for _ in range(10)][-1] == session_.LONGEST_PAUSE_S * (0.5 + jitter)
    pauses.on_session()
    assert pauses.next() == 0.2 * (0.5 + jitter)


async def test_an_attempt_that_nobody_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen manager: its kernel takes the connection, and nobody reads from it."""
    monkeypatch.setattr(session_, "CONNECT_S", 0.01)
    path, node = str(tmp_path / "cpmd.sock"), Node()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        async with running(node, path):
            assert await node.reasons.get() == "TimeoutError"
            assert await node.reasons.get() == "TimeoutError"


async def test_hello_is_answered_by_welcome_and_a_snapshot() -> None:
    node = Node()
    async with approving() as site, running(node, site.path):
        welcome, snapshot = await node.messages.get(), await node.messages.get()
    assert (type(welcome), type(snapshot)) == (Welcome, Snapshot)


async def test_an_error_of_the_listener_closes_the_session_which_reconnects() -> None:
    node = Node()
    node.trouble = Conflict("an older manager")
    async with approving() as site, running(node, site.path):
        assert await node.reasons.get() == "an older manager"
        while not isinstance(await node.messages.get(), Snapshot):
            pass


async def test_the_reason_of_a_close_frame_reaches_the_listener() -> None:
    node = Node(protocol=PROTOCOL + 1)
    async with cpmd.running() as site, running(node, site.path):
        reason = await node.reasons.get()
    assert reason.startswith(f"closed by the manager: host1 speaks protocol {PROTOCOL + 1}, we {PROTOCOL}")


async def test_a_failed_connection_reaches_the_listener_with_its_reason() -> None:
    node = Node()
    async with running(node, "/nonexistent/cpmd.sock"):
        assert "/nonexistent/cpmd.sock" in await node.reasons.get()


async def test_a_node_that_is_not_approved_is_told_the_command_and_has_its_session_once_it_is() -> None:
    node = Node()
    async with cpmd.running() as site, running(node, site.path):
        for _ in range(3):
            assert (await node.reasons.get()).endswith("; on the manager: virt-ports node approve host1")
        assert node.messages.empty()
        await site.approve("host1", "172.30.0.11")
        assert isinstance(await node.messages.get(), Welcome)


async def test_the_pauses_stay_short_while_an_operator_is_to_approve(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def note(delay: float) -> None:
        pauses.append(delay)
        await sleep(0)

    node = Node()
    async with cpmd.running() as site:
        with monkeypatch.context() as patch:
            patch.setattr(asyncio, "sleep", note)
            async with running(node, site.path):
                while len(pauses) < 5:
                    await node.reasons.get()
    assert set(pauses[:5]) == {session_.APPROVAL_PAUSE_S / 2}  # no jitter is half of it


async def test_a_manager_that_takes_nothing_costs_limited_memory_and_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    node, is_taking = Node(), asyncio.Event()

    async def send(self: aiohttp.ClientWebSocketResponse, data: bytes) -> None:
        del self, data
        await is_taking.wait()

    monkeypatch.setattr(aiohttp.ClientWebSocketResponse, "send_bytes", send)
    async with approving() as site, running(node, site.path):
        while node.session._outgoing.qsize() < session_.MOST_QUEUED:
            node.session.send(Applied(1, 1))
            await asyncio.sleep(0)
        queue = node.session._outgoing
        node.session.send(Applied(1, 1))
        assert queue.qsize() <= session_.MOST_QUEUED
        assert await node.reasons.get() == "the manager takes no messages"
        # It connects again, with a queue of its own.
        while node.session._outgoing is queue:
            await asyncio.sleep(0.001)
