"""The second opinion: it refuses whatever breaks a rule. That it refuses nothing else, all tests of a site show."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address, IPv4Network

import pytest

from cpm.core.changes import AddAllocation, Change, FreeAllocation, MoveAllocation
from cpm.core.invariants import Invariants
from cpm.core.journal import LedgerState
from cpm.protocol.intent import EdgeIntent, ExternalRange, HostIntent
from cpm.protocol.messages import Delta, ManagerMessage, PathState, Snapshot
from cpm.protocol.model import (
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    Node,
    NodeName,
    PortRange,
    Role,
)
from tests.unit.cpm.ledger.words import A, B, allocation

NOW, HOLD_DOWN_S = 1000.0, 120.0
HOST, EDGE = NodeName("host1"), NodeName("edge1")
NODES = {
    HOST: Node(HOST, frozenset({Role.HOST}), IPv4Address("172.30.0.11")),
    EDGE: Node(EDGE, frozenset({Role.EDGE}), IPv4Address("172.30.0.21")),
}
INTERNAL = IPv4Address("100.64.0.1")


@dataclasses.dataclass
class Session:
    applied: int
    refused: tuple[DomainUUID, ...] = ()


def held_by(*allocations: Allocation) -> Invariants:
    return Invariants(LedgerState(1, (), (), (), allocations, AllocationId(100)), HOLD_DOWN_S)


def new(number: int, domain: str, ports: str, state: str = "reserved", since: float = NOW) -> Allocation:
    return allocation(number, domain, ports, state, since=since)


def move(old: Allocation, state: str, ports: str | None = None, since: float = NOW, node: str | None = None) -> Change:
    after = PortRange.parse(ports) if ports is not None else old.ports
    return MoveAllocation(
        old.id, (old.ports, old.state), after, AllocationState(state), since, NodeName(node) if node else None
    )


def free(old: Allocation, *, taken_over: bool = False, unused_since: float | None = None) -> Change:
    return FreeAllocation(old.id, (old.ports, old.state), taken_over, unused_since)


def reasons(
    invariants: Invariants, *changes: Change, messages: tuple[tuple[NodeName, ManagerMessage], ...] = ()
) -> list[str]:
    sessions = {HOST: Session(10), EDGE: Session(10)}
    return [each.reason for each in invariants.check(changes, messages, NODES, sessions, NOW)]


ACTIVE, DRAINING = new(1, "x", "1024-1087", "active", 5.0), new(1, "x", "1024-1087", "draining", 5.0)
HELD, RESERVED = new(1, "x", "1024-1087", "held", NOW - 200), new(1, "x", "1024-1087", "reserved", 5.0)


@pytest.mark.parametrize(
    ("before", "changes", "reason"),
    [
        # Two owners.
        ([ACTIVE], [AddAllocation(new(2, "y", "1080-1100"))], "1080-1100 is active for x"),
        ([HELD], [AddAllocation(new(2, "y", "1000-1024"))], "is held for x"),
        ([DRAINING], [AddAllocation(new(2, "y", "1024-1087"))], "is draining for x"),
        ([ACTIVE], [free(ACTIVE, taken_over=True), AddAllocation(new(2, "y", "1024-1087"))], "without a hold-down"),
        ([ACTIVE], [move(ACTIVE, "active", "1024-1055", 5.0), AddAllocation(new(2, "y", "1056-1087"))], "of x without"),
        # Ports that nobody has.
        ([ACTIVE], [move(ACTIVE, "active", "1024-1055", 5.0)], "lose 1056-1087 without a hold-down"),
        ([RESERVED], [free(RESERVED, taken_over=True)], "lose 1024-1087 without a hold-down"),
        # Steps.
        ([ACTIVE], [move(ACTIVE, "held")], "it would be held though it is active"),
        ([DRAINING], [move(DRAINING, "active")], "it would be active though it is draining"),
        ([], [AddAllocation(new(2, "y", "1024-1087", "active"))], "would be active at once"),
        ([DRAINING], [move(DRAINING, "held", since=NOW - 100)], "since an earlier time"),
        ([HELD], [move(HELD, "held", since=NOW - 900)], "since an earlier time"),
        ([ACTIVE], [move(ACTIVE, "active", "1024-1151", 5.0)], "grow by 1088-1151, which was not reserved"),
        # Hosts.
        ([ACTIVE], [move(ACTIVE, "active", None, 5.0, "host2")], "from host host1 to host2"),
        # Hold-downs.
        ([DRAINING], [free(DRAINING)], "would be free although it is draining"),
        (
            [new(1, "x", "1024-1087", "held", NOW - 119)],
            [free(HELD)],
            "would be free although it is held since 119.0 s",
        ),
        ([], [free(HELD)], "there is none"),
        ([], [move(HELD, "reserved")], "there is none"),
    ],
)
def test_a_broken_rule_is_found(before: list[Allocation], changes: list[Change], reason: str) -> None:
    invariants = held_by(*before)
    invariants.check((), _edge_knows_nothing(), NODES, {}, NOW)
    found = reasons(invariants, *changes)
    assert any(reason in each for each in found), found


def _edge_knows_nothing() -> tuple[tuple[NodeName, ManagerMessage], ...]:
    return tuple((name, Delta(1, 1)) for name in NODES)


@pytest.mark.parametrize(
    ("before", "changes"),
    [
        ([], [AddAllocation(RESERVED)]),
        ([RESERVED], [move(RESERVED, "active")]),
        ([RESERVED], [move(RESERVED, "draining")]),
        ([DRAINING], [move(DRAINING, "held")]),
        ([HELD], [free(HELD)]),
        ([new(1, "x", "1024-1087", "held", NOW - 1)], [free(HELD, unused_since=NOW - HOLD_DOWN_S)]),
        # It shrinks, grows in place, and takes its own ports back.
        ([ACTIVE], [move(ACTIVE, "active", "1024-1055", 5.0), AddAllocation(new(2, "x", "1056-1087", "draining"))]),
        (
            [ACTIVE, new(2, "x", "1088-1151")],
            [free(new(2, "x", "1088-1151"), taken_over=True), move(ACTIVE, "active", "1024-1151", 5.0)],
        ),
        ([HELD], [free(HELD, taken_over=True), AddAllocation(new(2, "x", "1024-1151"))]),
        (
            [HELD],
            [
                move(HELD, "held", "1024-1030", HELD.since),
                AddAllocation(new(2, "x", "1080-1087", "held", HELD.since)),
                AddAllocation(new(3, "x", "1031-1079")),
            ],
        ),
    ],
)
def test_what_is_right_passes(before: list[Allocation], changes: list[Change]) -> None:
    invariants = held_by(*before)
    invariants.check((), _edge_knows_nothing(), NODES, {}, NOW)
    assert reasons(invariants, *changes) == []


def edge_told(ports: str, generation: int) -> tuple[tuple[NodeName, ManagerMessage], ...]:
    ranges = (ExternalRange(A, PortRange.parse(ports)),) if ports else ()
    intent = EdgeIntent(DomainUUID("x"), "x", INTERNAL, IPv4Address("172.30.0.11"), ranges)
    return ((EDGE, Delta(1, generation, edge=(intent,))),)


def host_told(ports: str, external: IPv4Address = A, node: NodeName = HOST) -> tuple[tuple[NodeName, Delta]]:
    intent = HostIntent(DomainUUID("x"), "x", INTERNAL, PortRange.parse(ports), (), external)
    return ((node, Delta(1, 1, host=(intent,))),)


def test_nothing_is_free_while_an_edge_may_map_it() -> None:
    invariants = held_by(HELD)
    assert reasons(invariants, messages=edge_told("1024-1087", 9)) == []
    assert reasons(invariants, messages=edge_told("", 11)) == []
    [reason] = reasons(invariants, free(HELD))
    assert "free although edge1 may still use it" in reason
    invariants = held_by(HELD)
    reasons(invariants, messages=edge_told("1024-1087", 9))
    reasons(invariants, messages=edge_told("", 10))
    assert reasons(invariants, free(HELD)) == []


def test_what_an_edge_gave_up_in_its_former_session_is_free_whatever_it_confirms_in_the_next() -> None:
    invariants, former, present = held_by(HELD), Session(10), Session(0)
    path = PathState(IPv4Network("100.64.0.0/10"))

    def pass_on(messages: tuple[tuple[NodeName, ManagerMessage], ...], session: Session) -> None:
        assert invariants.check((), messages, NODES, {HOST: Session(10), EDGE: session}, NOW) == []

    pass_on(((EDGE, Snapshot(1, 1, path)),), former)
    pass_on(edge_told("1024-1087", 9), former)
    pass_on(edge_told("", 10), former)
    # It has confirmed that; what it refuses now is nothing that it could still use.
    pass_on(((EDGE, Snapshot(1, 11, path)),), present)
    assert invariants.check([free(HELD)], (), NODES, {HOST: Session(10), EDGE: present}, NOW) == []


def test_nothing_is_free_while_an_edge_is_away_that_is_not_fenced() -> None:
    assert any("edge1 may still use it" in each for each in reasons(held_by(HELD), free(HELD)))
    fenced = NODES | {EDGE: dataclasses.replace(NODES[EDGE], fenced=True)}
    assert held_by(HELD).check([free(HELD)], (), fenced, {}, NOW) == []


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (edge_told("1024-1100", 1), "edge edge1 would map 203.0.113.1 1024-1100"),
        (host_told("1024-1100"), "host host1 would use 203.0.113.1 1024-1100"),
        (host_told("1024-1087", B), "host host1 would use 203.0.113.2"),
        (host_told("1024-1087", node=NodeName("host2")), "host host2 would use"),
    ],
)
def test_a_node_is_told_no_ports_that_its_vm_does_not_hold(
    messages: tuple[tuple[NodeName, ManagerMessage], ...], reason: str
) -> None:
    [found] = reasons(held_by(ACTIVE), messages=messages)
    assert reason in found


def test_what_a_vm_holds_may_be_told() -> None:
    assert reasons(held_by(ACTIVE), messages=(*edge_told("1024-1087", 1), *host_told("1024-1087"))) == []
