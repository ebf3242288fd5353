"""
Decides when a host asks for more ports for a VM, and when it refuses connections because none is left.

The kernel counts the connections that begin and gives a signal when a VM's budget is used up
(``docs/design/0003-arrivals.md``). If the estimate says that the ports run out soon, the manager is asked at once, and
an exact count follows. Connections that begin when, by that estimate, no port is left are not dropped: the kernel
*defers* them, and natd releases them when a larger range is in force, or when it is clear that there is none.

Methods of :class:`Arrivals` named ``on_…`` are its inputs; they are given the time, and return commands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cpm.protocol.bounds import LAST_PORT, MAX_RATE, at_most
from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import Need
from cpm.protocol.model import DomainUUID, PortRange
from natctl.arrivals.allowance import TableRoom
from natctl.arrivals.phases import Phases
from natctl.arrivals.port_headroom import REACTION_S, least_budget
from natctl.arrivals.refusal import RECOUNT_S, REFUSE_S
from natctl.arrivals.vm import VMArrivals
from natctl.model.commands import Arm, ArrivalCommand, CountPorts, RefuseNew, Release, Send, Warn
from natctl.model.entries import Allowance, Destination, HostEntry
from natctl.model.port_use import Filling, PortUse


class Arrivals:
    """The connections that begin on the VMs of this host."""

    def __init__(self) -> None:
        self._vms: dict[DomainUUID, VMArrivals] = {}
        self._is_connected = False
        self._use = PortUse()
        self._ownerless: tuple[int, ...] = ()
        """Deferred packets whose VM is gone."""

    # Queries

    def budget(self, domain: DomainUUID) -> int | None:
        """Return the budget that the kernel should hold for this VM; None: it has no ports."""
        vm = self._vms.get(domain)
        return vm.budget.limit if vm is not None else None

    def defer_after(self, domain: DomainUUID) -> int | None:
        """Return after how many connections further ones of this VM are to be deferred; None: never."""
        vm = self._vms.get(domain)
        return vm.budget.defer_after if vm is not None else None

    def allowance(self, domain: DomainUUID) -> Allowance | None:
        """Return how many connections of this VM may begin before natd has to count; None: any number."""
        vm = self._vms.get(domain)
        return vm.limit.allowance if vm is not None else None

    def refusals(self) -> Mapping[DomainUUID, frozenset[Destination]]:
        """Return the VMs whose new connections are refused, and to which destinations."""
        return {domain: vm.refusal.destinations for domain, vm in self._vms.items() if vm.refusal.is_refusing}

    def phases(self, domain: DomainUUID) -> Phases | None:
        """Return the phases of a VM; None: it has no ports."""
        vm = self._vms.get(domain)
        return vm.phases if vm is not None else None

    @property
    def deadline(self) -> float | None:
        """When :meth:`on_tick` is due for deferred connections; None: no connection is deferred."""
        deadlines = (vm.deferral.deadline for vm in self._vms.values())
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    # The ports of VMs

    def on_found(self, entry: HostEntry, now: float) -> None:
        """Take over what the kernel held of a VM when natd started."""
        if entry.intent.ports is None:
            return
        vm = entry.intent
        self._vms[vm.domain] = found = VMArrivals(
            vm, entry.intent.ports, now, entry.budget, entry.defer_after, entry.allowance
        )
        if entry.budget is None:
            found.arm(now)

    def on_vm(self, vm: HostIntent, now: float) -> None:
        """Take over what the manager wants for a VM; if its ports are new, choose a new budget."""
        if vm.ports is None:
            self.on_gone(vm.domain)
            return
        former = self._vms.get(vm.domain)
        if former is not None and (former.ports, former.vm.at_cap) == (vm.ports, vm.at_cap):
            former.on_described(vm)
            return
        # Some of its connections may be there already.
        filling = self._use.filling(vm.internal, vm.ports)
        if former is not None:
            former.on_ports(vm, vm.ports, now, filling)
            return
        self._vms[vm.domain] = new = VMArrivals(vm, vm.ports, now)
        new.estimate.on_former_count(filling)
        new.arm(now)

    def on_gone(self, domain: DomainUUID) -> None:
        """Drop what is known of a VM that has no ports here any more."""
        if (vm := self._vms.pop(domain, None)) is not None:
            self._ownerless += vm.deferral.take()

    def on_port_use(self, use: PortUse) -> None:
        """Keep a reading of all VMs' connections: a VM can get back a range that still has some."""
        self._use = use

    # The manager

    def on_connected(self) -> None:
        """There is a session with the manager, and requests reach it."""
        self._is_connected = True

    def on_disconnected(self, now: float) -> list[ArrivalCommand]:
        """The session is gone, and outstanding requests with it."""
        self._is_connected = False
        asked = [vm for vm in self._vms.values() if vm.requests.has_asked]
        return [command for vm in asked for command in self._turn_down(vm, now)]

    def on_turned_down(self, domain: DomainUUID, now: float, ports: PortRange | None = None) -> list[ArrivalCommand]:
        """
        The manager has no more ports for this VM now.

        :param ports: The range for which it declined; None: the present one.
        """
        vm = self._vms.get(domain)
        if vm is None or (ports is not None and ports != vm.ports):
            return []
        return self._turn_down(vm, now)

    # The kernel

    def on_programmed(self, entry: HostEntry, now: float) -> list[ArrivalCommand]:
        """The kernel holds this entry of a VM now."""
        vm = self._vms.get(entry.intent.domain)
        if vm is None or vm.budget.is_armed or vm.budget.limit != entry.budget:
            return []
        vm.budget.on_programmed(now)
        if vm.deferral.deferred and vm.budget.defer_after is not None:
            return self._release_covered(vm, now)
        return _release(vm)

    def on_budget_used_up(self, domain: DomainUUID, now: float) -> list[ArrivalCommand]:
        """The kernel signals that a VM's budget is used up; a signal about an older budget is ignored."""
        vm = self._vms.get(domain)
        if vm is None or (not vm.budget.is_used_up and vm.budget.is_stale_signal(now)):
            return []
        if not vm.budget.is_used_up:
            vm.budget.on_used_up()
            vm.estimate.on_least_arrivals(vm.budget.arrivals_before + vm.budget.limit + 1, now)
        if vm.refusal.is_at_cap:
            return self._count(vm, now)
        if vm.requests.is_awaited(now):
            return []
        if not vm.is_short:
            return self._arm(vm, now)
        if vm.estimate.is_trusted and vm.requests.may_ask(now):
            vm.requests.want_count()
            return self._ask(vm, now)
        # The next signal tells the pace; if that has doubled, arrivals are trusted again.
        return [*self._arm(vm, now), *self._count(vm, now)]

    def on_deferred(self, domain: DomainUUID, packets: Sequence[int], now: float) -> list[ArrivalCommand]:
        """
        The kernel has deferred connections of a VM.

        :param packets: The kernel's numbers of their first packets; at least one.
        """
        vm = self._vms.get(domain)
        if vm is None or vm.budget.defer_after is None:
            return [Release(tuple(packets))]
        vm.deferral.on_deferred(packets, now)
        if vm.budget.is_too_soon(vm.budget.defer_after, now):
            # It was the former budget by which the kernel deferred them.
            return self._release_covered(vm, now)
        if not vm.budget.is_armed or vm.requests.is_awaited(now):
            # They are released with the ports or the budget that are on their way.
            return []
        if vm.budget.is_used_up and vm.estimate.is_trusted:
            # Ask even if the manager declined a moment ago: it does not know yet that the range is used up.
            vm.estimate.on_least_arrivals(vm.budget.arrivals_before + vm.budget.defer_after, now)
            vm.requests.want_count()
            return self._ask(vm, now)
        # Count first: the kernel defers a connection before its destination is known, and others may have ended.
        commands = self._count(vm, now)
        return commands if vm.requests.is_counting else self._stop_deferring(vm, now)

    def on_counted(
        self, work: CountPorts, filling: Filling, full: frozenset[Destination], now: float, took_s: float = 0.0
    ) -> list[ArrivalCommand]:
        """
        The ports of a VM were counted, as commanded.

        :param work: The command; its result is ignored if the VM's ports have changed since.
        :param filling: How many ports of the range are in use.
        :param full: Destinations to which every port of the range is taken; only for a VM at its cap.
        :param took_s: Processor seconds that it took; the VM's next count waits accordingly.
        """
        vm = self._vms.get(work.domain)
        if vm is None:
            return []
        vm.requests.on_counted(took_s, now)
        if (vm.ports, vm.refusal.is_at_cap) != (work.ports, work.at_cap):
            return []
        vm.estimate.on_counted(filling, max(0.0, vm.estimate.arrivals - work.arrivals))
        commands: list[ArrivalCommand] = []
        if vm.refusal.is_at_cap:
            commands = self._refuse(vm, full, now)
        elif vm.requests.is_awaited(now):
            return []
        elif vm.is_short and (vm.requests.may_ask(now) or vm.deferral.deferred):
            return self._ask(vm, now)
        if vm.budget.is_used_up or vm.deferral.deferred:
            commands += self._arm(vm, now)
        return commands

    def on_count_failed(self, work: CountPorts) -> None:
        """The ports of a VM could not be counted; the periodic pass counts them."""
        if (vm := self._vms.get(work.domain)) is not None:
            vm.requests.on_count_failed()

    # Time

    def on_periodic_count(
        self,
        domain: DomainUUID,
        ports: PortRange,
        filling: Filling,
        arrivals: int | None,
        now: float,
        meanwhile: int = 0,
    ) -> list[ArrivalCommand]:
        """
        The periodic pass has counted: make up for lost signals, and renew budgets before they are used up.

        :param ports: The range whose ports were counted.
        :param filling: How many of them are in use.
        :param arrivals: Connections begun since the VM's ports were programmed; None: not counted.
        :param meanwhile: How many of them began while the ports were counted; the count may have missed some.
        """
        vm = self._vms.get(domain)
        if vm is None or vm.ports != ports:
            return []
        if arrivals is not None:
            vm.budget.on_arrivals_read(arrivals, is_first=vm.estimate.is_adopted)
            vm.estimate.on_arrivals_read(arrivals, filling.in_use, now)
        vm.estimate.on_counted(filling, meanwhile)
        if vm.is_short and vm.requests.may_ask(now):
            return self._ask(vm, now)
        is_due = vm.budget.is_used_up or vm.deferral.deferred or vm.budget.is_low(vm.estimate.arrivals)
        return self._arm(vm, now) if is_due and not vm.requests.is_awaited(now) else []

    def on_connections_counted(
        self, domain: DomainUUID, connections: int, room: TableRoom, arrivals: int, refused: int
    ) -> list[ArrivalCommand]:
        """
        The connections of a VM were counted.

        :param connections: How many it has, on all its ports.
        :param room: How the connection table is divided at present.
        :param arrivals: Connections begun since the VM's ports were programmed.
        :param refused: Connections refused because it had as many as it may have, a counter.
        """
        vm = self._vms.get(domain)
        changed = vm is not None and vm.limit.on_counted(connections, room, arrivals, refused)
        return [Arm(domain)] if changed else []

    def on_arrivals_read(self, domain: DomainUUID, ports: PortRange, arrivals: int, now: float) -> list[ArrivalCommand]:
        """
        The periodic pass read how many connections began, but did not count: growth is noticed by the estimate.

        :param ports: The range that the kernel holds.
        :param arrivals: Connections begun since the VM's ports were programmed.
        """
        vm = self._vms.get(domain)
        if vm is None or vm.ports != ports or vm.estimate.is_adopted:
            return []
        vm.budget.on_arrivals_read(arrivals, is_first=False)
        vm.estimate.on_arrivals_read(arrivals, 0, now)
        if vm.is_short and vm.requests.may_ask(now):
            if not vm.estimate.is_trusted:
                return self._count(vm, now)
            vm.requests.want_count()
            return self._ask(vm, now)
        is_due = vm.budget.is_low(vm.estimate.arrivals) and not vm.refusal.is_at_cap
        return self._arm(vm, now) if is_due and not vm.requests.is_awaited(now) else []

    def on_tick(self, now: float) -> list[ArrivalCommand]:
        """Do what time makes due: counts that were postponed, refusals to renew, deferrals that are overdue."""
        ownerless, self._ownerless = self._ownerless, ()
        commands: list[ArrivalCommand] = [Release(ownerless)] if ownerless else []
        for vm in self._vms.values():
            if vm.deferral.is_overdue(now):
                commands += self._stop_deferring(vm, now)
            is_due = vm.requests.wants_count and not vm.requests.is_awaited(now)
            if is_due or (vm.refusal.is_refusing and vm.requests.s_since_count(now) >= RECOUNT_S):
                commands += self._count(vm, now)
        return commands

    # Inside

    def _arm(self, vm: VMArrivals, now: float) -> list[ArrivalCommand]:
        vm.arm(now)
        return [Arm(vm.vm.domain)]

    def _ask(self, vm: VMArrivals, now: float) -> list[ArrivalCommand]:
        if not self._is_connected:
            return self._turn_down(vm, now)
        vm.requests.on_asked(now)
        deferred = vm.deferral.deferred
        rate = max(vm.estimate.rate, deferred / max(now - vm.deferral.since, REACTION_S))
        in_use = at_most(int(vm.estimate.in_use) + deferred, LAST_PORT)
        return [Send(Need(vm.vm.domain, vm.ports, in_use, at_most(rate, MAX_RATE)))]

    def _turn_down(self, vm: VMArrivals, now: float) -> list[ArrivalCommand]:
        vm.requests.on_turned_down(now)
        return self._stop_deferring(vm, now)

    def _stop_deferring(self, vm: VMArrivals, now: float) -> list[ArrivalCommand]:
        """Release deferred connections, since no ports will come, and renew the budget if it is used up."""
        commands = _release(vm)
        if commands:
            vm.deferral.back_off(now)
        elif not vm.budget.is_used_up:
            return []
        return [*commands, *self._arm(vm, now)]

    def _release_covered(self, vm: VMArrivals, now: float) -> list[ArrivalCommand]:
        """Release as many deferred connections as find a port, and ask at once for more ports for the others."""
        before = vm.deferral.deferred
        commands = _release(vm, vm.budget.releasable)
        released = before - vm.deferral.deferred
        vm.budget.on_released(released)
        vm.estimate.on_least_arrivals(vm.estimate.arrivals + released, now)
        if not vm.deferral.deferred or vm.requests.is_awaited(now):
            return commands
        if least_budget(vm.ports.size, vm.estimate.in_use + vm.deferral.deferred):
            return [*commands, *_release(vm)]
        vm.requests.want_count()
        return [*commands, *self._ask(vm, now)]

    def _count(self, vm: VMArrivals, now: float) -> list[ArrivalCommand]:
        if not vm.requests.start_count(now):
            return []
        return [CountPorts(vm.vm.domain, vm.vm.internal, vm.ports, vm.refusal.is_at_cap, vm.estimate.arrivals)]

    def _refuse(self, vm: VMArrivals, full: frozenset[Destination], now: float) -> list[ArrivalCommand]:
        was_refusing = vm.refusal.is_refusing
        vm.refusal.on_counted(full)
        if not full and not was_refusing:
            return []
        warnings = [_warning(vm, len(full))] if not was_refusing else []
        return [*warnings, RefuseNew(self._recent_refusals(now), REFUSE_S)]

    def _recent_refusals(self, now: float) -> Mapping[DomainUUID, frozenset[Destination]]:
        """Return the refusals without those of VMs that were last counted so long ago that ports may be free again."""
        return {
            domain: destinations
            for domain, destinations in self.refusals().items()
            if self._vms[domain].requests.s_since_count(now) < REFUSE_S
        }


def _release(vm: VMArrivals, most: int | None = None) -> list[ArrivalCommand]:
    """Release the connections that were deferred first: ``most`` of them, or all."""
    packets = vm.deferral.take(most)
    return [Release(packets)] if packets else []


def _warning(vm: VMArrivals, destinations: int) -> Warn:
    return Warn(
        f"VM {vm.vm.name} is at its cap and all {vm.ports.size} ports are in use for {destinations} "
        "destinations; new connections there are refused"
    )
