"""
The kernel's signals about packets of VMs, in three NFLOG groups.

In one it says that a VM's arrival budget is used up: the messages come from a rule of the host role (set ``budgets``),
and each has the mark with which a connection began. In the other it reports packets of connections that are older than
our care for their VM (:mod:`natctl.ruleset.older`), with the packet's headers. In the third it hands over what guests
ask of gateways (chain ``asks`` of the host role), each packet with its frame's header. In each network namespace, a
group has one listener.

Sources: linux/netfilter/nfnetlink_log.h; ``nfulnl_recv_config`` and ``nfulnl_log_packet`` in
net/netfilter/nfnetlink_log.c. Tested in ``test_reports`` and ``tests/netns/test_arrivals.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from typing import Final, NamedTuple, TypeVar

from pyroute2.netlink import NLM_F_ACK
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_ULOG

from natctl.model.flow import MAXIMUM_HEADS
from natctl.netlink.listener import Listener
from natctl.netlink.message import (
    Request,
    attribute,
    attributes,
    netfilter_bodies,
    netfilter_message,
    netfilter_type,
    network_number,
    network_u32,
    text,
)
from natctl.netlink.socket import NETFILTER, MessagesLost
from natctl.ruleset.older import IN_ZONE

_PACKET, _CONFIG = (netfilter_type(NFNL_SUBSYS_ULOG, kind) for kind in (0, 1))  # NFULNL_MSG_PACKET and _CONFIG
_CFG_COMMAND, _CFG_MODE, _CFG_THRESHOLD = 1, 2, 5
_BIND = b"\1"
_COPY_META = struct.pack("!IBB", 0, 1, 0)
_Packet = TypeVar("_Packet")

_COPY_HEADS = struct.pack("!IBB", MAXIMUM_HEADS, 2, 0)
_COPY_PACKET = struct.pack("!IBB", 1 << 11, 2, 0)
_MARK, _INTERFACE, _PORT, _PAYLOAD, _PREFIX, _FRAME_HEADER = 2, 4, 6, 9, 10, 16
_ETHERNET_BYTES: Final = 14
_BUFFER_BYTES: Final = 1 << 20
_REPORTS_AT_ONCE: Final = 64


@dataclasses.dataclass(frozen=True, slots=True)
class BudgetUsedUp:
    """A connection began after the budget of its VM was used up."""

    mark: int
    """The packet's mark, all 32 bits of it."""


class StuckPacket(NamedTuple):
    """A packet was dropped because its connection is older than our care for its VM."""

    mark: int
    """The packet's mark, all 32 bits of it."""
    is_in_zone: bool
    """Whether its connection is in the zone of its VM; else it is in none."""
    heads: bytes
    """What the packet begins with: the IPv4 header, and at least eight bytes behind it. A guest has written it."""


class AskedPacket(NamedTuple):
    """A guest has asked something of a gateway."""

    mark: int
    """The packet's mark, all 32 bits of it."""
    interface: int
    """Index of the interface that it came by: the bridge, or what is above it."""
    port: int
    """Index of the VM's own interface; 0: the kernel does not say."""
    frame: bytes
    """The Ethernet header. A guest has written it."""
    packet: bytes
    """The whole packet, up to 2,048 bytes of it. A guest has written it."""


@dataclasses.dataclass(frozen=True, slots=True)
class SignalsLost:
    """The receive buffer overflowed, and signals of unknown VMs are missing."""


async def watch_budgets(group: int) -> AsyncGenerator[BudgetUsedUp | SignalsLost, None]:
    """
    Yield the signals of this group from now on, without end. Close it (``aclosing``) when done.

    :param group: NFLOG group in the caller's network namespace.
    :raise KernelError: When another process listens to the group (EPERM, EBUSY), or the kernel gives no socket.
    """
    with contextlib.closing(_listener(group)) as listener:
        while True:
            try:
                buffers = await listener.receive()
            except MessagesLost:
                yield SignalsLost()
                continue
            for buffer in buffers:
                for mark in marks_in(buffer):
                    yield BudgetUsedUp(mark)


