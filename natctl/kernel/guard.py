"""
The guard: a program at the egress of uplinks that lets nothing of VMs out untranslated, and sends the rest to edges.

It is there for the moment in which the rules of nftables are not, because somebody flushed them. So it must not depend
on them: of an edge it knows the internal pool, and on a host what VMs send is marked at their taps
(:mod:`natctl.kernel.tap_marks`).

Tested by ``tests/netns/test_fast_path.py`` and ``tests/netns/test_host_guard.py``.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Collection
from ipaddress import IPv4Network
from typing import Final, NamedTuple

from cpm.protocol.errors import KernelError
from natctl.bpf.loading import Loaded, NoObject
from natctl.kernel.attached import Attached
from natctl.model.entries import FastPathUse, Settings
from natctl.netlink.classifiers import Side
from natctl.netlink.links import read_links
from natctl.netlink.socket import Socket
from natctl.ruleset.marks import Marks
from natctl.ruleset.next_hop import MOST_EDGES, MOST_GATEWAYS, NextHops
from natctl.ruleset.owner_tables import MOST_INTERFACES

PROGRAM: Final = "guard"
_UNSPEC, _OK = -1, 0  # TC_ACT_…: on to the next filter; past all of them


class _Constants(NamedTuple):
    """What the program takes as constant."""

    pool: IPv4Network
    flag: int
    """Of the mark; 0: no host."""
    owner: int
    """The bits of the mark that stay when a packet was translated."""
    edge: tuple[int, ...]
    """Uplinks of an edge, by index."""
    hops: NextHops | None
    """Of what a host has translated; None: it goes where it was routed."""

    def packed(self, passes: int) -> bytes:
        """:param passes: What the program returns for a packet that goes on."""
        interface, edges, gateways = self.hops if self.hops is not None else (0, (), ())
        numbers = struct.pack("=4I", self.flag, self.owner, interface, len(edges))
        addresses = b"".join(edge.packed for edge in edges).ljust(4 * MOST_EDGES, b"\0")
        uplinks = struct.pack(f"={MOST_INTERFACES}I", *self.edge, *[0] * (MOST_INTERFACES - len(self.edge)))
        others = b"".join(each.ljust(8, b"\0") for each in gateways[:MOST_GATEWAYS]).ljust(8 * MOST_GATEWAYS, b"\0")
        network = self.pool.network_address.packed + self.pool.netmask.packed
        return network + numbers + addresses + others + uplinks + struct.pack("=i4x", passes)


class Guard:
    """
    The program; nothing before the first :meth:`ensure`.

    :param settings: The roles of this machine.
    """

    def __init__(self, settings: Settings) -> None:
        edge, host = settings.edge, settings.host
        self._edge = edge.uplinks if edge is not None and edge.fast_path is FastPathUse.AUTO else frozenset()
        self._host, self._flag, self._owner = frozenset[str](), 0, 0
        if host is not None and host.fast_path is FastPathUse.AUTO:
            marks = Marks.of_mask(host.mark_mask)
            self._host, self._flag, self._owner = host.uplinks, marks.flag, marks.mask ^ marks.flag
        self._attached = Attached(Side.EGRESS, PROGRAM)
        self._constants: _Constants | None = None
        self._loaded: tuple[Loaded, Loaded] | None = None
        """As a filter, and at tcx before it, where it decides for the filter too."""
        self._dropped_before = 0
        self.reason = ""
        """Why it could not be had, when it was wanted last."""

    def ensure(
        self, rtnl: Socket, pool: IPv4Network, hops: NextHops | None = None, *, shares_pool: bool
    ) -> tuple[str, ...]:
        """
        Have it at all uplinks.

        At an edge it lets internal addresses out where this machine or its neighbours have such addresses themselves.
        Without an object file, or when the kernel refuses to load it, there is none.

        :param hops: Where it sends what a host has translated.
        :return: What others had changed, one line each.
        :raise KernelError: When a program cannot be removed although it must be.
        """
        edge_names: Collection[str] = () if shares_pool else self._edge
        links = [link for link in read_links(rtnl).values() if link.name in {*edge_names, *self._host}]
        at_edge = tuple(sorted(link.number for link in links if link.name in edge_names))
        if not links or len(at_edge) > MOST_INTERFACES:
            self.withdraw(rtnl)
            return ()
        constants, former = _Constants(pool, self._flag, self._owner, at_edge, hops), self._loaded
        try:
            if former is None or self._constants != constants:
                self._load(constants)
            assert self._loaded is not None
            as_filter, ahead = self._loaded
            missing = self._attached.put(rtnl, links, as_filter, ahead)
        except (KernelError, NoObject, ValueError) as error:
            self.reason = str(error)
            self.withdraw(rtnl)
            return ()
        self._attached.remove_from_rest(rtnl, {link.number for link in links})
        return tuple(f"the guard at {name} was missing" for name in missing) if self._loaded is former else ()

    def is_sending(self, hops: NextHops) -> bool:
        """Whether it is in force, and sends what a host has translated there."""
        return self._loaded is not None and self._constants is not None and self._constants.hops == hops

    @property
    def dropped(self) -> int:
        """
        How many packets it has dropped since this natd started.

        :raise KernelError: When it cannot be read.
        """
        return self._dropped_before + sum(each.total("dropped") for each in self._loaded or ())

    def withdraw(self, rtnl: Socket) -> None:
        """Remove it from all interfaces. :raise KernelError: When the kernel refuses."""
        self._attached.remove_from_rest(rtnl, ())
        self.close()

    def close(self) -> None:
        """Let go of it; the kernel keeps what it runs."""
        self._attached.close()
        self._let_go()

    def _let_go(self) -> None:
        if self._loaded is not None:
            self._dropped_before = self.dropped
            for each in self._loaded:
                each.close()
        self._loaded = None

    def _load(self, constants: _Constants) -> None:
        with contextlib.ExitStack() as undo:
            as_filter, ahead = (
                undo.enter_context(Loaded(PROGRAM, constants.packed(passes), {})) for passes in (_UNSPEC, _OK)
            )
            undo.pop_all()
        self._let_go()
        self._loaded, self._constants = (as_filter, ahead), constants
