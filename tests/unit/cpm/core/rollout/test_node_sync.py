"""A delta has exactly what differs; a VM is confirmed when everything sent about it is."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network

from cpm.core.rollout.node_sync import NodeSync
from cpm.protocol.intent import EdgeIntent, HostIntent
from cpm.protocol.messages import Delta, PathState, Snapshot
from cpm.protocol.model import DomainUUID, NodeName, PortRange

A, B = DomainUUID("a"), DomainUUID("b")
PATH = PathState(IPv4Network("100.64.0.0/10"))
INTERNAL = IPv4Address("100.64.0.1")
NOW = 1_000.0


def host(uuid: DomainUUID, first: int = 1024) -> HostIntent:
    return HostIntent(uuid, str(uuid), INTERNAL, PortRange(first, first + 63))


def edge(uuid: DomainUUID) -> EdgeIntent:
    return EdgeIntent(uuid, str(uuid), INTERNAL, None, ())


def synced() -> NodeSync:
    sync = NodeSync(NodeName("host1"), 7)
    sync.make_snapshot(PATH, {A: host(A)}, {A: edge(A)}, NOW)
    sync.on_applied(1)
    return sync


def test_a_snapshot_has_everything_and_is_confirmed_as_one() -> None:
    sync = NodeSync(NodeName("host1"), 7)
    assert sync.make_snapshot(PATH, {A: host(A)}, {B: edge(B)}, NOW) == Snapshot(7, 1, PATH, (host(A),), (edge(B),))
    assert not sync.synced
    assert not sync.is_confirmed(A)
    assert sync.on_applied(1) == {A, B}
    assert sync.synced
    assert sync.is_confirmed(A)


def test_a_delta_has_what_differs_and_nothing_else() -> None:
    sync = synced()
    assert sync.make_delta(PATH, {A: host(A), B: None}, {A: edge(A)}, NOW) is None
    delta = sync.make_delta(PATH, {A: host(A, 2048), B: host(B)}, {A: None}, NOW)
    assert delta == Delta(7, 2, host=(host(A, 2048), host(B)), edge_gone=(A,))
    assert sync.make_delta(PATH, {A: host(A, 2048)}, {A: None}, NOW) is None
    assert sync.make_delta(PATH, {B: None}, {}, NOW) == Delta(7, 3, host_gone=(B,))


def test_a_delta_has_the_path_only_when_it_changed() -> None:
    sync, other = synced(), PathState(PATH.internal_pool, edges=(IPv4Address("172.30.0.12"),))
    assert sync.make_delta(other, {}, {}, NOW) == Delta(7, 2, path=other)
    assert sync.make_delta(other, {}, {}, NOW) is None


def test_a_path_is_confirmed_by_the_generation_that_brought_it_and_not_by_others() -> None:
    sync, other = synced(), PathState(PATH.internal_pool, edges=(IPv4Address("172.30.0.12"),))
    assert sync.is_path_confirmed
    sync.make_delta(PATH, {A: host(A, 2048)}, {}, NOW)
    assert sync.is_path_confirmed, "nothing of the path changed"
    sync.make_delta(other, {}, {}, NOW)
    assert not sync.is_path_confirmed
    sync.on_applied(2)
    assert not sync.is_path_confirmed
    sync.on_applied(3)
    assert sync.is_path_confirmed


def test_a_confirmation_covers_all_generations_up_to_its_own() -> None:
    sync = synced()
    sync.make_delta(PATH, {A: host(A, 2048)}, {}, NOW)
    sync.make_delta(PATH, {B: host(B)}, {}, NOW)
    assert (sync.last_change(A), sync.last_change(B)) == (2, 3)
    assert sync.on_applied(2) == {A}
    assert (sync.is_confirmed(A), sync.is_confirmed(B)) == (True, False)
    assert sync.on_applied(99) == {B}, "a node cannot confirm what it was not sent, but it holds what it was"
    assert sync.applied == 3
    assert sync.on_applied(1) == set()
    assert sync.applied == 3


def test_after_a_new_snapshot_everything_is_unconfirmed_again() -> None:
    sync = synced()
    sync.make_snapshot(PATH, {A: host(A)}, {}, NOW)
    assert not sync.synced
    assert not sync.is_confirmed(A)
    assert sync.last_change(A) == sync.last_change(B) == 2
