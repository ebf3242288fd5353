"""With any load no port is lost, overloaded or taken from a connection; the same seed gives the same result."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm.core.placement import USABLE
from cpm.core.sizing import LITERAL, policies, policy_named
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import AllocationState
from cpm.simulation import KINDS, Conditions, Line, Replay, Trace, compete, contender, contenders, generate
from cpm.simulation.packing import fixed_per_address, fixed_size, smallest_pool
from cpm.simulation.replay import ample, peaks, pool_of

VMS = ["a", "b", "c"]
DELTAS = st.tuples(st.integers(0, 120), st.integers(0, 120))
LOADS = st.lists(st.dictionaries(st.sampled_from(VMS), DELTAS, max_size=3), min_size=1, max_size=60)


def traced(load: list[dict[str, tuple[int, int]]]) -> Trace:
    steps = [tuple(Line(vm, opened, closed, 10, 800) for vm, (opened, closed) in step.items()) for step in load]
    return Trace(1.0, tuple(steps))


def check(replay: Replay) -> None:
    """No port is lost or has two owners, and every connection has a port of its VM."""
    view = replay.fleet
    seen: set[tuple[object, int]] = set()
    held = 0
    for actor in replay.actors.values():
        mine = view.of(actor.vm.uuid)
        for allocation in mine:
            ports = {(allocation.external, port) for port in allocation.ports}
            assert not ports & seen
            seen |= ports
            held += allocation.ports.size
        safe = {port for each in mine if each.state is not AllocationState.HELD for port in each.ports}
        for segment in actor.guest.segments:
            assert safe.issuperset(segment.ports)
            assert 0 < segment.used <= segment.size == segment.ports.size
        active = next((each.ports for each in mine if each.state is AllocationState.ACTIVE), None)
        assert actor.guest.active == active
        inside = [segment.used for segment in actor.guest.segments if active and active.covers(segment.ports)]
        assert actor.guest.in_active == sum(inside)
        assert actor.guest.in_use == sum(segment.used for segment in actor.guest.segments)
        assert actor.guest.opened - actor.guest.refused - actor.guest.closed == actor.guest.in_use
    usages = [view.space.usage(address.address) for address in view.space.addresses]
    assert sum(usage.taken for usage in usages) == held
    assert all(usage.free + usage.taken + usage.reserved == USABLE.size for usage in usages)


@settings(max_examples=40, deadline=None)
@given(
    LOADS,
    st.sampled_from([*policies(), "doubling", "static:128"]),
    st.integers(1, 20),
    st.integers(0, 99),
    st.booleans(),
)
def test_no_port_is_lost_or_has_two_owners(
    load: list[dict[str, tuple[int, int]]], name: str, blocks: int, seed: int, literal: bool
) -> None:
    trace = traced(load)
    guards = {"guards": LITERAL} if literal else {}
    one = contender(name, trace, Conditions(hold_down_s=5.0, **guards))  # type: ignore[arg-type]
    replay = Replay(trace, one.policy, blocks * 64, one.conditions, random.Random(seed))
    for point in replay.steps():
        check(replay)
        assert point.used <= point.held <= blocks * 64


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_result(kind: str) -> None:
    def once() -> object:
        trace = generate(kind, 4, 120, random.Random(7))
        replay = Replay(trace, policy_named("predictive"), ample(trace, Conditions()), Conditions(), random.Random(7))
        return trace, replay.run()

    assert once() == once()


@pytest.mark.parametrize("kind", KINDS)
def test_generated_loads_open_and_close_connections(kind: str) -> None:
    trace = generate(kind, 5, 300, random.Random(3))
    assert trace.vms == ("vm1", "vm2", "vm3", "vm4", "vm5")
    assert len(trace.steps) == 300
    balance = dict.fromkeys(trace.vms, 0)
    for lines in trace.steps:
        for line in lines:
            balance[line.vm] += line.opened - line.closed
            assert balance[line.vm] >= 0
    assert trace.connections > 300


def test_invalid_loads_are_refused() -> None:
    for kind, vms, seconds in (("lunar", 1, 1), ("steady", 0, 1), ("steady", 1, 0)):
        with pytest.raises(InvalidRequest, match="use"):
            generate(kind, vms, seconds, random.Random(1))


def steady(opened: int, seconds: int) -> Trace:
    """One VM that opens a number of connections and keeps them, then opens and closes one a second."""
    return Trace(1.0, ((Line("a", opened, 0, 1, 1),), *[(Line("a", 1, 1, 1, 1),)] * (seconds - 1)))


def test_a_static_range_refuses_connections_beyond_its_size() -> None:
    trace = steady(200, 10)
    small = compete(contender("static:128", trace, Conditions()), trace, lambda: random.Random(1))
    assert (small.outcome.refused > 0, small.vms_per_address) == (True, None)
    fitting = compete(contender("static", trace, Conditions()), trace, lambda: random.Random(1))
    assert (fitting.outcome.policy, fitting.outcome.refused, fitting.outcome.grown) == ("static:256", 0, 0)
    assert (fitting.vms_per_address, fitting.pool_ports) == (252.0, 256)


def test_the_alarm_grows_a_range_during_a_burst_between_two_samples() -> None:
    trace = Trace(1.0, ((Line("a", 10, 0, 1, 1),), (Line("a", 2_000, 0, 1, 1),), (Line("a", 2_000, 0, 1, 1),)))
    for name in policies():
        outcome = compete(contender(name, trace, Conditions(before_s=0)), trace, lambda: random.Random(1)).outcome
        assert (outcome.refused, outcome.grown > 0) == (0, True), name
    deaf = Conditions(before_s=0, signal_s=60.0)
    outcome = compete(contender("occupancy", trace, deaf), trace, lambda: random.Random(1), packing=False).outcome
    assert outcome.refused > 0


def test_ports_are_free_again_after_drain_and_hold_down() -> None:
    load = [(Line("a", 1_000, 0, 1, 1),), *[()] * 5, (Line("a", 0, 1_000, 1, 1),), *[()] * 1200]
    trace = Trace(1.0, tuple(load))
    points = Replay(trace, policy_named("predictive"), 64512, Conditions(), random.Random(1)).run().points
    assert points[0].held >= 1_000
    assert points[-1].held == 64
    quiet = [point.at for point in points if point.held < points[0].held]
    assert quiet[0] > 7 + 2 + 120


def test_the_smallest_pool_refuses_none_and_a_smaller_one_does() -> None:
    trace = generate("bursty", 8, 240, random.Random(5))
    policy, conditions = policy_named("predictive"), Conditions()

    def dice() -> random.Random:
        return random.Random(5)

    outcome = Replay(trace, policy, ample(trace, conditions), conditions, dice()).run()
    pool = smallest_pool(trace, policy, conditions, dice, outcome)
    assert pool is not None
    assert outcome.peak_used <= pool
    assert Replay(trace, policy, pool, conditions, dice()).run().refused == 0
    assert Replay(trace, policy, pool // 2, conditions, dice()).run().refused > 0


def test_fixed_sizes_are_powers_of_two() -> None:
    assert [fixed_size(peak, 64) for peak in (0, 64, 65, 1024, 1025)] == [64, 64, 128, 1024, 2048]
    assert [fixed_per_address(size, 64) for size in (64, 1000, 1024, 16384)] == [1008, 63, 63, 3]


def test_a_pool_has_the_requested_ports() -> None:
    for ports in (64, 64512, 64513, 200_000):
        addresses = pool_of(ports)
        reserved = sum(ranges.size for address in addresses for ranges in address.reserved)
        assert len(addresses) * USABLE.size - reserved == ports
    with pytest.raises(ValueError, match="pool of 0"):
        pool_of(0)


def test_peaks_are_the_most_connections_open_at_once() -> None:
    assert peaks(steady(200, 10)) == {"a": 201}


def test_contenders_by_name() -> None:
    trace = steady(10, 2)
    assert contenders() == ("static", "doubling", *policies())
    assert contender("spec", trace, Conditions()).policy.name == "specification"
    assert contender("static:1000", trace, Conditions()).fixed == 1024
    for name in ("tidal", "static:", "static:x", "static:0", "static:70000"):
        with pytest.raises(InvalidRequest, match="use"):
            contender(name, trace, Conditions())
