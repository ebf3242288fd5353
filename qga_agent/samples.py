"""
What is measured of a VM, with unit and kind, and how counters become rates. Pure: time is a parameter.

Everything is as the *VM* sees it. A tap's counters are as the host sees it, the other way round: what the tap
transmitted is what the guest received. libvirt turns them round already (``virNetDevTapInterfaceStats``); psutil and
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
    """Only grows, and starts again at 0 when the interface or the VM is made anew; only differences mean anything."""
    GAUGE = "gauge"
    """Holds at its moment."""


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
    """One interface of a VM since it was made; ``rx`` is what the VM received, ``tx`` what it sent."""

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
        """Say whether the later reading can be of the same interface: no counter went back."""
        return (
            self.rx_packets <= later.rx_packets
            and self.rx_bytes <= later.rx_bytes
            and self.tx_packets <= later.tx_packets
            and self.tx_bytes <= later.tx_bytes
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """What a VM did over a period, both directions and all its interfaces together; never negative."""

    packets_per_s: float
    megabits_per_s: float
    """10^6 bit/s."""

    def __add__(self, other: Rates) -> Rates:
        return Rates(self.packets_per_s + other.packets_per_s, self.megabits_per_s + other.megabits_per_s)


IDLE = Rates(0.0, 0.0)


def rates(before: InterfaceCounters, after: InterfaceCounters, elapsed_s: float) -> Rates | None:
    """
    Return what one interface carried between two readings.

    None when the readings say nothing: no time passed between them, or a counter went back, because the VM was started
    anew or its tap made again. What the new interface carried since is left to the next period; taking its counters
    for the period's would turn a glitch in one counter into a burst.
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
    Turns bulk readings of all taps into rates by VM; remembers the last reading of every tap of every VM.

    Keyed by VM *and* tap: libvirt gives ``vnet0`` to the next VM that starts, whose counters are not the former's.
    """

    def __init__(self) -> None:
        self._last: dict[DomainUUID, dict[str, _Reading]] = {}

    def sample(
        self, now: float, counters: Mapping[str, InterfaceCounters], taps: Mapping[DomainUUID, Iterable[str]]
    ) -> dict[DomainUUID, Rates]:
        """
        Take a reading and return what each VM did since the reading before.

        :param now: When the counters were read, in seconds of a clock that does not jump (monotonic).
        :param counters: By tap. One that could not be read this time is missing; the next reading covers both periods.
        :param taps: The interfaces of every VM that runs now; what is remembered of any other VM is forgotten.
        :return: A VM of which nothing can be said yet (first reading, reset, none of its taps read) is not there:
            unknown is not idle.
        """
        result: dict[DomainUUID, Rates] = {}
        last: dict[DomainUUID, dict[str, _Reading]] = {}
        for domain, names in taps.items():
            known = self._last.get(domain, {})
            last[domain], told = _step(now, counters, names, known)
            if told is not None:
                result[domain] = told
        self._last = last
        return result


def _step(
    now: float, counters: Mapping[str, InterfaceCounters], names: Iterable[str], known: Mapping[str, _Reading]
) -> tuple[dict[str, _Reading], Rates | None]:
    """Return what to remember of a VM's taps, and their rates together."""
    remembered: dict[str, _Reading] = {}
    told: list[Rates] = []
    for name in names:
        before, after = known.get(name), counters.get(name)
        if before is not None and after is not None:
            told += filter(None, [rates(before.counters, after, now - before.at)])
        if after is not None and (before is None or now > before.at):
            remembered[name] = _Reading(now, after)
        elif before is not None:
            remembered[name] = before
    return remembered, sum(told, IDLE) if told else None
