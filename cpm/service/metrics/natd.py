"""
The metrics of natd, declared. :mod:`natctl.metrics` has their values.

Tested in ``tests/unit/natctl/test_metrics.py``.
"""

from __future__ import annotations

from typing import Final

from cpm.service.metrics.values import Kind, Metric


def _gauge(name: str, text: str, labels: tuple[str, ...] = (), series: str = "1") -> Metric:
    return Metric(f"virt_ports_natd_{name}", Kind.GAUGE, text, labels, series)


def _counter(name: str, text: str, labels: tuple[str, ...] = (), series: str = "1") -> Metric:
    return Metric(f"virt_ports_natd_{name}_total", Kind.COUNTER, text, labels, series)


def _seconds(name: str, text: str, labels: tuple[str, ...] = (), series: str = "17") -> Metric:
    return Metric(f"virt_ports_natd_{name}_seconds", Kind.HISTOGRAM, text, labels, series)


BUILD: Final = _gauge("build_info", "Always 1; the version of natd and the node's name.", ("version", "node"))
CONNECTED: Final = _gauge("manager_connected", "1 while natd has a session with cpmd.")
DOMAINS: Final = _gauge("domains", "VMs that run here or migrate here.")
WARNINGS: Final = _gauge("warnings", "What is wrong with this machine: see node list.")
DROPPED: Final = _counter(
    "dropped_packets", "Packets that our rules dropped, as the kernel counts them.", ("reason",), "up to 10"
)
REPAIRS: Final = _counter("kernel_repairs", "Differences mended between what the kernel held and what it should hold.")
ERRORS: Final = _counter(
    "kernel_errors", "Kernel requests (netlink, sysctl) that failed, by error.", ("error",), "1 an error seen"
)
PORT_REQUESTS: Final = _counter(
    "port_requests",
    "Guests' requests for ports (PCP, NAT-PMP): answered, or dropped because they were too many or make no sense.",
    ("outcome",), "2"
)  # fmt: skip
CONNECTIONS: Final = _gauge("connections", "Connections of VMs in the connection table, when last counted.")
ENTRIES: Final = _gauge("conntrack_entries", "Entries in the machine's connection table, all programs' together.")
ENTRIES_LIMIT: Final = _gauge("conntrack_entries_limit", "Entries that the connection table can have.")
PROGRAMMING: Final = _seconds(
    "programming", "Time of a kernel change: of some VMs, or of everything.", ("of",), "17 each of 2"
)
HOOKS: Final = _seconds(
    "hook", "Time from a call of libvirt's hook to its answer, by operation.", ("operation",), "17 an operation seen"
)
SIGNAL: Final = _seconds(
    "signal_to_ports", "Time from the kernel's signal that ports run out until it holds more ports for the VM."
)

CERTIFICATE: Final = _gauge(
    "certificate_end_timestamp_seconds",
    "When a certificate in use ends, UTC: that of a table of natd.toml, or its authority's (manager-ca).",
    ("of",), "up to 4",
)  # fmt: skip

ALL: Final[tuple[Metric, ...]] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""All of them, in the order of this module."""
