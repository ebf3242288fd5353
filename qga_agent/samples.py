"""
The figures measured of a VM, with unit and kind, and how rates are computed from counters. Pure: time is a parameter.

All directions are the *VM's*. The kernel counts a tap from the host's side, where they are reversed: what the tap
transmitted is what the guest received. libvirt reverses them already (``virNetDevTapInterfaceStats``); psutil and
/proc/net/dev do not.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Mapping

from cpm.protocol.model import DomainUUID


class Kind(enum.StrEnum):
    """How a figure behaves over time."""

    COUNTER = "counter"
    """Only grows, and restarts at 0 with the VM or its interface; only differences are meaningful."""
    GAUGE = "gauge"
    """A value at one moment."""


@dataclasses.dataclass(frozen=True, slots=True)
class Description:
    """One measured figure."""

    name: str
    unit: str
    kind: Kind
    help: str


DESCRIPTIONS = (
    Description("rx_packets", "packets", Kind.COUNTER, "Packets the VM received on an interface"),
    Description("rx_bytes", "bytes", Kind.COUNTER, "Bytes the VM received on an interface, Ethernet headers included"),
    Description("tx_packets", "packets", Kind.COUNTER, "Packets the VM sent on an interface"),
    Description("tx_bytes", "bytes", Kind.COUNTER, "Bytes the VM sent on an interface, Ethernet headers included"),
    Description("packets_per_s", "packets/s", Kind.GAUGE, "Packets both ways, all interfaces, over the last period"),
    Description(
        "megabits_per_s", "10^6 bit/s", Kind.GAUGE, "Bandwidth both ways, all interfaces, over the last period"
    ),
)
"""Every figure of :class:`InterfaceCounters` and :class:`Rates`, in the order of their fields."""


@dataclasses.dataclass(frozen=True, slots=True)
class InterfaceCounters:
    """Counters of one interface since its creation; ``rx`` is what the VM received, ``tx`` what it sent."""

    rx_packets: int
    rx_bytes: int
    tx_packets: int
    tx_bytes: int

    @property
    def packets(self) -> int:
        """Packets both ways."""
        return self.rx_packets + self.tx_packets

    @property
    def bytes(self) -> int:
        """Bytes both ways."""
        return self.rx_bytes + self.tx_bytes

    def precedes(self, later: InterfaceCounters) -> bool:
        """Return whether ``later`` can be a later reading of the same interface: no counter decreased."""
        return (
            self.rx_packets <= later.rx_packets
            and self.rx_bytes <= later.rx_bytes
            and self.tx_packets <= later.tx_packets
            and self.tx_bytes <= later.tx_bytes
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """Traffic of a VM over a period, both directions and all its interfaces together; never negative."""

    packets_per_s: float
    megabits_per_s: float
    """10^6 bit/s."""

    def __add__(self, other: Rates) -> Rates:
        return Rates(self.packets_per_s + other.packets_per_s, self.megabits_per_s + other.megabits_per_s)


IDLE = Rates(0.0, 0.0)


def rates(before: InterfaceCounters, after: InterfaceCounters, elapsed_s: float) -> Rates | None:
    """
    Return the rates of one interface between two readings.

    None when there are none: no time passed between the readings, or a counter decreased, because the VM or its tap was
    created anew. Traffic of the new interface before the second reading is then not counted: taking its counters for
    differences would turn a glitch of one counter into a burst.
    """
    if elapsed_s <= 0 or not before.precedes(after):
        return None
    return Rates(
        (after.packets - before.packets) / elapsed_s,
        (after.bytes - before.bytes) * 8 / 1_000_000 / elapsed_s,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Reading:
    at: float
    counters: InterfaceCounters


class Sampler:
    """
    Computes rates by VM from readings of all taps; keeps the last reading of every tap of every VM.

    Readings are keyed by VM *and* tap: libvirt reuses ``vnet0`` for the next VM that starts.
    """

    def __init__(self) -> None:
        self._last: dict[DomainUUID, dict[str, _Reading]] = {}

    def sample(
        self, now: float, counters: Mapping[str, InterfaceCounters], taps: Mapping[DomainUUID, Iterable[str]]
    ) -> dict[DomainUUID, Rates]:
        """
        Add a reading and return each VM's rates since the previous one.

        :param now: When the counters were read, in seconds of a monotonic clock.
        :param counters: By tap. A tap that could not be read is missing; its next reading then covers both periods.
        :param taps: The interfaces of every VM that runs now; the readings of all other VMs are forgotten.
        :return: Rates by VM, without the VMs whose rates are unknown (first reading, counters reset, no tap read):
            unknown is not idle.
        """
        result: dict[DomainUUID, Rates] = {}
        last: dict[DomainUUID, dict[str, _Reading]] = {}
        for domain, names in taps.items():
            known = self._last.get(domain, {})
            last[domain], measured = _sample_vm(now, counters, names, known)
            if measured is not None:
                result[domain] = measured
        self._last = last
        return result


def _sample_vm(
    now: float, counters: Mapping[str, InterfaceCounters], names: Iterable[str], known: Mapping[str, _Reading]
) -> tuple[dict[str, _Reading], Rates | None]:
    """Return the readings to keep of a VM's taps, and the sum of their rates; None: unknown."""
    readings: dict[str, _Reading] = {}
    measured: list[Rates] = []
    for name in names:
        before, after = known.get(name), counters.get(name)
        if before is not None and after is not None:
            measured += filter(None, [rates(before.counters, after, now - before.at)])
        if after is not None and (before is None or now > before.at):
            readings[name] = _Reading(now, after)
        elif before is not None:
            readings[name] = before
    return readings, sum(measured, IDLE) if measured else None
