"""
Connections that are deferred until their VM has more ports: their first packets wait in one NFQUEUE of the kernel.

They are queued by a rule of the host role (set ``deferred``). The kernel sends a packet's metadata only, not the
packet. When this process ends, the kernel drops the packets in the queue, and TCP sends its SYNs again. When the queue
is full, further packets pass at once. In each network namespace a queue has one listener.

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
)
from natctl.netlink.nftables import encode
from natctl.netlink.socket import NETFILTER, MessagesLost, Socket
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
_QUEUE_LENGTH: Final = 4096
"""Packets that the queue holds."""
_VERDICTS_PER_SEND: Final = 256


def queueing(nft: Socket) -> Queueing:
    """
    Return how a rule of this kernel can queue packets to a program, by trying; changes nothing.

    :raise KernelError: When the kernel does not answer.
    """
    ways = {Queueing.NATIVE: queue_to(0), Queueing.EXTENSION: extension_queue_to(0)}
    for way, expression in ways.items():
        if not nft.try_each(encode.trial(expression), "try whether packets can be queued")[-1]:
            return way
    return Queueing.NONE


class Deferred(NamedTuple):
    """The first packet of a deferred connection."""

    mark: int
    """The packet's mark, all 32 bits of it."""
    packet: int
    """The kernel's number for it, for :meth:`PacketQueue.release`."""


class PacketQueue:
    """
    The listener of a queue. Close it when done.

    :param number: NFQUEUE in the caller's network namespace.
    :raise KernelError: When another program has the queue (EPERM, EBUSY), or the kernel gives no socket.
    """

    def __init__(self, number: int) -> None:
        self._number = number
        action = f"take packets from NFQUEUE {number}"
        limits = (
            attribute(_CFG_PARAMS, _COPY_META)
            + attribute(_CFG_LIMIT, network_u32(_QUEUE_LENGTH))
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
        """Close the queue; the kernel drops the packets in it."""
        self._listener.close()

    async def next(self) -> list[Deferred]:
        """
        Return the packets that have been queued; wait for the first.

        :raise KernelError: When the socket fails.
        """
        try:
            buffers = await self._listener.receive(_QUEUE_LENGTH)
        except MessagesLost:
            # The kernel lets packets pass that it cannot report.
            return []
        return [deferred for buffer in buffers for deferred in deferred_in(buffer)]

    def release(self, packets: Sequence[int]) -> None:
        """
        Let these packets pass; numbers of packets that are no longer queued are ignored.

        :raise KernelError: When the kernel refuses.
        """
        for start in range(0, len(packets), _VERDICTS_PER_SEND):
            some = packets[start : start + _VERDICTS_PER_SEND]
            verdicts = [attribute(_VERDICT_HEADER, struct.pack("!II", _ACCEPT, packet)) for packet in some]
            self._listener.send([self._message(_VERDICT, 0, verdict) for verdict in verdicts])

    def _message(self, kind: int, flags: int, body: bytes) -> bytes:
        return netfilter_message(kind, flags, socket.AF_INET, body, self._number)


def deferred_in(buffer: bytes) -> Iterator[Deferred]:
    """Yield the packets in a buffer; a message without a packet number is left out."""
    for begin, end in netfilter_bodies(buffer, _PACKET):
        mark, packet = 0, None
        for kind, start, stop in attributes(buffer, begin, end):
            if kind == _PACKET_HEADER and stop - start >= 4:
                packet = network_number(buffer[start : start + 4])
            elif kind == _MARK and stop - start >= 4:
                mark = network_number(buffer[start : start + 4])
        if packet is not None:
            yield Deferred(mark, packet)
