"""
``virt-ports record``: records the load of VMs, second by second, as a trace for ``virt-ports simulate``.

Tested in ``tests/unit/cpm/cli/test_record.py``.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TextIO

from cpm.cli import parsing, render
from cpm.protocol.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.api.views import MeasurementView, ReportView
    from cpm.cli.documents import RecordDocument
    from cpm.simulation import Sample

STEP_S = 1.0
"""Seconds per step of the trace."""

_EXAMPLES = """\
  virt-ports record monday.csv --for 3600       an hour
  virt-ports record - | head -100               the first lines
  virt-ports record day.csv --for 86400 && virt-ports simulate day.csv"""

_ABOUT = """\
Writes a line for every VM and period of its host (1 s by default): connections
opened and closed, packets, bytes; the format is in docs/reference/trace.md.
Ends after --for seconds or with Ctrl-C; the trace is then complete up to that
moment. An existing file is replaced. Prints how much was recorded (on stderr
when the trace goes to standard output)."""

VERB = parsing.Verb(120, "record the load as a trace", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("file", metavar="FILE", help="file to write; - is standard output")
    verb.add_argument("--for", metavar="SECONDS", dest="seconds", type=parsing.count, help="how long (default: until "
                      "Ctrl-C)")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Write the trace until the time is over or the user interrupts."""
    from cpm.api.operations import MEASUREMENTS
    from cpm.cli import progress

    reports = parsing.client(args).stream(MEASUREMENTS, follow=True)
    vms: set[str] = set()
    lines, last = 0, 0.0
    whole = f" of {args.seconds}" if args.seconds is not None else ""
    with (
        progress.line(fills_stdout=args.file == "-") as say,
        _output_file(args.file) as file,
        contextlib.suppress(KeyboardInterrupt),
    ):
        for at, name, text in _rows(reports, args.seconds):
            render.emit_exact(text, file)
            vms.add(name)
            lines, last = lines + bool(name), at
            say(f"{at:.0f}{whole} s, {lines} lines")
    vms.discard("")
    facts: RecordDocument = {"file": args.file, "vms": len(vms), "seconds": round(last, 1), "lines": lines}
    if parsing.wants_json(args) and args.file != "-":
        render.emit_document(facts)
    else:
        words = f"{lines} lines of {len(vms)} VMs over {last:.0f} s\n"
        render.emit(words, sys.stderr if args.file == "-" else sys.stdout)
    return 0


def _rows(reports: Iterator[ReportView], seconds: int | None) -> Iterator[tuple[float, str, str]]:
    """Yield time in seconds, VM and text of each line, the head first; reports without VMs only advance the time."""
    from cpm import simulation

    recorder = simulation.Recorder()
    start: float | None = None
    yield 0.0, "", simulation.head(STEP_S)
    for report in reports:
        start = report.at if start is None else start
        at = max(report.at - start, 0.0)
        if seconds is not None and at >= seconds:
            return
        for line in recorder.lines(report.node, report.period_s, map(_sample, report.vms)):
            yield at, line.vm, simulation.row(float(int(at / STEP_S)) * STEP_S, line)


def _sample(view: MeasurementView) -> Sample:
    from cpm import simulation

    ports = None if view.ports_in_use is None else view.ports_in_use + view.draining_connections
    return simulation.Sample(
        view.uuid, view.name, ports, view.new_connections_per_s, view.packets_per_s, view.megabits_per_s
    )


@contextlib.contextmanager
def _output_file(path: str) -> Iterator[TextIO]:
    if path == "-":
        yield sys.stdout
        return
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - closed below; its errors alone are caught here
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}; choose another folder") from None
    with file:
        yield file
