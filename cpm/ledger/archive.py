"""
The packed part of the journal: answers from chunks, and what is to be packed or given up next.

New entries are rows of the table ``journal``; when an address has enough of them, the older ones are packed into a
chunk (:mod:`cpm.ledger.chunks`). Reading and planning may take a while, and happen in the journal's thread; carrying a
plan out is one short transaction of the writer (:func:`pack` and :func:`give_up`).

Tested in ``tests/unit/cpm/ledger/test_archive.py``.
"""

from __future__ import annotations

import dataclasses
import math
import sqlite3
from collections.abc import Iterator
from ipaddress import IPv4Address
from typing import Final, TypeAlias

from cpm.core.journal import NOTICES, JournalEntry, Selection
from cpm.core.timeline import Position
from cpm.ledger import chunks, rows
from cpm.ledger.chunks import Chunk
from cpm.protocol.model import DomainUUID
from cpm.protocol.walltime import WallTime

_CHUNK: Final = "id, external, first_seq, last_seq, from_at, first_at, last_at, count, data"
_SINCE: Final = "journal_since"
_PUT_SINCE: Final = (
    "INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = max(value, excluded.value)"
)
_Found: TypeAlias = list[tuple[int, float, int]]
"""Chunks of an address in order: number, time of the latest entry in UTC seconds, entries."""
_MAY_BE_PACKED: Final = "FROM journal WHERE external = ? AND seq < (SELECT max(seq) FROM journal)"
"""The newest row stays, because the next one gets the position after it."""
_GIVEN_UP_AT_ONCE: Final = 16
"""Chunks that one transaction deletes."""


@dataclasses.dataclass(frozen=True, slots=True)
class Packing:
    """Rows of the journal, packed."""

    chunk: Chunk
    vms: tuple[DomainUUID, ...]
    """The VMs that its entries are about."""


@dataclasses.dataclass(frozen=True, slots=True)
class GivingUp:
    """The oldest chunks of one address, which are exported and may go."""

    external: IPv4Address
    numbers: tuple[int, ...]
    vms: tuple[DomainUUID, ...]
    """All VMs that they are about."""
    rest: Packing | None
    """What has to take their place: a chunk without entries, whose base says what is in force; None: another chunk."""
    heir: tuple[int, tuple[DomainUUID, ...]] | None
    """The chunk that becomes the oldest, and the VMs in its base; None: there is ``rest``, or nothing in force."""
    last_at: float
    """UTC seconds of the latest entry that goes."""


def owner_entry(
    connection: sqlite3.Connection, external: IPv4Address, port: int, at: Position | None
) -> JournalEntry | None:
    """Return the newest packed entry with a port at a given time, None: now; None: there is none."""
    found = f"SELECT {_CHUNK} FROM journal_chunks WHERE external = ? {{}} ORDER BY last_seq"  # noqa: S608 - constants
    wall, first_seq = (math.inf, 0) if at is None else (at.wall.seconds, at.first_seq)
    candidates = connection.execute(
        f"{found.format('AND (first_at <= ? OR first_seq < ?)')} DESC", (str(external), wall, first_seq)
    )
    for row in candidates:
        chunk = _chunk(row)
        base, entries = chunks.unpack(chunk)
        if (entry := _newest(entries, port, at)) is not None:
            return entry
        if _is_decisive(chunk, at):
            return _newest(base, port, at)
    # What is in force since before the oldest chunk is in its base only.
    oldest = connection.execute(found.format(""), (str(external),)).fetchone()
    return _newest(_content(_chunk(oldest)), port, at) if oldest is not None else None


def _newest(entries: list[JournalEntry], port: int, at: Position | None) -> JournalEntry | None:
    fitting = (entry for entry in reversed(entries) if port in entry.ports and _is_until(entry, at))
    return next((entry for entry in fitting if entry.event not in NOTICES), None)


def _is_until(entry: JournalEntry, at: Position | None) -> bool:
    """Return whether an entry is not later than a time."""
    if at is None:
        return True
    is_before_next = at.next_seq is None or entry.seq < at.next_seq
    return is_before_next and (entry.at <= at.wall or entry.seq < at.first_seq)


