"""
What a host does about the connections that begin on its VMs: what happens in, commands out; pure.

:class:`natctl.arrivals.budget.Arrivals` decides; :class:`Newcomers` puts that into words for the manager, the kernel
and the operator, of VMs as the manager wants them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from cpm.protocol.messages import HostVM, Need
from cpm.protocol.model import DomainUUID, PortRange
from natctl.arrivals.budget import REFUSE_S, Arm, Arrivals, Ask, Count, Exhausted, Refuse, Release, Step
from natctl.core.commands import Command, CountPorts, RefuseNew, Send, Warn
from natctl.core.intent import Intent
from natctl.model.entries import Destination, HostEntry
from natctl.model.port_use import EMPTY, Filling, PortUse

Deed = Command | Arm
"""What is to be done: a command, or to give a VM's budget to the kernel with the next change."""


class Newcomers:
    """
    The connections that begin on this host.

    :param wanted: What the manager wants the VMs to have; read, not changed.
    """

    def __init__(self, wanted: Intent) -> None:
        self._intent = wanted
        self._arrivals = Arrivals()
        self._is_heard = False
        self._connections: Mapping[DomainUUID, int] = {}
        self._use = PortUse()

    # What a VM has

    def armed(self, domain: DomainUUID) -> int | None:
        """Return the budget that the kernel should hold for this VM; None: it has no ports."""
        return self._arrivals.armed(domain)

    def defer_after(self, domain: DomainUUID) -> int | None:
        """Return after how many connections the next ones of this VM are to be deferred; None: never."""
        return self._arrivals.defer_after(domain)

    def found(self, entry: HostEntry, now: float) -> None:
        """Take note of what the kernel held of a VM before natd began."""
        self._arrivals.resized(
            entry.domain,
            entry.ports,
            now,
            at_cap=entry.at_cap,
            found=entry.budget,
            found_defer_after=entry.defer_after,
        )

    def resized(self, vm: HostVM, now: float) -> None:
        """Take note of the ports that a VM gets; some of its connections may be there already."""
        filling = self._use.filling(vm.internal, vm.ports) if vm.ports is not None else EMPTY
        self._arrivals.resized(vm.domain, vm.ports, now, at_cap=vm.at_cap, filling=filling)

    def gone(self, domain: DomainUUID, now: float) -> None:
        """Take note: a VM is not to have ports here any more."""
        self._arrivals.resized(domain, None, now, at_cap=False)

    def in_force(self, entry: HostEntry, now: float) -> list[Deed]:
        """The kernel holds this of a VM now."""
        return self._deeds(self._arrivals.in_force(entry.domain, entry.budget, now), now)

    # The manager

    def heard(self) -> None:
        """Take note: there is a session, and who asks is heard."""
        self._is_heard = True

    def unheard(self, now: float) -> list[Deed]:
        """The session is gone: nobody hears what was asked for."""
        deeds = self._deeds(self._arrivals.unheard(now), now)
        self._is_heard = False
        return deeds

    def turned_down(self, domain: DomainUUID, now: float, ports: PortRange | None = None) -> list[Deed]:
        """
        The manager has no more ports for this VM now.

        :param ports: The range that it speaks of; None: whatever the VM has.
        """
        return self._deeds(self._arrivals.turned_down(domain, now, ports), now)

    # The kernel

    def spent(self, domain: DomainUUID, now: float) -> list[Deed]:
        """The kernel says that a VM's budget is used up."""
        return self._deeds(self._arrivals.spent(domain, now), now)

    def deferred(self, domain: DomainUUID, packets: Sequence[int], now: float) -> list[Deed]:
        """The kernel has deferred connections of a VM: their first packets' numbers."""
        return self._deeds(self._arrivals.deferred(domain, packets, now), now)

    def counted(self, work: CountPorts, filling: Filling, full: frozenset[Destination], now: float) -> list[Deed]:
        """
        The ports of a VM were counted, as commanded.

        :param full: Where to no port of the range is left.
        """
        return self._deeds(self._arrivals.counted(work.count, filling, full, now), now)

    def not_counted(self, work: CountPorts) -> None:
        """The ports of a VM could not be counted; the periodic pass counts them."""
        self._arrivals.not_counted(work.count.domain)

    def measured(
        self, domain: DomainUUID, ports: PortRange, filling: Filling, arrived: int | None, now: float
    ) -> list[Deed]:
        """
        The periodic pass has counted the ports of a VM.

        :param ports: Range whose ports were counted.
        :param arrived: Connections begun since the VM's ports were programmed; None: not counted.
        """
        return self._deeds(self._arrivals.measured(domain, ports, filling, arrived, now), now)

    def read(self, use: PortUse) -> None:
        """Take note of what the manager is told: it may give a VM ports back that drained."""
        self._use = use

    def begun(self, connections: Mapping[DomainUUID, int]) -> dict[DomainUUID, int]:
        """
        Return how many connections began since this was last asked; a counter that is smaller began again.

        :param connections: Begun since each VM got its ports.
        """
        before, self._connections = self._connections, connections
        return {
            uuid: now - before[uuid] if now >= before[uuid] else now
            for uuid, now in connections.items()
            if uuid in before
        }

    @property
    def look_at(self) -> float | None:
        """When :meth:`tick` is due for somebody whose connections wait; None: nobody's do."""
        return self._arrivals.look_at

    def tick(self, now: float) -> list[Deed]:
        """Look after what only time brings."""
        return self._deeds(self._arrivals.tick(now), now)

    # Inside

    def _deeds(self, steps: Iterable[Step], now: float) -> list[Deed]:
        return [deed for step in steps for deed in self._deeds_of(step, now)]

    def _deeds_of(self, step: Step, now: float) -> list[Deed]:
        match step:
            case Ask(domain, ports, ports_in_use, rate) if self._is_heard:
                return [Send(Need(domain, ports, ports_in_use, rate))]
            case Ask(domain):
                return self.turned_down(domain, now)
            case Count(domain) if (vm := self._intent.host.get(domain)) is not None:
                return [CountPorts(step, vm.internal)]
            case Count():
                self._arrivals.not_counted(step.domain)
                return []
            case Refuse(where):
                return [RefuseNew(where, REFUSE_S)]
            case Exhausted():
                return [self._warning(step)]
            case Arm() | Release():
                return [step]

    def _warning(self, exhausted: Exhausted) -> Warn:
        domain, ports, destinations = exhausted
        name = self._intent.host[domain].name if domain in self._intent.host else domain
        return Warn(
            f"VM {name} is at its cap and all {ports.size} ports are in use for {destinations} "
            "destinations; new connections there are refused"
        )
