"""
The metrics of cpmd, declared. :mod:`cpm.queries.metrics` has their values.

Tested in ``tests/unit/cpm/queries/test_metrics.py``.
"""

from __future__ import annotations

from typing import Final

from cpm.service.metrics.values import Kind, Metric

_VM: Final = ("name", "uuid")
_A_VM: Final = "1 a VM"
_A_NODE: Final = "1 a node"
_AN_ADDRESS: Final = "1 an external address"


def _gauge(name: str, text: str, labels: tuple[str, ...] = (), series: str = "1") -> Metric:
    return Metric(f"virt_ports_{name}", Kind.GAUGE, text, labels, series)


def _counter(name: str, text: str, labels: tuple[str, ...] = (), series: str = "1") -> Metric:
    return Metric(f"virt_ports_{name}_total", Kind.COUNTER, text, labels, series)


# The site

BUILD: Final = _gauge("build_info", "Always 1; the version of cpmd.", ("version",))
EPOCH: Final = _gauge("epoch", "Epoch of this manager; grows with each start.")
WRITABLE: Final = _gauge("ledger_writable", "0 while nothing can be written to the ledger.")
WRITE_FAILURES: Final = _counter("ledger_write_failures", "Attempts to write the ledger that failed.")
RESTORING: Final = _gauge("ledger_restoring", "1 while a restored ledger waits for nodes; no VM gets new ports.")
REFUSED_DECISIONS: Final = _counter("refused_decisions", "Decisions refused because they break a rule: bugs.")
CLOCK_STEPS: Final = _counter(
    "clock_steps", "How often the wall clock was set since the ledger was made; nothing depends on it."
)
DOMAINS: Final = _gauge("domains", "VMs by state; claimed: two hosts say that they run it.", ("state",), "1 a state")
LACKING: Final = _gauge("domains_lacking_ports", "VMs that could not get the ports they want.", ("want",), "2")
SHORT: Final = _gauge(
    "domains_short",
    "VMs in a shortage, until a minute after it was last seen: exhausted (at the cap, each port in use), short (the "
    "pool has no more), limited (as many connections as it may have).",
    ("event",), "3",
)  # fmt: skip
SHORT_OF: Final = _gauge(
    "domains_with_less_than_decided",
    "VMs that have fewer ports than was decided, by reason.",
    ("reason",),
    "1 a reason",
)
RESIZES: Final = _counter(
    "resizes", "Ranges changed, by kind; one may be counted twice after an error.", ("kind",), "4"
)
REFUSALS: Final = _counter(
    "refusals", "How often a VM began to have fewer ports than was decided, by reason.", ("reason",), "1 a reason"
)
RESIZE_SECONDS: Final = Metric(
    "virt_ports_resize_seconds", Kind.HISTOGRAM,
    "Time from the decision about new ports until the host uses them, by what they are for.", ("of",), "17 each of 3",
)  # fmt: skip

EVENTS_DELIVERED: Final = _counter(
    "events_delivered", "Entries of the journal that were delivered, by destination.", ("to",), "1 a destination"
)
EVENTS_LOST: Final = _counter(
    "events_lost", "Entries that the journal no longer had when they were to be delivered.", ("to",), "1 a destination"
)
EVENTS_FAILURES: Final = _counter(
    "events_failures", "Deliveries that failed, and are tried again.", ("to",), "1 a destination"
)
EVENTS_FAILING: Final = _gauge(
    "events_failing", "1 while what is to be delivered cannot be.", ("to",), "1 a destination"
)

EVENTS: Final = (EVENTS_DELIVERED, EVENTS_LOST, EVENTS_FAILURES, EVENTS_FAILING)
"""Those of ``[events]`` in cpmd.toml."""

CERTIFICATE: Final = _gauge(
    "certificate_end_timestamp_seconds",
    "When a certificate in use ends, UTC: that of a table of cpmd.toml, or its authority's (listen-ca).",
    ("of",), "up to 5",
)  # fmt: skip

# External addresses

PORTS: Final = _gauge(
    "external_ports", "Ports of an external address by use.", ("address", "use"), "3 an external address"
)
LONGEST_FREE: Final = _gauge("external_longest_free", "Longest run of free ports.", ("address",), _AN_ADDRESS)
ADDRESS_DOMAINS: Final = _gauge("external_domains", "VMs with ports on an address.", ("address",), _AN_ADDRESS)
OWN: Final = _gauge("external_own_ports", "Ports that edges use themselves.", ("address",), _AN_ADDRESS)

# Nodes

