"""Migrations, one by one, and files of other programs or newer versions."""

import dataclasses
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from ipaddress import IPv4Address
from pathlib import Path

import pytest
from sqlite_utils import Database

from cpm.core.changes import PutNode, PutVM
from cpm.ledger import SqliteLedger
from cpm.ledger.connection import APPLICATION_ID, connect_writer
from cpm.ledger.schema import MIGRATIONS, migrate, version_of
from cpm.protocol.ledger_errors import LedgerError, SchemaTooNew
from cpm.protocol.model import Approval, Node, NodeName, Role, Wishes
from cpm.protocol.walltime import WallTime
from tests.unit.cpm.ledger.words import A, at, node, vm


@pytest.fixture
def connection(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(connect_writer(str(path))) as connection:
        yield connection


def _shape(connection: sqlite3.Connection) -> set[tuple[str, str]]:
    return set(connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL"))


def test_each_version_is_reached_and_is_the_start_of_the_next(connection: sqlite3.Connection) -> None:
    for version in range(1, len(MIGRATIONS) + 1):
        migrate(connection, MIGRATIONS[:version])
        assert version_of(connection) == version
        assert connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as at_once:
        migrate(at_once)
        assert _shape(at_once) == _shape(connection)


def test_migrating_again_changes_nothing(connection: sqlite3.Connection) -> None:
    migrate(connection)
    before = _shape(connection)
    migrate(connection)
    assert _shape(connection) == before


def test_version_2_writes_the_present_allocations_to_the_journal(connection: sqlite3.Connection, path: Path) -> None:
    migrate(connection, MIGRATIONS[:1])
    connection.execute("INSERT INTO nodes VALUES ('host1', 'edge,host', '172.30.0.1', 1, 0)")
    connection.execute("INSERT INTO addresses VALUES ('203.0.113.1')")
    connection.execute("INSERT INTO vms VALUES ('u', 'web', 'host1', '100.64.0.1', NULL, NULL, NULL)")
    connection.execute("INSERT INTO allocations VALUES (3, 'u', 'host1', '203.0.113.1', 1024, 1087, 'active', 50.0)")
    connection.close()
    with SqliteLedger(path) as ledger:
        holding = ledger.reader().whois(A, 1030, at(60.0))
        assert holding is not None
        assert (holding.domain, holding.name, holding.since) == ("u", "web", WallTime.of(50.0))
        assert ledger.reader().whois(A, 1030, at(49.0)) is None
        assert [entry.allocation for entry in ledger.reader().history("web")] == [3]


def test_version_3_keeps_floors_and_caps_as_wishes_of_the_operator(connection: sqlite3.Connection, path: Path) -> None:
    migrate(connection, MIGRATIONS[:2])
    connection.execute("INSERT INTO nodes VALUES ('host1', 'edge,host', '172.30.0.1', 1, 0)")
    connection.execute("INSERT INTO addresses VALUES ('203.0.113.1')")
    for number, (floor, cap) in enumerate([(128, 4096), (None, 512), (None, None)], 1):
        vm = (f"u{number}", "web", "host1", f"100.64.0.{number}", "host2", floor, cap)
        connection.execute("INSERT INTO vms VALUES (?, ?, ?, ?, ?, ?, ?)", vm)
    connection.execute("INSERT INTO allocations VALUES (3, 'u1', 'host1', '203.0.113.1', 1024, 1087, 'active', 50.0)")
    connection.close()
    with SqliteLedger(path) as ledger:
        state = ledger.load()
        assert [vm.operator_wishes for vm in state.vms] == [Wishes(floor=128, cap=4096), Wishes(cap=512), Wishes()]
        assert {vm.xml_wishes for vm in state.vms} == {Wishes()}
        assert {vm.destination for vm in state.vms} == {"host2"}
        assert [allocation.domain for allocation in state.allocations] == ["u1"]


def test_version_5_begins_ledger_time_after_all_that_was_written(connection: sqlite3.Connection, path: Path) -> None:
    migrate(connection, MIGRATIONS[:4])
    connection.execute("INSERT INTO nodes VALUES ('host1', 'edge,host', '172.30.0.1', 1, 0)")
    connection.execute("INSERT INTO addresses VALUES ('203.0.113.1')")
    connection.execute("INSERT INTO vms VALUES ('u', 'web', 'host1', '100.64.0.1', NULL, '{}', '{}')")
    connection.execute("INSERT INTO allocations VALUES (3, 'u', 'host1', '203.0.113.1', 1024, 1087, 'held', 1e9)")
    connection.close()
    with SqliteLedger(path) as ledger:
        resumed = ledger.resume_time("a boot", 7.0)
        assert (resumed.ahead_s + 7.0, resumed.is_measured) == (1e9, False)


@pytest.mark.parametrize(
    ("boot", "since_boot_s", "now", "is_measured"),
    [("first", 150.0, 180.0, True), ("second", 3.0, 150.0, False), ("first", 60.0, 150.0, False)],
)
def test_ledger_time_goes_on_as_far_as_is_known(
    path: Path, boot: str, since_boot_s: float, now: float, is_measured: bool
) -> None:
    with SqliteLedger(path) as ledger:
        assert ledger.resume_time("first", 20.0).ahead_s == -20.0
        ledger._connection.execute("UPDATE ledger_time SET passed = 50.0, ahead = 30.0")
        ledger.commit([], 150.0)
    with SqliteLedger(path) as ledger:
        resumed = ledger.resume_time(boot, since_boot_s)
        assert (resumed.ahead_s + since_boot_s, resumed.is_measured) == (now, is_measured)


def test_version_6_packs_the_journal_of_an_older_version(connection: sqlite3.Connection, path: Path) -> None:
    migrate(connection, MIGRATIONS[:5])
    connection.execute("INSERT INTO nodes VALUES ('host1', 'edge,host', '172.30.0.1', 1, 0)")
    connection.execute("INSERT INTO addresses VALUES ('203.0.113.1')")
    connection.execute("INSERT INTO vms VALUES ('u', 'web', 'host1', '100.64.0.1', NULL, '{}', '{}')")
    connection.execute("INSERT INTO names VALUES ('web', 'u')")
    rows = [(seq, seq * 10.0, event) for seq, event in enumerate(("reserved", "active", "draining", "held"), 1)]
    for seq, shown, event in rows:
        row = (seq, shown, event, 3, "u", "web", "host1", "203.0.113.1", "100.64.0.1", 1024, 1087, event)
        connection.execute(f"INSERT INTO journal VALUES ({', '.join('?' * 12)})", row)
    connection.close()
    with SqliteLedger(path) as ledger:
        reader = ledger.reader()

        def ask() -> list[object]:
            return [
                reader.events(),
                reader.history("web"),
                *(reader.whois(A, 1030, at(each)) for each in (5.0, 10.0, 35.0)),
            ]

        before = ask()
        while (packing := reader.next_packing(0.0, entries=2)) is not None:
            ledger.pack(packing)
        assert ledger._connection.execute("SELECT count(*) FROM journal").fetchone() == (2,)
        assert ask() == before


def test_version_7_approves_the_nodes_that_are_there_as_they_are(connection: sqlite3.Connection, path: Path) -> None:
    migrate(connection, MIGRATIONS[:6])
    connection.execute("INSERT INTO nodes VALUES ('host1', 'edge,host', '172.30.0.1', 1, 0)")
    connection.execute("INSERT INTO nodes VALUES ('edge1', 'edge', '172.30.0.2', 0, 1)")
    connection.close()
    with SqliteLedger(path) as ledger:
        nodes: dict[str, Node] = {node.name: node for node in ledger.load().nodes}
        assert nodes == {
            "host1": Node(
                NodeName("host1"), frozenset(Role), IPv4Address("172.30.0.1"),
                approval=Approval(frozenset(Role), IPv4Address("172.30.0.1")),
            ),
            "edge1": Node(
                NodeName("edge1"), frozenset({Role.EDGE}), IPv4Address("172.30.0.2"), in_service=False, fenced=True,
                approval=Approval(frozenset({Role.EDGE}), IPv4Address("172.30.0.2")),
            ),
        }  # fmt: skip
        revoked = dataclasses.replace(nodes["edge1"], approval=None)
        limited = Approval(frozenset({Role.HOST}), IPv4Address("172.30.0.9"), 7, 4096)
        both = (revoked, dataclasses.replace(nodes["host1"], approval=limited, machine="aaaa"))
        ledger.commit([PutNode(node) for node in both], 1.0)
        assert ledger.load().nodes == both


def test_invalid_json_in_wishes_is_refused_and_invalid_wishes_are_a_ledger_error(path: Path) -> None:
    with SqliteLedger(path) as ledger:
        ledger.commit([PutNode(node("host1")), PutVM(vm("x"))], 1.0)
        with pytest.raises(sqlite3.IntegrityError):
            ledger._connection.execute("UPDATE vms SET wishes = 'floor'")
        ledger._connection.execute("""UPDATE vms SET wishes = '{"floor": "many"}'""")
        with pytest.raises(LedgerError, match="a row is invalid"):
            ledger.load()


def test_failed_migration_leaves_the_version_before(connection: sqlite3.Connection) -> None:
    def broken(database: Database) -> None:
        database.execute("CREATE TABLE halfway (x)")
        database.execute("SELECT * FROM nowhere")

    migrate(connection, MIGRATIONS)
    before = _shape(connection)
    with pytest.raises(sqlite3.OperationalError):
        migrate(connection, [*MIGRATIONS, broken])
    assert not connection.in_transaction
    assert (_shape(connection), version_of(connection)) == (before, len(MIGRATIONS))


def test_newer_schema_is_refused_and_left_alone(path: Path) -> None:
    SqliteLedger(path).close()
    with closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 99")
    with pytest.raises(SchemaTooNew) as caught:
        SqliteLedger(path)
    assert (caught.value.found, caught.value.known) == (99, len(MIGRATIONS))
    with closing(sqlite3.connect(path)) as after:
        assert version_of(after) == 99


def test_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as other:
        other.execute("CREATE TABLE contacts (name TEXT)")
    with pytest.raises(LedgerError, match="another program"):
        SqliteLedger(path)
    with closing(sqlite3.connect(path)) as after:
        assert [name for (name,) in after.execute("SELECT name FROM sqlite_master")] == ["contacts"]


def test_a_file_that_is_no_database_is_refused(path: Path) -> None:
    path.write_bytes(b"this is a letter, not a ledger" * 100)
    with pytest.raises(LedgerError, match="not an SQLite database") as caught:
        SqliteLedger(path)
    assert str(path) in str(caught.value)


def test_the_error_for_a_missing_directory_names_it(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="make sure that the directory of"):
        SqliteLedger(tmp_path / "nowhere" / "ledger.db")


def test_invalid_rows_are_a_ledger_error(path: Path) -> None:
    with SqliteLedger(path) as ledger:
        ledger._connection.execute(
            "INSERT INTO nodes (name, roles, underlay, in_service, fenced) "
            "VALUES ('host1', 'gateway', '172.30.0.1', 1, 0)"
        )
        with pytest.raises(LedgerError, match="a row is invalid"):
            ledger.load()
        ledger._connection.execute("DELETE FROM nodes")
        assert ledger.load().nodes == ()


def test_damaged_file_is_a_ledger_error(path: Path) -> None:
    SqliteLedger(path).close()
    with path.open("r+b") as file:
        size = path.stat().st_size
        file.seek(4096)
        file.write(b"\xff" * (size - 4096))
    with pytest.raises(LedgerError, match=r"is damaged|restore"):
        SqliteLedger(path).load()
