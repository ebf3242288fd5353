"""
Files that were written by us and read again later: by another version, after a power failure, or edited meanwhile.

None of them may keep a daemon from starting: what cannot be read was never noted, or is refused with a typed error.
"""

from __future__ import annotations

import functools
import tempfile
import zlib
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

import msgspec

from cpm.core.journal import JournalEntry, JournalEvent
from cpm.ledger import chunks
from cpm.protocol import codec
from cpm.protocol.model import AllocationId, AllocationState, DomainUUID, NodeName, PortRange
from cpm.protocol.walltime import WallTime
from cpm.serving.event_export import Position
from natctl.kernel.settings_before import SettingsBefore
from natctl.model.remembered import Remembered
from natctl.remembering import RememberedFiles
from tests.fuzz.mutation import Material

_JSON: Final = (
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b":",
    b",",
    b"null",
    b"Infinity",
    b"NaN",
    b"-1",
    b"[" * 5000,
    b'{"a":' * 5000,
)


@functools.cache
def _folder() -> Path:
    made = tempfile.TemporaryDirectory(prefix="virt-ports-fuzz-")
    _kept.append(made)
    return Path(made.name)


_kept: Final[list[tempfile.TemporaryDirectory[str]]] = []
"""Each is removed when the process ends."""

# natd

FOLLOWS: Final = Material(
    [
        b'{"epoch":7,"ledger":"7b1c","run":"9d","edges":[],"charge":null}',
        (
            b'{"epoch":7,"ledger":"7b1c","run":"9d","edges":["edge1","edge2"],"charge":{"path":{"internal_pool":'
            b'"100.64.0.0/10","edges":["172.30.0.21"],"externals":[],"timeouts":null,"edge_names":["edge1"]},'
            b'"older":["11111111-1111-4111-8111-111111111111"]}}'
        ),
        b'{"epoch":7}',
    ],
    (*_JSON, b'"epoch"', b'"charge"', b'"\\ud800"', b'"path"', b'"internal_pool"', b'"100.64.0.1/10"'),
)


def understands_follows(data: bytes) -> bool:
    """Read whom natd follows, and the number beside it from the same bytes."""
    folder = _folder()
    (folder / "follows.json").write_bytes(data)
    (folder / "grants").write_bytes(data[:40])
    found = RememberedFiles(folder).read()
    # It is told to the manager, and kept again.
    codec.encode(found.follows)
    assert found.follows.grants >= 0
    assert found.charge is None or found.charge.path.internal_pool.prefixlen <= 32
    return found != Remembered()


SETTINGS: Final = Material(
    [b'{"ip_forward":["0","1"],"conf/br0/rp_filter":["1","2"]}', b"{}", b'{"ip_forward":["0"]}'], _JSON
)


def understands_settings(data: bytes) -> bool:
    """Read what kernel settings were before."""
    file = _folder() / "settings-before.json"
    file.write_bytes(data)
    found = SettingsBefore(file).read()
    assert all(isinstance(each, str) for path, setting in found.items() for each in (path, *setting))
    return bool(found)


# cpmd

POSITIONS: Final = Material([b"0\n", b"123456\n", b"", b"x"], (b"9" * 30, b"-1"))


def understands_position(data: bytes) -> bool:
    """Read how far a place has been told."""
    file = _folder() / "sink.position"
    file.write_bytes(data)
    try:
        known = Position(file).read()
    except OSError:
        return False
    assert known is not None
    assert known >= 0
    return True


def _entry(seq: int) -> JournalEntry:
    return JournalEntry(
        seq=seq,
        at=WallTime.of(1_790_000_000.0 + seq),
        event=JournalEvent.ACTIVE,
        allocation=AllocationId(seq),
        domain=DomainUUID("11111111-1111-4111-8111-111111111111"),
        name="web",
        node=NodeName("host1"),
        external=IPv4Address("203.0.113.1"),
        internal=IPv4Address("100.64.0.1"),
        ports=PortRange(20000, 20063),
        state=AllocationState.ACTIVE,
    )


_CHUNK: Final = chunks.pack([_entry(1)], [_entry(2), _entry(3)], 1_790_000_000.0, 3)
CHUNKS: Final = Material([_CHUNK.data, b"U" + zlib.decompress(_CHUNK.data)])
"""As it is on disk, and after a ``U`` what is packed in it: damaged bytes hardly ever unpack."""


def understands_chunk(data: bytes) -> bool:
    """Unpack a part of the journal."""
    packed = zlib.compress(data[1:], 1) if data[:1] == b"U" else data
    try:
        base, entries = chunks.unpack(msgspec.structs.replace(_CHUNK, data=packed))
    except ValueError:
        return False
    assert all(1 <= entry.ports.first <= entry.ports.last <= 65535 for entry in (*base, *entries))
    return True
