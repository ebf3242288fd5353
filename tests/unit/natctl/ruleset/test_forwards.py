"""Forwards as elements, and back."""

from __future__ import annotations

from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.intent import HostForward
from cpm.protocol.model import DomainUUID, ForwardProtocol, PortRange
from natctl.model.entries import HostSettings
from natctl.ruleset import forwards, host_maps
from natctl.ruleset.forwards import FORWARD_PORTS, FORWARDING, FORWARDS
from natctl.ruleset.values import Element, Family, by_identity
from tests.fakes.intents import host_entry, with_intent

INTERNAL, GUEST = IPv4Address("100.64.0.5"), IPv4Address("192.168.122.5")
VM = DomainUUID("11111111-1111-4111-8111-111111111111")
SETTINGS = HostSettings(frozenset({"eth0"}))
SSH = HostForward(PortRange(2222, 2222), 22, ForwardProtocol.TCP, GUEST)
BOTH = HostForward(PortRange(8000, 8001), 9000, ForwardProtocol.BOTH, GUEST)


def elements(*mine: HostForward) -> dict[str, list[Element]]:
    entry = with_intent(host_entry(VM, "web", 5, INTERNAL, PortRange(20000, 20063)), forwards=mine)
    made: dict[str, list[Element]] = {}
    for (_, name), element in host_maps.fragment(SETTINGS, entry).elements:
        made.setdefault(name, []).append(element)
    return made


def test_each_port_of_each_protocol_leads_to_the_guests_port() -> None:
    made = elements(SSH, BOTH)
    assert len(made[FORWARDS[1]]) == len(made[FORWARD_PORTS[1]]) == 1 + 2 * 2
    assert [each.key for each in made[FORWARDING[1]]] == [INTERNAL.packed]
    assert {each.chain for each in made[FORWARD_PORTS[1]]} == {"vm-5"}


def test_a_vm_without_forwards_has_nothing() -> None:
    assert not {FORWARDS[1], FORWARDING[1], FORWARD_PORTS[1]} & elements().keys()


def test_a_chain_for_its_limits_comes_with_the_first_forward_to_a_guest_that_is_known() -> None:
    unknown = HostForward(PortRange(80, 80), 80, ForwardProtocol.TCP)
    for mine, has_chain in (((), False), ((unknown,), False), ((unknown, SSH), True)):
        entry = with_intent(host_entry(VM, "web", 5, INTERNAL, None), forwards=mine)
        chains = [place for place, _ in host_maps.fragment(SETTINGS, entry).chains]
        assert ((Family.IPV4, "vm-5") in chains) is has_chain


def test_what_is_read_is_what_was_made_and_neighbours_are_joined() -> None:
    other = HostForward(PortRange(2223, 2223), 23, ForwardProtocol.TCP, GUEST)
    read = forwards.forwards_in(by_identity(elements(SSH, BOTH, other)[FORWARDS[1]]))
    assert read == {INTERNAL: (HostForward(PortRange(2222, 2223), 22, ForwardProtocol.TCP, GUEST), BOTH)}


@given(st.lists(st.tuples(st.binary(max_size=16), st.binary(max_size=12))))
def test_somebody_elses_elements_are_read_without_harm(found: list[tuple[bytes, bytes]]) -> None:
    forwards.forwards_in(by_identity(Element(key, data=data) for key, data in found))
