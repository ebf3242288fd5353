"""Real connections through a host and an edge, against the table that those of a site in virtual time pass."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import PortRange
from natctl.model.entries import Change
from natctl.model.port_use import PortUse
from natctl.netlink.conntrack import dump_ports
from tests.fakes.conformance.traffic import CHECKS, EXTERNAL, Traffic
from tests.netns.topology import INTERNET, VM, Site, program

pytestmark = pytest.mark.netns

LOST_S = 0.3
"""Seconds after which a packet counts as dropped."""


class RealTraffic:
    """The VM is a namespace; a connection is a UDP flow to a server in the internet."""

    def __init__(self, site: Site, stack: contextlib.ExitStack) -> None:
        self._host, self._edge = site.host_and_edge()
        self._vm = VM(1, site.guest(self._host), (), None)
        program([self._host, self._edge], [], {0: (self._edge,)})
        self._stack = stack
        self._server = stack.enter_context(site.internet.udp(INTERNET, 9000))
        self._server.settimeout(LOST_S)

    def program_host(self, ports: PortRange | None) -> None:
        vm = VM(1, self._vm.guest, (), ports)
        self._host.kernel.change(Change(host={vm.domain: vm.on_host()}))

    def program_edge(self, *ranges: PortRange) -> None:
        vm = VM(1, self._vm.guest, tuple((EXTERNAL, ports) for ports in ranges), None)
        self._edge.kernel.change(Change(edge={vm.domain: vm.at(self._edge)}))

    def connect(self) -> tuple[IPv4Address, int] | None:
        client: socket.socket = self._stack.enter_context(self._vm.guest.namespace.udp())
        client.sendto(b"hello", (INTERNET, 9000))
        try:
            _, (address, port) = self._server.recvfrom(100)
        except TimeoutError:
            return None
        return IPv4Address(address), port

    def port_use(self) -> PortUse:
        return self._host.namespace.inside(dump_ports)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_connections_behave_as_those_of_the_fake(check: Callable[[Traffic], None], site: Site) -> None:
    with contextlib.ExitStack() as stack:
        check(RealTraffic(site, stack))
