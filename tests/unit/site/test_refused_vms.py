"""A VM that the kernel of a node refuses holds up nobody else, and gives none of its ports away."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Address, IPv4Network

import pytest

from cpm.core.sizing.sizer import Target
from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent, ExternalRange, HostIntent
from cpm.protocol.model import AllocationState, DomainUUID, NodeName, PortRange, Role
from cpm.queries import node_states, nodes, vms
from natctl.core.bisection import FIRST_RETRY_S
from natctl.core.domains import Listing, RunningDomain, Tap
from natctl.core.identity import Identity
from natctl.core.node import Node
from natctl.model.commands import Program, Replace
from natctl.model.entries import HostEntry, Path, Settings
from tests.fakes.kernel import FakeKernel
from tests.fakes.site import ROLES, Site
from tests.fakes.site import _program as carry_out
from tests.unit.site.test_edge_service import EDGE1, EDGE2, HOST1, HOST2, size, started, wait, ways

BAD = DomainUUID("00000000-0000-0000-0000-0000000000bd")
VMS = [DomainUUID(f"00000000-0000-0000-0000-{number:012}") for number in range(1, 12)]


def refuse_everywhere(site: Site) -> None:
    for machine in site.edges:
        machine.refused_vms.add(BAD)


def accept(site: Site) -> None:
    for machine in site.machines.values():
        machine.refused_vms.clear()


def warnings(site: Site, name: NodeName) -> tuple[str, ...]:
    assert site.manager is not None
    return next(view.warnings for view in nodes.node_views(site.manager, site.now) if view.name == name)


def states(site: Site) -> list[AllocationState]:
    assert site.manager is not None
    return [allocation.state for allocation in site.manager.fleet.of(BAD)]


def test_a_vm_that_every_edge_refuses_stops_no_change_of_others() -> None:
    site = Site()
    started(site, VMS[0])
    refuse_everywhere(site)
    # All of these are decided before the edges hear of any.
    request = site.start_vm(HOST2, BAD)
    others = [site.start_vm(HOST1 if number % 2 else HOST2, uuid) for number, uuid in enumerate(VMS[1:])]
    site.run()
    answers = {**site.machines[HOST1].answers, **site.machines[HOST2].answers}
    assert [answers.get(each) for each in others] == [""] * len(others)
    assert request not in answers
    wait(site, 20.0)
    assert ways(site) == {EDGE1, EDGE2}
    site.ask(lambda manager: manager.sizer.resize(VMS[0], Target(512), site.now))
    site.run()
    assert size(site, VMS[0]) == 512
    assert states(site) == [AllocationState.RESERVED]
    assert [("vm-00bd" in text, "unreachable" in text) for text in warnings(site, EDGE1)] == [(True, True)]
    assert site.manager is not None
    shown = next(vm for vm in vms.summaries(site.manager, site.now, all=True) if vm.uuid == BAD)
    assert shown.problem.startswith("refused by the kernel of edge1, edge2: cannot set the route")
    accept(site)
    wait(site, 70.0)
    assert states(site) == [AllocationState.ACTIVE]
    assert warnings(site, EDGE1) == ()


def test_it_is_tried_again_by_itself_after_a_while_and_less_and_less_often() -> None:
    site = Site()
    refuse_everywhere(site)
    site.start_vm(HOST1, BAD)
    site.run()
    edge = site.machines[EDGE1]
    tried: list[float] = []
    for _ in range(600):
        before = len(tried)
        site.pass_time(0.5)
        while edge.work:
            if len(tried) == before:
                tried.append(site.now)
            site.kernel_step(EDGE1)
        site.run()
    pauses = [round(later - sooner) for sooner, later in itertools.pairwise(tried)]
    assert pauses[:4] == [10, 20, 40, 60]
    assert set(pauses[4:]) == {60}
    assert tried[0] - 1_000_000.0 < 3 * FIRST_RETRY_S


def test_ports_whose_removal_an_edge_refuses_stay_the_vms() -> None:
    site = Site(hold_down_s=10.0)
    started(site, BAD)
    site.machines[EDGE1].refused_vms.add(BAD)
    site.stop_vm(BAD)
    wait(site, 60.0)
    assert BAD in site.machines[EDGE1].kernel.edge
    assert states(site) == [AllocationState.HELD]
    assert site.manager is not None
    assert node_states.held_up(site.manager, site.now)[EDGE1].ports == 256
    # Also for a manager, or a natd, that begins anew.
    site.crash_manager()
    site.heal()
    wait(site, 30.0)
    site.kill_natd(EDGE1)
    site.start_natd(EDGE1)
    site.connect(EDGE1)
    wait(site, 30.0)
    assert states(site) == [AllocationState.HELD]
    accept(site)
    wait(site, 70.0)
    assert states(site) == []
    assert BAD not in site.machines[EDGE1].kernel.edge


@pytest.mark.parametrize("restarts", [False, True])
def test_an_edge_that_alone_refuses_a_vm_leaves_service_for_it(restarts: bool) -> None:
    site = Site()
    started(site, VMS[0])
    site.machines[EDGE2].refused_vms.add(BAD)
    request = site.start_vm(HOST1, BAD)
    wait(site, 8.0)
    assert site.machines[HOST1].answers[request] == ""
    assert ways(site) == {EDGE1}
    if restarts:
        site.kill_natd(EDGE2)
        site.start_natd(EDGE2)
        site.connect(EDGE2)
    wait(site, 30.0)
    # It does not come and go.
    assert ways(site) == {EDGE1}
    accept(site)
    wait(site, 70.0)
    assert ways(site) == {EDGE1, EDGE2}


def test_an_edge_that_refuses_a_vm_is_not_preferred_to_one_that_is_away_for_a_moment() -> None:
    site = Site()
    site.kill_natd(EDGE2)
    wait(site, 20.0)
    started(site, BAD)
    assert ways(site) == {EDGE1}
    site.disconnect(EDGE1)
    site.machines[EDGE2].refused_vms.add(BAD)
    site.start_natd(EDGE2)
    site.connect(EDGE2)
    site.run()
    assert ways(site) == {EDGE1}
    # But to one that may be dead it is.
    site.machines[EDGE1].stuck = True
    for _ in range(14):
        site.pass_time(1.0)
    assert site.manager is not None
    assert [node.name for node in site.manager.edge_service.in_service()] == [EDGE2]


def test_an_edge_that_refuses_a_vm_is_not_preferred_to_one_that_has_just_connected_again() -> None:
    """Which may have a range that its host uses, and has not confirmed yet."""
    site = Site()
    site.kill_natd(EDGE2)
    wait(site, 20.0)
    started(site, VMS[0])
    site.machines[HOST1].stuck = True
    site.start_vm(HOST1, BAD)
    site.run()
    assert site.manager is not None
    assert [each.state for each in site.manager.fleet.of(BAD)] == [AllocationState.RESERVED]
    site.disconnect(EDGE1)
    site.connect(EDGE1)
    site.deliver_up(EDGE1)
    site.machines[EDGE2].refused_vms.add(BAD)
    site.start_natd(EDGE2)
    site.connect(EDGE2)
    while site.deliver_up(EDGE2) or site.deliver_down(EDGE2) or site.kernel_step(EDGE2):
        pass
    assert BAD in site.manager.sessions[EDGE2].refused
    assert [node.name for node in site.manager.edge_service.in_service()] == [EDGE1]


def test_an_edge_that_refuses_a_vm_stays_out_while_the_one_that_has_it_is_slow() -> None:
    site = Site()
    started(site, VMS[0])
    site.machines[EDGE2].refused_vms.add(BAD)
    request = site.start_vm(HOST2, BAD)
    wait(site, 20.0)
    assert site.machines[HOST2].answers.get(request) == ""
    assert ways(site, HOST2) == {EDGE1}
    # Edge2 has answered to the VM's change before edge1 does.
    site.machines[EDGE1].stuck = True
    site.ask(lambda manager: manager.sizer.resize(BAD, Target(512, 10), site.now))
    site.run()
    assert ways(site, HOST2) == {EDGE1}


def test_edges_that_all_refuse_a_vm_serve_again_after_a_restart() -> None:
    site = Site()
    started(site, VMS[0])
    refuse_everywhere(site)
    site.start_vm(HOST1, BAD)
    site.run()
    for name in (EDGE1, EDGE2):
        site.kill_natd(name)
        wait(site, 15.0)
        site.start_natd(name)
        site.connect(name)
        wait(site, 15.0)
        assert ways(site) == {EDGE1, EDGE2}


def test_a_host_that_refuses_a_vm_goes_on_with_its_others_and_counts_nothing_too_early() -> None:
    site = Site(hold_down_s=10.0)
    started(site, BAD)
    assert site.open(BAD, 3) is not None
    host = site.machines[HOST1]
    host.refused_vms.add(BAD)
    site.ask(lambda manager: manager.sizer.relocate(BAD, site.now))
    wait(site, 10.0)
    request = site.start_vm(HOST1, VMS[0])
    wait(site, 2.0)
    assert host.answers[request] == ""
    site.connections = {each for each in site.connections if each.domain != BAD}
    for _ in range(5):
        # Nothing is on the former range just now; the kernel goes on handing it out.
        site.report(HOST1, busy=False)
        wait(site, 1.0)
    assert site.open(BAD, 5) is not None
    accept(site)
    wait(site, 70.0)
    site.report(HOST1, busy=False)
    site.run()
    assert AllocationState.ACTIVE in states(site)


@pytest.mark.parametrize("is_removal", [False, True])
def test_an_edge_that_has_said_what_it_maps_changes_nothing_until_the_manager_has_said_more(is_removal: bool) -> None:
    site = Site(hold_down_s=10.0)
    edge = site.machines[EDGE1]
    if is_removal:
        started(site, BAD)
    edge.refused_vms.add(BAD)
    if is_removal:
        site.stop_vm(BAD)
    else:
        site.start_vm(HOST1, BAD)
    site.run()
    # Since its last message the manager may have been restored from a copy that knows nothing of the refused change.
    site.disconnect(EDGE1)
    site.connect(EDGE1)
    assert site.deliver_up(EDGE1)
    accept(site)
    assert edge.node is not None
    edge.node.on_tick(site.now + 70.0)
    site._carry_out(edge)
    site.kernel_step(EDGE1)
    assert (BAD in edge.kernel.edge) is is_removal
    site.run()
    assert (BAD in edge.kernel.edge) is not is_removal


@pytest.mark.parametrize("is_range_refused", [False, True])
def test_a_natd_that_begins_anew_on_a_host_that_is_an_edge_keeps_what_that_maps(is_range_refused: bool) -> None:
    both = Settings(ROLES[Role.HOST].host, ROLES[Role.EDGE].edge)
    kernel, path = FakeKernel(both), Path(IPv4Network("100.64.0.0/10"), frozenset())
    internal, external, ports = IPv4Address("100.64.0.1"), IPv4Address("203.0.113.1"), PortRange(1024, 1279)
    entry = HostEntry(HostIntent(BAD, "vm", internal, ports), 1, frozenset({7}))
    mapped = EdgeIntent(BAD, "vm", internal, None, (ExternalRange(external, ports),))
    kernel.replace({BAD: entry}, {BAD: mapped}, path)
    found = kernel.observe()
    identity = Identity(HOST1, frozenset({Role.HOST, Role.EDGE}), IPv4Address("172.30.0.11"), "test")
    node = Node(identity, marks=1000, has_libvirt=True)
    # Its interface is another one than the kernel knows.
    node.on_kernel_found(found.host.values(), found.path, {8: "vnet0"}, 0.0, found.edge.values())
    vm = RunningDomain(BAD, "vm", frozenset({Tap("vnet0", 8)}))
    node.on_domains_listed(Listing(0.0, (vm,)), 0.0)
    refusals = 1 if is_range_refused else 0
    kernel.restart_natd()
    for now in range(100):
        node.on_tick(float(now))
        for command in node.take():
            if not isinstance(command, Program | Replace):
                continue
            if refusals:
                refusals -= 1
                node.on_kernel_refused(KernelError("program nftables", 12, "out of memory"), float(now))
                continue
            carry_out(kernel, command)
            node.on_kernel_programmed(float(now))
            assert kernel.edge == {BAD: mapped}
    assert not refusals
    assert kernel.host[BAD].taps == {8}
