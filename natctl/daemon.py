"""
natd: the composition root of a node.

Passes events (hooks, the session with the manager, interfaces that come and go, libvirt's events, time) to
:class:`~natctl.core.node.Node`, and carries out its commands. Kernel commands are carried out one after the other
by one task; nothing here decides.

Tested in ``tests/e2e/test_real_vm.py``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import logging
import random  # noqa: TID251 - only to keep a crowd of nodes apart in time
import sys
import uuid
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path

from cpm.api import session as manager_session
from cpm.api.scraping import Scraping
from cpm.protocol.errors import ConfigError, KernelError, VirtPortsError
from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import ManagerMessage, Need, Welcome
from cpm.protocol.model import DomainUUID, NodeName, Role
from cpm.service import certificates, clock, notify, program
from cpm.service.metrics import natd as declared
from cpm.service.tasks import Tasks
from natctl import guest_agents, machine_identity, metrics
from natctl import settings as settings_
from natctl.arrivals.count_share import CountShare
from natctl.core.deletions import Deletions
from natctl.core.identity import Identity
from natctl.core.node import Node
from natctl.domain_watch import DomainWatch
from natctl.guest_requests import GuestRequests
from natctl.hook_server import HookServer
from natctl.kernel import guest_addresses, reacting, settings_before, sysctl
from natctl.kernel.kernel import Kernel
from natctl.kernel.port_reader import PortReader
from natctl.kernel.settings_before import SettingsBefore
from natctl.kernel_events import COUNTERS, KernelEvents
from natctl.model.commands import (
    Answer,
    Command,
    CountPorts,
    Forget,
    Program,
    Prune,
    RefuseNew,
    Release,
    Remember,
    Replace,
    Send,
    Warn,
)
from natctl.model.guest_claims import Claims
from natctl.model.port_use import PortUse
from natctl.model.remembered import Remembered
from natctl.netlink.conntrack import Conntrack
from natctl.netlink.neighbours import watch_neighbours
from natctl.remembering import RememberedFiles
from natctl.ruleset.marks import Marks
from qga_agent import announcement
from qga_agent.libvirt_stats import LibvirtMonitor
from qga_agent.samples import Sampler
from qga_agent.tap_stats import Source, TapReader

log = logging.getLogger(__name__)

TICK_S = 0.5
TELL_S = 0.05
"""Seconds from a message of the manager until guests are told: many VMs may change at once."""
FOLLOW_S = 10.0
"""Seconds between two looks at the neighbour table without a reported change; see
:data:`natctl.ruleset.senders.FOLLOWED_S`."""
GUESTS_S = 1.0
"""Seconds between two looks for the addresses of guests to which something is to be let in."""
LEASES_S = 5.0
"""Seconds between two readings of libvirt's leases for them."""
FIRST_LIST_S = 3.0
"""Seconds that libvirt has at start to list its domains before the manager is told which VMs run here."""


