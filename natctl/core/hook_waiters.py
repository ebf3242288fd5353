"""Hooks that wait for a VM's ports: who they are, and who is answered now. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container
from typing import Final

from cpm.protocol.model import DomainUUID
from natctl.core.domains import Domains
from natctl.model.commands import Answer
from natctl.model.entries import HostEntry

WAIT_LIMIT_S: Final = 30.0
"""Seconds after which a hook that waits is answered in any case; its own deadline is shorter."""


@dataclasses.dataclass(frozen=True, slots=True)
class Waiter:
    """One request of a hook."""

    request: int
    domain: DomainUUID
    needs_taps: bool
    """The VM's interfaces must be known to the kernel, too."""
    since: float


class Waiting:
    """The hooks that wait; whoever is answered waits no longer."""

    def __init__(self) -> None:
        self._waiters: list[Waiter] = []

    def add(self, waiter: Waiter) -> None:
        """Let a hook wait."""
        self._waiters.append(waiter)

    def answer(self, code: str, text: str, domains: Container[DomainUUID] | None = None) -> list[Answer]:
        """
        Answer those that wait for these VMs.

        :param domains: None: all VMs.
        """
        return self._settle(lambda waiter: (code, text) if domains is None or waiter.domain in domains else None)

    def answer_ready(self, running: Domains, ready: Callable[[Waiter], HostEntry | None]) -> list[Answer]:
        """
        Answer those whose VM has its ports, or stopped.

        :param running: VMs that run here.
        :param ready: Returns what the kernel holds for a VM, as far as the hook waits for it.
        """

        def word(waiter: Waiter) -> tuple[str, str] | None:
            if waiter.domain not in running:
                return "gone", "the VM stopped meanwhile"
            entry = ready(waiter)
            return ("", f"ports {entry.ports}") if entry is not None else None

        return self._settle(word)

    def answer_late(self, now: float) -> list[Answer]:
        """Answer those that have waited too long."""
        word = "timeout", "no answer from the manager in time"
        return self._settle(lambda waiter: word if now - waiter.since >= WAIT_LIMIT_S else None)

    def _settle(self, word: Callable[[Waiter], tuple[str, str] | None]) -> list[Answer]:
        words = [(waiter, word(waiter)) for waiter in self._waiters]
        self._waiters = [waiter for waiter, said in words if said is None]
        return [Answer(waiter.request, *said) for waiter, said in words if said is not None]