def _is_decisive(chunk: Chunk, at: Position | None) -> bool:
    """Return whether everything before a chunk is not later than a time, so that its base has all that counts."""
    if at is None:
        return True
    is_before_next = at.next_seq is None or chunk.first_seq <= at.next_seq
    return is_before_next and (chunk.from_at <= at.wall.seconds or chunk.first_seq <= at.first_seq)


def kept_since(connection: sqlite3.Connection) -> WallTime | None:
    """Return since when the journal is complete; None: since its beginning."""
    found = connection.execute("SELECT value FROM meta WHERE key = ?", (_SINCE,)).fetchone()
    return WallTime.of(found[0]) if found else None


def newest(
    connection: sqlite3.Connection, vm: str | None, limit: int, selection: Selection, found: list[JournalEntry]
) -> list[JournalEntry]:
    """
    Return what was found and the packed entries that may be newer; of those given up, the ones still in force.

    :param vm: Its UUID or a name; None: those of all VMs.
    :param limit: The newest that many are asked for.
    :param found: Entries that are not packed.
    """
    before, begin, end = selection.bounds
    query = (
        f"SELECT {_CHUNK} FROM journal_chunks WHERE (?1 IS NULL OR id IN (SELECT chunk FROM chunk_vms WHERE vm IN "  # noqa: S608
        "(SELECT id FROM journal_vms WHERE uuid = ?1 OR uuid IN (SELECT uuid FROM names WHERE name = ?1)))) "
        "AND (first_seq < ?2 AND first_at <= ?4 AND last_at >= ?3 OR NOT EXISTS "  # the oldest have older ones in force
        "(SELECT 1 FROM journal_chunks AS other WHERE other.external = journal_chunks.external "
        "AND other.last_seq < journal_chunks.last_seq)) ORDER BY last_seq DESC"
    )
    uuids = {vm, *(uuid for (uuid,) in connection.execute("SELECT uuid FROM names WHERE name = ?", (vm,)))}
    found = list(found)
    for row in connection.execute(query, (vm, before, begin, end)):
        chunk = _chunk(row)
        # Chunks of several addresses overlap; what is older than all of this one's cannot be among the newest.
        if len(found) >= limit:
            found = sorted(found, key=_seq)[-limit:]
            if found[0].seq > chunk.last_seq:
                break
        base, entries = chunks.unpack(chunk)
        every = (*base, *entries) if _is_oldest(connection, chunk) else entries
        found += [entry for entry in every if (vm is None or entry.domain in uuids) and selection.has(entry)]
    return found


def events(connection: sqlite3.Connection, after_seq: int, limit: int) -> list[JournalEntry]:
    """Return the packed entries after a position, oldest first; of those given up, the ones still in force."""
    query = f"SELECT {_CHUNK} FROM journal_chunks WHERE last_seq > ? ORDER BY first_seq"  # noqa: S608
    found: list[JournalEntry] = []
    for row in connection.execute(query, (after_seq,)):
        chunk = _chunk(row)
        base, entries = chunks.unpack(chunk)
        base = base if _is_oldest(connection, chunk) else []
        if len(found) >= limit and not base and sorted(found, key=_seq)[limit - 1].seq < chunk.first_seq:
            break
        found += [entry for entry in (*base, *entries) if entry.seq > after_seq]
    return sorted(found, key=_seq)[:limit]


def next_packing(
    connection: sqlite3.Connection, older_than: float, entries: int, begin: IPv4Address | None = None
) -> Packing | None:
    """
    Return rows of an address that are to be packed; None: there are none.

    :param older_than: UTC seconds; rows from before are packed even if they are few.
    :param entries: Rows that are packed together.
    :param begin: The address to begin with, in the order of their texts; None: the first.
    """
    query = f"SELECT {rows.ENTRY} {_MAY_BE_PACKED} ORDER BY seq LIMIT ?"
    for external in _addresses(connection, "journal", begin):
        if not _has_to_pack(connection, external, older_than, entries):
            continue
        found = [rows.entry(row) for row in connection.execute(query, (external, entries))]
        return _packing(connection, external, found if len(found) == entries else _leading(found, older_than))
    return None


