"""
Hooks that wait for the ports of their VM, and the answers to them: pure.

Tested in ``tests/unit/site/test_order.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from typing import Final

from cpm.protocol.model import DomainUUID
from natctl.core.domains import Domains
from natctl.model.commands import Answer
from natctl.model.entries import HostEntry

WAIT_LIMIT_S: Final = 30.0
"""Seconds after which a waiting hook is answered in any case; its own timeout is shorter."""


@dataclasses.dataclass(frozen=True, slots=True)
class HookWaiter:
    """One request of a hook, not answered yet."""

    request: int
    domain: DomainUUID
    needs_taps: bool
    """The VM's interfaces must be known to the kernel, too."""
    since: float


class HookWaiters:
    """The requests of hooks that are not answered yet."""

    def __init__(self) -> None:
        self._waiters: list[HookWaiter] = []

    def domains(self) -> frozenset[DomainUUID]:
        """Return the VMs for which a hook waits."""
        return frozenset(waiter.domain for waiter in self._waiters)

    def add(self, waiter: HookWaiter) -> None:
        """Add a request."""
        self._waiters.append(waiter)

    def answer(self, code: str, text: str, domains: Container[DomainUUID] | None = None) -> list[Answer]:
        """
        Answer the hooks of these VMs.

        :param domains: None: all VMs.
        """
        return self._answer_if(lambda waiter: (code, text) if domains is None or waiter.domain in domains else None)

    def answer_ready(self, running: Domains, ready: Callable[[HookWaiter], HostEntry | None]) -> list[Answer]:
        """
        Answer the hooks of VMs that have their ports, or have stopped.

        :param running: VMs that run here.
        :param ready: Returns the entry that is in force and has all that the hook waits for; None: not yet.
        """

        def reply(waiter: HookWaiter) -> tuple[str, str] | None:
            if waiter.domain not in running:
                return "gone", "the VM stopped meanwhile"
            entry = ready(waiter)
            return ("", f"ports {entry.intent.ports}") if entry is not None else None

        return self._answer_if(reply)

    def answer_late(self, now: float) -> list[Answer]:
        """Answer the hooks that have waited too long."""
        reply = "timeout", "no answer from the manager in time"
        return self._answer_if(lambda waiter: reply if now - waiter.since >= WAIT_LIMIT_S else None)

    def _answer_if(self, reply: Callable[[HookWaiter], tuple[str, str] | None]) -> list[Answer]:
        replies = [(waiter, reply(waiter)) for waiter in self._waiters]
        self._waiters = [waiter for waiter, text in replies if text is None]
        return [Answer(waiter.request, *text) for waiter, text in replies if text is not None]
