"""
The network interfaces of this namespace, and an event for each that appears or disappears.

To a host's kernel, a VM is its tap. Format: rtnetlink(7), linux/if_link.h. A few attributes of an interface are
read here, since a host has hundreds of taps and pyroute2's class takes nearly ten times as long
(``docs/design/0006-netlink.md``). Tested in ``test_reports`` and ``tests/netns/test_links.py``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import socket
from collections.abc import AsyncGenerator, Iterator, Mapping
from types import MappingProxyType
from typing import Final, NamedTuple

from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP
from pyroute2.netlink.rtnl import RTM_DELLINK, RTM_GETLINK, RTM_NEWLINK, RTM_SETLINK, RTMGRP_LINK

from cpm.protocol.errors import KernelError
from natctl.netlink.listener import Listener
from natctl.netlink.message import (
    MalformedMessage,
    Request,
    Slice,
    aligned,
    attribute,
    attribute_map,
    attributes,
    message,
    messages,
    native_number,
    native_u32,
    nested,
    required,
    text,
)
from natctl.netlink.socket import ROUTE, MessagesLost, Socket, until_complete

_IFINFOMSG: Final = bytes(16)
_HARDWARE_BYTES: Final = 6
_ABOVE: Final = frozenset({"vlan", "macvlan"})
_ETHERNET: Final = 1  # ARPHRD_ETHER
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO, _IFLA_STATS64 = 1, 3, 5, 10, 18, 23
_IFLA_INFO_KIND, _IFLA_INFO_SLAVE_KIND = 1, 4
_IFLA_AF_SPEC, _IFLA_INET_CONF, _IPV4_DEVCONF_FORWARDING = 26, 1, 1
_LONGEST_NAME, _LAST_INDEX = 15, 2**31 - 1
_LIST: Final = message(RTM_GETLINK, NLM_F_DUMP, _IFINFOMSG)


@dataclasses.dataclass(frozen=True, slots=True)
class LinkAdded:
    """An interface of this name exists now: created, moved here from another namespace, or renamed to it."""

    name: str
    index: int = dataclasses.field(default=0, compare=False)
    """The kernel's number of it, which stays when it is renamed, and which no later interface gets."""


