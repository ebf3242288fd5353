"""Where ranges go."""

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


def test_block_that_does_not_divide_the_address() -> None:
    assert whole_blocks(65535, 1000) == 64000


def test_best_fit_takes_the_smallest_run_that_is_long_enough() -> None:
    space = space_with(
        allocation(1, "1280-1343", "x"), allocation(2, "1472-65535", "y"), allocation(3, "1344-65535", "z", external=B)
    )
    # Free: 1024-1279 (256) and 1344-1471 (128) on A, 1024-1343 (320) on B.
    assert place(space, D, 100).ports == PortRange(1344, 1471)
    assert place(space, D, 129).ports == PortRange(1024, 1215)
    assert place(space, D, 300).external == B


def test_preferred_address_comes_first() -> None:
    space = space_with(allocation(1, "1088-65535", "x"))
    assert place(space, D, 64, prefer=B).external == B
    assert place(space, D, 64).external == A
    assert place(space, D, 128, prefer=A).external == B


def test_strict_never_leaves_the_address() -> None:
    space = space_with(allocation(1, "1088-65535", "x"))
    with pytest.raises(NoRoomError) as caught:
        place(space, D, 128, prefer=A, strict=True)
    assert (caught.value.wanted, caught.value.longest_free) == (128, 64)
    assert caught.value.no_room == NoRoom(128, 64, Obstacle.NO_FREE_RUN, 1, A)


def test_empty_pool_says_so() -> None:
    with pytest.raises(NoRoomError) as caught:
        place(AddressSpace(), D, 64)
    assert caught.value.no_room.obstacle is Obstacle.NO_ADDRESS


def test_own_ports_are_taken_back_whole() -> None:
    held = allocation(1, "4096-4159", state="held")
    placement = place(space_with(held), D, 64)
    assert (placement.external, placement.ports, placement.reclaimed) == (A, held.ports, (held,))
    assert placement.left_of(held) == ()


def test_own_ports_are_taken_back_in_part_or_with_neighbours() -> None:
    held = allocation(1, "4096-4351", state="draining")
    smaller = place(space_with(held), D, 64)
    assert smaller.ports == PortRange(4096, 4159)
    assert smaller.left_of(held) == (PortRange(4160, 4351),)
    assert place(space_with(held), D, 512).ports == PortRange(4096, 4607)


def test_other_vms_held_ports_are_nobodys() -> None:
    space = space_with(allocation(1, "1024-65535", "x", state="held"), addresses=(A,))
    with pytest.raises(PortsExhausted):
        place(space, D, 64)


def test_numbers_held_elsewhere_are_avoided() -> None:
    own = allocation(1, "1024-1087", state="active")
    space = space_with(own, allocation(2, "1088-65535", "x"))
    assert place(space, D, 64, prefer=A).ports == PortRange(1088, 1151)


def test_numbers_held_elsewhere_can_be_the_reason() -> None:
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
def test_grow_in_place(others: list[str], wanted: int, ports: str) -> None:
    active = allocation(1, "4096-4159")
    space = space_with(active, *(allocation(n, each, "x") for n, each in enumerate(others, 2)))
    placement = place_larger(space, active, wanted)
    assert placement.in_place
    assert (placement.external, placement.ports) == (A, PortRange.parse(ports))


def test_grow_over_own_draining_ports() -> None:
    active, draining = allocation(1, "4096-4159"), allocation(2, "4160-4287", state="draining")
    placement = place_larger(space_with(active, draining, allocation(3, "4288-4351", "x")), active, 128)
    assert placement.ports == PortRange(4096, 4223)
    assert placement.reclaimed == (draining,)
    assert placement.left_of(draining) == (PortRange(4224, 4287),)


def test_grow_relocates_on_the_same_address_then_on_another() -> None:
    active = allocation(1, "4096-4159")
    walls = allocation(2, "4032-4095", "x"), allocation(3, "4160-4223", "x")
    placement = place_larger(space_with(active, *walls), active, 128)
    assert (placement.external, placement.in_place) == (A, False)
    full = allocation(4, "1024-4031", "y"), allocation(5, "4224-65535", "z")
    elsewhere = place_larger(space_with(active, *walls, *full), active, 128)
    assert (elsewhere.external, elsewhere.ports) == (B, PortRange(1024, 1151))
    with pytest.raises(PortsExhausted):
        place_larger(space_with(active, *walls, *full), active, 128, strict=True)