def _has_to_pack(connection: sqlite3.Connection, external: str, older_than: float, entries: int) -> bool:
    """Return whether rows of an address are to be packed; an index says it. Most addresses have some, and too few."""
    oldest = connection.execute(f"SELECT at {_MAY_BE_PACKED} ORDER BY seq LIMIT 1", (external,)).fetchone()
    if oldest is None or oldest[0] < older_than:
        return oldest is not None
    query = f"SELECT 1 {_MAY_BE_PACKED} ORDER BY seq LIMIT 1 OFFSET ?"
    return connection.execute(query, (external, entries - 1)).fetchone() is not None


def _leading(entries: list[JournalEntry], older_than: float) -> list[JournalEntry]:
    end = next((index for index, entry in enumerate(entries) if entry.at.seconds >= older_than), len(entries))
    return entries[:end]


def _packing(connection: sqlite3.Connection, external: str, entries: list[JournalEntry]) -> Packing:
    query = f"SELECT {_CHUNK} FROM journal_chunks WHERE external = ? ORDER BY last_seq DESC LIMIT 1"  # noqa: S608
    before = connection.execute(query, (external,)).fetchone()
    base: list[JournalEntry] = []
    from_at = 0.0
    if before is not None:
        chunk = _chunk(before)
        from_at = max(chunk.from_at, chunk.last_at)
        base = chunks.in_force(_content(chunk))
    return Packing(chunks.pack(base, entries, from_at, entries[-1].seq), _vms(entries))


def pack(connection: sqlite3.Connection, packing: Packing) -> None:
    """Put a chunk in the place of the rows that it has, inside a transaction."""
    number = _insert(connection, packing)
    chunk = packing.chunk
    deleted = connection.execute(
        "DELETE FROM journal WHERE external = ? AND seq <= ?", (str(chunk.external), chunk.last_seq)
    )
    if deleted.rowcount != chunk.count:
        raise ValueError(f"chunk {number} has {chunk.count} entries, the journal had {deleted.rowcount}")


def next_to_give_up(connection: sqlite3.Connection, older_than: float) -> Iterator[GivingUp]:
    """
    Yield what may go once it is exported: chunks of which every entry is older than a time.

    :param older_than: UTC seconds.
    """
    query = "SELECT id, last_at, count FROM journal_chunks WHERE external = ? ORDER BY last_seq"
    for external in _addresses(connection, "journal_chunks"):
        found = connection.execute(query, (external,)).fetchall()
        old = next((index for index, (_, at, _) in enumerate(found) if at >= older_than), len(found))
        if sum(count for _, _, count in found[:old]) == 0:
            continue
        for begin in range(0, old, _GIVEN_UP_AT_ONCE):
            yield _giving_up(connection, external, found[begin : min(begin + _GIVEN_UP_AT_ONCE, old)], found)


def _giving_up(connection: sqlite3.Connection, external: str, gone: _Found, every: _Found) -> GivingUp:
    numbers, last_at = tuple(number for number, _, _ in gone), max(at for _, at, _ in gone)
    after = every[every.index(gone[-1]) + 1 :]
    rest, heir = None, None
    vms: dict[DomainUUID, None] = {}
    for number in numbers:
        last = read(connection, number)
        content = _content(last)
        vms |= dict.fromkeys(_vms(content))
    if after:
        heir = (after[0][0], _vms(chunks.unpack(read(connection, after[0][0]))[0]))
    elif base := chunks.in_force(content):
        rest = Packing(chunks.pack(base, (), max(last.from_at, last.last_at), last.last_seq), _vms(base))
    return GivingUp(IPv4Address(external), numbers, tuple(vms), rest, heir, last_at)


