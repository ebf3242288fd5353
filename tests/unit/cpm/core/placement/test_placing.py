"""Where ranges are placed, how they grow and shrink, and overflow ranges."""

import dataclasses
from ipaddress import IPv4Address

import pytest

from cpm.core.placement import AddressSpace, Placement, place, place_larger, place_overflow, shrink, whole_blocks
from cpm.core.placement.shortfall import NoRoom, NoRoomError, Obstacle
from cpm.protocol.errors import PortsExhausted
from cpm.protocol.model import Allocation, AllocationId, DomainUUID, ExternalAddress, NodeName, PortRange
from tests.unit.cpm.core.placement.test_space import A, B, allocation

D = DomainUUID("d")


def space_with(*taken: Allocation, addresses: tuple[IPv4Address, ...] = (A, B)) -> AddressSpace:
    space = AddressSpace()
    for address in addresses:
        space.add_address(ExternalAddress(address))
    for each in taken:
        space.take(each)
    return space


@pytest.mark.parametrize(("ports", "rounded"), [(0, 64), (1, 64), (64, 64), (65, 128), (65535, 64512), (10**9, 64512)])
def test_sizes_are_whole_blocks_and_fit_an_address(ports: int, rounded: int) -> None:
    assert whole_blocks(ports, 64) == rounded


def test_sizes_with_a_block_that_does_not_divide_an_address() -> None:
    assert whole_blocks(65535, 1000) == 64000


def test_best_fit_takes_the_smallest_run_that_is_long_enough() -> None:
    space = space_with(
        allocation(1, "1280-1343", "x"), allocation(2, "1472-65535", "y"), allocation(3, "1344-65535", "z", external=B)
    )
    # Free: 1024-1279 (256) and 1344-1471 (128) on A, 1024-1343 (320) on B.
    assert place(space, D, 100).ports == PortRange(1344, 1471)
    assert place(space, D, 129).ports == PortRange(1024, 1215)
    assert place(space, D, 300).external == B


def test_the_preferred_address_is_searched_first() -> None:
    space = space_with(allocation(1, "1088-65535", "x"))
    assert place(space, D, 64, prefer=B).external == B
    assert place(space, D, 64).external == A
    assert place(space, D, 128, prefer=A).external == B


def test_strict_searches_the_preferred_address_only() -> None:
    space = space_with(allocation(1, "1088-65535", "x"))
    with pytest.raises(NoRoomError) as caught:
        place(space, D, 128, prefer=A, strict=True)
    assert (caught.value.wanted, caught.value.longest_free) == (128, 64)
    assert caught.value.no_room == NoRoom(128, 64, Obstacle.NO_FREE_RUN, 1, A)


def test_an_empty_pool_is_the_reason_of_the_error() -> None:
    with pytest.raises(NoRoomError) as caught:
        place(AddressSpace(), D, 64)
    assert caught.value.no_room.obstacle is Obstacle.NO_ADDRESS


def test_a_whole_leaving_range_of_the_vm_is_taken_back() -> None:
    held = allocation(1, "4096-4159", state="held")
    placement = place(space_with(held), D, 64)
    assert (placement.external, placement.ports, placement.reclaimed) == (A, held.ports, (held,))
    assert placement.left_of(held) == ()


def test_a_leaving_range_is_taken_back_in_part_or_with_adjacent_free_ports() -> None:
    held = allocation(1, "4096-4351", state="draining")
    smaller = place(space_with(held), D, 64)
    assert smaller.ports == PortRange(4096, 4159)
    assert smaller.left_of(held) == (PortRange(4160, 4351),)
    assert place(space_with(held), D, 512).ports == PortRange(4096, 4607)


def test_held_ports_of_another_vm_are_not_available() -> None:
    space = space_with(allocation(1, "1024-65535", "x", state="held"), addresses=(A,))
    with pytest.raises(PortsExhausted):
        place(space, D, 64)


def test_port_numbers_held_on_another_address_are_avoided() -> None:
    own = allocation(1, "1024-1087", state="active")
    space = space_with(own, allocation(2, "1088-65535", "x"))
    assert place(space, D, 64, prefer=A).ports == PortRange(1088, 1151)


def test_port_numbers_held_on_another_address_can_be_the_reason_of_the_error() -> None:
    space = space_with(
        allocation(1, "1024-1087"),
        allocation(2, "1088-65535", "x"),
        allocation(3, "1088-65535", "y", external=B),
    )
    with pytest.raises(NoRoomError) as caught:
        place(space, D, 64)
    assert caught.value.no_room.obstacle is Obstacle.OWN_NUMBERS


