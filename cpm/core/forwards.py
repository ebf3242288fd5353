"""
Forwards: connections from outside that are let in to a VM, each on ports of its own.

A forward is an allocation that no policy and no compaction touches, besides the range of its VM: in the same ledger,
journal and index, with the same states, so that a port of a forward has one owner for the same reasons as any other.
While its VM does not run, a forward that is kept is *held* and never expires; when the VM runs again, on whichever
host, it is reserved again for that host (:mod:`cpm.core.rollout.steps`).

A forward comes from the operator, from the domain's XML, which is followed, or from the guest for a limited time.

Tested in ``tests/unit/site/test_forwards.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from ipaddress import IPv4Address
from typing import Final

from cpm.core import moves
from cpm.core.changes import PutForward
from cpm.core.eligible import Eligible
from cpm.core.fleet import Fleet
from cpm.core.lifecycle import AllocationEvent
from cpm.core.own_ports import KEPT_S
from cpm.core.placement import place_forward
from cpm.core.quotas import Quota
from cpm.protocol.bounds import FIRST_PORT, MAX_FORWARD_PORTS, MAX_FORWARDS
from cpm.protocol.errors import (
    Conflict,
    InvalidRequest,
    NotFound,
    PortHeld,
    PortsExhausted,
    QuotaReached,
    VirtPortsError,
)
from cpm.protocol.ledger_errors import LedgerDoubted
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    Forward,
    ForwardOrigin,
    ForwardProtocol,
    NodeName,
    PortRange,
    WishedForward,
)

_State = AllocationState

RETRY_S: Final = 5.0
"""Seconds between attempts to give VMs the forwards that their XML names and that they could not have."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ForwardRequest:
    """A forward that somebody asks for."""

    to: PortRange
    """The guest's ports."""
    ports: PortRange | None = None
    """The external ports, as many; None: any."""
    address: IPv4Address | None = None
    """The external address; None: the VM's, if it has one."""
    protocol: ForwardProtocol = ForwardProtocol.TCP
    guest: IPv4Address | None = None
    """The guest's own address; None: the one that its host finds."""
    is_kept: bool = True
    """Whether it stays the VM's while the VM does not run."""
    origin: ForwardOrigin = ForwardOrigin.SET
    ends: float | None = None
    """Ledger time at which it ends unless it is renewed; None: it does not end by itself."""


