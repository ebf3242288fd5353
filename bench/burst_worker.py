"""
``python -m bench.burst_worker``: a witness or a client in a namespace, for :mod:`bench.burst` only.

Moments are of CLOCK_MONOTONIC, which all processes of a machine share.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from typing import Final

from bench.worker import answer_lines
from natctl.netlink.message import attribute_map, netfilter_bodies, text

_NETLINK_NETFILTER, _SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES = 12, 270, 1, 7
_NEW_SET_ELEMENT: Final = 10 << 8 | 12  # NFNL_SUBSYS_NFTABLES, NFT_MSG_NEWSETELEM
_SET_NAME: Final = 2  # NFTA_SET_ELEM_LIST_SET
_RECEIVE_BYTES: Final = 1 << 18


class _Here:
    """State kept between calls."""

    def __init__(self) -> None:
        self._notifications: list[tuple[float, str]] = []
        self._open: list[socket.socket] = []

    def watch(self) -> None:
        """Start recording notifications of elements added to sets and maps of this namespace."""
        listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        listener.bind((0, 0))
        listener.setsockopt(_SOL_NETLINK, _NETLINK_ADD_MEMBERSHIP, _NFNLGRP_NFTABLES)
        threading.Thread(target=self._listen, args=(listener,), daemon=True).start()

    def take_notifications(self) -> list[tuple[float, str]]:
        """Return and clear the recorded notifications: moment, and name of the set or map."""
        notifications, self._notifications = self._notifications, []
        return notifications

    def connect(self, address: str, port: int, count: int) -> float:
        """
        Begin ``count`` connections, one right after the other.

        :return: The moment before the last one's SYN.
        """
        for _ in range(count):
            client = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            self._open.append(client)
            moment = time.monotonic()
            with contextlib.suppress(BlockingIOError):
                client.connect((address, port))
        return moment

    def close(self) -> None:
        """Reset the connections."""
        for client in self._open:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()
        self._open.clear()

    def _listen(self, listener: socket.socket) -> None:
        while True:
            buffer = listener.recv(_RECEIVE_BYTES)
            moment = time.monotonic()
            self._notifications += [(moment, name) for name in dict.fromkeys(_sets_in(buffer))]


def _sets_in(buffer: bytes) -> list[str]:
    parts = (attribute_map(buffer[start:end]) for start, end in netfilter_bodies(buffer, _NEW_SET_ELEMENT))
    return [text(part[_SET_NAME]) for part in parts if _SET_NAME in part]


if __name__ == "__main__":
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    here = _Here()
    answer_lines(lambda name, arguments: getattr(here, name)(*arguments))
