"""
Programs at the ingress or egress of an interface, as filters of the qdiscs ``clsact`` and ``ingress``.

They stay when natd ends, and another program takes the place of one in one step, so that no packet passes between.
The qdisc comes with the first: the kernel stops the interface's queue for that moment (``qdisc_graft`` in
net/sched/sch_api.c), and some milliseconds of what it sends are lost. So it is not removed with the last.
At taps it is the qdisc ``ingress``, which libvirt itself makes and removes there (``virsh domiftune``): ``clsact``
would be in its way.
Format: rtnetlink(7), linux/pkt_cls.h, tc-bpf(8). Tested in ``tests/netns/test_programs.py``.
"""

from __future__ import annotations

import enum
import errno
import socket
import struct
from typing import Final, NamedTuple

from pyroute2.netlink import NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE
from pyroute2.netlink.rtnl import RTM_DELQDISC, RTM_DELTFILTER, RTM_GETTFILTER, RTM_NEWQDISC, RTM_NEWTFILTER

from cpm.protocol.errors import KernelError
from natctl.netlink.message import (
    Request,
    attribute,
    attribute_map,
    message,
    native_number,
    native_u32,
    nested,
    terminated,
    text,
)
from natctl.netlink.socket import Socket

_HEADER: Final = struct.Struct("=BxxxiIII")
"""``struct tcmsg``: family, interface, handle, parent, info."""
_CLSACT: Final = 0xFFFFFFF1  # TC_H_CLSACT
_QDISC: Final = 0xFFFF0000
_KIND, _OPTIONS = 1, 2  # TCA_…
_FD, _NAME, _FLAGS, _ID = 6, 7, 8, 11  # TCA_BPF_…
_DIRECT: Final = 1  # TCA_BPF_FLAG_ACT_DIRECT
_IPV4, _ANY = 0x0800, 0x0003  # ETH_P_IP, ETH_P_ALL
_HANDLE: Final = 1
PRIORITY: Final = 7414
"""Of our filters: others have the rest of the numbers."""
_NAMED: Final = "virt-ports "
"""Begin of the names of our filters."""


class Side(enum.IntEnum):
    """Where packets pass a filter: the filter's parent."""

    INGRESS = 0xFFFFFFF2
    EGRESS = 0xFFFFFFF3


class Filter(NamedTuple):
    """A filter at an interface, whosever it is."""

    priority: int
    kind: str
    """``bpf``, ``flower`` …"""
    name: str
    """Of a program, as who attached it chose."""
    program: int
    """The kernel's number of the program; 0: it is no program."""
    protocol: int = 0
    """Whose packets pass it (``ETH_P_…``)."""

    @property
    def is_ours(self) -> bool:
        """Whether natd attached it."""
        return self.priority == PRIORITY and self.kind == "bpf" and self.name.startswith(_NAMED)

    def has_our(self, program: str) -> bool:
        """Whether it is natd's, with the program of this name."""
        return self.is_ours and self.name == _NAMED + program


def attach(rtnl: Socket, interface: int, side: Side, program: int, name: str) -> None:
    """
    Attach a program for IPv4, in one step in the place of the one that natd attached before.

    :param interface: Its index.
    :param program: Descriptor of the program.
    :raise KernelError: When the kernel refuses.
    """
    _make_qdisc(rtnl, interface, "clsact")
    _put(rtnl, interface, side, _IPV4, program, name)


def attach_to_tap(rtnl: Socket, interface: int, program: int, name: str) -> None:
    """
    Attach a program for all that a guest sends, likewise.

    :raise KernelError: When the kernel refuses.
    """
    _make_qdisc(rtnl, interface, "ingress")
    _put(rtnl, interface, Side.INGRESS, _ANY, program, name)


def detach(rtnl: Socket, interface: int, side: Side, name: str | None = None) -> None:
    """
    Remove our filters. The qdisc stays: the interface would drop packets while it goes, as it does while it comes.

    :param name: Of the program; None: whatever it is.
    :raise KernelError: When the kernel refuses; not when there is none.
    """
    for each in filters(rtnl, interface, side):
        if each.is_ours if name is None else each.has_our(name):
            body = _header(interface, side, each.protocol) + attribute(_KIND, terminated("bpf"))
            _remove(rtnl, message(RTM_DELTFILTER, NLM_F_ACK, body), interface)


def remove_empty_qdisc(rtnl: Socket, interface: int) -> None:
    """
    Remove the qdisc if it has no filters; what the interface sends meanwhile is lost.

    :raise KernelError: When the kernel refuses; not when there is none.
    """
    if not any(filters(rtnl, interface, each) for each in Side):
        _remove(rtnl, message(RTM_DELQDISC, NLM_F_ACK, _HEADER.pack(0, interface, _QDISC, _CLSACT, 0)), interface)


def filters(rtnl: Socket, interface: int, side: Side) -> tuple[Filter, ...]:
    """
    Return the filters at an interface; none when it does not exist.

    :raise KernelError: When the kernel refuses.
    """
    header = _HEADER.pack(socket.AF_UNSPEC, interface, 0, side, 0)
    bodies = rtnl.dump_bodies(message(RTM_GETTFILTER, NLM_F_DUMP, header), _HEADER.size, "list the filters")
    found = (_filter(body) for body in bodies)
    return tuple(sorted({each for each in found if each is not None}))


def _filter(body: bytes) -> Filter | None:
    *_, info = _HEADER.unpack_from(body)
    parts = attribute_map(body, _HEADER.size)
    if _OPTIONS not in parts:
        # The head of the filters of a priority.
        return None
    kind = text(parts.get(_KIND, b""))
    options = attribute_map(parts[_OPTIONS]) if kind == "bpf" else {}
    name, program = text(options.get(_NAME, b"")), native_number(options.get(_ID, b""))
    return Filter(info >> 16, kind, name, program, socket.ntohs(info & 0xFFFF))


def _make_qdisc(rtnl: Socket, interface: int, kind: str) -> None:
    """Have a qdisc of that kind, or the one that others made in its place."""
    body = _HEADER.pack(socket.AF_UNSPEC, interface, _QDISC, _CLSACT, 0) + attribute(_KIND, terminated(kind))
    create = message(RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, body)
    try:
        rtnl.execute([Request(create, f"the qdisc {kind}")], f"attach a program to interface {interface}")
    except KernelError as error:
        if error.errno != errno.EEXIST:
            raise


def _put(rtnl: Socket, interface: int, side: Side, protocol: int, program: int, name: str) -> None:
    options = nested(
        _OPTIONS,
        attribute(_FD, native_u32(program)),
        attribute(_NAME, terminated(_NAMED + name)),
        attribute(_FLAGS, native_u32(_DIRECT)),
    )
    body = _header(interface, side, protocol) + attribute(_KIND, terminated("bpf")) + options
    # With NLM_F_REPLACE too for the first: then it is created.
    put = message(RTM_NEWTFILTER, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, body)
    rtnl.execute([Request(put, "the filter")], f"attach a program to interface {interface}")


def _header(interface: int, side: Side, protocol: int) -> bytes:
    return _HEADER.pack(socket.AF_UNSPEC, interface, _HANDLE, side, PRIORITY << 16 | socket.htons(protocol))


def _remove(rtnl: Socket, request: bytes, interface: int) -> None:
    try:
        rtnl.execute([Request(request, "the filter")], f"remove a program from interface {interface}")
    except KernelError as error:
        if error.errno not in (errno.ENOENT, errno.EINVAL, errno.ENODEV):
            raise
