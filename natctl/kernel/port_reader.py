"""
Reads which ports this machine uses by itself, for an edge to tell the manager.

Tested in ``tests/netns/test_own_ports.py``.
"""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address
from typing import Final

from cpm.protocol.errors import KernelError
from natctl.kernel.own_interfaces import read_own_interfaces
from natctl.model.entries import EdgeSettings
from natctl.model.own_ports import LocalSocket, OwnInterfaces, PortsInUse
from natctl.netlink import conntrack, sockets
from natctl.netlink.socket import NETFILTER, ROUTE, Socket

CONNECTIONS_S: Final = 60.0
"""Seconds between two readings of the connections of others that are translated behind this machine's addresses."""


class PortReader:
    """
    Reads ports; each call runs in a worker thread, in the network namespace of the caller.

    :param settings: The edge role of this machine.
    :param flag: Bit or bits of the conntrack mark that managed connections carry; 0: there are none.
    """

    def __init__(self, settings: EdgeSettings, flag: int) -> None:
        self._settings = settings
        self._flag = flag
        self._translated: frozenset[tuple[IPv4Address, int]] | None = None
        self._read_again_at = 0.0

    async def read(self, now: float) -> PortsInUse:
        """
        Read interfaces and sockets, and at first and every minute the translated connections, until there are none.

        Reading these takes time in proportion to their number, and only those matter that began before the machine's
        ports were known.

        :param now: Seconds.
        :raise KernelError: When the addresses cannot be read. When anything else cannot, the reading says so.
        """
        # Opened here: the executor's threads may be older than this thread's namespace.
        opened = [Socket(protocol, "see which ports are in use") for protocol in (ROUTE, sockets.DIAGNOSIS, NETFILTER)]
        return await asyncio.to_thread(self._read, opened, now)

    def _read(self, opened: list[Socket], now: float) -> PortsInUse:
        rtnl, diagnosis, netfilter = opened
        try:
            interfaces = read_own_interfaces(rtnl, self._settings)
            faults = []
            found: frozenset[LocalSocket] = frozenset()
            try:
                found = sockets.local_sockets(diagnosis, interfaces.ephemeral)
            except KernelError as error:
                faults.append(f"{error}; load the kernel modules tcp_diag and udp_diag")
            try:
                if self._translated is None or (self._translated and now >= self._read_again_at):
                    self._translated = self._read_translated(netfilter, interfaces)
                    self._read_again_at = now + CONNECTIONS_S
            except KernelError as error:
                faults.append(f"{error}; load the kernel module nf_conntrack_netlink")
        finally:
            for each in opened:
                each.close()
        return PortsInUse(interfaces, found, self._translated or frozenset(), "; ".join(faults))

    def _read_translated(self, netfilter: Socket, interfaces: OwnInterfaces) -> frozenset[tuple[IPv4Address, int]]:
        """Return own addresses and ports behind which connections of others are translated."""
        return frozenset(
            (address, port)
            for address in interfaces.addresses
            for port in conntrack.ports_behind(netfilter, address, self._flag)
            if not any(port in ports for ports in interfaces.ephemeral)
        )
