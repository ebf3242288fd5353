"""
Connections that wait in the kernel until their VM has more ports: packets of one NFQUEUE.

The rule that puts them there is in the host role's ruleset (set ``deferred``). Only a packet's description is asked
for, not the packet. Who waits when this process ends is dropped by the kernel, and TCP sends its SYN again. When too
many wait, those that follow go on at once.

Sources: linux/netfilter/nfnetlink_queue.h; ``nfqnl_recv_config``, ``nfqnl_enqueue_packet`` and ``nfqnl_recv_verdict``
in net/netfilter/nfnetlink_queue.c.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from natctl.model.entries import Queueing
from natctl.netlink.frames import attribute, attributes
from natctl.netlink.netfilter import Listener, packets_in
from natctl.netlink.nftables import encode
from natctl.netlink.wire import Wire
from natctl.ruleset.expressions import extension_queue_to, queue_to

_PACKET, _VERDICT, _CONFIG = 3 << 8 | 0, 3 << 8 | 1, 3 << 8 | 2  # NFNL_SUBSYS_QUEUE
_CFG_COMMAND, _CFG_PARAMS, _CFG_LIMIT, _CFG_MASK, _CFG_FLAGS = 1, 2, 3, 4, 5
_BIND = struct.pack("!BBH", 1, 0, socket.AF_INET)
_COPY_META = struct.pack("!IB", 0, 1)
_LET_PASS_WHEN_FULL = struct.pack("!I", 1)
_PACKET_HEADER, _MARK = 1, 3
_VERDICT_HEADER = 2
_ACCEPT = 1
_BUFFER_BYTES = 4 << 20
_MOST: Final = 4096
"""Packets that may wait."""
_AT_ONCE: Final = 256
_ACTION = "take packets from NFQUEUE {}"


def queueing(wire: Wire) -> Queueing:
    """
    Return how a rule can hand packets to a program on this kernel. Changes nothing.

    :raise KernelError: When the kernel cannot be asked.
    """
    ways = {Queueing.NATIVE: queue_to(0), Queueing.EXTENSION: extension_queue_to(0)}
    for way, expression in ways.items():
        if not wire.answer_to_last(encode.trial(expression), "try whether packets can be queued"):
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
        limits = (
            attribute(_CFG_PARAMS, _COPY_META)
            + attribute(_CFG_LIMIT, struct.pack("!I", _MOST))
            + attribute(_CFG_MASK, _LET_PASS_WHEN_FULL)
            + attribute(_CFG_FLAGS, _LET_PASS_WHEN_FULL)
        )
        configuration = [attribute(_CFG_COMMAND, _BIND), limits]
        self._listener = Listener(
            number, _ACTION.format(number), _CONFIG, configuration, buffer_bytes=_BUFFER_BYTES, is_urgent=True
        )

    def close(self) -> None:
        """Give the queue back; who waits in it is dropped."""
        self._listener.close()

    async def next(self) -> list[Deferred]:
        """
        Wait until packets wait, and return those that do.

        :raise KernelError: When the socket fails.
        """
        buffers = await self._listener.heard(_MOST)
        if buffers is None:
            # The kernel let those pass of which it could not tell.
            return []
        return [deferred for buffer in buffers for deferred in _deferred(buffer)]

    def release(self, packets: Sequence[int]) -> None:
        """
        Let these packets go on; those that do not wait any more are none.

        :raise KernelError: When the kernel does not take it.
        """
        for start in range(0, len(packets), _AT_ONCE):
            some = packets[start : start + _AT_ONCE]
            verdicts = [attribute(_VERDICT_HEADER, struct.pack("!II", _ACCEPT, packet)) for packet in some]
            self._listener.say(_VERDICT, verdicts)


def _deferred(buffer: bytes) -> Iterator[Deferred]:
    for begin, end in packets_in(buffer, _PACKET):
        mark, packet = 0, None
        for attribute_, start, _ in attributes(buffer, begin, end):
            if attribute_ == _PACKET_HEADER:
                packet = int.from_bytes(buffer[start : start + 4], "big")
            elif attribute_ == _MARK:
                mark = int.from_bytes(buffer[start : start + 4], "big")
        if packet is not None:
            yield Deferred(mark, packet)
