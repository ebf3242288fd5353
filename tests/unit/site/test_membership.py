"""
Nobody but the operator makes a machine a host or an edge: hostile nodes, approvals, revocations, removals.

The nodes are real, and so is what they say; a hostile one says what its owner wants.
"""

from __future__ import annotations

from ipaddress import IPv4Address

import msgspec
import pytest

from cpm.api.views import NodeView
from cpm.core.changes import PutNode
from cpm.core.membership import ASKING_S, MOST_ASKING, ApprovalRequest
from cpm.protocol.errors import Conflict, InvalidRequest, NotApproved, NotFound
from cpm.protocol.messages import PROTOCOL, Attach, Hello, Presence, Snapshot
from cpm.protocol.model import AllocationState, DomainUUID, NodeName, Role
from cpm.queries import metrics, node_states
from cpm.queries import nodes as node_queries
from natctl.core.identity import Identity
from tests.fakes.kernel import FakeKernel
from tests.fakes.site import ROLES, Machine, Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OTHER = DomainUUID("00000000-0000-0000-0000-000000000002")
HOST1, HOST2, HOST3 = NodeName("host1"), NodeName("host2"), NodeName("host3")
EDGE1, EDGE2, EDGE3 = NodeName("edge1"), NodeName("edge2"), NodeName("edge3")
HOST_ROLE, EDGE_ROLE = frozenset({Role.HOST}), frozenset({Role.EDGE})
STRANGE = IPv4Address("172.30.0.99")


def hello(name: NodeName, roles: frozenset[Role], underlay: IPv4Address, machine: str = "") -> Hello:
    return Hello(PROTOCOL, name, roles, underlay, "0", 0, (), machine=machine)


def running() -> Site:
    site = Site(hold_down_s=1.0)
    site.start_vm(HOST1, VM)
    site.run()
    return site


def state(site: Site) -> object:
    """Return all that the manager decides from, and all that kernels hold."""
    assert site.manager is not None
    fleet = site.manager.fleet
    kernels = {name: (dict(m.kernel.host), list(m.kernel.mapped()), m.kernel.path) for name, m in site.machines.items()}
    return dict(fleet.nodes), dict(fleet.vms), fleet.of(VM), dict(site.manager.present), kernels


def refusal(site: Site, said: Hello) -> NotApproved:
    assert site.manager is not None
    before = state(site)
    with pytest.raises(NotApproved) as caught:
        site.manager.on_hello(said, "0", site.now)
    site.run()
    assert state(site) == before
    assert site.manager.take(site.now).changes == ()
    assert str(caught.value).endswith(f"; on the manager: virt-ports node approve {said.node}")
    return caught.value


def view(site: Site, name: NodeName) -> NodeView:
    assert site.manager is not None
    return next(view for view in node_queries.node_views(site.manager, site.now) if view.name == name)


def add_machine(site: Site, name: NodeName, role: Role, number: int) -> None:
    identity = Identity(name, frozenset({role}), IPv4Address(f"172.30.0.{number}"), "test")
    site.machines[name] = Machine(identity, FakeKernel(ROLES[role]))
    site.start_natd(name)


def advance(site: Site, seconds: int) -> None:
    for _ in range(seconds):
        site.pass_time(1.0)
        site.run()


# What a host's certificate is good for


@pytest.mark.parametrize("roles", [EDGE_ROLE, frozenset(Role)])
def test_a_host_does_not_become_an_edge(roles: frozenset[Role]) -> None:
    site = running()
    error = refusal(site, hello(HOST2, roles, site.machines[HOST2].identity.underlay))
    assert "is approved as host and asks to be " in str(error)
    assert IPv4Address("172.30.0.12") not in site.machines[HOST1].kernel.path.edges  # type: ignore[union-attr]


def test_a_node_does_not_take_the_address_of_another() -> None:
    site = running()
    taken = site.machines[HOST1].identity.underlay
    error = refusal(site, hello(HOST2, HOST_ROLE, taken))
    assert str(error).startswith("host2 is approved at 172.30.0.12 and asks for 172.30.0.11; ")


