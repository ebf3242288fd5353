"""Prometheus' own tools, as ``make setup`` unpacks them: what we write is read by the ones who defined it."""

from __future__ import annotations

import subprocess
from pathlib import Path

DIRECTORY = Path(__file__).parents[1] / "build" / "prometheus" / "usr" / "bin"
PROMETHEUS = DIRECTORY / "prometheus"
PROMTOOL = DIRECTORY / "promtool"


def check_metrics(text: str) -> str:
    """Return what ``promtool check metrics`` says against a text; empty: nothing."""
    done = subprocess.run([PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def run(*arguments: str | Path) -> str:
    """Run ``promtool``; return its output. :raise AssertionError: When it fails."""
    done = subprocess.run([PROMTOOL, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
