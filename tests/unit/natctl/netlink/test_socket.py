"""What a socket makes of the kernel's answers; a socket pair stands in for the kernel."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyroute2.netlink import NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR

from cpm.protocol.errors import KernelError
from natctl.netlink import message as packing
from natctl.netlink.listener import Listener
from natctl.netlink.message import HEADER, MalformedMessage, Request
from natctl.netlink.socket import (
    ROUTE,
    AnswerTimeout,
    DumpInterrupted,
    MessagesLost,
    Socket,
    until_complete,
)
from tests.fakes.netlink import KernelEnd, ack, done, kernel_end, message

ENTRY = 0x100
LIST = packing.message(ENTRY, NLM_F_DUMP, b"")
TIMEOUT_S = 0.05


@pytest.fixture
def kernel() -> Iterator[KernelEnd]:
    """The kernel's end of the socket that the test opens."""
    with kernel_end() as end:
        yield end


@pytest.fixture
def channel(kernel: KernelEnd) -> Iterator[Socket]:
    del kernel
    with Socket(ROUTE, "list the test's things", timeout_s=TIMEOUT_S) as made:
        yield made


def read(channel: Socket) -> list[bytes]:
    return [buffer[start:end] for buffer, start, end in channel.dump(LIST)]


def requests(*bodies: bytes, asking: bool = True) -> list[Request]:
    return [Request(packing.message(ENTRY, NLM_F_ACK if asking else 0, body), f"add {body!r}") for body in bodies]


