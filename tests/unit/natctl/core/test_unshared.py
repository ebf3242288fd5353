"""The ports that new UDP sockets of full-cone VMs are offered."""

from __future__ import annotations

from ipaddress import IPv4Address

from cpm.protocol.intent import HostIntent
from cpm.protocol.model import DomainUUID, Filtering, PortRange
from natctl.core.unshared import Unshared
from natctl.model.entries import MOST_OFFERED
from natctl.model.port_use import PortUse, VMPorts

INTERNAL, RANGE = IPv4Address("100.64.0.1"), PortRange(20000, 20255)
VM = HostIntent(DomainUUID("u"), "web", INTERNAL, RANGE, filtering=Filtering.ENDPOINT_INDEPENDENT)
TCP, UDP = 6, 17


def use(*ports: int, protocol: int = UDP) -> PortUse:
    return PortUse({INTERNAL: VMPorts.of({protocol: ports})})


def test_ports_without_a_udp_connection_are_offered_in_no_order_that_is_seen() -> None:
    taken = range(20000, 20128)
    unshared = Unshared()
    assert unshared.on_port_use(use(*taken), [VM]) == [VM.domain]
    offered = unshared.of(VM)
    assert len(offered) == len(set(offered)) == MOST_OFFERED
    assert all(port in RANGE and port not in taken for port in offered)
    assert list(offered) != sorted(offered)
    unshared = Unshared()
    unshared.on_port_use(use(*taken, protocol=TCP), [VM])
    assert any(port in taken for port in unshared.of(VM))


def test_an_offer_stays_until_some_of_it_is_taken_and_is_then_replaced() -> None:
    unshared = Unshared()
    unshared.on_port_use(PortUse(), [VM])
    first = unshared.of(VM)
    assert unshared.on_port_use(use(*set(RANGE_PORTS) - set(first)), [VM]) == []
    assert unshared.on_port_use(use(first[0]), [VM]) == [VM.domain]
    # Others of it may have been taken since.
    assert not set(first) & set(unshared.of(VM))


RANGE_PORTS = range(RANGE.first, RANGE.last + 1)


def test_what_is_left_is_offered_when_the_range_is_nearly_full_and_then_nothing() -> None:
    unshared = Unshared()
    unshared.on_port_use(use(*RANGE_PORTS[:-3]), [VM])
    assert set(unshared.of(VM)) == set(RANGE_PORTS[-3:])
    assert unshared.on_port_use(use(*RANGE_PORTS), [VM]) == [VM.domain]
    assert unshared.of(VM) == ()


def test_a_vm_that_moves_on_is_offered_nothing_of_its_former_range() -> None:
    unshared = Unshared()
    unshared.on_port_use(PortUse(), [VM])
    moved = HostIntent(VM.domain, "web", INTERNAL, PortRange(30000, 30063), filtering=VM.filtering)
    assert unshared.of(moved) == ()
    assert unshared.on_port_use(PortUse(), [moved]) == [VM.domain]
    assert all(port in PortRange(30000, 30063) for port in unshared.of(moved))


def test_other_vms_are_offered_nothing() -> None:
    unshared = Unshared()
    plain = HostIntent(VM.domain, "web", INTERNAL, RANGE)
    waiting = HostIntent(VM.domain, "web", INTERNAL, None, filtering=VM.filtering)
    assert unshared.on_port_use(PortUse(), [plain]) == unshared.on_port_use(PortUse(), [waiting]) == []
    assert unshared.of(plain) == unshared.of(waiting) == ()
