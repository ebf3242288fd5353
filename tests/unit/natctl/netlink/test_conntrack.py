"""Decoding, against entries as Linux 6.18 sent them (captured from traffic over lo)."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.errors import KernelError
from cpm.protocol.model import PortRange
from natctl.model.entries import Destination
from natctl.model.flow import Flow
from natctl.model.port_use import PortUse, VMPorts
from natctl.netlink.conntrack import (
    FLAG,
    delete_connections,
    delete_unanswered,
    dump_full_destinations,
    dump_ports,
    dump_ports_of,
    zones_of,
    zones_of_all,
)
from natctl.netlink.message import MalformedMessage, attribute
from natctl.netlink.socket import NETFILTER, Socket
from tests.fakes.netlink import ack, done, kernel_end, message

# conntrack -L: udp src=127.0.0.1 dst=127.0.0.1 sport=4000 dport=5000 src=127.0.0.1 dst=127.0.0.9 sport=5000 dport=20228
UDP = bytes.fromhex(
    "02000000 34000180 14000180 08000100 7f000001 08000200 7f000001 1c000280 05000100 11000000 06000200 0fa00000"
    "06000300 13880000 34000280 14000180 08000100 7f000001 08000200 7f000009 1c000280 05000100 11000000 06000200"
    "13880000 06000300 4f040000 08000300 00000198 08000800 40000000 08000c00 c026b2bc 08000b00 00000001 08000700"
    "0000001d"
)


def _zoned(entry: bytes) -> bytes:
    """Put an entry into zone 5 of the original direction."""
    return entry[:4] + bytes.fromhex("3c000180") + entry[8:56] + bytes.fromhex("06000300 00050000") + entry[56:]


ZONED_UDP = _zoned(UDP)
# icmp src=127.0.0.1 dst=127.0.0.1 type=8 code=0 id=100 src=127.0.0.1 dst=127.0.0.9 type=0 code=0 id=100
ICMP = bytes.fromhex(
    "02000000 3c000180 14000180 08000100 7f000001 08000200 7f000001 24000280 05000100 01000000 06000400 00640000"
    "05000500 08000000 05000600 00000000 3c000280 14000180 08000100 7f000001 08000200 7f000009 24000280 05000100"
    "01000000 06000400 00640000 05000500 00000000 05000600 00000000 08000300 0000019a 08000800 40000000 08000c00"
    "65f04ef5 08000b00 00000001 08000700 0000001d"
)
# unknown 99 src=127.0.0.1 dst=127.0.0.1 src=127.0.0.1 dst=127.0.0.9
PORTLESS = bytes.fromhex(
    "02000000 24000180 14000180 08000100 7f000001 08000200 7f000001 0c000280 05000100 63000000 24000280 14000180"
    "08000100 7f000001 08000200 7f000009 0c000280 05000100 63000000 08000300 00000198 08000800 40000000 08000c00"
    "da5e4c49 08000b00 00000001 08000700 00000257"
)
# What a stranger began: udp src=192.0.2.1 dst=127.0.0.9 sport=5000 dport=20228 src=10.0.0.5 dst=192.0.2.1 sport=4000
# dport=5000, with its destination translated.
STRANGERS = bytes.fromhex(
    "02000000 34000180 14000180 08000100 c0000201 08000200 7f000009 1c000280 05000100 11000000 06000200 13880000"
    "06000300 4f040000 34000280 14000180 08000100 0a000005 08000200 c0000201 1c000280 05000100 11000000 06000200"
    "0fa00000 06000300 13880000 08000300 000001a8 08000800 40000000 08000c00 c026b2bc 08000b00 00000001 08000700"
    "0000001d"
)
INTERNAL = IPv4Address("127.0.0.9")


DUMPED = 0x100  # IPCTNL_MSG_CT_NEW of NFNL_SUBSYS_CTNETLINK
RANGE = PortRange(20000, 20999)

_T = TypeVar("_T")


def with_entries(read: Callable[[], _T], *entries: bytes) -> _T:
    """Have the kernel list these entries."""
    with kernel_end() as kernel:
        kernel.send(b"".join(message(DUMPED, entry) for entry in entries) + done())
        # When they are to be deleted: one is, and then there is none.
        kernel.send(ack(2) + done(sequence=2))
        kernel.send(done(sequence=3))
        kernel.send(done(sequence=4))
        return read()


def collected(*entries: bytes) -> PortUse:
    return with_entries(dump_ports, *entries)


def use(**ports: list[int]) -> PortUse:
    numbers = {"icmp": 1, "udp": 17}
    return PortUse({INTERNAL: VMPorts.of({numbers[name]: each for name, each in ports.items()})})


def test_ports_and_identifiers_are_read_and_portless_protocols_are_not() -> None:
    assert collected(UDP, ICMP, PORTLESS, UDP) == use(udp=[20228, 20228], icmp=[100])


def test_a_connection_that_a_stranger_began_has_the_port_that_it_was_sent_to() -> None:
    assert collected(STRANGERS).of(INTERNAL) == use(udp=[20228]).of(INTERNAL)


def test_one_vm_has_the_same_ports_as_among_all() -> None:
    found = with_entries(lambda: dump_ports_of(INTERNAL), UDP, ICMP, PORTLESS)
    assert found == collected(UDP, ICMP, PORTLESS).of(INTERNAL)


def test_a_destination_is_full_when_every_port_has_a_connection_there() -> None:
    there = Destination(17, IPv4Address("127.0.0.1"), 5000)
    assert with_entries(lambda: dump_full_destinations(INTERNAL, PortRange(20228, 20228)), UDP, ICMP) == frozenset(
        {there}
    )
    assert with_entries(lambda: dump_full_destinations(INTERNAL, PortRange(20228, 20229)), UDP, ICMP) == frozenset()


def tcp(state: int, port: int, server: int = 1) -> bytes:
    """Return a TCP connection of port 5000 on 127.0.0.server, in this state, as Linux 6.18 lists it."""
    number = b"\x05\x00\x01\x00"
    entry = UDP.replace(number + b"\x11", number + b"\x06").replace(bytes.fromhex("4f04"), port.to_bytes(2, "big"))
    entry = entry.replace(
        bytes.fromhex("7f000001 08000200 7f000009"), bytes((127, 0, 0, server, 8, 0, 2, 0, 127, 0, 0, 9))
    )
    return (
        entry
        + bytes.fromhex(f"30000480 2c000180 05000100 0{state}000000 05000200 00000000 05000300 00000000")
        + bytes.fromhex("06000400 00000000 06000500 00000000")
    )


def test_the_ports_of_closing_tcp_connections_are_in_use_and_not_taken() -> None:
    established, closing, there = 3, 7, Destination(6, IPv4Address("127.0.0.1"), 5000)
    ports = PortRange(20228, 20229)
    listed = (tcp(established, 20228), tcp(established, 20229), tcp(closing, 20229, server=2), tcp(closing, 20228, 2))
    assert with_entries(lambda: dump_full_destinations(INTERNAL, ports), *listed) == frozenset({there})
    assert with_entries(lambda: dump_ports_of(INTERNAL), *listed).filling(ports).in_use == 2


def test_a_vm_at_its_cap_is_counted_in_one_pass_that_reads_no_attribute_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One at its cap with 200,000 connections kept natd busy for seconds."""
    monkeypatch.setattr("natctl.netlink.conntrack.counting.spans", pytest.fail)
    there = Destination(6, IPv4Address("127.0.0.1"), 5000)
    assert with_entries(lambda: dump_full_destinations(INTERNAL, PortRange(20228, 20228)), tcp(3, 20228)) == {there}


