"""cpmd's decision loop with real sessions, a ledger on a disk that may fail, and a machine that applies all it gets."""

from __future__ import annotations

import sqlite3
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, cast

import pytest

from cpm.api.server import NodeConnection
from cpm.core.manager import Manager
from cpm.core.membership import ApprovalRequest
from cpm.ledger import SqliteLedger
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Delta,
    Hello,
    ManagerMessage,
    NodeMessage,
    Presence,
    Snapshot,
)
from cpm.protocol.model import AllocationState, DomainUUID, ExternalAddress, NodeName, Role
from cpm.serving.decision_loop import DecisionLoop
from cpm.serving.ledger_writer import RETRY_S
from cpm.serving.node_sessions import NodeConnections, NodeSessions
from cpm.serving.streams import ReportFollowers
from cpm.settings import PoolSettings, Settings

HOST1 = NodeName("host1")
WEB, DB = (DomainUUID(f"00000000-0000-0000-0000-00000000000{n}") for n in "12")
EXTERNAL = ExternalAddress(IPv4Address("203.0.113.1"))
OTHER = ExternalAddress(IPv4Address("203.0.113.2"))
_State = AllocationState


class Disk:
    """SQLite's connection to a file, on a disk on which one statement fails."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self.failure: tuple[str, str] | None = None
        """The statement of a writing transaction, and the name of SQLite's error."""
        self._writes = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        if statement.startswith("BEGIN"):
            self._writes = statement == "BEGIN IMMEDIATE"
        if self._writes and self.failure is not None and statement == self.failure[0]:
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = self.failure[1]
            raise error
        return self._connection.execute(statement, *parameters)


class Connection:
    """A node's connection; keeps what is sent."""

    instance = ""
    """The same natd, which connects again."""

    def __init__(self) -> None:
        self.sent: list[ManagerMessage] = []
        self.is_closed = False

    def send(self, message: ManagerMessage) -> None:
        self.sent.append(message)

    def close(self) -> None:
        self.is_closed = True


class Site:
    """cpmd's decision loop with sessions, and a machine that is host and edge."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 5000.0
        monkeypatch.setattr("cpm.service.clock.now", lambda: self.now)
        self.ledger = SqliteLedger(path)
        self.disk = Disk(self.ledger._connection)
        self.ledger._connection = cast("sqlite3.Connection", self.disk)
        self.connections = NodeConnections()
        self.loop = DecisionLoop(self.ledger, Settings(pool=PoolSettings(hold_down_s=120.0)).rules(), self.connections)
        self.sessions = NodeSessions(self.loop, self.connections, "0", ReportFollowers())
        self.connection = Connection()

    async def connect(self, *domains: DomainUUID) -> None:
        self.connection = Connection()
        here = tuple(Presence(uuid, uuid[-1]) for uuid in domains)
        hello = Hello(PROTOCOL, HOST1, frozenset(Role), IPv4Address("172.30.0.11"), "0", 0, here)
        await self.sessions.on_connected(hello, cast("NodeConnection", self.connection))
        await self.apply()

    async def say(self, message: NodeMessage) -> None:
        await self.sessions.on_message(HOST1, cast("NodeConnection", self.connection), message)
        await self.apply()

    async def apply(self) -> list[ManagerMessage]:
        """Apply what was sent, and return it."""
        got: list[ManagerMessage] = []
        while self.connection.sent:
            message = self.connection.sent.pop(0)
            got.append(message)
            if isinstance(message, (Snapshot, Delta)):
                applied = Applied(message.epoch, message.generation)
                await self.sessions.on_message(HOST1, cast("NodeConnection", self.connection), applied)
        return got

    async def add(self, external: ExternalAddress) -> None:
        await self.loop.do(lambda manager, now: manager.pool.add_addresses([external], now), is_change=True)

    async def approve(self, name: str, underlay: str, role: Role) -> None:
        request = ApprovalRequest(roles=frozenset((role,)), underlay=IPv4Address(underlay))
        await self.loop.do(
            lambda manager, now: manager.membership.approve(NodeName(name), request, now), is_change=True
        )

    async def tick(self, seconds: float = RETRY_S) -> None:
        self.now += seconds
        await self.loop.do(Manager.tick)

    def states(self, uuid: DomainUUID = WEB) -> set[AllocationState]:
        return {allocation.state for allocation in self.loop.manager.fleet.of(uuid)}

    def fill(self, statement: str = "COMMIT", name: str = "SQLITE_FULL") -> None:
        self.disk.failure = (statement, name)

    def make_room(self) -> None:
        self.disk.failure = None
