"""
docs/architecture.md names the modules through which a VM start, a sample and a signal pass.

Each is traced once in the virtual site. Its kernels and its network are fake: of modules that do rather than decide,
and of ``natctl.ruleset``, only the existence is checked.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest

from cpm.protocol import codec
from cpm.protocol.messages import Need
from cpm.protocol.model import DomainUUID, NodeName
from natctl.model.commands import Send
from tests.fakes.site import Site

PAGE = Path(__file__).parents[3] / "docs" / "architecture.md"
VM = DomainUUID("00000000-0000-4000-8000-000000000001")
HOST = NodeName("host1")

DECIDING = ("cpm.core.", "cpm.ledger.", "natctl.core.", "natctl.arrivals.")
"""Packages whose modules are to be named where they run."""

HELPERS = {
    "cpm.core.membership": "asked after each decision for nodes that were revoked",
    "cpm.core.tallies": "counts for metrics",
    "natctl.core.signal_times": "times for metrics",
    "natctl.core.port_control": "told of each kernel command, for guests that wait for ports",
    "cpm.core.placement.grid": "arithmetic of blocks",
    "cpm.core.placement.runs": "the free runs that AddressSpace is made of",
    "cpm.ledger.connection": "SQLite's errors as ours",
    "cpm.ledger.rows": "values as columns, and back",
    "natctl.arrivals.phases": "the transition tables that the records of arrivals look up",
    "natctl.arrivals.port_headroom": "arithmetic of the kernel's search for a free port",
    "natctl.arrivals.vm": "holds the records of one VM",
}
"""Modules that need not be named where they run, with what they are."""

AT_REST = {"natctl.arrivals.deferral", "natctl.arrivals.refusal", "natctl.arrivals.requests"}
"""Records of a VM's arrivals that are created or asked with the others, while nothing happens in them."""


def modules_that_run(act: Callable[[], object]) -> set[str]:
    """Return the deciding modules of which a function runs, except those that a dataclass generates."""
    seen: set[str] = set()

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.endswith(".py"):
            seen.add(frame.f_globals.get("__name__", ""))

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        act()
    finally:
        sys.setprofile(before)
    return {module for module in seen if module.startswith(DECIDING)}


def modules_named(title: str) -> set[str]:
    """Return the modules that a section of the page names, as `a.b.c`."""
    section = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", PAGE.read_text(), re.M | re.S)
    assert section is not None, title
    return set(re.findall(r"`((?:cpm|natctl|qga_agent|libvirt_hooks)(?:\.\w+)+)`", section[1]))


def start(site: Site) -> None:
    request = site.start_vm(HOST, VM)
    site.run()
    assert site.machines[HOST].answers[request] == ""


def sample(site: Site) -> None:
    site.report(HOST, busy=True)
    site.run()
    assert ports_of_vm(site) > site.settings.pool.initial


def signal(site: Site) -> None:
    machine = site.machines[HOST]
    assert machine.node is not None
    site.now += 1.0
    machine.node.arrival_events.on_budget_used_up(machine.kernel.host[VM].index, site.now)
    (need,) = (command.message for command in machine.node.take() if isinstance(command, Send))
    assert isinstance(need, Need)
    machine.to_manager.append(codec.encode(need))
    site.run()
    assert ports_of_vm(site) > site.settings.pool.initial


def ports_of_vm(site: Site) -> int:
    ports = site.machines[HOST].kernel.host[VM].intent.ports
    return ports.size if ports is not None else 0


def busy_site() -> Site:
    """Return a site with a VM that uses nearly all its ports."""
    site = Site()
    start(site)
    assert all(site.open(VM, offset) for offset in range(site.settings.pool.initial - 2))
    return site


ROADS: dict[str, tuple[Callable[[], Site], Callable[[Site], None]]] = {
    "The way of one VM start": (Site, start),
    "The way of one sample": (busy_site, sample),
    "The way of one signal": (busy_site, signal),
}
GOES_ON_AS: dict[str, tuple[str, ...]] = {
    "The way of one VM start": (),
    "The way of one sample": ("The way of one VM start",),
    "The way of one signal": ("The way of one sample", "The way of one VM start"),
}
"""Sections to which a section refers for its later steps, so that it need not name their modules again."""


@pytest.mark.parametrize("title", ROADS)
def test_every_module_that_decides_is_named(title: str) -> None:
    prepare, act = ROADS[title]
    site = prepare()
    run = modules_that_run(lambda: act(site))
    named = set().union(*map(modules_named, (title, *GOES_ON_AS[title])))
    assert run - named - HELPERS.keys() - AT_REST == set()


@pytest.mark.parametrize("title", ROADS)
def test_every_module_that_is_named_runs(title: str) -> None:
    prepare, act = ROADS[title]
    site = prepare()
    run = modules_that_run(lambda: act(site))
    named = modules_named(title)
    assert {module for module in named if module.startswith(DECIDING)} - run == set()
    assert [module for module in sorted(named) if importlib.util.find_spec(module) is None] == []


def test_no_exemption_is_out_of_date() -> None:
    def all_of_them() -> None:
        for prepare, act in ROADS.values():
            act(prepare())

    run = modules_that_run(all_of_them)
    assert (HELPERS.keys() | AT_REST) - run == set()
