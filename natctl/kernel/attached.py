"""
At which interfaces one program of ours is attached, and that it stays there.

Tested by ``tests/netns/test_fast_path.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from natctl.bpf.loading import Loaded
from natctl.bpf.tcx import Attachments, Hook
from natctl.netlink import classifiers
from natctl.netlink.classifiers import Side
from natctl.netlink.links import Link, read_links
from natctl.netlink.socket import Socket


class Attached:
    """
    The interfaces of one program; a former natd may have attached it anywhere, until :meth:`remove_from_rest`.

    It is a filter, which stays when natd ends. While natd runs, packets meet it at tcx before, where it costs less.

    :param side: Where packets pass it.
    :param name: What ``tc filter show`` calls it, after "virt-ports".
    """

    def __init__(self, side: Side, name: str) -> None:
        self._side, self._name = side, name
        self._at: frozenset[int] | None = None
        self._ahead = Attachments(Hook.INGRESS if side is Side.INGRESS else Hook.EGRESS)

    def put(self, rtnl: Socket, links: Iterable[Link], program: Loaded, ahead: Loaded) -> list[str]:
        """
        Attach the program where it is not, in place of a former one.

        :param ahead: The program at tcx, which may decide for the filter too; not there where others have filters.
        :return: The names of the interfaces where nothing of ours was.
        :raise KernelError: When the kernel refuses.
        """
        empty = []
        for link in links:
            filters = classifiers.filters(rtnl, link.number, self._side)
            there = [each.program for each in filters if each.has_our(self._name)]
            if there != [program.number]:
                classifiers.attach(rtnl, link.number, self._side, program.program, self._name)
            if len(filters) > len(there):
                self._ahead.remove(link.number)
            else:
                # Not with the filter, which somebody may wait for: in the next check.
                self._ahead.put(link.number, ahead, begins=there == [program.number])
            if not there:
                empty.append(link.name)
        return empty

    def remove_from_rest(self, rtnl: Socket, kept: Collection[int]) -> None:
        """
        Remove it from all interfaces but these, given by index.

        :raise KernelError: When the kernel refuses.
        """
        for number in self._ahead.interfaces():
            if number not in kept:
                self._ahead.remove(number)
        if self._at is None or self._at - set(kept):
            for link in read_links(rtnl).values():
                is_rest = link.number not in kept and (self._at is None or link.number in self._at)
                found = classifiers.filters(rtnl, link.number, self._side) if is_rest else []
                if any(each.has_our(self._name) for each in found):
                    classifiers.detach(rtnl, link.number, self._side, self._name)
        self._at = frozenset(kept)

    def remove(self, rtnl: Socket) -> None:
        """Remove it from all interfaces. :raise KernelError: When the kernel refuses."""
        self._at = None
        self.remove_from_rest(rtnl, ())

    def close(self) -> None:
        """Leave the filters, which do the same."""
        self._ahead.close()
