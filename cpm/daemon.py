"""
cpmd: the composition root of the manager.

One loop owns the :class:`~cpm.core.manager.Manager` and the ledger. It takes all inputs that have come, lets the
manager decide, commits what was decided to the ledger as one transaction, and only then sends messages and answers. It
waits for the disk by itself: nothing could be decided meanwhile, and handing the commit to a thread and back takes as
long as the commit. What comes in until then waits in the sockets and is then committed together.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, TypeVar

from msgspec import UNSET
from prometheus_client import CONTENT_TYPE_LATEST

from cpm import settings as settings_
from cpm.api.server import Channel, Server, tls_context
from cpm.api.views import (
    AddressView,
    DomainDetail,
    DomainView,
    EventView,
    ExplainView,
    NodeView,
    PoolRequest,
    ReportView,
    ResizeRequest,
    StatusView,
    WhoisView,
    WishesRequest,
)
from cpm.core.journal import JournalEntry
from cpm.core.manager import Manager, Outcome
from cpm.ledger import JournalReader, SqliteLedger
from cpm.protocol.errors import LedgerError, NotFound, VirtPortsError
from cpm.protocol.messages import Hello, NodeMessage, Report
from cpm.protocol.model import VM, DomainUUID, ExternalAddress, NodeName, Wishes
from cpm.protocol.wishes import KEYS
from cpm.queries import explain_facts, journal, measurements, metrics, nodes, pool, vms
from cpm.service import clock, notify, program
from cpm.service.tasks import Tasks

log = logging.getLogger(__name__)

_T = TypeVar("_T")

TICK_S = 1.0
"""Seconds between looks at hold-downs and other things that only time brings."""

FOLLOW_BATCH = 1000

REPORTS_WAITING = 256
"""Reports that may wait for somebody who follows them too slowly; beyond that the next ones pass by."""


@dataclasses.dataclass(slots=True)
class _Input:
    act: Callable[[Manager, float], Any]
    answer: asyncio.Future[Any]
    result: Any = None


class Cpmd:
    """
    The service, as :class:`cpm.api.server.Backend` sees it.

    :param settings: Checked settings.
    """

    def __init__(self, settings: settings_.Settings) -> None:
        self._settings = settings
        self._tasks = Tasks()
        self._server = Server(self)
        self._inputs: asyncio.Queue[_Input] = asyncio.Queue()
        self._channels: dict[NodeName, Channel] = {}
        self._committed = asyncio.Event()
        self._followers: set[asyncio.Queue[ReportView]] = set()
        self._reader_thread = ThreadPoolExecutor(1, thread_name_prefix="journal")
        self._started = clock.now()
        self._version = program.version()
        self._ledger: SqliteLedger
        self._reader: JournalReader
        self._manager: Manager

    # Life

    async def start(self) -> None:
        """
        Open the ledger, begin an epoch, listen.

        :raise LedgerError: When the ledger cannot be opened.
        :raise OSError: When a socket cannot be made or a certificate cannot be read.
        """
        self._open()
        self._tasks.start("decide", self._decide_for_ever(), forever=True)
        self._tasks.start("tick", self._tick_for_ever(), forever=True)
        listen = self._settings.listen
        path = Path(listen.socket)
        path.parent.mkdir(parents=True, exist_ok=True)
        await self._server.listen_unix(path)
        if listen.address is not None and listen.certificate and listen.key and listen.ca:
            host, port = settings_.split_address("cpmd.toml", listen.address)
            await self._server.listen_tls(host, port, tls_context(listen.certificate, listen.key, listen.ca))
        if (period := notify.watchdog_period()) is not None:
            self._tasks.start("watchdog", self._watchdog(period), forever=True)
        log.info("epoch %d, %d VMs, listening on %s", self._manager.epoch, len(self._manager.fleet.vms), listen.socket)

    async def wait_failed(self) -> None:
        """Wait until a loop of ours failed."""
        await self._tasks.failed.wait()

    async def stop(self) -> None:
        """Close doors, finish what is under way, close the ledger."""
        for channel in self._channels.values():
            channel.close()
        await self._server.stop()
        await self._tasks.stop()
        self._ledger.close()
        self._reader_thread.shutdown()
        with contextlib.suppress(OSError):
            Path(self._settings.listen.socket).unlink()

    def _open(self) -> None:
        path = Path(self._settings.ledger.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._ledger = SqliteLedger(path)
        self._reader = self._ledger.reader()
        epoch = self._ledger.next_epoch()
        self._manager = Manager(self._ledger.load(), self._settings.rules(), epoch, clock.now())

    async def _read(self, work: Callable[..., _T], *arguments: Any) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._reader_thread, work, *arguments)

    # The loop

    async def _do(self, act: Callable[[Manager, float], _T]) -> _T:
        """Let the manager do something; return its result once all that follows from it is durable."""
        answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._inputs.put_nowait(_Input(act, answer))
        return await answer

    async def _decide_for_ever(self) -> None:
        while True:
            batch = [await self._inputs.get()]
            while not self._inputs.empty():
                batch.append(self._inputs.get_nowait())
            self._decide(batch)

    def _decide(self, batch: list[_Input]) -> None:
        now = clock.now()
        try:
            for item in batch:
                self._let(item, now)
            outcome = self._manager.take(now)
            if outcome.changes:
                self._ledger.commit(outcome.changes, now)
        except Exception as error:
            # What the manager believes and what is durable may differ now: start again from what is durable.
            log.exception("cannot commit; starting over from the ledger")
            self._start_over()
            refusal = error if isinstance(error, VirtPortsError) else LedgerError(f"the change was not made: {error}")
            for item in batch:
                _fail(item, refusal)
            return
        self._send(outcome)
        for item in batch:
            if not item.answer.done():
                item.answer.set_result(item.result)
        if outcome.changes:
            # Everybody who waits gets this one; whoever waits from now on, the next.
            self._committed.set()
            self._committed = asyncio.Event()

    def _let(self, item: _Input, now: float) -> None:
        try:
            item.result = item.act(self._manager, now)
        except VirtPortsError as error:
            # Refused before anything was recorded.
            _fail(item, error)

    def _start_over(self) -> None:
        self._manager = Manager(self._ledger.load(), self._settings.rules(), self._manager.epoch, clock.now())
        for channel in self._channels.values():
            channel.close()
        self._channels.clear()

    def _send(self, outcome: Outcome) -> None:
        for name, message in outcome.messages:
            if (channel := self._channels.get(name)) is not None:
                channel.send(message)

    async def _tick_for_ever(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self._do(Manager.tick)
            except VirtPortsError:
                # One thing that could not be done must not keep the next tick from the others.
                log.exception("part of a tick was not done")

    async def _watchdog(self, period_s: float) -> None:
        while True:
            # Through the loop: a loop that hangs must not look alive.
            await self._do(lambda manager, now: None)
            notify.notify("WATCHDOG=1")
            await asyncio.sleep(period_s)

    # Nodes

    async def opened(self, hello: Hello, channel: Channel) -> None:
        """Take a node's session in; a former one of the same node is over."""

        def act(manager: Manager, now: float) -> None:
            manager.hello(hello, self._version, now)
            if (former := self._channels.get(hello.node)) is not None:
                former.close()
            self._channels[hello.node] = channel

        await self._do(act)
        log.info("node %s connected (%s)", hello.node, ", ".join(sorted(hello.roles)))

    async def heard(self, node: NodeName, channel: Channel, message: NodeMessage) -> None:
        """Take in what a node said, unless its session was replaced meanwhile."""

        def act(manager: Manager, now: float) -> None:
            if self._channels.get(node) is channel:
                manager.said(node, message, now)
                if isinstance(message, Report) and self._followers:
                    self._pass_on(measurements.report(manager, node, message, now))

        await self._do(act)

    async def closed(self, node: NodeName, channel: Channel) -> None:
        """Take note that a session is over, unless it was replaced meanwhile."""

        def act(manager: Manager, now: float) -> None:
            if self._channels.get(node) is channel:
                del self._channels[node]
                manager.lost(node, now)

        await self._do(act)
        log.info("node %s disconnected", node)

    # Operators

    async def domains(self, *, everything: bool) -> Sequence[DomainView]:
        """Return the VMs."""
        return vms.summaries(self._manager, everything=everything)

    async def domain(self, name: str) -> DomainDetail:
        """Return one VM."""
        return vms.detail(self._manager, name)

    async def set_wishes(self, name: str, request: WishesRequest) -> DomainDetail:
        """Take in what the operator wishes for a VM."""
        return await self._change(
            name, lambda manager, vm, now: manager.set_wishes(vm.uuid, _wished(vm.operator_wishes, request))
        )

    async def resize(self, name: str, request: ResizeRequest) -> DomainDetail:
        """Give a VM's range another size now."""
        return await self._change(name, lambda manager, vm, now: manager.sizer.resize_to(vm.uuid, request.ports, now))

    async def relocate(self, name: str) -> DomainDetail:
        """Give a VM other ports."""
        return await self._change(name, lambda manager, vm, now: manager.sizer.relocate(vm.uuid, now))

    async def _change(self, name: str, change: Callable[[Manager, VM, float], None]) -> DomainDetail:
        """Let the manager change something about a VM; return the VM once what was decided is durable."""

        def act(manager: Manager, now: float) -> DomainUUID:
            vm = vms.find(manager, name)
            change(manager, vm, now)
            return vm.uuid

        return vms.detail(self._manager, await self._do(act))

    async def explain(self, name: str) -> ExplainView:
        """Return why a VM has the ports it has."""
        return explain_facts.explanation(self._manager, name, clock.now())

    async def history(self, name: str, limit: int) -> Sequence[EventView]:
        """Return what a VM held, oldest first; VMs that are gone included."""
        entries: list[JournalEntry] = await self._read(self._reader.history, name, limit)
        if not entries:
            raise NotFound("VM", name, "no VM of that name or UUID ever had ports; see `virt-ports list --all`")
        return journal.events(entries)

    async def whois(self, address: IPv4Address, port: int, at: float | None) -> WhoisView:
        """Return who held a port."""
        moment = at if at is not None else clock.now()
        held = await self._read(self._reader.whois, address, port, moment)
        if held is None:
            raise NotFound(
                "holder of", f"{address} port {port}", "nobody held that port then; see `virt-ports pool list`"
            )
        return journal.whois(held, port, moment)

    async def pool(self) -> Sequence[AddressView]:
        """Return the external addresses."""
        return pool.addresses(self._manager)

    async def pool_add(self, request: PoolRequest) -> Sequence[AddressView]:
        """Add external addresses."""
        addresses = [ExternalAddress(address, request.reserved) for address in request.addresses]
        await self._do(lambda manager, now: manager.add_addresses(addresses, now))
        return pool.addresses(self._manager)

    async def pool_remove(self, address: IPv4Address) -> Sequence[AddressView]:
        """Take an external address out."""
        await self._do(lambda manager, now: manager.remove_address(address))
        return pool.addresses(self._manager)

    async def nodes(self) -> Sequence[NodeView]:
        """Return the nodes."""
        return nodes.nodes(self._manager)

    async def fence(self, name: str, *, fenced: bool) -> NodeView:
        """Fence a node or take that back."""
        await self._do(lambda manager, now: manager.fence(NodeName(name), now, fenced=fenced))
        return nodes.node(self._manager, self._manager.fleet.nodes[NodeName(name)])

    async def events(self, after: int | None, limit: int, *, follow: bool) -> AsyncIterator[EventView]:
        """Yield the journal: the newest ``limit`` entries or those after a position, then, to follow, each new one."""
        position = after if after is not None else max(0, await self._read(self._reader.latest_seq) - limit)
        sent = 0
        while True:
            news = self._committed
            wanted = FOLLOW_BATCH if follow else min(FOLLOW_BATCH, limit - sent)
            entries = await self._read(self._reader.events, position, wanted) if wanted > 0 else []
            if not entries and not follow:
                return
            if not entries:
                await news.wait()
            for event in journal.events(entries):
                yield event
                position, sent = event.seq, sent + 1

    async def measurements(self) -> AsyncIterator[ReportView]:
        """Yield what the hosts report from now on."""
        mine: asyncio.Queue[ReportView] = asyncio.Queue(REPORTS_WAITING)
        self._followers.add(mine)
        try:
            while True:
                yield await mine.get()
        finally:
            self._followers.discard(mine)

    def _pass_on(self, report: ReportView) -> None:
        for follower in self._followers:
            with contextlib.suppress(asyncio.QueueFull):
                follower.put_nowait(report)

    async def status(self) -> StatusView:
        """Return how the manager is."""
        manager = self._manager
        return StatusView(
            self._version,
            manager.epoch,
            self._started,
            len(manager.present),
            len(manager.fleet.nodes),
            len(manager.sessions),
            self._settings.ledger.path,
            self._settings.timeouts(),
        )

    async def metrics(self) -> tuple[bytes, str]:
        """Return the Prometheus exposition."""
        return metrics.exposition(self._manager), CONTENT_TYPE_LATEST


def _fail(item: _Input, error: VirtPortsError) -> None:
    if not item.answer.done():
        item.answer.set_exception(error)


def _wished(before: Wishes, request: WishesRequest) -> Wishes:
    """Return what the operator wishes after a request."""
    changes = {name: value for name in KEYS.values() if (value := getattr(request, name)) is not UNSET}
    return dataclasses.replace(before, **changes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Start cpmd; the command line of the service."""
    parser = argparse.ArgumentParser(
        prog="cpmd",
        description="Centralized Port Manager of virt-ports: keeps the ledger and tells hosts and edges what to hold.",
        epilog="The external addresses are not configured here: add them with `virt-ports pool add`.",
    )
    return program.run(parser, settings_.DEFAULT_PATH, settings_.load, Cpmd, arguments)


if __name__ == "__main__":
    sys.exit(main())
