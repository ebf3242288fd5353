"""A host gets what its quota allows, says so, and no other host has less because of it."""

from __future__ import annotations

import random

import pytest

from cpm.core.membership import ApprovalRequest
from cpm.core.quotas import DEFAULT
from cpm.protocol.messages import Attach, Need, Presence, Present, Refused
from cpm.protocol.model import AllocationState, DomainUUID, NodeName
from cpm.queries import explain_facts
from cpm.queries import nodes as node_queries
from cpm.queries import vms as vm_queries
from tests.fakes.site import Site

HOST1, HOST2 = NodeName("host1"), NodeName("host2")


def uuid(number: int) -> DomainUUID:
    return DomainUUID(f"00000000-0000-0000-0000-{number:012d}")


def limited(site: Site, *, vms: int | None = None, ports: int | None = None) -> None:
    request = ApprovalRequest(max_vms=vms, max_ports=ports)
    site.ask(lambda manager: manager.membership.approve(HOST2, request, site.now))


def attach(site: Site, number: int, host: NodeName = HOST2) -> list[object]:
    """Have a host say that it starts a VM; return the refusals that it gets."""
    seen: list[object] = []
    site.on_outcome = lambda outcome: seen.extend(m for _, m in outcome.messages if isinstance(m, Refused))
    site.ask(lambda manager: manager.on_message(host, Attach(uuid(number), f"vm{number}"), site.now))
    site.on_outcome = None
    return seen


def held(site: Site, host: NodeName) -> int:
    assert site.manager is not None
    fleet = site.manager.fleet
    return sum(each.ports.size for vm in fleet.vms for each in fleet.of(vm) if each.node == host)


def test_no_usual_host_meets_the_default() -> None:
    assert DEFAULT.vms >= 1000
    assert DEFAULT.ports >= 1000 * 256


def test_a_host_that_names_more_vms_than_its_quota_is_refused_the_others() -> None:
    site = Site()
    limited(site, vms=3)
    refusals = [attach(site, number) for number in range(1, 6)]
    assert [bool(each) for each in refusals] == [False, False, False, True, True]
    (said,) = refusals[3]
    assert isinstance(said, Refused)
    assert said.code == "quota-reached"
    assert said.message.endswith("`virt-ports node approve host2 --max-vms N`")
    assert site.manager is not None
    assert len(site.manager.fleet.vms) == 3
    assert not site.manager.waiting
    # Nothing is kept of what was refused, however much that is.
    many = tuple(Presence(uuid(number), "made up") for number in range(1, 2000))
    site.ask(lambda manager: manager.on_message(HOST2, Present(many), site.now))
    assert (len(site.manager.fleet.vms), len(site.manager.sizer.observed)) == (3, 0)
    view = next(view for view in node_queries.node_views(site.manager, site.now) if view.name == HOST2)
    assert (view.vms, view.max_vms) == (3, 3)
    assert view.warnings[0].startswith("it has VMs without ports: host host2 is at its quota of 3 VMs")


def test_other_hosts_start_vms_while_one_is_at_its_quota() -> None:
    site = Site()
    limited(site, vms=1, ports=256)
    attach(site, 1)
    assert attach(site, 2)
    request = site.start_vm(HOST1, uuid(9))
    site.run()
    assert site.machines[HOST1].answers[request] == ""


def test_a_vm_that_was_refused_gets_ports_when_the_quota_has_room() -> None:
    site = Site(hold_down_s=1.0)
    limited(site, vms=1)
    site.start_vm(HOST2, uuid(1))
    request = site.start_vm(HOST2, uuid(2))
    site.run()
    assert site.machines[HOST2].answers[request] == "quota-reached"
    limited(site, vms=2)
    site.heal()
    assert site.manager is not None
    assert site.manager.fleet.one(uuid(2), AllocationState.ACTIVE) is not None


