"""
What the kernel tells of connections that begin: its signals, and what was counted. Pure.

Finds out which VM each is about, and passes it to :mod:`natctl.arrivals.controller`.

Tested in ``tests/unit/natctl/core/test_node_arrivals.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from cpm.protocol.intent import HostIntent
from cpm.protocol.model import DomainUUID, PortRange
from natctl.arrivals.allowance import TableRoom
from natctl.arrivals.controller import Arrivals
from natctl.core.intent import Intent
from natctl.core.programming import InForce, Programming
from natctl.core.signal_times import SignalTimes
from natctl.model.commands import Arm, ArrivalCommand, Command, CountPorts, Release
from natctl.model.entries import Destination, HostEntry
from natctl.model.port_use import Filling, PortUse
from natctl.ruleset.readback import Counted

_NO_CONNECTIONS: Final[Mapping[DomainUUID, int]] = MappingProxyType({})


class ArrivalEvents:
    """
    Signals and counts of connections. Methods named ``on_…`` are its inputs, as those of the node.

    :param intent: What each VM of this host shall have.
    :param programming: Which ports are in force, and which VM has which mark.
    :param arrivals: Decides what follows.
    :param signal_times: Gets the time of each signal.
    :param outbox: Gets the commands to carry out.
    """

    def __init__(
        self,
        intent: Intent,
        programming: Programming,
        arrivals: Arrivals,
        signal_times: SignalTimes,
        outbox: list[Command],
    ) -> None:
        self._intent = intent
        self._programming = programming
        self._arrivals = arrivals
        self._signal_times = signal_times
        self._outbox = outbox
        self.warning = ""
        """What the operator should know about the connection table, a sentence; empty: nothing."""

    def emit(self, commands: Iterable[ArrivalCommand]) -> None:
        """Have commands carried out."""
        for command in commands:
            if isinstance(command, Arm):
                self._programming.require_hosts([command.domain])
            else:
                self._outbox.append(command)

    def on_programmed(self, entry: HostEntry, now: float) -> None:
        """The kernel holds this entry of a VM."""
        self._signal_times.on_programmed(entry.intent.domain, entry.intent.ports, now)
        self.emit(self._arrivals.on_programmed(entry, now))

    def on_turned_down(self, domain: DomainUUID, now: float, ports: PortRange | None = None) -> None:
        """
        The manager has no more ports for this VM now.

        :param ports: The range for which it declined; None: the present one.
        """
        self._signal_times.on_turned_down(domain)
        self.emit(self._arrivals.on_turned_down(domain, now, ports))

    def on_budget_used_up(self, index: int, now: float) -> None:
        """The kernel signals that the arrival budget of the VM with this index is used up."""
        if (uuid := self._programming.indexes.owners.get(index)) is not None:
            self._signal_times.on_signal(uuid, now)
            self.emit(self._arrivals.on_budget_used_up(uuid, now))

    def on_deferred(self, packets: Mapping[int, Sequence[int]], now: float) -> None:
        """The kernel has deferred connections: the numbers of their first packets, by the index of their VM."""
        domains = self._programming.indexes.owners
        for index, numbers in packets.items():
            uuid = domains.get(index)
            self.emit(self._arrivals.on_deferred(uuid, numbers, now) if uuid else [Release(tuple(numbers))])

    @property
    def deferral_deadline(self) -> float | None:
        """When :meth:`natctl.core.node.Node.on_tick` is due for connections that are deferred; None: none is."""
        return self._arrivals.deadline

    def on_ports_counted(
        self, work: CountPorts, filling: Filling, full: frozenset[Destination], now: float, took_s: float = 0.0
    ) -> None:
        """
        The ports of a VM were counted, as commanded.

        :param full: Destinations to which no port of the range is left.
        :param took_s: Processor seconds that it took.
        """
        self.emit(self._arrivals.on_counted(work, filling, full, now, took_s))

    def on_count_failed(self, work: CountPorts) -> None:
        """The ports of a VM could not be counted; the periodic pass counts them."""
        self._arrivals.on_count_failed(work)

    def on_periodic_count(
        self,
        use: PortUse,
        connections: Mapping[DomainUUID, int],
        in_force: InForce,
        now: float,
        before: Mapping[DomainUUID, int] = _NO_CONNECTIONS,
    ) -> None:
        """
        The connections of all VMs were counted.

        :param use: Ports in use.
        :param connections: Connections begun since each VM got its ports.
        :param in_force: What was in force when counting began.
        :param before: The same as ``connections`` when counting began.
        """
        for uuid, ports, vm in self._counted_vms(in_force):
            filling, arrivals = use.filling(vm.internal, ports), connections.get(uuid)
            meanwhile = max(0, arrivals - before[uuid]) if arrivals is not None and uuid in before else 0
            self.emit(self._arrivals.on_periodic_count(uuid, ports, filling, arrivals, now, meanwhile))

    def on_connections_counted(self, use: PortUse, counted: Counted, size: int | None) -> None:
        """
        The connections of all VMs were counted: what each may have now follows from its limit and from the others.

        :param counted: The kernel's counters when counting began.
        :param size: Entries that the connection table can have; None: not known, and then they do not matter.
        """
        totals = {uuid: use.of(vm.internal).total for uuid, vm in self._intent.host.items()}
        room = TableRoom(size if size is not None else sys.maxsize, list(totals.values()))
        self.warning = room.warning(size) if size is not None else ""
        for uuid, total in totals.items():
            if uuid in counted.connections:
                arrivals, refused = counted.connections[uuid], counted.too_many.get(uuid, 0)
                self.emit(self._arrivals.on_connections_counted(uuid, total, room, arrivals, refused))

    def on_arrivals_read(self, connections: Mapping[DomainUUID, int], in_force: InForce, now: float) -> None:
        """
        The connections that begin were read, and ports were not counted because that is expensive at present.

        :param connections: Connections begun since each VM got its ports.
        :param in_force: What was in force when they were read.
        """
        for uuid, ports, _ in self._counted_vms(in_force):
            if (arrivals := connections.get(uuid)) is not None:
                self.emit(self._arrivals.on_arrivals_read(uuid, ports, arrivals, now))

    def _counted_vms(self, in_force: InForce) -> Iterator[tuple[DomainUUID, PortRange, HostIntent]]:
        """Yield the VMs whose ports are in force, if nothing has changed since this generation."""
        if in_force != self._programming.in_force:
            return
        for uuid, vm in list(self._intent.host.items()):
            if vm.ports is not None and self._programming.entry_in_force(uuid, needs_taps=False) is not None:
                yield uuid, vm.ports, vm
