"""
Applies one change to the tables and the journal, inside a transaction that the store has begun.

Tested with the store in ``tests/unit/cpm/ledger/test_store.py``.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, Final

from cpm.core.changes import (
    AddAllocation,
    Change,
    DropAddress,
    DropNode,
    DropVM,
    EndRestoring,
    FreeAllocation,
    MoveAllocation,
    NoteAct,
    NoteNode,
    NoteOutdated,
    NoteSeen,
    Notice,
    PutAddress,
    PutForward,
    PutNode,
    PutOwnPorts,
    PutStretch,
    PutVM,
)
from cpm.core.journal import JournalEvent
from cpm.ledger import rows
from cpm.protocol.errors import AddressInUse, Conflict, Overloading
from cpm.protocol.model import DEFAULT_POOL, Allocation, AllocationId, PortRange, coalesce

ACTS_KEPT: Final = 100_000
"""Entries of the record of operators' changes that are kept: about 30 MB with requests of the usual length."""
NODE_EVENTS_KEPT: Final = 10_000
"""Entries of the record of nodes that are kept: an edge that comes and goes every ten seconds fills them in a day."""

_INSERT_ALLOCATION: Final = f"INSERT INTO allocations ({rows.ALLOCATION}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"  # noqa: S608
_UPDATE_ALLOCATION: Final = "UPDATE allocations SET node = ?, first = ?, last = ?, state = ?, since = ? WHERE id = ?"
_JOURNAL: Final = (
    "INSERT INTO journal (at, event, allocation, domain, name, node, external, internal, first, last, state) "
    "SELECT ?, ?, ?, uuid, name, ?, ?, internal, ?, ?, ? FROM vms WHERE uuid = ?"
)
_PUT_VM: Final = (
    f"INSERT INTO vms ({rows.VM_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (uuid) DO UPDATE SET "  # noqa: S608
    "name = excluded.name, node = excluded.node, internal = excluded.internal, destination = excluded.destination, "
    "metadata = excluded.metadata, wishes = excluded.wishes"
)
_PUT_NODE: Final = (
    f"INSERT INTO nodes ({rows.NODE}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "  # noqa: S608
    "roles = excluded.roles, underlay = excluded.underlay, in_service = excluded.in_service, fenced = excluded.fenced, "
    "approved_roles = excluded.approved_roles, approved_underlay = excluded.approved_underlay, "
    "machine = excluded.machine, max_vms = excluded.max_vms, max_ports = excluded.max_ports"
)


def apply(connection: sqlite3.Connection, change: Change, now: float) -> None:
    """
    Apply one change and write it to the journal.

    :param now: UTC seconds of the commit, for the journal.
    :raise Conflict: When the present state is not the expected one; :class:`Overloading` when a port would get a
        second owner. The caller has to roll the transaction back.
    :raise sqlite3.Error: When SQLite cannot read or write.
    """
    try:
        _APPLY[type(change)](connection, change, now)
    except sqlite3.IntegrityError as error:
        raise _refusal(change, str(error)) from error


def _refusal(change: Change, words: str) -> Conflict:
    if words.startswith("overloading: "):
        return Overloading(f"{words.removeprefix('overloading: ')}: {change}")
    return Conflict(f"the ledger refused {change}: {words}; please report this as a bug")


def _put_vm(connection: sqlite3.Connection, change: PutVM, now: float) -> None:
    vm = change.vm
    before = connection.execute("SELECT name, internal FROM vms WHERE uuid = ?", (vm.uuid,)).fetchone()
    internal = str(vm.internal)
    wishes = rows.wishes_text(vm.xml_wishes), rows.wishes_text(vm.operator_wishes)
    connection.execute(_PUT_VM, (vm.uuid, vm.name, vm.node, internal, vm.destination, *wishes))
    if before == (vm.name, internal):
        return
    connection.execute("INSERT OR IGNORE INTO names (name, uuid) VALUES (?, ?)", (vm.name, vm.uuid))
    for allocation in _allocations_where(connection, "domain", vm.uuid) if before else ():
        _journal(connection, JournalEvent.UPDATED, allocation, now)


def _drop_vm(connection: sqlite3.Connection, change: DropVM, now: float) -> None:
    held = _allocations_where(connection, "domain", change.uuid)
    if held:
        raise Conflict(f"VM {change.uuid} still holds {len(held)} ranges; it is removed when they are free")
    _require_found(connection.execute("DELETE FROM vms WHERE uuid = ?", (change.uuid,)), "VM", change.uuid)


def _put_node(connection: sqlite3.Connection, change: PutNode, now: float) -> None:
    connection.execute(_PUT_NODE, rows.node_row(change.node))