def test_a_host_does_not_get_another_hosts_vm() -> None:
    site = running()
    before = site.machines[HOST1].kernel.host[VM]
    connection = site.open(VM, 3)
    assert connection is not None
    assert site.manager is not None
    for say in (Attach(VM, "mine now"), Attach(VM, "mine now", incoming=True)):
        site.ask(lambda manager, say=say: manager.on_message(HOST2, say, site.now))  # type: ignore[misc]
        site.run()
    assert site.manager.present[VM] == HOST1
    assert site.machines[HOST1].kernel.host[VM] == before
    assert VM not in site.machines[HOST2].kernel.host
    assert site.manager.fleet.vms[VM].name == "vm-0001"


def test_a_host_hears_of_its_own_vms_only() -> None:
    site = running()
    site.start_vm(HOST2, OTHER)
    site.run()
    assert site.manager is not None
    snapshots: dict[NodeName, Snapshot] = {}
    for name, machine in site.machines.items():
        said = hello(name, machine.identity.roles, machine.identity.underlay)
        domains = [presence for presence in (VM, OTHER) if presence in machine.guests]
        site.manager.on_session_end(name, site.now)
        site.manager.on_hello(_with_domains(said, domains), "0", site.now)
        for node, message in site.manager.take(site.now).messages:
            if node == name and isinstance(message, Snapshot):
                snapshots[name] = message
    for name, mine in ((HOST1, VM), (HOST2, OTHER)):
        assert [vm.domain for vm in snapshots[name].host] == [mine]
        assert (snapshots[name].edge, snapshots[name].path.externals) == ((), ())
    for name in (EDGE1, EDGE2):
        assert {vm.domain for vm in snapshots[name].edge} == {VM, OTHER}
        assert (snapshots[name].host, snapshots[name].path.edges) == ((), ())


def _with_domains(said: Hello, domains: list[DomainUUID]) -> Hello:
    return msgspec.structs.replace(said, domains=tuple(Presence(uuid, f"vm-{uuid[-4:]}") for uuid in domains))


# A machine that asks


def test_a_machine_that_is_not_approved_is_refused_and_shown_and_counted() -> None:
    site = running()
    said = hello(HOST3, frozenset(Role), IPv4Address("172.30.0.13"), "0123456789abcdef")
    assert str(refusal(site, said)).startswith("host3 is not approved and asks to be edge,host at 172.30.0.13; ")
    refusal(site, said)
    seen = view(site, HOST3)
    assert (seen.is_known, seen.approval, seen.connected) == (False, None, False)
    assert seen.asks is not None
    assert (seen.asks.roles, str(seen.asks.underlay), seen.asks.machine) == (
        (Role.EDGE, Role.HOST),
        "172.30.0.13",
        "0123456789abcdef",
    )
    assert site.manager is not None
    text = metrics.exposition(site.manager, site.now).body.decode()
    assert "virt_ports_nodes_waiting_for_approval 1" in text
    assert 'virt_ports_node_sessions_refused_total{code="not-approved"} 2' in text
    assert 'node="host3"' not in text
    site.pass_time(ASKING_S)
    assert not site.manager.membership.asked


def test_the_state_of_the_manager_names_machines_that_are_refused() -> None:
    site = running()
    assert site.manager is not None
    assert list(node_states.problems(site.manager, site.now)) == []
    refusal(site, hello(HOST3, HOST_ROLE, STRANGE))
    site.manager.membership.on_second(EDGE1, "172.30.0.98", site.now)
    first, *rest = node_states.problems(site.manager, site.now)
    assert first.startswith("edge1: a second machine, 172.30.0.98, says that it is edge1, and is refused; ")
    assert rest == [
        "host3: is not approved and asks to be host at 172.30.0.99; if it may: `virt-ports node approve host3`",
    ]


