"""
The tables of the edge's fast path: whose each external port is, and where each internal address has ports.

As ``natctl/bpf/edge.bpf.c`` reads them. ``owners`` has a word for each port of each external address, the internal
address as it stands in a header, or 0. ``homes`` has 8 bytes for each internal address: the numbers (*slots*) of one or
two external addresses, and the number of the host. ``hosts`` has two hardware addresses for each host.

Pure: what is to be written where. A VM of this machine itself is in no table, because its packets must be tracked, nor
is a range on a third external address of a VM: what the tables do not have is done by nftables.

Tested in ``tests/unit/natctl/ruleset/test_owner_tables.py``.
"""

from __future__ import annotations

import dataclasses
import struct
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Final, NamedTuple

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import PortRange

PORTS_OF_ADDRESS: Final = 65536
WORD_BYTES: Final = 4
HOME_BYTES: Final = 8
HOST_BYTES: Final = 16
LINE_BYTES: Final = 64
HOMES_IN_LINE: Final = LINE_BYTES // HOME_BYTES
LINES_OF_ADDRESS: Final = PORTS_OF_ADDRESS * WORD_BYTES // LINE_BYTES
MOST_INTERFACES: Final = 8
"""Uplinks, and interfaces to hosts, that the program compares with."""
MOST_HOSTS: Final = 4096
_LEAST_ADDRESSES: Final = 8
_LEAST_HOMES: Final = 4096
_HOME: Final = struct.Struct("=HHHxx")
_SETTINGS: Final = struct.Struct("=4s4sIIII")


class Store(NamedTuple):
    """Bytes to be written into a table."""

    table: str
    offset: int
    """In bytes."""
    data: bytes


