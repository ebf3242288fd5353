"""
The kernel's connection table: reads the ports in use of each VM, and deletes the connections of a VM that is gone.

A managed connection carries a bit in its conntrack mark (set by the host role's ruleset), and its replies go to the
VM's internal address: the destination of the reply tuple identifies the VM, and that tuple's port is the one in the
VM's range. The kernel filters, and we decode the few bytes that matter, so one pass serves all VMs. Whether the kernel
translated the source (``IPS_SRC_NAT``) does not matter: a guest that itself sends from its internal address and a port
of its range is not translated, and yet uses that port.

Limits of a dump: connections that begin or end during it may be missing, and a connection can be listed twice if the
entry before it is deleted meanwhile. To be sure that a draining range has *no* connection left, take two dumps in a row
that show none: the kernel lists a hash table, and if that table is resized (``nf_conntrack_buckets``) during one dump,
entries can be missing.
"""

from natctl.netlink.conntrack.counting import (
    FLAG,
    dump_full_destinations,
    dump_ports,
    dump_ports_of,
    ports_behind,
    zones_of,
    zones_of_all,
)
from natctl.netlink.conntrack.deletion import delete_connections, delete_unanswered
from natctl.netlink.conntrack.threads import Conntrack

__all__ = [
    "FLAG",
    "Conntrack",
    "delete_connections",
    "delete_unanswered",
    "dump_full_destinations",
    "dump_ports",
    "dump_ports_of",
    "ports_behind",
    "zones_of",
    "zones_of_all",
]
