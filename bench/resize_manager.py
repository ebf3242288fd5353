"""``python -m bench.resize_manager CPMD.TOML``: cpmd with a remote control, for :mod:`bench.resize` only."""

from __future__ import annotations

import asyncio
import collections
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

from bench.waits import TimedOut
from cpm import settings
from cpm.api import operations
from cpm.api.access import Peer
from cpm.api.requests import PoolRequest
from cpm.api.server import NodeConnection
from cpm.core.manager import Manager
from cpm.core.sizing.sizer import Target
from cpm.daemon import Cpmd
from cpm.protocol.messages import Applied, Hello, NodeMessage, Rejected, Report
from cpm.protocol.model import Allocation, AllocationState, DomainUUID, NodeName
from cpm.queries.explain import refusal_text
from cpm.serving.node_sessions import NodeSessions
from cpm.serving.streams import ReportFollowers
from lab.errors import LabError

_T = TypeVar("_T")

TIMEOUT_S = 30.0
"""Seconds; a node whose kernel refuses a transaction gets a new snapshot after 5 to 6, and may refuse that as well."""

SLOW_MS = 1000.0
"""A resize above this is reported with the messages of the nodes."""

_KEPT = 60


ME = Peer(os.getpid(), os.geteuid(), frozenset())
"""This process, as the operator."""


class _Record:
    """The nodes' messages with their moments."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        """Set after every message of a node."""
        self.applied_at: dict[NodeName, float] = {}
        self._reported: dict[NodeName, int] = {}
        self._seen: collections.deque[tuple[float, str]] = collections.deque(maxlen=_KEPT)

    def note(self, words: str) -> None:
        self._seen.append((time.perf_counter(), words))

    def note_message(self, node: NodeName, message: NodeMessage) -> None:
        # Reports come every second; record the first of each generation.
        if not isinstance(message, Report) or self._reported.get(node) != message.generation:
            self.note(f"{node} said {_words(message)}")
        if isinstance(message, Report):
            self._reported[node] = message.generation
        if isinstance(message, Applied):
            # Before the manager takes it in, so that the moment is there once the range is active.
            self.applied_at[node] = time.perf_counter()

    def since(self, moment: float) -> Iterator[str]:
        now = time.perf_counter()
        return (f"{now - at:.3f} s ago {words}" for at, words in self._seen if at >= moment)


class _NodeSessions(NodeSessions):
    """Records the nodes' messages, and lets the bench wait for their effects."""

    record: _Record

    async def on_connected(self, hello: Hello, connection: NodeConnection) -> None:
        self.record.note(f"{hello.node} connected")
        await super().on_connected(hello, connection)
        self.record.changed.set()

    async def on_message(self, node: NodeName, connection: NodeConnection, message: NodeMessage) -> None:
        self.record.note_message(node, message)
        await super().on_message(node, connection, message)
        self.record.changed.set()

    async def on_disconnected(self, node: NodeName, connection: NodeConnection) -> None:
        self.record.note(f"{node} disconnected")
        await super().on_disconnected(node, connection)
        self.record.changed.set()


class _Cpmd(Cpmd):
    """cpmd with a record of what nodes say."""

    node_sessions: _NodeSessions

    def __init__(self, of: settings.Settings) -> None:
        super().__init__(of)
        self.record = _Record()

    def _node_sessions(self, version: str, reports: ReportFollowers) -> NodeSessions:
        self.node_sessions = _NodeSessions(self.decisions, self._connections, version, reports)
        self.node_sessions.record = self.record
        return self.node_sessions

    @property
    def manager(self) -> Manager:
        return self.decisions.manager

    async def decide(self, uuid: DomainUUID, target: int) -> None:
        """Have the manager decide on a size, as the scaling does for a report."""
        await self.decisions.do(lambda manager, now: manager.sizer.resize(uuid, Target(target), now))

    async def pool_add(self, addresses: list[str]) -> int:
        """Add external addresses; return how many there are now."""
        request = PoolRequest(tuple(map(IPv4Address, addresses)))
        await self.operators.answer(operations.ADD_TO_POOL, {"body": request}, ME)
        return len(self.manager.fleet.space.addresses)

    async def wait_for(self, what: str, uuid: DomainUUID, look: Callable[[], _T | None]) -> _T:
        """
        Return what ``look`` returns, called after every message of a node, as soon as it is not None.

        :raise TimedOut: When that takes longer than :data:`TIMEOUT_S`; the message includes :meth:`state`.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + TIMEOUT_S
        while (found := look()) is None:
            if loop.time() >= end:
                raise TimedOut("\n".join([f"not within {TIMEOUT_S:g} s: {what}", *self.state(uuid)]))
            self.record.changed.clear()
            try:
                async with asyncio.timeout_at(end):
                    await self.record.changed.wait()
            except TimeoutError:
                # Look once more: this process itself may have been blocked.
                continue
        return found

    def state(self, uuid: DomainUUID) -> Iterator[str]:
        """Yield a VM's ranges, the generations told and confirmed, and the last messages of the nodes, a line each."""
        for one in self.manager.fleet.of(uuid):
            yield f"range {one.ports} of {one.external}: {one.state.value} on {one.node}"
        yield f"refusal: {_refusal(self, uuid) or 'none'}"
        for name in self.manager.fleet.nodes:
            sync = self.manager.sessions.get(name)
            if sync is None:
                yield f"{name}: no session"
                continue
            settled = "confirmed all of the VM" if sync.is_confirmed(uuid) else "has not confirmed all of the VM"
            yield f"{name}: told generation {sync.generation}, confirmed {sync.applied}, {settled}"
        yield from self.record.since(0.0)


