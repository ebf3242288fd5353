"""Short constructors for the values that these tests use most."""

from ipaddress import IPv4Address

from cpm.core.changes import AddAllocation, Expected, FreeAllocation, MoveAllocation
from cpm.core.timeline import Position
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    Node,
    NodeName,
    PortRange,
    Role,
)
from cpm.protocol.walltime import WallTime

A, B = IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")


def at(seconds: float) -> Position:
    """A moment in a journal whose clock was never set."""
    return Position(WallTime.of(seconds), 0, None)


def node(name: str) -> Node:
    return Node(NodeName(name), frozenset(Role), IPv4Address("172.30.0.1"))


def vm(uuid: str, name: str = "", host: str = "host1", internal: int | None = None) -> VM:
    number = sum(uuid.encode()) if internal is None else internal
    return VM(DomainUUID(uuid), name or f"vm-{uuid}", NodeName(host), IPv4Address("100.64.0.0") + number)


def external(address: IPv4Address, *reserved: str) -> ExternalAddress:
    return ExternalAddress(address, tuple(PortRange.parse(ports) for ports in reserved))


def allocation(
    number: int, domain: str, ports: str, state: str = "reserved", address: IPv4Address = A, since: float = 1.0
) -> Allocation:
    return Allocation(
        AllocationId(number),
        DomainUUID(domain),
        NodeName("host1"),
        address,
        PortRange.parse(ports),
        AllocationState(state),
        since,
    )


def add(
    number: int, domain: str, ports: str, state: str = "reserved", address: IPv4Address = A, since: float = 1.0
) -> AddAllocation:
    return AddAllocation(allocation(number, domain, ports, state, address, since))


def expected(ports: str, state: str) -> Expected:
    return PortRange.parse(ports), AllocationState(state)


def move(
    number: int, before: Expected, ports: str, state: str, since: float = 2.0, host: str | None = None
) -> MoveAllocation:
    return MoveAllocation(
        AllocationId(number),
        before,
        PortRange.parse(ports),
        AllocationState(state),
        since,
        None if host is None else NodeName(host),
    )


def free(number: int, ports: str, state: str) -> FreeAllocation:
    return FreeAllocation(AllocationId(number), expected(ports, state))