@dataclasses.dataclass(frozen=True, slots=True)
class LinkRemoved:
    """No interface has this name any more: deleted, moved to another namespace, or renamed."""

    name: str
    index: int = dataclasses.field(default=0, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class Resync:
    """All interfaces as they are now, instead of all earlier events; sent first, and after events were lost."""

    links: Mapping[str, str | None]
    """The bridge (or other master) of each interface by name; None: it is in none."""
    names: Mapping[int, str] = dataclasses.field(default_factory=dict, compare=False)
    """The name of each interface by index."""


LinkEvent = LinkAdded | LinkRemoved | Resync


def list_links() -> Mapping[str, str | None]:
    """
    Return the master of every interface in the calling thread's namespace, by name; None for one that has no master.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    return _masters(_list())


def list_names() -> dict[int, str]:
    """
    Return the name of every interface in the calling thread's namespace, by index.

    :raise KernelError: When the kernel refuses or does not answer.
    """
    return {index: link.name for index, link in _list().items()}


def has_received(rtnl: Socket, interface: int) -> bool:
    """
    Whether an interface has received any packet; for a tap: whether the guest has sent one.

    :param interface: Its index.
    :return: False as well when there is no such interface.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    wanted = _IFINFOMSG[:4] + native_u32(interface) + _IFINFOMSG[8:]
    try:
        body = rtnl.ask(message(RTM_GETLINK, 0, wanted), "read an interface's counters")
    except KernelError as error:
        if error.errno == errno.ENODEV:
            return False
        raise
    # struct rtnl_link_stats64 begins with the packets received.
    return any(required(attribute_map(body, len(_IFINFOMSG)), _IFLA_STATS64)[:8])


def read_link(rtnl: Socket, interface: int) -> Link:
    """
    Return one interface.

    :param interface: Its index.
    :raise KernelError: When the kernel refuses or does not answer; ENODEV: there is no such interface.
    """
    wanted = _IFINFOMSG[:4] + native_u32(interface) + _IFINFOMSG[8:]
    body = rtnl.ask(message(RTM_GETLINK, 0, wanted), "read an interface")
    if (link := _decode((body, 0, len(body)))) is None:
        raise _malformed("it is of another family")
    return link


def set_forwarding(rtnl: Socket, interface: int, *, on: bool) -> None:
    """
    Say whether IPv4 packets that come in at an interface are forwarded: ``net.ipv4.conf.….forwarding``, by index.

    Packets that a bridge takes from its port come in at the bridge.

    :raise KernelError: When the kernel refuses; ENODEV: there is no such interface.
    """
    settings = nested(_IFLA_INET_CONF, attribute(_IPV4_DEVCONF_FORWARDING, native_u32(int(on))))
    body = _IFINFOMSG[:4] + native_u32(interface) + _IFINFOMSG[8:]
    body += nested(_IFLA_AF_SPEC, nested(socket.AF_INET, settings))
    request = Request(message(RTM_SETLINK, NLM_F_ACK, body), f"interface {interface}")
    rtnl.execute([request], "set an interface's forwarding")


def is_bridge_port(rtnl: Socket, interface: int) -> bool:
    """
    Whether an interface is in a Linux bridge; Open vSwitch has none.

    :param interface: Its index.
    :raise KernelError: When the kernel refuses or does not answer.
    """
    return read_link(rtnl, interface).is_bridge_port


def master_of(rtnl: Socket, interface: int) -> int:
    """
    Return the index of the bridge (or other master) that an interface is in; 0: it is in none.

    :param interface: Its index.
    :raise KernelError: When the kernel refuses or does not answer, or there is no such interface.
    """
    wanted = _IFINFOMSG[:4] + native_u32(interface) + _IFINFOMSG[8:]
    body = rtnl.ask(message(RTM_GETLINK, 0, wanted), "read an interface's master")
    return native_number(attribute_map(body, len(_IFINFOMSG)).get(_IFLA_MASTER, b"\0"))


async def watch_links() -> AsyncGenerator[LinkEvent, None]:
    """
    Yield a :class:`Resync` first, then every interface that appears or disappears, without end.

    When the reader is so slow that the kernel drops messages, or a message cannot be read, another :class:`Resync`
    follows. Changes of an interface that stays (up, down, into a bridge) are not reported. Close the iterator
    (``aclosing``) when done.

    :raise KernelError: When the kernel gives no socket or refuses the list.
    """
    while True:
        # Subscribe, then list, so that no change is missed. After an overflow use a new socket: the old one still holds
        # messages older than the list, and those that supersede them may have been dropped.
        with contextlib.closing(_listener()) as listener, contextlib.suppress(MessagesLost, _UnreadableEvent):
            links = _list()
            known = {index: link.name for index, link in links.items()}
            yield Resync(_masters(links), dict(known))
            while True:
                for buffer in await listener.receive():
                    for event in _readable(buffer, known):
                        yield event


class _UnreadableEvent(Exception):
    """A message about an interface cannot be read, so that the names are not known any more."""


def _readable(buffer: bytes, known: dict[int, str]) -> Iterator[LinkAdded | LinkRemoved]:
    try:
        yield from events_in(buffer, known)
    except MalformedMessage as error:
        raise _UnreadableEvent from error


class Link(NamedTuple):
    """A network interface."""

    number: int
    """Its index."""
    name: str
    master: int | None
    """Index of the bridge (or other master) that it is in."""
    is_ethernet: bool = True
    hardware: bytes = b""
    """Its hardware address."""
    lower: int | None = None
    """Index of the interface that it is above, for example as a VLAN."""
    kind: str = ""
    """``bridge``, ``vlan``, ``openvswitch`` …; nothing for a real one."""
    is_bridge_port: bool = False
    """Whether its master is a Linux bridge; Open vSwitch has none."""
    forwards: bool = False
    """Whether IPv4 packets that come in here are forwarded; see :func:`set_forwarding`."""


def read_links(rtnl: Socket) -> dict[int, Link]:
    """
    Return all interfaces of the socket's namespace by index.

    :raise KernelError: When the kernel refuses or does not answer.
    """

    def read() -> dict[int, Link]:
        return {link.number: link for part in rtnl.dump(_LIST) if (link := _decode(part)) is not None}

    return until_complete(read)


def above_bridges(links: Mapping[int, Link]) -> frozenset[bytes]:
    """
    Return the hardware addresses of VLANs and macvlans that are above a bridge, directly or by another one.

    A macvtap is no interface of the machine's own, and a veth names its other end, which may be in another namespace.
    """
    found: set[int] = {number for number, link in links.items() if link.kind == "bridge"}
    above = [link for link in links.values() if link.kind in _ABOVE]
    addresses: set[bytes] = set()
    while upper := [link for link in above if link.lower in found and link.number not in found]:
        found.update(link.number for link in upper)
        addresses.update(link.hardware for link in upper if len(link.hardware) == _HARDWARE_BYTES)
    return frozenset(addresses)


def _list() -> dict[int, Link]:
    with Socket(ROUTE, "list the network interfaces") as rtnl:
        return read_links(rtnl)


def _masters(links: Mapping[int, Link]) -> Mapping[str, str | None]:
    names = {index: link.name for index, link in links.items()}
    return MappingProxyType(
        {link.name: None if link.master is None else names.get(link.master) for link in links.values()}
    )


def _listener() -> Listener:
    return Listener(ROUTE, "watch the network interfaces", groups=RTMGRP_LINK)


def events_in(buffer: bytes, known: dict[int, str]) -> Iterator[LinkAdded | LinkRemoved]:
    """
    Yield the changes that the messages of a buffer make to the known names.

    A renamed interface gets its new name before it loses the former one: at no time is it gone.

    :param known: Names by index; changed accordingly.
    :raise MalformedMessage: When one cannot be read.
    """
    for kind, _, _, start, end in messages(buffer):
        link = _decode((buffer, start, end)) if kind in (RTM_NEWLINK, RTM_DELLINK) else None
        if link is None:
            continue
        before = known.pop(link.number, None)
        after = link.name if kind == RTM_NEWLINK else None
        if after is not None:
            known[link.number] = after
        if before != after:
            if after is not None:
                yield LinkAdded(after, link.number)
            if before is not None:
                yield LinkRemoved(before, link.number)


def _decode(part: Slice) -> Link | None:
    """Read ``struct ifinfomsg`` and two attributes; None when it is not about an interface as such."""
    buffer, start, end = part
    if end - start < len(_IFINFOMSG):
        raise _malformed("the message is too short")
    # When an interface only leaves a bridge, RTM_DELLINK is sent with family AF_BRIDGE.
    if buffer[start] != socket.AF_UNSPEC:
        return None
    index = native_number(buffer[start + 4 : start + 8])
    name, master, behind = b"", None, start + len(_IFINFOMSG)
    hardware, lower, info, is_bridge_port, forwards = b"", None, "", False, False
    for kind, at, to in attributes(buffer, behind, end):
        if kind == _IFLA_IFNAME:
            name = buffer[at:to].rstrip(b"\0")
        elif kind == _IFLA_MASTER:
            master = native_number(buffer[at:to])
        elif kind == _IFLA_ADDRESS:
            hardware = buffer[at:to]
        elif kind == _IFLA_LINK:
            lower = native_number(buffer[at:to])
        elif kind == _IFLA_LINKINFO:
            kinds = attribute_map(buffer[at:to], 0)
            info = text(kinds.get(_IFLA_INFO_KIND, b""))
            is_bridge_port = text(kinds.get(_IFLA_INFO_SLAVE_KIND, b"")) == "bridge"
        elif kind == _IFLA_AF_SPEC:
            forwards = _forwards(buffer[at:to])
        behind = aligned(to)
    if (
        behind < end
        or not 0 < len(name) <= _LONGEST_NAME
        or not 0 < index <= _LAST_INDEX
        or (master or 0) > _LAST_INDEX
    ):
        raise _malformed("it has no name or number, or a part is cut off")
    is_ethernet = native_number(buffer[start + 2 : start + 4]) == _ETHERNET
    words = name.decode(errors="surrogateescape")
    return Link(index, words, master or None, is_ethernet, hardware, lower, info, is_bridge_port, forwards)


def _forwards(families: bytes) -> bool:
    """Read the settings of IPv4: a number each, in the order of ``IPV4_DEVCONF_*`` from 1."""
    settings = attribute_map(attribute_map(families, 0).get(socket.AF_INET, b""), 0).get(_IFLA_INET_CONF, b"")
    begin = 4 * (_IPV4_DEVCONF_FORWARDING - 1)
    return any(settings[begin : begin + 4])


def _malformed(detail: str) -> MalformedMessage:
    return MalformedMessage("read a network interface", detail)
