"""
Traces: how many connections each VM opened and closed, second by second. Read and written as CSV.

::

    # virt-ports trace 1, step 1 s
    time,vm,opened,closed,packets,bytes
    0,web1,12,3,1840,1210000
    0,db1,2,2,90,31000
    1,web1,7,9,1702,1130440

The first line has the format's version and the length of a step. After the header, each line is one VM in the step that
begins at ``time`` (seconds from any origin, a multiple of the step after the first). A VM without activity in a step
needs no line; a VM exists from its first line to the end of the trace. Connections that were open when a recording
began count as opened in the VM's line of the first step. ``packets`` and ``bytes`` are both directions.

A trace has the number of connections that end in a step, but not which ones end.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from typing import Final

from cpm.protocol.errors import InvalidRequest

COLUMNS: Final = ("time", "vm", "opened", "closed", "packets", "bytes")
MOST_STEPS: Final = 10_000_000
"""Steps of a trace at most; more mean a damaged file."""

_HEAD = re.compile(r"# virt-ports trace 1, step ([0-9.]+) s")


@dataclasses.dataclass(frozen=True, slots=True)
class Line:
    """The activity of one VM in one step."""

    vm: str
    opened: int
    closed: int
    packets: int
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Trace:
    """The activity of all VMs, one tuple of lines per step; times count from the first step."""

    step_s: float
    steps: tuple[tuple[Line, ...], ...]

    @property
    def vms(self) -> tuple[str, ...]:
        """The VMs, in the order in which they appear."""
        return tuple(dict.fromkeys(line.vm for lines in self.steps for line in lines))

    @property
    def seconds(self) -> float:
        """Length of the trace in seconds."""
        return len(self.steps) * self.step_s

    @property
    def connections(self) -> int:
        """Connections opened in total."""
        return sum(line.opened for lines in self.steps for line in lines)


def head(step_s: float) -> str:
    """Return the first two lines of a file."""
    return f"# virt-ports trace 1, step {step_s:g} s\n{','.join(COLUMNS)}\n"


def row(time: float, line: Line) -> str:
    """Return one line of a file."""
    # Names come from libvirt and may contain commas and quotes, but no line breaks.
    name = f'"{line.vm.replace(chr(34), chr(34) * 2)}"' if set(line.vm) & set(',"#') or not line.vm else line.vm
    return f"{time:g},{name},{line.opened},{line.closed},{line.packets},{line.bytes}\n"


def trace_lines(trace: Trace) -> Iterator[str]:
    """Yield the lines of the file that holds a trace."""
    yield head(trace.step_s)
    for number, lines in enumerate(trace.steps):
        yield from (row(round(number * trace.step_s, 6), line) for line in lines)


def read(lines: Iterable[str], where: str) -> Trace:
    """
    Parse a file.

    :param where: Name of the file, for errors.
    :raise InvalidRequest: When it is not a trace; the message names file and line.
    """
    rows = iter(lines)
    matched = _HEAD.fullmatch(next(rows, "").strip())
    step_s = float(matched[1]) if matched and len(matched[1]) < 20 and matched[1].replace(".", "", 1).isdigit() else 0.0
    if not step_s > 0:
        first_line = head(1).splitlines()[0]
        remedy = f"its first line must be like `{first_line}`, as `virt-ports record` writes it"
        raise InvalidRequest(f"{where}: not a trace: {remedy}")
    if tuple(next(csv.reader([next(rows, "")]), [])) != COLUMNS:
        raise InvalidRequest(f"{where}, line 2: must be `{','.join(COLUMNS)}`")
    steps: dict[int, dict[str, Line]] = {}
    first: float | None = None
    for number, fields in enumerate(csv.reader(rows), start=3):
        if not fields or fields[0].startswith("#"):
            continue
        time, line = _parse(fields, f"{where}, line {number}")
        first = time if first is None else first
        step = round((time - first) / step_s)
        if not 0 <= step < MOST_STEPS:
            raise InvalidRequest(f"{where}, line {number}: time {time:g} is before the first line or too far after it")
        here = steps.setdefault(step, {})
        here[line.vm] = _add(here.get(line.vm), line)
    if not steps:
        raise InvalidRequest(f"{where}: this trace has no lines of VMs; record for longer, or while VMs run")
    return Trace(step_s, tuple(tuple(steps.get(step, {}).values()) for step in range(max(steps) + 1)))


def _parse(fields: list[str], where: str) -> tuple[float, Line]:
    if len(fields) != len(COLUMNS):
        raise InvalidRequest(f"{where}: {len(fields)} fields; use {','.join(COLUMNS)}")
    time, vm, *numbers = fields
    try:
        at = float(time)
    except ValueError:
        at = math.nan
    if not math.isfinite(at):
        raise InvalidRequest(f"{where}: time is {time!r}; use seconds")
    for column, text in zip(COLUMNS[2:], numbers, strict=True):
        if not (text.isascii() and text.isdigit() and len(text) < 16):
            raise InvalidRequest(f"{where}: {column} is {text!r}; use a whole number, 0 or more")
    return at, Line(vm, *map(int, numbers))


def _add(before: Line | None, line: Line) -> Line:
    if before is None:
        return line
    return Line(
        line.vm,
        before.opened + line.opened,
        before.closed + line.closed,
        before.packets + line.packets,
        before.bytes + line.bytes,
    )
