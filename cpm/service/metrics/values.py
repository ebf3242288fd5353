"""
Declared metrics, histograms, and Prometheus' text format (version 0.0.4).

Written here, and not by ``prometheus_client``, because cpmd renders 100,000 lines for 10,000 VMs without keeping a VM
that starts waiting: text is made in small pieces, see ``docs/design/0030-monitoring.md``. The tests read it with the
parser of ``prometheus_client`` and with ``promtool``.

Pure. Tested in ``tests/unit/cpm/service/metrics/test_values.py``.
"""

from __future__ import annotations

import dataclasses
import enum
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from cpm.protocol.escaping import escaped

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets of all our histograms, in seconds: one kernel transaction to a hook that gives up."""


class Kind(enum.StrEnum):
    """What Prometheus calls the type of a metric."""

    GAUGE = "gauge"
    COUNTER = "counter"
    """Its name ends in ``_total``; it begins at 0 when the daemon starts, unless its help says otherwise."""
    HISTOGRAM = "histogram"


@dataclasses.dataclass(frozen=True, slots=True)
class Metric:
    """A declared metric."""

    name: str
    kind: Kind
    help: str
    """One sentence, with the unit where the name has none."""
    labels: tuple[str, ...] = ()
    series: str = "1"
    """How many series there are, in words, for the reference."""

    @property
    def head(self) -> str:
        """The lines before its samples."""
        return f"# HELP {self.name} {_help_text(self.help)}\n# TYPE {self.name} {self.kind}\n"

    def text(self, samples: Iterable[tuple[Sequence[str], float]]) -> str:
        """
        Return the whole metric in the text format.

        :param samples: The values of its labels, in order, and the value; a truth is 1 or 0.
        """
        return self.head + "".join(f"{self.name}{self.label_text(of)} {value + 0}\n" for of, value in samples)

    def one(self, value: float) -> str:
        """Return the whole metric, which has no labels."""
        return self.text([((), value)])

    def label_text(self, of: Sequence[str]) -> str:
        """Return labels with these values, in braces."""
        return label_text(dict(zip(self.labels, of, strict=True)))

    def histograms(self, of: Mapping[tuple[str, ...], Histogram]) -> str:
        """
        Return the whole metric, a histogram.

        :param of: The histograms by the values of the labels.
        """
        return self.head + "".join(line for values, each in sorted(of.items()) for line in self._buckets(values, each))

    def _buckets(self, of: Sequence[str], histogram: Histogram) -> Iterator[str]:
        labels = dict(zip(self.labels, of, strict=True))
        for bound, count in histogram.cumulative():
            yield f"{self.name}_bucket{label_text({**labels, 'le': bound})} {count}\n"
        yield f"{self.name}_sum{label_text(labels)} {histogram.sum_s:.9g}\n"
        yield f"{self.name}_count{label_text(labels)} {histogram.count}\n"


class Histogram:
    """How often something took how long."""

    __slots__ = ("_counts", "count", "sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self.count = 0
        self.sum_s = 0.0
        """Seconds."""

    def observe(self, seconds: float) -> None:
        """Count one observation. A negative time, of a clock that was set, counts as 0."""
        seconds = max(0.0, seconds)
        self._counts[bisect_left(BOUNDS_S, seconds)] += 1
        self.count += 1
        self.sum_s += seconds

    def cumulative(self) -> Iterator[tuple[str, int]]:
        """Yield each bucket's upper bound and how many observations it and the smaller ones have."""
        total = 0
        for bound, count in zip((*map(_number, BOUNDS_S), "+Inf"), self._counts, strict=True):
            total += count
            yield bound, total


def label_text(labels: Mapping[str, str]) -> str:
    """Return labels in braces; nothing when there are none."""
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{label_value(value)}"' for name, value in labels.items()) + "}"


def label_value(value: str) -> str:
    """Return the value of a label as it is written, without anything that is not printable."""
    if not value.isprintable():
        value = escaped(value)
    return value.replace("\\", "\\\\").replace('"', '\\"') if "\\" in value or '"' in value else value


def _help_text(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    return f"{value:g}"
