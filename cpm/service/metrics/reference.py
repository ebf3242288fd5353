"""
``docs/reference/metrics.md``, written from the declarations::

    python -m cpm.service.metrics.reference > docs/reference/metrics.md

Tested in ``tests/unit/cpm/service/metrics/test_reference.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

from cpm.service.metrics import cpmd, natd
from cpm.service.metrics.values import BOUNDS_S, Kind, Metric

_HEAD = """\
# Metrics

cpmd and natd serve these metrics in Prometheus' text format at `/metrics`, once `[metrics] address` is set in
`cpmd.toml` and `natd.toml`; [how to monitor](../how-to/monitoring.md) has the rest. cpmd serves them on its unix
sockets, too. This page is written by `python -m cpm.service.metrics.reference`.

Besides these there are the metrics of the process (`process_cpu_seconds_total`, `process_resident_memory_bytes`,
`process_open_fds` and others) and of Python's garbage collector, under the names that all exporters use.

Counters begin at 0 when the daemon starts, except those of kernels (`dropped_packets`), which begin when the rules were
made, and `virt_ports_clock_steps_total`. Histograms have buckets up to {bounds} seconds.

The last column has the number of time series. At cpmd, single VMs have eight each, and those that changed or were
refused ports a few more; everything else of a site with 20 nodes and 16 addresses has about 500. Each natd has about
100,
whatever the number of its VMs.
"""


def page() -> str:
    """Return the page."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield _HEAD.format(bounds=", ".join(f"{bound:g}" for bound in BOUNDS_S))
    yield "## cpmd\n"
    yield from _table(metric for metric in cpmd.ALL if metric not in cpmd.PER_VM)
    yield "\n### Of single VMs\n"
    yield "`[metrics] per_vm = false` in `cpmd.toml` leaves these out.\n"
    yield from _table(cpmd.PER_VM)
    yield "\n## natd\n"
    yield from _table(natd.ALL)


def _table(metrics: Iterable[Metric]) -> Iterator[str]:
    yield "| metric | labels | what | series |"
    yield "|---|---|---|---|"
    for metric in metrics:
        kind = "" if metric.kind is Kind.GAUGE else f" ({metric.kind})"
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        yield f"| `{metric.name}`{kind} | {labels} | {metric.help} | {metric.series} |"


if __name__ == "__main__":
    sys.stdout.write(page())