def test_vms_that_ended_count_while_they_hold_ports() -> None:
    site = Site(hold_down_s=60.0)
    limited(site, vms=1)
    site.start_vm(HOST2, uuid(1))
    site.run()
    site.stop_vm(uuid(1))
    site.run()
    assert attach(site, 2)
    for _ in range(70):
        site.pass_time(1.0)
        site.run()
    assert not attach(site, 2)


def test_first_ranges_stay_within_the_quota_of_ports() -> None:
    site = Site()
    limited(site, ports=256 + 128)
    assert not attach(site, 1)
    assert not attach(site, 2)
    (said,) = attach(site, 3)
    assert isinstance(said, Refused)
    assert said.code == "quota-reached"
    assert held(site, HOST2) == 256 + 128
    assert site.manager is not None
    assert not site.manager.waiting, "others would have to give back for it"
    assert (
        explain_facts.explanation(site.manager, uuid(3), site.now).lines[0].endswith("has no ports: they were refused.")
    )
    assert vm_queries.detail(site.manager, site.now, uuid(3)).decided.startswith(
        "host host2 is at its quota of 384 ports"
    )


def test_growth_stays_within_the_quota_and_asks_nobody_to_give_back() -> None:
    site = Site()
    limited(site, ports=512)
    site.start_vm(HOST2, uuid(1))
    site.start_vm(HOST1, uuid(9))
    site.run()
    assert site.manager is not None
    for _ in range(10):
        active = site.manager.fleet.one(uuid(1), AllocationState.ACTIVE)
        assert active is not None
        need = Need(uuid(1), active.ports, active.ports.size - 1, 5000.0)
        site.ask(lambda manager, need=need: manager.on_message(HOST2, need, site.now))  # type: ignore[misc]
        site.run()
        assert held(site, HOST2) <= 512
        site.pass_time(1.0)
        site.run()
    assert held(site, HOST2) == 512
    assert site.manager.sizer.contention_in("default").waiting_to_grow == 0
    assert not site.manager.sizer.contention_in("default").is_short(site.now)
    assert held(site, HOST1) == 256
    assert "at its quota of" in vm_queries.detail(site.manager, site.now, uuid(1)).decided


def test_a_migration_to_a_host_at_its_quota_leaves_the_vm_without_ports_and_frees_its_own() -> None:
    site = Site(hold_down_s=1.0)
    limited(site, vms=1)
    site.start_vm(HOST2, uuid(1))
    site.start_vm(HOST1, uuid(2))
    site.run()
    site.migrate(uuid(2), HOST2)
    site.resume(uuid(2), HOST2)
    site.left(uuid(2), HOST1)
    site.run()
    assert site.manager is not None
    assert uuid(2) not in site.manager.present
    for _ in range(5):
        site.pass_time(1.0)
        site.run()
    assert held(site, HOST1) == 0
    limited(site, vms=2)
    site.heal()
    assert site.manager.present[uuid(2)] == HOST2


@pytest.mark.parametrize("seed", range(20))
def test_what_is_counted_is_what_is_there(seed: int) -> None:
    """Starts, ends and migrations at random, with a restart of the manager in between."""
    dice = random.Random(seed)
    site = Site(hold_down_s=2.0)
    for _ in range(40):
        number = dice.randrange(1, 6)
        where = [name for name in (HOST1, HOST2) if uuid(number) in site.machines[name].guests]
        if not where:
            site.start_vm(dice.choice((HOST1, HOST2)), uuid(number))
        elif dice.random() < 0.5:
            site.stop_vm(uuid(number))
        else:
            to = HOST2 if where == [HOST1] else HOST1
            site.migrate(uuid(number), to)
            site.resume(uuid(number), to)
            site.left(uuid(number), where[0])
        site.run()
        site.pass_time(1.0)
        site.run()
        if dice.random() < 0.1:
            site.crash_manager()
            site.heal()
        assert site.manager is not None
        fleet = site.manager.fleet
        for host in (HOST1, HOST2):
            assert fleet.use.ports(host) == held(site, host)
            assert fleet.use.vms(host) == sum(vm.node == host for vm in fleet.vms.values())
