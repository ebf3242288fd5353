"""
Chunks of the journal: older entries of one external address, packed into a tenth of the space of rows.

A chunk begins with its *base*, the entries that were in force before its first one. So it answers who owned a port
without any other chunk, and the chunks before it can go. Pure.

Tested in ``tests/unit/cpm/ledger/test_chunks.py``.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address
from typing import Final, Generic, TypeVar

import msgspec
from msgspec import Struct

from cpm.core.journal import NOTICES, JournalEntry, JournalEvent
from cpm.protocol.bounds import LAST_PORT
from cpm.protocol.model import AllocationId, AllocationState, DomainUUID, NodeName, PortRange
from cpm.protocol.walltime import WallTime

ENTRIES: Final = 1024
"""Entries of an address that are packed together."""

_TICKS: Final = 2**22
"""Units of time in a second: a time of these decades as a double is a whole number of them."""
_LEVEL: Final = 9


class Chunk(Struct, frozen=True):
    """A chunk as a row of the ledger."""

    external: IPv4Address
    first_seq: int
    last_seq: int
    """With ``first_seq``: of its own entries, or where they would be if it has none."""
    from_at: float
    """UTC seconds: no entry before it is later."""
    first_at: float
    """UTC seconds of the earliest of its entries; without entries, ``from_at``. Clocks are set: it may be earlier."""
    last_at: float
    """UTC seconds of the latest of its entries; without entries, ``from_at``."""
    count: int
    """Entries, without those of the base."""
    data: bytes
    id: int = 0
    """0: not in the ledger yet."""


class _Columns(Struct, array_like=True):
    """The packed content. Numbers that grow are stored as differences to the one before, which are small."""

    base: int
    """How many entries, the first ones, are the base."""
    events: list[str]
    nodes: list[str]
    vms: list[tuple[str, str, int]]
    """UUID, name and internal address."""
    seq: list[int]
    at: list[int]
    event: list[int]
    """Index of the event in ``events``; also for ``state``, ``node`` and ``vm``."""
    state: list[int]
    """0: free."""
    allocation: list[int]
    vm: list[int]
    node: list[int]
    first: list[int]
    size: list[int]


_STATES: Final[tuple[AllocationState | None, ...]] = (None, *AllocationState)


def pack(base: Sequence[JournalEntry], entries: Sequence[JournalEntry], from_at: float, last_seq: int) -> Chunk:
    """
    Return a chunk.

    :param base: What was in force before the first entry, see :func:`in_force`.
    :param entries: Entries of one address, oldest first; may be empty if there is a base.
    :param from_at: UTC seconds: the time of the latest entry of the address before these.
    :param last_seq: Position up to which the chunk has all entries of the address.
    """
    every = (*base, *entries)
    events, nodes = _Numbers[str](), _Numbers[str]()
    vms = _Numbers[tuple[str, str, int]]()
    columns = _Columns(
        len(base),
        events.known,
        nodes.known,
        vms.known,
        seq=_differences(entry.seq for entry in every),
        at=_differences(int(entry.at.seconds * _TICKS) for entry in every),
        event=[events.of(entry.event.value) for entry in every],
        state=[_STATES.index(entry.state) for entry in every],
        allocation=_differences(entry.allocation for entry in every),
        vm=[vms.of((entry.domain, entry.name, int(entry.internal))) for entry in every],
        node=[nodes.of(entry.node) for entry in every],
        first=[entry.ports.first for entry in every],
        size=[entry.ports.size for entry in every],
    )
    return Chunk(
        every[0].external,
        entries[0].seq if entries else last_seq,
        last_seq,
        from_at,
        min((entry.at.seconds for entry in entries), default=from_at),
        max((entry.at.seconds for entry in entries), default=from_at),
        len(entries),
        zlib.compress(msgspec.msgpack.encode(columns), _LEVEL),
    )


def unpack(chunk: Chunk) -> tuple[list[JournalEntry], list[JournalEntry]]:
    """
    Return base and entries of a chunk, each oldest first.

    :raise ValueError: When it is damaged.
    """
    try:
        columns = msgspec.msgpack.decode(zlib.decompress(chunk.data), type=_Columns)
        _check(columns)
        every = _entries(chunk.external, columns)
    except (zlib.error, msgspec.MsgspecError, IndexError, ValueError) as error:
        raise ValueError(f"chunk {chunk.id} of the journal: {error}") from error
    return every[: columns.base], every[columns.base :]


def _check(columns: _Columns) -> None:
    """:raise ValueError: When a number is none that was packed; a wrong owner of a port is worse than none."""
    indices = (columns.event, columns.state, columns.vm, columns.node)
    lasts = (first + size - 1 for first, size in zip(columns.first, columns.size, strict=True))
    if not (
        0 <= columns.base <= len(columns.seq)
        and all(index >= 0 for index in map(min, filter(None, indices)))
        and min(columns.first, default=1) > 0
        and min(columns.size, default=1) > 0
        and max(lasts, default=1) <= LAST_PORT
    ):
        raise ValueError("numbers are out of range")


def _entries(external: IPv4Address, columns: _Columns) -> list[JournalEntry]:
    vms = [(DomainUUID(uuid), name, IPv4Address(internal)) for uuid, name, internal in columns.vms]
    events, nodes = [JournalEvent(event) for event in columns.events], [NodeName(node) for node in columns.nodes]
    rows = zip(
        _sums(columns.seq), _sums(columns.at), columns.event, columns.state, _sums(columns.allocation), columns.vm,
        columns.node, columns.first, columns.size, strict=True,
    )  # fmt: skip
    return [
        JournalEntry(
            seq=seq,
            at=WallTime.of(at / _TICKS),
            event=events[event],
            allocation=AllocationId(allocation),
            domain=vms[vm][0],
            name=vms[vm][1],
            node=nodes[node],
            external=external,
            internal=vms[vm][2],
            ports=PortRange(first, first + size - 1),
            state=_STATES[state],
        )
        for seq, at, event, state, allocation, vm, node, first, size in rows
    ]


def in_force(entries: Iterable[JournalEntry]) -> list[JournalEntry]:
    """
    Return those entries of an address that still say who owns a port, oldest first.

    For every port the newest of them is the newest of all; a port on which there is none is free.
    """
    taken = bytearray(65536)
    newest: list[JournalEntry] = []
    for entry in reversed(list(entries)):
        first, end = entry.ports.first, entry.ports.last + 1
        if entry.event not in NOTICES and taken.count(0, first, end):
            newest.append(entry)
            taken[first:end] = b"\1" * (end - first)
    kept: list[JournalEntry] = []
    for entry in reversed(newest):
        # Free ports need an entry only where an older one says otherwise.
        if entry.state is not None or any(entry.ports.overlaps(older.ports) for older in kept):
            kept.append(entry)
    return kept


_Value = TypeVar("_Value")


class _Numbers(Generic[_Value]):
    """Numbers values in the order in which they come."""

    def __init__(self) -> None:
        self.known: list[_Value] = []
        self._numbers: dict[_Value, int] = {}

    def of(self, value: _Value) -> int:
        """Return the number of a value."""
        number = self._numbers.setdefault(value, len(self.known))
        if number == len(self.known):
            self.known.append(value)
        return number


def _differences(values: Iterable[int]) -> list[int]:
    """Return what each value adds to the one before, the first to 0."""
    last, result = 0, []
    for value in values:
        result.append(value - last)
        last = value
    return result


def _sums(differences: Iterable[int]) -> Iterable[int]:
    return itertools.accumulate(differences)
