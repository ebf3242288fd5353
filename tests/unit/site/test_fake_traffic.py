"""Connections on a site in virtual time, against the table that real ones pass in tests/netns."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import DomainUUID, NodeName, PortRange
from natctl.core.domains import Tap
from natctl.model.entries import Change
from natctl.model.port_use import PortUse
from tests.fakes.conformance.traffic import CHECKS, EXTERNAL, INTERNAL, Traffic
from tests.fakes.intents import edge_intent, host_entry
from tests.fakes.site import Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
HOST1 = NodeName("host1")
TAP = Tap("vnet0", 100)


class FakeTraffic:
    """The VM on host1 and all edges of a site, programmed by hand."""

    def __init__(self) -> None:
        self._site = Site()
        self._host = self._site.machines[HOST1]
        self._host.guests[VM] = frozenset({TAP})
        self._offsets = itertools.count()

    def program_host(self, ports: PortRange | None) -> None:
        self._host.kernel.change(Change(host={VM: host_entry(VM, "web", 1, INTERNAL, ports, frozenset({TAP.number}))}))

    def program_edge(self, *ranges: PortRange) -> None:
        via = self._host.identity.underlay
        vm = edge_intent(VM, "web", INTERNAL, via, [(EXTERNAL, ports) for ports in ranges])
        for machine in self._site.edges:
            machine.kernel.change(Change(edge={VM: vm}))

    def connect(self) -> tuple[IPv4Address, int] | None:
        connection = self._site.open(VM, next(self._offsets))
        return None if connection is None else (connection.external, connection.port)

    def port_use(self) -> PortUse:
        return self._site.port_use(HOST1)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_connections_behave_as_real_ones(check: Callable[[Traffic], None]) -> None:
    check(FakeTraffic())