def test_no_more_destinations_are_found_full_than_the_kernel_can_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natctl.netlink.conntrack.counting.MOST_FULL", 5)
    listed = [tcp(3, 20228, server) for server in range(1, 20)]
    assert len(with_entries(lambda: dump_full_destinations(INTERNAL, PortRange(20228, 20228)), *listed)) == 5


def test_a_vms_entries_are_deleted_by_their_own_tuple_and_identifier() -> None:
    with kernel_end() as kernel:
        kernel.send(message(DUMPED, UDP) + done())
        kernel.send(ack(2))
        kernel.send(done(sequence=3))
        kernel.send(done(sequence=4))
        assert delete_connections(INTERNAL) == 1
        kernel.recv(1000)
        handle = kernel.recv(1000)
    original, identifier, timeout = UDP[4:56], bytes.fromhex("08000c00 c026b2bc"), UDP[-8:]
    assert original in handle
    assert identifier in handle
    assert timeout not in handle


def test_entries_of_others_are_not_deleted() -> None:
    assert with_entries(lambda: delete_connections(IPv4Address("127.0.0.8")), UDP, ICMP, PORTLESS) == 0


def _status(bits: int) -> bytes:
    """The entry UDP, untranslated or not, answered or not."""
    return UDP.replace(bytes.fromhex("0800030000000198"), bytes.fromhex("08000300") + bits.to_bytes(4, "big"))