def test_grow_to_what_it_has_is_what_it_has() -> None:
    active = allocation(1, "4096-4223")
    placement = place_larger(space_with(active), active, 100)
    assert (placement.ports, placement.in_place) == (active.ports, True)


def test_grow_to_a_whole_address() -> None:
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
def test_shrink_keeps_the_high_end_when_asked(wanted: int, kept: str, released: str | None) -> None:
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


def stepped_aside(
    *others: Allocation,
    lacking: int | None = 128,
    least: int = 0,
    free_in: dict[int, int] | None = None,
    strict: bool = False,
) -> Placement:
    known = {AllocationId(number): free for number, free in (free_in or {}).items()}
    return place_overflow(space_with(ACTIVE, *others), ACTIVE, lacking, least, known, strict=strict)


def test_who_steps_aside_takes_the_shortest_run_that_has_what_it_lacks() -> None:
    taken = (allocation(4, "1280-1343", "x"), allocation(5, "1536-1599", "x"), allocation(6, "1664-65535", "y"), ON_B)
    # Free: 1344-1535 (192) and 1600-1663 (64).
    assert stepped_aside(*taken, lacking=64).ports == PortRange(1600, 1663)
    assert stepped_aside(*taken, lacking=100).ports == PortRange(1344, 1471)
    assert stepped_aside(*taken, lacking=1000).ports == PortRange(1344, 1535), "the longest, where none has all"


def test_nobody_steps_aside_for_next_to_nothing() -> None:
    taken = (allocation(4, "1280-1343", "x"), allocation(6, "1472-65535", "y"), ON_B)
    assert stepped_aside(*taken, least=128).ports == PortRange(1344, 1471)
    with pytest.raises(NoRoomError) as caught:
        stepped_aside(*taken, least=129)
    assert caught.value.no_room.obstacle is Obstacle.NO_FREE_RUN
    assert stepped_aside(*taken, least=64, lacking=-500).ports == PortRange(1344, 1407), (
        "a block, for its range is full"
    )


def test_ports_that_drain_are_gone_back_to_when_enough_of_them_are_free() -> None:
    back = stepped_aside(DRAINING, least=20, free_in={2: 33}, lacking=None)
    assert (back.ports, back.reclaimed, back.in_place) == (DRAINING.ports, (DRAINING,), False)
    for least, free_in in ((20, {2: 32}), (66, {2: 66}), (20, {})):
        with pytest.raises(PortsExhausted):
            stepped_aside(DRAINING, least=least, free_in=free_in, lacking=None)
    assert stepped_aside(DRAINING, free_in={2: 10}).ports == PortRange(1600, 1727), "free ones, where there are any"


def test_ports_that_drain_on_another_host_or_address_are_not_gone_back_to() -> None:
    elsewhere = dataclasses.replace(DRAINING, node=NodeName("host9"))
    with pytest.raises(PortsExhausted):
        stepped_aside(elsewhere, free_in={2: 200}, lacking=None)
    on_b = dataclasses.replace(DRAINING, external=B)
    assert stepped_aside(on_b, free_in={2: 200}, lacking=None).external == B
    with pytest.raises(PortsExhausted):
        stepped_aside(on_b, free_in={2: 200}, lacking=None, strict=True)


def test_a_range_that_has_too_few_free_ports_does_not_hide_one_that_has_enough() -> None:
    big = allocation(4, "2048-4095", "d", state="draining")
    assert stepped_aside(big, DRAINING, free_in={4: 100, 2: 90}, lacking=None).ports == DRAINING.ports


def test_who_steps_aside_avoids_numbers_held_elsewhere() -> None:
    taken = (allocation(4, "1280-65535", "x"), allocation(5, "1024-1151", "y", external=B))
    rest = allocation(6, "1408-65535", "y", external=B)
    placement = stepped_aside(*taken, rest, lacking=256)
    assert (placement.external, placement.ports) == (B, PortRange(1280, 1407))


def test_nobody_grows_to_ports_of_its_own_that_are_in_use() -> None:
    full = allocation(2, "2048-2559", "d", state="draining")
    space = space_with(ACTIVE, full, allocation(4, "1280-1343", "x"))
    assert place_larger(space, ACTIVE, 384, in_use=250).reclaimed == (full,), "nothing is known of it"
    assert place_larger(space, ACTIVE, 384, free_in={AllocationId(2): 133}, in_use=250).reclaimed == ()
    assert place_larger(space, ACTIVE, 384, free_in={AllocationId(2): 400}, in_use=250).reclaimed == (full,)