def watch_older(group: int) -> AsyncGenerator[list[StuckPacket], None]:
    """
    Yield, without end, the packets that were reported in this group, up to 64 at once.

    Reports that come faster than they are taken are lost. Close it (``aclosing``) when done.

    :param group: NFLOG group in the caller's network namespace.
    :raise KernelError: When another process listens to the group (EPERM, EBUSY), or the kernel gives no socket.
    """
    return _watch(group, _COPY_HEADS, stuck_in)


def watch_asked(group: int) -> AsyncGenerator[list[AskedPacket], None]:
    """
    Yield, without end, what guests ask, up to 64 packets at once; close it (``aclosing``) when done.

    Packets that come faster than they are taken are lost, and clients send them again.

    :param group: NFLOG group in the caller's network namespace.
    :raise KernelError: When another process listens to the group (EPERM, EBUSY), or the kernel gives no socket.
    """
    return _watch(group, _COPY_PACKET, asked_in)


async def _watch(
    group: int, copied: bytes, packets_in: Callable[[bytes], Iterable[_Packet]]
) -> AsyncGenerator[list[_Packet], None]:
    with contextlib.closing(_listener(group, copied)) as listener:
        while True:
            try:
                buffers = await listener.receive(_REPORTS_AT_ONCE)
            except MessagesLost:
                continue
            yield [packet for buffer in buffers for packet in packets_in(buffer)]


def _listener(group: int, mode: bytes = _COPY_META) -> Listener:
    settings = attribute(_CFG_COMMAND, _BIND) + attribute(_CFG_MODE, mode) + attribute(_CFG_THRESHOLD, network_u32(1))
    action = f"listen to NFLOG group {group}"
    configuration = [Request(netfilter_message(_CONFIG, NLM_F_ACK, socket.AF_INET, settings, group), action)]
    return Listener(NETFILTER, action, configuration=configuration, receive_buffer_bytes=_BUFFER_BYTES)


def marks_in(buffer: bytes) -> Iterator[int]:
    """Yield the mark of every reported packet; a packet without a mark belongs to no VM and is left out."""
    for begin, end in netfilter_bodies(buffer, _PACKET):
        for kind, start, stop in attributes(buffer, begin, end):
            if kind == _MARK and stop - start == 4:
                yield network_number(buffer[start:stop])


def stuck_in(buffer: bytes) -> Iterator[StuckPacket]:
    """Yield every reported packet; a message without a mark or without a packet is left out."""
    for begin, end in netfilter_bodies(buffer, _PACKET):
        parts = {kind: buffer[start:stop] for kind, start, stop in attributes(buffer, begin, end)}
        if len(parts.get(_MARK, b"")) == 4 and _PAYLOAD in parts:
            is_in_zone = text(parts.get(_PREFIX, b"")) == IN_ZONE
            yield StuckPacket(network_number(parts[_MARK]), is_in_zone, parts[_PAYLOAD])


def asked_in(buffer: bytes) -> Iterator[AskedPacket]:
    """Yield every packet that was handed over; a message without a mark, a frame or a packet is left out."""
    for begin, end in netfilter_bodies(buffer, _PACKET):
        parts = {kind: buffer[start:stop] for kind, start, stop in attributes(buffer, begin, end)}
        numbers = [parts.get(kind, b"") for kind in (_MARK, _INTERFACE, _PORT)]
        mark, interface, port = (network_number(each) if len(each) == 4 else 0 for each in numbers)
        frame = parts.get(_FRAME_HEADER, b"")
        if mark and interface and len(frame) == _ETHERNET_BYTES and _PAYLOAD in parts:
            yield AskedPacket(mark, interface, port, frame, parts[_PAYLOAD])
