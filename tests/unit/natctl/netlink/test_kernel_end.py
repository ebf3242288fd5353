"""The stand-in for the kernel's end of a netlink socket frames its answers as the kernel does."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

import pytest
from pyroute2.netlink import (
    NETLINK_EXT_ACK,
    NETLINK_GET_STRICT_CHK,
    NETLINK_ROUTE,
    NLM_F_ACK,
    NLM_F_DUMP,
    SOL_NETLINK,
)
from pyroute2.netlink.rtnl import RTM_GETLINK, RTM_NEWLINK

from natctl.netlink import message as packing
from natctl.netlink.message import HEADER
from tests.fakes.netlink import ack, done, message

ANY_INTERFACE = bytes(16)
LOOPBACK = struct.pack("=BxHiII", 0, 0, 1, 0, 0)
NO_INTERFACE = struct.pack("=BxHiII", 0, 0, 2**30, 0, 0)
NONSENSE = struct.pack("=BxHiII", 0, 0, 0, 1, 0)


@pytest.fixture
def kernel() -> Iterator[socket.socket]:
    """A socket to the kernel, with the options that the product sets; listing interfaces takes no privilege."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE) as made:
        made.bind((0, 0))
        made.settimeout(5)
        for option in (10, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK):  # NETLINK_CAP_ACK
            made.setsockopt(SOL_NETLINK, option, 1)
        yield made


def answers(kernel: socket.socket, flags: int, body: bytes) -> Iterator[bytes]:
    """Ask about interfaces and yield every message of the answer, without the port number of this socket."""
    kernel.send(packing.numbered([packing.message(RTM_GETLINK, flags, body)], 7))
    kind = RTM_NEWLINK
    while kind == RTM_NEWLINK:
        buffer = kernel.recv(1 << 16)
        while buffer:
            size, kind, kept, sequence, _ = HEADER.unpack_from(buffer)
            behind = size + -size % 4
            yield HEADER.pack(size, kind, kept, sequence, 0) + buffer[16:behind]
            buffer = buffer[behind:]


def test_a_list_is_messages_and_done(kernel: socket.socket) -> None:
    *entries, end = answers(kernel, NLM_F_DUMP, ANY_INTERFACE)
    size, kind, flags, *_ = HEADER.unpack_from(entries[0])
    assert kind == RTM_NEWLINK
    assert message(kind, entries[0][16:size], flags=flags, sequence=7) == entries[0]
    assert end == done(sequence=7)


def test_a_list_that_is_refused_is_done_with_a_number_and_an_explanation(kernel: socket.socket) -> None:
    (end,) = answers(kernel, NLM_F_DUMP, NONSENSE)
    words = end[24:].rstrip(b"\0").decode()
    assert words
    assert end == done(errno.EINVAL, words, sequence=7)


@pytest.mark.parametrize(("body", "code"), [(LOOPBACK, 0), (NO_INTERFACE, errno.ENODEV)])
def test_an_answer_to_one_request_is_a_number_and_the_requests_header(
    kernel: socket.socket, body: bytes, code: int
) -> None:
    *_, answer = answers(kernel, NLM_F_ACK, body)  # an interface that exists is described first
    assert without_request(answer) == without_request(ack(7, code))


def test_a_refusal_may_have_an_explanation(kernel: socket.socket) -> None:
    (answer,) = answers(kernel, NLM_F_ACK, NONSENSE)
    words = answer[40:].rstrip(b"\0").decode()
    assert words
    assert without_request(answer) == without_request(ack(7, errno.EINVAL, words))


def without_request(answer: bytes) -> bytes:
    return answer[:20] + answer[36:]
