"""The arithmetic between measurements and figures, and the object that is printed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import figures, machine
from bench.figures import Measured

VALUES = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=50)


def test_percentile_is_the_nearest_rank() -> None:
    values = [float(number) for number in range(200, 0, -1)]
    assert figures.percentile(values, 0.99) == 198
    assert figures.percentile(values, 0.5) == 100
    assert figures.percentile(values, 1) == 200
    assert figures.percentile([7.0], 0.01) == 7


@given(VALUES, st.floats(0.01, 1))
def test_a_percentile_was_measured_and_covers_its_share(values: list[float], share: float) -> None:
    found = figures.percentile(values, share)
    assert found in values
    assert sum(value <= found for value in values) >= share * len(values)


def test_no_measurements_give_no_figure() -> None:
    for work in (figures.median, lambda values: figures.percentile(values, 0.5), figures.spread):
        with pytest.raises(ValueError):
            work([])
    with pytest.raises(ValueError):
        figures.percentile([1.0], 0)
    with pytest.raises(ValueError):
        figures.ratio([1.0], [0.0])


def test_ratio_divides_medians_and_paired_ratio_takes_the_median_of_quotients() -> None:
    assert figures.ratio([4.0, 100.0, 6.0], [2.0, 3.0, 1.0]) == 3.0
    # Twice as busy in the second half: the pairs do not care.
    ours, theirs = [90.0, 90.0, 45.0], [100.0, 100.0, 50.0]
    assert figures.paired_ratio(ours, theirs) == pytest.approx(0.9)


@pytest.mark.parametrize(("above", "below"), [([], []), ([1.0], [1.0, 2.0]), ([1.0], [0.0])])
def test_runs_that_make_no_pairs(above: list[float], below: list[float]) -> None:
    with pytest.raises(ValueError):
        figures.paired_ratio(above, below)


@given(VALUES)
def test_spread_is_in_order(values: list[float]) -> None:
    found = figures.spread(values)
    assert found["runs"] == len(values)
    assert found["min"] <= found["p25"] <= found["p75"] <= found["max"]
    assert found["min"] <= found["p50"] <= found["max"]


def test_misses_name_figure_value_and_reach() -> None:
    good = {"hook_ratio": 2.5, "resize_ms_p50": 10.0, "nft_full_ratio": 1.0, "ledger_ratio": 0.5}
    assert figures.missed_targets(good) == []
    assert figures.missed_targets({**good, "hook_ratio": 2.51, "ledger_ratio": 0.4}) == [
        "hook_ratio is 2.51, should be at most 2.5",
        "ledger_ratio is 0.4, should be at least 0.5",
    ]


def test_the_report_has_every_key_flat_and_is_json() -> None:
    parts = [Measured(dict.fromkeys(keys, 1.23456), {f"{part}_ms": [1.0, 2.0]}) for part, keys in figures.KEYS.items()]
    report = json.loads(json.dumps(figures.report(parts, machine.facts(), {})))
    assert set(report) - {"machine", "spread", "failed"} == {
        *("metrics_ms_10k", "metrics_pause_ms_10k", "page_first_paint_ms", "page_pause_ms"),
        *("hook_start_ms_p50", "python_ms_p50", "hook_ratio", "hook_calls_ratio", "cli_ratio"),
        *("resize_ms_p50", "resize_ms_p99", "pcp_ms_p50"),
        *("nft_single_ratio", "nft_full_ratio", "conn_rate_ratio", "throughput_ratio", "conn_rate_10k_ratio"),
        "fullcone_conn_rate_ratio",
        "forward_conn_rate_ratio",
        *("conn_rate_nft_ratio", "throughput_nft_ratio"),
        *("edge_ns_over_forwarding", "edge_nft_ns_over_forwarding", "resize_lost_packets"),
        *(
            "ledger_alloc_per_s",
            "ledger_ratio",
            "journal_bytes_per_resize",
            "tick_ms_10k",
            "cpmd_hosts_per_core",
            "restart_s_100x10k",
            "change_ms_10k_churn",
            "edge_change_us_256",
            "edge_change_nft_us_256",
            "edge_load_ms_10k",
            "edge_load_nft_ms_10k",
            "edge_load_s_100k",
            "edge_mb_100k",
        ),
        "prove_steps_per_s",
        *("natd_share_at_cap", "neighbour_conn_rate_ratio"),
        *("density_vs_static", "density_vs_doubling", "density_vs_doubling_apart"),
        *("stats_ms_200", "signal_ms_p50", "signal_ms_p99", "burst_refused", "burst_delayed"),
        *("burst_refused_static", "burst_delayed_static", "burst_refused_poll", "burst_delayed_poll"),
    }
    assert report["nft_full_ratio"] == 1.235
    assert {"cpu", "cores", "memory_gb", "kernel"} <= set(report["machine"])
    assert report["spread"]["hook_ms"]["runs"] == 2
    assert report["failed"] == {}


def test_every_reach_is_that_of_a_figure() -> None:
    assert set(figures.TARGETS) <= {key for keys in figures.KEYS.values() for key in keys}
