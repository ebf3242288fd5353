"""
What this node's kernel holds, for the first message of a session: pure.

While a command is under way, the kernel holds either what it held before or what the command says, so both are told.

Tested in ``tests/unit/natctl/core/test_holdings.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

from cpm.protocol.holdings import Held, held_by_edge, held_by_host
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID
from natctl.model.entries import HostEntry


class EdgeHoldings:
    """What this edge maps."""

    def __init__(self) -> None:
        self._applied: dict[DomainUUID, EdgeIntent] = {}
        self._sent: Mapping[DomainUUID, EdgeIntent | None] = {}

    def adopt(self, vm: EdgeIntent) -> None:
        """Record what natd found in the kernel."""
        self._applied[vm.domain] = vm

    def on_replacing(self, edge: Mapping[DomainUUID, EdgeIntent]) -> None:
        """Record that a command is under way that leaves nothing but this."""
        self._sent = {**dict.fromkeys(self._applied), **edge}

    def on_changing(self, edge: Mapping[DomainUUID, EdgeIntent | None]) -> None:
        """Record that a command is under way that changes these VMs; None: removes."""
        self._sent = edge

    def on_programmed(self) -> None:
        """Record that the command is in force."""
        for uuid, vm in self._sent.items():
            if vm is None:
                self._applied.pop(uuid, None)
            else:
                self._applied[uuid] = vm
        self._sent = {}

    @property
    def applied(self) -> Mapping[DomainUUID, EdgeIntent]:
        """What the kernel holds for certain, before a command that is under way."""
        return self._applied

    def changing(self) -> set[DomainUUID]:
        """Return the VMs that the command under way changes."""
        return {uuid for uuid, vm in self._sent.items() if vm != self._applied.get(uuid)}

    def on_refused(self) -> None:
        """Record that nothing of the command is in force."""
        self._sent = {}

    def told(self) -> tuple[Held, ...]:
        """Return what the kernel holds, or may hold."""
        sent = {uuid: vm for uuid, vm in self._sent.items() if vm is not None}
        both = ((self._applied.get(uuid), vm) for uuid, vm in {**self._applied, **sent}.items())
        return tuple(held_by_edge(vm, before.ranges if before is not None else ()) for before, vm in both)


def told_by_host(
    applied: Mapping[DomainUUID, HostEntry], sent: Mapping[DomainUUID, HostEntry | None]
) -> tuple[Held, ...]:
    """
    Return the ports that the VMs of this host have in the kernel, or may have.

    :param applied: The entries in the kernel.
    :param sent: Those of the command that is under way; None: removed by it.
    """
    now = {**applied, **{uuid: entry for uuid, entry in sent.items() if entry is not None}}
    both = ((applied.get(uuid, entry).intent.ports, entry.intent) for uuid, entry in now.items())
    held = (held_by_host(vm, *(() if before is None else (before,))) for before, vm in both)
    return tuple(vm for vm in held if vm.ranges)
