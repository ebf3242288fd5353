from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from lab.errors import LabError
from lab.process import Process, ProcessTable


def test_a_process_is_found_again_and_ended(tmp_path: Path) -> None:
    table = ProcessTable(tmp_path / "processes")
    started = table.start("sleeper", ["sleep", "600"], log=tmp_path / "log")
    assert ProcessTable(tmp_path / "processes").get("sleeper") == started
    with pytest.raises(LabError, match="already runs"):
        table.start("sleeper", ["sleep", "600"], log=tmp_path / "log")
    table.end("sleeper")
    assert not started.alive
    assert table.names() == []
    assert not Path(f"/proc/{started.pid}").exists()  # reaped


def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    table = ProcessTable(tmp_path / "processes")
    reader, writer = os.pipe()
    script = "trap '' TERM; echo ready >&3; while :; do sleep 600; done"
    stubborn = table.start("stubborn", ["bash", "-c", script], log=tmp_path / "log", report_fd=writer)
    os.close(writer)
    assert os.read(reader, 16) == b"ready\n"
    os.close(reader)
    orphans = stubborn.children
    table.end("stubborn", grace_s=0.2)
    assert not stubborn.alive
    for pid in orphans:
        orphan = Process.find(pid)
        if orphan:
            orphan.end(grace_s=1.0)


def test_an_id_that_somebody_else_has_now_is_not_taken_for_ours(tmp_path: Path) -> None:
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        (tmp_path / "daemon").write_text(f"{stranger.pid} 1\n")
        table = ProcessTable(tmp_path)
        assert table.get("daemon") is None
        table.end("daemon")
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_a_missing_program_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="make setup"):
        ProcessTable(tmp_path / "p").start("x", ["no-such-program-anywhere"], log=tmp_path / "log")