FLOW = Flow(0, 17, IPv4Address("127.0.0.1"), IPv4Address("127.0.0.1"), (4000, 5000))
UNANSWERED, ANSWERED, TRANSLATED = (_status(bits) for bits in (0x188, 0x18A, 0x198))


def deleted_of(flow: Flow, *answers: bytes) -> tuple[int, list[bytes]]:
    """Return how many connections were deleted, and what the kernel was asked."""
    with kernel_end() as kernel, Socket(NETFILTER, "test") as ct:
        for answer in answers:
            kernel.send(answer)
        count = delete_unanswered(ct, [flow, flow])
        kernel.setblocking(False)
        asked = []
        with contextlib.suppress(BlockingIOError):
            while True:
                asked.append(kernel.recv(65536))
        return count, asked


def test_an_unanswered_connection_is_found_by_its_flow_and_deleted_by_its_identifier() -> None:
    count, (asked, deleted) = deleted_of(FLOW, message(DUMPED, UNANSWERED), ack(2))
    assert count == 1
    assert UDP[4:56] in asked  # the original tuple
    assert UDP[4:56] in deleted
    assert bytes.fromhex("08000c00c026b2bc") in deleted


def test_a_flow_in_a_zone_is_looked_for_there() -> None:
    _, (asked, *_) = deleted_of(FLOW._replace(zone=5), ack(1, errno.ENOENT))
    assert ZONED_UDP[4:64] in asked


def test_a_query_is_found_by_its_identifier() -> None:
    query = Flow(0, 1, IPv4Address("127.0.0.1"), IPv4Address("127.0.0.1"), (8, 0, 100))
    _, (asked, *_) = deleted_of(query, ack(1, errno.ENOENT))
    for number in ("06000400 00640000", "05000500 08000000", "05000600 00000000"):
        assert bytes.fromhex(number) in asked


@pytest.mark.parametrize("answer", [
    message(DUMPED, ANSWERED), message(DUMPED, TRANSLATED), ack(1, errno.ENOENT),
    message(DUMPED, b""), message(DUMPED, UNANSWERED[:4] + attribute(3, b"\0")), message(DUMPED, UNANSWERED[:60]),
])  # fmt: skip
def test_what_is_answered_translated_gone_or_unreadable_is_not_deleted(answer: bytes) -> None:
    count, asked = deleted_of(FLOW, answer)
    assert (count, len(asked)) == (0, 1)


def test_a_kernel_that_does_not_look_is_an_error() -> None:
    with pytest.raises(KernelError):
        deleted_of(FLOW, ack(1, errno.EPERM))


@pytest.mark.parametrize("entry", [UDP, ZONED_UDP], ids=["no zone", "zone"])
def test_the_usual_layouts_are_read_in_one_go(monkeypatch: pytest.MonkeyPatch, entry: bytes) -> None:
    """Attribute by attribute takes ten times as long, which no result shows."""
    monkeypatch.setattr("natctl.netlink.conntrack.counting._collect_slowly", pytest.fail)
    assert collected(entry) == use(udp=[20228])


