"""That the judge sees what must never be seen, and nothing else."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.protocol.intent import EdgeIntent, ExternalRange, HostIntent
from cpm.protocol.model import DomainUUID, PortRange
from natctl.model.entries import HostEntry
from prove.judge import Flow, Judge, Violation

ONE, TWO = DomainUUID("00000000-0000-0000-0000-000000000001"), DomainUUID("00000000-0000-0000-0000-000000000002")
EXTERNAL, INTERNAL = IPv4Address("203.0.113.1"), IPv4Address("100.64.0.1")
VIA, ELSEWHERE = IPv4Address("172.30.0.11"), IPv4Address("172.30.0.12")
FIRST, BOTH = PortRange(1024, 1087), PortRange(1024, 1151)
HOLD_DOWN_S = 30.0


def mapped(uuid: DomainUUID, ports: PortRange = FIRST, via: IPv4Address = VIA) -> EdgeIntent:
    return EdgeIntent(uuid, "vm", INTERNAL, via, (ExternalRange(EXTERNAL, ports),))


def entry(index: int = 1) -> HostEntry:
    return HostEntry(HostIntent(ONE, "vm", INTERNAL, FIRST), index)


@pytest.fixture
def judge() -> Judge:
    return Judge(HOLD_DOWN_S)


def flow(judge: Judge, now: float = 0.0, port: int = 1030) -> Flow:
    """A connection of the first VM through edge1."""
    judge.on_edge("edge1", {ONE: mapped(ONE)}, now)
    begun = Flow(ONE, "host1", VIA, INTERNAL, 1, EXTERNAL, PortRange(port, port))
    judge.on_begin(begun, ["edge1"], now)
    return begun


def test_two_edges_that_map_a_port_to_two_vms_are_two_owners(judge: Judge) -> None:
    judge.on_edge("edge1", {ONE: mapped(ONE)}, 0.0)
    judge.on_edge("edge2", {ONE: mapped(ONE)}, 0.0)
    judge.on_edge("edge1", {ONE: None}, 1.0)
    with pytest.raises(Violation, match="two owners"):
        judge.on_edge("edge1", {TWO: mapped(TWO)}, 1000.0)


def test_a_change_may_hand_ports_from_one_vm_to_another(judge: Judge) -> None:
    judge.on_edge("edge1", {ONE: mapped(ONE)}, 0.0)
    judge.on_edge("edge1", {TWO: mapped(TWO), ONE: None}, 1.0)


def test_a_port_that_was_used_rests_for_the_hold_down(judge: Judge) -> None:
    begun = flow(judge)
    judge.on_end(begun, 10.0)
    judge.on_edge("edge1", {ONE: None}, 10.0)
    with pytest.raises(Violation, match="no hold-down"):
        judge.on_edge("edge1", {TWO: mapped(TWO)}, 39.0)
    judge.on_edge("edge1", {TWO: None}, 39.0)
    judge.on_edge("edge1", {TWO: mapped(TWO)}, 40.0)


def test_an_edge_that_let_a_connection_through_does_so_until_it_ends(judge: Judge) -> None:
    begun = flow(judge)
    judge.on_edge("edge1", {ONE: mapped(ONE, BOTH)}, 1.0)
    with pytest.raises(Violation, match="cut"):
        judge.on_edge("edge1", {ONE: None}, 2.0)
    judge.on_end(begun, 3.0)
    judge.on_edge("edge1", {ONE: mapped(ONE)}, 3.0)
    judge.on_edge("edge1", {ONE: None}, 3.0)


def test_what_an_edge_loses_by_itself_is_no_cut_but_it_has_to_come_back_to_the_same_vm(judge: Judge) -> None:
    flow(judge)
    judge.on_edge_lost("edge1")
    with pytest.raises(Violation, match="two owners"):
        judge.on_edge("edge1", {TWO: mapped(TWO)}, 1000.0)


@pytest.mark.parametrize("after", [None, entry(index=2)], ids=["nothing", "another zone"])
def test_a_host_keeps_what_its_connections_need(judge: Judge, after: HostEntry | None) -> None:
    flow(judge)
    judge.on_host("host1", ONE, entry())
    judge.on_host("host2", ONE, None)
    with pytest.raises(Violation, match="cut"):
        judge.on_host("host1", ONE, after)


def test_an_entry_of_a_connection_that_lives_is_not_deleted(judge: Judge) -> None:
    begun = flow(judge)
    with pytest.raises(Violation, match="deleted"):
        judge.on_deleted(begun)
    judge.on_end(begun, 1.0)
    judge.on_deleted(begun)


def test_what_a_host_forgot_by_itself_is_no_cut_until_it_has_it_again(judge: Judge) -> None:
    flow(judge)
    judge.on_host_lost("host1")
    judge.on_host("host1", ONE, None)
    judge.on_host("host1", ONE, entry())
    with pytest.raises(Violation, match="cut"):
        judge.on_host("host1", ONE, None)


def test_the_ledger_gives_no_port_that_an_edge_maps_to_another_vm(judge: Judge) -> None:
    judge.on_edge("edge2", {ONE: mapped(ONE)}, 0.0)
    judge.on_given(ONE, EXTERNAL, BOTH)
    with pytest.raises(Violation, match="given too soon"):
        judge.on_given(TWO, EXTERNAL, BOTH)


def test_what_a_liars_own_vms_suffer_is_not_counted(judge: Judge) -> None:
    flow(judge)
    judge.liars.add("host1")
    judge.on_edge("edge1", {ONE: None}, 1.0)
    judge.on_host("host1", ONE, None)


def test_an_edge_that_sends_what_comes_back_to_another_host_cuts_a_connection(judge: Judge) -> None:
    flow(judge)
    with pytest.raises(Violation, match="cut"):
        judge.on_edge("edge1", {ONE: mapped(ONE, via=ELSEWHERE)}, 1.0)


def test_an_edge_to_which_the_host_does_not_send_may_lack_what_the_others_have() -> None:
    judge = Judge(HOLD_DOWN_S, lambda _host, edge: edge == "edge1")
    flow(judge)
    judge.on_edge("edge2", {ONE: mapped(ONE)}, 1.0)
    judge.on_edge("edge2", {ONE: None}, 2.0)
    with pytest.raises(Violation, match="cut: edge1"):
        judge.on_edge("edge1", {ONE: None}, 3.0)


def test_an_edge_to_which_a_host_sends_maps_what_that_hands_out_unless_the_host_lies(judge: Judge) -> None:
    with pytest.raises(Violation, match="dropped: host1 hands out 1024-1087 to vm1, and edge2 does not map it"):
        judge.on_not_mapped("host1", ONE, FIRST, "edge2")
    judge.liars.add("host1")
    judge.on_not_mapped("host1", ONE, FIRST, "edge2")


def test_a_vm_beside_another_one_of_the_same_uuid_is_another_owner(judge: Judge) -> None:
    begun = flow(judge)
    twin = Flow(TWO, "host2", ELSEWHERE, INTERNAL, 1, EXTERNAL, PortRange(1100, 1100), guest=ONE)
    judge.on_begin(twin, ["edge1"], 0.0)
    assert set(judge.flows(ONE)) == {begun, twin}
    judge.on_host("host1", ONE, entry())
    with pytest.raises(Violation, match="cut: host2"):
        judge.on_host("host2", ONE, None)
    with pytest.raises(Violation, match="two owners"):
        judge.on_edge("edge1", {ONE: mapped(ONE, PortRange(1088, 1151))}, 1.0)
