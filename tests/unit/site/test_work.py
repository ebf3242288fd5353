"""
What the manager does costs in proportion to what has changed, not to the size of the site or to what happened before.

Counted in bytecode instructions, so a slow or busy machine makes no difference. The larger site of each pair has four
times as many hosts, VMs and external addresses; a tenth more work is granted for what it takes to find one entry among
more.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable

import pytest

from cpm.core.sizing.sizer import Target
from cpm.protocol.errors import PortsExhausted
from cpm.protocol.messages import Delta
from cpm.protocol.model import DomainUUID
from cpm.settings import PoolSettings
from tests.fakes.many_nodes import EDGES, ManyNodes
from tests.work import instructions

SMALL, LARGE = 5, 20
VMS = 4
GRANTED = 1.1


def resize(site: ManyNodes) -> None:
    uuid = site.vms_of(site.hosts[0])[0]
    before = site.active(uuid)
    assert before is not None
    site.manager.sizer.resize(uuid, Target(before.ports.size + 64, 200), site.now)
    site.settle()
    after = site.active(uuid)
    assert after is not None
    assert after.ports.size == before.ports.size + 64
    assert {name for name, _ in site.messages} == {*EDGES, site.hosts[0]}


def relocate(site: ManyNodes) -> None:
    uuid = site.vms_of(site.hosts[0])[1]
    before = site.active(uuid)
    site.manager.sizer.relocate(uuid, site.now)
    site.settle()
    assert site.active(uuid) != before


def list_vms(site: ManyNodes) -> None:
    site.present(site.hosts[0])
    site.settle()


def report(site: ManyNodes) -> None:
    site.report(site.hosts[0])
    site.settle()


def lose_and_greet_a_host(site: ManyNodes) -> None:
    site.manager.on_session_end(site.hosts[0], site.now)
    site.settle()
    site.hello(site.hosts[0])
    site.settle()
    assert {name for name, _ in site.messages} == {site.hosts[0]}


def tick(site: ManyNodes) -> None:
    site.now += 1.0
    site.manager.tick(site.now)
    site.settle()
    assert site.messages == []


@pytest.mark.parametrize("act", [resize, relocate, list_vms, report, lose_and_greet_a_host, tick])
def test_the_work_does_not_grow_with_the_site(act: Callable[[ManyNodes], None]) -> None:
    work = []
    for hosts in (SMALL, LARGE):
        site = ManyNodes(hosts, VMS, addresses=hosts * 10)
        act(site)  # the first time may fill something
        work.append(instructions(lambda site=site: act(site)))  # type: ignore[misc]
    assert work[1] <= work[0] * GRANTED


def live_for_long(site: ManyNodes) -> None:
    """Have VMs grow, move and shrink hundreds of times, and everything that they left be free again."""
    chance = random.Random(3)
    for number in range(400):
        site.now += 1.0
        host = site.hosts[number % len(site.hosts)]
        uuid = site.vms_of(host)[number % VMS]
        if number % 3 == 0:
            with contextlib.suppress(PortsExhausted):
                site.manager.sizer.relocate(uuid, site.now)
        else:
            site.manager.sizer.resize(uuid, Target(256 + 64 * chance.randrange(6), 200), site.now)
        site.settle()
        for each in site.hosts:
            site.report(each, draining=0)
        site.manager.tick(site.now)
        site.settle()
    for host in site.hosts:
        for uuid in site.vms_of(host):
            site.manager.sizer.resize(uuid, Target(256, 100), site.now)
    for _ in range(200):
        site.now += 1.0
        for each in site.hosts:
            site.report(each, draining=0)
        site.manager.tick(site.now)
        site.settle()
    assert not site.manager.fleet.leaving


@pytest.mark.parametrize("act", [resize, relocate, list_vms, report, lose_and_greet_a_host, tick])
def test_the_work_does_not_grow_with_time(act: Callable[[ManyNodes], None]) -> None:
    site = ManyNodes(SMALL, VMS)
    work = []
    for _ in range(2):
        act(site)
        work.append(instructions(lambda: act(site)))
        live_for_long(site)
    assert work[1] <= work[0] * GRANTED


def test_a_list_that_says_nothing_new_changes_nothing_and_is_told_to_nobody() -> None:
    site = ManyNodes(SMALL, VMS)
    site.present(site.hosts[0])
    assert not site.manager.fleet.changed
    site.settle()
    assert (site.messages, site.changes) == ([], [])


def test_a_change_of_one_vm_is_told_to_its_host_and_the_edges_and_names_no_other() -> None:
    site = ManyNodes(LARGE, VMS)
    resize(site)
    uuid = site.vms_of(site.hosts[0])[0]
    for _, message in site.messages:
        assert isinstance(message, Delta)
        assert {vm.domain for vm in (*message.host, *message.edge)} == {uuid}
        assert message.path is None


@pytest.mark.parametrize("pass_", ["retry", "list"])
def test_a_shortage_costs_in_proportion_to_the_vms_that_wait(pass_: str) -> None:
    work = []
    for vms in (20, 80):
        # Room for two VMs; all others wait.
        site = ManyNodes(1, vms, addresses=1, ports=128, pool=PoolSettings(initial=64, start_reserve=0.0))
        assert len(site.manager.waiting) == vms - 2

        def act(site: ManyNodes = site) -> None:
            site.now += 5.0
            if pass_ == "retry":
                site.manager.tick(site.now)
            else:
                site.present(site.hosts[0])
            site.manager.take(site.now)

        act()
        work.append(instructions(act))
    assert work[1] <= work[0] * 4 * GRANTED


@pytest.mark.parametrize(("act", "granted"), [("report", 300), ("present", 200)])
def test_what_is_as_it_was_costs_little(act: str, granted: int) -> None:
    """10 microseconds of a processor are about 1,000 instructions: 500 hosts of 100 VMs say this each second."""
    vms = 50
    site = ManyNodes(1, vms)
    site.report(site.hosts[0])
    assert instructions(lambda: getattr(site, act)(site.hosts[0])) <= vms * granted


def test_the_short_way_of_a_report_leads_to_where_the_long_one_does() -> None:
    sites = [ManyNodes(2, 20), ManyNodes(2, 20)]
    for site, counts in zip(sites, ({}, {DomainUUID("of nobody"): 1}), strict=True):
        chance = random.Random(5)
        for _ in range(300):
            site.now += 1.0
            for host in site.hosts:
                # Nobody's counts are enough to have a report followed the long way.
                site.report(host, in_use=chance.choice((0, 40, 100, 180, 250)), draining=0, limited=counts)
            site.manager.tick(site.now)
            site.settle()
    short, long = (site.manager for site in sites)
    assert short.sizer.observed == long.sizer.observed
    assert short.fleet.vms == long.fleet.vms
    assert all(short.fleet.of(uuid) == long.fleet.of(uuid) for uuid in long.fleet.vms)
    assert any(range_.id > 40 for uuid in long.fleet.vms for range_ in long.fleet.of(uuid))