def test_what_machines_ask_is_bounded_and_the_last_ones_stay() -> None:
    site = Site()
    assert site.manager is not None
    for number in range(MOST_ASKING + 5):
        with pytest.raises(NotApproved):
            site.manager.on_hello(hello(NodeName(f"stranger{number}"), HOST_ROLE, STRANGE), "0", site.now)
    asked = site.manager.membership.asked
    assert len(asked) == MOST_ASKING
    assert next(iter(asked)) == "stranger5"


@pytest.mark.parametrize("name", ["", "$(reboot)", "a b", "host1;reboot", "-rf", "\x1b[2J", "x" * 254])
def test_a_name_that_no_operator_should_copy_to_a_shell_is_never_shown(name: str) -> None:
    site = Site()
    assert site.manager is not None
    with pytest.raises(InvalidRequest):
        site.manager.on_hello(hello(NodeName(name), HOST_ROLE, STRANGE), "0", site.now)
    assert not site.manager.membership.asked


def test_an_approved_machine_is_served_when_it_asks_again() -> None:
    site = running()
    add_machine(site, HOST3, Role.HOST, 13)
    site.connect(HOST3)
    site.run()
    assert site.manager is not None
    assert HOST3 in site.manager.membership.asked
    site.disconnect(HOST3)
    site.approve(site.machines[HOST3].identity)
    assert not site.manager.membership.asked
    site.connect(HOST3)
    request = site.start_vm(HOST3, OTHER)
    site.run()
    assert site.machines[HOST3].answers[request] == ""


def test_an_edge_that_is_approved_before_it_ever_connects_holds_nobody_up() -> None:
    site = running()
    request = ApprovalRequest(roles=EDGE_ROLE, underlay=IPv4Address("172.30.0.23"))
    site.ask(lambda manager: manager.membership.approve(EDGE3, request, site.now))
    site.run()
    assert IPv4Address("172.30.0.23") not in site.machines[HOST1].kernel.path.edges  # type: ignore[union-attr]
    site.stop_vm(VM)
    advance(site, 5)
    assert site.manager is not None
    assert site.manager.fleet.of(VM) == ()


def test_nodes_are_approved_still_after_a_restart_of_the_manager() -> None:
    site = running()
    site.crash_manager()
    site.start_manager()
    assert site.manager is not None
    for name in site.machines:
        site.connect(name)
    site.run()
    assert set(site.manager.sessions) == set(site.machines)


# Which machine


def bound(site: Site, machine: str = "aaaa") -> None:
    """Have host1 connect as a machine."""
    assert site.manager is not None
    site.disconnect(HOST1)
    said = hello(HOST1, HOST_ROLE, site.machines[HOST1].identity.underlay, machine)
    site.ask(lambda manager: manager.on_hello(_with_domains(said, [VM]), "0", site.now))
    site.ask(lambda manager: manager.on_session_end(HOST1, site.now))


def test_the_first_machine_of_a_name_keeps_it_while_it_is_away() -> None:
    site = running()
    bound(site)
    for machine in ("bbbb", ""):
        said = hello(HOST1, HOST_ROLE, site.machines[HOST1].identity.underlay, machine)
        assert "is approved for another machine than this one" in str(refusal(site, said))
    bound(site)


def test_another_machine_is_approved_only_when_the_former_holds_nothing_or_is_fenced() -> None:
    site = running()
    bound(site)
    other = ApprovalRequest(machine="bbbb")
    assert site.manager is not None
    with pytest.raises(Conflict, match="`virt-ports node fence host1`, then approve this one"):
        site.manager.membership.approve(HOST1, other, site.now)
    site.ask(lambda manager: manager.fence(HOST1, site.now, fenced=True))
    site.ask(lambda manager: manager.membership.approve(HOST1, other, site.now))
    bound(site, "bbbb")
    assert "another machine" in str(
        refusal(site, hello(HOST1, HOST_ROLE, site.machines[HOST1].identity.underlay, "aaaa"))
    )


def test_a_revoked_node_that_is_approved_again_is_the_same_machine_still() -> None:
    site = running()
    bound(site)
    site.ask(lambda manager: manager.membership.revoke(HOST1, site.now))
    site.approve(site.machines[HOST1].identity)
    assert "another machine" in str(
        refusal(site, hello(HOST1, HOST_ROLE, site.machines[HOST1].identity.underlay, "bbbb"))
    )
    bound(site)