@pytest.mark.parametrize(
    ("others", "wanted", "ports"),
    [
        ([], 128, "4096-4223"),  # upwards
        (["4160-4223"], 128, "4032-4159"),  # downwards
        (["4224-4287"], 256, "3904-4159"),  # downwards rather than on both sides
        (["4224-4287", "3904-3967"], 256, "3968-4223"),  # both
    ],
)
def test_a_range_grows_in_place_up_then_down_then_both(others: list[str], wanted: int, ports: str) -> None:
    active = allocation(1, "4096-4159")
    space = space_with(active, *(allocation(n, each, "x") for n, each in enumerate(others, 2)))
    placement = place_larger(space, active, wanted)
    assert placement.in_place
    assert (placement.external, placement.ports) == (A, PortRange.parse(ports))


def test_a_range_grows_over_draining_ports_of_the_vm() -> None:
    active, draining = allocation(1, "4096-4159"), allocation(2, "4160-4287", state="draining")
    placement = place_larger(space_with(active, draining, allocation(3, "4288-4351", "x")), active, 128)
    assert placement.ports == PortRange(4096, 4223)
    assert placement.reclaimed == (draining,)
    assert placement.left_of(draining) == (PortRange(4224, 4287),)


def test_a_range_without_room_moves_on_its_address_then_to_another() -> None:
    active = allocation(1, "4096-4159")
    walls = allocation(2, "4032-4095", "x"), allocation(3, "4160-4223", "x")
    placement = place_larger(space_with(active, *walls), active, 128)
    assert (placement.external, placement.in_place) == (A, False)
    full = allocation(4, "1024-4031", "y"), allocation(5, "4224-65535", "z")
    elsewhere = place_larger(space_with(active, *walls, *full), active, 128)
    assert (elsewhere.external, elsewhere.ports) == (B, PortRange(1024, 1151))
    with pytest.raises(PortsExhausted):
        place_larger(space_with(active, *walls, *full), active, 128, strict=True)


def test_growing_to_the_present_size_returns_the_active_range() -> None:
    active = allocation(1, "4096-4223")
    placement = place_larger(space_with(active), active, 100)
    assert (placement.ports, placement.in_place) == (active.ports, True)


def test_a_range_grows_to_a_whole_address_at_most() -> None:
    active = allocation(1, "4096-4159")
    assert place_larger(space_with(active), active, 10**6).ports == PortRange(1024, 65535)


SHRUNK = pytest.mark.parametrize(
    ("wanted", "kept", "released"),
    [
        (64, "4096-4159", "4160-4351"),
        (65, "4096-4223", "4224-4351"),
        (256, "4096-4351", None),
        (999, "4096-4351", None),
    ],
)


@SHRUNK
def test_shrink_upper_keeps_the_high_end(wanted: int, kept: str, released: str | None) -> None:
    def mirrored(ports: PortRange) -> PortRange:
        return PortRange(8447 - ports.last, 8447 - ports.first)

    result = shrink(allocation(1, "4096-4351"), wanted, 64, upper=True)
    assert mirrored(result.kept) == PortRange.parse(kept)
    assert (mirrored(result.released) if result.released else None) == (PortRange.parse(released) if released else None)


@SHRUNK
def test_shrink_keeps_the_low_end(wanted: int, kept: str, released: str | None) -> None:
    result = shrink(allocation(1, "4096-4351"), wanted, 64)
    assert result.kept == PortRange.parse(kept)
    assert result.released == (PortRange.parse(released) if released else None)


ACTIVE = allocation(1, "1024-1279", "d")
DRAINING = allocation(2, "1344-1599", "d", state="draining")
ON_B = allocation(3, "1024-65535", "z", external=B)


def overflow_placement(
    *others: Allocation,
    lacking: int | None = 128,
    least_free: int = 0,
    free_in: dict[int, int] | None = None,
    strict: bool = False,
) -> Placement:
    known = {AllocationId(number): free for number, free in (free_in or {}).items()}
    return place_overflow(space_with(ACTIVE, *others), ACTIVE, lacking, least_free, known, strict=strict)


