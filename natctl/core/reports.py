"""
Reports of a host's measurements to the manager. Pure.

Tested in ``tests/unit/natctl/core/test_node_arrivals.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping
from types import MappingProxyType
from typing import TypeVar

from cpm.protocol.bounds import MAX_COUNT, MAX_FEW, MAX_RATE, MAX_WORD, at_most, cut
from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import Draining, FastPathAt, GuestAddress, GuestView, Measured, Report, WayProblem
from cpm.protocol.model import DomainUUID
from natctl.arrivals.controller import Arrivals
from natctl.core.domains import Domains
from natctl.core.intent import Intent
from natctl.core.programming import InForce, Programming
from natctl.core.unshared import Unshared
from natctl.model.port_use import PortUse
from natctl.ruleset.readback import NOTHING_COUNTED, Counted
from qga_agent.samples import Rates

_Key = TypeVar("_Key", bound=str)

NO_GUESTS: Mapping[DomainUUID, GuestView] = MappingProxyType({})
NO_PROBLEMS: Mapping[DomainUUID, str] = MappingProxyType({})


class Reports:
    """
    Tells the manager what was measured; keeps the counters of the last report, to compute how many connections begin
    per second.

    :param intent: What each VM of this host shall have; a VM without is left out.
    :param programming: What the kernel holds.
    :param domains: The addresses of guests.
    :param arrivals: Is told which ports are in use.
    :param send: Sends a message to the manager.
    """

    def __init__(
        self,
        intent: Intent,
        programming: Programming,
        domains: Domains,
        arrivals: Arrivals,
        unshared: Unshared,
        send: Callable[[Report], None],
    ) -> None:
        self._intent = intent
        self._programming = programming
        self._domains = domains
        self._arrivals = arrivals
        self._unshared = unshared
        self._send = send
        self._connections: Mapping[DomainUUID, int] = {}

    def send(
        self,
        period_s: float,
        rates: Mapping[DomainUUID, Rates],
        use: PortUse | None,
        in_force: InForce,
        dropped: Mapping[str, int],
        guests: Mapping[DomainUUID, GuestView] = NO_GUESTS,
        counted: Counted = NOTHING_COUNTED,
        warnings: tuple[str, ...] = (),
        way_problems: Mapping[DomainUUID, str] = NO_PROBLEMS,
        fast_path: tuple[FastPathAt, ...] = (),
    ) -> None:
        """
        Tell the manager what was measured over one period, all VMs in one message.

        :param period_s: Length of the period in seconds.
        :param rates: Traffic by VM; a VM without a rate is left out.
        :param use: Ports in use, or None when they were not counted this time.
        :param in_force: What was in force when counting began.
        :param dropped: Packets dropped at this node since it started, by reason.
        :param guests: What the guests themselves say, of those that were asked.
        :param counted: What the kernel has counted.
        :param warnings: What is wrong with this machine, a sentence each.
        :param way_problems: What is wrong with the ways of VMs' packets.
        :param fast_path: Where the fast path is in force, and why not elsewhere.
        """
        if use is not None:
            self._arrivals.on_port_use(use)
            self._programming.require_hosts(self._unshared.on_port_use(use, self._intent.host.values()))
        vms, begun = self._intent.host, self._begun(counted.connections)
        measured = tuple(
            _measured(vm, rate, use, guests.get(uuid), begun[uuid] / period_s if uuid in begun else None)
            for uuid, rate in rates.items()
            if (vm := vms.get(uuid)) is not None
        )
        report = Report(
            in_force.generation if in_force.session == self._programming.in_force.session else 0,
            period_s,
            measured,
            dropped=_counts(dropped),
            refused=_counts(counted.refused),
            warnings=tuple(cut(text) for text in warnings[:MAX_FEW]),
            ways=_ways(vms, way_problems),
            limited=_counts(counted.limited),
            fast_path=tuple(FastPathAt(at.interface[:MAX_WORD], cut(at.reason)) for at in fast_path[:MAX_FEW]),
            guests=tuple(self._guest_addresses()),
        )
        self._send(report)

    def _guest_addresses(self) -> Iterator[GuestAddress]:
        for uuid, vm in self._intent.host.items():
            if vm.forwards and (claims := self._domains.claims_of(uuid)) is not None:
                named = {each.guest for each in vm.forwards if each.guest is not None and each.external is None}
                refused = tuple(sorted(each for each in named if not claims.reach.has(each)))
                address = self._domains.address_of(uuid)
                yield GuestAddress(uuid, address, self._domains.address_source_of(uuid), refused)

    def _begun(self, connections: Mapping[DomainUUID, int]) -> dict[DomainUUID, int]:
        """Return how many connections began since the last report; a counter that decreased restarted at 0."""
        before, self._connections = self._connections, connections
        return {
            uuid: now - before[uuid] if now >= before[uuid] else now
            for uuid, now in connections.items()
            if uuid in before
        }


def _measured(
    vm: HostIntent, rate: Rates, use: PortUse | None, guest: GuestView | None, new_per_s: float | None
) -> Measured:
    in_use = use.in_use(vm.internal, vm.ports) if use is not None and vm.ports is not None else None
    leaving = (*vm.draining, *vm.leaving_forwards)
    draining = tuple(Draining(ports, use.users(vm.internal, ports)) for ports in leaving) if use is not None else ()
    return Measured(
        vm.domain,
        at_most(rate.packets_per_s, MAX_RATE),
        at_most(rate.megabits_per_s, MAX_RATE),
        in_use,
        at_most(new_per_s, MAX_RATE) if new_per_s is not None else None,
        draining,
        guest,
    )


def _counts(counters: Mapping[_Key, int]) -> dict[_Key, int]:
    """Return the kernel's counters, which have a bit more than a message."""
    return {key: at_most(number, MAX_COUNT) for key, number in counters.items()}


def _ways(vms: Container[DomainUUID], problems: Mapping[DomainUUID, str]) -> tuple[WayProblem, ...]:
    """Return the problems of VMs, each once: all VMs of a bridge may have the same."""
    grouped: dict[str, list[DomainUUID]] = {}
    for uuid, problem in problems.items():
        if uuid in vms:
            grouped.setdefault(problem, []).append(uuid)
    return tuple(WayProblem(cut(problem), tuple(uuids)) for problem, uuids in grouped.items())
