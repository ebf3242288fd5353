"""
The hook tcx of an interface, where a program costs a packet less than as a filter (Linux 6.6 and later).

A program stays there as long as the process that attached it. So it is there only beside the same program as a filter,
which packets meet behind tcx: whatever becomes of natd, the filter goes on, and nothing is left over of which the next
natd would not know. Format: ``BPF_TCX_INGRESS`` in linux/bpf.h.

Tested by ``tests/netns/test_tcx.py``.
"""

from __future__ import annotations

import enum

from cpm.protocol.errors import KernelError
from natctl.bpf import calls
from natctl.bpf.loading import Loaded


class Hook(enum.IntEnum):
    """Where packets pass a program (``enum bpf_attach_type``)."""

    INGRESS = 46
    EGRESS = 47


class Attachments:
    """
    What this process has at one hook of interfaces, given by index; nothing at first.

    :param hook: Where packets pass it.
    """

    def __init__(self, hook: Hook) -> None:
        self._hook = hook
        self._links: dict[int, int] = {}
        """Descriptors."""

    def put(self, interface: int, program: Loaded, *, begins: bool) -> None:
        """
        Have the program there if the kernel can, and no other software has one; else nothing.

        Other programs may be meant to see every packet, and packets that ours does go no further.

        :param begins: Whether it may come where nothing of ours is; the kernel takes 10 ms for it (``tcx_entry_sync``).
        """
        try:
            number = self._number_at(interface)
            if set(calls.programs_at(interface, self._hook)) - {number}:
                self.remove(interface)
            elif not number:
                self.remove(interface)
                if begins:
                    self._links[interface] = calls.create_link(interface, self._hook, program.program)
            elif number != program.number:
                calls.update_link(self._links[interface], program.program)
        except KernelError:
            # The filter does the same.
            self.remove(interface)

    def interfaces(self) -> tuple[int, ...]:
        """Return where something is."""
        return tuple(self._links)

    def remove(self, interface: int) -> None:
        """Have nothing there."""
        if (link := self._links.pop(interface, None)) is not None:
            calls.close([link])

    def close(self) -> None:
        """Have nothing anywhere."""
        for interface in self.interfaces():
            self.remove(interface)

    def _number_at(self, interface: int) -> int:
        """Return the number of our program there; 0: none, or somebody detached it."""
        if interface not in self._links:
            return 0
        number, where = calls.link_place(self._links[interface])
        return number if where == interface else 0
