"""
The kernel's signals that a VM's arrival budget is used up: messages of one NFLOG group.

They come from a rule of the host role (set ``budgets``); each has the mark with which a connection began. The kernel
sends the packet's metadata only, not the packet. In each network namespace a group has one listener.

Sources: linux/netfilter/nfnetlink_log.h; ``nfulnl_recv_config`` and ``nfulnl_log_packet`` in
net/netfilter/nfnetlink_log.c. Tested in ``test_reports`` and ``tests/netns/test_arrivals.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import struct
from collections.abc import AsyncGenerator, Iterator
from typing import Final

from pyroute2.netlink import NLM_F_ACK
from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_ULOG

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
from natctl.netlink.socket import NETFILTER, Listener, MessagesLost

_PACKET, _CONFIG = (netfilter_type(NFNL_SUBSYS_ULOG, kind) for kind in (0, 1))  # NFULNL_MSG_PACKET and _CONFIG
_CFG_COMMAND, _CFG_MODE, _CFG_THRESHOLD = 1, 2, 5
_BIND = b"\1"
_COPY_META = struct.pack("!IBB", 0, 1, 0)
_MARK = 2
_BUFFER_BYTES: Final = 1 << 20


@dataclasses.dataclass(frozen=True, slots=True)
class BudgetUsedUp:
    """A connection began after the budget of its VM was used up."""

    mark: int
    """The packet's mark, all 32 bits of it."""


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


def _listener(group: int) -> Listener:
    settings = (
        attribute(_CFG_COMMAND, _BIND) + attribute(_CFG_MODE, _COPY_META) + attribute(_CFG_THRESHOLD, network_u32(1))
    )
    action = f"listen to NFLOG group {group}"
    configuration = [Request(netfilter_message(_CONFIG, NLM_F_ACK, socket.AF_INET, settings, group), action)]
    return Listener(NETFILTER, action, configuration=configuration, receive_buffer_bytes=_BUFFER_BYTES)


def marks_in(buffer: bytes) -> Iterator[int]:
    """Yield the mark of every reported packet; a packet without a mark belongs to no VM and is left out."""
    for begin, end in netfilter_bodies(buffer, _PACKET):
        for kind, start, stop in attributes(buffer, begin, end):
            if kind == _MARK:
                yield network_number(buffer[start:stop])
