"""
Notices when somebody else changes our nftables tables (``NFNLGRP_NFTABLES``).

The kernel tells each table, chain, rule, set and element that a transaction changed, with the name of the table, and at
the end the new generation. Other programs may make a hundred transactions a second with tables of theirs: these cost
a search for our table's name. Format: linux/netfilter/nf_tables.h; ``nft_commit_notify`` in
net/netfilter/nf_tables_api.c.

Tested in ``tests/unit/natctl/netlink/test_reports.py`` and ``tests/netns/test_changes.py``.
"""

from __future__ import annotations

import threading
from typing import Final

from pyroute2.netlink.nfnetlink import NFNL_SUBSYS_NFTABLES

from natctl.netlink.listener import Listener
from natctl.netlink.message import NFGENMSG_BYTES, MalformedMessage, attribute_map, messages, terminated
from natctl.netlink.nftables.schema import TABLE_NAME
from natctl.netlink.socket import NETFILTER, MessagesLost, Socket
from natctl.ruleset.values import TABLE, Family

_GROUP: Final = 1 << 6  # NFNLGRP_NFTABLES is 7
_NAME: Final = terminated(TABLE)
_BUFFER_BYTES: Final = 8 << 20
"""A firewall that is loaded anew has some ten thousand elements."""


class Transactions:
    """
    The transactions of others in this namespace, from now on. Close it when done.

    :param own: The socket with which we make ours.
    :raise KernelError: When the kernel gives no such socket.
    """

    def __init__(self, own: Socket) -> None:
        self._touches = 0
        self._lock = threading.Lock()
        action = "watch the nftables tables"
        self._listener = Listener(NETFILTER, action, groups=_GROUP, receive_buffer_bytes=_BUFFER_BYTES, is_forced=True)
        self._listener.ignore(own.port)

    def close(self) -> None:
        """Close the socket."""
        self._listener.close()

    def fileno(self) -> int:
        """Return the file descriptor, to wait until there was a transaction."""
        return self._listener.fileno()

    def touches(self) -> int:
        """
        Return a number that is greater once others changed our tables, or may have: notifications were lost.

        Never waits. May be called in any thread.

        :raise KernelError: When the socket fails.
        """
        with self._lock:
            while True:
                try:
                    for buffer in self._listener.queued():
                        self._touches += _NAME in buffer and names_our_tables(buffer)
                except MessagesLost:
                    self._touches += 1
                else:
                    return self._touches


def names_our_tables(buffer: bytes) -> bool:
    """Return whether any message of a buffer is about one of our tables, or in one; one that is cut off may be."""
    try:
        return any(
            kind >> 8 == NFNL_SUBSYS_NFTABLES
            and start + NFGENMSG_BYTES <= end
            and buffer[start] in _FAMILIES
            and attribute_map(buffer[start:end], NFGENMSG_BYTES).get(TABLE_NAME) == _NAME
            for kind, _, _, start, end in messages(buffer)
        )
    except MalformedMessage:
        return True


_FAMILIES: Final = frozenset(int(family) for family in Family)
