"""Commits, refused commits, and that a refusal changes nothing."""

import dataclasses
import sqlite3
from collections.abc import Sequence
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from cpm.core.changes import Change, DropAddress, DropNode, DropVM, NoteNode, PutAddress, PutNode, PutOwnPorts, PutVM
from cpm.core.journal import NodeEntry, NodeEvent
from cpm.ledger import SqliteLedger, applying
from cpm.protocol.errors import AddressInUse, Conflict, Overloading
from cpm.protocol.ledger_errors import LedgerError
from cpm.protocol.model import UNLIMITED, DomainUUID, NodeName, PortRange, Wishes
from cpm.protocol.own_ports import KeptPorts, OwnUse
from cpm.protocol.walltime import WallTime
from tests.unit.cpm.ledger.words import A, B, add, allocation, expected, external, free, move, node, vm


def refused(ledger: SqliteLedger, changes: Sequence[Change], error: type[Conflict], words: str | None = None) -> None:
    before, seq = ledger.load(), ledger.reader().latest_seq()
    with pytest.raises(error, match=words):
        ledger.commit(changes, now=9.0)
    assert (ledger.load(), ledger.reader().latest_seq()) == (before, seq)


def test_everything_comes_back_after_reopening(path: Path) -> None:
    guest = dataclasses.replace(
        vm("x"),
        destination=NodeName("host2"),
        xml_wishes=Wishes(floor=64, cap=1024, nonsense=("weight 'x': it is not a whole number",)),
        operator_wishes=Wishes(weight=7, policy="spec", drain_limit_s=UNLIMITED),
    )
    edge = dataclasses.replace(node("host1"), in_service=False, fenced=True)
    address = external(A, "80", "5060-5061")
    held = allocation(7, "x", "1024-1087", "held", since=12.5)
    with SqliteLedger(path) as ledger:
        ledger.commit(
            [PutNode(edge), PutAddress(address), PutVM(guest), add(7, "x", "1024-1087", "held", since=12.5)], 1
        )
    with SqliteLedger(path) as ledger:
        state = ledger.load()
    assert (state.vms, state.nodes, state.addresses, state.allocations) == ((guest,), (edge,), (address,), (held,))
    assert (state.epoch, state.next_allocation_id) == (0, 8)


def test_epochs_ascend_over_reopening(path: Path) -> None:
    for epoch in (1, 2, 3):
        with SqliteLedger(path) as ledger:
            assert ledger.next_epoch() == epoch
            assert ledger.load().epoch == epoch


def test_batch_is_all_or_nothing(ledger: SqliteLedger) -> None:
    refused(ledger, [add(1, "x", "1024-1087"), PutVM(vm("z")), add(2, "y", "1087-1150")], Overloading)


def test_adding_an_equal_allocation_again_does_nothing(ledger: SqliteLedger) -> None:
    for _ in range(2):
        ledger.commit([add(1, "x", "1024-1087")], now=1.0)
    assert ledger.load().allocations == (allocation(1, "x", "1024-1087"),)
    assert ledger.reader().latest_seq() == 1
    refused(ledger, [add(1, "x", "1024-1087", since=5.0)], Overloading)
    refused(ledger, [add(1, "y", "2048-2111")], Conflict)


def test_ids_are_never_used_again(ledger: SqliteLedger) -> None:
    ledger.commit([add(5, "x", "1024-1087", "held"), free(5, "1024-1087", "held")], now=1.0)
    assert ledger.load().next_allocation_id == 6
    refused(ledger, [add(5, "x", "1024-1087", "held")], Conflict, "never used again")
    refused(ledger, [add(4, "x", "1024-1087", "held")], Conflict, "never used again")


@pytest.mark.parametrize(
    "change",
    [
        add(2, "y", "1087-1150"),
        add(2, "y", "1024-1024", "held"),
        add(2, "y", "1024-65535", "draining"),
        add(2, "y", "5056-5119"),  # reserved ports
        add(2, "x", "1080-1100", "draining", address=B),  # the VM's own numbers
    ],
)
def test_overloading_is_refused(ledger: SqliteLedger, change: Change) -> None:
    ledger.commit([add(1, "x", "1024-1087")], now=1.0)
    refused(ledger, [change], Overloading)


