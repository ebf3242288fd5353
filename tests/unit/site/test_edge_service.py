"""
Which edges hosts send packets to, and which a range waits for.

That no host uses a port which an edge on its way drops is checked after every step of these stories
(:meth:`tests.fakes.site.Site.check`).
"""

from __future__ import annotations

import pytest

from cpm.core.manager import Manager
from cpm.core.sizing.sizer import Target
from cpm.protocol.errors import Conflict, KernelError
from cpm.protocol.model import DomainUUID, NodeName
from cpm.queries import nodes
from tests.fakes.site import Machine, Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OTHER = DomainUUID("00000000-0000-0000-0000-000000000002")
HOST1, HOST2, EDGE1, EDGE2 = (NodeName(name) for name in ("host1", "host2", "edge1", "edge2"))
NODES = (HOST1, HOST2, EDGE1, EDGE2)


def refuse(machine: Machine) -> None:
    machine.refusing = True


def hang(machine: Machine) -> None:
    machine.stuck = True


def started(site: Site, uuid: DomainUUID = VM, host: NodeName = HOST1) -> None:
    request = site.start_vm(host, uuid)
    site.run()
    assert site.machines[host].answers[request] == ""


def resize(site: Site, ports: int, uuid: DomainUUID = VM) -> None:
    site.ask(lambda manager: manager.sizer.resize(uuid, Target(ports), site.now))


def ways(site: Site, host: NodeName = HOST1) -> set[NodeName]:
    """Return the edges that a host spreads its packets over."""
    path = site.machines[host].kernel.path
    assert path is not None
    return {edge.identity.name for edge in site.edges if edge.identity.underlay in path.edges}


def size(site: Site, uuid: DomainUUID = VM) -> int:
    """Return how many ports a host gives to new connections of a VM; 0: it has none."""
    entries = [machine.kernel.host[uuid] for machine in site.hosts if uuid in machine.kernel.host]
    return sum(entry.intent.ports.size for entry in entries if entry.intent.ports is not None)


def sent(site: Site) -> int:
    """Return how many ports host1 was told to give to new connections of the VM."""
    node = site.machines[HOST1].node
    assert node is not None
    vm = node.guests()[VM]
    assert vm is not None
    assert vm.ports is not None
    return vm.ports.size


def carry_on(site: Site, *names: NodeName) -> None:
    """Let everything happen at these nodes, and nothing at others."""
    while sum(step(name) for name in names for step in (site.deliver_up, site.deliver_down, site.kernel_step)):
        site.check()


def wait(site: Site, seconds: float) -> None:
    """Let time pass, with everything that happens meanwhile."""
    for _ in range(int(seconds / 0.5)):
        site.pass_time(0.5)
        site.run()


def states(site: Site, uuid: DomainUUID = VM) -> list[str]:
    assert site.manager is not None
    return sorted(a.state.value for a in site.manager.fleet.of(uuid))


def fence(site: Site, name: NodeName) -> None:
    site.ask(lambda manager: manager.fence(name, site.now, fenced=True))
    site.run()


def refused_fence(site: Site, name: NodeName) -> str:
    words: list[str] = []

    def act(manager: Manager) -> None:
        with pytest.raises(Conflict) as error:
            manager.fence(name, site.now, fenced=True)
        words.append(str(error.value))

    site.ask(act)
    return words[0]


# An edge that does not confirm


@pytest.mark.parametrize("fail", [refuse, hang])
def test_an_edge_that_confirms_nothing_holds_no_start_up_and_gets_no_packets(fail: object) -> None:
    site = Site()
    started(site)
    edge2 = site.machines[EDGE2]
    fail(edge2)  # type: ignore[operator]
    request = site.start_vm(HOST2, OTHER)
    wait(site, 6.0)
    assert site.machines[HOST2].answers[request] == ""
    assert (ways(site), ways(site, HOST2)) == ({EDGE1}, {EDGE1})
    assert all(site.open(OTHER, number) for number in range(100))
    resize(site, 512)
    site.run()
    assert size(site) == 512, "what comes later does not wait at all"
    edge2.refusing = edge2.stuck = False
    wait(site, 12.0)
    assert ways(site) == {EDGE1, EDGE2}
    assert edge2.kernel.edge == site.machines[EDGE1].kernel.edge


