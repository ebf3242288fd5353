"""
The commands of natd's deciding half: values only.

:class:`natctl.core.node.Node` and :class:`natctl.arrivals.controller.Arrivals` share this vocabulary.
``natctl.daemon`` carries the commands out. It tells the node the result of kernel transactions
(:meth:`~natctl.core.node.Node.on_kernel_programmed`, :meth:`~natctl.core.node.Node.on_kernel_refused`) and of counts
(:meth:`~natctl.core.arrival_events.ArrivalEvents.on_ports_counted`,
:meth:`~natctl.core.arrival_events.ArrivalEvents.on_count_failed`).

Tested in ``tests/unit/natctl/core/test_node_arrivals.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import TypeAlias

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.messages import NodeMessage
from cpm.protocol.model import DomainUUID, PortRange
from natctl.model.entries import Change, Destination, HostEntry, Path
from natctl.model.remembered import Remembered


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """Send a message to the manager."""

    message: NodeMessage


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """Answer the hook of this request; ``code`` is empty for success."""

    request: int
    code: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """Change the kernel by one transaction, then report whether it is in force."""

    change: Change


@dataclasses.dataclass(frozen=True, slots=True)
class Replace:
    """Make the kernel hold exactly this, then report whether it is in force."""

    host: Mapping[DomainUUID, HostEntry]
    edge: Mapping[DomainUUID, EdgeIntent]
    path: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Forget:
    """Delete the conntrack entries of a VM whose last port here is free, when there is time."""

    internal: IPv4Address


@dataclasses.dataclass(frozen=True, slots=True)
class Prune:
    """
    Delete the conntrack entries of a VM on ports that it does not hold, when there is time.

    They are left from before it stopped. What it holds is asked when that is done
    (:meth:`~natctl.core.node.Node.held_ports`): it may have got more ports by then, or stopped again.
    """

    internal: IPv4Address


@dataclasses.dataclass(frozen=True, slots=True)
class CountPorts:
    """Count the ports in use of one VM, then report the result."""

    domain: DomainUUID
    internal: IPv4Address
    ports: PortRange
    at_cap: bool
    """Whether to find, when no port is free, also the destinations to which every port has a connection."""
    arrivals: float = dataclasses.field(default=0.0, compare=False)
    """Connections known to have begun when the count was commanded."""


@dataclasses.dataclass(frozen=True, slots=True)
class RefuseNew:
    """Have the kernel answer new connections to exactly these destinations with ICMP errors, for ``for_s`` seconds."""

    where: Mapping[DomainUUID, frozenset[Destination]]
    for_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Release:
    """Release deferred connections."""

    packets: tuple[int, ...]
    """The kernel's numbers of their first packets."""


@dataclasses.dataclass(frozen=True, slots=True)
class Remember:
    """Keep on disk whom this node follows, before any command after this one is carried out."""

    now: Remembered
    before: Remembered


@dataclasses.dataclass(frozen=True, slots=True)
class Warn:
    """Log a warning for the operator."""

    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Arm:
    """
    Give a VM's new arrival budget to the kernel with the next change.

    The node does this itself: the budget is part of the VM's :class:`~natctl.model.entries.HostEntry`.
    """

    domain: DomainUUID


Command: TypeAlias = (
    Send | Answer | Program | Replace | Forget | Prune | CountPorts | RefuseNew | Release | Remember | Warn
)
"""Commands of the node to the daemon."""
ArrivalCommand: TypeAlias = Send | CountPorts | RefuseNew | Release | Warn | Arm
"""Commands of the controller of arrivals to the node, which passes on all but :class:`Arm`."""