def test_growing_into_a_neighbour_is_refused(ledger: SqliteLedger) -> None:
    ledger.commit([add(1, "x", "1024-1087"), add(2, "y", "1088-1151")], now=1.0)
    refused(ledger, [move(1, expected("1024-1087", "reserved"), "1024-1151", "reserved")], Overloading, "another range")
    refused(ledger, [move(2, expected("1088-1151", "reserved"), "1087-1151", "reserved")], Overloading, "another range")


def test_reserving_ports_that_are_held_is_refused(ledger: SqliteLedger) -> None:
    ledger.commit([add(1, "x", "1024-1087")], now=1.0)
    refused(ledger, [PutAddress(external(A, "1080"))], Overloading, "to be reserved")
    ledger.commit([PutAddress(external(A, "1088", "1088-1090"))], now=2.0)
    assert ledger.load().addresses[0].reserved == (PortRange(1088, 1090),)


def test_own_ports_of_a_node_are_replaced_and_go_with_it(path: Path) -> None:
    edge = NodeName("edge1")
    kept = (
        KeptPorts(edge, A, PortRange(8080, 8080), OwnUse.LISTENER, 12.5),
        KeptPorts(edge, A, PortRange(32768, 60999), OwnUse.EPHEMERAL),
    )
    with SqliteLedger(path) as ledger:
        ledger.commit([PutNode(node("edge1")), PutOwnPorts(edge, kept)], now=1.0)
    with SqliteLedger(path) as ledger:
        assert ledger.load().own_ports == kept, "no VM and no address of the pool has to be there"
        ledger.commit([PutOwnPorts(edge, kept[1:])], now=2.0)
        assert ledger.load().own_ports == kept[1:]
        ledger.commit([DropNode(edge)], now=3.0)
        assert ledger.load().own_ports == ()


def test_a_new_range_on_own_ports_is_refused_and_one_that_was_there_before_stays(ledger: SqliteLedger) -> None:
    own = PutOwnPorts(NodeName("host1"), (KeptPorts(NodeName("host1"), A, PortRange(1087, 1087), OwnUse.LISTENER),))
    ledger.commit([add(1, "x", "1024-1087"), own], now=1.0)
    refused(ledger, [add(2, "y", "1087-1150")], Overloading, "own|another range")
    ledger.commit([move(1, expected("1024-1087", "reserved"), "1024-1087", "active")], now=2.0)
    ledger.commit([move(1, expected("1024-1087", "active"), "1024-1055", "active")], now=3.0)
    ledger.commit([add(2, "x", "1056-1087", "draining")], now=4.0)
    ledger.commit([free(2, "1056-1087", "draining")], now=5.0)
    refused(ledger, [add(3, "y", "1087-1150")], Overloading, "a machine's own")


def test_ports_freed_earlier_in_a_batch_can_be_taken(ledger: SqliteLedger) -> None:
    ledger.commit([add(1, "x", "1024-1151", "active")], now=1.0)
    # Split: trim the head, insert the tail.
    ledger.commit(
        [move(1, expected("1024-1151", "active"), "1024-1087", "active"), add(2, "x", "1088-1151", "draining")], now=2.0
    )
    # Merge: free the tail, extend the head.
    ledger.commit(
        [free(2, "1088-1151", "draining"), move(1, expected("1024-1087", "active"), "1024-1151", "active")], now=3.0
    )
    # Supersede: one steps down before the other steps up.
    ledger.commit(
        [
            add(3, "x", "2048-2303"),
            move(1, expected("1024-1151", "active"), "1024-1151", "draining"),
            move(3, expected("2048-2303", "reserved"), "2048-2303", "active"),
        ],
        now=4.0,
    )
    assert {(each.id, each.state.value) for each in ledger.load().allocations} == {(1, "draining"), (3, "active")}