def test_what_strangers_began_is_read_in_one_go_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """All connections of a server are such ones."""
    # In another layout as a whole, and in its original tuple only.
    slowly = collected(STRANGERS.replace(b"\x02\x80", b"\x02\0"))
    assert slowly == collected(STRANGERS[:8] + STRANGERS[8:12].replace(b"\x80", b"\0") + STRANGERS[12:])
    monkeypatch.setattr("natctl.netlink.conntrack.counting._collect_slowly", pytest.fail)
    assert collected(STRANGERS, _zoned(STRANGERS)) == collected(_zoned(STRANGERS), STRANGERS)
    assert collected(STRANGERS) == slowly
    assert slowly.of(INTERNAL) == use(udp=[20228]).of(INTERNAL)
    assert slowly.of(IPv4Address("192.0.2.1")).total == 1


def test_a_zone_is_passed_over_where_attributes_are_not_flagged_as_nests() -> None:
    assert collected(ZONED_UDP.replace(b"\x02\x80", b"\x02\x00").replace(b"\x01\x80", b"\x01\x00")) == collected(UDP)


def test_the_zones_of_a_vm_are_read() -> None:
    def of_all() -> object:
        with Socket(NETFILTER, "read the zones of all VMs") as ct:
            return zones_of_all(ct, FLAG)

    def of_one() -> object:
        with Socket(NETFILTER, "read the zones of a VM") as ct:
            return zones_of(ct, INTERNAL)

    assert with_entries(of_all, UDP, ZONED_UDP) == {INTERNAL: {0, 5}}
    assert with_entries(of_one, UDP, ZONED_UDP) == {0, 5}
    assert with_entries(of_one, ZONED_UDP) == {5}
    assert with_entries(of_one) == frozenset()


def test_a_connection_is_deleted_in_its_zone() -> None:
    with kernel_end() as kernel:
        kernel.send(message(DUMPED, ZONED_UDP) + done())
        kernel.send(ack(2))
        kernel.send(done(sequence=3))
        kernel.send(done(sequence=4))
        assert delete_connections(INTERNAL) == 1
        kernel.recv(1000)
        assert ZONED_UDP[4:64] in kernel.recv(1000)


def test_a_kernel_that_does_not_flag_nests_is_understood() -> None:
    assert collected(UDP.replace(b"\x02\x80", b"\x02\x00").replace(b"\x01\x80", b"\x01\x00")) == collected(UDP)


READINGS: list[Callable[[], object]] = [
    dump_ports,
    lambda: dump_ports_of(INTERNAL),
    lambda: dump_full_destinations(INTERNAL, RANGE),
    lambda: delete_connections(INTERNAL),
]


@given(st.integers(0, len(UDP)), st.binary(max_size=8))
def test_a_damaged_entry_is_read_or_an_error(at: int, damage: bytes) -> None:
    damaged = UDP[:at] + damage + UDP[at + len(damage) :]
    for reading in READINGS:
        with contextlib.suppress(MalformedMessage):
            with_entries(reading, damaged)


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("entry", [b"", UDP[:4], UDP[:56], UDP[:80], UDP.replace(b"\6\0\3\0", b"\6\0\x13\0")])
def test_an_entry_without_tuple_address_or_port_is_an_error(reading: Callable[[], object], entry: bytes) -> None:
    """Passed over, its port would seem to be free, and could get another owner."""
    with pytest.raises(MalformedMessage):
        with_entries(reading, UDP, entry)


@given(st.lists(st.binary(max_size=200), max_size=3))
def test_entries_of_other_protocol_families_are_passed_over(entries: list[bytes]) -> None:
    nothing = [PortUse(), VMPorts(), frozenset(), 0]
    foreign = [b"\x0a\0\0\0" + entry for entry in entries]
    assert [with_entries(reading, *foreign) for reading in READINGS] == nothing


@pytest.mark.parametrize("reading", READINGS)
def test_a_kernel_that_refuses_is_an_error(reading: Callable[[], object]) -> None:
    with kernel_end() as kernel:
        kernel.send(done(errno.EPERM))
        with pytest.raises(KernelError) as caught:
            reading()
    assert (caught.value.errno, caught.value.detail) == (errno.EPERM, "Operation not permitted")


def test_a_system_that_gives_no_socket_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(KernelError) as caught:
        dump_ports()
    assert caught.value.args == ("read the connections of all VMs", errno.EPERM, "Operation not permitted")
