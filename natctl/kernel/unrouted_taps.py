"""
Keeps the kernel from routing what comes from a VM's tap that has left its bridge.

A VM's packets get their mark in the bridge. Those of a tap that somebody took out of it, and gave an address or routes,
would be routed without one: untranslated, like those of any neighbour. So forwarding is off at each tap of a VM
(``net.ipv4.conf.….forwarding``). What a bridge takes from its port comes in at the bridge, where that setting is
another, so this costs no packet anything; and it holds while there is no natd, and when all rules are gone.

A tap that is put into a VRF afterwards is not routed either: although its packets come in at the VRF, the setting that
counts is the port's (ip_rcv_finish, net/ipv4/ip_input.c; tried on Linux 6.1).

A tap that is in no bridge when its VM starts is left as it is: its VM may have another interface that is in one.

Tested by ``tests/netns/test_leaks.py``.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterable, Mapping, Set

from cpm.protocol.errors import KernelError
from natctl.netlink.links import Link, read_link, set_forwarding
from natctl.netlink.socket import Socket


class UnroutedTaps:
    """The taps of VMs from which nothing is routed."""

    def __init__(self) -> None:
        self._kept: set[int] = set()

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._kept)

    def update(self, rtnl: Socket, links: Mapping[int, Link], taps: Set[int]) -> None:
        """
        Have nothing routed from these taps, given by index, and set those back that are no VM's any more.

        :param links: All interfaces.
        :raise KernelError: When the kernel refuses.
        """
        for tap in taps & links.keys():
            _keep(rtnl, links[tap])
            if links[tap].is_bridge_port:
                self._kept.add(tap)
        for former in self._kept - taps:
            self._kept.discard(former)
            if former in links:
                _set(rtnl, former, on=True)


def keep(rtnl: Socket, taps: Iterable[int]) -> None:
    """Have nothing routed from these taps; where that fails, :meth:`UnroutedTaps.update` is to try again."""
    for tap in taps:
        with contextlib.suppress(KernelError):
            _keep(rtnl, read_link(rtnl, tap))


def release(rtnl: Socket, taps: Iterable[int]) -> None:
    """Have what comes from these taps routed again. :raise KernelError: When the kernel refuses."""
    for tap in taps:
        _set(rtnl, tap, on=True)


def _keep(rtnl: Socket, tap: Link) -> None:
    if tap.is_bridge_port and tap.forwards:
        _set(rtnl, tap.number, on=False)


def _set(rtnl: Socket, tap: int, *, on: bool) -> None:
    try:
        set_forwarding(rtnl, tap, on=on)
    except KernelError as error:
        if error.errno != errno.ENODEV:
            raise
