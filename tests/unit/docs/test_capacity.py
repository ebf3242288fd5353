"""The table on the page about capacity is what the command above it prints: a simulation with a seed has one result."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cpm.cli import main

PAGE = (Path(__file__).parents[3] / "docs/how-to/capacity.md").read_text()


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    [command] = re.findall(r"^virt-ports (simulate --generate .*)$", PAGE, re.M)
    [table] = re.findall(r"^```text\n(.*?)^```", PAGE, re.M | re.S)
    assert main.execute(shlex.split(command), now=0.0) == 0
    assert capsys.readouterr().out.rstrip() == table.rstrip()
