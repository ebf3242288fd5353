"""
What others change on this machine: links, addresses, routes, rules, filters, and our nftables tables.

This says that something changed, not what: whoever listens looks at the machine itself. So any number of notifications
is one piece of news, and it is no harm when the kernel drops some. Our own changes are no news. Format: rtnetlink(7);
an interface that enters or leaves a bridge is among the links. The kernel does not report the IPv4 routes that go with
a link or an address.

Tested in ``tests/unit/natctl/netlink/test_reports.py`` and ``tests/netns/test_changes.py``.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
from typing import Final

from pyroute2.netlink.rtnl import (
    RTM_DELADDR,
    RTM_DELLINK,
    RTM_DELQDISC,
    RTM_DELROUTE,
    RTM_DELRULE,
    RTM_DELTFILTER,
    RTM_NEWADDR,
    RTM_NEWLINK,
    RTM_NEWROUTE,
    RTM_NEWRULE,
    RTM_NEWTFILTER,
    RTMGRP_IPV4_IFADDR,
    RTMGRP_IPV4_ROUTE,
    RTMGRP_IPV4_RULE,
    RTMGRP_LINK,
    RTMGRP_TC,
)

from natctl.netlink.listener import Listener
from natctl.netlink.message import messages
from natctl.netlink.nftables.transactions import Transactions
from natctl.netlink.socket import ROUTE, MessagesLost, Socket


class Subject(enum.Flag):
    """What may have changed."""

    NONE = 0
    TABLES = 1
    """Our nftables tables."""
    ROUTES = 2
    """Routes and rules."""
    ADDRESSES = 4
    LINKS = 8
    FILTERS = 16
    """Filters at interfaces."""
    ALL = 31


_SUBJECTS: Final = {
    RTM_NEWLINK: Subject.LINKS | Subject.ROUTES,
    RTM_DELLINK: Subject.LINKS | Subject.ROUTES,
    RTM_NEWADDR: Subject.ADDRESSES | Subject.ROUTES,
    RTM_DELADDR: Subject.ADDRESSES | Subject.ROUTES,
    RTM_NEWROUTE: Subject.ROUTES,
    RTM_DELROUTE: Subject.ROUTES,
    RTM_NEWRULE: Subject.ROUTES,
    RTM_DELRULE: Subject.ROUTES,
    RTM_NEWTFILTER: Subject.FILTERS,
    RTM_DELTFILTER: Subject.FILTERS,
    RTM_DELQDISC: Subject.FILTERS,
}
_GROUPS: Final = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV4_ROUTE | RTMGRP_IPV4_RULE | RTMGRP_TC
_BUFFER_BYTES: Final = 1 << 18
"""Small: a routing daemon may change a million routes, and that is one piece of news."""
_AT_ONCE: Final = 1000
"""Buffers that are read at once; ours holds about half as many notifications."""


class Changes:
    """
    What others change in this namespace from now on. Close it when done.

    :param rtnl: The socket with which we change routes and rules.
    :param nft: The socket with which we change nftables.
    :raise KernelError: When the kernel gives no such sockets.
    """

    def __init__(self, rtnl: Socket, nft: Socket) -> None:
        self._transactions = Transactions(nft)
        self._seen_touches = 0
        self._listener = Listener(
            ROUTE, "watch links, addresses and routes", groups=_GROUPS, receive_buffer_bytes=_BUFFER_BYTES
        )
        self._listener.ignore(rtnl.port)

    def close(self) -> None:
        """Close the sockets."""
        self._listener.close()
        self._transactions.close()

    async def wait(self) -> None:
        """Wait until others changed something: anything that is listed above, or any nftables table."""
        loop = asyncio.get_running_loop()
        news = loop.create_future()
        files = self._listener.fileno(), self._transactions.fileno()
        for file in files:
            loop.add_reader(file, lambda: None if news.done() else news.set_result(None))
        try:
            await news
        finally:
            for file in files:
                loop.remove_reader(file)

    def take(self) -> Subject:
        """
        Return what may have changed since the last call; never waits.

        :raise KernelError: When a socket fails.
        """
        found = Subject.NONE
        if (touches := self.touches()) != self._seen_touches:
            self._seen_touches = touches
            found = Subject.TABLES
        while True:
            try:
                # Not to the end: while a routing daemon works, there is none.
                for buffer in itertools.islice(self._listener.queued(), _AT_ONCE):
                    found |= subjects_in(buffer)
            except MessagesLost:
                found |= Subject.ALL & ~Subject.TABLES
            else:
                return found

    def touches(self) -> int:
        """As :meth:`natctl.netlink.nftables.transactions.Transactions.touches`."""
        return self._transactions.touches()


def subjects_in(buffer: bytes) -> Subject:
    """Return what the messages of a buffer are about."""
    found = Subject.NONE
    for kind, *_ in messages(buffer):
        found |= _SUBJECTS.get(kind, Subject.NONE)
    return found
