"""
A VM's demand as measured, and the interface of policies that size its range by it.

Tested in ``tests/unit/cpm/core/sizing/test_policies.py``.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, TypeAlias

from cpm.protocol.model import DomainUUID


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One sample of one VM, as its host measured it."""

    domain: DomainUUID
    current: int
    """Ports of the active range; 0 when the VM has none."""
    ports_in_use: int | None = None
    """Ports of the active range that a connection uses now; None: not counted."""
    draining: int = 0
    """
    Connections on ranges of this VM that drain, after a move or a step down.

    They need no port of the active range, but the connections that succeed them will.
    """
    packets_per_s: float = 0.0
    """Both directions."""
    megabits_per_s: float = 0.0
    """Both directions, 10^6 bit/s."""
    new_connections_per_s: float | None = None
    """None: not counted."""
    exhausted: bool = False
    """The kernel said that the arrival budget is used up: the range is, or is about to be, full."""


Memory: TypeAlias = object
"""State that a policy keeps of one VM between samples, opaque to everybody else; None: none yet."""


class Policy(Protocol):
    """
    Says how many ports a VM should have, before guards.

    Policies are stateless: the state that one keeps of a VM is returned, and passed in again with the next sample.
    The state of another policy, which the VM had before, is treated as none.
    """

    @property
    def name(self) -> str:
        """A word for explanations and configuration."""

    @property
    def counts_ports(self) -> bool:
        """
        True: it decides by the ports in use, so guards that bring them in only hold it back where it is reckless.

        See :mod:`cpm.core.sizing.guards`.
        """

    def target(self, demand: Demand, memory: Memory, now: float) -> tuple[int, Memory]:
        """
        Return the ports wanted and what to remember: any number, the guards make it possible.

        :param memory: What the call for this VM's previous sample returned; None for the first.
        :param now: UTC seconds of the sample.
        """
