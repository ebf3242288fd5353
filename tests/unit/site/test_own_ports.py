"""VMs never get the ports that an edge uses itself, and leave those that it begins to use."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from cpm.core.journal import JournalEvent
from cpm.core.manager import Manager
from cpm.core.own_ports import KEPT_S
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.messages import OwnPorts
from cpm.protocol.model import AllocationState, DomainUUID, ExternalAddress, NodeName, PortRange, Wishes
from cpm.protocol.own_ports import OwnAddress, OwnRange, OwnUse
from cpm.queries import pool as pool_queries
from cpm.queries import vms as vms_queries
from natctl.model.own_ports import LocalSocket, OwnInterfaces, PortsInUse, SocketKind
from tests.fakes.site import EXTERNAL, Site

VM, OTHER = DomainUUID("00000000-0000-0000-0000-000000000001"), DomainUUID("00000000-0000-0000-0000-000000000002")
HOST1, EDGE1, EDGE2 = NodeName("host1"), NodeName("edge1"), NodeName("edge2")
NONE: tuple[PortRange, ...] = ()


def tell(site: Site, *listeners: int, edge: NodeName = EDGE1, ephemeral: tuple[PortRange, ...] = NONE) -> None:
    """Have an edge read that its machine has these listeners on the pool's address."""
    machine = site.machines[edge]
    assert machine.node is not None
    sockets = (LocalSocket(SocketKind.LISTENING, None, port, port) for port in listeners)
    machine.node.on_own_ports(PortsInUse(OwnInterfaces((EXTERNAL,), {}, ephemeral), frozenset(sockets)), site.now)
    site._carry_out(machine)
    site.run()


def start(site: Site, uuid: DomainUUID = VM, floor: int = 256) -> PortRange:
    site.start_vm(HOST1, uuid, Wishes(floor=floor))
    site.run()
    return active(site, uuid)


def manager_of(site: Site) -> Manager:
    assert site.manager is not None
    return site.manager


def active(site: Site, uuid: DomainUUID = VM) -> PortRange:
    found = manager_of(site).fleet.one(uuid, AllocationState.ACTIVE)
    assert found is not None
    return found.ports


def leaving(site: Site, uuid: DomainUUID = VM) -> str:
    """Return what ``list`` says."""
    [view] = [each for each in vms_queries.summaries(manager_of(site), site.now, all=True) if each.uuid == uuid]
    return view.leaving


def journalled(site: Site) -> int:
    return [entry.event for entry in site.ledger.reader().history(VM)].count(JournalEvent.OWN_PORT)


def report(site: Site, seconds: int) -> None:
    for _ in range(seconds):
        site.pass_time(1.0)
        site.report(HOST1, busy=False)
        site.run()


def own(site: Site) -> list[str]:
    view = pool_queries.address_detail(manager_of(site), EXTERNAL)
    return [f"{each.first_port}-{each.last_port} {each.use} {each.node} {each.gone}" for each in view.own]


def test_no_vm_gets_them_also_after_a_restart_of_the_manager() -> None:
    site = Site(ports=PortRange(1024, 1024 + 8 * 64 - 1))
    tell(site, 1024, 1100, ephemeral=(PortRange(1300, 1400),))
    expected = ["1024-1024 listener edge1 None", "1100-1100 listener edge1 None", "1300-1400 ephemeral edge1 None"]
    assert own(site) == expected
    view = pool_queries.address_detail(manager_of(site), EXTERNAL)
    assert (view.ports_own, view.ports_total, view.longest_free) == (103, 8 * 64 - 103, 2 * 64)
    site.crash_manager()
    site.start_manager()
    assert own(site) == expected, "before an edge is back"
    for name in site.machines:
        site.connect(name)
    site.run()
    assert start(site, floor=64).size == 128
    assert not any(port in active(site) for port in (1024, 1100, *range(1300, 1401)))


def test_an_edge_says_so_before_a_vm_that_it_has_gets_ports() -> None:
    site = Site()
    first = start(site).first
    site.stop_vm(VM)
    report(site, 200)
    site.disconnect(EDGE1)
    machine = site.machines[EDGE1]
    assert machine.node is not None
    reading = PortsInUse(OwnInterfaces((EXTERNAL,)), frozenset({LocalSocket(SocketKind.LISTENING, None, first, first)}))
    machine.node.on_own_ports(reading, site.now)
    site.connect(EDGE1)
    site.run()
    assert first not in start(site)