def _drop_node(connection: sqlite3.Connection, change: DropNode, now: float) -> None:
    query = "SELECT (SELECT count(*) FROM vms WHERE node = ?1) + (SELECT count(*) FROM allocations WHERE node = ?1)"
    (used,) = connection.execute(query, (change.name,)).fetchone()
    if used:
        raise Conflict(f"VMs or ranges still belong to node {change.name}; stop or migrate them first")
    _require_found(connection.execute("DELETE FROM nodes WHERE name = ?", (change.name,)), "node", change.name)


def _put_address(connection: sqlite3.Connection, change: PutAddress, now: float) -> None:
    external = str(change.address.address)
    pool = change.address.pool
    (before,) = connection.execute("SELECT pool FROM addresses WHERE address = ?", (external,)).fetchone() or (None,)
    if before is None:
        connection.execute("INSERT INTO addresses (address, pool) VALUES (?, ?)", (external, pool))
    elif before != pool:
        connection.execute("UPDATE addresses SET pool = ? WHERE address = ?", (pool, external))
    _note_pool(connection, external, pool)
    connection.execute("DELETE FROM reserved_ports WHERE external = ?", (external,))
    connection.executemany(
        "INSERT INTO reserved_ports (external, first, last) VALUES (?, ?, ?)",
        [(external, ports.first, ports.last) for ports in coalesce(change.address.reserved)],
    )


def _note_pool(connection: sqlite3.Connection, external: str, pool: str) -> None:
    """Note that later entries of the journal about an address are of this pool."""
    query = "SELECT pool FROM address_pools WHERE external = ? ORDER BY number DESC LIMIT 1"
    (noted,) = connection.execute(query, (external,)).fetchone() or (DEFAULT_POOL,)
    if noted != pool:
        connection.execute(
            "INSERT INTO address_pools (external, after_seq, pool) SELECT ?, coalesce(max(seq), 0), ? FROM journal",
            (external, pool),
        )


def _drop_address(connection: sqlite3.Connection, change: DropAddress, now: float) -> None:
    held = _allocations_where(connection, "external", str(change.address))
    if held:
        raise AddressInUse(change.address, len(held))
    deleted = connection.execute("DELETE FROM addresses WHERE address = ?", (str(change.address),))
    _require_found(deleted, "address", str(change.address))


def _put_own_ports(connection: sqlite3.Connection, change: PutOwnPorts, now: float) -> None:
    connection.execute("DELETE FROM own_ports WHERE node = ?", (change.node,))
    connection.executemany(
        f"INSERT INTO own_ports ({rows.OWN_PORTS}) VALUES (?, ?, ?, ?, ?, ?)",  # noqa: S608 - constants
        [
            (kept.node, str(kept.address), kept.ports.first, kept.ports.last, kept.use.value, kept.gone)
            for kept in change.kept
        ],
    )


def _put_stretch(connection: sqlite3.Connection, change: PutStretch, now: float) -> None:
    stretch = change.stretch
    connection.execute(
        f"INSERT INTO clock ({rows.STRETCH}) SELECT ?, ?, ?, coalesce(max(seq), 0) + 1 FROM journal",  # noqa: S608
        (stretch.start, stretch.wall.seconds, stretch.is_measured),
    )


def _add(connection: sqlite3.Connection, change: AddAllocation, now: float) -> None:
    allocation = change.allocation
    try:
        connection.execute(
            _INSERT_ALLOCATION,
            (
                allocation.id,
                allocation.domain,
                allocation.node,
                str(allocation.external),
                allocation.ports.first,
                allocation.ports.last,
                allocation.state.value,
                allocation.since,
                rows.forward_text(allocation.forward),
            ),
        )
    except sqlite3.IntegrityError:
        if _allocation(connection, allocation.id) == allocation:
            return
        raise
    _journal(connection, JournalEvent(allocation.state.value), allocation, now)


def _move(connection: sqlite3.Connection, change: MoveAllocation, now: float) -> None:
    old = _expect(connection, change)
    new = Allocation(
        id=old.id,
        domain=old.domain,
        node=old.node if change.node is None else change.node,
        external=old.external,
        ports=change.ports,
        state=change.state,
        since=change.since,
        forward=old.forward,
    )
    values = (new.node, new.ports.first, new.ports.last, new.state.value, new.since, new.id)
    connection.execute(_UPDATE_ALLOCATION, values)
    for ports in old.ports.minus(new.ports):
        _journal(connection, JournalEvent.TRIMMED, old, now, ports)
    event = _event(old, new)
    if event:
        _journal(connection, event, new, now)


def _put_forward(connection: sqlite3.Connection, change: PutForward, now: float) -> None:
    query = "UPDATE allocations SET forward = ? WHERE id = ? AND forward IS NOT NULL"
    _require_found(connection.execute(query, (rows.forward_text(change.forward), change.id)), "forward", change.id)


def _notice(connection: sqlite3.Connection, change: Notice, now: float) -> None:
    if (found := _allocation(connection, change.id)) is not None:
        _journal(connection, change.event, found, now)