@pytest.mark.parametrize("fail", [refuse, hang])
def test_an_edge_that_does_not_confirm_a_removal_leaves_service_after_its_grace(fail: object) -> None:
    site = Site()
    started(site)
    started(site, OTHER)
    fail(site.machines[EDGE2])  # type: ignore[operator]
    site.stop_vm(OTHER)
    wait(site, 9.0)
    assert ways(site) == {EDGE1, EDGE2}
    wait(site, 6.0)
    assert ways(site) == {EDGE1}


def test_an_edge_that_has_only_just_connected_again_takes_the_place_of_none() -> None:
    """Nobody knows what it holds before it has confirmed its snapshot."""
    site = Site()
    started(site)
    site.machines[EDGE1].stuck = True
    site.stop_vm(VM)
    site.run()
    for _ in range(9):
        site.pass_time(1.0)
    site.disconnect(EDGE2)
    site.connect(EDGE2)
    site.deliver_up(EDGE2)
    assert site.manager is not None
    assert not site.manager.sessions[EDGE2].synced
    for _ in range(3):
        site.pass_time(1.0)
    assert {node.name for node in site.manager.edge_service.in_service()} == {EDGE1, EDGE2}
    site.run()
    site.pass_time(1.0)
    assert {node.name for node in site.manager.edge_service.in_service()} == {EDGE2}


def test_an_edge_that_is_out_of_service_is_named_with_the_reason() -> None:
    site = Site()
    started(site)
    site.machines[EDGE2].refusing = True
    resize(site, 512)
    wait(site, 12.0)
    assert site.manager is not None
    views = {view.name: view for view in nodes.node_views(site.manager, site.now)}
    assert (views[EDGE2].connected, views[EDGE2].in_service) == (True, False)
    assert "out of memory" in views[EDGE2].trouble
    assert views[EDGE1].trouble == ""


def test_the_only_edge_stays_in_service_and_ranges_wait_for_it() -> None:
    site = Site()
    started(site)
    site.kill_natd(EDGE1)
    fence(site, EDGE1)
    site.machines[EDGE2].refusing = True
    resize(site, 512)
    wait(site, 60.0)
    assert (ways(site), size(site)) == ({EDGE2}, 256)
    site.machines[EDGE2].refusing = False
    wait(site, 12.0)
    assert (ways(site), size(site)) == ({EDGE2}, 512)


def test_an_edge_that_is_out_of_service_does_not_come_back_for_one_that_fails_later() -> None:
    """It lacks ports that VMs use by now; the other one's tables still have them, whatever its natd does."""
    site = Site()
    started(site)
    site.machines[EDGE2].refusing = True
    resize(site, 512)
    wait(site, 6.0)
    site.kill_natd(EDGE1)
    wait(site, 60.0)
    assert (ways(site), size(site)) == ({EDGE1}, 512)


REFUSAL = str(KernelError("program nftables", 12, "out of memory"))


def events(site: Site) -> list[tuple[str, str]]:
    """Return what the record of nodes says of edge2 since it was approved and first put into service."""
    entries = site.ledger.reader().node_events()
    return [(entry.event.value, entry.why) for entry in entries if entry.node == EDGE2][2:]


def test_it_is_recorded_when_and_why_an_edge_leaves_service_and_is_back() -> None:
    site = Site()
    started(site)
    site.machines[EDGE2].refusing = True
    resize(site, 512)
    wait(site, 12.0)
    fence(site, EDGE2)
    site.machines[EDGE2].refusing = False
    wait(site, 12.0)
    site.kill_natd(EDGE2)
    wait(site, 12.0)
    fence(site, EDGE2)
    site.start_natd(EDGE2)
    site.connect(EDGE2)
    site.run()
    assert events(site) == [
        ("out-of-service", f"it has refused what it was sent for 5 seconds: {REFUSAL}"),
        ("fenced", "by the operator"),
        ("unfenced", "it has confirmed everything that it should hold"),
        ("in-service", ""),
        ("out-of-service", "it has been away for 10 seconds"),
        ("fenced", "by the operator"),
        ("unfenced", "it is connected again"),
        ("in-service", ""),
    ]


# Order


def test_a_range_is_used_when_its_host_no_longer_sends_to_the_edge_that_left_service() -> None:
    site = Site()
    started(site)
    site.machines[EDGE2].stuck = True
    resize(site, 512)
    site.run()
    site.machines[HOST1].stuck = True
    wait(site, 6.0)
    assert (ways(site), size(site)) == ({EDGE1, EDGE2}, 256)
    assert sent(site) == 256, "the path alone"
    site.machines[HOST1].stuck = False
    site.kernel_step(HOST1)
    assert (ways(site), sent(site)) == ({EDGE1}, 256)
    site.run()
    assert (ways(site), size(site)) == ({EDGE1}, 512)


