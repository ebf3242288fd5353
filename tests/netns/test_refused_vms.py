"""What an edge's real kernel refuses of one VM, a route that leads nowhere, holds up none of the others."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.protocol.errors import KernelError
from cpm.protocol.messages import PROTOCOL, Applied, Delta, PathState, Snapshot, Welcome
from cpm.protocol.model import DomainUUID, NodeName, PortRange, Role
from natctl.core.bisection import FIRST_RETRY_S
from natctl.core.identity import Identity
from natctl.core.node import Node as NodeCore
from natctl.model.commands import Program, Replace, Send
from tests.fakes.intents import edge_intent
from tests.netns.topology import EXTERNAL, POOL, Node, Site

pytestmark = pytest.mark.netns

_AT = 1000.0
_HOST, _NOWHERE = IPv4Address("172.30.0.21"), IPv4Address("10.99.99.99")
VMS = [DomainUUID(f"00000000-0000-0000-0000-{number:012}") for number in range(1, 31)]
BAD = {VMS[7], VMS[20]}


def vm(uuid: DomainUUID, *, first: int | None = None):  # type: ignore[no-untyped-def]
    number = int(uuid[-3:])
    ports = PortRange.parse(f"{first or 20000 + 64 * number}-{(first or 20000 + 64 * number) + 63}")
    via = _NOWHERE if uuid in BAD else _HOST
    return edge_intent(uuid, f"web {number}", IPv4Address("100.64.0.0") + number, via, [(EXTERNAL, ports)])


def carry_out(edge: Node, natd: NodeCore, now: float = _AT) -> list[Applied]:
    said = []
    while commands := natd.take():
        for command in commands:
            if isinstance(command, Send) and isinstance(command.message, Applied):
                said.append(command.message)
            try:
                if isinstance(command, Program):
                    edge.kernel.change(command.change)
                elif isinstance(command, Replace):
                    edge.kernel.replace(command.host, command.edge, command.path)
                else:
                    continue
            except KernelError as error:
                natd.on_kernel_refused(error, now)
            else:
                natd.on_kernel_programmed(now)
    return said


@pytest.fixture
def edge(site: Site) -> Node:
    return site.edge(11)


def test_all_but_the_refused_vms_are_programmed_and_these_are_named(edge: Node) -> None:
    identity = Identity(NodeName("edge1"), frozenset({Role.EDGE}), IPv4Address("172.30.0.11"), "test")
    natd = NodeCore(identity, 0)
    natd.on_connected(_AT)
    natd.on_message(Welcome(PROTOCOL, 1, "test"), _AT)
    path = PathState(POOL, (), (EXTERNAL,))
    natd.on_message(Snapshot(1, 1, path, edge=tuple(vm(uuid) for uuid in VMS[:10])), _AT)
    (first,) = carry_out(edge, natd)
    assert (first.generation, [each.domain for each in first.refused]) == (1, [VMS[7]])
    assert "10.99.99.99" in first.refused[0].reason or "route" in first.refused[0].reason
    natd.on_message(Delta(1, 2, edge=tuple(vm(uuid) for uuid in VMS[10:])), _AT)
    (second,) = carry_out(edge, natd)
    assert (second.generation, {each.domain for each in second.refused}) == (2, BAD)
    assert set(edge.kernel.observe().edge) == set(VMS) - BAD
    # Another VM may not have a port that a third one holds, and the kernel goes on with what it held.
    natd.on_message(Delta(1, 3, edge=(vm(VMS[0], first=20000 + 64 * 2), vm(VMS[4], first=40000))), _AT)
    (third,) = carry_out(edge, natd)
    assert {each.domain for each in third.refused} == BAD | {VMS[0]}
    held = edge.kernel.observe().edge
    assert held[VMS[0]].ranges[0].ports.first == 20064
    assert held[VMS[4]].ranges[0].ports.first == 40000
    # What was refused is tried again, and told.
    edge.namespace.ip("route add 10.99.99.0/24 dev eth0")
    for seconds in range(1, 3):
        natd.on_tick(_AT + seconds * 2 * FIRST_RETRY_S)
        told = carry_out(edge, natd, _AT + seconds * 2 * FIRST_RETRY_S)
    assert {each.domain for message in told[-1:] for each in message.refused} <= {VMS[0]}
    assert set(edge.kernel.observe().edge) == set(VMS)