class Forwards:
    """
    Gives VMs forwards and takes them back.

    :param present: The host of each VM that runs, always as of now.
    :param eligible: Returns where a VM is to have its ports, unless somebody says otherwise of a forward.
    :param quota: Returns what a host may have.
    :param is_free_at: Returns the ledger time from which a leaving allocation waits for confirmations only.
    """

    def __init__(
        self,
        fleet: Fleet,
        present: Mapping[DomainUUID, NodeName],
        eligible: Callable[[VM], Eligible],
        quota: Callable[[NodeName], Quota],
        is_free_at: Callable[[Allocation], float],
    ) -> None:
        self._fleet = fleet
        self._present = present
        self._eligible = eligible
        self._quota = quota
        self._is_free_at = is_free_at
        self._retry_at = 0.0
        self.refused: dict[DomainUUID, tuple[str, ...]] = {}
        """Why VMs lack forwards that their XML names, a sentence each."""

    def add(self, vm: VM, request: ForwardRequest, now: float) -> Allocation:
        """
        Let connections in to a VM. What it has already is returned as it is; the other protocol joins it.

        :param now: Ledger time.
        :raise InvalidRequest: When the request contradicts itself.
        :raise NotFound: When the address is not in the pool.
        :raise PortHeld: When somebody has one of the ports.
        :raise PortsExhausted: When any ports will do, and none are free.
        :raise QuotaReached: When its host has as many ports as it may have.
        :raise Conflict: When it has as many forwards as it may have.
        :raise LedgerDoubted: When no VM may get ports.
        :raise LedgerUnwritable: When the ledger cannot be written.
        """
        _check(request)
        if (same := self._same(vm, request)) is not None:
            return self._join(same, request)
        if self._fleet.unwritable is not None:
            raise self._fleet.unwritable
        if why := self._fleet.why_no_new:
            raise LedgerDoubted(why)
        self._check_limits(vm, request.to.size)
        forward = Forward(
            to=request.to.first,
            protocol=request.protocol,
            guest=request.guest,
            is_kept=request.is_kept,
            origin=request.origin,
            ends=request.ends,
        )
        address = request.address or self._address_of(vm)
        if request.address is not None and not self._fleet.space.has_address(request.address):
            raise NotFound("external address", str(request.address), "see `virt-ports pool list`")
        among = (request.address,) if request.address is not None else self._among(vm, request.to.size)
        if request.ports is None:
            external, ports = place_forward(self._fleet.space, vm.uuid, request.to.size, among)
        else:
            external, ports = self._free_address(request.ports, address, among), request.ports
            if (former := self._former(vm, external, ports)) is not None:
                self._fleet.record(PutForward(former.id, forward))
                return self._fleet.allocation(former.id) or former
            self._check_free(vm, external, ports)
        return self._put(vm, external, ports, forward, now)

    def remove(self, forward: Allocation, now: float) -> None:
        """Let nothing new in by a forward; what is open stays, and then its ports become free."""
        if forward.forward is None or not forward.forward.is_wanted:
            return
        self._fleet.record(PutForward(forward.id, dataclasses.replace(forward.forward, is_wanted=False)))
        self._end(forward.id, now)

    def renew(self, forward: Allocation, ends: float | None) -> None:
        """Let a forward end at another time."""
        if forward.forward is not None and forward.forward.ends != ends:
            self._fleet.record(PutForward(forward.id, dataclasses.replace(forward.forward, ends=ends)))

    def free_ports(self, vm: VM, size: int) -> PortRange | None:
        """Return ports that a VM could be given now; None: there are not so many side by side."""
        address = self._address_of(vm)
        try:
            among = (address,) if address is not None else self._among(vm, size)
            return place_forward(self._fleet.space, vm.uuid, size, among)[1]
        except PortsExhausted:
            return None

    def on_started(self, vm: VM, now: float) -> None:
        """Record that a VM runs, or that its XML is known: it gets the forwards that the XML names, and no others."""
        if vm.xml_wishes.forwards or vm.uuid in self.refused or self._fleet.forwards_of(vm.uuid):
            self._follow(vm, now)

    def on_stopped(self, uuid: DomainUUID, now: float) -> None:
        """Record that a VM does not run any more: its host lets go of its forwards; those that are kept rest."""
        self.refused.pop(uuid, None)
        for allocation in self._fleet.forwards_of(uuid):
            forward = allocation.forward
            assert forward is not None
            if forward.is_wanted and not forward.is_kept:
                self.remove(allocation, now)
            else:
                self._end(allocation.id, now)

    def tick(self, now: float, connected: Container[NodeName]) -> None:
        """
        End what has not been renewed in time, and try again what was refused.

        :param connected: The nodes that can be heard: a host that is away may have renewed what its VMs have.
        """
        for allocation in [*self._fleet.forwards.values()]:
            forward = allocation.forward
            if forward is None or forward.ends is None or not forward.is_wanted or allocation.node not in connected:
                continue
            if now >= forward.ends:
                self.remove(allocation, now)
        if self.refused and now >= self._retry_at and self._fleet.unwritable is None and not self._fleet.why_no_new:
            self._retry_at = now + RETRY_S
            for uuid in list(self.refused):
                if (vm := self._fleet.vms.get(uuid)) is None:
                    del self.refused[uuid]
                else:
                    self._follow(vm, now)

    def _put(self, vm: VM, external: IPv4Address, ports: PortRange, forward: Forward, now: float) -> Allocation:
        reserved = moves.add_forward(self._fleet, vm, external, ports, forward, now)
        if self._present.get(vm.uuid) != vm.node:
            # It rests until the VM runs.
            self._end(reserved.id, now)
        return self._fleet.allocation(reserved.id) or reserved

    def _end(self, number: AllocationId, now: float) -> None:
        allocation = self._fleet.allocation(number)
        if allocation is not None and allocation.state in (_State.RESERVED, _State.ACTIVE):
            moves.advance(self._fleet, allocation, AllocationEvent.RELEASED, now)

    # The domain's XML

    def _follow(self, vm: VM, now: float) -> None:
        missing = list(vm.xml_wishes.forwards)
        for allocation in self._fleet.forwards_of(vm.uuid):
            forward = allocation.forward
            if forward is None or not forward.is_wanted or forward.origin is not ForwardOrigin.METADATA:
                continue
            wish = next((wish for wish in missing if _is_of(wish, allocation, forward)), None)
            if wish is None:
                self.remove(allocation, now)
                continue
            missing.remove(wish)
            if wish.is_kept != forward.is_kept:
                self._fleet.record(PutForward(allocation.id, dataclasses.replace(forward, is_kept=wish.is_kept)))
        reasons = tuple(filter(None, (self._why_not(vm, wish, now) for wish in missing)))
        self.refused.pop(vm.uuid, None)
        if reasons:
            self.refused[vm.uuid] = reasons

    def _why_not(self, vm: VM, wish: WishedForward, now: float) -> str:
        """Give a VM a forward of its XML; return why it cannot have it, empty: it has it."""
        request = ForwardRequest(
            to=wish.to,
            ports=wish.ports,
            address=wish.address,
            protocol=wish.protocol,
            guest=wish.guest,
            is_kept=wish.is_kept,
            origin=ForwardOrigin.METADATA,
        )
        try:
            self.add(vm, request, now)
        except VirtPortsError as error:
            return f"forward of {wish.ports or 'any port'} to {wish.to}: {error}"
        return ""

    # What there is

    def _same(self, vm: VM, request: ForwardRequest) -> Allocation | None:
        """Return a forward of the VM's with which a request is met, perhaps by adding its protocol."""
        for allocation in self._fleet.forwards_of(vm.uuid):
            forward = allocation.forward
            if (
                forward is not None
                and forward.is_wanted
                and (forward.to, forward.guest, forward.origin) == (request.to.first, request.guest, request.origin)
                and allocation.ports == (request.ports or allocation.ports)
                and allocation.ports.size == request.to.size
                and allocation.external == (request.address or allocation.external)
                # Without a port, only the very same is meant: another protocol may have another port.
                and (request.ports is not None or request.protocol is forward.protocol)
            ):
                return allocation
        return None

    def _join(self, allocation: Allocation, request: ForwardRequest) -> Allocation:
        forward = allocation.forward
        assert forward is not None
        protocol = forward.protocol if forward.protocol is request.protocol else ForwardProtocol.BOTH
        after = dataclasses.replace(forward, protocol=protocol, is_kept=request.is_kept, ends=request.ends)
        if after != forward:
            self._fleet.record(PutForward(allocation.id, after))
        return self._fleet.allocation(allocation.id) or allocation

    def _former(self, vm: VM, external: IPv4Address, ports: PortRange) -> Allocation | None:
        """Return a forward of the VM's that was removed and whose ports are not free yet."""
        return next(
            (
                each
                for each in self._fleet.forwards_of(vm.uuid)
                if (each.external, each.ports) == (external, ports) and not each.is_wanted_forward
            ),
            None,
        )

    def _address_of(self, vm: VM) -> IPv4Address | None:
        """Return the address on which the VM gets forwards; None: any on which it is to have ports."""
        among = self._eligible(vm).addresses
        held = sorted(self._fleet.all_of(vm.uuid), key=lambda each: (each.forward is not None, -each.since))
        return next((each.external for each in held if each.external in among), None)

    def _among(self, vm: VM, size: int) -> Collection[IPv4Address]:
        """:raise NoRoomError: When the VM is to have ports of a pool, or an address, that does not exist."""
        wished = self._eligible(vm)
        wished.require(size)
        return wished.addresses

    def _free_address(
        self, ports: PortRange, address: IPv4Address | None, among: Collection[IPv4Address]
    ) -> IPv4Address:
        """Return the address on which a VM asks for these ports: its own, else the first on which they are free."""
        if address is not None:
            return address
        known = list(among)
        if not known:
            raise NotFound("external address", "in the pool", "see `virt-ports pool add --help`")
        return next((each for each in known if not any(self._obstacles(each, ports))), known[0])

    # Limits

    def _check_limits(self, vm: VM, size: int) -> None:
        wanted = [each for each in self._fleet.forwards_of(vm.uuid) if each.is_wanted_forward]
        if len(wanted) >= MAX_FORWARDS or sum(each.ports.size for each in wanted) + size > MAX_FORWARD_PORTS:
            limits = f"{MAX_FORWARDS} forwards with {MAX_FORWARD_PORTS} ports in all"
            raise Conflict(f"VM {vm.name} may have {limits}; remove some, see `virt-ports forward list {vm.uuid}`")
        quota = self._quota(vm.node)
        if self._fleet.use.ports(vm.node) + size > quota.ports:
            raise QuotaReached(vm.node, "ports", quota.ports)

    def _check_free(self, vm: VM, external: IPv4Address, ports: PortRange) -> None:
        for other in self._fleet.all_of(vm.uuid):
            if other.ports.overlaps(ports) and other.external != external:
                where = f"VM {vm.name} has port numbers {other.ports} on {other.external}"
                raise Conflict(f"{where}, and all its ports lead to one internal address; use other ports")
        for obstacle in self._obstacles(external, ports):
            raise obstacle

    def _obstacles(self, external: IPv4Address, ports: PortRange) -> Iterator[PortHeld]:
        space = self._fleet.space
        reserved = next(each.reserved for each in space.addresses if each.address == external)
        for each in reserved:
            if each.overlaps(ports):
                remedy = f"give it up with `virt-ports pool add {external} --reserved PORTS`, or use another port"
                yield PortHeld(external, _words(each), "the operator", "while it is reserved in the pool", remedy)
        for kept in self._fleet.own_ports_of(external, ports):
            until = "as long as it uses them" if kept.gone is None else f"until {self._time(kept.gone + KEPT_S)}"
            yield PortHeld(external, _words(kept.ports), f"the machine {kept.node}", until, "use another port")
        for other in space.on(external):
            if other.ports.overlaps(ports):
                vm = self._fleet.vms[other.domain]
                until, remedy = self._until(other)
                yield PortHeld(external, _words(other.ports), f"VM {vm.name} ({vm.uuid})", until, remedy)

    def _until(self, other: Allocation) -> tuple[str, str]:
        """Return until when somebody has ports, and what to do."""
        if other.is_wanted_forward:
            forward = other.forward
            ends = forward.ends if forward is not None else None
            until = "until its forward is removed" if ends is None else f"until {self._time(ends)} unless it is renewed"
            return until, f"see `virt-ports forward list {other.domain}`, or use another port"
        if other.state is _State.HELD:
            return f"until {self._time(self._is_free_at(other))}", "try again then, or use another port"
        if other.state is _State.DRAINING:
            return "until its last connection on them has ended", "try again later, or use another port"
        return "as long as it needs them", f"use another port, or `virt-ports relocate {other.domain}` and try later"

    def _time(self, at: float) -> str:
        return str(self._fleet.timeline.wall(at))


