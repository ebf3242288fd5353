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


class Tables(NamedTuple):
    """What the tables have room for. VMs that do not fit need new ones."""

    pool: IPv4Network
    slots: Mapping[IPv4Address, int]
    """Numbers of external addresses, 1 and up."""
    homes: int
    """Internal addresses, from the first of the pool."""

    @classmethod
    def of(cls, pool: IPv4Network, entries: Collection[EdgeIntent]) -> Tables:
        """Return tables for these VMs, with room for as many again."""
        externals = sorted({each.external for entry in entries for each in entry.ranges})
        inside = (int(entry.internal) for entry in entries if entry.internal in pool)
        highest = max(inside, default=0) - int(pool.network_address)
        homes = min(max(_LEAST_HOMES, 1 << (2 * highest + 1).bit_length()), max(pool.num_addresses, HOMES_IN_LINE))
        return cls(pool, {address: slot for slot, address in enumerate(externals, 1)}, homes)

    def suit(self, entries: Iterable[EdgeIntent]) -> bool:
        """Say whether the tables have room for these VMs."""
        slots = self.slots
        return all(
            self._number(entry.internal) < self.homes and all(each.external in slots for each in entry.ranges)
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
        return [(slot.to_bytes(4, sys.byteorder), address.packed) for address, slot in self.slots.items()]

    def images(self, entries: Iterable[EdgeIntent], hosts: Mapping[IPv4Address, int]) -> dict[str, bytearray]:
        """
        Return what the tables hold with these VMs, by name.

        :param hosts: Numbers of hosts by underlay address, 1 and up.
        """
        sizes, first = self.entries, int(self.pool.network_address)
        owners, homes = bytearray(sizes["owners"] * LINE_BYTES), bytearray(sizes["homes"] * LINE_BYTES)
        slots, pack = self.slots, _HOME.pack_into
        for entry in entries:
            if not self._is_concerned(entry):
                continue
            internal = int(entry.internal)
            word, at, other = internal.to_bytes(WORD_BYTES, "big"), 0, 0
            for each in entry.ranges:
                slot, ports = slots[each.external], each.ports
                begin = ((slot - 1) * PORTS_OF_ADDRESS + ports.first) * WORD_BYTES
                count = ports.last - ports.first + 1
                owners[begin : begin + count * WORD_BYTES] = word * count
                if not at:
                    at = slot
                elif not other and slot != at:
                    other = slot
            pack(homes, (internal - first) * HOME_BYTES, at, other, _host(entry, hosts))
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
        numbers = sorted(int(address) for address in self.slots) or [0]
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
        hosts: Mapping[IPv4Address, int],
    ) -> Iterator[Store]:
        """
        Yield what turns some VMs' part of the tables into another, in the order in which it is to be written.

        Ports that a VM keeps are not touched. It finds a port that it gets at once: its home has both external
        addresses before, while it moves.

        :param hosts: Numbers of hosts by underlay address, 1 and up.
        """
        held = {entry.internal: entry for entry in before if self._is_concerned(entry)}
        wanted = {entry.internal: entry for entry in after if self._is_concerned(entry)}
        for internal, entry in wanted.items():
            if internal in held and held[internal].via == entry.via:
                # Both addresses while it moves; those that it keeps come first.
                yield self._home(entry, (*_externals(entry)[:1], *_externals(held[internal])), hosts)
        for internal, entry in held.items():
            yield from self._words(entry, wanted.get(internal), bytes(WORD_BYTES))
        for internal, entry in wanted.items():
            yield from self._words(entry, held.get(internal), internal.packed)
            yield self._home(entry, _externals(entry), hosts)
        for internal in held.keys() - wanted.keys():
            yield Store("homes", self._number(internal) * HOME_BYTES, bytes(HOME_BYTES))

    def _words(self, entry: EdgeIntent, other: EdgeIntent | None, word: bytes) -> Iterator[Store]:
        """Yield stores of a word for the ports that one has and the other has not."""
        kept: dict[IPv4Address, list[PortRange]] = {}
        for each in other.ranges if other is not None else ():
            kept.setdefault(each.external, []).append(each.ports)
        for each in entry.ranges:
            parts: tuple[PortRange, ...] = (each.ports,)
            for ports in kept.get(each.external, ()):
                parts = tuple(rest for part in parts for rest in part.minus(ports))
            for part in parts:
                first = (self.slots[each.external] - 1) * PORTS_OF_ADDRESS + part.first
                yield Store("owners", first * WORD_BYTES, word * part.size)

    def _home(self, entry: EdgeIntent, externals: Iterable[IPv4Address], hosts: Mapping[IPv4Address, int]) -> Store:
        slots = [self.slots[external] for external in dict.fromkeys(externals) if external in self.slots][:2]
        data = _HOME.pack(*slots, *[0] * (2 - len(slots)), _host(entry, hosts))
        return Store("homes", self._number(entry.internal) * HOME_BYTES, data)

    def _is_concerned(self, entry: EdgeIntent) -> bool:
        return entry.via is not None and 0 <= self._number(entry.internal) < self.pool.num_addresses

    def _number(self, internal: IPv4Address) -> int:
        return int(internal) - int(self.pool.network_address)


def host_store(number: int, known: Iterable[bytes]) -> Store:
    """
    Return what tells the hardware addresses of a host, two of them at most.

    :param known: Of six bytes each; none: its packets are left to nftables.
    """
    data = b"".join(address + bytes(2) for address in sorted(known)[:2])
    return Store("hosts", number * HOST_BYTES, data.ljust(HOST_BYTES, b"\0"))


def _externals(entry: EdgeIntent) -> tuple[IPv4Address, ...]:
    return tuple(dict.fromkeys(each.external for each in entry.ranges))


def _host(entry: EdgeIntent, hosts: Mapping[IPv4Address, int]) -> int:
    return hosts.get(entry.via, 0) if entry.via is not None else 0