def test_a_vm_leaves_a_port_on_which_a_listener_opens_and_no_connection_is_cut() -> None:
    site = Site(hold_down_s=5.0)
    before = start(site)
    connection = site.open(VM, 7)
    assert connection is not None
    port = before.first + 9
    tell(site, port)
    after = active(site)
    assert not after.overlaps(before)
    assert after.size == before.size
    why = f"port {port} is the machine's own (edge1)"
    assert leaving(site) == why
    allocations = vms_queries.detail(manager_of(site), site.now, VM).allocations
    [old] = [each for each in allocations if each.state == "draining"]
    assert old.why == why
    assert journalled(site) == 1
    report(site, 60)
    assert all(edge.kernel.maps(connection.internal, connection.port) for edge in site.edges), "it goes on"
    assert leaving(site) == why
    site.connections.clear()
    report(site, 20)
    assert leaving(site) == ""
    assert not any(edge.kernel.maps(connection.internal, port) for edge in site.edges)
    assert journalled(site) == 1
    for number in range(2, 30):
        assert port not in start(site, DomainUUID(f"00000000-0000-0000-0000-{number:012}"), floor=64)


def test_where_all_ports_are_held_a_vm_keeps_the_longer_end() -> None:
    site = Site(ports=PortRange(1024, 1024 + 4 * 64 - 1), hold_down_s=5.0, start_reserve=0.0)
    before = start(site)
    assert before.size == 256
    tell(site, before.first + 70)
    assert active(site) == PortRange(before.first + 128, before.last)
    assert leaving(site) == f"port {before.first + 70} is the machine's own (edge1)"
    report(site, 30)
    assert leaving(site) == ""
    usage = manager_of(site).fleet.space.usage(EXTERNAL)
    assert usage.free + usage.taken == 255


def test_where_there_is_nothing_to_move_to_it_is_tried_again() -> None:
    site = Site(ports=PortRange(1024, 1024 + 2 * 64 - 1), hold_down_s=1.0, start_reserve=0.0)
    start(site, floor=64)
    site.ask(lambda manager: manager.sizer.resize_to(VM, 64, site.now))
    site.run()
    report(site, 10)
    start(site, OTHER, floor=64)
    mine = active(site)
    assert mine.size == 64
    tell(site, mine.first)
    assert active(site) == mine, "no port is free"
    assert leaving(site) != ""
    site.stop_vm(OTHER)
    report(site, 20)
    assert not active(site).overlaps(mine)
    assert journalled(site) == 1


def test_a_listener_that_opens_and_closes_moves_nobody_twice() -> None:
    site = Site(hold_down_s=1.0)
    before = start(site)
    tell(site, before.first)
    moved = active(site)
    report(site, 10)
    for opens in (False, True) * 5:
        tell(site, *([before.first] if opens else []))
        report(site, 3)
    tell(site)
    closed_at = site.now
    assert (active(site), journalled(site)) == (moved, 1)
    assert own(site) == [f"{before.first}-{before.first} listener edge1 {closed_at}"]
    site.pass_time(KEPT_S - 1.0)
    assert own(site) != []
    site.pass_time(2.0)
    assert own(site) == []
    assert site.ledger.load().own_ports == ()


def test_what_one_edge_needs_no_longer_another_still_does() -> None:
    site = Site()
    tell(site, 8080)
    tell(site, 8080, edge=EDGE2)
    tell(site)
    site.pass_time(KEPT_S + 1.0)
    assert own(site) == ["8080-8080 listener edge2 None"]
    assert manager_of(site).fleet.space.own_ports(EXTERNAL) == (PortRange(8080, 8080),)


def test_an_address_that_is_added_later_is_known_already() -> None:
    site = Site()
    other = IPv4Address("203.0.113.77")
    told = OwnPorts((OwnAddress(other, (OwnRange(PortRange(8080, 8080), OwnUse.LISTENER),)),))
    site.ask(lambda manager: manager.on_message(EDGE1, told, site.now))
    site.ask(lambda manager: manager.pool.add_addresses([ExternalAddress(other)], site.now))
    assert manager_of(site).fleet.space.free_runs(other) == (PortRange(1024, 8079), PortRange(8081, 65535))


def test_only_edges_have_own_ports_and_nonsense_changes_nothing() -> None:
    site = Site()
    manager = manager_of(site)
    some = OwnAddress(EXTERNAL, (OwnRange(PortRange(8080, 8080), OwnUse.LISTENER),))
    with pytest.raises(InvalidRequest, match="no edge"):
        manager.on_message(HOST1, OwnPorts((some,)), site.now)
    with pytest.raises(InvalidRequest, match="twice"):
        manager.on_message(EDGE1, OwnPorts((some, some)), site.now)
    assert own(site) == []


def test_ports_of_an_edge_that_is_gone_for_good_become_free() -> None:
    site = Site()
    tell(site, 8080)
    site.kill_natd(EDGE1)
    site.ask(lambda manager: manager.fence(EDGE1, site.now, fenced=True))
    assert own(site) == [f"8080-8080 listener edge1 {site.now}"]
    site.pass_time(KEPT_S + 1.0)
    assert own(site) == []
