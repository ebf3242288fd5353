"""
Netlink sockets: :class:`Socket` sends requests and reads the answers.

**Synchronous.** The kernel handles a request inside ``sendmsg`` and has queued its answers when that call returns, so
an event loop would have nothing to wait for. Callers do small work inline and large work in a worker thread. A socket
belongs to the network namespace of the thread that created it, whichever thread uses it, and may be used by one thread
at a time. The timeout is a safeguard only.

**Batches and dumps.** A batch goes out in one ``sendmsg``, and its answers are read until the last message is answered.
A dump is paced by its reader: the kernel fills a further buffer (up to 32 KiB) for each that was taken.

**Errors.** All of them are :class:`~cpm.protocol.errors.KernelError` with the kernel's error number and, where it gives
one, its own explanation (extended acknowledgement)::

    KernelError              the kernel refused, or there is no such socket
    ├── AnswerTimeout        no answer in time (ETIMEDOUT)
    ├── MessagesLost         the receive buffer overflowed: answers or reports are missing (ENOBUFS)
    ├── DumpInterrupted      objects may be missing in a dump, because what was listed changed (EINTR)
    └── MalformedMessage     what the kernel sent cannot be read (EBADMSG; see natctl.netlink.message)

After any error the socket can be used again: the rest of the former answer is discarded before the next request.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Self, TypeVar

from pyroute2.netlink import (
    NETLINK_EXT_ACK,
    NETLINK_GET_STRICT_CHK,
    NETLINK_NETFILTER,
    NETLINK_ROUTE,
    NLM_F_DUMP_INTR,
    NLMSG_DONE,
    NLMSG_ERROR,
    SOL_NETLINK,
)

from cpm.protocol.errors import KernelError
from natctl.netlink.message import (
    HEADER,
    MalformedMessage,
    Request,
    Slice,
    aligned,
    asks_for_acknowledgement,
    attributes,
    messages,
    numbered,
    text,
)

ROUTE: Final[int] = NETLINK_ROUTE
NETFILTER: Final[int] = NETLINK_NETFILTER

_CAP_ACK: Final = 10  # NETLINK_CAP_ACK
_SO_SNDBUFFORCE: Final = 32
SO_RCVBUFFORCE: Final = 33
_NLMSGERR_ATTR_MSG: Final = 1

_SEND_BUFFER: Final = 64 << 20
"""The kernel takes a transaction as a whole."""
_RECEIVE_BUFFER: Final = 8 << 20
RECEIVE_BYTES: Final = 1 << 16
"""The kernel fills messages of up to 32 KiB when it sees that the reader has room (net/netlink/af_netlink.c)."""
_LAST_SEQUENCE: Final = 1 << 31
_ERRNO: Final = struct.Struct("=i")
_MAX_ERRNO: Final = 4095
"""include/linux/err.h"""
_TIMEVAL: Final = struct.Struct("@ll")
_DUMP_ATTEMPTS: Final = 5

_T = TypeVar("_T")


class AnswerTimeout(KernelError):
    """The kernel did not answer in time."""

    def __init__(self, action: str) -> None:
        super().__init__(action, errno.ETIMEDOUT, "the kernel does not answer")


class MessagesLost(KernelError):
    """The receive buffer overflowed, so the kernel dropped messages."""

    def __init__(self, action: str) -> None:
        super().__init__(action, errno.ENOBUFS, "the kernel sent more than the receive buffer holds")


class DumpInterrupted(KernelError):
    """The list changed during the dump, so objects may be missing; read it again."""

    def __init__(self, action: str) -> None:
        super().__init__(action, errno.EINTR, "the list kept changing while it was read")


class Socket:
    """
    One netlink socket for requests. Close it when done, or use it as a context manager.

    :param protocol: :data:`ROUTE` or :data:`NETFILTER`.
    :param action: What it is for, to complete the sentence "cannot …" of a :class:`KernelError`.
    :param timeout_s: Longest wait, in seconds, for one part of an answer.
    :raise KernelError: When the kernel gives no such socket.
    """

    def __init__(self, protocol: int, action: str, *, timeout_s: float = 10.0) -> None:
        self._action = action
        self._sequence = 0
        self._is_drained = True
        try:
            self._socket = opened(protocol)
            self._socket.bind((0, 0))
            set_timeout(self._socket, timeout_s)
        except OSError as error:
            raise as_kernel_error(action, error) from error
        set_option(self._socket, socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
        set_option(self._socket, socket.SOL_SOCKET, SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        # Errors do not quote the request, but have an explanation; the kernel checks and applies filters of dumps.
        for option in _CAP_ACK, NETLINK_EXT_ACK, NETLINK_GET_STRICT_CHK:
            set_option(self._socket, SOL_NETLINK, option, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket; the object is of no use afterwards."""
        self._socket.close()

    @property
    def port(self) -> int:
        """The kernel's number of this socket; notifications of what it changed have it as sender (``nlmsg_pid``)."""
        return int(self._socket.getsockname()[0])

    def error(self, code: int) -> KernelError:
        """Return, not raise, the error that says what this socket was for."""
        return KernelError(self._action, code, os.strerror(code))

    def execute(self, requests: Sequence[Request], action: str = "") -> None:
        """
        Send the requests as one batch and wait for the kernel's answer.

        The last request, or one near it, must have ``NLM_F_ACK``: its answer is the one that is waited for. The kernel
        sends errors in any case.

        :param action: As for the socket, for this batch only.
        :raise KernelError: With the first request that was refused; whether the others stand depends on the protocol.
        :raise AnswerTimeout: When the kernel does not answer in time.
        :raise MessagesLost: When answers were dropped and no request is known to have been refused.
        """
        action = action or self._action
        first = self._send([request.data for request in requests], action)
        answers = self._answers(first, requests, action)
        refused = next((position for position, (code, _) in sorted(answers.items()) if code), None)
        if refused is not None:
            code, words = answers[refused]
            raise KernelError(action, code, f"{requests[refused].description}: {words or os.strerror(code)}")

    def try_each(self, requests: Sequence[Request], action: str = "") -> list[int | None]:
        """
        Send the requests as one batch; return for each the kernel's error number, 0 for success, None for no answer.

        The last request, or one near it, must have ``NLM_F_ACK``. The answers must fit the receive buffer, which has
        room for some thousands.

        :raise KernelError: When they cannot be sent, or as for :meth:`execute` when answers are missing.
        """
        action = action or self._action
        first = self._send([request.data for request in requests], action)
        answers = self._answers(first, requests, action)
        return [answers[position][0] if position in answers else None for position in range(len(requests))]

    def ask(self, request: bytes, action: str = "") -> bytes:
        """
        Return the body of the one message that answers a request.

        :raise KernelError: When the kernel refuses or does not answer in time.
        """
        action = action or self._action
        sequence = self._send([request], action)
        while True:
            buffer = self._receive(action)
            for kind, _, answered, start, end in messages(buffer):
                if answered == sequence:
                    self._is_drained = True
                    if kind == NLMSG_ERROR:
                        code, words = read_answer(buffer, start, end)
                        raise KernelError(action, code, words or os.strerror(code))
                    return buffer[start:end]

    def dump(self, request: bytes, action: str = "") -> Iterator[Slice]:
        """
        Ask for a list (``NLM_F_DUMP``) and yield the body of every message of the answer, within its buffer.

        Read it to its end before the next request; otherwise the rest is discarded.

        :raise DumpInterrupted: At the end, when objects may be missing in what was yielded.
        :raise MalformedMessage: When a message is cut off.
        :raise KernelError: When the kernel refuses, does not answer in time, or breaks off.
        """
        action = action or self._action
        sequence = self._send([request], action)
        is_interrupted = False
        while True:
            buffer = self._receive(action)
            end = 0
            for kind, flags, answered, start, end in messages(buffer):
                if answered != sequence:
                    continue
                if flags & NLM_F_DUMP_INTR:
                    is_interrupted = True
                if kind <= NLMSG_DONE:
                    self._is_drained = True
                    _check_end(kind, buffer, start, end, action)
                    if is_interrupted:
                        raise DumpInterrupted(action)
                    return
                yield buffer, start, end
            if aligned(end) < len(buffer):
                raise MalformedMessage(action, "the kernel's answer is cut off")

    def dump_bodies(self, request: bytes, header_bytes: int, action: str = "") -> list[bytes]:
        """
        Return the body of every message of a list; one that changed while it was read is read again.

        :param header_bytes: Size of the protocol's fixed header, with which each body begins.
        :raise DumpInterrupted: When the list keeps changing.
        :raise MalformedMessage: When a message is cut off.
        :raise KernelError: When the kernel refuses, does not answer in time, or breaks off.
        """

        def read() -> list[bytes]:
            bodies, is_complete = self.dump_once(request, header_bytes, action)
            if not is_complete:
                raise DumpInterrupted(action or self._action)
            return bodies

        return until_complete(read)

    def dump_once(self, request: bytes, header_bytes: int, action: str = "") -> tuple[list[bytes], bool]:
        """
        Return the body of every message of a list, and whether the kernel says that nothing changed meanwhile.

        The kernel says so of much more than what is listed: for a list of our nftables elements, of all tables. The
        list may well be complete if not.

        :param header_bytes: As for :meth:`dump_bodies`.
        :raise MalformedMessage: When a message is cut off.
        :raise KernelError: When the kernel refuses, does not answer in time, or breaks off.
        """
        bodies: list[bytes] = []
        is_complete = True
        try:
            for buffer, start, end in self.dump(request, action):
                bodies.append(buffer[start:end])
        except DumpInterrupted:
            is_complete = False
        if any(len(body) < header_bytes for body in bodies):
            raise MalformedMessage(action or self._action, "a message of the list is too short")
        return bodies, is_complete

    def _send(self, data: Sequence[bytes], action: str) -> int:
        """Number the messages and send them as one. :return: The first number."""
        if not self._is_drained:
            self._drain()
        if self._sequence + len(data) >= _LAST_SEQUENCE:
            self._sequence = 0
        first = self._sequence + 1
        self._sequence += len(data)
        self._is_drained = False
        try:
            self._socket.send(numbered(data, first))
        except OSError as error:
            raise as_kernel_error(action, error) from error
        return first

    def _answers(self, first: int, requests: Sequence[Request], action: str) -> dict[int, tuple[int, str]]:
        """Return error number and explanation by position, of those requests that were answered."""
        count = len(requests)
        last = next((at for at in range(count - 1, -1, -1) if asks_for_acknowledgement(requests[at].data)), 0)
        answers: dict[int, tuple[int, str]] = {}
        has_error, lost = False, None
        while last not in answers:
            try:
                # After an error there may be no more: the kernel need not look at the rest of a batch.
                buffer = self._receive(action, socket.MSG_DONTWAIT if has_error or lost else 0)
            except AnswerTimeout:
                if has_error or lost:
                    break
                raise
            except MessagesLost as error:
                lost = error
                continue
            for kind, _, sequence, start, end in messages(buffer):
                if kind == NLMSG_ERROR and 0 <= sequence - first < count:
                    answers[sequence - first] = read_answer(buffer, start, end)
                    has_error = has_error or answers[sequence - first][0] != 0
        self._is_drained = last in answers
        if lost is not None and not has_error:
            raise lost
        return answers

    def _receive(self, action: str, flags: int = 0) -> bytes:
        try:
            buffer = self._socket.recv(RECEIVE_BYTES, flags)
        except OSError as error:
            raise as_kernel_error(action, error) from error
        if not buffer:
            raise KernelError(action, errno.EPIPE, os.strerror(errno.EPIPE))
        return buffer

    def _drain(self) -> None:
        """Discard the rest of an answer that was not read to its end."""
        while True:
            try:
                self._receive(self._action, socket.MSG_DONTWAIT)
            except MessagesLost:
                continue
            except AnswerTimeout:
                return


