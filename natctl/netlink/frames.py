"""
Netlink messages as bytes, for readings of thousands of objects.

pyroute2 decodes an entry in 50-230 us; a bulk reading that takes a few fields out of each needs 1-2 us. What is not
bulk, nftables and routes, goes through pyroute2. Format: linux/netlink.h, and netlink(7).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator

from cpm.protocol.errors import KernelError

NLM_F_REQUEST = 0x1
NLM_F_ACK = 0x4
NLM_F_DUMP_INTR = 0x10
NLM_F_DUMP = 0x300
NLMSG_ERROR = 2
NLMSG_DONE = 3
NLA_F_NESTED = 0x8000
NLA_TYPE_MASK = 0x3FFF
SOL_NETLINK = 270
NETLINK_CAP_ACK = 10

HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence, port id."""
_ATTRIBUTE = struct.Struct("=HH")
_ERRNO = struct.Struct("=i")

_RECEIVE_BYTES = 1 << 16
"""The kernel fills messages of up to 32 KiB when it sees that the reader has room (net/netlink/af_netlink.c)."""

Frame = tuple[bytes, int, int]
"""A message in a buffer: the buffer, where its body starts (after the header), where it ends."""


class DumpInterrupted(Exception):
    """What was being listed changed in a way that lets the listing miss objects; list again."""


def aligned(length: int) -> int:
    """Round up to netlink's 4 bytes."""
    return (length + 3) & ~3


def attribute(kind: int, payload: bytes) -> bytes:
    """Pack one attribute, padded."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Pack attributes within an attribute."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes))


def attributes(buffer: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the type, start and end of the payload of every attribute between two offsets; stop at nonsense."""
    while start + 4 <= end:
        length, kind = _ATTRIBUTE.unpack_from(buffer, start)
        if length < 4 or start + length > end:
            return
        yield kind & NLA_TYPE_MASK, start + 4, start + length
        start += aligned(length)


def bodies(buffer: bytes, kind: int, header: int) -> Iterator[tuple[int, int]]:
    """
    Yield where the attributes of every message of one type begin and end; stop at nonsense.

    :param header: Bytes between the netlink header and the attributes.
    """
    offset = 0
    while offset + HEADER.size <= len(buffer):
        length, found, _, _, _ = HEADER.unpack_from(buffer, offset)
        end = offset + length
        if length < HEADER.size or end > len(buffer):
            return
        if found == kind:
            yield offset + HEADER.size + header, end
        offset += aligned(length)


def error_in(buffer: bytes) -> int:
    """Return the error number that the kernel answers with, 0 for none."""
    _, kind, _, _, _ = HEADER.unpack_from(buffer)
    return -int(_ERRNO.unpack_from(buffer, HEADER.size)[0]) if kind == NLMSG_ERROR else 0


class Channel:
    """
    One netlink socket for a few requests, to be used as a context manager by one thread at a time.

    It belongs to the network namespace of the thread that made it, whichever thread uses it.

    :param protocol: ``NETLINK_ROUTE`` or another of linux/netlink.h.
    :param action: What it is for, to complete the sentence "cannot …" of a :class:`KernelError`.
    :param timeout_s: Longest wait for one answer of the kernel.
    :raise KernelError: When the kernel gives no such socket.
    """

    def __init__(self, protocol: int, action: str, *, timeout_s: float = 10.0) -> None:
        self._action = action
        self._sequence = 0
        with self._explained():
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
            self._socket.settimeout(timeout_s)
            self._socket.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)  # an error does not quote the whole request
            self._socket.bind((0, 0))

    def error(self, code: int, detail: str | None = None) -> KernelError:
        """Return, not raise, the error that says what this channel was for."""
        return KernelError(self._action, code, detail or os.strerror(code))

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def dump(self, kind: int, body: bytes) -> Iterator[Frame]:
        """
        Ask for a listing and yield every message of the answer.

        A dump is paced by its reader, so it does not overflow the socket; read it to its end.

        :raise DumpInterrupted: At the end, when objects may be missing in what was yielded.
        :raise KernelError: When the kernel refuses, does not answer in time, or breaks off.
        """
        sequence = self._send(kind, NLM_F_DUMP, body)
        interrupted = False
        while True:
            buffer = self._receive()
            size, offset = len(buffer), 0
            while offset + 16 <= size:
                length, message, flags, answered, _ = HEADER.unpack_from(buffer, offset)
                end = offset + length
                if length < 16 or end > size:
                    raise self.error(errno.EBADMSG, "the kernel's answer is cut off")
                if answered == sequence:
                    interrupted |= bool(flags & NLM_F_DUMP_INTR)
                    if message in (NLMSG_DONE, NLMSG_ERROR):
                        self._check(buffer, offset + 16, end)
                        if interrupted:
                            raise DumpInterrupted
                        return
                    yield buffer, offset + 16, end
                offset += aligned(length)

    def execute(self, kind: int, bodies: list[bytes]) -> list[int]:
        """
        Send requests of one type in one go and return the kernel's answer to each, in order: 0 or an error number.

        The answers must fit the socket: send at most a hundred at a time.

        :raise KernelError: When the kernel does not answer in time.
        """
        first = self._sequence + 1
        packed = [self._pack(kind, NLM_F_ACK, body) for body in bodies]
        with self._explained():
            self._socket.send(b"".join(packed))
        answers: dict[int, int] = {}
        while len(answers) < len(bodies):
            buffer = self._receive()
            offset = 0
            while offset + 20 <= len(buffer):
                length, message, _, answered, _ = HEADER.unpack_from(buffer, offset)
                if message == NLMSG_ERROR and answered >= first:
                    answers[answered] = -_ERRNO.unpack_from(buffer, offset + 16)[0]
                offset += max(aligned(length), 16)
        return [answers[first + position] for position in range(len(bodies))]

    def _pack(self, kind: int, flags: int, body: bytes) -> bytes:
        self._sequence += 1
        return HEADER.pack(16 + len(body), kind, NLM_F_REQUEST | flags, self._sequence, 0) + body

    def _send(self, kind: int, flags: int, body: bytes) -> int:
        with self._explained():
            self._socket.send(self._pack(kind, flags, body))
        return self._sequence

    def _receive(self) -> bytes:
        with self._explained():
            buffer = self._socket.recv(_RECEIVE_BYTES)
        if not buffer:
            raise self.error(errno.EPIPE)
        return buffer

    def _check(self, buffer: bytes, start: int, end: int) -> None:
        """Raise when a final message carries an error: NLMSG_DONE does, when a dump breaks off half-way."""
        code = -_ERRNO.unpack_from(buffer, start)[0] if end - start >= _ERRNO.size else 0
        if code > 0:
            raise self.error(code)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError as error:
            raise self.error(errno.ETIMEDOUT, "the kernel does not answer") from error
        except OSError as error:
            raise self.error(error.errno or errno.EIO) from error


def native_u32(value: int) -> bytes:
    """Pack a number of the host's own byte order."""
    return value.to_bytes(4, sys.byteorder)


def network_u32(value: int) -> bytes:
    """Pack a number of network byte order, as nfnetlink has them."""
    return value.to_bytes(4, "big")
