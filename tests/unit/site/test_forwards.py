"""Forwards on a whole site: in which order, through all that becomes of their VM, and who has a port already."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.core.forwards import ForwardRequest
from cpm.core.manager import Manager
from cpm.protocol.bounds import MAX_FORWARD_PORTS
from cpm.protocol.errors import Conflict, InvalidRequest, NotFound, PortHeld, VirtPortsError
from cpm.protocol.model import (
    Allocation,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    ForwardProtocol,
    NodeName,
    PortRange,
    WishedForward,
    Wishes,
)
from cpm.queries import forwards as forward_queries
from natctl.model.guest_claims import Claims, Reach
from natctl.model.own_ports import LocalSocket, OwnInterfaces, PortsInUse, SocketKind
from tests.fakes.site import EXTERNAL, GUESTS, Site
from tests.unit.site.test_edge_service import wait
from tests.unit.site.test_order import EDGE1, EDGE2, HOST1, HOST2, OTHER, VM, resize, settle, started

GUEST = IPv4Address("192.168.122.5")
SSH = PortRange(22, 22)


def one(port: int) -> PortRange:
    return PortRange(port, port)


def request(to: int = 22, port: int | None = None, **changes: object) -> ForwardRequest:
    ports = None if port is None else one(port)
    return ForwardRequest(to=one(to), ports=ports, **{"guest": GUEST, **changes})  # type: ignore[arg-type]


def add(site: Site, asked: ForwardRequest, uuid: DomainUUID = VM) -> Allocation:
    """Ask for a forward; return it, or raise why not."""
    found: list[Allocation] = []
    errors: list[VirtPortsError] = []

    def act(manager: Manager) -> None:
        try:
            found.append(manager.forwards.add(manager.fleet.vms[uuid], asked, site.now))
        except VirtPortsError as error:
            errors.append(error)

    site.ask(act)
    for error in errors:
        raise error
    return found[0]


def remove(site: Site, port: int, uuid: DomainUUID = VM) -> None:
    def act(manager: Manager) -> None:
        [mine] = [each for each in manager.fleet.forwards_of(uuid) if each.ports == one(port)]
        manager.forwards.remove(mine, site.now)

    site.ask(act)


def forwards(site: Site, uuid: DomainUUID = VM) -> list[tuple[int, str]]:
    assert site.manager is not None
    return sorted((each.ports.first, each.state.value) for each in site.manager.fleet.forwards_of(uuid))


def let_in(site: Site, host: NodeName = HOST1, uuid: DomainUUID = VM) -> list[int]:
    """Return the ports at which a host's kernel lets something in."""
    entry = site.machines[host].kernel.host.get(uuid)
    return [] if entry is None else [each.ports.first for each in entry.intent.forwards]


def mapped(site: Site, edge: NodeName = EDGE1, uuid: DomainUUID = VM) -> list[PortRange]:
    vm = site.machines[edge].kernel.edge.get(uuid)
    return [] if vm is None else [each.ports for each in vm.ranges]


def maps(site: Site, port: int, edge: NodeName = EDGE1, uuid: DomainUUID = VM) -> bool:
    return any(port in ports for ports in mapped(site, edge, uuid))


def test_edges_first_and_the_host_last_and_the_other_way_round() -> None:
    site = Site(hold_down_s=10.0)
    started(site)
    add(site, request(port=2222))
    assert forwards(site) == [(2222, "reserved")]
    while any(site.deliver_down(name) or site.kernel_step(name) for name in (HOST1, EDGE1)):
        site.deliver_up(EDGE1)
    assert maps(site, 2222)
    assert let_in(site) == []
    site.run()
    assert let_in(site) == [2222]
    assert forwards(site) == [(2222, "active")]
    remove(site, 2222)
    while site.deliver_down(HOST1) or site.kernel_step(HOST1):
        pass
    assert let_in(site) == []
    assert maps(site, 2222), "what is open goes on"
    settle(site)
    assert forwards(site) == [(2222, "held")]
    assert not maps(site, 2222)
    wait(site, 11.0)
    assert forwards(site) == []


def test_a_port_is_chosen_on_the_vms_address_beside_its_range() -> None:
    site = Site()
    site.ask(lambda manager: manager.pool.add_addresses([ExternalAddress(IPv4Address("203.0.113.9"))], site.now))
    started(site)
    first, second = add(site, request()), add(site, request(80))
    assert first.external == second.external == EXTERNAL
    assert site.manager is not None
    active = site.manager.fleet.one(VM, AllocationState.ACTIVE)
    assert active is not None
    assert not active.ports.overlaps(first.ports)
    # Both are in one block: no second one was divided.
    assert first.ports.first // 64 == second.ports.first // 64


