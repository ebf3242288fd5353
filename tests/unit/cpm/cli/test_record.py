"""``virt-ports record`` writes traces that ``simulate`` can read."""

from __future__ import annotations

from pathlib import Path

from cpm.api.views import MeasurementView, ReportView
from cpm.protocol import codec
from cpm.protocol.model import NodeName
from cpm.protocol.walltime import UtcSeconds
from cpm.simulation import read
from tests.fakes.canned_manager import Answer, CannedManager
from tests.unit.cpm.cli.conftest import DB, NOW, WEB, Command

HOST = NodeName("host1")
TARGET = "GET /v1/measurements?follow=1"


def report(after_s: float, *ports: int) -> ReportView:
    vms = zip(('web, "old"', "db"), (WEB, DB), ports, strict=False)
    measured = tuple(MeasurementView(name, uuid, 10.0, 0.08, in_use, 2, 5.0) for name, uuid, in_use in vms)
    return ReportView(UtcSeconds(NOW + after_s), HOST, 1.0, measured)


def streamed(*reports: ReportView) -> Answer:
    return lambda handler: handler.send(200, b"".join(codec.encode(each) + b"\n" for each in reports))


def test_a_recording_is_a_trace(manager: CannedManager, virt_ports: Command, tmp_path: Path) -> None:
    path = tmp_path / "load.csv"
    manager.on(TARGET, streamed(report(0, 10, 3), report(1.01, 12, 3), report(2.02), report(3.1, 1)))
    result = virt_ports("record", str(path), "--for", "3")
    assert (result.code, result.out) == (0, "6 lines of 2 VMs over 2 s\n")
    trace = read(path.read_text().splitlines(keepends=True), "load.csv")
    assert trace.vms == ('web, "old"', "db")
    assert [[(line.opened, line.closed) for line in lines] for lines in trace.steps] == [
        [(12, 0), (5, 0)],
        [(5, 3), (5, 5)],
        [(0, 5), (0, 14)],
    ]
    assert trace.steps[0][0].packets == 10
    assert trace.steps[0][0].bytes == 10_000


def test_a_recording_is_written_up_to_the_end_of_the_manager(
    manager: CannedManager, virt_ports: Command, tmp_path: Path
) -> None:
    manager.on(TARGET, streamed(report(0, 10)))
    result = virt_ports("record", str(tmp_path / "load.csv"))
    assert (result.code, "the manager ended the stream" in result.err) == (3, True)
    assert read((tmp_path / "load.csv").read_text().splitlines(keepends=True), "load.csv").connections == 12


def test_a_file_that_cannot_be_written_is_refused(virt_ports: Command) -> None:
    result = virt_ports("record", "/nowhere/load.csv")
    assert (result.code, "cannot write /nowhere/load.csv" in result.err) == (2, True)
