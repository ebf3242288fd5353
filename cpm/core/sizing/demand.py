"""
A VM's demand as measured, and the interface of the policies that size its range.

Tested in ``tests/unit/cpm/core/sizing/test_policies.py``.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias

from msgspec import Struct

from cpm.protocol.model import DomainUUID


class Demand(Struct, frozen=True, kw_only=True, gc=False):
    """One sample of one VM, as its host measured it."""

    domain: DomainUUID
    current: int
    """Ports of the active range; 0 when the VM has none."""
    ports_in_use: int | None = None
    """Ports of the active range that a connection uses now; None: not counted."""
    draining: int = 0
    """
    Connections on draining ranges of this VM.

    They use no port of the active range, but the connections that replace them will.
    """
    packets_per_s: float = 0.0
    """Both directions."""
    megabits_per_s: float = 0.0
    """Both directions, 10^6 bit/s."""
    new_connections_per_s: float | None = None
    """None: not counted."""
    exhausted: bool = False
    """The range is full, or its arrival budget is used up and it is about to be full."""


Memory: TypeAlias = object
"""State that a policy keeps of one VM between samples, opaque to its callers; None: none yet."""


class Policy(Protocol):
    """
    Computes how many ports a VM should have, before guards.

    Policies are stateless objects: the state that one keeps of a VM is returned, and passed in with the next sample.
    State of another policy, which the VM had before, must be treated as none.
    """

    @property
    def name(self) -> str:
        """The name of the policy in explanations and configuration, in one word."""

    @property
    def counts_ports(self) -> bool:
        """
        True: it decides by the ports in use, so guards that do so too are off or weaker for it.

        :mod:`cpm.core.sizing.guards` lists them.
        """

    def target(self, demand: Demand, memory: Memory, now: float) -> tuple[int, Memory]:
        """
        Return the ports wanted and the state to keep. Any number will do: the guards keep it within bounds.

        :param memory: The state returned for this VM's previous sample; None for the first.
        :param now: Ledger time of the sample.
        """
