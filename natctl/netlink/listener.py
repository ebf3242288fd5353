"""
Netlink sockets that receive the kernel's notifications, for use with asyncio.

Tested in ``tests/unit/natctl/netlink/test_socket.py``.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from typing import Final

from pyroute2.netlink import NLMSG_ERROR

from natctl.netlink.message import Request, messages, numbered
from natctl.netlink.socket import (
    RECEIVE_BYTES,
    SO_RCVBUFFORCE,
    MessagesLost,
    as_kernel_error,
    opened,
    read_answer,
    set_option,
)

_SO_ATTACH_FILTER: Final = 26
_INSTRUCTION: Final = struct.Struct("=HBBI")
"""``struct sock_filter`` (linux/filter.h)"""
_PROGRAM: Final = struct.Struct("@HP")
"""``struct sock_fprog``"""
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_SENDER_OFFSET: Final = 12
"""Of ``nlmsg_pid`` in ``struct nlmsghdr``."""


class Listener:
    """
    A socket that receives the kernel's notifications, for use with asyncio. Close it when done.

    :param protocol: As for :class:`Socket`.
    :param action: As for :class:`Socket`.
    :param groups: Multicast groups to join, as a bit mask.
    :param configuration: Requests, each with ``NLM_F_ACK``, that select what is reported.
    :param receive_buffer_bytes: Size of the receive buffer; 0: the system's default.
    :param is_forced: Whether it may exceed the system's limit (``net.core.rmem_max``).
    :raise KernelError: When the kernel gives no such socket or refuses the configuration (EPERM, EBUSY: another process
        has the group or queue).
    """

    def __init__(
        self,
        protocol: int,
        action: str,
        *,
        groups: int = 0,
        configuration: Sequence[Request] = (),
        receive_buffer_bytes: int = 0,
        is_forced: bool = False,
    ) -> None:
        self._action = action
        self._has_lost = False
        self._early: list[bytes] = []
        try:
            self._socket = opened(protocol)
        except OSError as error:
            raise as_kernel_error(action, error) from error
        try:
            if receive_buffer_bytes:
                name = SO_RCVBUFFORCE if is_forced else socket.SO_RCVBUF
                set_option(self._socket, socket.SOL_SOCKET, name, receive_buffer_bytes)
            self._socket.bind((0, groups))
            for request in configuration:
                self._configure(request)
            self._socket.settimeout(0)  # asyncio waits for it
        except OSError as error:
            self._socket.close()
            raise as_kernel_error(action, error) from error

    def close(self) -> None:
        """Close the socket; the kernel reports no more."""
        self._socket.close()

    async def receive(self, limit: int = 1) -> list[bytes]:
        """
        Wait for notifications.

        :param limit: Return up to this many buffers if more than one is queued.
        :return: One or more buffers, each with one or more messages.
        :raise MessagesLost: When the kernel dropped notifications; those before have been returned. Go on receiving.
        :raise KernelError: When the socket fails.
        """
        if self._has_lost:
            self._has_lost = False
            raise MessagesLost(self._action)
        if self._early:
            early, self._early = self._early, []
            return early
        buffers: list[bytes] = []
        try:
            buffers.append(await asyncio.get_running_loop().sock_recv(self._socket, RECEIVE_BYTES))
            while len(buffers) < limit:
                buffers.append(self._socket.recv(RECEIVE_BYTES))
        except BlockingIOError:
            pass
        except OSError as error:
            if error.errno != errno.ENOBUFS or not buffers:
                raise as_kernel_error(self._action, error) from error
            self._has_lost = True
        return buffers

    def fileno(self) -> int:
        """Return the file descriptor, to wait until there are notifications."""
        return self._socket.fileno()

    def ignore(self, sender: int) -> None:
        """
        Have the kernel leave out, from now on, what one socket changed.

        :param sender: Its :attr:`Socket.port`.
        :raise KernelError: When the kernel takes no filter.
        """
        # The kernel loads words in network byte order; nlmsg_pid is in that of the machine. Messages that share a
        # buffer come from one transaction, so the first tells for all.
        program = b"".join(_INSTRUCTION.pack(*each) for each in (
            (_LOAD_WORD, 0, 0, _SENDER_OFFSET),
            (_JUMP_IF_EQUAL, 0, 1, socket.htonl(sender)),
            (_RETURN, 0, 0, 0),
            (_RETURN, 0, 0, 0xFFFFFFFF),
        ))  # fmt: skip
        instructions = ctypes.create_string_buffer(program, len(program))
        filter_ = _PROGRAM.pack(len(program) // _INSTRUCTION.size, ctypes.addressof(instructions))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)
        except OSError as error:
            raise as_kernel_error(self._action, error) from error

    def queued(self) -> Iterator[bytes]:
        """
        Yield the buffers that are queued, without waiting for more.

        :raise MessagesLost: When the kernel dropped notifications; go on, more may be queued.
        :raise KernelError: When the socket fails.
        """
        while True:
            try:
                buffer = self._socket.recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                raise as_kernel_error(self._action, error) from error
            yield buffer

    def send(self, requests: Sequence[bytes]) -> None:
        """
        Send requests without ``NLM_F_ACK``, as one batch.

        :raise KernelError: When they cannot be sent.
        """
        try:
            self._socket.send(numbered(requests, 1))
        except OSError as error:
            raise as_kernel_error(self._action, error) from error

    def _configure(self, request: Request) -> None:
        self._socket.send(numbered([request.data], 1))
        while True:
            buffer = self._socket.recv(RECEIVE_BYTES)
            codes = [
                read_answer(buffer, start, end)[0] for kind, _, _, start, end in messages(buffer) if kind == NLMSG_ERROR
            ]
            if not codes:
                # Notifications that the first request selected may come before the answer to the second.
                self._early.append(buffer)
            elif codes[0]:
                raise OSError(codes[0], os.strerror(codes[0]))
            else:
                return