def test_one_active_and_one_reserved_range_at_most(ledger: SqliteLedger) -> None:
    ledger.commit([add(1, "x", "1024-1087", "active"), add(2, "x", "1088-1151", "reserved")], now=1.0)
    refused(ledger, [add(3, "x", "2048-2111", "active")], Conflict)
    refused(ledger, [add(3, "x", "2048-2111", "reserved")], Conflict)
    ledger.commit([add(3, "x", "2048-2111", "held"), add(4, "x", "3072-3135", "held")], now=1.0)


@pytest.mark.parametrize(
    "change",
    [
        move(1, expected("1024-1087", "active"), "1024-1087", "draining"),
        move(1, expected("1024-1150", "reserved"), "1024-1087", "active"),
        move(9, expected("1024-1087", "reserved"), "1024-1087", "active"),
        free(1, "1024-1087", "held"),
        free(9, "1024-1087", "held"),
    ],
)
def test_unexpected_state_is_a_conflict(ledger: SqliteLedger, change: Change) -> None:
    ledger.commit([add(1, "x", "1024-1087")], now=1.0)
    refused(ledger, [change], Conflict, "was expected")


def test_nodes_vms_and_addresses_in_use_are_not_dropped(ledger: SqliteLedger) -> None:
    ledger.commit([add(1, "x", "1024-1087", "held")], now=1.0)
    refused(ledger, [DropVM(DomainUUID("x"))], Conflict, "still holds 1 ranges")
    refused(ledger, [DropAddress(A)], AddressInUse)
    refused(ledger, [DropNode(NodeName("host1"))], Conflict, "still belong")
    ledger.commit([free(1, "1024-1087", "held"), DropVM(DomainUUID("x")), DropAddress(A)], now=2.0)
    ledger.commit([DropVM(DomainUUID("y")), DropNode(NodeName("host1"))], now=3.0)
    state = ledger.load()
    assert (state.vms, [each.name for each in state.nodes]) == ((), ["host2"])
    assert [each.address for each in state.addresses] == [B]


@pytest.mark.parametrize(
    "change", [DropVM(DomainUUID("no")), DropAddress(IPv4Address("192.0.2.9")), DropNode(NodeName("no"))]
)
def test_dropping_something_unknown_is_a_conflict(ledger: SqliteLedger, change: Change) -> None:
    refused(ledger, [change], Conflict, "there is no")


def test_unknown_references_are_conflicts(ledger: SqliteLedger) -> None:
    refused(ledger, [add(1, "nobody", "1024-1087")], Conflict)
    refused(ledger, [add(1, "x", "1024-1087", address=IPv4Address("192.0.2.9"))], Conflict)
    refused(ledger, [PutVM(vm("z", host="nowhere"))], Conflict)


