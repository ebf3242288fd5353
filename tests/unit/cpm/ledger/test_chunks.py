"""Chunks of the journal: what is packed comes back as it was, and what is in force is found."""

import dataclasses
import zlib
from ipaddress import IPv4Address

import msgspec
import pytest

from cpm.core.journal import JournalEntry, JournalEvent
from cpm.ledger import chunks
from cpm.protocol.model import AllocationId, AllocationState, DomainUUID, NodeName, PortRange
from cpm.protocol.walltime import WallTime
from tests.unit.cpm.ledger.words import A


def _entry(seq: int, ports: str, state: str | None, event: str = "", at: float = 1790000000.123456) -> JournalEntry:
    return JournalEntry(
        seq,
        WallTime.of(at + seq * 0.37),
        JournalEvent(event or state or "freed"),
        AllocationId(1000 - seq),
        DomainUUID("u"),
        "web",
        NodeName("host1"),
        A,
        IPv4Address("100.64.0.1"),
        PortRange.parse(ports),
        AllocationState(state) if state else None,
    )


def test_entries_come_back_as_they_were_times_included() -> None:
    base = [_entry(3, "1024-1087", "active")]
    entries = [_entry(seq, f"{seq}-{seq * 2}", state) for seq in (7, 8, 1000) for state in (*AllocationState, None)]
    entries.append(dataclasses.replace(entries[0], name="renamed", event=JournalEvent.UPDATED, seq=1001))
    chunk = chunks.pack(base, entries, 5.0, 1001)
    assert chunks.unpack(chunk) == (base, entries)
    assert (chunk.external, chunk.first_seq, chunk.last_seq, chunk.count) == (A, 7, 1001, len(entries))
    assert (chunk.from_at, chunk.last_at) == (5.0, max(entry.at.seconds for entry in entries))


def test_a_chunk_may_have_nothing_but_its_base() -> None:
    chunk = chunks.pack([_entry(3, "1024-1087", "active")], [], 5.0, 9)
    assert (chunk.first_seq, chunk.last_seq, chunk.last_at, chunk.count) == (9, 9, 5.0, 0)


@pytest.mark.parametrize(
    ("story", "kept"),
    [
        ([("1-9", "active", "")], [1]),
        ([("1-9", "active", ""), ("1-9", None, "freed")], []),
        # The notice changes nothing.
        ([("1-9", "active", ""), ("1-9", "active", "exhausted")], [1]),
        # The upper half was given back: the older entry still counts for the lower one.
        ([("1-9", "active", ""), ("5-9", None, "trimmed")], [1, 2]),
        ([("1-9", "active", ""), ("5-9", None, "trimmed"), ("1-4", "active", "resized")], [3]),
        ([("1-4", "active", ""), ("5-9", "active", ""), ("1-9", "held", "")], [3]),
    ],
)
def test_in_force_are_the_newest_entries_of_ports_that_are_not_free(
    story: list[tuple[str, str | None, str]], kept: list[int]
) -> None:
    entries = [_entry(seq, ports, state, event) for seq, (ports, state, event) in enumerate(story, 1)]
    assert [entry.seq for entry in chunks.in_force(entries)] == kept


@pytest.mark.parametrize("damage", [b"", b"no chunk", chunks.pack([_entry(3, "1-2", "held")], [], 0.0, 3).data[:-1]])
def test_a_damaged_chunk_is_an_error(damage: bytes) -> None:
    chunk = chunks.pack([_entry(3, "1-2", "held")], [], 0.0, 3)
    broken = chunks.Chunk(A, 3, 3, 0.0, 0.0, 0.0, 0, damage, id=7)
    assert chunks.unpack(chunk)
    with pytest.raises(ValueError, match="chunk 7 of the journal"):
        chunks.unpack(broken)


@pytest.mark.parametrize(
    ("column", "value"),
    [(0, 9), (0, -1), (6, [-1]), (7, [-2]), (9, [-1]), (10, [-1]), (11, [0]), (11, [65535]), (12, [0])],
)
def test_a_chunk_with_numbers_that_were_never_packed_is_damaged(column: int, value: object) -> None:
    """A row of another VM, or of a port that is none, would be worse than an error."""
    chunk = chunks.pack([_entry(3, "1-2", "held")], [], 0.0, 3)
    columns = msgspec.msgpack.decode(zlib.decompress(chunk.data))
    columns[column] = value
    damaged = msgspec.structs.replace(chunk, data=zlib.compress(msgspec.msgpack.encode(columns)))
    with pytest.raises(ValueError, match="out of range"):
        chunks.unpack(damaged)
