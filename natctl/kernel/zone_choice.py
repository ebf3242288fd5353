"""
Which VMs can get a conntrack zone of their own when they begin to be managed.

A connection stays in the zone in which it began: a VM that gets a zone, or loses it, loses its connections. So a VM
gets one when it has no connections yet, and keeps it while it is managed. One that is denied and has none is looked at
again when the manager gives it something: its connections of before can only be found by its internal address.

Tested by ``tests/netns/test_neighbours.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import IPv4Address
from typing import Final

from cpm.protocol.model import DomainUUID
from natctl.model.entries import HostEntry, HostSettings
from natctl.netlink.conntrack import zones_of, zones_of_all
from natctl.netlink.links import has_received
from natctl.netlink.socket import Socket
from natctl.ruleset import host_maps, zones
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import Reading

_FEW: Final = 8
"""VMs up to which the kernel walks its table once for each: that takes less time than decoding all connections."""


def silent(rtnl: Socket, starting: Collection[HostEntry]) -> frozenset[DomainUUID]:
    """
    Return those of a few VMs that begin to be managed which have no interface yet, or have sent nothing; of many, none.

    Such a VM has no connections: what an earlier run of it left in the table does not count. To see this takes
    microseconds a VM, whereas :func:`allowed` walks the table of all connections, and libvirt waits meanwhile.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    few = starting if len(starting) <= _FEW else ()
    return frozenset(entry.intent.domain for entry in few if _has_sent_nothing(rtnl, entry))


def allowed(
    netfilter: Socket, rtnl: Socket, settings: HostSettings, fresh: Collection[HostEntry]
) -> frozenset[DomainUUID]:
    """
    Return those of VMs that were not managed until now which can get a zone of their own.

    A VM with connections that are managed (natd was restarted, and somebody removed our tables meanwhile) gets the zone
    that they are in. Any other gets one unless it has sent something: then it may have connections that are not
    managed, and they are in no zone.

    :param netfilter: A socket to netfilter.
    :param rtnl: A socket to the routing tables.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    in_use = _zones_in_use(netfilter, settings, fresh) if fresh else {}
    return frozenset(
        entry.intent.domain
        for entry in fresh
        if (entry.index in used if (used := in_use.get(entry.intent.internal)) else _has_sent_nothing(rtnl, entry))
    )


def is_decided(entry: HostEntry | None, with_zone: Collection[DomainUUID]) -> bool:
    """Whether a VM that the kernel holds like this keeps its zone, or keeps having none."""
    return entry is not None and (not entry.is_denied or entry.intent.domain in with_zone)


def managed(
    settings: HostSettings,
    reading: Reading,
    believed: tuple[Mapping[DomainUUID, HostEntry], frozenset[DomainUUID]] | None,
) -> tuple[frozenset[DomainUUID], frozenset[DomainUUID]]:
    """
    Return the VMs that are managed already, and those among them that have a zone: while they are managed, both stay.

    :param reading: What the kernel holds.
    :param believed: The VMs that were last programmed, and those of them with a zone, which count more than the
        kernel's tables: others may have changed these. None: nothing was programmed yet.
    """
    in_kernel = host_maps.entries_in(settings, reading)
    indexes = zones.indexes_in(Marks.of_mask(settings.mark_mask), reading.holdings)
    with_zone = frozenset(domain for domain, entry in in_kernel.items() if entry.index in indexes)
    if believed is not None:
        in_kernel, with_zone = {**in_kernel, **believed[0]}, with_zone.difference(believed[0]) | believed[1]
    return frozenset(domain for domain, entry in in_kernel.items() if is_decided(entry, with_zone)), with_zone


def _has_sent_nothing(rtnl: Socket, entry: HostEntry) -> bool:
    return not any(has_received(rtnl, tap) for tap in entry.taps)


def _zones_in_use(
    netfilter: Socket, settings: HostSettings, fresh: Collection[HostEntry]
) -> Mapping[IPv4Address, frozenset[int]]:
    if len(fresh) > _FEW:
        return zones_of_all(netfilter, Marks.of_mask(settings.mark_mask).flag)
    return {entry.intent.internal: zones_of(netfilter, entry.intent.internal) for entry in fresh}
