"""
The metrics of the process itself, under the names that all exporters use; made by ``prometheus_client``.

Tested in ``tests/unit/cpm/api/test_scraping.py``.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector, generate_latest


def process_metrics() -> str:
    """Return processor time, memory, open files, start time and garbage collection of this process."""
    return generate_latest(_REGISTRY).decode()


_REGISTRY = CollectorRegistry(auto_describe=False)
ProcessCollector(registry=_REGISTRY)
GCCollector(registry=_REGISTRY)
