"""
What a node decides: the pure half of natd.

:class:`Node` is told what happened (a hook called, the manager said something, a tap vanished, the kernel took a
transaction) and puts commands in an outbox; ``natctl.daemon`` carries them out and tells how it went. It never awaits,
logs or reads a clock, so a whole fleet of these can be driven in virtual time.

What it knows, and where from:

- *domains* that run here (:mod:`natctl.core.domains`): from hooks, libvirt's list, and at start from what the kernel
  already holds;
- the manager's wishes for this host and edge (:mod:`natctl.core.intent`): from its snapshot and deltas;
- what the kernel holds (:mod:`natctl.core.programming`): from the answers to its own commands;
- hooks that wait for ports (:mod:`natctl.core.hook_waiters`): from their requests;
- connections that begin (:mod:`natctl.arrivals.controller`): from what the kernel says of them, and from counts.

Desired entries are computed from all but the third and fourth whenever something changed; at most one kernel command is
under way, and what changes meanwhile goes into the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Address

from cpm.protocol.errors import VirtPortsError
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Attach,
    Declined,
    Delta,
    Detach,
    GuestView,
    Hello,
    HostVM,
    ManagerMessage,
    NodeMessage,
    Present,
    Refused,
    Rejected,
    Snapshot,
)
from cpm.protocol.model import DomainUUID, NodeName, Role
from natctl.arrivals.controller import Arrivals
from natctl.core.domains import Domain, Domains, Running
from natctl.core.hook_waiters import Waiter, Waiting
from natctl.core.intent import Intent
from natctl.core.programming import Programming, Work, is_empty
from natctl.core.reports import NO_GUESTS, Reports
from natctl.model.commands import (
    Answer,
    Arm,
    ArrivalCommand,
    Command,
    CountPorts,
    Forget,
    Program,
    Release,
    Send,
    Warn,
)
from natctl.model.entries import Destination, HostEntry, Path
from natctl.model.port_use import Filling, PortUse
from natctl.ruleset.readback import NOTHING_COUNTED, Counted
from qga_agent.samples import Rates


class StaleEpoch(VirtPortsError):
    """
    A manager speaks that is not the present one.

    :param said: Its epoch.
    :param seen: The highest this node has seen.
    """

    code = "stale-epoch"

    def __init__(self, said: int, seen: int) -> None:
        super().__init__(said, seen)
        self.said = said
        self.seen = seen

    def __str__(self) -> str:
        return f"a manager of epoch {self.said} speaks, epoch {self.seen} was seen; stop the older cpmd"


@dataclasses.dataclass(frozen=True, slots=True)
class Identity:
    """Who this node is."""

    name: NodeName
    roles: frozenset[Role]
    underlay: IPv4Address
    version: str


class Node:
    """
    One node; every method is told the time and fills the outbox, see :meth:`take`.

    :param identity: Who we are.
    :param marks: How many VMs the mark can tell apart on this host.
    """

    def __init__(self, identity: Identity, marks: int) -> None:
        self._identity = identity
        self._domains = Domains()
        self._ended: dict[DomainUUID, IPv4Address] = {}
        self._detached: set[DomainUUID] = set()
        self._intent = Intent()
        self._arrivals = Arrivals()
        self._reports = Reports()
        self._programming = Programming(marks, self._intent, self._domains, self._arrivals)
        self._waiting = Waiting()
        self._connected = False
        self._synced = False
        self._epoch = 0
        self._generation = 0
        self._outbox: list[Command] = []

    # What others ask

    @property
    def applied_generation(self) -> int:
        """The last generation the kernel holds, 0 before the first."""
        return self._programming.generation

    @property
    def epoch(self) -> int:
        """Highest epoch seen."""
        return self._epoch

    def taps(self) -> dict[DomainUUID, frozenset[str]]:
        """Return the interfaces of each VM that runs here."""
        return self._domains.taps()

    def guests(self) -> dict[DomainUUID, HostVM | None]:
        """Return the VMs that run here, each with what it shall have; None: nothing is known yet."""
        return {uuid: self._intent.host.get(uuid) for uuid in self._domains.guests()}

    def take(self) -> list[Command]:
        """Return what is to be done now, in order, and empty the outbox."""
        self._advance()
        commands, self._outbox = self._outbox, []
        return commands

    # The kernel, as found and as told

    def adopt(self, entries: Iterable[HostEntry], path: Path | None, links: frozenset[str], now: float) -> None:
        """
        Start from what the kernel already holds: VMs whose interfaces exist go on running.

        Their marks are kept, so that nothing they send is interrupted by a restart of natd.
        """
        if path is not None:
            self._intent.found_path(path)
        for entry in entries:
            self._programming.found(entry)
            self._intent.found(entry)
            self._arrivals.on_found(entry, now)
            taps = entry.taps & links
            if taps:
                self._domains.found(entry.domain, entry.name, taps)

    def programmed(self, now: float) -> None:
        """Take note: the last kernel command is in force."""
        if (done := self._programming.done()) is None:
            return
        work, in_force = done
        if work.generation is not None:
            # Before anything that is said about the ports that are in force now.
            self._say(Applied(self._epoch, work.generation))
        for entry in in_force:
            self._do(self._arrivals.on_programmed(entry, now))
        for uuid in work.host & set(self._ended):
            internal = self._ended.pop(uuid)
            if uuid not in self._domains:
                self._outbox.append(Forget(internal))
        self._answer_ready()

    def refused_by_kernel(self, error: VirtPortsError, now: float) -> None:
        """Take note: the last kernel command is not in force; nothing of it is."""
        if (work := self._programming.refused(now)) is None:
            return
        self._outbox.append(Warn(f"{error}"))
        if work.generation is not None:
            # The manager must not believe it; it answers with a new snapshot.
            self._say(Rejected(self._epoch, work.generation, error.code, str(error)))
        self._outbox += self._waiting.answer(error.code, str(error), None if work.replace else work.host)

    # The manager

    def connected(self, now: float) -> None:
        """Take note: there is a session."""
        self._connected = True
        self._synced = False
        self._arrivals.on_connected()
        domains = tuple(self._domains.presences())
        self._outbox.append(
            Send(
                Hello(
                    PROTOCOL,
                    self._identity.name,
                    self._identity.roles,
                    self._identity.underlay,
                    self._identity.version,
                    self._epoch,
                    domains,
                )
            )
        )
        for uuid, domain in self._domains.incoming():
            self._say(Attach(uuid, domain.name, incoming=True, wishes=domain.wishes))

    def disconnected(self, now: float) -> None:
        """Take note: the session is gone. Everything that runs goes on; those who wait are told."""
        self._do(self._arrivals.on_disconnected(now))
        self._connected = False
        self._synced = False
        # Generations count within a session: the next one must not be told of these.
        self._programming.leave_out_generations()
        text = "the manager is not connected; the VM gets its ports when it is back"
        self._outbox += self._waiting.answer("unreachable", text)

    def received(self, message: ManagerMessage, now: float) -> None:
        """
        Take in what the manager said.

        :raise StaleEpoch: When an older manager speaks; the session is to be closed.
        """
        if message.epoch < self._epoch:
            raise StaleEpoch(message.epoch, self._epoch)
        self._epoch = message.epoch
        if isinstance(message, Snapshot):
            self._take_snapshot(message, now)
        elif isinstance(message, Delta):
            self._take_delta(message, now)
        elif isinstance(message, Refused):
            self._take_refusal(message, now)
        elif isinstance(message, Declined):
            self._do(self._arrivals.on_turned_down(message.domain, now, message.ports))
        elif message.protocol != PROTOCOL:
            self._outbox.append(
                Warn(f"the manager speaks protocol {message.protocol}, we {PROTOCOL}; upgrade the older")
            )
        self._answer_ready()

    def _take_snapshot(self, snapshot: Snapshot, now: float) -> None:
        for uuid in self._intent.host.keys() - {vm.domain for vm in snapshot.host}:
            self._arrivals.on_gone(uuid)
        for vm in snapshot.host:
            self._arrivals.on_vm(vm, now)
        self._intent.replace(snapshot)
        self._synced = True
        self._detached.clear()
        self._generation = snapshot.generation
        self._programming.try_again()
        self._programming.need(Work(replace=True, generation=snapshot.generation))

    def _take_delta(self, delta: Delta, now: float) -> None:
        if not self._synced or delta.generation != self._generation + 1:
            self._synced = False
            self._say(Rejected(self._epoch, delta.generation, "gap", f"generation {self._generation + 1} was expected"))
            return
        self._generation = delta.generation
        for vm in delta.host:
            self._arrivals.on_vm(vm, now)
        self._intent.change(delta)
        for uuid in delta.host_gone:
            self._arrivals.on_gone(uuid)
            if (domain := self._domains.get(uuid)) is not None and uuid in self._detached:
                # It stopped and started again before the manager heard of either. (One that we did not call gone
                # has moved to another host; the hook will tell us soon.)
                self._ask(uuid, domain)
            self._detached.discard(uuid)
        self._programming.need(
            Work(
                host={vm.domain for vm in delta.host} | set(delta.host_gone),
                edge={vm.domain for vm in delta.edge} | set(delta.edge_gone),
                path=delta.path is not None,
                generation=delta.generation,
            )
        )

    def _take_refusal(self, refusal: Refused, now: float) -> None:
        self._outbox.append(Warn(f"VM {refusal.domain}: {refusal.message}"))
        self._do(self._arrivals.on_turned_down(refusal.domain, now))
        self._outbox += self._waiting.answer(refusal.code, refusal.message, {refusal.domain})

    # Domains

    def starting(self, request: int | None, vm: Running, now: float, *, wait_for_taps: bool) -> None:
        """
        A domain starts or runs (hooks ``prepare``, ``start``, ``started``, ``attach``, ``reconnect``).

        Answers the request, when there is one, as soon as the kernels on the path hold its ports; at once when it is
        migrating here (its ports follow when it runs) or when no manager is there to give any.
        """
        domain = self._known(vm, now)
        if request is None:
            self._ask(vm.domain, domain)
        elif domain.incoming:
            self._outbox.append(Answer(request, "", "migrating; ports follow when it runs here"))
        elif not self._connected and self._programming.ready(vm.domain, needs_taps=False) is None:
            self._outbox.append(Answer(request, "unreachable", "the manager is not connected; ports follow when it is"))
        else:
            self._waiting.add(Waiter(request, vm.domain, wait_for_taps, now))
            self._ask(vm.domain, domain)
            self._answer_ready()

    def incoming(self, request: int, vm: Running, now: float) -> None:
        """A domain is migrating here (hook ``migrate``); it still runs elsewhere."""
        domain = self._known(vm, now)
        domain.incoming = True
        self._say(Attach(vm.domain, vm.name, incoming=True, wishes=domain.wishes))
        self._outbox.append(Answer(request, "", "expected"))

    def resumed(self, uuid: DomainUUID, now: float) -> None:
        """A domain that migrated here runs (libvirt's event ``Resumed Migrated``)."""
        domain = self._domains.get(uuid)
        if domain is not None and domain.incoming:
            domain.incoming = False
            self._ask(uuid, domain)

    def ended(self, request: int | None, uuid: DomainUUID, reason: str, now: float) -> None:
        """A domain is gone from this host (hooks ``stopped`` and ``release``, or its interfaces vanished)."""
        if self._domains.ended(uuid):
            # Host first: it stops handing the ports out before anybody else hears of it.
            if (vm := self._intent.host.pop(uuid, None)) is not None:
                self._ended[uuid] = vm.internal
                self._arrivals.on_gone(uuid)
                self._detached.add(uuid)
            self._programming.need_host([uuid])
            self._say(Detach(uuid, reason))
        if request is not None:
            self._outbox.append(Answer(request, "", "released"))

    def listed(self, running: Iterable[Running], now: float) -> None:
        """Learn from libvirt what is active: missed hooks, hot-plugged NICs, wishes that changed while it runs."""
        changed = False
        for vm in running:
            if vm.taps and vm.taps != self._domains.taps_of(vm.domain):
                self.starting(None, vm, now, wait_for_taps=False)
            changed |= self._domains.wished(vm)
        if changed:
            self.present()

    def linked(self, links: frozenset[str], now: float) -> None:
        """The interfaces of this machine changed."""
        self._domains.linked(links, now)

    def tick(self, now: float) -> None:
        """Look after what only time brings: VMs without interfaces, hooks that wait, a kernel that refused."""
        for uuid in self._domains.vanished(now):
            self.ended(None, uuid, "its interfaces are gone", now)
        self._outbox += self._waiting.answer_late(now)
        self._programming.tick(now)
        self._do(self._arrivals.on_tick(now))

    # Arrivals

    def spent(self, index: int, now: float) -> None:
        """The kernel says that the budget of the VM with this index is used up."""
        if (uuid := self._programming.owners().get(index)) is not None:
            self._do(self._arrivals.on_budget_used_up(uuid, now))

    def deferred(self, packets: Mapping[int, Sequence[int]], now: float) -> None:
        """The kernel has deferred connections: by the index of their VM, their first packets' numbers."""
        domains = self._programming.owners()
        for index, numbers in packets.items():
            uuid = domains.get(index)
            self._do(self._arrivals.on_deferred(uuid, numbers, now) if uuid else [Release(tuple(numbers))])

    @property
    def look_at(self) -> float | None:
        """When :meth:`tick` is due for somebody whose connections wait; None: nobody's do."""
        return self._arrivals.deadline

    def counted(self, work: CountPorts, filling: Filling, full: frozenset[Destination], now: float) -> None:
        """
        The ports of a VM were counted, as commanded.

        :param full: Where to no port of the range is left.
        """
        self._do(self._arrivals.on_counted(work, filling, full, now))

    def not_counted(self, work: CountPorts) -> None:
        """The ports of a VM could not be counted; the periodic pass counts them."""
        self._arrivals.on_count_failed(work)

    def present(self) -> None:
        """Say again which VMs run here."""
        self._say(Present(tuple(self._domains.presences())))

    def report(
        self,
        period_s: float,
        rates: Mapping[DomainUUID, Rates],
        use: PortUse | None,
        generation: int,
        dropped: Mapping[str, int],
        guests: Mapping[DomainUUID, GuestView] = NO_GUESTS,
        counted: Counted = NOTHING_COUNTED,
    ) -> None:
        """
        Tell the manager what was measured over one period, all VMs in one message.

        :param period_s: Length of the period in seconds.
        :param rates: Traffic by VM; a VM without a rate is left out.
        :param use: Ports in use, or None when they were not counted this time.
        :param generation: :attr:`applied_generation` when counting began.
        :param dropped: Packets dropped at this node by reason, totals.
        :param guests: What the guests themselves say, of those that were asked.
        :param counted: What the kernel has counted.
        """
        if use is not None:
            self._arrivals.on_port_use(use)
        report = self._reports.report(self._intent.host, period_s, rates, use, generation, dropped, guests, counted)
        self._say(report)

    def arrived(self, use: PortUse, connections: Mapping[DomainUUID, int], generation: int, now: float) -> None:
        """
        Look at all VMs' arrivals, after they were counted.

        :param connections: Begun since each VM got its ports.
        :param generation: :attr:`applied_generation` when counting began.
        """
        if generation != self.applied_generation:
            return
        for uuid, vm in self._intent.host.items():
            if vm.ports is not None and self._programming.ready(uuid, needs_taps=False) is not None:
                filling = use.filling(vm.internal, vm.ports)
                self._do(self._arrivals.on_periodic_count(uuid, vm.ports, filling, connections.get(uuid), now))

    # Inside

    def _do(self, commands: Iterable[ArrivalCommand]) -> None:
        for command in commands:
            if isinstance(command, Arm):
                self._programming.need_host([command.domain])
            else:
                self._outbox.append(command)

    def _say(self, message: NodeMessage) -> None:
        if self._connected:
            self._outbox.append(Send(message))

    def _known(self, vm: Running, now: float) -> Domain:
        domain, changed = self._domains.seen(vm, now)
        self._programming.need_host(changed)
        return domain

    def _ask(self, uuid: DomainUUID, domain: Domain) -> None:
        vm = self._intent.host.get(uuid)
        if not domain.incoming and (vm is None or vm.ports is None or not self._synced):
            self._say(Attach(uuid, domain.name, wishes=domain.wishes))

    def _answer_ready(self) -> None:
        self._outbox += self._waiting.answer_ready(
            self._domains, lambda waiter: self._programming.ready(waiter.domain, needs_taps=waiter.needs_taps)
        )

    def _advance(self) -> None:
        """Emit the next kernel command, if one is needed, possible, and none is under way."""
        while commands := self._programming.begin():
            self._outbox += commands
            command = commands[-1]
            if not isinstance(command, Program) or not is_empty(command):
                return
            # Nothing the kernel would notice, for example ranges that now drain: confirm at once.
            self._outbox.pop()
            self.programmed(0.0)