def until_complete(read: Callable[[], _T]) -> _T:
    """
    Return what ``read``, which reads one dump, returns; call it up to five times while the dump is interrupted.

    :raise DumpInterrupted: When every attempt was interrupted.
    """
    for _ in range(_DUMP_ATTEMPTS - 1):
        try:
            return read()
        except DumpInterrupted:
            continue
    return read()


def set_timeout(socket_: socket.socket, timeout_s: float) -> None:
    """Set a timeout in the kernel: Python's own timeout costs a system call for every read."""
    timeout_us = max(1, int(timeout_s * 1_000_000))
    socket_.settimeout(None)
    socket_.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(*divmod(timeout_us, 1_000_000)))


def opened(protocol: int) -> socket.socket:
    """Open a netlink socket. :raise OSError: When the kernel gives none."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)


def set_option(socket_: socket.socket, level: int, name: int, value: int) -> None:
    """Set an option that one can do without."""
    try:
        socket_.setsockopt(level, name, value)
    except OSError:
        # Old kernels lack some: then transactions and buffers are smaller, and errors shorter.
        return


def as_kernel_error(action: str, error: OSError) -> KernelError:
    """Return what callers get for an error of the socket itself."""
    if isinstance(error, BlockingIOError):
        return AnswerTimeout(action)
    if error.errno == errno.ENOBUFS:
        return MessagesLost(action)
    code = error.errno or errno.EIO
    return KernelError(action, code, os.strerror(code))


def read_answer(buffer: bytes, start: int, end: int) -> tuple[int, str]:
    """
    Read ``struct nlmsgerr``, which is followed by attributes that explain the error.

    :return: Error number, 0 for success, and the kernel's explanation, or nothing.
    """
    if end - start < _ERRNO.size:
        return errno.EBADMSG, "the kernel's answer is cut off"
    code = _code(buffer, start)
    # With NETLINK_CAP_ACK the request itself is left out; its header stays.
    return code, _explanation(buffer, start + _ERRNO.size + HEADER.size, end) if code else ""


def _check_end(kind: int, buffer: bytes, start: int, end: int, action: str) -> None:
    """Raise when the last message of a dump carries an error; NLMSG_DONE does, when the dump breaks off half-way."""
    code = _code(buffer, start) if end - start >= _ERRNO.size else 0
    if code > 0:
        words = _explanation(buffer, start + _ERRNO.size + (HEADER.size if kind == NLMSG_ERROR else 0), end)
        raise KernelError(action, code, words or os.strerror(code))


def _code(buffer: bytes, start: int) -> int:
    """Read an error number, 0 for success; what is none is EBADMSG."""
    code = -int(_ERRNO.unpack_from(buffer, start)[0])
    return code if 0 <= code <= _MAX_ERRNO else errno.EBADMSG


def _explanation(buffer: bytes, start: int, end: int) -> str:
    for kind, begin, behind in attributes(buffer, start, end):
        if kind == _NLMSGERR_ATTR_MSG:
            return text(buffer[begin:behind])
    return ""
