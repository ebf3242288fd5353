"""Labs of the end-to-end tests: names that nobody else has, and what a lab leaves on a machine."""

from __future__ import annotations

import os
from pathlib import Path

from lab.lab import STATE, Lab

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")


def unique_name(letter: str) -> str:
    """Return a lab's name; different letters within one test process, different processes by themselves."""
    return f"t{letter}{WORKER}{os.getpid() % 100_000}"


def traces(site: Lab) -> dict[str, list[str]]:
    """Everything on this machine that has the lab's name in it or runs inside of it."""
    namespaces = [path.name for path in Path("/run/netns").glob(f"{site.name}-*")]
    processes = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = os.fsdecode((entry / "cmdline").read_bytes().replace(b"\0", b" "))
            mounts = (entry / "mountinfo").read_text()
        except OSError:
            continue
        if f"{STATE}/{site.name}/" in command or f" {STATE}/{site.name} " in mounts:
            processes.append(f"{entry.name} {command}")
    return {
        "namespaces": namespaces,
        "processes": processes,
        "mounts": [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if site.name in line],
        "files": [str(path) for path in STATE.glob(f"{site.name}*")],
    }


NOTHING: dict[str, list[str]] = {"namespaces": [], "processes": [], "mounts": [], "files": []}
