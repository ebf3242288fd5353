"""``python -m bench.resize_manager CPMD.TOML``: cpmd with a remote control, for :mod:`bench.resize` only."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from cpm import settings
from cpm.api import operations
from cpm.api.server import NodeConnection
from cpm.api.views import PoolRequest
from cpm.core.manager import Manager
from cpm.core.sizing.sizer import Target
from cpm.daemon import Cpmd
from cpm.protocol.messages import Applied, NodeMessage
from cpm.protocol.model import Allocation, AllocationState, DomainUUID, NodeName
from cpm.serving.node_sessions import NodeSessions
from cpm.serving.streams import ReportFollowers

LIMIT_S = 10.0


class _NodeSessions(NodeSessions):
    """Lets the bench wait for what follows from what nodes say, and keeps when each said that it applied something."""

    taken_in: asyncio.Event
    applied_at: dict[NodeName, float]

    async def on_message(self, node: NodeName, connection: NodeConnection, message: NodeMessage) -> None:
        now = time.perf_counter()
        await super().on_message(node, connection, message)
        if isinstance(message, Applied):
            self.applied_at[node] = now
        self.taken_in.set()


class _Cpmd(Cpmd):
    def __init__(self, of: settings.Settings) -> None:
        super().__init__(of)
        self.taken_in = asyncio.Event()
        self.applied_at: dict[NodeName, float] = {}

    def _node_sessions(self, version: str, reports: ReportFollowers) -> NodeSessions:
        sessions = _NodeSessions(self.decisions, self._connections, version, reports)
        sessions.taken_in, sessions.applied_at = self.taken_in, self.applied_at
        return sessions

    @property
    def manager(self) -> Manager:
        return self.decisions.manager

    async def decide(self, uuid: DomainUUID, target: int) -> None:
        """Have the manager decide on a size, as the scaling does for a report."""
        await self.decisions.do(lambda manager, now: manager.sizer.resize(uuid, Target(target), now))

    async def pool_add(self, addresses: list[str]) -> int:
        """Add external addresses; return how many there are now."""
        request = PoolRequest(tuple(map(IPv4Address, addresses)))
        await self.operators.answer(operations.ADD_TO_POOL, {"body": request})
        return len(self.manager.fleet.space.addresses)


async def _resize(cpmd: _Cpmd, uuid: DomainUUID) -> dict[str, Any]:
    before = await _active(cpmd, uuid, 1)
    target = before.ports.size + 64
    begin = time.perf_counter()
    await cpmd.decide(uuid, target)
    decided = time.perf_counter()
    after = await _active(cpmd, uuid, target)
    recorded = time.perf_counter()
    on_host = cpmd.applied_at[after.node]
    # The host is told last, so that its word is that of all.
    return {
        "ms": (on_host - begin) * 1000,
        "committed_ms": (decided - begin) * 1000,
        "recorded_ms": (recorded - begin) * 1000,
        "moved": not after.ports.covers(before.ports),
    }


async def _active(cpmd: _Cpmd, uuid: DomainUUID, size: int) -> Allocation:
    """Wait until a VM has an active range of at least this size."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            cpmd.taken_in.clear()
            active = cpmd.manager.fleet.one(uuid, AllocationState.ACTIVE)
            if active is not None and active.ports.size >= size:
                return active
            await cpmd.taken_in.wait()


async def _serve(cpmd: _Cpmd, name: str, arguments: list[Any]) -> Any:
    if name == "start":
        await cpmd.start()
        return await cpmd.pool_add(arguments[0])
    if name == "resize":
        vms = sorted(cpmd.manager.fleet.vms)
        return [await _resize(cpmd, vms[number % len(vms)]) for number in range(arguments[0])]
    await cpmd.stop()
    return None


async def _main(configuration: Path) -> None:
    cpmd = _Cpmd(settings.load(configuration))
    while line := await asyncio.to_thread(sys.stdin.readline):
        name, *arguments = json.loads(line)
        try:
            answer = await _serve(cpmd, name, arguments)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1])))
