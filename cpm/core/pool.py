"""
The external addresses, and the ports of theirs that edges use themselves.

Tested in ``tests/unit/site/test_own_ports.py`` and ``tests/unit/site/test_pool_overlaps.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from ipaddress import IPv4Address

from cpm.core import own_ports
from cpm.core.changes import DropAddress, Notice, PutAddress, PutOwnPorts
from cpm.core.fleet import Fleet
from cpm.core.journal import JournalEvent
from cpm.core.sizing.rules import PoolRules
from cpm.core.sizing.sizer import Sizer
from cpm.protocol import overlaps
from cpm.protocol.bounds import MAX_EXTERNALS, short
from cpm.protocol.errors import AddressOverlaps, Conflict, InvalidRequest, PortsInUse
from cpm.protocol.model import AllocationState, ExternalAddress, Node, NodeName, Role
from cpm.protocol.overlaps import Use
from cpm.protocol.own_ports import KeptPorts, OwnAddress
from cpm.protocol.wishes import pool_name


class Pool:
    """
    Changes the pool, and has VMs leave ports that an edge uses itself.

    :param retry_waiting: Called with the time when there may be ports for VMs that wait for some.
    """

    def __init__(
        self,
        fleet: Fleet,
        sizer: Sizer,
        rules: PoolRules,
        retry_waiting: Callable[[float], None],
    ) -> None:
        self._fleet = fleet
        self._sizer = sizer
        self._rules = rules
        self._retry_waiting = retry_waiting

    def add_addresses(self, addresses: Iterable[ExternalAddress], now: float) -> None:
        """
        Add external addresses, or replace pool and reserved ports of those that are there: all of them or none.

        VMs that have ports on an address keep them; those that are not to be in its new pool get their next ones
        elsewhere.

        :raise InvalidRequest: When the name of a pool is none.
        :raise AddressOverlaps: When one is an internal address, or that of a host.
        :raise PortsInUse: When a VM holds a port that is to be reserved.
        :raise Conflict: When there would be more than :data:`~cpm.protocol.bounds.MAX_EXTERNALS`.
        """
        addresses = tuple(addresses)
        for pool in dict.fromkeys(each.pool for each in addresses):
            _check_name(pool)
        known = {each.address for each in self._fleet.space.addresses}
        if len(known | {each.address for each in addresses}) > MAX_EXTERNALS:
            raise Conflict(f"a pool has at most {MAX_EXTERNALS} addresses; remove some first, or add fewer")
        for address in addresses:
            self._check_overlap(address.address)
            self._check_reserved(address)
        for address in addresses:
            self._fleet.record(PutAddress(address))
        self._retry_waiting(now)

    def remove_addresses(self, addresses: Iterable[IPv4Address]) -> None:
        """
        Take external addresses out of the pool: all of them or none.

        :raise NotFound: When one is not there.
        :raise AddressInUse: When VMs hold ranges on one.
        """
        addresses = dict.fromkeys(addresses)
        for address in addresses:
            self._fleet.space.check_removable(address)
        for address in addresses:
            self._fleet.record(DropAddress(address))

    def on_own_ports(self, node: Node, told: Iterable[OwnAddress], now: float) -> None:
        """Keep what an edge says that it uses itself, and have VMs leave it."""
        before = self._fleet.own_ports.get(node.name, ())
        here = told if Role.EDGE in node.roles else ()
        self._keep(node.name, own_ports.kept_after(before, node.name, here, now), now)

    def tick(self, now: float) -> None:
        """Give up ports that edges have not named for long."""
        for name, kept in list(self._fleet.own_ports.items()):
            self._keep(name, own_ports.kept_still(kept, now), now)

    def _keep(self, name: NodeName, kept: Iterable[KeptPorts], now: float) -> None:
        if (after := tuple(kept)) == self._fleet.own_ports.get(name, ()):
            return
        known = {allocation.id for allocation in self._fleet.space.in_the_way()}
        self._fleet.record(PutOwnPorts(name, after))
        for allocation in self._fleet.space.in_the_way():
            if allocation.id not in known and allocation.state in (AllocationState.RESERVED, AllocationState.ACTIVE):
                self._fleet.record(Notice(allocation.id, JournalEvent.OWN_PORT))
        self._sizer.leave_own_ports(now)
        self._retry_waiting(now)

    def _check_reserved(self, address: ExternalAddress) -> None:
        if (holder := self._fleet.space.holder_of_reserved(address)) is not None:
            vm = self._fleet.vms[holder.domain]
            raise PortsInUse(address.address, str(holder.ports), vm.name, vm.uuid)

    def _check_overlap(self, address: IPv4Address) -> None:
        pool = self._rules.internal
        if address in pool:
            use = Use.of(address, "external address")
            raise AddressOverlaps(address, f"it lies in the internal pool {pool}", overlaps.remedy(pool, [use]))
        for node in self._fleet.nodes.values():
            # An edge, which a single machine is too, receives what is for its own address and VMs' alike.
            if node.underlay == address and Role.EDGE not in node.roles:
                remedy = "its packets would not reach an edge; use an address that is routed to the edges"
                raise AddressOverlaps(address, f"it is the underlay address of host {node.name}", remedy)


def _check_name(pool: str) -> None:
    try:
        pool_name(pool)
    except ValueError as error:
        raise InvalidRequest(f"pool {short(pool)}: {error}") from None
