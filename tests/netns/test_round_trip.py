"""
`nft list ruleset > file` of a machine with our tables loads again, at its next boot, and natd then repairs it.

Many machines save their ruleset so, and one line that nft cannot read leaves such a machine without any firewall.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from cpm.protocol.model import DomainUUID, Filtering, PortRange
from cpm.protocol.timeouts import Timeouts
from natctl.model.entries import Change, Destination, Path
from tests.fakes.intents import edge_intent, host_entry, with_intent
from tests.netns.conftest import Way
from tests.netns.machine import Machine
from tests.netns.topology import EXTERNAL, INTERNET, OTHER_EXTERNAL, POOL, Namespace, Node

pytestmark = pytest.mark.netns

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
RANGE = PortRange(20000, 20063)
PATH = Path(POOL, frozenset({IPv4Address("172.30.0.11")}), frozenset({EXTERNAL}), Timeouts(udp_s=150, icmp_s=90))
HOSTED = host_entry(
    VM, "web 1", 1, IPv4Address("100.64.0.1"), RANGE, frozenset({8, 9}), 64, at_cap=True, defer_after=192
)
BLOCKS = PortRange(20480, 22591)
AT_EDGE = edge_intent(VM, "web 1", IPv4Address("100.64.0.1"), None, ((EXTERNAL, RANGE), (EXTERNAL, BLOCKS)))
NAMES = (
    "web 1",
    'x" ; } table ip injected { chain c { type filter hook input priority 0; policy drop; } }',
    'x"\n}\nflush ruleset\n',
    "x\\",
    '\\"',
    "x" * 127,
    "é" * 64,
    "名" * 100,
    "x\0y",
    "x\u2028y\x1b[2J",
    "*",
    "x*",
    "# x",
    "$x @y { a, b } ; drop",
    "",
    "\ud800",
    "$(reboot)",
)


def _saved(namespace: Namespace) -> str:
    """Return what a machine would save, without what is used up or expires: counters and remaining times."""
    return namespace.run("nft", "-s", "list", "ruleset")


def _loadable(saved: str) -> str:
    """
    Return the file as a kernel takes it that has no ``nft_queue``.

    There natd queues by the extension of iptables (:class:`natctl.model.entries.Queueing`), which nft prints as its own
    statement: it can be read, but such a kernel refuses it from nft.
    """
    other = Namespace("queue")
    try:
        other.nft("table ip t {\n chain c {\n queue num 1 bypass\n }\n }")
    except AssertionError:
        return re.sub(r"queue (flags bypass to 7414|num 7414 bypass) comment", "comment", saved)
    finally:
        other.close()
    return saved


@pytest.fixture
def rebooted() -> Iterator[Namespace]:
    """A namespace without any interface but lo, as a machine has when it loads its ruleset."""
    made = Namespace("rebooted")
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def machine() -> Iterator[Machine]:
    made = Machine()
    try:
        yield made
    finally:
        made.close()


def _with_all_kinds_of_elements(way: Way) -> None:
    """Give the layout's VM whatever a VM can have."""
    entry = dataclasses.replace(way.vm.on_host(), budget=64, defer_after=192)
    refused = [Destination(6, IPv4Address(INTERNET), 443), Destination(1, IPv4Address(INTERNET), 0)]
    for host in way.hosts:
        entry = with_intent(entry, at_cap=True, port_control=1, filtering=Filtering.ENDPOINT_INDEPENDENT)
        entry = dataclasses.replace(entry, unshared=(20003, 20001, 20002))
        host.kernel.change(Change(host={way.vm.domain: entry}))
        host.kernel.refuse_connections({way.vm.domain: refused}, 3600)
    several = ((EXTERNAL, RANGE), (OTHER_EXTERNAL, PortRange(65472, 65535)), (OTHER_EXTERNAL, PortRange(1024, 1087)))
    for edge in way.edges:
        at_edge = edge_intent(way.vm.domain, "web 1", way.vm.internal, way.vm.at(edge).via, several)
        edge.kernel.change(Change(edge={way.vm.domain: at_edge}))


def _nodes(way: Way) -> list[Node]:
    return list({id(node): node for node in (*way.hosts, *way.edges)}.values())


def test_what_each_layout_saves_loads_and_is_the_same(way: Way) -> None:
    _with_all_kinds_of_elements(way)
    with way.site.internet.udp(INTERNET, 9000) as server, way.guest.namespace.udp() as client:
        client.sendto(b"so that origins and mappings have elements", (INTERNET, 9000))
        server.recv(100)
    for node in _nodes(way):
        saved = _loadable(_saved(node.namespace))
        rebooted = Namespace("rebooted")
        try:
            rebooted.nft(saved)
            assert _saved(rebooted) == saved
        finally:
            rebooted.close()