def _check(request: ForwardRequest) -> None:
    """:raise InvalidRequest: When a request contradicts itself."""
    ports = request.ports
    if request.to.first < 1:
        raise InvalidRequest("a guest has no port 0; use 1 to 65535")
    if ports is None:
        return
    if ports.size != request.to.size:
        sizes = f"{_count(ports)} outside and {_count(request.to)} of the guest"
        raise InvalidRequest(f"{sizes} do not match; use ranges of one length")
    if ports.first < 1:
        raise InvalidRequest("an external address has no port 0; use 1 to 65535")
    if ports.first < FIRST_PORT <= ports.last:
        raise InvalidRequest(f"{ports} has ports below {FIRST_PORT} and others; use one forward for each part")


def _is_of(wish: WishedForward, allocation: Allocation, forward: Forward) -> bool:
    """Return whether a forward is the one that the XML names."""
    return (
        (forward.to, forward.protocol, forward.guest) == (wish.to.first, wish.protocol, wish.guest)
        and allocation.ports == (wish.ports or allocation.ports)
        and allocation.ports.size == wish.to.size
        and allocation.external == (wish.address or allocation.external)
    )


def _words(ports: PortRange) -> str:
    return str(ports.first) if ports.size == 1 else str(ports)


def _count(ports: PortRange) -> str:
    return "1 port" if ports.size == 1 else f"{ports.size} ports"
