"""
Sends frames out of VMs' own interfaces, past bridge, routes and packet filter: to this VM, and to nobody else.

Tested in ``tests/netns/test_port_control.py``.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Collection
from ipaddress import IPv4Address, IPv4Interface
from typing import Final, NamedTuple

from cpm.protocol.errors import KernelError
from natctl.netlink.links import master_of, read_links
from natctl.netlink.networks import interface_addresses
from natctl.netlink.socket import ROUTE, Socket

_RECEIVES_NOTHING: Final = 0
"""As the protocol of a packet socket."""


class Gateway(NamedTuple):
    """The machine itself, as the VMs of a bridge see it."""

    hardware: bytes
    address: IPv4Address


class FrameSender:
    """
    The sockets of the caller's network namespace; close it when done.

    :raise KernelError: When the kernel gives none.
    """

    def __init__(self) -> None:
        self._rtnl = Socket(ROUTE, "find a VM's interface")
        try:
            self._packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _RECEIVES_NOTHING)
        except OSError as error:
            self._rtnl.close()
            raise KernelError("send frames to VMs", error.errno or 0, error.strerror or "") from error

    def close(self) -> None:
        """Close the sockets."""
        self._packets.close()
        self._rtnl.close()

    def send(self, interface: int, frame: bytes) -> None:
        """Send a frame out of an interface; what cannot be sent now is lost, as on any wire."""
        with contextlib.suppress(OSError):
            self._packets.sendto(frame, (socket.if_indextoname(interface), _RECEIVES_NOTHING))

    def on_bridge(self, interfaces: Collection[int], bridge: int) -> Collection[int]:
        """
        Return those of a VM's interfaces that are in a bridge; all, if none is, or if it has only one.

        :raise KernelError: When the kernel does not answer.
        """
        if len(interfaces) < 2:
            return interfaces
        return [each for each in interfaces if self._master_of(each) == bridge] or interfaces

    def _master_of(self, interface: int) -> int:
        try:
            return master_of(self._rtnl, interface)
        except KernelError as error:
            if error.errno != errno.ENODEV:
                raise
            return 0

    def own_networks(self) -> dict[int, list[IPv4Interface]]:
        """
        Return this machine's addresses with their networks, by the index of their interface.

        :raise KernelError: When the kernel does not answer.
        """
        return interface_addresses(self._rtnl)

    def gateways(self, interfaces: Collection[int]) -> dict[int, Gateway]:
        """
        Return this machine's addresses in the bridges that interfaces are in, by interface.

        :raise KernelError: When the kernel does not answer.
        """
        links, addresses = read_links(self._rtnl), interface_addresses(self._rtnl)
        found: dict[int, Gateway] = {}
        for each in interfaces:
            master = links[each].master if each in links else None
            if master is not None and master in links and addresses.get(master):
                found[each] = Gateway(links[master].hardware, addresses[master][0].ip)
        return found
