"""The index of all ports: which changes it refuses, and that a refused change changes nothing."""

from ipaddress import IPv4Address

import pytest

from cpm.core.placement import AddressSpace, Usage
from cpm.protocol.errors import AddressInUse, NotFound, Overloading
from cpm.protocol.model import (
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    NodeName,
    PortRange,
)

A, B = IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")


def allocation(
    number: int, ports: str, domain: str = "d", external: IPv4Address = A, state: str = "active"
) -> Allocation:
    return Allocation(
        AllocationId(number),
        DomainUUID(domain),
        NodeName("host1"),
        external,
        PortRange.parse(ports),
        AllocationState(state),
        since=0.0,
    )


@pytest.fixture
def space() -> AddressSpace:
    space = AddressSpace()
    space.add_address(ExternalAddress(A, (PortRange(5060, 5061), PortRange(80, 80))))
    space.add_address(ExternalAddress(B))
    return space


def test_a_new_address_is_free_except_for_reserved_ports(space: AddressSpace) -> None:
    assert space.free_runs(A) == (PortRange(1024, 5059), PortRange(5062, 65535))
    assert space.usage(A) == Usage(free=64510, taken=0, reserved=2)
    assert space.longest_free([B]) == space.longest_free() == 64512
    assert space.longest_free([A]) == 65536 - 5120


def test_releasing_what_was_taken_restores_the_free_runs(space: AddressSpace) -> None:
    before = space.free_runs(B)
    for number, ports in enumerate(["2048-2111", "2176-2239", "2112-2175"], 1):
        space.take(allocation(number, ports, external=B))
    assert space.free_runs(B) == (PortRange(1024, 2047), PortRange(2240, 65535))
    assert [each.id for each in space.on(B)] == [1, 3, 2]
    for number in (3, 1, 2):
        space.release(AllocationId(number))
    assert space.free_runs(B) == before
    assert space.of(DomainUUID("d")) == ()


@pytest.mark.parametrize(
    ("ports", "words"),
    [
        ("2111-2200", "overlaps 203.0.113.1 2048-2111 of d (active)"),
        ("2000-2048", "overlaps"),
        ("2050-2060", "overlaps"),
        ("2000-2300", "overlaps"),
        ("5056-5119", "reserved ports"),
        ("1000-1030", "is not within 1024-65535"),
    ],
)
def test_overloading_is_refused_and_changes_nothing(space: AddressSpace, ports: str, words: str) -> None:
    space.take(allocation(1, "2048-2111"))
    before = space.free_runs(A), space.on(A)
    with pytest.raises(Overloading) as caught:
        space.take(allocation(2, ports, "e"))
    assert words in caught.value.detail
    assert (space.free_runs(A), space.on(A)) == before


def test_port_numbers_of_one_vm_are_disjoint_across_addresses(space: AddressSpace) -> None:
    space.take(allocation(1, "2048-2111"))
    with pytest.raises(Overloading, match="shares port numbers"):
        space.take(allocation(2, "2048-2111", external=B))
    space.take(allocation(3, "2048-2111", "another", external=B))


def test_an_id_in_use_is_refused(space: AddressSpace) -> None:
    space.take(allocation(1, "2048-2111"))
    with pytest.raises(Overloading, match="there already"):
        space.take(allocation(1, "3072-3135"))


def test_change_of_state_and_range(space: AddressSpace) -> None:
    space.take(allocation(1, "2048-2111"))
    space.change(allocation(1, "2048-2111", state="draining"))
    assert space.of(DomainUUID("d"))[0].state is AllocationState.DRAINING
    space.change(allocation(1, "2048-2175"))
    assert space.usage(A).taken == 128


def test_refused_change_leaves_the_old_version(space: AddressSpace) -> None:
    space.take(allocation(1, "2048-2111"))
    space.take(allocation(2, "2112-2175", "e"))
    before = space.free_runs(A), space.on(A)
    with pytest.raises(Overloading):
        space.change(allocation(1, "2048-2175"))
    assert (space.free_runs(A), space.on(A)) == before


def test_reserving_a_held_port_is_refused(space: AddressSpace) -> None:
    space.take(allocation(1, "2048-2111"))
    with pytest.raises(Overloading, match="to be reserved"):
        space.add_address(ExternalAddress(A, (PortRange(2100, 2100),)))
    assert space.addresses[0].reserved[0] == PortRange(5060, 5061)
    space.add_address(ExternalAddress(A, (PortRange(2112, 2112),)))
    assert space.free_runs(A) == (PortRange(1024, 2047), PortRange(2113, 65535))


def test_an_address_in_use_cannot_be_removed(space: AddressSpace) -> None:
    space.take(allocation(1, "2048-2111"))
    with pytest.raises(AddressInUse):
        space.remove_address(A)
    space.remove_address(B)
    assert [address.address for address in space.addresses] == [A]


def test_unknown_addresses_and_ids_are_not_found(space: AddressSpace) -> None:
    nowhere = IPv4Address("203.0.113.9")
    with pytest.raises(NotFound):
        space.take(allocation(1, "2048-2111", external=nowhere))
    with pytest.raises(NotFound):
        space.release(AllocationId(7))
    with pytest.raises(NotFound):
        space.remove_address(nowhere)
    with pytest.raises(NotFound):
        space.longest_free([nowhere])
    with pytest.raises(ValueError, match="block"):
        AddressSpace(0)


def test_ports_of_a_machine_are_not_free_whether_the_address_is_there_yet_or_not(space: AddressSpace) -> None:
    other = IPv4Address("203.0.113.3")
    for address in (B, other):
        space.keep_own(address, [PortRange(2048, 2111)])
    space.add_address(ExternalAddress(other))
    for address in (B, other):
        assert space.free_runs(address) == (PortRange(1024, 2047), PortRange(2112, 65535))
        assert space.usage(address) == Usage(free=64448, taken=0, reserved=64)
    with pytest.raises(Overloading, match="a machine's own"):
        space.take(allocation(1, "2100-2163", external=B, state="reserved"))
    space.keep_own(B, [])
    space.take(allocation(1, "2100-2163", external=B, state="reserved"))


def test_a_vm_keeps_what_became_a_machines_until_it_is_released(space: AddressSpace) -> None:
    held = allocation(1, "2048-2175", external=B)
    space.take(held)
    space.keep_own(B, [PortRange(2100, 2100)])
    assert space.in_the_way() == (held,)
    assert space.usage(B).taken == 128
    space.change(allocation(1, "2048-2111", external=B, state="draining"))
    space.take(allocation(2, "2112-2175", external=B, state="draining"))
    with pytest.raises(Overloading, match="overlaps"):
        space.take(allocation(3, "2100-2100", "e", external=B, state="held"))
    space.release(AllocationId(1))
    assert space.in_the_way() == ()
    assert space.free_runs(B) == (PortRange(1024, 2099), PortRange(2101, 2111), PortRange(2176, 65535))
    assert space.free_ports() + space.taken_ports() == 2 * 64512 - 2 - 1
