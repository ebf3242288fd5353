"""
A netlink socket, used synchronously; and how to read what the kernel sends.

The kernel does a request's work inside ``sendmsg`` and has queued every answer before that call returns. Waiting in an
event loop would add nothing but time, so the socket is a plain one: the caller decides whether the work is small
enough to be done inline or belongs in a worker thread. A socket lives for one conversation with its namespace and may
be used from one thread at a time. (pyroute2's own sockets give every request a number from a pool and lose those of a
failed batch.)

Messages are read with :mod:`struct`: pyroute2's decoder costs 50 µs and more for each, and never returns for the
description of a concatenated set.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from cpm.protocol.errors import KernelError

ROUTE: Final = 0
NETFILTER: Final = 12

REQUEST: Final = 0x1
ACK: Final = 0x4
DUMP: Final = 0x300
REPLACE: Final = 0x100
EXCLUSIVE: Final = 0x200
CREATE: Final = 0x400
APPEND: Final = 0x800

_MULTI_DONE: Final = 3
_ERROR: Final = 2
_INTERRUPTED: Final = 0x10
_HEADER: Final = struct.Struct("=IHHII")
_ATTRIBUTE: Final = struct.Struct("=HH")
_SOL_NETLINK: Final = 270
_CAP_ACK: Final = 10
_EXT_ACK: Final = 11
_GET_STRICT_CHK: Final = 12
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_EXT_ACK_MESSAGE: Final = 1

_SEND_BUFFER: Final = 64 << 20
_RECEIVE_BUFFER: Final = 8 << 20
_READ: Final = 256 << 10
_ATTEMPTS: Final = 5


class Member(NamedTuple):
    """One message of a request: the encoded bytes, and in words what it does."""

    data: bytes
    words: object
    """Its ``str()`` is made only when the kernel refuses the message: there may be tens of thousands of them."""


class Wire:
    """
    A conversation with the kernel of the namespace in which it was opened.

    :param protocol: ``ROUTE`` or ``NETFILTER``.
    :raise KernelError: When no socket can be had.
    """

    def __init__(self, protocol: int) -> None:
        try:
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
            self._socket.bind((0, 0))
        except OSError as error:
            raise KernelError("open a netlink socket", error.errno or 0, os.strerror(error.errno or 0)) from error
        self._sequence = 0
        self._option(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _SEND_BUFFER)
        self._option(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BUFFER)
        self._option(_SOL_NETLINK, _CAP_ACK, 1)
        self._option(_SOL_NETLINK, _EXT_ACK, 1)
        self._option(_SOL_NETLINK, _GET_STRICT_CHK, 1)

    def close(self) -> None:
        """Close the socket; the object is of no use afterwards."""
        self._socket.close()

    def execute(self, members: Sequence[Member], action: str) -> None:
        """
        Send the messages as one, and have the kernel's word for each.

        At least the last message must ask for an answer with ``ACK``; errors come unasked. Numbers are given here.

        :raise KernelError: With the first member that was refused; whether the others stand depends on the protocol.
        """
        first = self._sequence + 1
        self._send(b"".join(self._numbered(member.data) for member in members), action)
        answers = self._answers()
        refused = sorted((sequence, code, words) for sequence, code, words in answers if code and sequence >= first)
        if refused:
            sequence, code, words = refused[0]
            member = members[sequence - first].words
            raise KernelError(action, code, f"{member}: {words or os.strerror(code)}")
        if not any(sequence >= first for sequence, _, _ in answers):
            raise KernelError(action, 0, "the kernel gave no answer")

    def answer_to_last(self, members: Sequence[Member], action: str) -> int:
        """
        Send the messages as one; return the kernel's error number for the last of them, 0 for none.

        :raise KernelError: When they cannot be sent.
        """
        self._send(b"".join(self._numbered(member.data) for member in members), action)
        return next((code for sequence, code, _ in self._answers() if code and sequence == self._sequence), 0)

    def dump(self, request: bytes, action: str) -> list[bytes]:
        """
        Return all messages that answer a request to list, without their netlink headers.

        A list that changed while it was read is read again.

        :raise KernelError: When the kernel refuses, or the list does not hold still.
        """
        for _ in range(_ATTEMPTS):
            self._send(self._numbered(request), action)
            messages, is_consistent = self._listed(action)
            if is_consistent:
                return messages
        raise KernelError(action, errno.EINTR, "the list kept changing while it was read")

    def ask(self, request: bytes, action: str) -> bytes:
        """
        Return the one message that answers a request, without its netlink header.

        :raise KernelError: When the kernel refuses.
        """
        self._send(self._numbered(request), action)
        for kind, _, _, body in self._received():
            if kind == _ERROR:
                code = -int(struct.unpack_from("=i", body)[0])
                raise KernelError(action, code, os.strerror(code))
            return body
        raise KernelError(action, 0, "the kernel gave no answer")

    def _option(self, level: int, name: int, value: int) -> None:
        try:
            self._socket.setsockopt(level, name, value)
        except OSError:
            # Without them: smaller transactions and shorter errors.
            return

    def _numbered(self, data: bytes) -> bytes:
        self._sequence += 1
        return data[:8] + struct.pack("=II", self._sequence, 0) + data[16:]

    def _send(self, data: bytes, action: str) -> None:
        self._drain()
        try:
            self._socket.send(data)
        except OSError as error:
            code = error.errno or 0
            raise KernelError(action, code, os.strerror(code)) from error

    def _drain(self) -> None:
        while self._read():
            pass

    def _read(self) -> bytes:
        try:
            return self._socket.recv(_READ, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        except OSError as error:
            if error.errno == errno.ENOBUFS:
                # Answers were lost; the caller misses the one it needs and says so.
                return b""
            raise

    def _received(self) -> Iterator[tuple[int, int, int, bytes]]:
        while data := self._read():
            yield from _messages(data)

    def _answers(self) -> list[tuple[int, int, str]]:
        found = []
        for kind, flags, sequence, body in self._received():
            if kind == _ERROR:
                found.append((sequence, -int(struct.unpack_from("=i", body)[0]), _reason(flags, body)))
        return found

    def _listed(self, action: str) -> tuple[list[bytes], bool]:
        messages: list[bytes] = []
        is_consistent = True
        while data := self._socket.recv(_READ):
            for kind, flags, _, body in _messages(data):
                is_consistent = is_consistent and not flags & _INTERRUPTED
                if kind == _MULTI_DONE:
                    return messages, is_consistent
                if kind == _ERROR:
                    code = -int(struct.unpack_from("=i", body)[0])
                    raise KernelError(action, code, os.strerror(code))
                messages.append(body)
        raise KernelError(action, 0, "the kernel ended the list early")


def _messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        yield kind, flags, sequence, data[offset + 16 : offset + length]
        offset += length + 3 & ~3


def _reason(flags: int, body: bytes) -> str:
    if not flags & 0x200:  # NLM_F_ACK_TLVS
        return ""
    # With NETLINK_CAP_ACK the offending message is left out; its header stays.
    text = attributes(body, 20).get(_EXT_ACK_MESSAGE, b"")
    return text.rstrip(b"\0").decode("utf-8", "replace")


def attributes(data: bytes, offset: int = 0) -> dict[int, bytes]:
    """Return the attributes from that offset on, by type without the nesting and byte order bits; the last of each."""
    found: dict[int, bytes] = {}
    end = len(data)
    while offset + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4 : offset + length]
        offset += length + 3 & ~3
    return found


def each(data: bytes) -> Iterator[bytes]:
    """Yield the values of a list of attributes, whatever their types."""
    offset = 0
    while offset + 4 <= len(data):
        length, _ = _ATTRIBUTE.unpack_from(data, offset)
        if length < 4:
            return
        yield data[offset + 4 : offset + length]
        offset += length + 3 & ~3


def attribute(kind: int, value: bytes) -> bytes:
    """Return one attribute, padded."""
    return _ATTRIBUTE.pack(len(value) + 4, kind) + value + bytes(-len(value) & 3)


def text(value: bytes) -> str:
    """Return a zero-terminated string."""
    return value.rstrip(b"\0").decode("utf-8", "replace")
