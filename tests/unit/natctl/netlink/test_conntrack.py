"""Decoding, against entries as Linux 6.18 sent them (captured from traffic over lo)."""

from __future__ import annotations

import itertools
import socket
from collections import defaultdict
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.errors import KernelError
from cpm.protocol.model import PortRange
from natctl.netlink.conntrack import _collect, _collect_slowly, _Entry, _taken_ports, dump_ports
from natctl.netlink.message import Slice
from natctl.netlink.socket import ROUTE, Socket

# conntrack -L: udp src=127.0.0.1 dst=127.0.0.1 sport=4000 dport=5000 src=127.0.0.1 dst=127.0.0.9 sport=5000 dport=20228
UDP = bytes.fromhex(
    "02000000 34000180 14000180 08000100 7f000001 08000200 7f000001 1c000280 05000100 11000000 06000200 0fa00000"
    "06000300 13880000 34000280 14000180 08000100 7f000001 08000200 7f000009 1c000280 05000100 11000000 06000200"
    "13880000 06000300 4f040000 08000300 00000198 08000800 40000000 08000c00 c026b2bc 08000b00 00000001 08000700"
    "0000001d"
)
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
INTERNAL = int(IPv4Address("127.0.0.9"))


class Listing(Socket):
    """A socket that has these entries to list."""

    def __init__(self, *entries: bytes) -> None:
        super().__init__(ROUTE, "read the test's entries")
        self._entries = entries

    def dump(self, request: bytes, action: str = "") -> Iterator[Slice]:
        del request, action
        buffer = bytes(16) + b"".join(self._entries)  # a message's body never starts at 0
        start = 16
        for entry in self._entries:
            yield buffer, start, start + len(entry)
            start += len(entry)


def collected(*entries: bytes) -> dict[int, list[int]]:
    with Listing(*entries) as ct:
        return dict(_collect(ct, b""))


def collected_slowly(entry: bytes) -> dict[int, list[int]]:
    found: dict[int, list[int]] = defaultdict(list)
    _collect_slowly(found, entry, 0, len(entry))
    return dict(found)


def test_ports_and_identifiers_are_read_and_portless_protocols_are_not() -> None:
    assert collected(UDP, ICMP, PORTLESS, UDP) == {INTERNAL << 8 | 17: [20228, 20228], INTERNAL << 8 | 1: [100]}


def test_the_fast_way_is_taken_and_agrees_with_the_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = collected_slowly(UDP)
    monkeypatch.setattr("natctl.netlink.conntrack._collect_slowly", pytest.fail)
    assert collected(UDP) == expected == {INTERNAL << 8 | 17: [20228]}


def test_a_kernel_that_does_not_flag_nests_is_understood() -> None:
    assert collected(UDP.replace(b"\x02\x80", b"\x02\x00").replace(b"\x01\x80", b"\x01\x00")) == collected(UDP)


@given(st.binary(max_size=200))
def test_garbage_is_passed_over(garbage: bytes) -> None:
    assert collected_slowly(garbage) == {}


@given(st.integers(0, len(UDP)), st.binary(max_size=8))
def test_a_damaged_entry_never_raises(at: int, damage: bytes) -> None:
    damaged = UDP[:at] + damage + UDP[at + len(damage) :]
    for port in itertools.chain(*collected(damaged).values()):
        assert 0 <= port <= 65535
    _Entry.decode(damaged, 0, len(damaged))
    with Listing(damaged) as ct:
        _taken_ports(ct, IPv4Address(INTERNAL), PortRange(20000, 20999))


@given(st.lists(st.binary(max_size=200), max_size=3))
def test_garbage_in_a_dump_is_passed_over(entries: list[bytes]) -> None:
    assert collected(*entries) == {}
    with Listing(*entries) as ct:
        assert _taken_ports(ct, IPv4Address(INTERNAL), PortRange(20000, 20999)) == {}


def test_a_kernel_that_refuses_is_an_error_with_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(KernelError, match="cannot read the connections of all VMs: Operation not permitted"):
        dump_ports()