CONNECTED: Final = _gauge("node_connected", "1 while a node has a session.", ("node",), _A_NODE)
SYNCED: Final = _gauge("node_synced", "1 when it has confirmed everything it was sent.", ("node",), _A_NODE)
IN_SERVICE: Final = _gauge("node_in_service", "1 while hosts send packets to an edge.", ("node",), "1 an edge")
FENCED: Final = _gauge(
    "node_fenced", "1 while the operator has confirmed that it forwards nothing.", ("node",), _A_NODE
)
BEHIND: Final = _gauge(
    "node_behind_seconds", "Seconds since which a node is away or has not confirmed something.", ("node",), _A_NODE
)
REPORT_AGE: Final = _gauge(
    "node_report_age_seconds", "Seconds since the last report of a connected node.", ("node",), "1 a connected node"
)
HELD_BACK: Final = _gauge(
    "node_held_ports", "Ports that were given back and wait for a node that is away or does not answer.",
    ("node",), _A_NODE,
)  # fmt: skip
NODE_REFUSES: Final = _gauge(
    "node_refused_domains", "VMs that the kernel of a connected node refuses.", ("node",), "1 a connected node"
)
WARNINGS: Final = _gauge("node_warnings", "What is wrong with a node: see node list.", ("node",), _A_NODE)
DROPPED: Final = _counter(
    "node_dropped_packets", "Packets dropped at a node, as its kernel counts them.",
    ("node", "reason"), "up to 10 a node",
)  # fmt: skip
ASKING: Final = _gauge(
    "nodes_waiting_for_approval", "Machines that ask for what the operator has not approved."
)  # fmt: skip
SESSIONS_REFUSED: Final = _counter(
    "node_sessions_refused", "Sessions that nodes were refused, by the code of the error.", ("code",), "1 a code"
)
USE: Final = _gauge("node_use", "What counts towards a host's quota.", ("node", "of"), "2 a host")
QUOTA: Final = _gauge("node_quota", "What a host may have.", ("node", "of"), "2 a host")

# VMs, unless they are switched off

VM_INFO: Final = _gauge(
    "domain_info", "Always 1; the host of a VM and the external address of its range.",
    ("name", "uuid", "node", "address"), _A_VM,
)  # fmt: skip
VM_RANGE: Final = _gauge("domain_range_ports", "Ports for new connections of a VM.", _VM, _A_VM)
VM_USED: Final = _gauge("domain_used_ports", "Ports of these with a connection, when last counted.", _VM, _A_VM)
VM_HELD: Final = _gauge("domain_held_ports", "Ports that nobody else can have: all ranges of a VM.", _VM, _A_VM)
VM_LEAVING: Final = _gauge("domain_leaving_ports", "Those of them in draining and held ranges.", _VM, _A_VM)
VM_FLOOR: Final = _gauge("domain_floor_ports", "Ports that a VM keeps at least.", _VM, _A_VM)
VM_CAP: Final = _gauge("domain_cap_ports", "Ports that a VM gets at most.", _VM, _A_VM)
VM_CONNECTIONS: Final = _gauge("domain_connections_limit", "Connections that a VM may have at once.", _VM, _A_VM)
VM_RESIZES: Final = _counter(
    "domain_resizes", "Changes of a VM's range, by kind.", (*_VM, "kind"), "up to 4 a VM, those that are not 0"
)
VM_REFUSALS: Final = _counter(
    "domain_refusals", "How often a VM began to have fewer ports than was decided.",
    (*_VM, "reason"), "up to 11 a VM, those that are not 0",
)  # fmt: skip
VM_REFUSED_PACKETS: Final = _counter(
    "domain_refused_packets", "Connection attempts answered by ICMP: the VM is at its cap and has no free port.",
    _VM, "1 a VM, if it is not 0",
)  # fmt: skip
VM_LIMITED_PACKETS: Final = _counter(
    "domain_limited_packets",
    "Packets of new connections dropped: the VM has as many as it may have, or begins too many a second.",
    _VM, "1 a VM, if it is not 0",
)  # fmt: skip

PER_VM: Final = (
    VM_INFO, VM_RANGE, VM_USED, VM_HELD, VM_LEAVING, VM_FLOOR, VM_CAP, VM_CONNECTIONS,
    VM_RESIZES, VM_REFUSALS, VM_REFUSED_PACKETS, VM_LIMITED_PACKETS,
)  # fmt: skip
"""Those that ``[metrics] per_vm = false`` in cpmd.toml leaves out."""

ALL: Final[tuple[Metric, ...]] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
"""All of them, in the order of this module."""
