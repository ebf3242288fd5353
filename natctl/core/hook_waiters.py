"""
Hooks that wait for the ports of their VM, and the answers to them: pure.

Tested in ``tests/unit/site/test_order.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container
from typing import Final

from cpm.protocol.model import DomainUUID
from natctl.core.domains import Domains
from natctl.core.programming import Programming
from natctl.model.commands import Answer

WAIT_LIMIT_S: Final = 30.0
"""Seconds after which a waiting hook is answered in any case; its own timeout is shorter."""


RETURN_S: Final = 5.0
"""Seconds from the loss of the session in which hooks wait for the manager to be back: a restart of it takes less. (The
hook itself waits for two seconds, unless it is configured otherwise.)"""


@dataclasses.dataclass(frozen=True, slots=True)
class HookWaiter:
    """One request of a hook, not answered yet."""

    request: int
    domain: DomainUUID
    since: float


class HookWaiters:
    """
    The requests of hooks that are not answered yet.

    :param domains: The VMs that run here.
    :param programming: What the kernel holds.
    """

    def __init__(self, domains: Domains, programming: Programming) -> None:
        self._domains = domains
        self._programming = programming
        self._waiters: list[HookWaiter] = []
        self._lost_at: float | None = -math.inf

    def on_connected(self) -> None:
        """There is a session with the manager."""
        self._lost_at = None

    def on_disconnected(self, now: float) -> None:
        """The session is lost, or was lost when natd ended; the manager may be back in a moment."""
        self._lost_at = now

    def add(self, waiter: HookWaiter) -> None:
        """Add a request."""
        self._waiters.append(waiter)

    def answer(self, code: str, text: str, domains: Container[DomainUUID] | None = None) -> list[Answer]:
        """
        Answer the hooks of these VMs.

        :param domains: None: all VMs.
        """
        return self._answer_if(lambda waiter: (code, text) if domains is None or waiter.domain in domains else None)

    def answer_ready(self) -> list[Answer]:
        """Answer the hooks of VMs that have stopped, or for which the kernel has all that their hook waits for."""

        def reply(waiter: HookWaiter) -> tuple[str, str] | None:
            if waiter.domain not in self._domains:
                return "gone", "the VM stopped meanwhile"
            entry = self._programming.entry_in_force(waiter.domain, needs_taps=True)
            return ("", f"ports {entry.intent.ports}") if entry is not None else None

        return self._answer_if(reply)

    def answer_in_vain(self, now: float) -> list[Answer]:
        """Answer the hooks whose VMs get no ports soon: the manager has not been there for longer than a moment."""
        if self._lost_at is None or now - self._lost_at < RETURN_S:
            return []
        in_vain = {
            waiter.domain
            for waiter in self._waiters
            if self._programming.entry_in_force(waiter.domain, needs_taps=False) is None
            # Before its guest runs, the kernel is to know that it may send nothing.
            and not self._programming.is_being_denied(waiter.domain)
        }
        return self.answer(
            "unreachable", "the manager is not connected; the VM gets its ports when it is back", in_vain
        )

    def answer_late(self, now: float) -> list[Answer]:
        """Answer the hooks that have waited too long."""
        reply = "timeout", "no answer from the manager in time"
        return self._answer_if(lambda waiter: reply if now - waiter.since >= WAIT_LIMIT_S else None)

    def _answer_if(self, reply: Callable[[HookWaiter], tuple[str, str] | None]) -> list[Answer]:
        replies = [(waiter, reply(waiter)) for waiter in self._waiters]
        self._waiters = [waiter for waiter, text in replies if text is None]
        return [Answer(waiter.request, *text) for waiter, text in replies if text is not None]
