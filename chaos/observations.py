"""What was observed in a run, as values, and reading it from the logs of the programs."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONTROL = 0
"""The number of the sender on the router: its packets pass nothing of the product."""
STRANGER = 999
"""The number of the hostile machine in the underlay."""


@dataclass(frozen=True, slots=True)
class Span:
    """
    Something of a guest that lasted; CLOCK_MONOTONIC.

    :param guest: Its number.
    :param flow: Which of its connections; ``short`` and ``burst`` for those that do not last.
    :param why: What went wrong; empty: nothing did.
    """

    guest: int
    flow: str
    begin: float
    end: float
    why: str = ""

    @property
    def seconds(self) -> float:
        """How long."""
        return self.end - self.begin

    @property
    def timed_out(self) -> bool:
        """Whether it ended because nothing had come for as long as the program waits."""
        return self.why.startswith("TimeoutError")


@dataclass(frozen=True, slots=True)
class Use:
    """The packets of one sender from one external port, from the first to the last before another's."""

    address: str
    port: int
    sender: int
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Leak:
    """Packets with a source that nobody outside may see."""

    where: str
    source: str
    destination: str
    begin: float
    end: float
    packets: int


@dataclass(frozen=True, slots=True)
class Observations:
    """
    A whole run.

    :param gaps: Silences of connections that last, and openings that took long.
    :param cuts: Connections that were cut.
    :param opened: New connections, whatever became of them.
    :param flows: Connections that last, from begin to end, with their longest silence in ``worst``.
    :param wrong: What the server heard and should not have; where a UDP flow changed its source.
    :param lags: Times in which a program waited for a processor.
    :param packets: How many packets each witness has read; ``missed``: those that they were too slow for.
    """

    gaps: tuple[Span, ...] = ()
    cuts: tuple[Span, ...] = ()
    opened: tuple[Span, ...] = ()
    flows: tuple[Span, ...] = ()
    worst: dict[tuple[int, str, float], float] = field(default_factory=dict)
    wrong: tuple[Span, ...] = ()
    uses: tuple[Use, ...] = ()
    leaks: tuple[Leak, ...] = ()
    lags: tuple[Span, ...] = ()
    packets: tuple[int, ...] = ()
    missed: int = 0


def read(folder: Path) -> Observations:
    """Read the logs of a run: all files ``*.jsonl`` of its folder."""
    records = [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in _lines(path)]
    return parse(records)


def _lines(path: Path) -> list[str]:
    # The last line of a program that was killed may be half of one.
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def parse(records: Iterable[dict[str, Any]]) -> Observations:
    """Turn records of the programs into observations."""
    by_kind: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        by_kind.setdefault(record["kind"], []).append(record)

    def spans(*kinds: str) -> tuple[Span, ...]:
        return tuple(_span(record) for kind in kinds for record in by_kind.get(kind, ()))

    seen = by_kind.get("seen", [])
    return Observations(
        gaps=spans("gap"),
        cuts=spans("cut"),
        opened=spans("short", "burst", "failed"),
        flows=spans("flow"),
        worst={(one["guest"], one["flow"], one["begin"]): one["worst"] for one in by_kind.get("flow", ())},
        wrong=spans("wrong", "moved"),
        uses=tuple(
            Use(one["address"], one["port"], one["sender"], one["begin"], one["end"])
            for one in by_kind.get("owner", ())
        ),
        leaks=tuple(
            Leak(one["where"], one["source"], one["destination"], one["begin"], one["end"], one["packets"])
            for one in by_kind.get("leak", ())
        ),
        lags=spans("lag"),
        packets=tuple(one["packets"] for one in seen),
        missed=sum(one["missed"] for one in seen),
    )


def _span(record: dict[str, Any]) -> Span:
    begin = record.get("begin", record.get("at", 0.0))
    why = record.get("why") or record.get("text") or ""
    if record["kind"] == "moved":
        why = f"came from {record['before']}, then from {record['after']}"
    return Span(record["guest"], record.get("flow", record["kind"]), begin, record.get("end", begin), why)
