"""
Reports of the kernel that a VM's arrival budget is used up: messages of one NFLOG group.

The rule that sends them is in the host role's ruleset (set ``budgets``); each says with which mark a connection began.
Only the packet's description is asked for, not the packet. A group has one listener in a network namespace; other
groups, and their listeners, are not touched.

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
class Spent:
    """A connection began whose VM had no budget left."""

    mark: int
    """The packet's mark, all 32 bits of it."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """The kernel had more to report than we took in; which VMs it was about is not known."""


async def watch_budgets(group: int) -> AsyncGenerator[Spent | Lost, None]:
    """
    Yield what the kernel reports in this group, from now on; never ends by itself. Close it (``aclosing``) when done.

    :param group: NFLOG group; the caller's network namespace counts.
    :raise KernelError: When somebody else listens to the group (EPERM, EBUSY), or the kernel gives no socket.
    """
    with contextlib.closing(_listener(group)) as listener:
        while True:
            try:
                buffers = await listener.receive()
            except MessagesLost:
                yield Lost()
                continue
            for buffer in buffers:
                for mark in marks_in(buffer):
                    yield Spent(mark)


def _listener(group: int) -> Listener:
    settings = (
        attribute(_CFG_COMMAND, _BIND) + attribute(_CFG_MODE, _COPY_META) + attribute(_CFG_THRESHOLD, network_u32(1))
    )
    action = f"listen to NFLOG group {group}"
    configuration = [Request(netfilter_message(_CONFIG, NLM_F_ACK, socket.AF_INET, settings, group), action)]
    return Listener(NETFILTER, action, configuration=configuration, receive_buffer_bytes=_BUFFER_BYTES)


def marks_in(buffer: bytes) -> Iterator[int]:
    """Yield the mark of every packet that is reported; one without a mark belongs to no VM."""
    for begin, end in netfilter_bodies(buffer, _PACKET):
        for kind, start, stop in attributes(buffer, begin, end):
            if kind == _MARK:
                yield network_number(buffer[start:stop])
