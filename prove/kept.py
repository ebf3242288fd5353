"""
The forwards that the operator asked for and has not removed: their ports stay their VM's, whatever happens.

Told what is committed, and nothing else; so a ledger that is put in place by somebody is begun anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import TypeAlias

from cpm.core.changes import AddAllocation, Change, EndRestoring, FreeAllocation, MoveAllocation, PutForward
from cpm.protocol.model import Allocation, AllocationId, DomainUUID, Forward, PortRange
from prove import words
from prove.judge import Violation

_Ports: TypeAlias = tuple[DomainUUID, IPv4Address, PortRange]


class KeptForwards:
    """Follows what is committed."""

    def __init__(self) -> None:
        self._known: dict[AllocationId, _Ports] = {}

    def forget(self) -> None:
        """Another ledger is in place."""
        self._known.clear()

    def on_commit(self, changes: Sequence[Change]) -> None:
        """
        Follow a commit.

        :raise Violation: When a forward has lost its ports.
        """
        lost: set[_Ports] = set()
        for change in changes:
            match change:
                case AddAllocation(added) if _is_kept(added.forward):
                    self._known[added.id] = _ports(added)
                    lost.discard(_ports(added))
                case PutForward(number, forward) if not _is_kept(forward):
                    self._known.pop(number, None)
                case MoveAllocation(number, ports=ports) if number in self._known:
                    lost |= {before for before in (self._known[number],) if before[2] != ports}
                case FreeAllocation(number) if number in self._known:
                    lost.add(self._known.pop(number))
        # A restored ledger takes in what edges map, which may contradict it.
        if lost and not any(isinstance(change, EndRestoring) for change in changes):
            domain, external, ports = min(lost)
            raise Violation(f"forward lost: {words.vm(domain)}'s {external}:{ports}, which nobody has removed")


def _is_kept(forward: Forward | None) -> bool:
    return forward is not None and forward.is_wanted and forward.is_kept and forward.ends is None


def _ports(allocation: Allocation) -> _Ports:
    return allocation.domain, allocation.external, allocation.ports
