"""
Converts hosts' reports to the lines of a trace. Pure: samples in, lines out.

A host reports how many ports a VM has in use and how many connections began; how many ended follows from both. Where
the kernel did not count those that began, only the change of the ports in use is known: connections that opened and
closed within one period are then missing, and the replay has a calmer load than there was.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from cpm.simulation.trace import Line


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """One VM over one period."""

    key: str
    """Identifies the VM; names need not be unique."""
    name: str
    ports: int | None
    """Ports in use, draining ranges included; None: not counted in this period."""
    new_per_s: float | None
    packets_per_s: float
    megabits_per_s: float


class Recorder:
    """Converts reports one by one; keeps how many connections each VM had, and on which host it ran."""

    def __init__(self) -> None:
        self._open: dict[str, int] = {}
        self._names: dict[str, str] = {}
        self._on: dict[str, set[str]] = {}

    def lines(self, node: str, period_s: float, samples: Iterable[Sample]) -> Iterator[Line]:
        """
        Yield the lines for one report of a host.

        A VM that is no longer on that host has closed all its connections, unless it moved to another host.
        """
        before, here = self._on.get(node, set()), set()
        for sample in samples:
            here.add(sample.key)
            yield self._line(sample, period_s)
        self._on[node] = here
        for key in sorted(before - here):
            if (left := self._open.pop(key, 0)) and not any(key in others for others in self._on.values()):
                yield Line(self._names[key], 0, left, 0, 0)

    def _line(self, sample: Sample, period_s: float) -> Line:
        name = self._name(sample)
        before = self._open.get(sample.key)
        now = sample.ports if sample.ports is not None else before or 0
        self._open[sample.key] = now
        packets = round(sample.packets_per_s * period_s)
        octets = round(sample.megabits_per_s * period_s * 1e6 / 8)
        if before is None:
            return Line(name, now, 0, packets, octets)
        began = round((sample.new_per_s or 0.0) * period_s)
        opened = max(began, now - before, 0)
        return Line(name, opened, opened - (now - before), packets, octets)

    def _name(self, sample: Sample) -> str:
        if sample.key not in self._names:
            taken = sample.name in self._names.values()
            self._names[sample.key] = f"{sample.name} ({sample.key})" if taken else sample.name
        return self._names[sample.key]
