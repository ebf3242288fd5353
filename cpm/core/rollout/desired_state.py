"""
What each node should hold, computed from the fleet by pure functions.

They determine the order of a change: edges map every range of a VM that is not *held* (:func:`edge_vm`); a host uses a
*reserved* range only when it is in ``ready``, that is, when the edges have confirmed it, and never uses a *draining*
range for new connections (:func:`host_vm`). It keeps the connections of a draining range also while the VM takes that
back. Tested with the rollout in ``tests/unit/site/test_order.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Container, Mapping
from ipaddress import IPv4Network

from cpm.core import moves
from cpm.core.fleet import Fleet
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.intent import EdgeIntent, ExternalRange, HostForward, HostIntent
from cpm.protocol.messages import PathState
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ForwardOrigin,
    Node,
    NodeName,
    PortRange,
    Role,
    coalesce,
)
from cpm.protocol.timeouts import Timeouts

_State = AllocationState


def host_vm(
    fleet: Fleet,
    vm: VM,
    node: Node,
    present: Mapping[DomainUUID, NodeName],
    ready: Container[AllocationId],
    wishes: EffectiveWishes,
    used: Collection[PortRange] = (),
) -> HostIntent | None:
    """
    Return what this host should hold for a VM; None: nothing.

    :param present: The host that each running VM is on.
    :param ready: Reserved allocations that the edges already map.
    :param wishes: Those in effect: the VM's cap in ports, draining ones included (held ones it may take back), and the
        limits of its connections.
    :param used: Ports on which this host may have connections of the VM.
    """
    if Role.HOST not in node.roles or present.get(vm.uuid) != node.name:
        return None
    here = [allocation for allocation in fleet.of(vm.uuid) if allocation.node == node.name]
    active = next((a for a in here if a.state is _State.ACTIVE), None)
    reserved = next((a for a in here if a.state is _State.RESERVED and a.id in ready), None)
    current, ports = active, active.ports if active is not None else None
    if reserved is not None:
        longer = active is not None and moves.is_extension(active, reserved)
        ports = reserved.ports.join_with(active.ports) if active is not None and longer else reserved.ports
        current = reserved
    # The range that is being replaced may have connections, too: its host keeps and counts them from the first moment.
    is_replaced = active is not None and ports is not None and not active.ports.overlaps(ports)
    # Nor does it let go of a range that drained, and that the VM takes back, before it may use it.
    taken_back = [a for a in here if a.state is _State.RESERVED and any(each.overlaps(a.ports) for each in used)]
    leaving = [a for a in here if a.state is _State.DRAINING or (is_replaced and a is active)]
    draining = tuple(sorted(a.ports for a in (*leaving, *taken_back) if a is not reserved))
    forwards = [each for each in fleet.forwards_of(vm.uuid) if each.node == node.name]
    let_in = tuple(_host_forward(each) for each in sorted(forwards, key=_by_ports) if _is_let_in(each, ready))
    leaving_forwards = tuple(
        sorted(
            each.ports
            for each in forwards
            if each.state is _State.DRAINING
            # As with a range that is taken back.
            or (each.state is _State.RESERVED and each.id not in ready and any(u.overlaps(each.ports) for u in used))
        )
    )
    if ports is None and not draining and not let_in and not leaving_forwards:
        return None
    return HostIntent(
        vm.uuid,
        vm.name,
        vm.internal,
        ports,
        draining,
        external=current.external if current is not None else None,
        at_cap=ports is not None
        and ports.size + sum(each.size for each in draining) + fleet.space.block > wishes.cap.value,
        connections=wishes.connections.value,
        connection_rate=wishes.connection_rate.value,
        filtering=wishes.filtering.value,
        port_control=wishes.pcp.value,
        forwards=let_in,
        leaving_forwards=leaving_forwards,
    )


def _is_let_in(forward: Allocation, ready: Container[AllocationId]) -> bool:
    return forward.state is _State.ACTIVE or (forward.state is _State.RESERVED and forward.id in ready)


def _by_ports(allocation: Allocation) -> PortRange:
    return allocation.ports


def _host_forward(allocation: Allocation) -> HostForward:
    forward = allocation.forward
    assert forward is not None
    external = allocation.external if forward.origin is ForwardOrigin.PCP else None
    return HostForward(allocation.ports, forward.to, forward.protocol, forward.guest, external)


def edge_vm(fleet: Fleet, uuid: DomainUUID, node: Node) -> EdgeIntent | None:
    """Return what this edge should hold for a VM; None: nothing."""
    vm = fleet.vms.get(uuid)
    host = fleet.nodes.get(vm.node) if vm is not None else None
    mapped = [allocation for allocation in fleet.all_of(uuid) if allocation.state is not _State.HELD]
    if vm is None or host is None or not mapped or Role.EDGE not in node.roles:
        return None
    ranges = tuple(
        ExternalRange(external, ports)
        for external in sorted({allocation.external for allocation in mapped})
        for ports in coalesce(a.ports for a in mapped if a.external == external)
    )
    return EdgeIntent(uuid, vm.name, vm.internal, None if host.name == node.name else host.underlay, ranges)


def path(fleet: Fleet, node: Node, internal_pool: IPv4Network, timeouts: Timeouts) -> PathState:
    """Return what this node should know of the whole site: routes, external addresses, timeouts."""
    own_edge = Role.EDGE in node.roles
    edges = sorted(
        other.underlay
        for other in fleet.nodes.values()
        if Role.EDGE in other.roles and other.in_service and not other.fenced
    )
    externals = sorted(address.address for address in fleet.space.addresses)
    return PathState(
        internal_pool,
        edges=tuple(edges) if Role.HOST in node.roles and not own_edge else (),
        externals=tuple(externals) if own_edge else (),
        timeouts=timeouts if Role.HOST in node.roles else None,
        edge_names=tuple(sorted(edge.name for edge in fleet.edges.values() if not edge.fenced)),
    )
