"""The points of curves: what they show, what was missed, what they forget, and what they cost."""

from __future__ import annotations

import gc
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from cpm.core.port_series import MOST, POINTS, RESOLUTIONS, PortSeries, Sample
from cpm.protocol.model import DomainUUID

WEB = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")
DB = DomainUUID("0c2b4d5e-1111-4222-8333-444455556666")
FINE, COARSE = RESOLUTIONS


def noted(*rounds: tuple[float, int, int | None]) -> PortSeries:
    series = PortSeries()
    for now, held, used in rounds:
        series.begin(now)
        series.add([Sample(WEB, held, used)])
    return series


def test_the_newest_point_is_the_last_and_what_was_not_seen_is_not_known() -> None:
    fine, coarse = noted((1000.0, 64, 10), (1015.0, 128, None)).curves(WEB)
    assert (fine.point_s, coarse.point_s) == RESOLUTIONS
    assert len(fine.held) == len(fine.used) == POINTS
    assert fine.held[-3:] == (None, 64, 128)
    assert fine.used[-3:] == (None, 10, None)
    assert coarse.held[-1] == 128


def test_a_point_has_the_highest_value_of_its_time() -> None:
    _, coarse = noted((3600.0, 64, 60), (3615.0, 512, 400), (3630.0, 128, 3)).curves(WEB)
    assert coarse.held[-2:] == (None, 512)
    assert coarse.used[-1] == 400


def test_rounds_that_did_not_take_place_are_gaps_however_many() -> None:
    fine, _ = noted((0.0, 64, 1), (4 * FINE, 65, 2)).curves(WEB)
    assert fine.held[-5:] == (64, None, None, None, 65)
    fine, coarse = noted((0.0, 64, 1), (FINE * POINTS * 1000.0, 65, 2)).curves(WEB)
    assert fine.held == (*(None,) * (POINTS - 1), 65)
    assert coarse.used == (*(None,) * (POINTS - 1), 2)


def test_a_vm_that_is_gone_is_forgotten_and_one_that_is_not_known_has_no_curves() -> None:
    series = noted((0.0, 64, 1))
    series.add([Sample(DB, 1, 1)])
    series.keep_only([DB])
    assert len(series) == 1
    assert series.curves(WEB) == ()
    assert series.curves(DB)[0].held[-1] == 1


def test_the_largest_numbers_stay_below_what_means_unknown() -> None:
    fine, _ = noted((0.0, 10**9, 65_535)).curves(WEB)
    assert (fine.held[-1], fine.used[-1]) == (MOST, MOST)


counts = st.integers(0, 70_000)


@given(st.lists(st.tuples(st.integers(0, 500), counts, st.none() | counts), max_size=30))
def test_what_is_shown_of_the_last_hour_is_what_was_noted(rounds: list[tuple[int, int, int | None]]) -> None:
    series, slot, expected = PortSeries(), 0, dict[int, tuple[int, int | None]]()
    for steps, held, used in rounds:
        slot += steps + 1
        expected[slot] = (min(held, MOST), min(used, MOST) if used is not None else None)
        series.begin(slot * FINE)
        series.add([Sample(WEB, held, used)])
    shown = series.curves(WEB)
    assert bool(shown) == bool(rounds)
    for fine in shown[:1]:
        for at, point in enumerate(zip(fine.held, fine.used, strict=True), slot - POINTS + 1):
            assert point == expected.get(at, (None, None))


def test_what_ten_thousand_vms_cost_is_bounded() -> None:
    vms = [DomainUUID(f"00000000-0000-0000-0000-{number:012d}") for number in range(1000)]
    gc.collect()
    tracemalloc.start()
    series = PortSeries()
    for turn in range(3 * POINTS):
        series.begin(turn * COARSE)
        series.add(Sample(vm, 64, turn) for vm in vms[:: 1 if turn == 0 else 100])
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / len(vms) < 2900, "bytes a VM"
