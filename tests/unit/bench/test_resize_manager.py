"""The cpmd of the resize bench, and nodes that confirm what they are told, or do not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import cast

import pytest

from bench import resize_manager
from bench.resize_manager import ME, _Cpmd, resize
from bench.waits import TimedOut
from cpm.api import operations
from cpm.api.requests import PoolRequest
from cpm.api.server import NodeConnection
from cpm.protocol.bounds import FIRST_PORT, LAST_PORT
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Attach,
    Delta,
    Hello,
    ManagerMessage,
    NodeMessage,
    Rejected,
    Report,
    Snapshot,
)
from cpm.protocol.model import AllocationState, DomainUUID, NodeName, PortRange, Role
from cpm.settings import LedgerSettings, ListenSettings, PoolSettings, Settings
from lab.errors import LabError
from tests.fakes.approving import approve

VM = DomainUUID("00000000-0000-0000-0000-000000000001")


class Site:
    """A cpmd with one edge and one host, which answer at once."""

    def __init__(self, cpmd: _Cpmd) -> None:
        self.cpmd = cpmd
        self.silent: set[NodeName] = set()
        self._answers: set[asyncio.Task[None]] = set()
        self._connections: dict[NodeName, NodeConnection] = {}

    async def connect(self, name: str, role: Role, number: int) -> None:
        node = NodeName(name)
        self._connections[node] = cast("NodeConnection", FakeConnection(self, node))
        underlay = IPv4Address(f"172.30.0.{number}")
        hello = Hello(PROTOCOL, node, frozenset({role}), underlay, "0", 0, ())
        await self.cpmd.decisions.do(lambda manager, now: approve(manager, hello, now))
        await self.cpmd.node_sessions.on_connected(hello, self._connections[node])

    async def first_range(self) -> None:
        active = AllocationState.ACTIVE
        await self.cpmd.wait_for("a first range", VM, lambda: self.cpmd.manager.fleet.one(VM, active))

    async def say(self, node: NodeName, message: NodeMessage) -> None:
        await self.cpmd.node_sessions.on_message(node, self._connections[node], message)

    def told(self, node: NodeName, message: ManagerMessage) -> None:
        if isinstance(message, (Snapshot, Delta)) and node not in self.silent:
            answer = asyncio.get_running_loop().create_task(self.say(node, Applied(message.epoch, message.generation)))
            self._answers.add(answer)
            answer.add_done_callback(self._answers.discard)


class FakeConnection:
    """The part of :class:`cpm.api.server.NodeConnection` that cpmd calls."""

    def __init__(self, site: Site, node: NodeName) -> None:
        self._site = site
        self._node = node

    def send(self, message: ManagerMessage) -> None:
        self._site.told(self._node, message)

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    """A VM has its first range."""
    settings = Settings(
        listen=ListenSettings(socket=str(tmp_path / "cpmd.sock")),
        ledger=LedgerSettings(path=str(tmp_path / "ledger.db")),
        pool=PoolSettings(initial=256, cap=640),
    )
    cpmd = _Cpmd(settings)
    await cpmd.start()
    try:
        await cpmd.pool_add(["203.0.113.1"])
        made = Site(cpmd)
        await made.connect("edge1", Role.EDGE, 11)
        await made.connect("host1", Role.HOST, 21)
        await made.say(NodeName("host1"), Attach(VM, "web1"))
        await made.first_range()
        yield made
    finally:
        await cpmd.stop()


async def test_a_resize_that_all_confirm_is_measured(site: Site) -> None:
    measured = await resize(site.cpmd, VM)
    assert 0 < measured["committed_ms"] < measured["ms"] < measured["recorded_ms"]
    assert (measured["moved"], measured["said"]) == (False, [])


async def test_an_edge_that_does_not_answer_is_found_in_the_error(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resize_manager, "TIMEOUT_S", 0.2)
    await resize(site.cpmd, VM)
    site.silent.add(NodeName("edge1"))
    with pytest.raises(TimedOut) as raised:
        await resize(site.cpmd, VM)
    said = str(raised.value).splitlines()
    assert said[0] == "not within 0.2 s: an active range of 384 ports"
    assert "range 1024-1343 of 203.0.113.1: active on host1" in said
    assert "range 1344-1407 of 203.0.113.1: reserved on host1" in said
    [edge] = [line for line in said if line.startswith("edge1: ")]
    assert edge.endswith("has not confirmed all of the VM")
    assert any("host1 said applied" in line for line in said)


async def test_a_node_that_refused_a_transaction_is_found_in_a_slow_resize(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resize_manager, "SLOW_MS", 0.0)
    edge = NodeName("edge1")
    site.silent.add(edge)
    under_way = asyncio.create_task(resize(site.cpmd, VM))
    while not (generation := _unconfirmed(site.cpmd, edge)):
        await asyncio.sleep(0)
    await site.say(edge, Rejected(site.cpmd.manager.epoch, generation, "kernel", "no buffer space"))
    await site.say(edge, Applied(site.cpmd.manager.epoch, generation))
    measured = await under_way
    assert any(f"rejected {generation} (kernel): no buffer space" in line for line in measured["said"])


async def test_a_vm_that_is_being_resized_is_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the manager does by itself, compaction for example, must not swallow the resize that is measured."""
    host = NodeName("host1")
    site.silent.add(host)
    await site.cpmd.operators.answer(operations.RELOCATE, {"name": "web1"}, ME)
    second = asyncio.create_task(resize(site.cpmd, VM))
    await asyncio.sleep(0.05)
    assert not second.done()
    site.silent.clear()
    await site.say(host, Applied(site.cpmd.manager.epoch, _unconfirmed(site.cpmd, host)))
    measured = await second
    assert measured["ms"] > 0


async def test_a_resize_that_the_manager_does_not_begin_is_an_error(site: Site) -> None:
    active = site.cpmd.manager.fleet.one(VM, AllocationState.ACTIVE)
    assert active is not None
    nothing_left = PortRange(FIRST_PORT, LAST_PORT).minus(active.ports)
    request = PoolRequest((active.external,), nothing_left)
    await site.cpmd.operators.answer(operations.ADD_TO_POOL, {"body": request}, ME)
    with pytest.raises(LabError, match="did not begin the resize") as raised:
        await resize(site.cpmd, VM)
    assert "fair share of it is 256 ports" in str(raised.value).splitlines()[0], "the reason is the manager's"


async def test_reports_are_told_of_when_they_say_something_new(site: Site) -> None:
    host = NodeName("host1")
    for generation in (1, 1, 2):
        await site.say(host, Report(generation, 1.0, ()))
    told = [line for line in site.cpmd.record.since(0.0) if "report" in line]
    assert [line.partition(" ago ")[2] for line in told] == [
        "host1 said report of generation 1",
        "host1 said report of generation 2",
    ]


def _unconfirmed(cpmd: _Cpmd, node: NodeName) -> int:
    sync = cpmd.manager.sessions[node]
    return sync.generation if sync.applied < sync.generation else 0
