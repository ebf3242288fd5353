"""The tables of the fast path, by what a packet would find in them."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address, IPv4Network

from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID, PortRange
from natctl.ruleset.owner_tables import Tables, host_store
from tests.fakes.intents import edge_intent

POOL = IPv4Network("100.64.0.0/10")
EXTERNALS = tuple(IPv4Address(f"203.0.113.{number}") for number in (1, 2, 3))
HOST, OTHER_HOST = IPv4Address("172.30.0.21"), IPv4Address("172.30.0.22")
HOSTS = {int(HOST): 1, int(OTHER_HOST): 2}


def vm(number: int, *ranges: tuple[IPv4Address, int, int], via: IPv4Address | None = HOST) -> EdgeIntent:
    found = [(external, PortRange(first, last)) for external, first, last in ranges]
    uuid = DomainUUID(f"00000000-0000-0000-0000-{number:012}")
    return edge_intent(uuid, f"web {number}", IPv4Address("100.64.0.0") + number, via, tuple(found))


class Memory:
    """What the program reads, looked up as it does."""

    def __init__(self, tables: Tables, images: Mapping[str, bytearray]) -> None:
        self.tables, self.images = tables, dict(images)

    def change(self, before: Iterable[EdgeIntent], after: Iterable[EdgeIntent]) -> None:
        for store in self.tables.change(before, after, HOSTS):
            assert store.offset % 4 == 0
            assert len(store.data) % 4 == 0
            self.images[store.table][store.offset : store.offset + len(store.data)] = store.data

    def owner(self, external: IPv4Address, port: int) -> IPv4Address | None:
        at = ((self.tables.slots[int(external)] - 1) * 65536 + port) * 4
        word = bytes(self.images["owners"][at : at + 4])
        return IPv4Address(word) if any(word) else None

    def home(self, number: int) -> tuple[int, int, int]:
        found: tuple[int, int, int] = struct.unpack_from("=HHH", self.images["homes"], number * 8)
        return found

    def external(self, number: int, port: int) -> IPv4Address | None:
        """The source that a VM's packet gets."""
        by_slot = {slot: IPv4Address(address) for address, slot in self.tables.slots.items()}
        for slot in self.home(number)[:2]:
            if slot and self.owner(by_slot[slot], port) == IPv4Address("100.64.0.0") + number:
                return by_slot[slot]
        return None


def memory(*vms: EdgeIntent) -> Memory:
    tables = Tables.of(POOL, vms)
    return Memory(tables, tables.images(vms, HOSTS))


def test_a_port_has_one_owner_in_both_directions() -> None:
    found = memory(vm(1, (EXTERNALS[0], 1024, 1087)), vm(2, (EXTERNALS[0], 1088, 65535), via=OTHER_HOST))
    assert [found.owner(EXTERNALS[0], port) for port in (1023, 1024, 1087, 1088, 65535)] == [
        None, *map(IPv4Address, ("100.64.0.1", "100.64.0.1", "100.64.0.2", "100.64.0.2"))
    ]  # fmt: skip
    assert found.external(1, 1087) == EXTERNALS[0]
    assert found.external(1, 1088) is None
    assert found.external(2, 1088) == EXTERNALS[0]
    assert (found.home(1)[2], found.home(2)[2], found.home(3)) == (1, 2, (0, 0, 0))


def test_a_vm_of_this_machine_is_in_no_table() -> None:
    found = memory(vm(1, (EXTERNALS[0], 1024, 1087), via=None))
    assert found.owner(EXTERNALS[0], 1024) is None
    assert found.home(1) == (0, 0, 0)


def test_the_third_address_of_a_vm_is_left_to_nftables() -> None:
    found = memory(vm(1, *((external, 1024, 1087) for external in EXTERNALS)))
    assert [found.external(1, 1024), found.owner(EXTERNALS[2], 1024)] == [EXTERNALS[0], IPv4Address("100.64.0.1")]


def test_a_change_leaves_kept_ports_alone() -> None:
    before, after = vm(1, (EXTERNALS[0], 1024, 1087)), vm(1, (EXTERNALS[0], 1056, 1151))
    tables = Tables.of(POOL, [before])
    words = [store for store in tables.change([before], [after], HOSTS) if store.table == "owners"]
    assert [(store.offset // 4, len(store.data) // 4, any(store.data)) for store in words] == [
        (1024, 32, False), (1088, 64, True)
    ]  # fmt: skip


def test_a_vm_that_moves_has_both_addresses_before_it_has_the_ports() -> None:
    before, after = vm(1, (EXTERNALS[0], 1024, 1087)), vm(1, (EXTERNALS[1], 1024, 1087))
    tables = Tables.of(POOL, [before, vm(2, (EXTERNALS[1], 9000, 9001))])
    first, *_, last = tables.change([before], [after], HOSTS)
    assert (first.table, last.table) == ("homes", "homes")
    assert struct.unpack("=HHHH", first.data) == (2, 1, 1, 0)
    assert struct.unpack("=HHHH", last.data) == (2, 0, 1, 0)


def test_what_does_not_fit_needs_new_tables() -> None:
    tables = Tables.of(POOL, [vm(1, (EXTERNALS[0], 1024, 1087))])
    assert tables.suit([vm(4000, (EXTERNALS[0], 2048, 2111))])
    assert not tables.suit([vm(5000, (EXTERNALS[0], 2048, 2111))])
    assert not tables.suit([vm(2, (EXTERNALS[1], 1024, 1087))])
    assert tables.suit([vm(2, (EXTERNALS[1], 1024, 1087), via=None)])


def test_a_host_has_two_hardware_addresses_at_most() -> None:
    one, two, three = (bytes([2, 0, 0, 0, 0, number]) for number in (1, 2, 3))
    assert host_store(3, []) == ("hosts", 48, bytes(16))
    assert host_store(1, [two]) == ("hosts", 16, two + bytes(10))
    assert host_store(1, [three, two, one]).data == one + b"\0\0" + two + b"\0\0"


RANGES = st.lists(
    st.tuples(st.sampled_from(EXTERNALS), st.integers(0, 15), st.integers(0, 3)),
    max_size=4,
    unique_by=lambda each: each[:2],
)
SITES = st.dictionaries(st.integers(1, 4), RANGES, max_size=4)


def site(drawn: Mapping[int, list[tuple[IPv4Address, int, int]]]) -> list[EdgeIntent]:
    """Return VMs without common ports: who comes first has a port."""
    taken: set[tuple[IPv4Address, int]] = set()
    vms = []
    for number, ranges in drawn.items():
        mine = []
        for external, block, more in ranges:
            blocks = [each for each in range(block, min(block + more + 1, 16)) if (external, each) not in taken]
            taken |= {(external, each) for each in blocks}
            mine += [(external, 1024 + each * 64, 1087 + each * 64) for each in blocks]
        vms.append(vm(number, *mine))
    return vms


@given(SITES, SITES)
def test_a_change_leads_to_what_new_tables_would_hold(
    before: Mapping[int, list[tuple[IPv4Address, int, int]]], after: Mapping[int, list[tuple[IPv4Address, int, int]]]
) -> None:
    first, second = site(before), site(after)
    tables = Tables(POOL, {int(address): slot for slot, address in enumerate(EXTERNALS, 1)}, 4096)
    changed = Memory(tables, tables.images(first, HOSTS))
    changed.change(first, second)
    assert changed.images == tables.images(second, HOSTS)
