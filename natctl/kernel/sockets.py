"""
The netlink sockets of a kernel: each is used by one thread at a time, so what may go on at once has its own.

Tested by ``tests/netns/test_kernel.py``.
"""

from __future__ import annotations

from natctl.netlink.changes import Changes
from natctl.netlink.socket import NETFILTER, ROUTE, Socket


class Sockets:
    """
    Opened in the network namespace of the calling thread. Close them when done.

    :raise KernelError: When the kernel gives no such sockets.
    """

    def __init__(self) -> None:
        self.nft = Socket(NETFILTER, "reach nftables")
        """For changes; and for reading what no change may come between."""
        self.rt = Socket(ROUTE, "reach the routing tables")
        self.nft_checks = Socket(NETFILTER, "reach nftables")
        """For looking while changes go on."""
        self.rt_checks = Socket(ROUTE, "reach the routing tables")
        self.nft_counters = Socket(NETFILTER, "reach nftables")
        """For counters, while changes and checks go on."""
        self.changes = Changes(self.rt, self.nft)

    def close(self) -> None:
        """Close all of them."""
        for each in (self.nft, self.rt, self.nft_checks, self.rt_checks, self.nft_counters, self.changes):
            each.close()