def test_a_host_that_does_not_confirm_the_path_holds_up_its_own_vms_only() -> None:
    site = Site()
    started(site)
    started(site, OTHER, HOST2)
    site.machines[EDGE2].refusing = site.machines[HOST2].stuck = True
    resize(site, 512)
    resize(site, 512, OTHER)
    wait(site, 6.0)
    assert (size(site), size(site, OTHER)) == (512, 256)


def test_an_edge_that_returns_gets_packets_when_it_knows_what_was_given_meanwhile() -> None:
    site = Site()
    started(site)
    site.kill_natd(EDGE2)
    wait(site, 11.0)
    assert ways(site) == {EDGE1}
    site.start_natd(EDGE2)
    site.connect(EDGE2)
    site.deliver_up(EDGE2), site.deliver_down(EDGE2), site.deliver_down(EDGE2)
    # Its snapshot is under way, and does not have this.
    resize(site, 512)
    carry_on(site, EDGE1, HOST1)
    assert (ways(site), size(site)) == ({EDGE1}, 512)
    site.kernel_step(EDGE2), site.deliver_up(EDGE2)
    carry_on(site, EDGE1, HOST1)
    assert ways(site) == {EDGE1}
    # From now on ranges wait for it.
    resize(site, 1024)
    carry_on(site, EDGE1, HOST1)
    assert (ways(site), size(site)) == ({EDGE1}, 512)
    site.deliver_down(EDGE2), site.kernel_step(EDGE2), site.deliver_up(EDGE2)
    carry_on(site, EDGE1, HOST1)
    assert (ways(site), size(site)) == ({EDGE1, EDGE2}, 512)
    site.run()
    assert (ways(site), size(site)) == ({EDGE1, EDGE2}, 1024)


def test_an_edge_that_returns_and_stops_confirming_holds_nobody_up() -> None:
    site = Site()
    started(site)
    site.kill_natd(EDGE2)
    wait(site, 11.0)
    site.start_natd(EDGE2)
    site.connect(EDGE2)
    site.deliver_up(EDGE2), site.deliver_down(EDGE2), site.deliver_down(EDGE2)
    resize(site, 512)
    carry_on(site, EDGE1, HOST1)
    site.kernel_step(EDGE2), site.deliver_up(EDGE2)
    site.machines[EDGE2].stuck = True
    resize(site, 1024)
    wait(site, 6.0)
    assert (ways(site), size(site)) == ({EDGE1}, 1024)


# Restarts


@pytest.mark.parametrize("name", [EDGE1, EDGE2])
def test_a_vm_that_starts_while_an_edges_natd_restarts_waits_for_it(name: NodeName) -> None:
    site = Site()
    site.kill_natd(name)
    request = site.start_vm(HOST1, VM)
    site.run()
    assert request not in site.machines[HOST1].answers
    wait(site, 4.5)
    site.start_natd(name)
    site.connect(name)
    site.run()
    assert site.machines[HOST1].answers[request] == ""
    assert ways(site) == {EDGE1, EDGE2}


@pytest.mark.parametrize("first", [EDGE1, EDGE2])
def test_a_vm_that_starts_while_cpmd_restarts_waits_for_all_edges(first: NodeName) -> None:
    site = Site()
    site.crash_manager()
    site.start_manager()
    for name in (HOST1, first):
        site.connect(name)
    request = site.start_vm(HOST1, VM)
    site.run()
    assert request not in site.machines[HOST1].answers
    for name in NODES:
        site.connect(name)
    site.run()
    assert site.machines[HOST1].answers[request] == ""
    assert ways(site) == {EDGE1, EDGE2}


def test_a_vm_that_moves_while_an_edges_natd_restarts_gets_ports_that_no_edge_drops() -> None:
    site = Site()
    started(site)
    site.migrate(VM, HOST2)
    site.run()
    site.kill_natd(EDGE2)
    site.resume(VM, HOST2)
    site.left(VM, HOST1)
    wait(site, 6.0)
    assert ways(site, HOST2) == {EDGE1}
    assert all(site.open(VM, number) for number in range(100))


def test_a_start_does_not_wait_for_an_edge_that_has_been_away_for_longer_than_a_range_may_wait() -> None:
    site = Site()
    site.kill_natd(EDGE2)
    wait(site, 5.0)
    assert ways(site) == {EDGE1, EDGE2}, "nobody needs it to leave"
    started(site)
    assert ways(site) == {EDGE1}


# Never two owners