def give_up(connection: sqlite3.Connection, plan: GivingUp) -> None:
    """Delete chunks that were exported, inside a transaction."""
    query = "SELECT id FROM journal_vms WHERE uuid = ?"
    vms = [row[0] for uuid in plan.vms if (row := connection.execute(query, (uuid,)).fetchone())]
    for number in plan.numbers:
        connection.execute("UPDATE journal_chunks SET is_exported = 1 WHERE id = ?", (number,))
        connection.execute("DELETE FROM journal_chunks WHERE id = ?", (number,))
        connection.executemany("DELETE FROM chunk_vms WHERE vm = ? AND chunk = ?", ((vm, number) for vm in vms))
    if plan.rest is not None:
        _insert(connection, plan.rest)
    if plan.heir is not None:
        _index(connection, *plan.heir)
    for vm in vms:
        _forget_vm(connection, vm)
    connection.execute(_PUT_SINCE, (_SINCE, math.ceil(plan.last_at)))


def read(connection: sqlite3.Connection, number: int) -> Chunk:
    """
    Return a chunk.

    :raise ValueError: When it is not there.
    """
    row = connection.execute(f"SELECT {_CHUNK} FROM journal_chunks WHERE id = ?", (number,)).fetchone()  # noqa: S608
    if row is None:
        raise ValueError(f"there is no chunk {number}")
    return _chunk(row)


def _insert(connection: sqlite3.Connection, packing: Packing) -> int:
    chunk = packing.chunk
    number = connection.execute(
        "INSERT INTO journal_chunks (external, first_seq, last_seq, from_at, first_at, last_at, count, data) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?) RETURNING id",
        (
            str(chunk.external),
            chunk.first_seq,
            chunk.last_seq,
            chunk.from_at,
            chunk.first_at,
            chunk.last_at,
            chunk.count,
            chunk.data,
        ),
    ).fetchone()[0]
    _index(connection, number, packing.vms)
    return int(number)


def _index(connection: sqlite3.Connection, number: int, vms: tuple[DomainUUID, ...]) -> None:
    connection.executemany("INSERT OR IGNORE INTO journal_vms (uuid) VALUES (?)", ((uuid,) for uuid in vms))
    connection.executemany(
        "INSERT OR IGNORE INTO chunk_vms (vm, chunk) SELECT id, ? FROM journal_vms WHERE uuid = ?",
        ((number, uuid) for uuid in vms),
    )


def _forget_vm(connection: sqlite3.Connection, vm: int) -> None:
    """Forget the names of a VM of which the journal has nothing any more."""
    if connection.execute("SELECT 1 FROM chunk_vms WHERE vm = ? LIMIT 1", (vm,)).fetchone():
        return
    (uuid,) = connection.execute("DELETE FROM journal_vms WHERE id = ? RETURNING uuid", (vm,)).fetchone()
    connection.execute(
        "DELETE FROM names WHERE uuid = ?1 AND NOT EXISTS (SELECT 1 FROM vms WHERE uuid = ?1) "
        "AND NOT EXISTS (SELECT 1 FROM journal WHERE domain = ?1)",
        (uuid,),
    )


def _addresses(connection: sqlite3.Connection, table: str, begin: IPv4Address | None = None) -> Iterator[str]:
    """Yield the external addresses in a table from one on, by one look into its index for each."""
    query = f"SELECT min(external) FROM {table} WHERE external {{}} ?"  # noqa: S608 - constants
    address = connection.execute(query.format(">="), (str(begin or ""),)).fetchone()[0]
    while address is not None:
        yield address
        address = connection.execute(query.format(">"), (address,)).fetchone()[0]


def _is_oldest(connection: sqlite3.Connection, chunk: Chunk) -> bool:
    query = "SELECT NOT EXISTS (SELECT 1 FROM journal_chunks WHERE external = ? AND last_seq < ?)"
    return bool(connection.execute(query, (str(chunk.external), chunk.last_seq)).fetchone()[0])


def _vms(entries: list[JournalEntry]) -> tuple[DomainUUID, ...]:
    return tuple(dict.fromkeys(entry.domain for entry in entries))


def _content(chunk: Chunk) -> list[JournalEntry]:
    base, entries = chunks.unpack(chunk)
    return [*base, *entries]


def _seq(entry: JournalEntry) -> int:
    return entry.seq


def _chunk(row: rows.Row) -> Chunk:
    number, external, first_seq, last_seq, from_at, first_at, last_at, count, data = row
    return Chunk(IPv4Address(external), first_seq, last_seq, from_at, first_at, last_at, count, data, number)
