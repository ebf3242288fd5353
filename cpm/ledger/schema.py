"""
The schema of the ledger, and the migrations from older versions.

Migrations are numbered from 1 without gaps. Each runs in one transaction together with the new version number, so a
crash leaves the file at one version or the next. Invariants are enforced by the schema itself (see the triggers), so
they also hold for SQL typed by hand.

Addresses are stored as text in canonical form, which a constraint checks: ``203.0.113.01`` beside ``203.0.113.1`` would
be a second owner.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from sqlite_utils import Database

from cpm.ledger.connection import APPLICATION_ID, roll_back
from cpm.protocol.ledger_errors import LedgerError, SchemaTooNew
from cpm.protocol.model import DEFAULT_POOL

Migration: TypeAlias = Callable[[Database], None]


def version_of(connection: sqlite3.Connection) -> int:
    """Return the schema version of a file; 0: it is empty."""
    return int(connection.execute("PRAGMA user_version").fetchone()[0])


def migrate(connection: sqlite3.Connection, migrations: Sequence[Migration] | None = None) -> None:
    """
    Migrate a file to the newest version.

    :param migrations: The migrations, version 1 first; None: :data:`MIGRATIONS`.
    :raise SchemaTooNew: When the file is newer than the last migration.
    :raise LedgerError: When the file belongs to another program.
    :raise sqlite3.Error: When SQLite cannot read or write; the file keeps the last version that was reached.
    """
    steps = MIGRATIONS if migrations is None else migrations
    found = version_of(connection)
    _refuse_foreign(connection, found)
    if found > len(steps):
        raise SchemaTooNew(found, len(steps))
    database = Database(connection, execute_plugins=False)
    for version, step in enumerate(steps[found:], found + 1):
        _apply(database, version, step)


def _refuse_foreign(connection: sqlite3.Connection, version: int) -> None:
    application = int(connection.execute("PRAGMA application_id").fetchone()[0])
    tables = int(connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0])
    if application != APPLICATION_ID and (application or version or tables):
        path = connection.execute("PRAGMA database_list").fetchone()[2]
        raise LedgerError(f"{path} belongs to another program; set ledger.path in cpmd.toml to another file")


def _apply(database: Database, version: int, step: Migration) -> None:
    database.execute("BEGIN IMMEDIATE")
    try:
        step(database)
        database.execute(f"PRAGMA user_version = {version}")
        database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        database.execute("COMMIT")
    except BaseException:
        roll_back(database.conn)
        raise


def _canonical(column: str) -> str:
    """Return an SQL condition: the column is an IPv4 address as Python writes it, without leading zeros."""
    return (
        f"{column} NOT GLOB '*[^0-9.]*' AND '.' || {column} NOT GLOB '*.0[0-9]*' "
        f"AND '.' || {column} || '.' NOT GLOB '*..*' AND length({column}) - length(replace({column}, '.', '')) = 3"
    )


_TABLES: Final = (
    "CREATE TABLE meta (key TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    """CREATE TABLE nodes (
        name TEXT PRIMARY KEY,
        roles TEXT NOT NULL,
        underlay TEXT NOT NULL,
        in_service INTEGER NOT NULL CHECK (in_service IN (0, 1)),
        fenced INTEGER NOT NULL CHECK (fenced IN (0, 1))
    ) STRICT, WITHOUT ROWID""",
    f"""CREATE TABLE addresses (
        address TEXT PRIMARY KEY CHECK ({_canonical("address")})
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE reserved_ports (
        external TEXT NOT NULL REFERENCES addresses (address) ON DELETE CASCADE,
        first INTEGER NOT NULL,
        last INTEGER NOT NULL,
        CHECK (0 <= first AND first <= last AND last <= 65535),
        PRIMARY KEY (external, first)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE vms (
        uuid TEXT PRIMARY KEY,
        name TEXT NOT NULL,
        node TEXT NOT NULL REFERENCES nodes (name),
        internal TEXT NOT NULL UNIQUE,
        destination TEXT,
        floor INTEGER,
        cap INTEGER
    ) STRICT, WITHOUT ROWID""",
    f"""CREATE TABLE allocations (
        id INTEGER PRIMARY KEY,
        domain TEXT NOT NULL REFERENCES vms (uuid),
        node TEXT NOT NULL REFERENCES nodes (name),
        external TEXT NOT NULL REFERENCES addresses (address) CHECK ({_canonical("external")}),
        first INTEGER NOT NULL,
        last INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('reserved', 'active', 'draining', 'held')),
        since REAL NOT NULL,
        CHECK (1024 <= first AND first <= last AND last <= 65535)
    ) STRICT""",
    "CREATE UNIQUE INDEX allocations_by_port ON allocations (external, first)",
    "CREATE UNIQUE INDEX allocations_of_vm ON allocations (domain, first)",
    "CREATE UNIQUE INDEX one_active_range ON allocations (domain) WHERE state = 'active'",
    "CREATE UNIQUE INDEX one_reserved_range ON allocations (domain) WHERE state = 'reserved'",
)

# Ranges on one address never overlap. So if any range overlaps the new one, then also the range with the greatest
# first port that is not above the new range's last port. That is one index lookup, however many ranges there are.
_OVERLAPS: Final = """
    SELECT RAISE(ABORT, 'overloading: another range on this address has some of these ports')
    WHERE NEW.first <= (SELECT last FROM allocations
                        WHERE external = NEW.external AND first <= NEW.last {besides} ORDER BY first DESC LIMIT 1);
    SELECT RAISE(ABORT, 'overloading: another range of this VM has some of these port numbers')
    WHERE NEW.first <= (SELECT last FROM allocations
                        WHERE domain = NEW.domain AND first <= NEW.last {besides} ORDER BY first DESC LIMIT 1);
    SELECT RAISE(ABORT, 'overloading: some of these ports are reserved on this address')
    WHERE EXISTS (SELECT 1 FROM reserved_ports
                  WHERE external = NEW.external AND first <= NEW.last AND last >= NEW.first);
"""

_RESERVED_OVERLAPS: Final = """
    SELECT RAISE(ABORT, 'overloading: a VM holds some of the ports to be reserved')
    WHERE NEW.first <= (SELECT last FROM allocations
                        WHERE external = NEW.external AND first <= NEW.last ORDER BY first DESC LIMIT 1);
"""

_TRIGGERS: Final = (
    f"CREATE TRIGGER no_overloading_by_insert BEFORE INSERT ON allocations BEGIN {_OVERLAPS.format(besides='')} END",
    """CREATE TRIGGER ids_ascend BEFORE INSERT ON allocations BEGIN
        SELECT RAISE(ABORT, 'allocation ids ascend and are never used again')
        WHERE NEW.id > 0 AND NEW.id <= (SELECT value FROM meta WHERE key = 'highest_freed');
    END""",
    f"""CREATE TRIGGER no_overloading_by_update BEFORE UPDATE OF id, domain, external, first, last ON allocations BEGIN
        {_OVERLAPS.format(besides="AND id <> OLD.id")}
    END""",
    """CREATE TRIGGER ids_are_used_once AFTER DELETE ON allocations BEGIN
        UPDATE meta SET value = OLD.id WHERE key = 'highest_freed' AND value < OLD.id;
    END""",
    f"CREATE TRIGGER no_overloading_by_reserving BEFORE INSERT ON reserved_ports BEGIN {_RESERVED_OVERLAPS} END",
    f"CREATE TRIGGER no_overloading_by_moving BEFORE UPDATE ON reserved_ports BEGIN {_RESERVED_OVERLAPS} END",
)


def _ownership(database: Database) -> None:
    """Version 1: nodes, addresses, VMs and their ranges."""
    for statement in (*_TABLES, *_TRIGGERS):
        database.execute(statement)
    database["meta"].insert_all([{"key": "epoch", "value": 0}, {"key": "highest_freed", "value": 0}])


_JOURNAL: Final = (
    """CREATE TABLE journal (
        seq INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        event TEXT NOT NULL,
        allocation INTEGER NOT NULL,
        domain TEXT NOT NULL,
        name TEXT NOT NULL,
        node TEXT NOT NULL,
        external TEXT NOT NULL,
        internal TEXT NOT NULL,
        first INTEGER NOT NULL,
        last INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('reserved', 'active', 'draining', 'held', 'free'))
    ) STRICT""",
    "CREATE INDEX journal_by_port ON journal (external, seq, first, last, at)",
    "CREATE INDEX journal_of_vm ON journal (domain, seq)",
    """CREATE TABLE names (
        name TEXT NOT NULL,
        uuid TEXT NOT NULL,
        PRIMARY KEY (name, uuid)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TRIGGER journal_is_kept BEFORE DELETE ON journal BEGIN
        SELECT RAISE(ABORT, 'the journal is append-only');
    END""",
    """CREATE TRIGGER journal_is_not_rewritten BEFORE UPDATE ON journal BEGIN
        SELECT RAISE(ABORT, 'the journal is append-only');
    END""",
    # INSERT OR REPLACE deletes a row without firing the first trigger. Rows may only be added at the end.
    """CREATE TRIGGER journal_is_not_replaced BEFORE INSERT ON journal BEGIN
        SELECT RAISE(ABORT, 'the journal is append-only')
        WHERE NEW.seq <> -1 AND NEW.seq <= (SELECT max(seq) FROM journal);
    END""",
    """INSERT INTO journal (at, event, allocation, domain, name, node, external, internal, first, last, state)
        SELECT since, state, id, domain, name, allocations.node, external, internal, first, last, state
        FROM allocations JOIN vms ON uuid = domain ORDER BY since, id""",
    "INSERT INTO names (name, uuid) SELECT name, uuid FROM vms",
)


def _journal(database: Database) -> None:
    """Version 2: the journal, and every name a VM ever had. The journal begins with the present allocations."""
    for statement in _JOURNAL:
        database.execute(statement)


_WISHES: Final = (
    "ALTER TABLE vms ADD COLUMN metadata TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(metadata))",
    "ALTER TABLE vms ADD COLUMN wishes TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(wishes))",
    # json_patch drops keys whose value is null.
    "UPDATE vms SET wishes = json_patch('{}', json_object('floor', floor, 'cap', cap))",
    "ALTER TABLE vms DROP COLUMN floor",
    "ALTER TABLE vms DROP COLUMN cap",
)


def _wishes(database: Database) -> None:
    """Version 3: wishes per VM, from its domain XML and from the operator (before: floor and cap only)."""
    for statement in _WISHES:
        database.execute(statement)


_OWN_PORTS: Final = (
    f"""CREATE TABLE own_ports (
        node TEXT NOT NULL REFERENCES nodes (name) ON DELETE CASCADE,
        address TEXT NOT NULL CHECK ({_canonical("address")}),
        first INTEGER NOT NULL,
        last INTEGER NOT NULL,
        use TEXT NOT NULL CHECK (use IN ('ephemeral', 'listener', 'connection')),
        gone REAL,
        CHECK (0 <= first AND first <= last AND last <= 65535),
        PRIMARY KEY (node, address, first)
    ) STRICT, WITHOUT ROWID""",
    "CREATE INDEX own_ports_by_port ON own_ports (address, first)",
    # A range in any other state was the VM's before an edge began to use some of its ports.
    """CREATE TRIGGER no_new_range_on_own_ports BEFORE INSERT ON allocations WHEN NEW.state = 'reserved' BEGIN
        SELECT RAISE(ABORT, 'overloading: some of these ports are a machine''s own')
        WHERE EXISTS (SELECT 1 FROM own_ports
                      WHERE address = NEW.external AND first <= NEW.last AND last >= NEW.first);
    END""",
)


def _own_ports(database: Database) -> None:
    """Version 4: the ports that edges use themselves on their own addresses."""
    for statement in _OWN_PORTS:
        database.execute(statement)


_CLOCK: Final = (
    # Until now all times were of the wall clock. Ledger time begins at the last one, so that none is in the future.
    """CREATE TABLE ledger_time (
        passed REAL NOT NULL,
        boot TEXT NOT NULL,
        ahead REAL NOT NULL
    ) STRICT""",
    """INSERT INTO ledger_time (passed, boot, ahead) SELECT max(
        (SELECT coalesce(max(at), 0.0) FROM journal),
        (SELECT coalesce(max(since), 0.0) FROM allocations),
        (SELECT coalesce(max(gone), 0.0) FROM own_ports)), '', 0.0""",
    """CREATE TABLE clock (
        number INTEGER PRIMARY KEY,
        start REAL NOT NULL,
        wall REAL NOT NULL,
        is_measured INTEGER NOT NULL CHECK (is_measured IN (0, 1)),
        first_seq INTEGER NOT NULL
    ) STRICT""",
    """CREATE TRIGGER clock_is_kept BEFORE DELETE ON clock BEGIN
        SELECT RAISE(ABORT, 'what the clock showed is append-only');
    END""",
    """CREATE TRIGGER clock_is_not_rewritten BEFORE UPDATE ON clock BEGIN
        SELECT RAISE(ABORT, 'what the clock showed is append-only');
    END""",
)


def _clock(database: Database) -> None:
    """Version 5: ledger time, and what the wall clock showed meanwhile (:mod:`cpm.core.timeline`)."""
    for statement in _CLOCK:
        database.execute(statement)


_CHUNKS: Final = (
    """CREATE TABLE journal_chunks (
        id INTEGER PRIMARY KEY,
        external TEXT NOT NULL,
        first_seq INTEGER NOT NULL,
        last_seq INTEGER NOT NULL,
        from_at REAL NOT NULL,
        first_at REAL NOT NULL,
        last_at REAL NOT NULL,
        count INTEGER NOT NULL,
        is_exported INTEGER NOT NULL DEFAULT 0 CHECK (is_exported IN (0, 1)),
        data BLOB NOT NULL
    ) STRICT""",
    "CREATE UNIQUE INDEX chunks_of_address ON journal_chunks (external, last_seq)",
    "CREATE INDEX chunks_in_order ON journal_chunks (last_seq)",
    "CREATE TABLE journal_vms (id INTEGER PRIMARY KEY, uuid TEXT NOT NULL UNIQUE) STRICT",
    """CREATE TABLE chunk_vms (
        vm INTEGER NOT NULL,
        chunk INTEGER NOT NULL,
        PRIMARY KEY (vm, chunk)
    ) STRICT, WITHOUT ROWID""",
    # A row may go only when a chunk has it, and a chunk only when it was exported.
    "DROP TRIGGER journal_is_kept",
    """CREATE TRIGGER journal_is_kept BEFORE DELETE ON journal BEGIN
        SELECT RAISE(ABORT, 'the journal is append-only')
        WHERE NOT EXISTS (SELECT 1 FROM journal_chunks
                          WHERE external = OLD.external AND first_seq <= OLD.seq AND OLD.seq <= last_seq);
    END""",
    """CREATE TRIGGER chunks_are_kept BEFORE DELETE ON journal_chunks WHEN NOT OLD.is_exported BEGIN
        SELECT RAISE(ABORT, 'the journal is append-only');
    END""",
    """CREATE TRIGGER chunks_are_not_rewritten BEFORE UPDATE OF id, external, first_seq, last_seq, from_at, first_at,
        last_at, count, data ON journal_chunks BEGIN
        SELECT RAISE(ABORT, 'the journal is append-only');
    END""",
    """CREATE TRIGGER chunks_are_not_replaced BEFORE INSERT ON journal_chunks BEGIN
        SELECT RAISE(ABORT, 'the journal is append-only')
        WHERE EXISTS (SELECT 1 FROM journal_chunks
                      WHERE id = NEW.id OR (external = NEW.external AND last_seq >= NEW.first_seq));
    END""",
)


def _chunks(database: Database) -> None:
    """Version 6: older entries of the journal are packed into chunks, which go when they are old and exported."""
    for statement in _CHUNKS:
        database.execute(statement)


_APPROVALS: Final = (
    "ALTER TABLE nodes ADD COLUMN approved_roles TEXT",
    """ALTER TABLE nodes ADD COLUMN approved_underlay TEXT
        CHECK ((approved_roles IS NULL) = (approved_underlay IS NULL))""",
    "ALTER TABLE nodes ADD COLUMN machine TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE nodes ADD COLUMN max_vms INTEGER CHECK (max_vms > 0)",
    "ALTER TABLE nodes ADD COLUMN max_ports INTEGER CHECK (max_ports > 0)",
    "UPDATE nodes SET approved_roles = roles, approved_underlay = underlay",
)


def _approvals(database: Database) -> None:
    """Version 7: what the operator approved; the nodes that are there are approved as they are."""
    for statement in _APPROVALS:
        database.execute(statement)


_NODE_EVENTS: Final = """CREATE TABLE node_events (
        seq INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        node TEXT NOT NULL,
        event TEXT NOT NULL,
        why TEXT NOT NULL
    ) STRICT"""


def _node_events(database: Database) -> None:
    """Version 8: what became of nodes, of which the newest entries are kept."""
    database.execute(_NODE_EVENTS)


_AUDIT: Final = """CREATE TABLE audit (
        seq INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        uid INTEGER NOT NULL,
        user TEXT NOT NULL,
        pid INTEGER NOT NULL,
        request TEXT NOT NULL,
        body TEXT NOT NULL
    ) STRICT"""


def _audit(database: Database) -> None:
    """Version 9: what operators changed, of which the newest entries are kept."""
    database.execute(_AUDIT)


def random_number() -> int:
    """Return a number that no other ledger and no other run has."""
    return secrets.randbits(60)


def _identity(database: Database) -> None:
    """Version 10: the identity of the ledger, and of the last run of a manager."""
    database["meta"].insert_all([{"key": "identity", "value": random_number()}, {"key": "run", "value": 0}])


def _copies(database: Database) -> None:
    """Version 11: marks of a backup, and of a ledger that was restored and has not taken in what kernels hold."""
    database["meta"].insert_all([{"key": "is_backup", "value": 0}, {"key": "is_restored", "value": 0}])


_GAPS: Final = """CREATE TABLE journal_gaps (
        number INTEGER PRIMARY KEY,
        from_at REAL NOT NULL,
        to_at REAL
    ) STRICT"""


def _gaps(database: Database) -> None:
    """Version 12: times of which the journal is lost, because an earlier ledger was restored; null: until now."""
    database.execute(_GAPS)
    database["meta"].insert({"key": "backup_at", "value": 0})


_RUNS: Final = """CREATE TABLE runs (
        epoch INTEGER PRIMARY KEY,
        run INTEGER NOT NULL,
        grants INTEGER NOT NULL
    ) STRICT"""


def _runs(database: Database) -> None:
    """Version 13: the latest starts of a manager, each with the highest number of a range that was given before it."""
    database.execute(_RUNS)


_FORWARDS: Final = (
    f"""CREATE TABLE allocations_2 (
        id INTEGER PRIMARY KEY,
        domain TEXT NOT NULL REFERENCES vms (uuid),
        node TEXT NOT NULL REFERENCES nodes (name),
        external TEXT NOT NULL REFERENCES addresses (address) CHECK ({_canonical("external")}),
        first INTEGER NOT NULL,
        last INTEGER NOT NULL,
        state TEXT NOT NULL CHECK (state IN ('reserved', 'active', 'draining', 'held')),
        since REAL NOT NULL,
        forward TEXT CHECK (forward IS NULL OR json_valid(forward)),
        CHECK (first <= last),
        CHECK (1024 <= first AND last <= 65535 OR forward IS NOT NULL AND 1 <= first AND last < 1024)
    ) STRICT""",
    """INSERT INTO allocations_2 (id, domain, node, external, first, last, state, since)
        SELECT id, domain, node, external, first, last, state, since FROM allocations ORDER BY id""",
    # Its triggers and indexes go with it; deleting no rows, no trigger of theirs notes an id as freed.
    "DROP TABLE allocations",
    "ALTER TABLE allocations_2 RENAME TO allocations",
    "CREATE UNIQUE INDEX allocations_by_port ON allocations (external, first)",
    "CREATE UNIQUE INDEX allocations_of_vm ON allocations (domain, first)",
    "CREATE UNIQUE INDEX one_active_range ON allocations (domain) WHERE state = 'active' AND forward IS NULL",
    "CREATE UNIQUE INDEX one_reserved_range ON allocations (domain) WHERE state = 'reserved' AND forward IS NULL",
    # What is a forward stays one, and a range a range.
    """CREATE TRIGGER forwards_stay_forwards BEFORE UPDATE OF forward ON allocations BEGIN
        SELECT RAISE(ABORT, 'a range becomes no forward, nor a forward a range')
        WHERE (OLD.forward IS NULL) <> (NEW.forward IS NULL);
    END""",
)


def _forwards(database: Database) -> None:
    """Version 14: forwards, which are allocations besides the ranges of their VMs, also of ports below 1024."""
    on_allocations = [sql for sql in (*_TRIGGERS, *_OWN_PORTS) if "CREATE TRIGGER" in sql and "ON allocations" in sql]
    on_others = ("no_overloading_by_reserving", "no_overloading_by_moving")
    # A table that triggers of others name cannot be renamed.
    for name in on_others:
        database.execute(f"DROP TRIGGER {name}")
    for statement in _FORWARDS:
        database.execute(statement)
    for statement in on_allocations:
        database.execute(statement)
    for statement in _TRIGGERS:
        if any(name in statement for name in on_others):
            database.execute(statement)


_POOLS: Final = (
    f"ALTER TABLE addresses ADD COLUMN pool TEXT NOT NULL DEFAULT '{DEFAULT_POOL}' CHECK (pool <> '')",
    """CREATE TABLE address_pools (
        number INTEGER PRIMARY KEY,
        external TEXT NOT NULL,
        after_seq INTEGER NOT NULL,
        pool TEXT NOT NULL
    ) STRICT""",
)


def _pools(database: Database) -> None:
    """
    Version 15: addresses belong to pools, which have names; those that are there to the default one.

    Which entries of the journal are of which pool is in ``address_pools``: of an address, those after ``after_seq``.
    """
    for statement in _POOLS:
        database.execute(statement)


MIGRATIONS: Final[tuple[Migration, ...]] = (
    _ownership,
    _journal,
    _wishes,
    _own_ports,
    _clock,
    _chunks,
    _approvals,
    _node_events,
    _audit,
    _identity,
    _copies,
    _gaps,
    _runs,
    _forwards,
    _pools,
)
"""All migrations, version 1 first. Append only: never edit a migration that was released."""