def _note_act(connection: sqlite3.Connection, change: NoteAct, now: float) -> None:
    act = change.act
    query = f"INSERT INTO audit ({rows.AUDIT}) VALUES (NULL, ?, ?, ?, ?, ?, ?)"  # noqa: S608 - constants
    newest = connection.execute(query, (now, act.uid, act.user, act.pid, act.request, act.body)).lastrowid
    connection.execute("DELETE FROM audit WHERE seq <= ?", ((newest or 0) - ACTS_KEPT,))


def _note_node(connection: sqlite3.Connection, change: NoteNode, now: float) -> None:
    query = f"INSERT INTO node_events ({rows.NODE_EVENT}) VALUES (NULL, ?, ?, ?, ?)"  # noqa: S608 - constants
    newest = connection.execute(query, (now, change.node, change.event, change.why)).lastrowid
    connection.execute("DELETE FROM node_events WHERE seq <= ?", ((newest or 0) - NODE_EVENTS_KEPT,))


def _note_seen(connection: sqlite3.Connection, change: NoteSeen, _: float) -> None:
    seen = [("seen_epoch", change.epoch), ("seen_highest", change.highest)]
    query = (
        "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = max(value, excluded.value)"
    )
    connection.executemany(query, seen)


def _note_outdated(connection: sqlite3.Connection, change: NoteOutdated, _: float) -> None:
    connection.execute("INSERT OR REPLACE INTO meta (key, value) VALUES ('is_outdated', 1)")


def _end_restoring(connection: sqlite3.Connection, change: EndRestoring, now: float) -> None:
    connection.execute("UPDATE meta SET value = 0 WHERE key = 'is_restored'")
    connection.execute("UPDATE journal_gaps SET to_at = ? WHERE to_at IS NULL", (now,))


def _event(old: Allocation, new: Allocation) -> JournalEvent | None:
    if new.node != old.node:
        return JournalEvent.MOVED
    if new.state is not old.state:
        return JournalEvent(new.state.value)
    return JournalEvent.RESIZED if new.ports != old.ports else None


def _free(connection: sqlite3.Connection, change: FreeAllocation, now: float) -> None:
    old = _expect(connection, change)
    connection.execute("DELETE FROM allocations WHERE id = ?", (change.id,))
    _journal(connection, JournalEvent.MERGED if change.taken_over else JournalEvent.FREED, old, now, old.ports)


def _journal(
    connection: sqlite3.Connection, event: JournalEvent, about: Allocation, now: float, freed: PortRange | None = None
) -> None:
    """Append an entry to the journal; ``freed``: the ports that no longer belong to the allocation, if any."""
    ports, state = (about.ports, about.state.value) if freed is None else (freed, rows.FREE)
    connection.execute(
        _JOURNAL,
        (now, event.value, about.id, about.node, str(about.external), ports.first, ports.last, state, about.domain),
    )


def _allocation(connection: sqlite3.Connection, number: AllocationId) -> Allocation | None:
    query = f"SELECT {rows.ALLOCATION} FROM allocations WHERE id = ?"  # noqa: S608 - constants
    row = connection.execute(query, (number,)).fetchone()
    return rows.allocation(row) if row else None


def _allocations_where(connection: sqlite3.Connection, column: str, value: str) -> list[Allocation]:
    query = f"SELECT {rows.ALLOCATION} FROM allocations WHERE {column} = ? ORDER BY id"  # noqa: S608 - constants
    return [rows.allocation(row) for row in connection.execute(query, (value,))]


def _expect(connection: sqlite3.Connection, change: MoveAllocation | FreeAllocation) -> Allocation:
    found = _allocation(connection, change.id)
    ports, state = change.expected
    if found is None:
        raise Conflict(f"allocation {change.id} was expected to be {state} with {ports}, but it is free")
    if (found.ports, found.state) != (ports, state):
        raise Conflict(
            f"allocation {change.id} was expected to be {state} with {ports}, but is {found.state} with {found.ports}"
        )
    return found


def _require_found(cursor: sqlite3.Cursor, kind: str, name: object) -> None:
    if not cursor.rowcount:
        raise Conflict(f"there is no {kind} {name} to change or drop")


_APPLY: Final[dict[type[Any], Callable[[sqlite3.Connection, Any, float], None]]] = {
    PutVM: _put_vm,
    DropVM: _drop_vm,
    PutNode: _put_node,
    DropNode: _drop_node,
    PutAddress: _put_address,
    DropAddress: _drop_address,
    PutOwnPorts: _put_own_ports,
    AddAllocation: _add,
    MoveAllocation: _move,
    PutForward: _put_forward,
    FreeAllocation: _free,
    Notice: _notice,
    NoteAct: _note_act,
    NoteNode: _note_node,
    NoteSeen: _note_seen,
    NoteOutdated: _note_outdated,
    EndRestoring: _end_restoring,
    PutStretch: _put_stretch,
}
