"""
A program at the tap of each VM of a host, which marks what the VM sends before nftables does.

The rules take the mark away from all that may leave, and the guard (:mod:`natctl.kernel.guard`) drops what still has it
at an uplink. So while somebody has removed the rules, nothing of a VM leaves until natd has put them back; packets of
everybody else leave as they always did. Connections go on when the rules are there again.

The program stays at a tap when natd ends, as the rules do; the next natd puts its own in the place.

Tested by ``tests/netns/test_host_guard.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import Final

from cpm.protocol.errors import KernelError
from natctl.bpf.loading import Loaded, NoObject
from natctl.model.entries import FastPathUse, HostSettings
from natctl.netlink import classifiers
from natctl.netlink.changes import Subject
from natctl.netlink.classifiers import Side
from natctl.netlink.links import read_links
from natctl.netlink.socket import Socket
from natctl.ruleset.marks import Marks

PROGRAM: Final = "tap"
_AT_ONCE: Final = 50
"""Taps that are looked at in one periodic check; with more, the next check goes on with the others."""


class TapMarks:
    """
    The program; nothing before the first :meth:`put`.

    :param settings: The host role; None: this machine does not have it.
    """

    def __init__(self, settings: HostSettings | None) -> None:
        self._is_used = settings is not None and settings.fast_path is FastPathUse.AUTO
        self._flag = Marks.of_mask(settings.mark_mask).flag if settings is not None else 0
        self._loaded: Loaded | None = None
        self._at: set[int] = set()
        self._knows_all = False
        self._turn = 0
        self._is_doubtful = False

    def missing(self, rtnl: Socket, taps: Collection[int], subjects: Subject) -> list[int]:
        """
        Return the taps, by index, at which it is to be put.

        Where somebody removed it, it comes back in a periodic check only: libvirt removes and makes the qdisc when it
        changes an interface's bandwidth, and must not find ours in between.

        :param subjects: What others may have changed; all in a periodic check.
        :raise KernelError: When the kernel cannot be read.
        """
        if not self._is_used:
            return []
        self._is_doubtful |= Subject.FILTERS in subjects and subjects != Subject.ALL
        if subjects != Subject.ALL:
            return sorted(set(taps) - self._at)
        here = read_links(rtnl).keys() & set(taps)
        self._at &= here
        missing = sorted(here - self._at)
        looked_at = sorted(self._at)
        if not self._is_doubtful:
            start = self._turn * _AT_ONCE % (len(looked_at) or 1)
            looked_at = looked_at[start : start + _AT_ONCE]
            self._turn += 1
        self._is_doubtful = False
        gone = [tap for tap in looked_at if not self._is_at(rtnl, tap)]
        self._at -= set(gone)
        return missing + gone

    def put(self, rtnl: Socket, tap: int) -> None:
        """
        Put it at a tap, in one step in the place of a former one.

        Without an object file, when the tap is gone or the kernel refuses, there is none: nftables does all.
        """
        try:
            if self._loaded is None:
                self._loaded = Loaded(PROGRAM, struct.pack("=I", self._flag), {})
            classifiers.attach_to_tap(rtnl, tap, self._loaded.program, PROGRAM)
        except (KernelError, NoObject, ValueError):
            pass
        # Not again, either way: a kernel that refuses would be asked in each check, and for a tap that is not there
        # without end. A periodic check finds those that come later.
        self._at.add(tap)

    def remove(self, rtnl: Socket, taps: Collection[int]) -> None:
        """Remove it from taps, by index. :raise KernelError: When the kernel refuses."""
        for tap in self._at & set(taps):
            classifiers.detach(rtnl, tap, Side.INGRESS, PROGRAM)
            self._at.discard(tap)

    def remove_from_rest(self, rtnl: Socket, kept: Collection[int]) -> None:
        """
        Remove it from all interfaces but these, by index.

        :raise KernelError: When the kernel refuses.
        """
        if not self._is_used:
            kept = ()
        if self._knows_all:
            self.remove(rtnl, self._at - set(kept))
            return
        # A former natd may have put it anywhere.
        for number in read_links(rtnl).keys() - set(kept):
            if self._is_at(rtnl, number):
                classifiers.detach(rtnl, number, Side.INGRESS, PROGRAM)
        self._at &= set(kept)
        self._knows_all = True

    def close(self) -> None:
        """Let go of it; the kernel keeps what it runs."""
        if self._loaded is not None:
            self._loaded.close()
        self._loaded = None
        self._at, self._knows_all = set(), False

    def _is_at(self, rtnl: Socket, number: int) -> bool:
        return any(each.has_our(PROGRAM) for each in classifiers.filters(rtnl, number, Side.INGRESS))
