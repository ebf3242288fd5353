"""
The records of one VM with ports on this host, and the operations that concern several of them.

Tested in ``tests/unit/natctl/arrivals/test_records.py``.
"""

from __future__ import annotations

from cpm.protocol.intent import HostIntent
from cpm.protocol.model import PortRange
from natctl.arrivals.allowance import ConnectionLimit
from natctl.arrivals.budget import Budget
from natctl.arrivals.deferral import Deferral
from natctl.arrivals.estimate import Estimate
from natctl.arrivals.phases import Phases
from natctl.arrivals.refusal import Refusal
from natctl.arrivals.requests import Requests
from natctl.model.entries import Allowance
from natctl.model.port_use import Filling


class VMArrivals:
    """
    The arrivals of one VM. Call :meth:`arm` to choose its first budget, unless natd found one in the kernel.

    :param vm: What the manager wants for the VM.
    :param ports: Its ports.
    :param budget: The budget that natd found in the kernel when it started; None: there was none.
    :param defer_after: The same for deferral.
    :param allowance: The same for its limit of connections.
    """

    __slots__ = ("_budget", "_deferral", "_estimate", "_limit", "_ports", "_refusal", "_requests", "_vm")

    def __init__(
        self,
        vm: HostIntent,
        ports: PortRange,
        now: float,
        budget: int | None = None,
        defer_after: int | None = None,
        allowance: Allowance | None = None,
    ) -> None:
        is_found = budget is not None
        self._vm = vm
        self._ports = ports
        self._estimate = Estimate(ports.size, now, is_adopted=is_found)
        self._budget = Budget(budget, defer_after, now) if budget is not None else Budget()
        self._deferral = Deferral(is_on=is_found and defer_after is not None)
        self._requests = Requests()
        self._refusal = Refusal(at_cap=vm.at_cap)
        self._limit = ConnectionLimit(allowance)
        if not is_found:
            self._limit.on_limit(vm.connections)

    @property
    def vm(self) -> HostIntent:
        """What the manager wants for the VM."""
        return self._vm

    @property
    def ports(self) -> PortRange:
        """Its ports."""
        return self._ports

    @property
    def estimate(self) -> Estimate:
        """Ports in use, and the pace of arrivals."""
        return self._estimate

    @property
    def budget(self) -> Budget:
        """What the kernel was given, and when."""
        return self._budget

    @property
    def deferral(self) -> Deferral:
        """Deferred connections."""
        return self._deferral

    @property
    def requests(self) -> Requests:
        """Outstanding requests and counts."""
        return self._requests

    @property
    def refusal(self) -> Refusal:
        """Destinations that are refused at the cap."""
        return self._refusal

    @property
    def limit(self) -> ConnectionLimit:
        """Its limit of connections."""
        return self._limit

    @property
    def phases(self) -> Phases:
        """Its phase in each table."""
        requests = self._requests
        return Phases(
            self._budget.phase,
            requests.request_phase,
            requests.count_phase,
            self._deferral.phase,
            self._refusal.phase,
        )

    @property
    def is_short(self) -> bool:
        """Whether the ports run out soon, and the VM may get more."""
        return not self._refusal.is_at_cap and self._estimate.is_short(self._deferral.deferred)

    def arm(self, now: float) -> None:
        """Choose another budget, to be programmed with the next change."""
        at_cap = self._refusal.is_at_cap
        may_defer = not at_cap and not self._deferral.is_backing_off(now)
        self._budget.choose(self._estimate, self._deferral.deferred, at_cap=at_cap, may_defer=may_defer)
        self._deferral.on_armed(is_on=may_defer)

    def on_described(self, vm: HostIntent) -> None:
        """Take over a change that concerns neither the VM's ports nor whether it is at its cap."""
        self._vm = vm
        self._limit.on_limit(vm.connections)

    def on_ports(self, vm: HostIntent, ports: PortRange, now: float, filling: Filling) -> None:
        """
        The VM has other ports, or has reached or left its cap: choose a new budget.

        :param filling: How full the ports were when last counted; some of those connections may have ended.
        """
        if self._ports.overlaps(ports):
            self._estimate.on_ports(
                ports.size,
                now,
                is_same_range=self._ports == ports,
                deferred_since=self._deferral.since if self._deferral.deferred else None,
                deferral_limit=self._budget.deferral_limit,
            )
            self._requests.on_granted()
        else:
            self._estimate = self._estimate.for_another_range(ports.size, now)
            self._requests = Requests(self._requests.share)
        self._vm, self._ports = vm, ports
        self._limit.on_limit(vm.connections)
        self._deferral.on_ports()
        self._refusal.on_ports(at_cap=vm.at_cap)
        self._estimate.on_former_count(filling)
        self.arm(now)
