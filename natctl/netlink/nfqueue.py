"""
Connections that wait in the kernel until their VM has more ports: packets of one NFQUEUE.

The rule that puts them there is in the host role's ruleset (set ``deferred``). Only a packet's description is asked
for, not the packet. Packets that wait when this process ends are dropped by the kernel, and TCP sends its SYN again.
When too many wait, those that follow go on at once. A queue has one listener in a network namespace; other queues, and
their listeners, are not touched.

Sources: linux/netfilter/nfnetlink_queue.h; ``nfqnl_recv_config``, ``nfqnl_enqueue_packet`` and ``nfqnl_recv_verdict``
in net/netfilter/nfnetlink_queue.c. Tested in ``test_reports`` and ``tests/netns/test_arrivals.py``.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from pyroute2.netlink import NLM_F_ACK
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_QUEUE

from natctl.model.entries import Queueing
from natctl.netlink.message import (
    Request,
    attribute,
    attributes,
    netfilter_bodies,
    netfilter_message,
    netfilter_type,
    network_number,
    network_u32,
)
from natctl.netlink.nftables import encode
from natctl.netlink.socket import NETFILTER, Listener, MessagesLost, Socket
from natctl.ruleset.expressions import extension_queue_to, queue_to

# NFQNL_MSG_PACKET, _VERDICT and _CONFIG
_PACKET, _VERDICT, _CONFIG = (netfilter_type(NFNL_SUBSYS_QUEUE, kind) for kind in (0, 1, 2))
_CFG_COMMAND, _CFG_PARAMS, _CFG_LIMIT, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_BIND = struct.pack("!BBH", 1, 0, socket.AF_INET)
_COPY_META = struct.pack("!IB", 0, 1)
_FAIL_OPEN = network_u32(1)
_PACKET_HEADER, _MARK = 1, 3
_VERDICT_HEADER = 2
_ACCEPT = 1
_BUFFER_BYTES: Final = 4 << 20
_MOST: Final = 4096
"""Packets that may wait."""
_AT_ONCE: Final = 256


def queueing(nft: Socket) -> Queueing:
    """
    Return how a rule can hand packets to a program on this kernel. Changes nothing.

    :raise KernelError: When the kernel cannot be asked.
    """
    ways = {Queueing.NATIVE: queue_to(0), Queueing.EXTENSION: extension_queue_to(0)}
    for way, expression in ways.items():
        if not nft.try_each(encode.trial(expression), "try whether packets can be queued")[-1]:
            return way
    return Queueing.NONE


class Deferred(NamedTuple):
    """The first packet of a connection that waits."""

    mark: int
    """The packet's mark, all 32 bits of it."""
    packet: int
    """The kernel's number for it, for :meth:`PacketQueue.release`."""


class PacketQueue:
    """
    The program's end of a queue, from when it is made; close it when done.

    :param number: Of the queue; the caller's network namespace counts.
    :raise KernelError: When another program has the queue (EPERM, EBUSY), or the kernel gives no socket.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        action = f"take packets from NFQUEUE {number}"
        limits = (
            attribute(_CFG_PARAMS, _COPY_META)
            + attribute(_CFG_LIMIT, network_u32(_MOST))
            + attribute(_CFG_MASK, _FAIL_OPEN)
            + attribute(_CFG_FLAGS, _FAIL_OPEN)
        )
        settings = attribute(_CFG_COMMAND, _BIND), limits
        self._listener = Listener(
            NETFILTER,
            action,
            configuration=[Request(self._message(_CONFIG, NLM_F_ACK, part), action) for part in settings],
            receive_buffer_bytes=_BUFFER_BYTES,
            is_forced=True,
        )

    def close(self) -> None:
        """Give the queue back; packets that wait in it are dropped."""
        self._listener.close()

    async def next(self) -> list[Deferred]:
        """
        Wait until packets wait, and return those that do.

        :raise KernelError: When the socket fails.
        """
        try:
            buffers = await self._listener.receive(_MOST)
        except MessagesLost:
            # The kernel let those pass that it could not report.
            return []
        return [deferred for buffer in buffers for deferred in deferred_in(buffer)]

    def release(self, packets: Sequence[int]) -> None:
        """
        Let these packets go on; numbers of packets that no longer wait are ignored.

        :raise KernelError: When the kernel does not take it.
        """
        for start in range(0, len(packets), _AT_ONCE):
            some = packets[start : start + _AT_ONCE]
            verdicts = [attribute(_VERDICT_HEADER, struct.pack("!II", _ACCEPT, packet)) for packet in some]
            self._listener.send([self._message(_VERDICT, 0, verdict) for verdict in verdicts])

    def _message(self, kind: int, flags: int, body: bytes) -> bytes:
        return netfilter_message(kind, flags, socket.AF_INET, body, self._number)


def deferred_in(buffer: bytes) -> Iterator[Deferred]:
    """Yield the packets that the kernel reports; what has no number is left out."""
    for begin, end in netfilter_bodies(buffer, _PACKET):
        mark, packet = 0, None
        for kind, start, stop in attributes(buffer, begin, end):
            if kind == _PACKET_HEADER and stop - start >= 4:
                packet = network_number(buffer[start : start + 4])
            elif kind == _MARK and stop - start >= 4:
                mark = network_number(buffer[start : start + 4])
        if packet is not None:
            yield Deferred(mark, packet)