def test_a_listing_may_span_buffers_and_ends_with_done(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(message(ENTRY, b"one") + message(ENTRY, b"two!"))
    kernel.send(message(ENTRY, b"three") + done())
    assert read(channel) == [b"one", b"two!", b"three"]


def test_answers_to_another_request_are_passed_over(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(message(ENTRY, b"old", sequence=7) + done(sequence=7) + message(ENTRY, b"new"))
    kernel.send(done())
    assert read(channel) == [b"new"]


def test_an_interrupted_listing_is_told_at_its_end(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(message(ENTRY, b"one", flags=NLM_F_DUMP_INTR) + message(ENTRY, b"two") + done())
    with pytest.raises(DumpInterrupted):
        read(channel)


@pytest.mark.parametrize("kind", [NLMSG_DONE, NLMSG_ERROR])
def test_a_listing_that_breaks_off_is_an_error(channel: Socket, kernel: KernelEnd, kind: int) -> None:
    kernel.send(message(ENTRY, b"one") + message(kind, struct.pack("=i", -errno.EPERM)))
    with pytest.raises(KernelError) as caught:
        read(channel)
    assert (caught.value.action, caught.value.errno) == ("list the test's things", errno.EPERM)


def test_a_cut_off_answer_is_an_error(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(message(ENTRY, b"one long message")[:-4])
    with pytest.raises(MalformedMessage) as caught:
        read(channel)
    assert caught.value.errno == errno.EBADMSG


@pytest.mark.parametrize("number", [-(2**31), 5, -4096])
def test_an_error_number_that_is_none_is_an_error(channel: Socket, kernel: KernelEnd, number: int) -> None:
    """Asking for the words of such a number can raise OverflowError."""
    kernel.send(message(NLMSG_ERROR, struct.pack("=i", number) + bytes(16)))
    with pytest.raises(KernelError) as caught:
        list(channel.dump(LIST))
    assert caught.value.errno == errno.EBADMSG


def test_silence_is_an_error(channel: Socket) -> None:
    with pytest.raises(AnswerTimeout) as caught:
        read(channel)
    assert caught.value.errno == errno.ETIMEDOUT


def test_a_socket_that_ended_is_an_error(channel: Socket, kernel: KernelEnd) -> None:
    kernel.shutdown(socket.SHUT_WR)
    with pytest.raises(KernelError):
        read(channel)


def test_bodies_of_a_list_are_read_again_when_it_changed(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(message(ENTRY, b"one", flags=NLM_F_DUMP_INTR) + done())
    kernel.send(message(ENTRY, b"one", sequence=2) + done(sequence=2))
    assert channel.dump_bodies(LIST, 3) == [b"one"]


def test_a_body_shorter_than_its_header_is_an_error(channel: Socket, kernel: KernelEnd) -> None:
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
    with pytest.raises(DumpInterrupted) as caught:
        until_complete(read)
    assert caught.value.errno == errno.EINTR


def test_every_request_of_a_batch_gets_its_own_answer(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(ack(2, errno.ENOENT) + ack(1, 0))
    kernel.send(ack(3, 0))
    assert channel.try_each(requests(b"aaaa", b"", b"ccccdddd")) == [0, errno.ENOENT, 0]


def test_a_batch_of_which_only_the_last_asks_is_answered_once(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(ack(2))
    assert channel.try_each(requests(b"aaaa", b"bbbb")) == [None, 0]
    kernel.send(ack(4))
    channel.execute(requests(b"aaaa", b"bbbb"))
    sent = [kernel.recv(1000), kernel.recv(1000)]
    assert [[item[2] for item in packing.messages(each)] for each in sent] == [[1, 2], [3, 4]]


def test_the_first_request_that_was_refused_is_named(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(ack(3, errno.EEXIST))
    kernel.send(ack(2, errno.ENOENT, "no such thing"))
    with pytest.raises(KernelError) as caught:
        channel.execute(requests(b"aaaa", b"bbbb", b"cccc", b"dddd", asking=False), "change things")
    assert caught.value.args == ("change things", errno.ENOENT, "add b'bbbb': no such thing")


def test_what_follows_the_last_request_that_asks_is_not_waited_for(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(ack(2))
    channel.execute([*requests(b"begn", asking=False), *requests(b"rule"), *requests(b"end.", asking=False)])


def test_a_batch_that_nobody_answers_ends(channel: Socket, kernel: KernelEnd) -> None:
    with pytest.raises(AnswerTimeout):
        channel.execute(requests(b"a"))
    # What comes too late is not taken for the answer to the next one.
    kernel.send(ack(1, errno.EPERM))
    kernel.send(ack(2))
    with pytest.raises(AnswerTimeout):
        channel.execute(requests(b"b"))


def test_lost_answers_are_an_error_even_when_the_last_one_is_there(channel: Socket, kernel: KernelEnd) -> None:
    kernel.overflow()
    kernel.send(ack(2))
    with pytest.raises(MessagesLost) as caught:
        channel.execute(requests(b"aaaa", b"bbbb"))
    assert caught.value.errno == errno.ENOBUFS


def test_of_lost_answers_a_refusal_that_is_left_is_the_error(channel: Socket, kernel: KernelEnd) -> None:
    kernel.overflow()
    kernel.send(ack(2, errno.EEXIST))
    with pytest.raises(KernelError) as caught:
        channel.execute(requests(b"aaaa", b"bbbb", b"cccc"))
    assert (caught.value.errno, caught.value.detail) == (errno.EEXIST, "add b'bbbb': File exists")


def test_a_question_has_one_answer(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(message(ENTRY, b"old", sequence=9) + message(ENTRY, b"this"))
    assert channel.ask(LIST) == b"this"
    kernel.send(ack(2, errno.EPERM, "not for you"))
    with pytest.raises(KernelError) as caught:
        channel.ask(LIST, "ask")
    assert caught.value.args == ("ask", errno.EPERM, "not for you")


def test_a_dump_that_was_left_is_thrown_away(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(message(ENTRY, b"one") + message(ENTRY, b"two"))
    kernel.send(done())
    assert next(channel.dump(LIST)) is not None
    assert kernel.recv(1000)
    with pytest.raises(AnswerTimeout):
        read(channel)


@given(data=st.binary(max_size=200))
def test_nonsense_is_an_answer_an_error_or_silence(data: bytes) -> None:
    for use in (read, lambda channel: channel.ask(LIST), lambda channel: channel.try_each(requests(b"aaaa", b"bbbb"))):
        with kernel_end() as kernel, Socket(ROUTE, "list the test's things", timeout_s=0.0005) as channel:
            kernel.send(data or b"\0")
            with contextlib.suppress(KernelError):
                use(channel)


async def test_a_listener_returns_reports_and_says_when_some_were_lost(kernel: KernelEnd) -> None:
    with contextlib.closing(Listener(ROUTE, "hear of things")) as listener:
        for report in (b"one", b"two", b"three"):
            kernel.send(report)
        assert await listener.receive() == [b"one"]
        assert await listener.receive(8) == [b"two", b"three"]
        kernel.send(b"four")
        assert await listener.receive() == [b"four"]
        kernel.overflow()
        with pytest.raises(MessagesLost):
            await listener.receive()
        kernel.send(b"five")
        assert await listener.receive() == [b"five"]


async def test_a_listener_returns_what_came_before_the_loss_first(kernel: KernelEnd) -> None:
    with contextlib.closing(Listener(ROUTE, "hear of things")) as listener:
        kernel.send(b"one")
        kernel.overflow(after=1)
        assert await listener.receive(8) == [b"one"]
        with pytest.raises(MessagesLost):
            await listener.receive()


async def test_a_listener_keeps_reports_that_overtake_the_answer_to_its_configuration(kernel: KernelEnd) -> None:
    kernel.send(ack(1))
    kernel.send(message(ENTRY, b"early", sequence=0))
    kernel.send(ack(1))
    with contextlib.closing(Listener(ROUTE, "hear of things", configuration=requests(b"bind", b"limits"))) as listener:
        assert await listener.receive() == [message(ENTRY, b"early", sequence=0)]


def test_a_configuration_that_is_refused_is_an_error(kernel: KernelEnd) -> None:
    kernel.send(ack(1, errno.EBUSY))
    with pytest.raises(KernelError) as caught:
        Listener(ROUTE, "hear of things", configuration=requests(b"bind"))
    assert (caught.value.action, caught.value.errno) == ("hear of things", errno.EBUSY)


def test_an_error_in_an_answer_is_read_and_no_error_is_none(channel: Socket, kernel: KernelEnd) -> None:
    kernel.send(HEADER.pack(20, NLMSG_ERROR, 0, 1, 0) + struct.pack("=i", -errno.EBUSY))
    kernel.send(HEADER.pack(20, NLMSG_ERROR, 0, 2, 0) + struct.pack("=i", 0))
    kernel.send(HEADER.pack(20, NLMSG_DONE, 0, 3, 0) + bytes(4))
    assert channel.try_each(requests(b"a")) == [errno.EBUSY]
    assert channel.try_each(requests(b"a")) == [0]
    assert read(channel) == []
