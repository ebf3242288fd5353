"""Counting by segments has the same distribution as tracking every port."""

from __future__ import annotations

import random
from statistics import fmean

from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.model import PortRange
from cpm.simulation.guest import Guest

RANGES = st.tuples(st.integers(1024, 1400), st.integers(1, 400)).map(lambda t: PortRange(t[0], t[0] + t[1] - 1))
STEPS = st.lists(st.tuples(st.none() | RANGES, st.integers(0, 200), st.integers(0, 200)), max_size=12)


@given(STEPS, st.integers(0, 99))
def test_connections_add_up_after_any_steps(steps: list[tuple[PortRange | None, int, int]], seed: int) -> None:
    guest = Guest(random.Random(seed))
    for active, opened, closed in steps:
        guest.set_active(active)
        guest.open(opened)
        guest.close(closed)
        segments = guest.segments
        assert all(0 < segment.used <= segment.size == segment.ports.size for segment in segments)
        assert not any(a.ports.overlaps(b.ports) for i, a in enumerate(segments) for b in segments[:i])
        assert guest.in_use == sum(segment.used for segment in segments) == guest.opened - guest.refused - guest.closed
        inside = sum(segment.used for segment in segments if active and active.covers(segment.ports))
        assert guest.in_active == inside <= (active.size if active else 0)


def test_connections_beyond_the_range_are_refused_and_closed_by_the_trace() -> None:
    guest = Guest(random.Random(1))
    guest.set_active(PortRange(1024, 1033))
    guest.open(15)
    assert (guest.in_use, guest.refused) == (10, 5)
    guest.close(15)
    assert (guest.in_use, guest.closed) == (0, 10)


def test_a_range_is_empty_when_its_last_connection_is_gone() -> None:
    guest, old = Guest(random.Random(1)), PortRange(1024, 1087)
    guest.set_active(old)
    guest.open(3)
    guest.set_active(PortRange(4096, 4223))
    assert not guest.is_empty(old)
    assert (guest.in_active, guest.in_use) == (0, 3)
    guest.close(3)
    assert guest.is_empty(old)


def test_segments_have_the_distribution_of_single_ports() -> None:
    small, large, low = PortRange(1024, 1123), PortRange(1024, 1223), PortRange(1024, 1083)

    def by_port(dice: random.Random) -> tuple[int, int]:
        ports = dice.sample(list(small), 80)
        for _ in range(60):
            ports.remove(dice.choice(ports))
            ports.append(dice.choice([port for port in large if port not in ports]))
        before = sum(port in low for port in ports)
        for _ in range(40):
            ports.remove(dice.choice(ports))
            ports.append(dice.choice([port for port in low if port not in ports]))
        return before, sum(port in low for port in ports)

    def by_piece(dice: random.Random) -> tuple[int, int]:
        guest = Guest(dice)
        guest.set_active(small)
        guest.open(80)
        guest.set_active(large)
        for _ in range(60):
            guest.close()
            guest.open()
        guest.set_active(low)
        before = guest.in_active
        for _ in range(40):
            guest.close()
            guest.open()
        return before, guest.in_active

    one = [by_port(random.Random(seed)) for seed in range(300)]
    other = [by_piece(random.Random(1000 + seed)) for seed in range(300)]
    for place in (0, 1):
        assert abs(fmean(each[place] for each in one) - fmean(each[place] for each in other)) < 1