def test_an_approval_of_more_leaves_the_machine_as_it_is() -> None:
    site = running()
    bound(site)
    site.ask(lambda manager: manager.membership.approve(HOST1, ApprovalRequest(roles=frozenset(Role)), site.now))
    assert site.manager is not None
    node = site.manager.fleet.nodes[HOST1]
    assert node.approval is not None
    assert (node.approval.roles, node.machine) == (frozenset(Role), "aaaa")


def test_less_than_what_a_connected_node_is_cannot_be_approved() -> None:
    site = running()
    assert site.manager is not None
    for request in (ApprovalRequest(roles=EDGE_ROLE), ApprovalRequest(underlay=STRANGE)):
        with pytest.raises(Conflict, match="host1 is connected as host at "):
            site.manager.membership.approve(HOST1, request, site.now)


# Revoked


def test_a_revoked_host_loses_its_session_and_its_vms_keep_their_ports_until_it_is_fenced() -> None:
    site = running()
    connection = site.open(VM, 3)
    assert connection is not None
    held = site.manager and site.manager.fleet.of(VM)
    site.ask(lambda manager: manager.membership.revoke(HOST1, site.now))
    assert not site.machines[HOST1].connected
    site.run()
    assert site.manager is not None
    refusal(site, hello(HOST1, HOST_ROLE, site.machines[HOST1].identity.underlay))
    site.connect(HOST1)
    advance(site, 30)
    assert site.manager.fleet.of(VM) == held
    assert all(edge.kernel.maps(connection.internal, connection.port) for edge in site.edges)
    assert view(site, HOST1).approval is None
    with pytest.raises(Conflict, match="1 VMs and 256 ports belong to host1"):
        site.manager.membership.remove(HOST1)
    # Switched off, and the operator says so.
    site.stop_vm(VM, hook=False)
    site.kill_natd(HOST1)
    site.ask(lambda manager: manager.fence(HOST1, site.now, fenced=True))
    advance(site, 5)
    assert site.manager.fleet.of(VM) == ()
    site.ask(lambda manager: manager.membership.remove(HOST1))
    assert [node.name for node in site.ledger.load().nodes] == [EDGE1, EDGE2, HOST2]


def test_a_revoked_edge_is_out_of_service_before_its_session_ends() -> None:
    site = running()
    gone = site.machines[EDGE1].identity.underlay
    site.ask(lambda manager: manager.membership.revoke(EDGE1, site.now))
    assert site.machines[EDGE1].connected
    # It goes on mapping new ranges until no host sends to it.
    while site.machines[EDGE1].connected:
        kept = [m.kernel.path.edges for m in site.hosts if m.kernel.path is not None]
        moved = [site.deliver_down(name) or site.kernel_step(name) or site.deliver_up(name) for name in site.machines]
        assert any(moved), "its session never ends"
    assert all(gone not in edges for edges in kept), "its session ended while a host sent to it"
    site.check()
    refusal(site, hello(EDGE1, EDGE_ROLE, gone))
    assert view(site, EDGE1).in_service is False


def test_a_host_that_does_not_answer_keeps_no_revoked_edge() -> None:
    site = running()
    site.ask(lambda manager: manager.membership.revoke(EDGE1, site.now))
    site.pass_time(site.settings.nodes.edge_grace_s)
    assert not site.machines[EDGE1].connected


def test_a_revoked_edge_that_gets_in_step_meanwhile_stays_out_of_service() -> None:
    site = running()
    site.disconnect(EDGE1)
    site.connect(EDGE1)
    site.deliver_up(EDGE1)
    site.ask(lambda manager: manager.membership.revoke(EDGE1, site.now))
    # It confirms all that it was sent before any host has confirmed to send nothing to it.
    while site.deliver_down(EDGE1) or site.kernel_step(EDGE1) or site.deliver_up(EDGE1):
        assert site.machines[EDGE1].connected
    assert not view(site, EDGE1).in_service
    site.run()
    assert not site.machines[EDGE1].connected


