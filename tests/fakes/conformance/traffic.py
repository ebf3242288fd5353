"""
Connections of a VM on its host and through an edge: which port each gets, and how many ports are counted.

Each check is called with a way of traffic and asserts. The VM is 100.64.0.1 inside, its external address 203.0.113.1.
"""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Protocol

from cpm.protocol.model import PortRange
from natctl.model.port_use import PortUse

INTERNAL, EXTERNAL = IPv4Address("100.64.0.1"), IPv4Address("203.0.113.1")
RANGE, ELSEWHERE = PortRange(20000, 20063), PortRange(30000, 30063)


class Traffic(Protocol):
    """A host with one VM, and an edge; neither has ports yet."""

    def program_host(self, ports: PortRange | None) -> None:
        """Have the host hand these ports out."""

    def program_edge(self, *ranges: PortRange) -> None:
        """Have the edge map these ports of the external address."""

    def connect(self) -> tuple[IPv4Address, int] | None:
        """Open a connection that stays; return the address and port that the world sees, None when nothing arrives."""

    def port_use(self) -> PortUse:
        """Return what natd on the host counts."""


def a_connection_leaves_from_a_port_of_the_range(traffic: Traffic) -> None:
    traffic.program_edge(RANGE)
    traffic.program_host(RANGE)
    for _ in range(3):
        seen = traffic.connect()
        assert seen is not None
        assert seen[0] == EXTERNAL
        assert seen[1] in RANGE


def each_connection_takes_one_port(traffic: Traffic) -> None:
    traffic.program_edge(RANGE)
    traffic.program_host(RANGE)
    assert traffic.port_use().in_use(INTERNAL, RANGE) == 0
    seen = {traffic.connect() for _ in range(5)}
    assert len(seen) == 5
    assert traffic.port_use().in_use(INTERNAL, RANGE) == 5
    assert traffic.port_use().in_use(INTERNAL, ELSEWHERE) == 0
    assert traffic.port_use().in_use(IPv4Address("100.64.0.2"), RANGE) == 0


def a_vm_without_ports_gets_no_connection(traffic: Traffic) -> None:
    traffic.program_edge(RANGE)
    assert traffic.connect() is None
    traffic.program_host(None)
    assert traffic.connect() is None
    assert traffic.port_use().in_use(INTERNAL, RANGE) == 0


def an_edge_lets_out_no_port_that_it_does_not_map(traffic: Traffic) -> None:
    traffic.program_edge(ELSEWHERE)
    traffic.program_host(RANGE)
    assert traffic.connect() is None
    traffic.program_edge(RANGE)
    assert traffic.connect() is not None


def after_a_move_new_connections_use_the_new_range_and_the_others_are_counted_in_theirs(traffic: Traffic) -> None:
    traffic.program_edge(RANGE)
    traffic.program_host(RANGE)
    for _ in range(2):
        assert traffic.connect() is not None
    traffic.program_edge(RANGE, ELSEWHERE)
    traffic.program_host(ELSEWHERE)
    seen = traffic.connect()
    assert seen is not None
    assert seen[1] in ELSEWHERE
    use = traffic.port_use()
    assert (use.in_use(INTERNAL, RANGE), use.in_use(INTERNAL, ELSEWHERE)) == (2, 1)


CHECKS: list[Callable[[Traffic], None]] = [
    a_connection_leaves_from_a_port_of_the_range,
    each_connection_takes_one_port,
    a_vm_without_ports_gets_no_connection,
    an_edge_lets_out_no_port_that_it_does_not_map,
    after_a_move_new_connections_use_the_new_range_and_the_others_are_counted_in_theirs,
]
