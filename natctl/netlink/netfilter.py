"""
A netfilter socket on which the kernel speaks by itself: of one group of NFLOG, or one queue of NFQUEUE.

What it is to say, and how much, is asked for when the socket is made. A group or a queue has one listener in a network
namespace; others, and whoever listens to them, are not touched.

Source: linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence

from cpm.protocol.errors import KernelError
from natctl.netlink.frames import HEADER, NLM_F_ACK, NLM_F_REQUEST, bodies, error_in
from natctl.netlink.wire import NETFILTER

_NFGENMSG = struct.Struct("!BBH")
_RECEIVE_BYTES = 1 << 16
_SO_RCVBUFFORCE = 33


class Listener:
    """
    Our end of a group or a queue, from when it is made; close it when done.

    :param number: Of the group or queue; the caller's network namespace counts.
    :param action: What it is for, to complete the sentence "cannot …" of a :class:`KernelError`.
    :param kind: Type of the messages that configure it.
    :param configuration: Attributes of each of them, in order.
    :param buffer_bytes: What the kernel may have to say before we listen.
    :param is_urgent: Whether that may be more than the system allows everybody (``net.core.rmem_max``).
    :raise KernelError: When somebody else has it (EPERM, EBUSY), or the kernel gives no socket.
    """

    def __init__(
        self,
        number: int,
        action: str,
        kind: int,
        configuration: Sequence[bytes],
        *,
        buffer_bytes: int,
        is_urgent: bool = False,
    ) -> None:
        self._number = number
        self._action = action
        with self._explained():
            self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETFILTER)
        with contextlib.ExitStack() as undo, self._explained():
            undo.callback(self._socket.close)
            self._make_room(buffer_bytes, is_urgent=is_urgent)
            self._socket.bind((0, 0))
            for attributes in configuration:
                self._configure(kind, attributes)
            self._socket.settimeout(0)  # asyncio waits for it
            undo.pop_all()

    def close(self) -> None:
        """Give it back."""
        self._socket.close()

    async def heard(self, most: int = 1) -> list[bytes] | None:
        """
        Wait for what the kernel says next; None when it had to drop something.

        :param most: How many messages are taken when more than one is there.
        :raise KernelError: When the socket fails.
        """
        buffers: list[bytes] = []
        with self._explained():
            try:
                buffers.append(await asyncio.get_running_loop().sock_recv(self._socket, _RECEIVE_BYTES))
                with contextlib.suppress(BlockingIOError):
                    while len(buffers) < most:
                        buffers.append(self._socket.recv(_RECEIVE_BYTES))
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                # What was there before is not lost with it.
                return buffers or None
            return buffers

    def say(self, kind: int, several: Sequence[bytes]) -> None:
        """
        Send messages of one type, as one; nobody answers.

        :param several: Attributes of each.
        :raise KernelError: When the kernel does not take them.
        """
        with self._explained():
            self._socket.send(b"".join(self._message(kind, attributes) for attributes in several))

    def _make_room(self, buffer_bytes: int, *, is_urgent: bool) -> None:
        if not is_urgent:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
            return
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)

    def _configure(self, kind: int, attributes: bytes) -> None:
        self._socket.send(self._message(kind, attributes, NLM_F_ACK))
        if code := error_in(self._socket.recv(_RECEIVE_BYTES)):
            raise OSError(code, os.strerror(code))

    def _message(self, kind: int, attributes: bytes, flags: int = 0) -> bytes:
        size = HEADER.size + _NFGENMSG.size + len(attributes)
        head = HEADER.pack(size, kind, NLM_F_REQUEST | flags, 1, 0)
        return head + _NFGENMSG.pack(socket.AF_INET, 0, self._number) + attributes

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            code = error.errno or errno.EIO
            raise KernelError(self._action, code, os.strerror(code)) from error


def packets_in(buffer: bytes, kind: int) -> Iterator[tuple[int, int]]:
    """Yield where the attributes of every packet that is spoken of begin and end; stop at nonsense."""
    return bodies(buffer, kind, _NFGENMSG.size)