def test_a_revoked_node_is_not_served_by_the_next_manager_of_the_process() -> None:
    site = running()
    said = hello(EDGE1, EDGE_ROLE, site.machines[EDGE1].identity.underlay)
    site.ask(lambda manager: manager.membership.revoke(EDGE1, site.now))
    assert site.machines[EDGE1].connected
    site.start_manager()
    assert site.manager is not None
    with pytest.raises(NotApproved):
        site.manager.resume(said, 1, site.now)


def test_an_edge_whose_hello_could_not_be_committed_is_one_for_the_next_manager_of_the_process() -> None:
    # The disk was full when it connected for the first time (make prove SEED=5017513): it got no ports of VMs for ever.
    site = running()
    said = hello(EDGE3, EDGE_ROLE, STRANGE)
    site.ask(
        lambda manager: manager.membership.approve(EDGE3, ApprovalRequest(roles=EDGE_ROLE, underlay=STRANGE), site.now)
    )
    site.start_manager()
    assert site.manager is not None
    site.manager.resume(said, 1, site.now)
    assert EDGE3 in site.manager.fleet.edges
    assert any(
        change.node.name == EDGE3 for change in site.manager.take(site.now).changes if isinstance(change, PutNode)
    )


def test_the_only_edge_in_service_is_not_revoked() -> None:
    site = running()
    site.ask(lambda manager: manager.membership.revoke(EDGE1, site.now))
    site.run()
    assert site.manager is not None
    with pytest.raises(Conflict, match="edge2 is the only edge in service"):
        site.manager.membership.revoke(EDGE2, site.now)
    assert site.machines[EDGE2].connected


def test_a_revoked_edge_that_is_approved_again_is_back_in_service() -> None:
    site = running()
    identity = site.machines[EDGE1].identity
    site.ask(lambda manager: manager.membership.revoke(EDGE1, site.now))
    site.approve(identity)  # before its session has ended
    site.run()
    assert view(site, EDGE1).in_service
    site.ask(lambda manager: manager.membership.revoke(EDGE1, site.now))
    site.run()
    assert not site.machines[EDGE1].connected
    site.approve(identity)
    site.connect(EDGE1)
    site.run()
    assert view(site, EDGE1).in_service


def test_a_vm_of_a_revoked_host_goes_to_no_other_until_it_is_fenced() -> None:
    site = running()
    site.ask(lambda manager: manager.membership.revoke(HOST1, site.now))
    site.ask(lambda manager: manager.on_message(HOST2, Attach(VM, "vm-0001"), site.now))
    site.run()
    assert site.manager is not None
    assert {each.node for each in site.manager.fleet.of(VM)} == {HOST1}
    site.kill_natd(HOST1)
    site.machines[HOST1].guests.clear()
    site.ask(lambda manager: manager.fence(HOST1, site.now, fenced=True))
    site.run()
    assert site.manager.present[VM] == HOST2
    assert all(each.node == HOST2 or each.state is not AllocationState.ACTIVE for each in site.manager.fleet.of(VM))


# Removed


def test_an_edge_is_removed_when_it_is_fenced() -> None:
    site = running()
    assert site.manager is not None
    with pytest.raises(Conflict, match="is connected; revoke it first: `virt-ports node revoke edge1`"):
        site.manager.membership.remove(EDGE1)
    site.kill_natd(EDGE1)
    with pytest.raises(Conflict, match="`virt-ports node fence edge1`, then remove it"):
        site.manager.membership.remove(EDGE1)
    site.ask(lambda manager: manager.fence(EDGE1, site.now, fenced=True))
    site.ask(lambda manager: manager.membership.remove(EDGE1))
    site.run()
    assert EDGE1 not in site.manager.fleet.nodes
    with pytest.raises(NotFound):
        site.manager.membership.remove(EDGE1)
    refusal(site, hello(EDGE1, EDGE_ROLE, site.machines[EDGE1].identity.underlay))