class Natd:
    """
    The service; also the listener of the session with the manager.

    :param settings: Checked settings.
    :param file: Where they come from.
    """

    def __init__(self, settings: settings_.Settings, file: Path = settings_.DEFAULT_PATH) -> None:
        self._settings = settings
        self._file = file
        kernel = settings.kernel()
        self._host = settings.host if Role.HOST in settings.roles else None
        marks = Marks.of_mask(kernel.host.mark_mask) if kernel.host is not None else None
        identity = Identity(
            NodeName(settings.node_name),
            settings.roles,
            settings.underlay_address,
            program.version(),
            machine=machine_identity.of_this_machine(),
            instance=uuid.uuid4().hex,
            ended_timeout_s=kernel.host.timeouts.ended_s if kernel.host is not None else None,
        )
        has_libvirt = self._host is not None and bool(self._host.libvirt)
        self._remembered = RememberedFiles(Path(settings.state))
        highest = marks.highest_index if marks is not None else 0
        self._node = Node(identity, highest, has_libvirt=has_libvirt, remembered=self._remembered.read())
        self._kernel = Kernel(kernel, SettingsBefore(Path(settings.listen.socket).parent / settings_before.FILE))
        self._conntrack = Conntrack(marks.flag) if marks is not None else None
        self._older_log_group = kernel.host.older_log_group if kernel.host is not None else 0
        self._port_control_log_group = kernel.host.port_control_log_group if kernel.host is not None else 0
        self._port_reader = PortReader(kernel.edge, marks.flag if marks else 0) if kernel.edge is not None else None
        self._port_fault = ""
        self._metrics = metrics.Metrics()
        self._scraping = Scraping("natd.toml", settings.metrics, self._metrics_now)
        self._kernel_events: KernelEvents | None = None
        self._guest_requests: GuestRequests | None = None
        if marks is not None and self._conntrack is not None:
            on_error = self._metrics.on_kernel_error
            self._kernel_events = KernelEvents(self._node, self._carry_out, marks, self._conntrack, on_error)
            self._guest_requests = GuestRequests(self._node.port_control, self._carry_out, marks, on_error)
        self._sampler = Sampler()
        manager = settings.manager
        to_manager = manager_session.live_context(manager.certificate, manager.key, manager.ca)
        context = (lambda: to_manager.context) if to_manager is not None else None
        self._session = manager_session.Session(manager.url, self, context, random.random)
        self._certificates = [each for each in (to_manager, self._scraping.tls) if each is not None]
        libvirt = self._host.libvirt if self._host is not None else None
        self._libvirt = LibvirtMonitor(libvirt) if libvirt else None
        source = Source(settings.monitor.source)
        self._taps = TapReader(source, self._libvirt.statistics if self._libvirt is not None else None)
        self._visitor = guest_agents.visitor(settings, self._libvirt) if self._host is not None else None
        self._watch: DomainWatch | None = None
        self._hooks: HookServer | None = None
        if self._host is not None:
            self._watch = DomainWatch(
                self._node, self._carry_out, self._answer, self._host, settings.guests, self._libvirt, self._visitor
            )
            self._hooks = HookServer(Path(settings.listen.socket), self._watch.on_hook, self._metrics.on_hook_answered)
        self._leases: dict[DomainUUID, tuple[IPv4Address, ...]] = {}
        self._is_telling_guests = False
        self._is_finding_guests = False
        self._is_carrying_out_soon = False
        self._count_share = CountShare()
        self._deletions = Deletions()
        self._kernel_work: asyncio.Queue[Program | Replace | Forget | Prune | RefuseNew] = asyncio.Queue()
        self._dropped: dict[str, int] = {}
        self._kernel_warnings: tuple[str, ...] = ()
        self._said_reason = ""
        """Why there is no session, as logged."""
        self._tasks = Tasks()

    # Life

    async def start(self) -> None:
        """
        Read what the kernel holds, listen for hooks, begin to serve. The kernel keeps it until the first snapshot.

        :raise KernelError: When the kernel cannot be read.
        :raise OSError: When the socket cannot be made.
        """
        found = await self._kernel.observe()
        self._dropped |= found.drops
        links = self._watch.links() if self._watch is not None else {}
        self._node.on_kernel_found(found.host.values(), found.path, links, clock.now(), found.edge.values())
        start = self._tasks.start
        start("kernel", self._serve_kernel(), forever=True)
        start("neighbours", self._watch_neighbours(), forever=True)
        if self._settings.edge is not None and Role.EDGE in self._settings.roles:
            start("senders", self._every(FOLLOW_S, self._kernel.follow_neighbours), forever=True)
        if self._host is not None and self._watch is not None and self._hooks is not None:
            await self._hooks.start()
            start("links", self._watch.watch_links(), forever=True)
            monitor = self._settings.monitor
            if self._kernel_events is not None:
                if monitor.arrivals:
                    budgets = self._kernel_events.watch_budgets(self._host.log_group, monitor.period_s)
                    start("budgets", budgets, forever=True)
                    start("deferred", self._kernel_events.watch_deferred(self._host.queue), forever=True)
                start("older", self._kernel_events.watch_older(self._older_log_group), forever=True)
                for number in range(COUNTERS):
                    start(f"counting {number}", self._kernel_events.serve_counting(), forever=True)
            if self._guest_requests is not None and self._conntrack is not None:
                asked = self._guest_requests.watch(self._port_control_log_group)
                start("guest requests", asked, forever=True)
                start("peers", self._guest_requests.serve_peers(self._conntrack), forever=True)
            start("guest addresses", self._every(GUESTS_S, self._find_guests), forever=True)
            start("measure", self._every(monitor.period_s, self._measure), forever=True)
        if self._libvirt is not None and self._watch is not None:
            start("libvirt", self._libvirt.run(), forever=True)
            start("libvirt events", self._watch.serve_events(self._libvirt), forever=True)
            start("libvirt leases", self._every(LEASES_S, self._read_leases), forever=True)
            start("libvirt list", self._watch.serve_lists(self._libvirt), forever=True)
        if self._visitor is not None:
            start("guests", self._visitor.run(), forever=True)
        start("ensure", self._every(self._settings.monitor.ensure_s, self._ensure), forever=True)
        start("changes", reacting.serve(self._kernel, self._on_looked, self._metrics.on_kernel_error), forever=True)
        start("tick", self._every(TICK_S, self._tick), forever=True)
        if self._port_reader is not None:
            # The manager must know them before it gives ports to the first VM.
            await self._try(self._read_own_ports)
            start("own ports", self._every(self._settings.monitor.ensure_s, self._read_own_ports), forever=True)
        start("session", self._serve_session(), forever=True)
        start("metrics", self._scraping.run(), forever=True)
        if self._certificates:
            start("certificates", certificates.follow(self._certificates), forever=True)
        if (period := notify.watchdog_period()) is not None:
            start("watchdog", self._watchdog(period), forever=True)
        log.info(
            "%s (%s), %d VMs found in the kernel", self._settings.node_name, _roles(self._settings), len(found.host)
        )

    async def wait_failed(self) -> None:
        """Wait until one of the loops has failed."""
        await self._tasks.failed.wait()

    def on_hangup(self) -> None:
        """Follow certificates, and say that other settings need a restart."""
        for each in self._certificates:
            each.refresh()
        try:
            is_changed = settings_.load(self._file) != self._settings
        except ConfigError as error:
            log.error("the settings stay as they were: %s", error)
            return
        if is_changed:
            log.warning("%s has changed; restart natd to follow it: no traffic is disturbed", self._file)

    async def stop(self) -> None:
        """Stop serving. The kernel goes on with what it holds."""
        if self._hooks is not None:
            await self._hooks.stop()
        await self._tasks.stop()
        if self._watch is not None:
            self._watch.close()
        await self._kernel.close()
        self._remembered.close()

    # The commands of the node

    def _carry_out(self) -> None:
        self._is_carrying_out_soon = False
        for command in self._node.take():
            self._carry_out_one(command)
        if self._guest_requests is not None:
            self._guest_requests.send(self._node.port_control.take())

    def _carry_out_one(self, command: Command) -> None:
        match command:
            case Send(message):
                if isinstance(message, Need):
                    log.debug("%s", message)
                    self._node.signal_times.on_asked(message.domain, message.ports, clock.now())
                self._session.send(message)
            case Answer(request, code, text):
                self._answer(request, code, text)
            case Warn(text):
                log.warning("%s", text)
            case Remember(now, before):
                self._remember(now, before)
            case Release(packets):
                if self._kernel_events is not None:
                    self._kernel_events.release(packets)
            case CountPorts():
                if self._kernel_events is not None:
                    self._kernel_events.count(command)
            case Program() | Replace() | Forget() | Prune() | RefuseNew():
                self._kernel_work.put_nowait(command)

    def _remember(self, now: Remembered, before: Remembered) -> None:
        try:
            self._remembered.write(now, is_durable=now.has_durable_change(before))
        except OSError as error:
            text = "an old ledger is not noticed after a restart of natd: cannot write to %s: %s"
            log.warning(text, self._settings.state, error.strerror)

    def _answer(self, request: int, code: str, text: str) -> None:
        if self._hooks is not None:
            self._hooks.answer(request, code, text)

    async def _serve_kernel(self) -> None:
        while True:
            if (wait_s := self._deletions.wait_s(clock.now())) == 0:
                await self._try(partial(self._delete_connections, self._deletions.take(clock.now())))
                continue
            try:
                async with asyncio.timeout(wait_s):
                    command = await self._kernel_work.get()
            except TimeoutError:
                await self._try(partial(self._delete_connections, self._deletions.take(clock.now())))
                continue
            if isinstance(command, (Forget, Prune)):
                self._deletions.put(command, clock.now())
                continue
            # What was said before goes out first: the kernel's answer is waited for without doing anything else.
            await asyncio.sleep(0)
            if isinstance(command, RefuseNew):
                await self._try(partial(self._kernel.refuse_connections, command.where, command.for_s))
                continue
            try:
                await self._program(command)
            except KernelError as error:
                self._node.on_kernel_refused(error, clock.now())
            else:
                self._node.on_kernel_programmed(clock.now())
            self._carry_out()

    async def _program(self, command: Program | Replace) -> None:
        if isinstance(command, Program):
            with self._metrics.programming("some"):
                await self._kernel.change(command.change)
            return
        with self._metrics.programming("all"):
            differences = await self._kernel.replace(command.host, command.edge, command.path)
        for difference in differences:
            log.info("brought in step: %s", difference)
        self._log_kernel_warnings()

    def _log_kernel_warnings(self) -> None:
        """Log what changed of what the operator should know about this machine."""
        before, now = self._kernel_warnings, self._kernel.warnings
        self._kernel_warnings = now
        for text in now:
            if text not in before:
                log.warning("%s", text)
        if before and not now:
            log.info("no longer so: %s", "; ".join(before))

    async def _watch_neighbours(self) -> None:
        """Follow hardware addresses: of hosts, which tell who may send for a VM, and of gateways."""
        async with contextlib.aclosing(watch_neighbours()) as changes:
            async for addresses in changes:
                await self._try(partial(self._kernel.follow_neighbours, addresses))

    async def _delete_connections(self, command: Forget | Prune) -> None:
        held = self._node.held_ports(command.internal)
        if self._conntrack is None or (isinstance(command, Prune) and not held):
            return
        if held:
            gone = await self._conntrack.delete_other_connections(command.internal, held)
        else:
            gone = await self._conntrack.delete_connections(command.internal)
        log.debug("deleted %d connections of %s", gone, command.internal)
        await self._kernel.forget_mappings(command.internal, held)

    # The manager

    async def _serve_session(self) -> None:
        if self._libvirt is not None and self._watch is not None:
            # Until then we cannot say which VMs are gone.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._watch.has_listed.wait(), FIRST_LIST_S)
        await self._session.run()

    def on_connected(self) -> None:
        """Say hello."""
        self._node.on_connected(clock.now())
        self._carry_out()

    def on_message(self, message: ManagerMessage) -> None:
        """
        Follow a message of the manager.

        :raise VirtPortsError: When it is not from the present manager.
        """
        if isinstance(message, Welcome):
            log.info("connected to %s", self._settings.manager.url)
            self._said_reason = ""
        self._node.on_message(message, clock.now())
        if not self._is_carrying_out_soon:
            # What has come meanwhile is read first, and is one transaction with it: an edge that is behind would drop
            # packets between a port's removal and its new mapping.
            self._is_carrying_out_soon = True
            asyncio.get_running_loop().call_soon(self._carry_out)
        if self._node.has_guests_to_find and not self._is_finding_guests:
            # Nothing is let in to a VM before it has been looked for.
            self._is_finding_guests = True
            self._tasks.start("new guests", self._find_new_guests())
        if self._visitor is not None and not self._is_telling_guests:
            self._is_telling_guests = True
            asyncio.get_running_loop().call_later(TELL_S, self._tell_guests)

    def on_disconnected(self, reason: str) -> None:
        """The session is gone, or there is still none; everything that runs goes on."""
        if reason != self._said_reason:
            self._said_reason = reason
            log.warning("no session with %s, trying again: %s", self._settings.manager.url, reason)
        self._node.on_disconnected(clock.now())
        self._carry_out()

    # Guests

    def _tell_guests(self) -> None:
        self._is_telling_guests = False
        if self._visitor is None:
            return
        guests = self._node.guests()
        without = {uuid for uuid in guests if self._watch is not None and not self._watch.has_agent_channel(uuid)}
        self._visitor.on_vms({uuid: self._announcement(uuid, vm) for uuid, vm in guests.items()}, without)

    def _announcement(self, uuid: DomainUUID, vm: HostIntent | None) -> announcement.Announcement | None:
        if vm is None or vm.ports is None or vm.external is None:
            return None
        wish = self._watch is not None and self._watch.wants_local_port_range(uuid)
        return announcement.Announcement(vm.external, vm.ports, wish)

    # Time

    async def _every(self, period_s: float, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            await asyncio.sleep(period_s)
            await self._try(work)

    async def _try(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except (VirtPortsError, TimeoutError) as error:
            if isinstance(error, KernelError):
                self._metrics.on_kernel_error(error)
            log.warning("%s", str(error) or type(error).__name__)

    async def _tick(self) -> None:
        self._node.on_tick(clock.now())
        self._carry_out()
        self._tell_guests()

    def _on_looked(self, mended: Sequence[str]) -> None:
        self._metrics.repairs += len(mended)
        for difference in mended:
            log.warning("mended: %s", difference)
        self._log_kernel_warnings()

    async def _ensure(self) -> None:
        self._on_looked(await self._kernel.ensure())
        self._dropped |= await self._kernel.drops()
        if self._host is not None:
            self._node.send_presence()
        else:
            in_force, warnings, period_s = self._node.in_force, self._kernel.warnings, self._settings.monitor.ensure_s
            at = self._kernel.fast_path
            self._node.reports.send(period_s, {}, None, in_force, self._dropped, warnings=warnings, fast_path=at)
        self._carry_out()

    async def _read_own_ports(self) -> None:
        if self._port_reader is None:
            return
        read = await self._port_reader.read(clock.now())
        if read.fault and read.fault != self._port_fault:
            log.warning("not all ports that this machine uses are known: %s", read.fault)
        self._port_fault = read.fault
        self._node.on_own_ports(read, clock.now())
        self._carry_out()

    async def _find_guests(self) -> None:
        """Find the addresses of guests with forwards."""
        if not (wanted := self._node.guests_to_find()):
            return
        reached = await guest_addresses.read(wanted)
        told = self._visitor.addresses() if self._visitor is not None else {}
        self._node.on_guest_addresses(
            {uuid: Claims(reach, self._leases.get(uuid, ()), told.get(uuid, ())) for uuid, reach in reached.items()}
        )
        self._carry_out()

    async def _find_new_guests(self) -> None:
        self._is_finding_guests = False
        await self._try(self._find_guests)

    async def _read_leases(self) -> None:
        """Read which addresses libvirt has leased to guests."""
        if self._libvirt is None or not (wanted := self._node.guests_to_find()):
            return
        self._leases = await self._libvirt.leases(wanted)

    async def _measure(self) -> None:
        taps = self._node.taps()
        in_force = self._node.in_force
        every = frozenset().union(*taps.values())
        counters = await self._taps.read(every, len(taps))
        rates = self._sampler.sample(asyncio.get_running_loop().time(), counters, taps)
        counted = await self._kernel.counters()
        use = await self._count_all()
        guests = self._visitor.views() if self._visitor is not None else {}
        period_s, warnings = self._settings.monitor.period_s, (*self._kernel.warnings, *self._node.warnings)
        problems, arrivals = self._kernel.way_problems, self._node.arrival_events
        told = self._dropped, guests, counted, warnings, problems, self._kernel.fast_path
        self._node.reports.send(period_s, rates, use, in_force, *told)
        if use is None:
            arrivals.on_arrivals_read(counted.connections, in_force, clock.now())
        else:
            self._metrics.connections = sum(vm.total for vm in use.vms.values())
            arrivals.on_connections_counted(use, counted, sysctl.connection_table_size())
            after = await self._kernel.counters()
            arrivals.on_periodic_count(use, after.connections, in_force, clock.now(), counted.connections)
        self._carry_out()

    async def _count_all(self) -> PortUse | None:
        """Count the ports of all VMs; None: counting has cost too much lately."""
        if self._conntrack is None or not self._count_share.is_due(clock.now()):
            return None
        use, took_s = await self._conntrack.ports_of_all()
        self._count_share.on_counted(took_s, clock.now())
        if self._node.has_leaving_mappings:
            use = dataclasses.replace(use, mapped=await self._kernel.mapped_ports())
        return use

    def _metrics_now(self) -> Iterator[str]:
        yield from self._metrics.pieces(metrics.read(self._settings.node_name, self._node, self._kernel, self._dropped))
        yield declared.CERTIFICATE.text(certificates.ends(self._certificates))

    async def _watchdog(self, period_s: float) -> None:
        while True:
            notify.notify("WATCHDOG=1")
            await asyncio.sleep(period_s)


def _roles(settings: settings_.Settings) -> str:
    return ", ".join(sorted(settings.roles))


def main(arguments: Sequence[str] | None = None) -> int:
    """Start natd; the command line of the service."""
    parser = argparse.ArgumentParser(
        prog="natd", description="NAT component of virt-ports: programs this node's kernel and measures its VMs."
    )
    return program.run(parser, settings_.DEFAULT_PATH, settings_.load, Natd, arguments)


if __name__ == "__main__":
    sys.exit(main())
