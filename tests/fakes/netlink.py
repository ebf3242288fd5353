"""
The kernel's end of a netlink socket: what a test has the kernel answer, and what it was sent.

The product opens its sockets as always; while :func:`kernel_end` lasts, the system gives it one end of a socket pair.
That the kernel frames its answers as :func:`message`, :func:`done` and :func:`ack` do is shown by
``tests/unit/natctl/netlink/test_kernel_end.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from pyroute2.netlink import NLMSG_DONE, NLMSG_ERROR

from natctl.netlink.message import HEADER, attribute

MULTI, CAPPED, EXPLAINED = 2, 0x100, 0x200  # NLM_F_MULTI, NLM_F_CAPPED, NLM_F_ACK_TLVS


def message(kind: int, body: bytes, *, flags: int = 0, sequence: int = 1) -> bytes:
    """Pack one message of the kernel."""
    return HEADER.pack(16 + len(body), kind, flags, sequence, 0) + body + bytes(-len(body) % 4)


def done(code: int = 0, words: str = "", *, sequence: int = 1) -> bytes:
    """Pack the end of a list: the error number, and an explanation if any."""
    explanation = _explanation(words)
    flags = MULTI | (EXPLAINED if words else 0)
    return message(NLMSG_DONE, struct.pack("=i", -code) + explanation, flags=flags, sequence=sequence)


def ack(sequence: int, code: int = 0, words: str = "") -> bytes:
    """Pack the answer to one request: the error number, the header of the request, and an explanation if any."""
    body = struct.pack("=i", -code) + bytes(HEADER.size) + _explanation(words)
    flags = CAPPED | (EXPLAINED if words else 0)
    return message(NLMSG_ERROR, body, flags=flags, sequence=sequence)


def _explanation(words: str) -> bytes:
    return attribute(1, words.encode() + b"\0") if words else b""


class _OurEnd(socket.socket):
    """What the product gets for a netlink socket."""

    def __init__(self, pair: socket.socket) -> None:
        super().__init__(fileno=pair.detach())
        self.reads_until_overflow: int | None = None

    def bind(self, address: object, /) -> None:
        """A netlink socket is bound to a port; one of a pair has no address."""

    def recv(self, size: int, flags: int = 0, /) -> bytes:
        if self.reads_until_overflow == 0:
            self.reads_until_overflow = None
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        if self.reads_until_overflow is not None:
            self.reads_until_overflow -= 1
        return super().recv(size, flags)


class KernelEnd(socket.socket):
    """The other end; what it sends is what the kernel answers or reports."""

    def __init__(self, ours: _OurEnd, pair: socket.socket) -> None:
        super().__init__(fileno=pair.detach())
        self.settimeout(5)
        self._ours = ours

    def overflow(self, after: int = 0) -> None:
        """Tell the reader once, after so many buffers, that messages were dropped; those that are queued stay."""
        self._ours.reads_until_overflow = after


@contextlib.contextmanager
def kernel_end() -> Iterator[KernelEnd]:
    """Be the kernel to the netlink socket that is opened meanwhile."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    end = _OurEnd(ours)

    class Opened(socket.socket):
        def __new__(cls, family: int = -1, *_: object, **__: object) -> socket.socket:  # type: ignore[misc]
            return end if family == socket.AF_NETLINK else super().__new__(cls)

    with pytest.MonkeyPatch.context() as system, KernelEnd(end, theirs) as kernel, end:
        system.setattr(socket, "socket", Opened)
        yield kernel