@dataclasses.dataclass(frozen=True, slots=True)
class Tables:
    """
    What the tables have room for. VMs that do not fit need new ones.

    Addresses are numbers here: what is done for each of 10,000 VMs takes half the time.
    """

    pool: IPv4Network
    slots: Mapping[int, int]
    """Numbers of external addresses, 1 and up."""
    homes: int
    """Internal addresses, from the first of the pool."""
    first: int = dataclasses.field(init=False)
    """The first address of the pool."""
    size: int = dataclasses.field(init=False)
    """Addresses in the pool."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "first", int(self.pool.network_address))
        object.__setattr__(self, "size", self.pool.num_addresses)

    @classmethod
    def of(cls, pool: IPv4Network, entries: Collection[EdgeIntent]) -> Tables:
        """Return tables for these VMs, with room for as many again."""
        externals = sorted({int(each.external) for entry in entries for each in entry.ranges})
        first, size = int(pool.network_address), pool.num_addresses
        highest = max((n for entry in entries if 0 <= (n := int(entry.internal) - first) < size), default=0)
        homes = min(max(_LEAST_HOMES, 1 << (2 * highest + 1).bit_length()), max(size, HOMES_IN_LINE))
        return cls(pool, {address: slot for slot, address in enumerate(externals, 1)}, homes)

    def suit(self, entries: Iterable[EdgeIntent]) -> bool:
        """Say whether the tables have room for these VMs."""
        slots = self.slots
        return all(
            self._number(entry.internal) < self.homes and all(int(each.external) in slots for each in entry.ranges)
            for entry in entries
            if self._is_concerned(entry)
        )

    @property
    def entries(self) -> Mapping[str, int]:
        """Elements of the maps."""
        addresses = max(_LEAST_ADDRESSES, len(self.slots))
        return {
            "owners": addresses * LINES_OF_ADDRESS,
            "homes": -(-self.homes // HOMES_IN_LINE),
            "hosts": MOST_HOSTS,
            "slots": addresses,
            "addresses": addresses + 1,
        }

    @property
    def addresses(self) -> Iterable[tuple[bytes, bytes]]:
        """Numbers and external addresses, as the maps have them."""
        return [(slot.to_bytes(4, sys.byteorder), address.to_bytes(4, "big")) for address, slot in self.slots.items()]

    def images(self, entries: Iterable[EdgeIntent], hosts: Mapping[int, int]) -> dict[str, bytearray]:
        """
        Return what the tables hold with these VMs, by name.

        :param hosts: Numbers of hosts by underlay address, 1 and up.
        """
        sizes, first, size = self.entries, self.first, self.size
        owners, homes = bytearray(sizes["owners"] * LINE_BYTES), bytearray(sizes["homes"] * LINE_BYTES)
        slots, pack = self.slots, _HOME.pack_into
        for entry in entries:
            internal, via = int(entry.internal), entry.via
            if via is None or not 0 <= internal - first < size:
                continue
            word, at, other = internal.to_bytes(WORD_BYTES, "big"), 0, 0
            for each in entry.ranges:
                slot, ports = slots[int(each.external)], each.ports
                begin = ((slot - 1) * PORTS_OF_ADDRESS + ports.first) * WORD_BYTES
                count = ports.last - ports.first + 1
                owners[begin : begin + count * WORD_BYTES] = word * count
                if not at:
                    at = slot
                elif not other and slot != at:
                    other = slot
            pack(homes, (internal - first) * HOME_BYTES, at, other, hosts.get(int(via), 0))
        return {"owners": owners, "homes": homes, "hosts": bytearray(sizes["hosts"] * HOST_BYTES)}

    def settings(
        self, uplinks: Sequence[int], underlay: Sequence[int], *, checks_senders: bool, lookup_flags: int
    ) -> bytes:
        """
        Return ``struct settings`` of the program.

        :param uplinks: Indexes of interfaces, :data:`MOST_INTERFACES` at most; likewise for ``underlay``.
        :param checks_senders: Whether a VM's packets are taken from its host only.
        :param lookup_flags: Of ``bpf_fib_lookup``.
        """
        numbers = sorted(self.slots) or [0]
        begin = _SETTINGS.pack(self.pool.network_address.packed, self.pool.netmask.packed, numbers[0],
                               numbers[-1] - numbers[0], checks_senders, lookup_flags)  # fmt: skip
        return begin + b"".join(
            struct.pack(f"={MOST_INTERFACES}I", *each, *[0] * (MOST_INTERFACES - len(each)))
            for each in (uplinks, underlay)
        )

    def change(
        self,
        before: Iterable[EdgeIntent],
        after: Iterable[EdgeIntent],
        hosts: Mapping[int, int],
    ) -> Iterator[Store]:
        """
        Yield what turns some VMs' part of the tables into another, in the order in which it is to be written.

        Ports that a VM keeps are not touched. It finds a port that it gets at once: its home has both external
        addresses before, while it moves.

        :param hosts: Numbers of hosts by underlay address, 1 and up.
        """
        held = {int(entry.internal): entry for entry in before if self._is_concerned(entry)}
        wanted = {int(entry.internal): entry for entry in after if self._is_concerned(entry)}
        stays: set[int] = set()
        for internal, entry in wanted.items():
            if internal in held and held[internal].via == entry.via:
                new, old = _externals(entry), _externals(held[internal])
                if new == old:
                    stays.add(internal)
                else:
                    # Both addresses while it moves; those that it keeps come first.
                    yield self._home(entry, (*new[:1], *old), hosts)
        for internal, entry in held.items():
            yield from self._words(entry, wanted.get(internal), bytes(WORD_BYTES))
        for internal, entry in wanted.items():
            yield from self._words(entry, held.get(internal), internal.to_bytes(WORD_BYTES, "big"))
            if internal not in stays:
                yield self._home(entry, _externals(entry), hosts)
        for internal in held.keys() - wanted.keys():
            yield Store("homes", (internal - self.first) * HOME_BYTES, bytes(HOME_BYTES))

    def _words(self, entry: EdgeIntent, other: EdgeIntent | None, word: bytes) -> Iterator[Store]:
        """Yield stores of a word for the ports that one has and the other has not."""
        kept: dict[int, list[PortRange]] = {}
        for each in other.ranges if other is not None else ():
            kept.setdefault(int(each.external), []).append(each.ports)
        for each in entry.ranges:
            external = int(each.external)
            for part in each.ports.without(kept.get(external, ())):
                first = (self.slots[external] - 1) * PORTS_OF_ADDRESS + part.first
                yield Store("owners", first * WORD_BYTES, word * part.size)

    def _home(self, entry: EdgeIntent, externals: Iterable[int], hosts: Mapping[int, int]) -> Store:
        slots = [self.slots[external] for external in dict.fromkeys(externals) if external in self.slots][:2]
        data = _HOME.pack(*slots, *[0] * (2 - len(slots)), _host(entry, hosts))
        return Store("homes", self._number(entry.internal) * HOME_BYTES, data)

    def _is_concerned(self, entry: EdgeIntent) -> bool:
        return entry.via is not None and 0 <= self._number(entry.internal) < self.size

    def _number(self, internal: IPv4Address) -> int:
        return int(internal) - self.first


def host_store(number: int, known: Iterable[bytes]) -> Store:
    """
    Return what tells the hardware addresses of a host, two of them at most.

    :param known: Of six bytes each; none: its packets are left to nftables.
    """
    data = b"".join(address + bytes(2) for address in sorted(known)[:2])
    return Store("hosts", number * HOST_BYTES, data.ljust(HOST_BYTES, b"\0"))


def _externals(entry: EdgeIntent) -> tuple[int, ...]:
    return tuple(dict.fromkeys(int(each.external) for each in entry.ranges))


def _host(entry: EdgeIntent, hosts: Mapping[int, int]) -> int:
    return hosts.get(int(entry.via), 0) if entry.via is not None else 0
