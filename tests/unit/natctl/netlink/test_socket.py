"""What a socket makes of the kernel's answers; a socket pair stands in for the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR

from cpm.protocol.errors import KernelError
from natctl.netlink import message as packing
from natctl.netlink.message import HEADER, MalformedMessage, Request, attribute
from natctl.netlink.socket import (
    ROUTE,
    AnswerTimeout,
    DumpInterrupted,
    Listener,
    MessagesLost,
    Socket,
    set_timeout,
    until_complete,
)

ENTRY = 0x100
LIST = packing.message(ENTRY, NLM_F_DUMP, b"")
TIMEOUT_S = 0.05


class Overflowing(socket.socket):
    """Reports once, like the kernel, that messages were dropped; those that are queued stay."""

    def __init__(self, real: socket.socket) -> None:
        super().__init__(fileno=real.detach())
        self.has_overflowed = True

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        if self.has_overflowed:
            self.has_overflowed = False
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        return super().recv(size, flags)


@pytest.fixture
def kernel(channel: Socket) -> Iterator[socket.socket]:
    """The other end of the socket, to answer as the kernel would."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    set_timeout(ours, TIMEOUT_S)
    channel._socket.close()
    channel._socket = ours
    theirs.settimeout(5)
    with theirs:
        yield theirs


@pytest.fixture
def channel() -> Iterator[Socket]:
    with Socket(ROUTE, "list the test's things", timeout_s=TIMEOUT_S) as made:
        yield made


def message(kind: int, body: bytes, *, flags: int = 0, sequence: int = 1) -> bytes:
    return HEADER.pack(16 + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)


def done(code: int = 0) -> bytes:
    return message(NLMSG_DONE, struct.pack("=i", -code))


def ack(sequence: int, code: int = 0, words: str = "") -> bytes:
    # With NETLINK_CAP_ACK: the error number, the header of the request, and attributes that explain.
    explanation = attribute(1, words.encode() + b"\0") if words else b""
    flags = 0x200 if words else 0
    return message(NLMSG_ERROR, struct.pack("=i", -code) + bytes(16) + explanation, flags=flags, sequence=sequence)


def read(channel: Socket) -> list[bytes]:
    return [buffer[start:end] for buffer, start, end in channel.dump(LIST)]


def requests(*bodies: bytes, asking: bool = True) -> list[Request]:
    return [Request(packing.message(ENTRY, NLM_F_ACK if asking else 0, body), f"add {body!r}") for body in bodies]


