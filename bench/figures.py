"""From single measurements to figures: medians, percentiles, ratios, and the one object that is printed. Pure."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

KEYS = {
    "hook": ("hook_start_ms_p50", "python_ms_p50", "hook_ratio", "hook_calls_ratio"),
    "cli": ("cli_ratio",),
    "resize": ("resize_ms_p50", "resize_ms_p99"),
    "pcp": ("pcp_ms_p50",),
    "nft": ("nft_single_ratio", "nft_full_ratio"),
    "path": (
        *("conn_rate_ratio", "throughput_ratio", "conn_rate_nft_ratio", "throughput_nft_ratio"),
        "conn_rate_10k_ratio",
    ),
    "cone": ("fullcone_conn_rate_ratio",),
    "forward": ("forward_conn_rate_ratio",),
    "ledger": ("ledger_alloc_per_s", "ledger_ratio", "journal_bytes_per_resize"),
    "density": ("density_vs_static", "density_vs_doubling", "density_vs_doubling_apart"),
    "tick": ("tick_ms_10k",),
    "metrics": ("metrics_ms_10k", "metrics_pause_ms_10k"),
    "page": ("page_first_paint_ms", "page_pause_ms"),
    "scale": ("cpmd_hosts_per_core", "restart_s_100x10k"),
    "prove": ("prove_steps_per_s",),
    "stats": ("stats_ms_200",),
    "change": ("change_ms_10k_churn",),
    "edge": (
        *("edge_change_us_256", "edge_change_nft_us_256", "edge_load_ms_10k", "edge_load_nft_ms_10k"),
        *("edge_load_s_100k", "edge_mb_100k"),
    ),
    "forwarding": ("edge_ns_over_forwarding", "edge_nft_ns_over_forwarding", "resize_lost_packets"),
    "burst": (
        *("signal_ms_p50", "signal_ms_p99", "burst_refused", "burst_delayed"),
        *("burst_refused_static", "burst_delayed_static", "burst_refused_poll", "burst_delayed_poll"),
    ),
    "limits": ("natd_share_at_cap", "neighbour_conn_rate_ratio"),
}
"""The figures of each part, as they are named in the output."""

TARGETS = {
    "hook_ratio": (None, 2.5),
    "hook_calls_ratio": (None, 1.5),
    "cli_ratio": (None, 4.0),
    "resize_ms_p50": (None, 10.0),
    "resize_ms_p99": (None, 50.0),
    "pcp_ms_p50": (None, 5.0),
    "nft_single_ratio": (8.0, None),
    "nft_full_ratio": (1.0, None),
    "conn_rate_ratio": (0.95, None),
    "throughput_ratio": (0.95, None),
    "conn_rate_nft_ratio": (0.90, None),
    "throughput_nft_ratio": (0.90, None),
    "conn_rate_10k_ratio": (0.95, None),
    "fullcone_conn_rate_ratio": (0.95, None),
    "forward_conn_rate_ratio": (0.9, None),
    "ledger_ratio": (0.5, None),
    "journal_bytes_per_resize": (None, 200.0),
    "density_vs_static": (4.0, None),
    "density_vs_doubling": (1.3, None),
    "tick_ms_10k": (None, 250.0),
    "metrics_ms_10k": (None, 100.0),
    "metrics_pause_ms_10k": (None, 10.0),
    "page_first_paint_ms": (None, 1000.0),
    "page_pause_ms": (None, 10.0),
    "cpmd_hosts_per_core": (500.0, None),
    "restart_s_100x10k": (None, 3.0),
    "stats_ms_200": (None, 50.0),
    "change_ms_10k_churn": (None, 20.0),
    "edge_change_us_256": (None, 20.0),
    "edge_load_ms_10k": (None, 20.0),
    "edge_ns_over_forwarding": (None, 0.0),
    "resize_lost_packets": (None, 0.0),
    "signal_ms_p50": (None, 5.0),
    "signal_ms_p99": (None, 20.0),
    "burst_refused": (None, 0.0),
    "burst_delayed": (None, 0.0),
    "natd_share_at_cap": (None, 0.1),
    "neighbour_conn_rate_ratio": (0.8, None),
}
"""Lower and upper bound of each figure."""


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """
    What one part found.

    :param figures: By the names in :data:`KEYS`.
    :param runs: The single measurements behind them, by a name that ends in the unit.
    """

    figures: Mapping[str, float]
    runs: Mapping[str, Sequence[float]]


def median(values: Sequence[float]) -> float:
    """:raise ValueError: When there are none."""
    if not values:
        raise ValueError("no measurements")
    return statistics.median(values)


def percentile(values: Sequence[float], share: float) -> float:
    """
    Return the smallest value that at least this share of all values does not exceed (nearest rank).

    :param share: Above 0 and up to 1.
    :raise ValueError: When there are no values, or the share makes no sense.
    """
    if not values or not 0 < share <= 1:
        raise ValueError(f"no percentile {share} of {len(values)} measurements")
    return sorted(values)[math.ceil(share * len(values)) - 1]


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Return the quotient of two medians. :raise ValueError: When there are no measurements or the divisor is 0."""
    divisor = median(below)
    if divisor == 0:
        raise ValueError("cannot divide by a median of 0")
    return median(above) / divisor


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """
    Return the median of the quotients of paired runs, the two of a pair made right after each other.

    Other load on the machine changes within minutes by more than the difference to be measured, but affects both runs
    of a pair alike.

    :raise ValueError: When there are no pairs, the numbers of runs differ, or a divisor is 0.
    """
    if len(above) != len(below) or not all(below):
        raise ValueError(f"{len(above)} and {len(below)} runs do not make pairs to be divided")
    return median([one / other for one, other in zip(above, below, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the distribution of single measurements: count, minimum, quartiles, maximum."""
    return {
        "runs": len(values),
        "min": round_value(min(values)),
        "p25": round_value(percentile(values, 0.25)),
        "p50": round_value(median(values)),
        "p75": round_value(percentile(values, 0.75)),
        "max": round_value(max(values)),
    }


def round_value(value: float) -> float:
    """Return a value with four significant digits."""
    return float(f"{value:.4g}")


def missed_targets(figures: Mapping[str, float]) -> list[str]:
    """Return a line for each figure that misses its target."""
    lines = []
    for key, (least, most) in TARGETS.items():
        value = figures.get(key)
        if value is not None and least is not None and value < least:
            lines.append(f"{key} is {round_value(value)}, should be at least {least:g}")
        if value is not None and most is not None and value > most:
            lines.append(f"{key} is {round_value(value)}, should be at most {most:g}")
    return lines


def report(parts: Iterable[Measured], machine: Mapping[str, Any], failed: Mapping[str, str]) -> dict[str, Any]:
    """
    Return the one object: every figure by its name, then ``machine``, ``spread`` and ``failed``.

    :param failed: Why parts could not be measured, by the part.
    """
    figures: dict[str, Any] = {}
    spreads: dict[str, dict[str, float]] = {}
    for part in parts:
        figures |= {key: round_value(value) for key, value in part.figures.items()}
        spreads |= {name: spread(values) for name, values in part.runs.items()}
    return {**figures, "machine": dict(machine), "spread": spreads, "failed": dict(failed)}
