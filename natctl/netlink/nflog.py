"""
Word from the kernel that a VM's arrival budget is used up: messages of one NFLOG group.

The rule that sends them is in the host role's ruleset (set ``budgets``); each says with which mark a connection began.
Only the packet's description is asked for, not the packet. An NFLOG group has one listener in a network namespace;
other groups, and whoever listens to them, are not touched.

Sources: linux/netfilter/nfnetlink_log.h; ``nfulnl_recv_config`` and ``nfulnl_log_packet`` in
net/netfilter/nfnetlink_log.c.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import os
import socket
import struct
from collections.abc import AsyncGenerator, Iterator

from cpm.errors import KernelError
from natctl.netlink.frames import HEADER, NLM_F_ACK, NLM_F_REQUEST, attribute, attributes, bodies, error_in

_NETLINK_NETFILTER = 12
_PACKET, _CONFIG = 4 << 8 | 0, 4 << 8 | 1  # NFNL_SUBSYS_ULOG, NFULNL_MSG_PACKET and _CONFIG
_NFGENMSG = struct.Struct("!BBH")
_CFG_COMMAND, _CFG_MODE, _CFG_THRESHOLD = 1, 2, 5
_BIND = b"\1"
_COPY_META = struct.pack("!IBB", 0, 1, 0)
_MARK = 2
_RECEIVE_BYTES = 1 << 16
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
            buffer = await _heard(news, group)
            if buffer is None:
                yield Lost()
            else:
                for mark in _marks(buffer):
                    yield Spent(mark)


def _listening(group: int) -> socket.socket:
    news = None
    try:
        news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        news.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        news.bind((0, 0))
        news.send(_configuration(group))
        code = error_in(news.recv(_RECEIVE_BYTES))
        news.settimeout(0)  # asyncio waits for it
    except OSError as error:
        code = error.errno or errno.EIO
    if code or news is None:
        if news is not None:
            news.close()
        raise KernelError(_ACTION.format(group), code, os.strerror(code))
    return news


def _configuration(group: int) -> bytes:
    body = (
        _NFGENMSG.pack(socket.AF_INET, 0, group)
        + attribute(_CFG_COMMAND, _BIND)
        + attribute(_CFG_MODE, _COPY_META)
        + attribute(_CFG_THRESHOLD, struct.pack("!I", 1))
    )
    return HEADER.pack(HEADER.size + len(body), _CONFIG, NLM_F_REQUEST | NLM_F_ACK, 1, 0) + body


async def _heard(news: socket.socket, group: int) -> bytes | None:
    """Wait for what the kernel says next; None when it had to drop something."""
    try:
        return await asyncio.get_running_loop().sock_recv(news, _RECEIVE_BYTES)
    except OSError as error:
        if error.errno == errno.ENOBUFS:
            return None
        code = error.errno or errno.EIO
        raise KernelError(_ACTION.format(group), code, os.strerror(code)) from error


def _marks(buffer: bytes) -> Iterator[int]:
    """Yield the mark of every packet that is spoken of; one without a mark is nobody's."""
    for begin, end in bodies(buffer, _PACKET, _NFGENMSG.size):
        for attribute_, start, behind in attributes(buffer, begin, end):
            if attribute_ == _MARK:
                yield int.from_bytes(buffer[start:behind], "big")
