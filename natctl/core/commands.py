"""
The vocabulary in which :class:`natctl.core.node.Node` has things done: values only.

``natctl.daemon`` carries them out. It tells the node how a kernel command went
(:meth:`~natctl.core.node.Node.programmed`,
:meth:`~natctl.core.node.Node.refused_by_kernel`) and what a count said (:meth:`~natctl.core.node.Node.counted`,
:meth:`~natctl.core.node.Node.not_counted`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from ipaddress import IPv4Address

from cpm.protocol.messages import NodeMessage
from cpm.protocol.model import DomainUUID
from natctl.arrivals.budget import Count, Release
from natctl.model.entries import Change, Destination, EdgeEntry, HostEntry, Path


@dataclasses.dataclass(frozen=True, slots=True)
class Send:
    """Say this to the manager."""

    message: NodeMessage


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """Answer the hook of that request; ``code`` is empty when all is well."""

    request: int
    code: str
    text: str


@dataclasses.dataclass(frozen=True, slots=True)
class Program:
    """Change the kernel by one transaction, then say whether it is in force."""

    change: Change


@dataclasses.dataclass(frozen=True, slots=True)
class Replace:
    """Make the kernel hold exactly this, then say whether it is in force."""

    host: Mapping[DomainUUID, HostEntry]
    edge: Mapping[DomainUUID, EdgeEntry]
    path: Path


@dataclasses.dataclass(frozen=True, slots=True)
class Forget:
    """Delete the conntrack entries of a VM that ended."""

    internal: IPv4Address


@dataclasses.dataclass(frozen=True, slots=True)
class CountPorts:
    """Count the ports of one VM, then say what came of it."""

    count: Count
    internal: IPv4Address


@dataclasses.dataclass(frozen=True, slots=True)
class RefuseNew:
    """Have the kernel refuse exactly this in words."""

    where: Mapping[DomainUUID, frozenset[Destination]]
    for_s: float


@dataclasses.dataclass(frozen=True, slots=True)
class Warn:
    """Tell the operator."""

    text: str


Command = Send | Answer | Program | Replace | Forget | CountPorts | RefuseNew | Release | Warn
