"""Labs of the end-to-end tests: unique names, up and down, VMs that cost nothing, and what a lab leaves behind."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

from lab.daemons import LAB_SETTINGS, DaemonSettings
from lab.lab import STATE, Lab
from lab.net import Site
from lab.node import LibvirtHost
from lab.records import REAL, GuestRecord
from lab.sites import CLUSTER
from lab.vm import RealGuest
from tests.e2e.observing import eventually, facts

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")


def unique_name(letter: str) -> str:
    """Return a lab's name: unique by the letter within one test process, and among test processes anyway."""
    return f"t{letter}{WORKER}{os.getpid() % 100_000}"


@contextlib.contextmanager
def running(
    name: str,
    settings: DaemonSettings = LAB_SETTINGS,
    *,
    site: Site = CLUSTER,
    with_daemons: bool = True,
) -> Iterator[Lab]:
    """Bring a lab up, and down at the end; nothing of it may be left then."""
    lab = Lab(name, site=site, settings=settings, with_daemons=with_daemons)
    lab.up()
    try:
        yield lab
    finally:
        lab.down()
    assert traces(lab) == NOTHING


@contextlib.contextmanager
def paused_vm(lab: Lab, name: str, host: str) -> Iterator[None]:
    """A VM that libvirt starts and that never executes an instruction: it costs nothing and has a tap."""
    lab.add_vm(name, host, paused=True)
    try:
        yield
    finally:
        lab.remove_vm(name)


@contextlib.contextmanager
def defined(host: LibvirtHost, name: str, *changes: tuple[str, str]) -> Iterator[RealGuest]:
    """A VM that is shut off; ``changes`` replace parts of its XML."""
    vm = RealGuest(host, GuestRecord(name, REAL, host.name, str(uuid4()), "52:54:00:77:00:01"))
    xml = vm._xml()
    for before, after in changes:
        assert before in xml
        xml = xml.replace(before, after)
    host.virsh("define", "/dev/stdin", stdin=xml)
    try:
        yield vm
    finally:
        vm.remove()


def remove_guests(lab: Lab) -> None:
    """Remove all light guests and wait until their ports are free."""
    for guest in lab.guests():
        lab.remove_guest(guest.name)
    assert eventually(lambda: not facts(lab, "list", "--all"))


def traces(site: Lab) -> dict[str, list[str]]:
    """Return everything on this machine that has the lab's name in it or runs inside the lab."""
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
