"""What a node tells of its kernel: what is in force, and what may be while a command is under way."""

from ipaddress import IPv4Address

import pytest

from cpm.protocol import codec
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.holdings import Held, HeldRange
from cpm.protocol.intent import EdgeIntent, ExternalRange, HostIntent
from cpm.protocol.model import DomainUUID, PortRange
from natctl.core.holdings import EdgeHoldings, told_by_host
from natctl.model.entries import HostEntry

VM, OTHER = DomainUUID("u"), DomainUUID("v")
EXTERNAL, INTERNAL, HOST = IPv4Address("203.0.113.1"), IPv4Address("100.64.0.1"), IPv4Address("172.30.0.11")


def _mapped(uuid: DomainUUID, *ports: str) -> EdgeIntent:
    ranges = tuple(ExternalRange(EXTERNAL, PortRange.parse(each)) for each in ports)
    return EdgeIntent(uuid, "web", INTERNAL, HOST, ranges)


def _told(edge: EdgeHoldings) -> dict[DomainUUID, list[str]]:
    return {vm.domain: [str(each.ports) for each in vm.ranges] for vm in edge.told()}


def _entry(ports: str | None) -> HostEntry:
    return HostEntry(HostIntent(VM, "web", INTERNAL, None if ports is None else PortRange.parse(ports)), 1)


def test_an_edge_tells_what_it_found_and_what_a_command_under_way_may_have_changed() -> None:
    edge = EdgeHoldings()
    edge.adopt(_mapped(VM, "1024-1087"))
    assert edge.told() == (Held(VM, int(INTERNAL), int(HOST), (HeldRange(int(EXTERNAL), 1024, 1087),)),)
    edge.on_changing({VM: _mapped(VM, "2048-2111"), OTHER: _mapped(OTHER, "4096-4159")})
    assert _told(edge) == {VM: ["1024-1087", "2048-2111"], OTHER: ["4096-4159"]}
    edge.on_refused()
    assert _told(edge) == {VM: ["1024-1087"]}
    edge.on_changing({OTHER: _mapped(OTHER, "4096-4159")})
    edge.on_programmed()
    edge.on_replacing({OTHER: _mapped(OTHER, "4096-4223")})
    assert _told(edge) == {VM: ["1024-1087"], OTHER: ["4096-4159", "4096-4223"]}
    edge.on_programmed()
    assert _told(edge) == {OTHER: ["4096-4223"]}


def test_a_host_tells_the_ports_before_and_after_a_command_under_way_and_no_vm_without_ports() -> None:
    assert told_by_host({VM: _entry("1024-1087")}, {}) == (Held(VM, int(INTERNAL), 0, (HeldRange(0, 1024, 1087),)),)
    changing = told_by_host({VM: _entry("1024-1087")}, {VM: _entry("1024-1151")})
    assert [str(each.ports) for each in changing[0].ranges] == ["1024-1087", "1024-1151"]
    assert told_by_host({VM: _entry(None)}, {}) == ()
    assert told_by_host({VM: _entry("1024-1087")}, {VM: None}) == told_by_host({VM: _entry("1024-1087")}, {})


@pytest.mark.parametrize("wrong", ["[-1,1,2]", "[1,2,1]", "[4294967296,1,2]", "[1,1,65536]", "[1,1]"])
def test_what_a_node_tells_is_bounded(wrong: str) -> None:
    with pytest.raises(InvalidRequest):
        codec.decode(HeldRange, wrong)
