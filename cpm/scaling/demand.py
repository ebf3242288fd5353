"""What is known of a VM's need, and who draws a conclusion from it."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from cpm.model import DomainUUID


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """One sample of one VM, as its host measured it."""

    domain: DomainUUID
    current: int
    """Ports of the active range; 0 when the VM has none."""
    ports_in_use: int | None = None
    """Ports of the active range that a connection uses now; None: not counted."""
    packets_per_s: float = 0.0
    """Both directions."""
    megabits_per_s: float = 0.0
    """Both directions, 10^6 bit/s."""
    new_connections_per_s: float | None = None
    """None: not counted."""
    exhausted: bool = False
    """The kernel said that the arrival budget is used up: the range is, or is about to be, full."""


class Policy(Protocol):
    """Says how many ports a VM should have, before guards."""

    @property
    def name(self) -> str:
        """A word for explanations and configuration."""

    def target(self, demand: Demand, now: float) -> int:
        """
        Return the ports wanted: any number, the guards make it possible.

        :param now: UTC seconds of the sample.
        """
