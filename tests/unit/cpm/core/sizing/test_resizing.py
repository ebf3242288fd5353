"""What the resize engine guarantees in any situation, and its decisions one by one."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm.core.placement import (
    AddressSpace,
    Grow,
    NoRoom,
    Obstacle,
    Outcome,
    Overflow,
    Placement,
    Refused,
    Relocate,
    Shrink,
    Stay,
    StayReason,
)
from cpm.core.sizing.resizing import (
    Situation,
    choose,
    choose_compaction,
    choose_elsewhere,
    choose_first,
    choose_without_own_ports,
)
from cpm.protocol.bounds import FIRST_PORT
from cpm.protocol.errors import PortsExhausted
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    NodeName,
    PortRange,
)

S = AllocationState
BLOCK = 64
A, B = IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")
BLOCKS = 24
"""Of each address; the rest is reserved."""
HOST = NodeName("host1")
MINE = DomainUUID("mine")


def ports(first: int, blocks: int) -> PortRange:
    start = FIRST_PORT + first * BLOCK
    return PortRange(start, start + blocks * BLOCK - 1)


def pool(*allocations: Allocation, blocks: int = BLOCKS) -> AddressSpace:
    space = AddressSpace(BLOCK)
    beyond = PortRange(FIRST_PORT + blocks * BLOCK, 65535)
    for address in (A, B):
        space.add_address(ExternalAddress(address, (beyond,)))
    for each in allocations:
        space.take(each)
    return space


def held(
    number: int, where: PortRange, state: S = S.ACTIVE, domain: DomainUUID | None = None, on: IPv4Address = A
) -> Allocation:
    """Return a range; by default of a VM that has no other."""
    return Allocation(AllocationId(number), domain or DomainUUID(f"vm{number}"), HOST, on, where, state, float(number))


@st.composite
def situations(draw: st.DrawFn) -> Situation:
    """A VM with an active range and perhaps leaving ones, among others that hold some of the rest."""
    taken: list[Allocation] = []
    numbers: set[int] = set()
    active: Allocation | None = None
    for on in (A, B):
        at = draw(st.integers(0, 3))
        while at < BLOCKS:
            kind = draw(st.sampled_from(["other", "leaving", "free", "active", "other", "other"]))
            size = draw(st.integers(1, 3 if kind == "free" else 6))
            where = ports(at, min(size, BLOCKS - at))
            blocks = set(range(at, min(at + size, BLOCKS)))
            at += size
            mine = kind in ("leaving", "active") and not blocks & numbers
            if kind == "free":
                continue
            number = len(taken) + 1
            if not mine:
                taken.append(held(number, where, on=on))
                continue
            numbers |= blocks
            state = draw(st.sampled_from([S.DRAINING, S.HELD])) if kind == "leaving" or active is not None else S.ACTIVE
            taken.append(held(number, where, state, MINE, on))
            active = taken[-1] if state is S.ACTIVE else active
    if active is None:
        active = held(99, ports(BLOCKS - 2, 2), domain=MINE, on=B)
        taken = [*(each for each in taken if each.domain != MINE and each.external == A), active]
    return draw(facts(pool(*taken), active))


@st.composite
def walled_situations(draw: st.DrawFn) -> Situation:
    """A VM whose range has others on both sides, and no free run as long elsewhere."""
    active = held(1, ports(4, 5), domain=MINE)
    taken, at = [active, held(2, ports(3, 1)), held(3, ports(9, 1)), held(4, ports(0, BLOCKS), on=B)], 10
    while at + 6 < BLOCKS:
        size = draw(st.integers(1, 5))
        if draw(st.booleans()):
            state = draw(st.sampled_from([S.DRAINING, S.HELD]))
            taken.append(held(len(taken) + 1, ports(at, size), state, MINE))
        taken.append(held(len(taken) + 1, ports(at + size, 1)))
        at += size + 1
    return draw(facts(pool(*taken), active))


@st.composite
def facts(draw: st.DrawFn, space: AddressSpace, active: Allocation) -> Situation:
    """Complete a situation with measurements and a target."""
    size = active.ports.size
    in_use = draw(st.none() | st.integers(size * 3 // 4, size) | st.integers(0, size))
    leaving = [each for each in space.of(MINE) if each.state is not S.ACTIVE]
    free_in = {each.id: draw(st.integers(0, each.ports.size)) for each in leaving if draw(st.booleans())}
    more, less = st.integers(size + 1, size + 12 * BLOCK), st.integers(1, size)
    target = draw(st.one_of(more, more, more, less))
    return Situation(
        space=space,
        active=active,
        target=target,
        allowed=draw(st.just(target) | st.integers(size, target)) if target > size else target,
        room=draw(st.none() | st.integers(0, 10 * BLOCK)),
        cap=draw(st.just(64512) | st.integers(1, 40 * BLOCK)),
        in_use=in_use,
        expected_in_use=draw(st.none() | st.integers(in_use or 0, size)),
        free_in=free_in,
        counts_ports=draw(st.booleans()),
        strict=draw(st.booleans()),
        may_overflow=draw(st.sampled_from([True, True, False])),
        may_return=draw(st.booleans()),
        short=draw(st.booleans()),
        gave_back=draw(st.booleans()),
        keep_upper=draw(st.booleans()),
    )


ANY = st.one_of(situations(), walled_situations())


def reserved_by(outcome: Outcome) -> Placement | None:
    return outcome.placement if isinstance(outcome, (Grow, Relocate, Overflow)) else None


def picture(space: AddressSpace) -> object:
    return [(each.address, space.on(each.address), space.free_runs(each.address)) for each in space.addresses]


def reserve_is_right(situation: Situation, placement: Placement) -> None:
    """No ports of other VMs, no reserved ports, whole blocks, and no port number twice."""
    space, active = situation.space, situation.active
    reclaimed = set(placement.reclaimed)
    assert all(each.domain == MINE and each.state in (S.DRAINING, S.HELD) for each in reclaimed)
    assert all(each.ports.overlaps(placement.ports) and each.external == placement.external for each in reclaimed)
    for each in space.on(placement.external):
        assert each in reclaimed or not each.ports.overlaps(placement.ports)
    for address in space.addresses:
        if address.address == placement.external:
            assert not any(each.overlaps(placement.ports) for each in address.reserved)
    for mine in space.of(MINE):
        assert mine in reclaimed or not mine.ports.overlaps(placement.ports)
    assert (placement.ports.first - FIRST_PORT) % BLOCK == 0
    assert placement.ports.size % BLOCK == 0
    if situation.strict:
        assert placement.external == active.external


def newly_taken(placement: Placement) -> int:
    given_up = sum(each.ports.size - sum(rest.size for rest in placement.left_of(each)) for each in placement.reclaimed)
    return placement.ports.size - given_up


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_a_decision_is_legal_deterministic_and_changes_nothing(situation: Situation) -> None:
    before = picture(situation.space)
    outcome = choose(situation)
    assert choose(situation) == outcome
    assert picture(situation.space) == before
    if (placement := reserved_by(outcome)) is not None:
        reserve_is_right(situation, placement)
        assert situation.room is None or newly_taken(placement) <= situation.room


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_no_range_exceeds_cap_and_allowance(situation: Situation) -> None:
    outcome, size = choose(situation), situation.active.ports.size
    cap = max(situation.cap // BLOCK, 1) * BLOCK
    allowed = -(-situation.allowed // BLOCK) * BLOCK
    match outcome:
        case Grow(placement):
            assert placement.ports.adjoins(situation.active.ports)
            assert size + placement.ports.size <= min(cap, allowed)
        case Relocate(placement):
            assert size < placement.ports.size <= min(cap, allowed)
        case Overflow(placement):
            held_ports = sum(each.ports.size for each in situation.space.of(MINE))
            assert newly_taken(placement) == 0 or held_ports < situation.cap
            assert newly_taken(placement) <= max(BLOCK, -(-(situation.cap - held_ports) // BLOCK) * BLOCK)
        case Shrink(shrunk):
            assert shrunk.released is not None
            assert shrunk.kept.join_with(shrunk.released) == situation.active.ports
            assert situation.allowed <= shrunk.kept.size < size
            kept_end = "last" if situation.keep_upper else "first"
            assert getattr(shrunk.kept, kept_end) == getattr(situation.active.ports, kept_end)


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_an_active_range_is_only_left_for_more_free_ports(situation: Situation) -> None:
    """docs/design/0005: no move to ports known to be in use, and no overflow range with few free ports."""
    outcome, in_use = choose(situation), situation.in_use or 0
    free_now = situation.active.ports.size - in_use
    if isinstance(outcome, Relocate):
        known = [each for each in outcome.placement.reclaimed if each.id in situation.free_in]
        used = sum(each.ports.size - situation.free_in[each.id] for each in known)
        assert not used or outcome.placement.ports.size - used >= free_now + BLOCK
    if isinstance(outcome, Overflow):
        back = outcome.placement.reclaimed
        free = situation.free_in[back[0].id] if back else outcome.placement.ports.size
        expected = situation.expected_in_use if situation.expected_in_use is not None else in_use
        assert free > free_now
        assert free >= 2 * (situation.active.ports.size - expected)
        assert situation.may_overflow or situation.may_return
        assert not (back and situation.gave_back)
        assert back or not situation.short


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_no_outcome_makes_a_vm_hold_more_than_its_cap_leaving_ranges_included(situation: Situation) -> None:
    outcome, mine = choose(situation), situation.space.of(MINE)
    before = sum(each.ports.size for each in mine)
    if isinstance(outcome, Grow | Relocate | Overflow):
        new = outcome.placement.ports
        own = sum(each.ports.size - sum(rest.size for rest in each.ports.minus(new)) for each in mine
                  if each.external == outcome.placement.external)  # fmt: skip
        assert before + new.size - own <= max(situation.cap, before)


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_a_refusal_has_an_obstacle_of_placement(situation: Situation) -> None:
    outcome, size = choose(situation), situation.active.ports.size
    if isinstance(outcome, Refused):
        assert min(situation.allowed, max(situation.cap // BLOCK, 1) * BLOCK) > size
        assert outcome.no_room.obstacle in (
            Obstacle.NO_FREE_RUN,
            Obstacle.OWN_NUMBERS,
            Obstacle.KEPT_FOR_STARTS,
            Obstacle.AT_CAP,
        )
    if isinstance(outcome, Stay) and outcome.reason is StayReason.NO_WHOLE_BLOCK:
        assert situation.allowed > size - BLOCK


@settings(max_examples=200, deadline=None)
@given(ANY)
def test_a_relocation_takes_no_port_of_the_present_range(situation: Situation) -> None:
    before = picture(situation.space)
    outcome = choose_elsewhere(situation)
    assert choose_elsewhere(situation) == outcome
    assert picture(situation.space) == before
    if isinstance(outcome, Relocate):
        reserve_is_right(situation, outcome.placement)
        assert outcome.placement.ports.size == situation.active.ports.size
        known = [each for each in outcome.placement.reclaimed if each.id in situation.free_in]
        used = sum(each.ports.size - situation.free_in[each.id] for each in known)
        free_now = situation.active.ports.size - (situation.in_use or 0)
        assert not used or outcome.placement.ports.size - used >= free_now


@settings(max_examples=200, deadline=None)
@given(ANY, st.integers(FIRST_PORT, FIRST_PORT + BLOCKS * BLOCK), st.integers(1, 2 * BLOCK), st.booleans())
def test_what_replaces_a_range_has_none_of_a_machines_ports(
    situation: Situation, first: int, size: int, is_inside: bool
) -> None:
    active = situation.active
    own = PortRange(first, first + size - 1)
    if is_inside:
        inside = active.ports.first + (first - FIRST_PORT) % active.ports.size
        own = PortRange(inside, min(inside + size - 1, active.ports.last))
    situation.space.keep_own(active.external, [own])
    outcome = choose_without_own_ports(situation)
    assert choose_without_own_ports(situation) == outcome
    if isinstance(outcome, Relocate):
        reserve_is_right(situation, outcome.placement)
        assert outcome.placement.external != active.external or not outcome.placement.ports.overlaps(own)
    elif isinstance(outcome, Shrink):
        assert outcome.shrunk.released is not None
        assert outcome.shrunk.kept.join_with(outcome.shrunk.released) == active.ports
        assert not outcome.shrunk.kept.overlaps(own)
    elif isinstance(outcome, Grow):
        assert outcome.placement.ports.size == BLOCK
        assert not outcome.placement.ports.overlaps(own)
        assert outcome.placement.ports.adjoins(active.ports)


@settings(max_examples=100, deadline=None)
@given(ANY, st.integers(1, 30 * BLOCK), st.integers(1, 30 * BLOCK))
def test_a_first_range_is_between_floor_and_the_ports_wanted(situation: Situation, wanted: int, floor: int) -> None:
    vm = VM(DomainUUID("new"), "new", HOST, IPv4Address("100.64.0.1"))
    wanted = max(wanted, floor)
    if situation.space.longest_free() < -(-floor // BLOCK) * BLOCK:
        with pytest.raises(PortsExhausted):
            choose_first(situation.space, vm, wanted, floor, strict=situation.strict)
        return
    placement = choose_first(situation.space, vm, wanted, floor, strict=situation.strict)
    assert floor <= placement.ports.size <= -(-wanted // BLOCK) * BLOCK
    assert all(not each.ports.overlaps(placement.ports) for each in situation.space.on(placement.external))


@settings(max_examples=100, deadline=None)
@given(ANY)
def test_compaction_keeps_sizes_and_moves_to_free_ports(situation: Situation) -> None:
    before = picture(situation.space)
    for allocation, outcome in choose_compaction(situation.space, lambda each: each.state is S.ACTIVE):
        assert outcome.placement.external == allocation.external
        assert outcome.placement.ports.size == allocation.ports.size
        assert all(not each.ports.overlaps(outcome.placement.ports) for each in situation.space.on(allocation.external))
    assert picture(situation.space) == before


# One by one

ACTIVE = held(1, ports(0, 4), domain=MINE)
FULL_B = held(90, ports(0, BLOCKS), on=B)


def resized(target: int, *others: Allocation, **facts: object) -> Outcome:
    space = pool(ACTIVE, FULL_B, *others)
    situation = Situation(space=space, active=ACTIVE, target=target * BLOCK, allowed=target * BLOCK)
    return choose(dataclasses.replace(situation, **facts))  # type: ignore[arg-type]


def test_a_range_grows_in_place_where_it_can() -> None:
    assert resized(6) == Grow(Placement(A, ports(4, 2)))
    assert resized(6, cap=300) == Stay(StayReason.AT_TARGET), "the cap is rounded down to blocks"
    assert resized(6, room=BLOCK) == Grow(Placement(A, ports(4, 1))), "by half where there is no room for all"


def test_a_range_whose_adjacent_ports_are_taken_moves() -> None:
    assert resized(6, held(2, ports(4, 2))) == Relocate(Placement(A, ports(6, 6)))


def test_new_connections_get_an_overflow_range_when_no_larger_range_is_available() -> None:
    neighbours = (held(2, ports(4, 2)), held(3, ports(9, BLOCKS - 9)))
    no_room = NoRoom(5 * BLOCK, 3 * BLOCK, Obstacle.NO_FREE_RUN, 2, A)
    assert resized(6, *neighbours) == Refused(no_room), "its ports in use were not counted"
    assert resized(6, *neighbours, in_use=250) == Overflow(Placement(A, ports(6, 2)), no_room)
    assert resized(6, *neighbours, in_use=250, may_overflow=False) == Refused(no_room)
    assert resized(6, *neighbours, in_use=250, short=True) == Refused(no_room)
    assert resized(6, *neighbours, in_use=100) == Stay(StayReason.ENOUGH_LEFT)
    assert resized(6, *neighbours, in_use=100, expected_in_use=250) == Stay(StayReason.ENOUGH_LEFT), "it has more free"
    assert resized(6, *neighbours, in_use=180, expected_in_use=200) == Overflow(Placement(A, ports(6, 2)), no_room)


def test_free_ports_kept_for_starting_vms_are_not_taken() -> None:
    kept = Refused(NoRoom(BLOCK, 0, Obstacle.KEPT_FOR_STARTS))
    assert resized(6, room=0) == kept
    assert resized(6, room=0, in_use=250) == kept


def test_a_vm_that_may_not_grow_returns_to_its_own_ports() -> None:
    own = held(2, ports(6, 4), S.DRAINING, MINE)
    facts = {"allowed": 4 * BLOCK, "in_use": 250, "free_in": {own.id: 200}, "may_return": True}
    assert resized(6, own, **facts) == Overflow(Placement(A, own.ports, reclaimed=(own,)), None)
    for changed, reason in (
        ({"may_return": False}, StayReason.AT_TARGET),
        ({"in_use": None}, StayReason.AT_TARGET),
        ({"gave_back": True}, StayReason.NOTHING_TO_RETURN_TO),
        ({"free_in": {own.id: 10}}, StayReason.NOTHING_TO_RETURN_TO),
        ({"in_use": 150}, StayReason.ENOUGH_LEFT),
    ):
        assert resized(6, own, **{**facts, **changed}) == Stay(reason)
    assert resized(4, own, **{**facts, "allowed": 4 * BLOCK}) == Stay(StayReason.AT_TARGET)


@pytest.mark.parametrize(("keep_upper", "kept"), [(False, ports(0, 2)), (True, ports(2, 2))])
def test_a_range_shrinks_at_one_end(keep_upper: bool, kept: PortRange) -> None:
    outcome = resized(2, keep_upper=keep_upper)
    assert isinstance(outcome, Shrink)
    assert outcome.shrunk.kept == kept
    assert resized(4, allowed=4 * BLOCK - 1) == Stay(StayReason.NO_WHOLE_BLOCK)