def test_it_stays_through_growth_relocation_and_shrinking() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    add(site, request(port=2222))
    add(site, request(443, port=443))
    for ports in (1024, 64, 2048):
        resize(site, ports)
        settle(site)
        site.ask(lambda manager: manager.sizer.relocate(VM, site.now))
        settle(site)
        wait(site, 3.0)
        assert forwards(site) == [(443, "active"), (2222, "active")]
        assert let_in(site) == [443, 2222]
        assert maps(site, 443)
        assert maps(site, 2222, EDGE2)


def test_it_rests_while_the_vm_does_not_run_and_comes_back_on_another_host() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    add(site, request(port=2222))
    site.run()
    site.stop_vm(VM)
    site.run()
    wait(site, 300.0)
    assert forwards(site) == [(2222, "held")]
    assert mapped(site) == []
    started(site, OTHER)
    with pytest.raises(PortHeld):
        add(site, request(port=2222), OTHER)
    started(site, VM, HOST2)
    assert forwards(site) == [(2222, "active")]
    assert let_in(site, HOST2) == [2222]
    assert let_in(site, HOST1) == []


def test_it_ends_with_the_vm_when_it_is_not_kept() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    add(site, request(port=2222, is_kept=False))
    site.run()
    site.stop_vm(VM)
    site.run()
    wait(site, 3.0)
    assert site.manager is not None
    assert VM not in site.manager.fleet.vms


def test_it_moves_with_a_live_migration() -> None:
    site = Site()
    started(site)
    add(site, request(port=2222))
    site.run()
    site.migrate(VM, HOST2)
    site.run()
    assert let_in(site, HOST1) == [2222]
    site.resume(VM, HOST2)
    site.left(VM, HOST1)
    site.run()
    assert (let_in(site, HOST1), let_in(site, HOST2)) == ([], [2222])
    assert maps(site, 2222)
    assert forwards(site) == [(2222, "active")]


@pytest.mark.parametrize("name", [HOST1, EDGE1])
def test_it_survives_deaths_of_all_kinds(name: NodeName) -> None:
    site = Site()
    started(site)
    add(site, request(port=2222))
    site.run()
    site.kill_natd(name)
    site.crash_manager()
    site.start_manager()
    site.heal()
    assert forwards(site) == [(2222, "active")]
    assert let_in(site) == [2222]
    assert maps(site, 2222)


def test_one_that_is_not_programmed_yet_when_the_manager_dies_is_finished_by_the_next() -> None:
    site = Site()
    started(site)
    add(site, request(port=2222))
    site.crash_manager()
    site.start_manager()
    site.heal()
    assert (forwards(site), let_in(site)) == ([(2222, "active")], [2222])


def test_who_has_a_port_is_said_and_until_when() -> None:
    site = Site(hold_down_s=60.0)
    started(site)
    started(site, OTHER)
    add(site, request(port=2222))
    with pytest.raises(PortHeld, match=f"VM vm-{VM[-4:]}.* until its forward is removed"):
        add(site, request(port=2222), OTHER)
    assert site.manager is not None
    active = site.manager.fleet.one(OTHER, AllocationState.ACTIVE)
    assert active is not None
    with pytest.raises(PortHeld, match="as long as it needs them") as held:
        add(site, request(port=active.ports.first))
    assert (held.value.address, held.value.ports) == (EXTERNAL, str(active.ports))
    site.run()
    remove(site, 2222)
    with pytest.raises(PortHeld, match="until its last connection"):
        add(site, request(port=2222), OTHER)
    settle(site)
    with pytest.raises(PortHeld, match=r"until \d{4}-"):
        add(site, request(port=2222), OTHER)
    wait(site, 61.0)
    assert add(site, request(port=2222), OTHER).domain == OTHER


def test_what_the_operator_reserved_is_the_operators() -> None:
    site = Site()
    address = ExternalAddress(EXTERNAL, (PortRange(0, 21), PortRange(5060, 5060)))
    site.ask(lambda manager: manager.pool.add_addresses([address], site.now))
    started(site)
    for port in (21, 5060):
        with pytest.raises(PortHeld, match="the operator"):
            add(site, request(port=port))
    assert add(site, request(port=22)).ports == SSH


def test_a_port_at_which_an_edge_itself_listens_is_the_machines() -> None:
    site = Site()
    started(site)
    node = site.machines[EDGE1].node
    assert node is not None
    sshd = LocalSocket(SocketKind.LISTENING, None, 22, 1)
    node.on_own_ports(PortsInUse(OwnInterfaces((EXTERNAL,)), frozenset({sshd})), site.now)
    site._carry_out(site.machines[EDGE1])
    site.run()
    with pytest.raises(PortHeld, match="belongs to the machine edge1 as long as it uses them"):
        add(site, request(port=22))
    assert add(site, request(port=23)).ports == one(23)