@pytest.mark.parametrize("fail", [refuse, hang])
def test_an_edge_that_is_out_of_service_keeps_ports_from_others_until_it_is_fenced(fail: object) -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    fail(site.machines[EDGE2])  # type: ignore[operator]
    site.stop_vm(VM)
    wait(site, 60.0)
    assert ways(site) == {EDGE1}
    assert states(site) == ["held"]
    fence(site, EDGE2)
    assert states(site) == []


def test_a_node_that_answers_cannot_be_fenced_and_one_that_does_not_can() -> None:
    site = Site()
    started(site)
    for name in NODES:
        assert "is connected and confirms what it is sent, so it is alive" in refused_fence(site, name)
    site.machines[EDGE2].stuck = True
    resize(site, 512)
    wait(site, 5.0)
    assert "is alive" in refused_fence(site, EDGE2), "it has ten seconds"
    wait(site, 6.0)
    fence(site, EDGE2)
    assert site.manager is not None
    assert site.manager.fleet.nodes[EDGE2].fenced


@pytest.mark.parametrize("name", NODES)
def test_taking_back_a_fence_that_is_not_there_changes_nothing(name: NodeName) -> None:
    site = Site()
    started(site)
    assert site.manager is not None
    before, ways_before = dict(site.manager.fleet.nodes), ways(site)
    site.ask(lambda manager: manager.fence(name, site.now, fenced=False))
    assert dict(site.manager.fleet.nodes) == before
    site.run()
    assert ways(site) == ways_before
    assert {node.name: node for node in site.ledger.load().nodes} == before


def test_an_edge_that_is_fenced_twice_is_recorded_as_fenced_once() -> None:
    site = Site()
    started(site)
    site.kill_natd(EDGE2)
    wait(site, 12.0)
    fence(site, EDGE2)
    fence(site, EDGE2)
    assert [event for event, _ in events(site)] == ["out-of-service", "fenced"]


def test_an_edge_that_leaves_service_because_it_is_revoked_is_recorded() -> None:
    site = Site()
    started(site)
    for _ in range(2):
        site.ask(lambda manager: manager.membership.revoke(EDGE2, site.now))
        site.run()
    assert events(site) == [("revoked", "by the operator"), ("out-of-service", "revoked by the operator")]


def test_the_fence_of_an_edge_that_was_connected_ends_when_it_has_confirmed_everything() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    started(site, OTHER)
    edge2 = site.machines[EDGE2]
    edge2.refusing = True
    site.stop_vm(VM)
    wait(site, 20.0)
    fence(site, EDGE2)
    wait(site, 10.0)
    assert site.manager is not None
    assert site.manager.fleet.nodes[EDGE2].fenced, "it still refuses"
    edge2.refusing = False
    wait(site, 12.0)
    assert not site.manager.fleet.nodes[EDGE2].fenced
    assert ways(site) == {EDGE1, EDGE2}
    edge2.stuck = True
    site.stop_vm(OTHER)
    wait(site, 60.0)
    assert states(site, OTHER) == ["held"], "the fence holds for no later time"


def test_a_vm_of_a_connected_host_that_does_not_answer_moves_when_that_is_fenced() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    host1 = site.machines[HOST1]
    host1.stuck = True
    resize(site, 512)
    wait(site, 12.0)
    # The operator has cut it off and restarts the VM elsewhere; its natd still says that it runs there.
    host1.guests.pop(VM)
    fence(site, HOST1)
    assert host1.node is not None
    host1.node.send_presence()
    request = site.start_vm(HOST2, VM)
    wait(site, 5.0)
    assert site.machines[HOST2].answers[request] == ""
    assert site.manager is not None
    assert site.manager.present[VM] == HOST2
    assert "active" in states(site)
    host1.stuck = False
    wait(site, 12.0)
    assert not site.manager.fleet.nodes[HOST1].fenced
    assert VM not in host1.kernel.host


def test_ports_of_a_host_that_is_back_after_a_fence_wait_until_its_kernel_holds_them_no_more() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    host1 = site.machines[HOST1]
    # It was cut off, not switched off.
    site.kill_natd(HOST1)
    host1.guests.pop(VM)
    fence(site, HOST1)
    assert states(site) == ["held"]
    host1.stuck = True
    site.start_natd(HOST1)
    site.connect(HOST1)
    wait(site, 10.0)
    assert VM in host1.kernel.host
    assert states(site) == ["held"]
    host1.stuck = False
    wait(site, 1.0)
    assert VM not in host1.kernel.host
    assert states(site) == []