def _words(message: NodeMessage) -> str:
    match message:
        case Applied(_, generation):
            return f"applied {generation}"
        case Rejected(_, generation, code, text):
            return f"rejected {generation} ({code}): {text}"
        case Report(generation):
            return f"report of generation {generation}"
    return type(message).__name__.lower()


async def resize(cpmd: _Cpmd, uuid: DomainUUID) -> dict[str, Any]:
    """
    Have one VM's range grow by a block.

    :return: Milliseconds from the decision to its commit, to the host's confirmation, and to the ledger.
    :raise TimedOut: When the range does not get that far.
    :raise LabError: When the manager decides otherwise.
    """
    before = await cpmd.wait_for("a range that is not being changed", uuid, lambda: _at_rest(cpmd, uuid))
    target = before.ports.size + 64
    begin = time.perf_counter()
    await cpmd.decide(uuid, target)
    decided = time.perf_counter()
    if _at_rest(cpmd, uuid) is not None and _active(cpmd, uuid, target) is None:
        refusal = _refusal(cpmd, uuid) or "no reason given"
        raise LabError("\n".join([f"the manager did not begin the resize: {refusal}", *cpmd.state(uuid)]))
    after = await cpmd.wait_for(f"an active range of {target} ports", uuid, lambda: _active(cpmd, uuid, target))
    recorded = time.perf_counter()
    # The host is told last, so its confirmation completes the resize.
    elapsed_ms = (cpmd.record.applied_at[after.node] - begin) * 1000
    return {
        "ms": elapsed_ms,
        "committed_ms": (decided - begin) * 1000,
        "recorded_ms": (recorded - begin) * 1000,
        "moved": not after.ports.covers(before.ports),
        "said": list(cpmd.record.since(begin)) if elapsed_ms > SLOW_MS else [],
    }


def _refusal(cpmd: _Cpmd, uuid: DomainUUID) -> str:
    reason = cpmd.manager.sizer.of(uuid).refusal
    return refusal_text(reason) if reason is not None else ""


def _at_rest(cpmd: _Cpmd, uuid: DomainUUID) -> Allocation | None:
    """Return the VM's range; None while another one is reserved, for the manager ignores a resize then."""
    if cpmd.manager.fleet.one(uuid, AllocationState.RESERVED) is not None:
        return None
    return cpmd.manager.fleet.one(uuid, AllocationState.ACTIVE)


def _active(cpmd: _Cpmd, uuid: DomainUUID, size: int) -> Allocation | None:
    active = cpmd.manager.fleet.one(uuid, AllocationState.ACTIVE)
    return active if active is not None and active.ports.size >= size else None


async def _serve(cpmd: _Cpmd, name: str, arguments: list[Any]) -> Any:
    if name == "start":
        await cpmd.start()
        return await cpmd.pool_add(arguments[0])
    if name == "resize":
        # By name: UUIDs are random, and in which order ranges grow decides where they end up.
        vms = sorted(cpmd.manager.fleet.vms, key=lambda uuid: cpmd.manager.fleet.vms[uuid].name)
        return [await resize(cpmd, vms[number % len(vms)]) for number in range(arguments[0])]
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
