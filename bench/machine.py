"""The machine of a benchmark; figures from different machines are not comparable."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
from pathlib import Path
from typing import Any

from lab.errors import LabError
from lab.shell import run


def facts() -> dict[str, Any]:
    """Return processor, memory, kernel, versions, and how busy the machine is with other things."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "nft": _version("nft", "--version"),
        "load_1min": round(os.getloadavg()[0], 2),
    }


def _cpu() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match.group(1).strip() if match else platform.machine()


def _version(*argv: str) -> str:
    try:
        found = re.search(r"\d+(\.\d+)+", run(*argv))
    except LabError:
        return "none"
    return found.group(0) if found else "unknown"