def test_an_overflow_range_is_the_shortest_run_with_the_ports_lacking() -> None:
    taken = (allocation(4, "1280-1343", "x"), allocation(5, "1536-1599", "x"), allocation(6, "1664-65535", "y"), ON_B)
    # Free: 1344-1535 (192) and 1600-1663 (64).
    assert overflow_placement(*taken, lacking=64).ports == PortRange(1600, 1663)
    assert overflow_placement(*taken, lacking=100).ports == PortRange(1344, 1471)
    assert overflow_placement(*taken, lacking=1000).ports == PortRange(1344, 1535), "the longest run, when none has all"


def test_an_overflow_range_has_the_least_free_ports_and_a_block() -> None:
    taken = (allocation(4, "1280-1343", "x"), allocation(6, "1472-65535", "y"), ON_B)
    assert overflow_placement(*taken, least_free=128).ports == PortRange(1344, 1471)
    with pytest.raises(NoRoomError) as caught:
        overflow_placement(*taken, least_free=129)
    assert caught.value.no_room.obstacle is Obstacle.NO_FREE_RUN
    assert overflow_placement(*taken, least_free=64, lacking=-500).ports == PortRange(1344, 1407), (
        "at least a block, since its range is full"
    )


def test_a_draining_range_with_enough_free_ports_is_the_overflow_range() -> None:
    back = overflow_placement(DRAINING, least_free=20, free_in={2: 33}, lacking=None)
    assert (back.ports, back.reclaimed, back.in_place) == (DRAINING.ports, (DRAINING,), False)
    for least, free_in in ((20, {2: 32}), (66, {2: 66}), (20, {})):
        with pytest.raises(PortsExhausted):
            overflow_placement(DRAINING, least_free=least, free_in=free_in, lacking=None)
    assert overflow_placement(DRAINING, free_in={2: 10}).ports == PortRange(1600, 1727), "free ports first"


def test_a_draining_range_on_another_host_or_strict_address_is_no_overflow_range() -> None:
    elsewhere = dataclasses.replace(DRAINING, node=NodeName("host9"))
    with pytest.raises(PortsExhausted):
        overflow_placement(elsewhere, free_in={2: 200}, lacking=None)
    on_b = dataclasses.replace(DRAINING, external=B)
    assert overflow_placement(on_b, free_in={2: 200}, lacking=None).external == B
    with pytest.raises(PortsExhausted):
        overflow_placement(on_b, free_in={2: 200}, lacking=None, strict=True)


def test_a_draining_range_with_too_few_free_ports_does_not_hide_another() -> None:
    big = allocation(4, "2048-4095", "d", state="draining")
    assert overflow_placement(big, DRAINING, free_in={4: 100, 2: 90}, lacking=None).ports == DRAINING.ports


def test_an_overflow_range_avoids_port_numbers_held_on_another_address() -> None:
    taken = (allocation(4, "1280-65535", "x"), allocation(5, "1024-1151", "y", external=B))
    rest = allocation(6, "1408-65535", "y", external=B)
    placement = overflow_placement(*taken, rest, lacking=256)
    assert (placement.external, placement.ports) == (B, PortRange(1280, 1407))


def test_a_range_does_not_grow_into_draining_ports_that_are_in_use() -> None:
    full = allocation(2, "2048-2559", "d", state="draining")
    space = space_with(ACTIVE, full, allocation(4, "1280-1343", "x"))
    assert place_larger(space, ACTIVE, 384, in_use=250).reclaimed == (full,), "its ports in use were not counted"
    assert place_larger(space, ACTIVE, 384, free_in={AllocationId(2): 133}, in_use=250).reclaimed == ()
    assert place_larger(space, ACTIVE, 384, free_in={AllocationId(2): 400}, in_use=250).reclaimed == (full,)


def test_a_vm_does_not_take_back_what_became_a_machines() -> None:
    space = space_with(
        allocation(1, "1024-1087"), allocation(2, "1088-1215", state="draining"), allocation(3, "1216-65535", "x"),
        addresses=(A,),
    )  # fmt: skip
    [active, leaving] = space.of(D)
    assert place_larger(space, active, 128).in_place
    assert place_overflow(space, active, None, 0, {leaving.id: 128}).ports == leaving.ports
    space.keep_own(A, [PortRange(1100, 1100)])
    assert place_larger(space, active, 64).in_place, "it has them already"
    with pytest.raises(NoRoomError):
        place_larger(space, active, 128)
    with pytest.raises(NoRoomError):
        place_overflow(space, active, None, 0, {leaving.id: 128})
    assert place(space, D, 64).ports == PortRange(1152, 1215)
    with pytest.raises(NoRoomError):
        place(space, D, 128)
