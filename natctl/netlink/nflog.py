"""
Word from the kernel that a VM's arrival budget is used up: messages of one NFLOG group.

The rule that sends them is in the host role's ruleset (set ``budgets``); each says with which mark a connection began.
Only the packet's description is asked for, not the packet.

Sources: linux/netfilter/nfnetlink_log.h; ``nfulnl_recv_config`` and ``nfulnl_log_packet`` in
net/netfilter/nfnetlink_log.c.
"""

from __future__ import annotations

import contextlib
import dataclasses
import struct
from collections.abc import AsyncGenerator, Iterator

from natctl.netlink.frames import attribute, attributes
from natctl.netlink.netfilter import Listener, packets_in

_PACKET, _CONFIG = 4 << 8 | 0, 4 << 8 | 1  # NFNL_SUBSYS_ULOG, NFULNL_MSG_PACKET and _CONFIG
_CFG_COMMAND, _CFG_MODE, _CFG_THRESHOLD = 1, 2, 5
_BIND = b"\1"
_COPY_META = struct.pack("!IBB", 0, 1, 0)
_MARK = 2
_BUFFER_BYTES = 1 << 20
_ACTION = "listen to NFLOG group {}"


@dataclasses.dataclass(frozen=True, slots=True)
class Spent:
    """A connection began whose VM had no budget left."""

    mark: int
    """The packet's mark, all 32 bits of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """The kernel had more to say than we took in; who it was about is not known."""


async def watch_budgets(group: int) -> AsyncGenerator[Spent | Lost, None]:
    """
    Yield what the kernel says in this group, from now on; never ends by itself. Close it (``aclosing``) when done.

    :param group: NFLOG group; the caller's network namespace counts.
    :raise KernelError: When somebody else listens to the group (EPERM, EBUSY), or the kernel gives no socket.
    """
    with contextlib.closing(_listening(group)) as news:
        while True:
            buffers = await news.heard()
            if buffers is None:
                yield Lost()
                continue
            for buffer in buffers:
                for mark in _marks(buffer):
                    yield Spent(mark)


def _listening(group: int) -> Listener:
    configuration = (
        attribute(_CFG_COMMAND, _BIND)
        + attribute(_CFG_MODE, _COPY_META)
        + attribute(_CFG_THRESHOLD, struct.pack("!I", 1))
    )
    return Listener(group, _ACTION.format(group), _CONFIG, [configuration], buffer_bytes=_BUFFER_BYTES)


def _marks(buffer: bytes) -> Iterator[int]:
    """Yield the mark of every packet that is spoken of; one without a mark is nobody's."""
    for begin, end in packets_in(buffer, _PACKET):
        for attribute_, start, behind in attributes(buffer, begin, end):
            if attribute_ == _MARK:
                yield int.from_bytes(buffer[start:behind], "big")
