"""Through which bridges VMs are routed: :mod:`natctl.kernel.ways`, as far as it does not need a kernel."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Interface
from typing import Final

import pytest

from cpm.protocol.model import DomainUUID
from natctl.kernel import ways
from natctl.netlink.links import Link
from natctl.netlink.socket import ROUTE, Socket
from tests.fakes.intents import host_entry

TAP: Final = 1000
MASTER: Final = 9


@pytest.fixture
def rtnl() -> Iterator[Socket]:
    with Socket(ROUTE, "not used") as socket:
        yield socket


@pytest.mark.parametrize(("kind", "is_asked"), [("bridge", True), ("vrf", False), ("openvswitch", False)])
def test_only_a_bridge_is_asked_for_its_way(
    rtnl: Socket, monkeypatch: pytest.MonkeyPatch, kind: str, is_asked: bool
) -> None:
    """A VRF with an address would be, and its answer would hide that the VM is on no bridge."""
    monkeypatch.setattr(ways, "interface_addresses", lambda _: {MASTER: [IPv4Interface("10.20.0.1/24")]})
    entry = host_entry(DomainUUID("1"), "web1", 1, IPv4Address("100.64.0.1"), None, frozenset({TAP}))
    tap = Link(TAP, "vnet0", MASTER, is_bridge_port=kind == "bridge")
    links = {TAP: tap, MASTER: Link(MASTER, "above0", None, kind=kind)}
    found = [bridge.name for bridge, _ in ways.bridges(rtnl, links, [entry])]
    assert found == (["above0"] if is_asked else [])