def test_a_listing_may_span_buffers_and_ends_with_done(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(message(ENTRY, b"one") + message(ENTRY, b"two!"))
    kernel.send(message(ENTRY, b"three") + done())
    assert read(channel) == [b"one", b"two!", b"three"]


def test_answers_to_another_request_are_passed_over(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(
        message(ENTRY, b"old", sequence=7) + message(NLMSG_DONE, b"\0\0\0\0", sequence=7) + message(ENTRY, b"new")
    )
    kernel.send(done())
    assert read(channel) == [b"new"]


def test_an_interrupted_listing_is_told_at_its_end(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(message(ENTRY, b"one", flags=NLM_F_DUMP_INTR) + message(ENTRY, b"two") + done())
    with pytest.raises(DumpInterrupted):
        read(channel)


@pytest.mark.parametrize("kind", [NLMSG_DONE, NLMSG_ERROR])
def test_a_listing_that_breaks_off_is_an_error(channel: Socket, kernel: socket.socket, kind: int) -> None:
    kernel.send(message(ENTRY, b"one") + message(kind, struct.pack("=i", -errno.EPERM)))
    with pytest.raises(KernelError, match="cannot list the test's things: Operation not permitted") as caught:
        read(channel)
    assert caught.value.errno == errno.EPERM


def test_a_cut_off_answer_is_an_error(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(message(ENTRY, b"one long message")[:-4])
    with pytest.raises(MalformedMessage, match="cut off") as caught:
        read(channel)
    assert caught.value.errno == errno.EBADMSG


@pytest.mark.usefixtures("kernel")
def test_silence_is_an_error(channel: Socket) -> None:
    with pytest.raises(AnswerTimeout) as caught:
        read(channel)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_socket_that_ended_is_an_error(channel: Socket, kernel: socket.socket) -> None:
    kernel.shutdown(socket.SHUT_WR)
    with pytest.raises(KernelError):
        read(channel)


def test_bodies_of_a_list_are_read_again_when_it_changed(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(message(ENTRY, b"one", flags=NLM_F_DUMP_INTR) + done())
    kernel.send(message(ENTRY, b"one", sequence=2) + message(NLMSG_DONE, bytes(4), sequence=2))
    assert channel.dump_bodies(LIST, 3) == [b"one"]


def test_a_body_shorter_than_its_header_is_an_error(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(message(ENTRY, b"one") + done())
    with pytest.raises(MalformedMessage):
        channel.dump_bodies(LIST, 4)


def test_an_interrupted_reading_is_repeated_a_few_times() -> None:
    answers: list[int | None] = [None, None, 5]

    def read() -> int:
        answer = answers.pop(0)
        if answer is None:
            raise DumpInterrupted("read the test's entries")
        return answer

    assert until_complete(read) == 5
    answers[:] = [None] * 10
    with pytest.raises(KernelError, match="cannot read the test's entries") as caught:
        until_complete(read)
    assert caught.value.errno == errno.EINTR


def test_every_request_of_a_batch_gets_its_own_answer(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(ack(2, errno.ENOENT) + ack(1, 0))
    kernel.send(ack(3, 0))
    assert channel.try_each(requests(b"aaaa", b"", b"ccccdddd")) == [0, errno.ENOENT, 0]


def test_a_batch_of_which_only_the_last_asks_is_answered_once(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(ack(2))
    assert channel.try_each(requests(b"aaaa", b"bbbb")) == [None, 0]
    kernel.send(ack(4))
    channel.execute(requests(b"aaaa", b"bbbb"))
    sent = [kernel.recv(1000), kernel.recv(1000)]
    assert [[item[2] for item in packing.messages(each)] for each in sent] == [[1, 2], [3, 4]]


def test_the_first_request_that_was_refused_is_named(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(ack(3, errno.EEXIST))
    kernel.send(ack(2, errno.ENOENT, "no such thing"))
    with pytest.raises(KernelError, match="cannot change things: add b'bbbb': no such thing") as caught:
        channel.execute(requests(b"aaaa", b"bbbb", b"cccc", b"dddd", asking=False), "change things")
    assert caught.value.errno == errno.ENOENT


def test_what_follows_the_last_request_that_asks_is_not_waited_for(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(ack(2))
    channel.execute([*requests(b"begn", asking=False), *requests(b"rule"), *requests(b"end.", asking=False)])


def test_a_batch_that_nobody_answers_ends(channel: Socket, kernel: socket.socket) -> None:
    with pytest.raises(AnswerTimeout):
        channel.execute(requests(b"a"))
    # What comes too late is not taken for the answer to the next one.
    kernel.send(ack(1, errno.EPERM))
    kernel.send(ack(2))
    with pytest.raises(AnswerTimeout):
        channel.execute(requests(b"b"))


def test_lost_answers_are_an_error_even_when_the_last_one_is_there(channel: Socket, kernel: socket.socket) -> None:
    channel._socket = Overflowing(channel._socket)
    kernel.send(ack(2))
    with pytest.raises(MessagesLost) as caught:
        channel.execute(requests(b"aaaa", b"bbbb"))
    assert caught.value.errno == errno.ENOBUFS


def test_of_lost_answers_a_refusal_that_is_left_is_the_error(channel: Socket, kernel: socket.socket) -> None:
    channel._socket = Overflowing(channel._socket)
    kernel.send(ack(2, errno.EEXIST))
    with pytest.raises(KernelError, match="add b'bbbb': File exists"):
        channel.execute(requests(b"aaaa", b"bbbb", b"cccc"))


def test_a_question_has_one_answer(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(message(ENTRY, b"old", sequence=9) + message(ENTRY, b"this"))
    assert channel.ask(LIST) == b"this"
    kernel.send(ack(2, errno.EPERM, "not for you"))
    with pytest.raises(KernelError, match="cannot ask: not for you"):
        channel.ask(LIST, "ask")


def test_a_dump_that_was_left_is_thrown_away(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(message(ENTRY, b"one") + message(ENTRY, b"two"))
    kernel.send(done())
    assert next(channel.dump(LIST)) is not None
    assert kernel.recv(1000)
    with pytest.raises(AnswerTimeout):
        read(channel)


@given(data=st.binary(max_size=200))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nonsense_is_an_answer_an_error_or_silence(channel: Socket, kernel: socket.socket, data: bytes) -> None:
    set_timeout(channel._socket, 0.0005)
    for use in (read, lambda channel: channel.ask(LIST), lambda channel: channel.try_each(requests(b"aaaa", b"bbbb"))):
        channel._drain()
        channel._sequence, channel._is_drained = 0, True
        kernel.send(data or b"\0")
        with contextlib.suppress(KernelError):
            use(channel)
        kernel.recv(1000)


async def test_a_listener_returns_reports_and_says_when_some_were_lost() -> None:
    listener = Listener(ROUTE, "hear of things")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener._socket.close()
    ours.setblocking(False)
    listener._socket = ours
    with theirs:
        for report in (b"one", b"two", b"three"):
            theirs.send(report)
        assert await listener.receive() == [b"one"]
        assert await listener.receive(8) == [b"two", b"three"]
        theirs.send(b"four")
        overflowing = Overflowing(ours)
        overflowing.has_overflowed = False
        listener._socket = overflowing
        asyncio.get_running_loop().call_soon(setattr, overflowing, "has_overflowed", False)
        assert await listener.receive() == [b"four"]
        overflowing.has_overflowed = True
        with pytest.raises(MessagesLost):
            await listener.receive()
        theirs.send(b"five")
        assert await listener.receive() == [b"five"]
    listener.close()


def test_a_listener_keeps_reports_that_overtake_the_answer_to_its_configuration(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr("natctl.netlink.socket._opened", lambda protocol: Bound(ours))
    with theirs:
        theirs.send(ack(1))
        theirs.send(message(ENTRY, b"early", sequence=0))
        theirs.send(ack(1))
        listener = Listener(ROUTE, "hear of things", configuration=requests(b"bind", b"limits"))
        assert asyncio.run(listener.receive()) == [message(ENTRY, b"early", sequence=0)]
        listener.close()


def test_a_configuration_that_is_refused_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr("natctl.netlink.socket._opened", lambda protocol: Bound(ours))
    with theirs:
        theirs.send(ack(1, errno.EBUSY))
        with pytest.raises(KernelError, match="cannot hear of things: Device or resource busy"):
            Listener(ROUTE, "hear of things", configuration=requests(b"bind"))


class Bound(socket.socket):
    """One end of a pair; has no address to bind to."""

    def __init__(self, real: socket.socket) -> None:
        super().__init__(fileno=real.detach())

    def bind(self, address: object, /) -> None:
        del address


def test_an_error_in_an_answer_is_read_and_no_error_is_none(channel: Socket, kernel: socket.socket) -> None:
    kernel.send(HEADER.pack(20, NLMSG_ERROR, 0, 1, 0) + struct.pack("=i", -errno.EBUSY))
    kernel.send(HEADER.pack(20, NLMSG_ERROR, 0, 2, 0) + struct.pack("=i", 0))
    kernel.send(HEADER.pack(20, NLMSG_DONE, 0, 3, 0) + bytes(4))
    assert channel.try_each(requests(b"a")) == [errno.EBUSY]
    assert channel.try_each(requests(b"a")) == [0]
    assert read(channel) == []
