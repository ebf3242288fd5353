"""
Which interfaces exist, and word of each that comes or goes: a VM's tap is the VM, as far as a host's kernel knows.

Format: rtnetlink(7), linux/if_link.h. Decoded by hand (see :mod:`natctl.netlink.frames`), 16 us an interface:
a host has hundreds of taps, and pyroute2 takes 0.4 ms for each.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import os
import socket
import sys
from collections.abc import AsyncGenerator, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from cpm.protocol.errors import KernelError
from natctl.netlink.frames import HEADER, Channel, DumpInterrupted, aligned, attributes

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTMGRP_LINK = 1
_IFINFOMSG = bytes(16)
_IFLA_IFNAME, _IFLA_MASTER = 3, 10
_TRIES = 5
_RECEIVE_BYTES = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class LinkAdded:
    """An interface of this name exists now: created, moved here from another namespace, or renamed to it."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class LinkRemoved:
    """No interface of this name exists any more."""

    name: str


@dataclasses.dataclass(frozen=True, slots=True)
class Resync:
    """What came before counts no longer, these are the interfaces now: at first, and whenever the kernel lost words."""

    links: Mapping[str, str | None]
    """The bridge (or other master) of each interface by name; None: it is in none."""


LinkEvent = LinkAdded | LinkRemoved | Resync


def list_links() -> Mapping[str, str | None]:
    """
    Return the master of every interface in the calling thread's namespace, by name; None for one that has no master.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    return _masters(_listed())


async def watch_links() -> AsyncGenerator[LinkEvent, None]:
    """
    Yield a :class:`Resync` first, then every interface that comes or goes; never ends by itself.

    When the reader is so slow that the kernel drops words, a further :class:`Resync` says how things are now. Changes
    of an interface that stays (up, down, into a bridge) are not told. Close the iterator (``aclosing``) when done.

    :raise KernelError: When the kernel gives no socket or refuses the listing.
    """
    while True:
        # Subscribed before listing, so nothing falls between. A socket that overflowed is thrown away whole: it still
        # holds words older than the listing, whose contradiction may be among those dropped.
        with _subscription() as news:
            links = _listed()
            yield Resync(_masters(links))
            known = {index: link.name for index, link in links.items()}
            while (buffer := await _heard(news)) is not None:
                for message in _split(buffer):
                    for event in _changes(known, message):
                        yield event


class _Link(NamedTuple):
    number: int
    name: str
    master: int | None


_Message = tuple[int, bytes, int, int]
"""Type, buffer, start and end of the body."""


def _listed() -> dict[int, _Link]:
    action = "list the network interfaces"
    with Channel(socket.NETLINK_ROUTE, action) as channel:
        for _ in range(_TRIES):
            try:
                found = (_decode(*frame) for frame in channel.dump(_RTM_GETLINK, _IFINFOMSG))
                return {link.number: link for link in found if link is not None}
            except DumpInterrupted:
                continue
        raise channel.error(errno.EINTR, "they changed each time they were listed")


def _masters(links: Mapping[int, _Link]) -> Mapping[str, str | None]:
    names = {index: link.name for index, link in links.items()}
    return MappingProxyType(
        {link.name: None if link.master is None else names.get(link.master) for link in links.values()}
    )


def _decode(buffer: bytes, start: int, end: int) -> _Link | None:
    """Read struct ifinfomsg and two attributes; None when it does not speak of an interface as such."""
    # A bridge says RTM_DELLINK with family AF_BRIDGE when an interface merely leaves it.
    if end - start < len(_IFINFOMSG) or buffer[start] != socket.AF_UNSPEC:
        return None
    name, master = "", None
    for kind, at, to in attributes(buffer, start + len(_IFINFOMSG), end):
        if kind == _IFLA_IFNAME:
            name = buffer[at:to].rstrip(b"\0").decode(errors="surrogateescape")
        elif kind == _IFLA_MASTER:
            master = _number(buffer[at:to])
    return _Link(_number(buffer[start + 4 : start + 8]), name, master) if name else None


def _changes(known: dict[int, str], message: _Message) -> Iterator[LinkAdded | LinkRemoved]:
    """Say what one message changes in the names that are known, and change them."""
    kind, buffer, start, end = message
    link = _decode(buffer, start, end) if kind in (_RTM_NEWLINK, _RTM_DELLINK) else None
    if link is None:
        return
    before = known.pop(link.number, None)
    after = link.name if kind == _RTM_NEWLINK else None
    if after is not None:
        known[link.number] = after
    if before != after:
        if before is not None:
            yield LinkRemoved(before)
        if after is not None:
            yield LinkAdded(after)


def _number(data: bytes) -> int:
    return int.from_bytes(data, sys.byteorder)


def _subscription() -> socket.socket:
    try:
        news = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        news.settimeout(0)  # asyncio waits for it
        news.bind((0, _RTMGRP_LINK))
    except OSError as error:
        code = error.errno or errno.EIO
        raise KernelError("watch the network interfaces", code, os.strerror(code)) from error
    return news


async def _heard(news: socket.socket) -> bytes | None:
    """Wait for what the kernel tells next; None when it had to drop something."""
    try:
        return await asyncio.get_running_loop().sock_recv(news, _RECEIVE_BYTES)
    except OSError as error:
        if error.errno == errno.ENOBUFS:
            return None
        raise KernelError("watch the network interfaces", error.errno or errno.EIO, str(error)) from error


def _split(buffer: bytes) -> Iterator[_Message]:
    offset = 0
    while offset + HEADER.size <= len(buffer):
        length, kind, _, _, _ = HEADER.unpack_from(buffer, offset)
        if length < HEADER.size or offset + length > len(buffer):
            return
        yield kind, buffer, offset + HEADER.size, offset + length
        offset += aligned(length)
