"""
Which addresses this machine has, and from which ports its kernel picks.

Tested in ``tests/netns/test_own_ports.py``.
"""

from __future__ import annotations

import pathlib
import socket
from typing import Final

from cpm.protocol.model import PortRange
from natctl.model.entries import EdgeSettings
from natctl.model.own_ports import OwnInterfaces
from natctl.netlink.networks import interface_addresses
from natctl.netlink.socket import Socket
from natctl.ruleset.own_ports import ephemeral_ports, kept_part

_DIRECTORY: Final = pathlib.Path("/proc/sys/net/ipv4")
_DEFAULT_RANGE: Final = "32768 60999"


class OwnInterfacesWatch:
    """
    Remembers what was read last.

    :param settings: The edge role; None: this machine does not have it, and nothing is read.
    """

    def __init__(self, settings: EdgeSettings | None) -> None:
        self._settings = settings
        self.now = OwnInterfaces()

    def may_differ(self, rtnl: Socket) -> bool:
        """
        Say whether :meth:`update` would change anything.

        :raise KernelError: When the addresses cannot be read.
        """
        return self._settings is not None and read_own_interfaces(rtnl, self._settings) != self.now

    def update(self, rtnl: Socket) -> bool:
        """
        Read, in the network namespace of the calling thread.

        :return: Whether anything changed.
        :raise KernelError: When the addresses cannot be read.
        """
        if self._settings is None:
            return False
        before, self.now = self.now, read_own_interfaces(rtnl, self._settings)
        return before != self.now


def read_own_interfaces(rtnl: Socket, settings: EdgeSettings) -> OwnInterfaces:
    """
    Read addresses and ephemeral ports, in the network namespace of the calling thread.

    :raise KernelError: When the addresses cannot be read.
    """
    held = {
        index: [each.ip for each in addresses if not (each.ip.is_loopback or each.ip.is_link_local)]
        for index, addresses in interface_addresses(rtnl).items()
    }
    uplinks = {name: held.get(_index(name), []) for name in sorted(settings.uplinks)}
    addresses = dict.fromkeys(address for each in (*uplinks.values(), *held.values()) for address in each)
    primary = {name: each[0] for name, each in uplinks.items() if each}
    picked = _picked_ports()
    return OwnInterfaces(tuple(addresses), primary, kept_part(picked), picked)


def _index(name: str) -> int:
    # The list of all interfaces would have each VM's.
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _picked_ports() -> tuple[PortRange, ...]:
    return ephemeral_ports(_read("ip_local_port_range", _DEFAULT_RANGE), _read("ip_local_reserved_ports", ""))


def _read(name: str, default: str) -> str:
    try:
        return (_DIRECTORY / name).read_text()
    except OSError:
        return default
