from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpm.protocol.errors import KernelError
from natctl.netlink.frames import (
    HEADER,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    Channel,
    DumpInterrupted,
    attribute,
    attributes,
    bodies,
    error_in,
    nested,
)

ENTRY = 0x100


@pytest.fixture
def kernel(channel: Channel) -> Iterator[socket.socket]:
    """The other end of the channel, to answer as the kernel would."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(channel._socket.gettimeout())
    channel._socket.close()
    channel._socket = ours
    theirs.settimeout(5)
    with theirs:
        yield theirs


@pytest.fixture
def channel() -> Iterator[Channel]:
    with Channel(socket.NETLINK_ROUTE, "list the test's things", timeout_s=0.05) as channel:
        yield channel


def message(kind: int, body: bytes, *, flags: int = 0, sequence: int = 1) -> bytes:
    return HEADER.pack(16 + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)


def done(code: int = 0) -> bytes:
    return message(NLMSG_DONE, struct.pack("=i", -code))


def read(channel: Channel) -> list[bytes]:
    return [buffer[start:end] for buffer, start, end in channel.dump(ENTRY, b"")]


def test_a_listing_may_span_buffers_and_ends_with_done(channel: Channel, kernel: socket.socket) -> None:
    kernel.send(message(ENTRY, b"one") + message(ENTRY, b"two!"))
    kernel.send(message(ENTRY, b"three") + done())
    assert read(channel) == [b"one", b"two!", b"three"]


def test_answers_to_another_request_are_passed_over(channel: Channel, kernel: socket.socket) -> None:
    kernel.send(
        message(ENTRY, b"old", sequence=7) + message(NLMSG_DONE, b"\0\0\0\0", sequence=7) + message(ENTRY, b"new")
    )
    kernel.send(done())
    assert read(channel) == [b"new"]


def test_an_interrupted_listing_is_told_at_its_end(channel: Channel, kernel: socket.socket) -> None:
    kernel.send(message(ENTRY, b"one", flags=NLM_F_DUMP_INTR) + message(ENTRY, b"two") + done())
    with pytest.raises(DumpInterrupted):
        read(channel)


@pytest.mark.parametrize("kind", [NLMSG_DONE, NLMSG_ERROR])
def test_a_listing_that_breaks_off_is_an_error(channel: Channel, kernel: socket.socket, kind: int) -> None:
    kernel.send(message(ENTRY, b"one") + message(kind, struct.pack("=i", -errno.EPERM)))
    with pytest.raises(KernelError, match="cannot list the test's things: Operation not permitted") as caught:
        read(channel)
    assert caught.value.errno == errno.EPERM


def test_a_cut_off_answer_is_an_error(channel: Channel, kernel: socket.socket) -> None:
    kernel.send(message(ENTRY, b"one long message")[:-4])
    with pytest.raises(KernelError) as caught:
        read(channel)
    assert caught.value.errno == errno.EBADMSG


@pytest.mark.usefixtures("kernel")
def test_silence_is_an_error(channel: Channel) -> None:
    with pytest.raises(KernelError) as caught:
        read(channel)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_socket_that_ended_is_an_error(channel: Channel, kernel: socket.socket) -> None:
    kernel.shutdown(socket.SHUT_WR)
    with pytest.raises(KernelError):
        read(channel)


def test_every_request_of_a_batch_gets_its_own_answer(channel: Channel, kernel: socket.socket) -> None:
    def ack(sequence: int, code: int) -> bytes:
        return message(NLMSG_ERROR, struct.pack("=i", -code) + bytes(16), sequence=sequence)

    kernel.send(ack(2, errno.ENOENT) + ack(1, 0))
    kernel.send(ack(3, 0))
    assert channel.execute(ENTRY, [b"a", b"bb", b"ccc"]) == [0, errno.ENOENT, 0]


@given(st.lists(st.tuples(st.integers(1, 0x3FFF), st.binary(max_size=40))))
def test_attributes_come_back_as_they_were_packed(packed: list[tuple[int, bytes]]) -> None:
    buffer = nested(9, *(attribute(kind, payload) for kind, payload in packed))
    ((kind, start, end),) = attributes(buffer, 0, len(buffer))
    assert kind == 9
    assert [(kind, buffer[at:to]) for kind, at, to in attributes(buffer, start, end)] == packed


@given(st.binary(max_size=200))
def test_garbage_instead_of_attributes_ends_the_walk_within_bounds(garbage: bytes) -> None:
    for _, start, end in attributes(garbage, 0, len(garbage)):
        assert 4 <= start <= end <= len(garbage)


def test_messages_of_one_type_are_found_among_others() -> None:
    def message(kind: int, body: bytes) -> bytes:
        return HEADER.pack(HEADER.size + len(body), kind, 0, 1, 0) + body + bytes(-len(body) % 4)

    buffer = message(7, b"head" + b"one") + message(8, b"headtwo!") + message(7, b"headthree")
    assert [buffer[start:end] for start, end in bodies(buffer, 7, 4)] == [b"one", b"three"]


@given(st.binary(max_size=200))
def test_nonsense_instead_of_messages_ends(data: bytes) -> None:
    for start, end in bodies(data, 7, 4):
        assert 0 < start <= len(data) + 4
        assert end <= len(data)


def test_an_error_is_read_and_no_error_is_none() -> None:
    assert error_in(HEADER.pack(20, NLMSG_ERROR, 0, 1, 0) + struct.pack("=i", -errno.EBUSY)) == errno.EBUSY
    assert error_in(HEADER.pack(20, NLMSG_ERROR, 0, 1, 0) + struct.pack("=i", 0)) == 0
    assert error_in(HEADER.pack(20, NLMSG_DONE, 0, 1, 0) + bytes(4)) == 0