@pytest.mark.parametrize(
    ("asked", "error", "because"),
    [
        (
            ForwardRequest(to=SSH, ports=PortRange(2222, 2223)),
            InvalidRequest,
            "2 ports outside and 1 port of the guest do not match; use ranges of one length",
        ),
        (
            ForwardRequest(to=PortRange(1, 2), ports=PortRange(1023, 1024)),
            InvalidRequest,
            "1023-1024 has ports below 1024 and others; use one forward for each part",
        ),
        (
            ForwardRequest(to=SSH, ports=PortRange(0, 0)),
            InvalidRequest,
            "an external address has no port 0; use 1 to 65535",
        ),
        (ForwardRequest(to=PortRange(0, 0)), InvalidRequest, "a guest has no port 0; use 1 to 65535"),
        (ForwardRequest(to=SSH, address=IPv4Address("192.0.2.77")), NotFound, "no external address"),
        (ForwardRequest(to=PortRange(1, 1025)), Conflict, "1024 ports in all; remove some"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: ForwardRequest, error: type[VirtPortsError], because: str) -> None:
    site = Site()
    started(site)
    with pytest.raises(error, match=because):
        add(site, asked)
    assert forwards(site) == []


def test_the_same_again_is_the_same_and_the_other_protocol_joins() -> None:
    site = Site()
    started(site)
    first = add(site, request(53, port=53))
    assert add(site, request(53, port=53)).id == first.id
    assert add(site, request(53)).id == first.id
    both = add(site, request(53, port=53, protocol=ForwardProtocol.UDP))
    assert both.forward is not None
    assert (both.id, both.forward.protocol) == (first.id, ForwardProtocol.BOTH)
    site.run()
    entry = site.machines[HOST1].kernel.host[VM]
    assert [each.protocol for each in entry.intent.forwards] == [ForwardProtocol.BOTH]


def test_one_that_was_removed_can_be_had_again_at_once() -> None:
    site = Site()
    started(site)
    add(site, request(port=2222))
    settle(site)
    remove(site, 2222)
    settle(site)
    assert forwards(site) == [(2222, "held")]
    add(site, request(80, port=2222))
    site.run()
    assert (forwards(site), let_in(site)) == ([(2222, "active")], [2222])


def test_one_of_a_limited_time_ends_unless_it_is_renewed() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    first = add(site, request(port=2222, ends=site.now + 60.0))
    site.run()
    wait(site, 50.0)
    site.ask(lambda manager: manager.forwards.renew(current(manager, first), site.now + 60.0))
    wait(site, 50.0)
    assert let_in(site) == [2222]
    wait(site, 11.0)
    assert let_in(site) == []
    settle(site)
    wait(site, 3.0)
    assert forwards(site) == []


def current(manager: Manager, forward: Allocation) -> Allocation:
    found = manager.fleet.allocation(forward.id)
    assert found is not None
    return found


def test_the_xml_is_followed() -> None:
    site = Site(hold_down_s=1.0)
    wish = WishedForward(ports=one(2222), to=SSH, guest=GUEST)
    site.start_vm(HOST1, VM, Wishes(forwards=(wish,)))
    site.run()
    assert let_in(site) == [2222]
    other = WishedForward(ports=one(8080), to=one(80), guest=GUEST)
    site.machines[HOST1].wishes[VM] = Wishes(forwards=(other,))
    wait(site, 6.0)
    node = site.machines[HOST1].node
    assert node is not None
    node.send_presence()
    site._carry_out(site.machines[HOST1])
    settle(site)
    wait(site, 3.0)
    assert (forwards(site), let_in(site)) == ([(8080, "active")], [8080])


def test_what_the_xml_cannot_have_is_said_and_tried_again() -> None:
    site = Site(hold_down_s=1.0)
    started(site, OTHER)
    add(site, request(port=2222), OTHER)
    site.start_vm(HOST1, VM, Wishes(forwards=(WishedForward(ports=one(2222), to=SSH, guest=GUEST),)))
    site.run()
    assert site.manager is not None
    [why] = site.manager.forwards.refused[VM]
    assert "until its forward is removed" in why
    remove(site, 2222, OTHER)
    settle(site)
    wait(site, 10.0)
    assert let_in(site) == [2222]
    assert site.manager.forwards.refused == {}


def test_a_vm_that_does_not_run_can_be_given_one() -> None:
    site = Site()
    started(site)
    site.stop_vm(VM)
    site.run()
    add(site, request(port=2222))
    site.run()
    assert forwards(site) == [(2222, "held")]
    started(site)
    assert let_in(site) == [2222]


def test_nothing_is_let_in_until_the_guest_is_found_and_it_is_followed() -> None:
    site = Site()
    started(site)
    add(site, request(port=2222, guest=None))
    site.run()
    assert let_in(site) == []
    machine = site.machines[HOST1]
    for address in (GUEST, IPv4Address("192.168.122.9")):
        assert machine.node is not None
        machine.node.on_guest_addresses({VM: Claims(GUESTS, leased=(address,))})
        site._carry_out(machine)
        site.run()
        [forward] = machine.kernel.host[VM].intent.forwards
        assert forward.guest == address
    site.kill_natd(HOST1)
    site.heal()
    [forward] = machine.kernel.host[VM].intent.forwards
    assert forward.guest == IPv4Address("192.168.122.9"), "a natd that starts keeps the address"


def test_ports_of_forwards_count_in_the_hosts_quota() -> None:
    site = Site()
    started(site)
    assert site.manager is not None
    before = site.manager.fleet.use.ports(HOST1)
    add(site, ForwardRequest(to=PortRange(8000, 8009), guest=GUEST))
    assert site.manager.fleet.use.ports(HOST1) == before + 10


def say(site: Site, claims: Claims) -> None:
    """The host of the VM has looked for its guest."""
    machine = site.machines[HOST1]
    assert machine.node is not None
    machine.node.on_guest_addresses({VM: claims})
    site._carry_out(machine)
    site.run()
    site.report(HOST1, busy=False)
    site.run()


def listed(site: Site) -> list[tuple[str, str, str]]:
    assert site.manager is not None
    views = forward_queries.list_forwards(site.manager)
    return [(str(view.guest_address), view.guest_address_from, view.problem) for view in views]


def test_the_list_says_where_a_forward_leads_and_who_says_so() -> None:
    site = Site()
    started(site)
    add(site, request(port=2222, guest=None))
    site.run()
    told, leased = IPv4Address("192.168.122.7"), IPv4Address("192.168.122.9")
    say(site, Claims(GUESTS))
    [(address, source, problem)] = listed(site)
    assert (address, source) == ("None", "")
    assert "the guest's address is not known" in problem
    for claims, expected in (
        (Claims(GUESTS._replace(seen=(GUEST,))), (str(GUEST), "seen", "")),
        (Claims(GUESTS._replace(seen=(GUEST,)), told=(told,)), (str(told), "agent", "")),
        (Claims(GUESTS, (leased,), (told,)), (str(leased), "lease", "")),
    ):
        say(site, claims)
        assert listed(site) == [expected]
        [forward] = site.machines[HOST1].kernel.host[VM].intent.forwards
        assert str(forward.guest) == expected[0]


@pytest.mark.parametrize("lie", ["192.168.122.1", "172.30.0.7", "224.0.0.1", "192.168.122.255"])
def test_nothing_is_let_in_to_what_is_no_guest_even_if_it_is_named(lie: str) -> None:
    """XML of a domain may name the host itself, or a machine behind it that the internet does not reach."""
    site = Site()
    started(site)
    named = IPv4Address(lie)
    add(site, request(port=2222, guest=named))
    add(site, request(port=2223))
    site.run()
    assert let_in(site) == [2223]
    say(site, Claims(GUESTS))
    assert let_in(site) == [2223]
    (_, _, problem), fine = listed(site)
    assert problem.startswith(f"{lie} is in no network of the VM's bridge")
    assert fine == (str(GUEST), "option", "")


def test_what_its_bridge_does_not_reach_any_more_is_not_let_in() -> None:
    site = Site()
    started(site)
    add(site, request(port=2222, guest=None))
    site.run()
    say(site, Claims(GUESTS, leased=(GUEST,)))
    assert let_in(site) == [2222]
    say(site, Claims(Reach()))
    assert let_in(site) == []


def test_xml_that_asks_for_more_than_a_vm_may_have_gets_no_more() -> None:
    """What natd reads of 10,000 forwards in XML: ``tests/unit/libvirt_hooks/test_domain_xml.py``."""
    site = Site()
    wished = tuple(WishedForward(to=PortRange(8 * n + 1, 8 * n + 8), ports=None, guest=GUEST) for n in range(256))
    site.start_vm(HOST1, VM, Wishes(forwards=wished))
    site.run()
    assert site.manager is not None
    assert sum(each.ports.size for each in site.manager.fleet.forwards_of(VM)) == MAX_FORWARD_PORTS
    assert len(site.manager.forwards.refused[VM]) == 256 - MAX_FORWARD_PORTS // 8