def test_internal_address_has_one_vm(ledger: SqliteLedger) -> None:
    refused(ledger, [PutVM(vm("z", internal=sum(b"x")))], Conflict, "internal")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ("(9, 'y', 'host1', '203.0.113.1', 1087, 1090, 'held', 0, NULL)", "overloading"),
        ("(NULL, 'y', 'host1', '203.0.113.1', 1000, 1090, 'held', 0, NULL)", "overloading"),
        ("(9, 'y', 'host1', '203.0.113.1', 5061, 5062, 'held', 0, NULL)", "overloading"),
        ("(9, 'x', 'host1', '203.0.113.2', 1024, 1024, 'held', 0, NULL)", "overloading"),
        ("(1, 'y', 'host1', '203.0.113.1', 1024, 1087, 'held', 0, NULL)", "overloading"),
        ("(9, 'y', 'host1', '203.0.113.01', 1024, 1087, 'held', 0, NULL)", "CHECK"),
        ("(9, 'y', 'host1', ' 203.0.113.1', 1024, 1087, 'held', 0, NULL)", "CHECK"),
        ("(9, 'y', 'host1', '203.0.113.1', 1000, 1023, 'held', 0, NULL)", "CHECK"),
        ("(9, 'y', 'host1', '203.0.113.1', 3000, 2000, 'held', 0, NULL)", "CHECK"),
        ("(9, 'y', 'host1', '203.0.113.1', 65000, 65536, 'held', 0, NULL)", "CHECK"),
        ("(9, 'y', 'host1', '203.0.113.1', 3000, 3001, 'free', 0, NULL)", "CHECK"),
        ("(9, 'y', 'host1', '203.0.113.1', 'abc', 3001, 'held', 0, NULL)", "cannot store TEXT"),
    ],
)
@pytest.mark.parametrize("verb", ["INSERT", "INSERT OR REPLACE"])
def test_statements_typed_by_hand_cannot_overload(
    ledger: SqliteLedger, path: Path, verb: str, values: str, words: str
) -> None:
    ledger.commit([add(1, "x", "1024-1087")], now=1.0)
    by_hand = sqlite3.connect(path, isolation_level=None)  # without foreign_keys, as the sqlite3 shell does it
    try:
        with pytest.raises(sqlite3.IntegrityError, match=words):
            by_hand.execute(f"{verb} INTO allocations VALUES {values}")
    finally:
        by_hand.close()
    assert ledger.load().allocations == (allocation(1, "x", "1024-1087"),)


@pytest.mark.parametrize(
    "assignment",
    [
        "last = 1088",
        "first = 1025, external = '203.0.113.2'",
        "domain = 'x', first = 1030",
        "first = 5060, last = 5063",
    ],
)
def test_updates_typed_by_hand_cannot_overload(ledger: SqliteLedger, path: Path, assignment: str) -> None:
    ledger.commit([add(1, "x", "1088-1151"), add(2, "y", "1024-1087"), add(3, "x", "1024-1030", "held", B)], now=1.0)
    by_hand = sqlite3.connect(path, isolation_level=None)
    try:
        with pytest.raises(sqlite3.IntegrityError, match="overloading"):
            by_hand.execute(f"UPDATE OR REPLACE allocations SET {assignment} WHERE id = 2")
        with pytest.raises(sqlite3.IntegrityError, match="overloading"):
            by_hand.execute("UPDATE reserved_ports SET first = 1100, last = 1100")
    finally:
        by_hand.close()


def test_second_writer_is_refused(ledger: SqliteLedger, path: Path) -> None:
    with pytest.raises(LedgerError, match="only one cpmd may"):
        SqliteLedger(path)
    ledger.commit([add(1, "x", "1024-1087")], now=1.0)


def test_a_closed_ledger_can_be_opened_again(path: Path) -> None:
    first = SqliteLedger(path)
    first.reader()
    first.close()
    first.close()
    SqliteLedger(path).close()


def test_memory_needs_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with SqliteLedger(":memory:") as ledger:
        ledger.commit([PutNode(node("host1")), PutAddress(external(A)), PutVM(vm("x")), add(1, "x", "1024-1087")], 1.0)
        holding = ledger.reader().whois(A, 1030)
    assert holding is not None
    assert holding.domain == "x"
    assert list(tmp_path.iterdir()) == []


def test_commits_are_synchronous(ledger: SqliteLedger) -> None:
    pragma = ledger._connection.execute
    values = [pragma(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous", "foreign_keys")]
    assert values == ["wal", 2, 1]


def test_of_the_record_of_nodes_the_newest_entries_are_kept(
    ledger: SqliteLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(applying, "NODE_EVENTS_KEPT", 3)
    edge = NodeName("edge1")
    for number in range(5):
        ledger.commit([NoteNode(edge, NodeEvent.OUT_OF_SERVICE, f"why {number}")], now=float(number))
    entries = ledger.reader().node_events()
    assert entries == [
        NodeEntry(number + 1, WallTime.of(float(number)), edge, NodeEvent.OUT_OF_SERVICE, f"why {number}")
        for number in (2, 3, 4)
    ]
    assert ledger.reader().node_events(limit=1) == entries[-1:]
