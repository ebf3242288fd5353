"""
Finds the VMs because of which the kernel refuses a change, so that everything else of it is in force. Pure.

The kernel takes or refuses a transaction as a whole. What was refused is tried again in halves, until what is left of
it is one VM. That VM is to blame if the kernel takes anything else: when nothing else was taken, the *frame* is tried,
which changes no VM. What is to be tried, and what is refused, is kept here; :mod:`natctl.core.programming` makes the
commands.

Tested in ``tests/unit/site/test_refused_vms.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable
from typing import Final

from cpm.protocol.model import DomainUUID

MOST_REFUSALS: Final = 200
"""Refusals in one bisection after which it is the kernel, and not some VMs. One VM among 10,000 costs 15 of them."""
FIRST_RETRY_S: Final = 5.0
"""Seconds until a VM that the kernel refused is tried again; twice as many after each time."""
LAST_RETRY_S: Final = 60.0


@dataclasses.dataclass(slots=True)
class RefusedVM:
    """A VM of which the kernel holds what it held before."""

    reason: str
    tries: int
    retry_at: float

    @classmethod
    def after(cls, before: RefusedVM | None, reason: str, now: float) -> RefusedVM:
        """Return it after one more refusal."""
        tries = before.tries + 1 if before is not None else 1
        return cls(reason, tries, now + min(LAST_RETRY_S, FIRST_RETRY_S * 2 ** min(tries - 1, 10)))


class Bisection:
    """
    The parts of one change that are still to be tried, and the VMs that the kernel refuses.

    :param apart: VMs that are tried one by one after the rest of the change, because they were refused before.
    """

    def __init__(self, apart: Iterable[DomainUUID] = ()) -> None:
        self.refused: dict[DomainUUID, tuple[str, float]] = {}
        """Why each VM was refused, and when."""
        self.refusals = 0
        self._parts: list[frozenset[DomainUUID]] = [frozenset({uuid}) for uuid in sorted(apart, reverse=True)]
        self._has_progress = False
        self._is_last_try = False
        self._takes_others = False

    def take(self) -> frozenset[DomainUUID] | None:
        """
        Return the VMs to try next; none of them: the frame. None: nothing is left to try.

        A VM may have been refused because of another one that gives way in a later part: it is tried once more.
        """
        if not self._parts and self.refused and self._has_progress and not self._is_last_try:
            self._is_last_try = True
            self._parts = [frozenset({uuid}) for uuid in sorted(self.refused, reverse=True)]
            self.refused = {}
        return self._parts.pop() if self._parts else None

    def put_back(self, part: frozenset[DomainUUID]) -> None:
        """Try this part next."""
        self._parts.append(part)

    def on_done(self, *, has_changed: bool) -> None:
        """A part is in force; ``has_changed``: the kernel was asked for it."""
        self._has_progress |= has_changed
        self._takes_others |= has_changed

    def on_refused(self, vms: Collection[DomainUUID], reason: str, now: float, *, has_frame: bool) -> bool:
        """
        Record that a part was refused; return whether it makes sense to go on.

        :param vms: The VMs that it would have changed.
        :param has_frame: It also changed what concerns no VM.
        """
        self.refusals += 1
        if not vms or self.refusals > MOST_REFUSALS:
            return False
        if has_frame or (len(vms) == 1 and not self._takes_others):
            self._parts += [frozenset(vms), frozenset()]
        elif len(vms) == 1:
            self.refused[next(iter(vms))] = (reason, now)
            self._has_progress = False
        else:
            ordered = sorted(vms)
            middle = len(ordered) // 2
            self._parts += [frozenset(ordered[middle:]), frozenset(ordered[:middle])]
        return True