@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_vm_says_anything_to_nft(machine: Machine, rebooted: Namespace, name: str) -> None:
    hosted = with_intent(HOSTED, name=name)
    machine.replace({VM: hosted}, {VM: edge_intent(VM, name, HOSTED.intent.internal, None, ((EXTERNAL, RANGE),))}, PATH)
    saved = _loadable(_saved(machine.namespace))
    rebooted.nft(saved)
    assert _saved(rebooted) == saved
    assert {(item["table"]["family"], item["table"]["name"]) for item in rebooted.ruleset() if "table" in item} == {
        ("ip", "virtports"),
        ("bridge", "virtports"),
    }


def test_a_tap_that_exists_is_saved_as_a_number(machine: Machine, rebooted: Namespace) -> None:
    tap = int(machine.namespace.run("cat", "/sys/class/net/eth1/ifindex"))
    machine.replace({VM: dataclasses.replace(HOSTED, taps=frozenset({tap}))}, {}, PATH)
    rebooted.nft(_loadable(_saved(machine.namespace)))
    assert "eth1" not in rebooted.run("nft", "list", "map", "bridge", "virtports", "taps")
    assert machine.observe().host[VM].taps == {tap}


def test_a_machine_with_addresses_of_its_own_in_the_pool(machine: Machine, rebooted: Namespace) -> None:
    machine.namespace.ip("addr add 100.64.9.1/24 dev eth0")
    machine.replace({VM: HOSTED}, {VM: AT_EDGE}, PATH)
    saved = _loadable(_saved(machine.namespace))
    assert "chain returning" in saved
    rebooted.nft(saved)
    assert _saved(rebooted) == saved


def test_natd_makes_a_loaded_ruleset_its_own(machine: Machine) -> None:
    machine.replace({VM: HOSTED}, {VM: AT_EDGE}, PATH)
    fresh, saved = machine.everything(), _loadable(machine.nft("list", "ruleset"))
    machine.remove()
    machine.flush()
    machine.namespace.nft(saved)
    machine.restart_natd()
    seen = machine.observe()
    # Nobody can say whose they are: nft does not keep what we wrote beside them.
    assert (seen.host, seen.edge) == ({}, {})
    assert machine.replace({VM: HOSTED}, {VM: AT_EDGE}, PATH)
    assert machine.everything() == fresh
    assert machine.ensure() == ()


def test_a_natd_that_starts_forgets_the_taps_of_before_the_boot(machine: Machine) -> None:
    present = int(machine.namespace.run("cat", "/sys/class/net/eth1/ifindex"))
    machine.replace({VM: dataclasses.replace(HOSTED, taps=frozenset({present, 1000}))}, {VM: AT_EDGE}, PATH)
    saved = _loadable(machine.nft("list", "ruleset"))
    machine.remove()
    machine.namespace.nft(saved)
    machine.restart_natd()
    machine.observe()
    (taps,) = [item["map"] for item in machine.namespace.ruleset() if item.get("map", {}).get("name") == "taps"]
    assert len(taps["elem"]) == 1
    assert str(present + (1 << 30)) in machine.nft("list", "map", "bridge", "virtports", "taps")


def test_natd_removes_a_loaded_ruleset_that_is_not_of_this_machine_any_more(machine: Machine) -> None:
    machine.replace({VM: HOSTED}, {VM: AT_EDGE}, PATH)
    saved = _loadable(machine.nft("list", "ruleset"))
    machine.replace({}, {}, PATH)
    empty = machine.everything()
    machine.remove()
    machine.namespace.nft(saved)
    machine.restart_natd()
    machine.replace({}, {}, PATH)
    assert machine.everything() == empty


def test_a_loaded_ruleset_lets_no_managed_packet_out_untranslated(way: Way) -> None:
    """What loaded tables know of a VM counts until natd replaces it; what they do not translate does not leave."""
    for host in way.hosts:
        saved = _loadable(_saved(host.namespace))
        host.namespace.nft("flush ruleset\n" + saved)
        for name in ("bindings", "unshared", "sockets"):
            host.namespace.run("nft", "flush", "map", "ip", "virtports", name)
    with way.site.internet.udp(INTERNET, 9001) as server, way.guest.namespace.udp() as client:
        client.sendto(b"must not arrive", (INTERNET, 9001))
        with way.site.router.udp() as other:
            other.sendto(b"witness", (INTERNET, 9001))
        assert server.recv(100) == b"witness"
    for host in way.hosts:
        host.kernel.ensure()
