"""Recorded connections add up to the ports in use that the hosts reported."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cpm.simulation import Line, Recorder, Sample


def sample(ports: int | None, new_per_s: float | None = None, key: str = "1", name: str = "web") -> Sample:
    return Sample(key, name, ports, new_per_s, packets_per_s=10.0, megabits_per_s=0.8)


def test_the_first_line_has_open_connections_and_later_lines_have_changes() -> None:
    recorder = Recorder()
    assert list(recorder.lines("host1", 2.0, [sample(30)])) == [Line("web", 30, 0, 20, 200_000)]
    assert list(recorder.lines("host1", 2.0, [sample(34, new_per_s=5.0)])) == [Line("web", 10, 6, 20, 200_000)]
    assert list(recorder.lines("host1", 2.0, [sample(40)])) == [Line("web", 6, 0, 20, 200_000)]
    assert list(recorder.lines("host1", 2.0, [sample(None, 1.0)])) == [Line("web", 2, 2, 20, 200_000)]


def test_a_vm_that_is_gone_has_closed_everything_and_one_that_moved_has_not() -> None:
    recorder = Recorder()
    list(recorder.lines("host1", 1.0, [sample(5), sample(7, key="2", name="db")]))
    assert list(recorder.lines("host1", 1.0, [sample(5)])) == [Line("web", 0, 0, 10, 100_000), Line("db", 0, 7, 0, 0)]
    assert list(recorder.lines("host2", 1.0, [sample(6)])) == [Line("web", 1, 0, 10, 100_000)]
    assert list(recorder.lines("host1", 1.0, [])) == []


def test_two_vms_of_the_same_name_are_distinguished() -> None:
    names = {line.vm for line in Recorder().lines("host1", 1.0, [sample(1), sample(1, key="2")])}
    assert names == {"web", "web (2)"}


@given(st.lists(st.tuples(st.none() | st.integers(0, 500), st.none() | st.floats(0, 1e4)), min_size=1))
def test_opened_minus_closed_is_the_number_open(samples: list[tuple[int | None, float | None]]) -> None:
    recorder, balance, expected = Recorder(), 0, 0
    for ports, new_per_s in samples:
        [line] = recorder.lines("host1", 1.0, [sample(ports, new_per_s)])
        assert min(line.opened, line.closed) >= 0
        balance += line.opened - line.closed
        expected = expected if ports is None else ports
        assert balance == expected
