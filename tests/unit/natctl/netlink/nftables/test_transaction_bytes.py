"""
The bytes of whole transactions, pinned: what a host and an edge send for everything that they can hold.

The golden messages of ``test_encode`` show what single bytes mean. These digests show that a change of the code that
encodes changes no byte anywhere; when rules or sets change on purpose, the digests do too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import sys
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network

import pytest

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID, PortRange
from cpm.protocol.timeouts import Timeouts
from natctl import ruleset
from natctl.model.entries import Destination, EdgeSettings, HostEntry, HostSettings, Path, Queueing, Settings
from natctl.netlink import routes
from natctl.netlink.message import Request
from natctl.netlink.nftables import encode
from natctl.netlink.socket import ROUTE, Socket
from natctl.ruleset import edge_maps, host_maps, plan, routing, senders
from natctl.ruleset.routing import Routing
from natctl.ruleset.values import Family, Fragment, Holdings, Ruleset, with_fragments
from tests.fakes.intents import edge_intent, host_entry, with_intent, with_ranges

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="the bytes below are of a little-endian machine")

POOL = IPv4Network("100.64.0.0/10")
HOST = HostSettings(frozenset({"eth0", "eth1"}))
EDGE = EdgeSettings(frozenset({"eth0"}), frozenset({"eth1"}))
BOTH = Settings(HOST, EDGE)
PATH = Path(
    POOL,
    frozenset({IPv4Address("172.30.0.21"), IPv4Address("172.30.0.22")}),
    frozenset({IPv4Address("203.0.113.1"), IPv4Address("203.0.113.9")}),
    Timeouts(),
)


def domain(number: int) -> DomainUUID:
    return DomainUUID(f"00000000-0000-4000-8000-{number:012d}")


def on_host(number: int) -> HostEntry:
    """A VM with, by its number, every property that one can have."""
    ports = None if number % 5 == 4 else PortRange(2000 + 64 * number, 2063 + 64 * number)
    return host_entry(
        domain(number),
        f"vm “{number}”",
        number + 1,
        IPv4Address("100.64.0.1") + number,
        ports,
        frozenset({10 + number, 100 + number}),
        None if number % 3 == 0 else number * 16,
        at_cap=number % 4 == 1,
        defer_after=None if number % 2 else 192,
    )


def at_edge(number: int) -> EdgeIntent:
    external = IPv4Address("203.0.113.1") + number % 4
    first = 2000 + 64 * (number % 900)
    ranges = ((external, PortRange(first, first + 63)), (external + 4, PortRange(first, first + 127)))
    via = None if number % 7 == 0 else IPv4Address("172.30.0.11")
    return edge_intent(domain(number), f"vm{number}", IPv4Address("100.64.0.1") + number, via, ranges[: 1 + number % 2])


def assembly(settings: Settings, hosts: Iterable[HostEntry], edges: Iterable[EdgeIntent], path: Path = PATH) -> Ruleset:
    edges = tuple(edges)
    layout = edge_maps.Layout.of(edges, path)
    assert settings.host is not None
    fragments = [host_maps.fragment(settings.host, entry) for entry in hosts]
    fragments += [edge_maps.fragment(entry, layout, checks_senders=True) for entry in edges]
    fragments += [senders.host_fragment(IPv4Address("172.30.0.11"), ())]
    return with_fragments(ruleset.base(settings, path, layout), fragments)


def digest(*plans: plan.Plan) -> str:
    """Number of messages, their bytes, and a hash over all of them."""
    members = [member for each in plans for member in encode.transaction(each.operations)]
    data = b"".join(member.data for member in members)
    return f"{len(members)} messages, {len(data)} bytes, {hashlib.blake2b(data, digest_size=16).hexdigest()}"


class Recorder(Socket):
    """A socket that keeps what is sent and takes everything."""

    def __init__(self) -> None:
        super().__init__(ROUTE, "record")
        self.sent: list[Request] = []

    def execute(self, requests: Sequence[Request], action: str = "") -> None:
        del action
        self.sent += requests


def routes_digest(missing: Routing, surplus: Routing) -> str:
    with contextlib.closing(Recorder()) as recorder:
        routes.put(recorder, missing)
        routes.drop(recorder, surplus)
    data = b"".join(member.data for member in recorder.sent)
    return f"{len(recorder.sent)} messages, {len(data)} bytes, {hashlib.blake2b(data, digest_size=16).hexdigest()}"


def test_first_load_of_a_host_that_is_an_edge_too() -> None:
    wanted = assembly(BOTH, map(on_host, range(20)), map(at_edge, range(40)))
    assert digest(plan.difference(wanted, Holdings())) == "370 messages, 138648 bytes, f85a925c1a4e02e64b98a68c1b916c95"


def test_first_load_of_an_edge_with_many_vms_in_several_maps() -> None:
    edges = [at_edge(number) for number in range(600)]
    layout = edge_maps.Layout.of(edges, PATH)
    assert layout.shards > 1
    fragments = [edge_maps.fragment(entry, layout, checks_senders=True) for entry in edges]
    fragments += [senders.host_fragment(IPv4Address("172.30.0.11"), [bytes.fromhex("02000000000b")])]
    wanted = with_fragments(ruleset.base(Settings(edge=EDGE), PATH, layout), fragments)
    assert digest(plan.difference(wanted, Holdings())) == "281 messages, 492724 bytes, 76804a8ce64c62043e46c9e597d83f97"


def test_repair_of_a_host_that_differs_in_everything() -> None:
    wanted = assembly(BOTH, map(on_host, range(20)), map(at_edge, range(40)))
    other = assembly(
        Settings(dataclasses.replace(HOST, queueing=Queueing.EXTENSION), EDGE),
        map(on_host, range(10, 30)),
        map(at_edge, range(20, 60)),
        dataclasses.replace(PATH, timeouts=Timeouts(udp_s=150)),
    )
    assert (
        digest(plan.difference(wanted, other.holdings), plan.difference(other, wanted.holdings))
        == "234 messages, 86792 bytes, 823c89ece8dc03b5c51deb3387be2345"
    )


def test_changes_of_single_vms() -> None:
    layout = edge_maps.Layout.of([at_edge(1)], PATH)
    old = [host_maps.fragment(HOST, on_host(1)), edge_maps.fragment(at_edge(1), layout)]
    new = [
        host_maps.fragment(HOST, with_intent(dataclasses.replace(on_host(1), budget=1), ports=PortRange(4000, 4127))),
        edge_maps.fragment(with_ranges(at_edge(1)), layout),
    ]
    to = IPv4Address("192.0.2.1")
    refusals = [host_maps.refusal(HOST, 2, where, 5000) for where in (Destination(6, to, 443), Destination(1, to, 0))]
    plans = [
        plan.alteration(old, new),
        plan.alteration(new, old),
        plan.alteration([], old),
        plan.alteration(old, [Fragment()]),
        plan.refill(host_maps.REFUSALS, refusals),
        plan.refill(host_maps.REFUSALS, ()),
        plan.Plan(tuple(plan.DeleteTable(family) for family in Family)),
    ]
    assert digest(*plans) == "73 messages, 7244 bytes, 651a1d5bb52a9dc95640f6a3d1e5264a"


def test_routes_and_rules() -> None:
    to_vms = Routing(routing.of_entries(map(at_edge, range(1200))))
    shared = routing.shared(BOTH, PATH)
    one_edge = routing.shared(BOTH, dataclasses.replace(PATH, edges=frozenset({IPv4Address("172.30.0.21")})))
    assert routes_digest(to_vms, to_vms) == "2056 messages, 90464 bytes, 7058a9894f6132f5cfc55d98e899339b"
    assert routes_digest(shared, shared) == "8 messages, 420 bytes, cde141f1f67ce3cbd0c023853c1e04be"
    assert routes_digest(one_edge, one_edge) == "8 messages, 392 bytes, c74e00e0048c46018c836d115ea73385"
