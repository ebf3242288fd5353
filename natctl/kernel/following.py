"""
Programs the hardware addresses of an edge's hosts, as the neighbour table has them.

Tested by ``tests/netns/test_senders.py``.
"""

from __future__ import annotations

from natctl.kernel.programmed import Programmed
from natctl.kernel.senders import fragments as chains_of_hosts
from natctl.kernel.sockets import Sockets
from natctl.netlink.nftables import read
from natctl.ruleset import plan, senders


def check(kernel: Programmed) -> None:
    """Do both, and note which hosts are unknown. :raise KernelError: When the kernel cannot be read or refuses."""
    follow(kernel)
    renew(kernel)
    kernel.senders.note_unknown()


def follow(kernel: Programmed) -> None:
    """
    Program what the neighbour table has of the hosts now.

    :raise KernelError: When the kernel cannot be read or refuses.
    """
    sockets = kernel.sockets()
    if (belief := kernel.belief) is None:
        _adopt(kernel, sockets)
        return
    known = kernel.known_senders(sockets.rt, belief.desired)
    before, after = kernel.senders.news(known)
    tables = plan.alteration(before, after)
    if tables.operations:
        kernel.apply(tables)
        kernel.senders.on_programmed(known)
        kernel.fast_path.note_hosts(known)


def renew(kernel: Programmed) -> None:
    """
    Let the kernel compare hardware addresses for some time.

    :raise KernelError: When the kernel cannot be read or refuses.
    """
    if not kernel.senders.is_checking or (kernel.belief is None and not kernel.senders.has_hosts):
        return
    elements = senders.following(kernel.senders.interfaces(kernel.sockets().rt))
    tables = plan.refill([senders.FOLLOWING], [(senders.FOLLOWING, element) for element in elements])
    kernel.apply(tables)


def _adopt(kernel: Programmed, sockets: Sockets) -> None:
    """Do so for the hosts that a former natd programmed."""
    holdings = read.read_tables(sockets.nft, kernel.state_of_tables).holdings
    if senders.FOLLOWING not in holdings.sets:
        return
    known = kernel.senders.read(sockets.rt, senders.hosts_in(holdings))
    tables = plan.exchange(chains_of_hosts(known), holdings)
    kernel.apply(tables)
    kernel.senders.replace(known)
