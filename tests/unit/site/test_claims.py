"""A VM moves when its new host says that it runs there and its former host says that it is gone, and not before."""

from __future__ import annotations

from cpm.core.claims import HANDOVER_S, Claims
from cpm.core.journal import JournalEvent
from cpm.core.presence import LOST_S
from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import Attach
from cpm.protocol.model import AllocationState, DomainUUID, NodeName
from cpm.queries import metrics
from cpm.queries import vms as vms_queries
from natctl.core.domains import RunningDomain, Tap
from tests.fakes.site import Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OTHER = DomainUUID("00000000-0000-0000-0000-000000000002")
HOST1, HOST2 = NodeName("host1"), NodeName("host2")
TAPS = frozenset({Tap("vnet-claimed", 900)})


def running(host: NodeName = HOST1) -> Site:
    site = Site(hold_down_s=1.0)
    request = site.start_vm(host, VM)
    site.run()
    assert site.machines[host].answers[request] == ""
    return site


def start_beside(site: Site, host: NodeName = HOST2) -> int:
    """Start a VM of the same UUID on another host; return the number of the hook's request."""
    machine = site.machines[host]
    machine.guests[VM] = TAPS
    request = site._request()
    assert machine.node is not None
    machine.node.on_links({tap.number: tap.name for tap in TAPS}, site.now)
    machine.node.on_domain_starting(request, RunningDomain(VM, "vm-0001", TAPS), site.now)
    site._carry_out(machine)
    site.run()
    return request


def wait(site: Site, seconds: float) -> None:
    for _ in range(int(seconds)):
        site.pass_time(1.0)
        for machine in site.hosts:
            if machine.node is not None:
                machine.node.send_presence()
                site._carry_out(machine)
        site.run()


def host_of(site: Site) -> NodeName | None:
    assert site.manager is not None
    return site.manager.present.get(VM)


def state(site: Site) -> tuple[str, NodeName | None]:
    """Return what ``list`` and ``show`` say."""
    assert site.manager is not None
    detail = vms_queries.detail(site.manager, site.now, VM)
    return detail.domain.state, detail.claimed_by


def journalled(site: Site) -> int:
    return [entry.event for entry in site.ledger.reader().history(VM)].count(JournalEvent.CLAIMED)


def ports(site: Site, host: NodeName) -> HostIntent | None:
    entry = site.machines[host].kernel.host.get(VM)
    return entry.intent if entry is not None and entry.intent.ports is not None else None


def test_a_claim_beside_a_living_owner_moves_nothing_and_is_shown_and_journalled_once() -> None:
    site = running()
    before = ports(site, HOST1)
    connection = site.open(VM, 7)
    assert connection is not None
    request = start_beside(site)
    assert site.machines[HOST2].answers[request] == "conflict", "the hook does not wait for what may never come"
    assert (host_of(site), ports(site, HOST1), ports(site, HOST2)) == (HOST1, before, None)
    assert state(site) == ("claimed", HOST2)
    assert site.manager is not None
    assert 'virt_ports_domains{state="claimed"} 1' in metrics.exposition(site.manager, site.now).body.decode()
    wait(site, 60)
    assert (host_of(site), ports(site, HOST1), ports(site, HOST2)) == (HOST1, before, None)
    assert all(edge.kernel.maps(connection.internal, connection.port) for edge in site.edges)
    assert journalled(site) == 1


def test_a_claim_ends_with_the_claimants_vm_and_a_later_one_is_another_event() -> None:
    site = running()
    start_beside(site)
    site.left(VM, HOST2)
    site.run()
    assert state(site) == ("active", None)
    start_beside(site)
    assert state(site) == ("claimed", HOST2)
    assert journalled(site) == 2


def test_a_claim_is_served_as_soon_as_the_owner_says_that_the_vm_is_gone() -> None:
    site = running()
    start_beside(site)
    site.left(VM, HOST1)
    site.run()
    assert host_of(site) == HOST2
    assert ports(site, HOST2) is not None
    assert state(site) == ("active", None)


def test_a_claim_is_served_when_an_owner_that_was_away_comes_back_without_the_vm() -> None:
    site = running()
    site.kill_natd(HOST1)
    site.machines[HOST1].guests.pop(VM)
    start_beside(site)
    wait(site, LOST_S - 2)
    assert (host_of(site), ports(site, HOST2)) == (HOST1, None)
    assert state(site) == ("claimed", HOST2)
    site.start_natd(HOST1)
    site.connect(HOST1)
    site.run()
    assert host_of(site) == HOST2
    assert ports(site, HOST2) is not None
    wait(site, 10)
    assert VM not in site.machines[HOST1].kernel.host


def test_a_claim_is_served_when_the_owner_is_fenced() -> None:
    site = running()
    site.kill_natd(HOST1)
    start_beside(site)
    site.ask(lambda manager: manager.fence(HOST1, site.now, fenced=True))
    site.run()
    assert host_of(site) == HOST2
    assert ports(site, HOST2) is not None


def test_an_owner_that_was_away_and_still_has_the_vm_keeps_it() -> None:
    site = running()
    connection = site.open(VM, 7)
    assert connection is not None
    before = ports(site, HOST1)
    site.disconnect(HOST1)
    start_beside(site)
    site.connect(HOST1)
    wait(site, 30)
    assert (host_of(site), ports(site, HOST1), ports(site, HOST2)) == (HOST1, before, None)
    assert all(edge.kernel.maps(connection.internal, connection.port) for edge in site.edges)


def test_a_claim_survives_a_restart_of_the_manager_whoever_comes_back_first() -> None:
    for first, second in ((HOST1, HOST2), (HOST2, HOST1)):
        site = running()
        start_beside(site)
        site.crash_manager()
        site.start_manager()
        for name in (first, second, *site.machines):
            site.connect(name)
            site.run()
        assert host_of(site) == HOST1
        assert state(site) == ("claimed", HOST2)


def test_a_claimant_that_loses_its_session_claims_nothing() -> None:
    site = running()
    start_beside(site)
    site.disconnect(HOST2)
    assert state(site) == ("active", None)
    site.left(VM, HOST1)
    site.run()
    assert host_of(site) is None
    site.connect(HOST2)
    site.run()
    assert host_of(site) == HOST2


def test_a_handover_is_no_event_unless_it_takes_too_long() -> None:
    site = running()
    site.migrate(VM, HOST2)
    site.run()
    site.resume(VM, HOST2)
    site.run()
    assert (host_of(site), ports(site, HOST2)) == (HOST1, None), "its former host still has it"
    assert (state(site), journalled(site)) == (("active", HOST2), 0)
    wait(site, HANDOVER_S + 1)
    assert (state(site), journalled(site)) == (("claimed", HOST2), 1)
    site.left(VM, HOST1)
    site.run()
    assert host_of(site) == HOST2
    assert ports(site, HOST2) is not None


def test_a_destination_that_lost_its_power_gets_no_ports_when_the_vm_stops_at_its_source() -> None:
    site = running()
    site.migrate(VM, HOST2)
    site.run()
    site.kill_natd(HOST2)
    site.machines[HOST2].guests.pop(VM)
    site.stop_vm(VM)
    site.run()
    assert site.manager is not None
    assert host_of(site) is None
    assert {row.node for row in site.manager.fleet.of(VM)} == {HOST1}
    assert {row.state for row in site.manager.fleet.of(VM)} == {AllocationState.HELD}
    assert {entry.node for entry in site.ledger.reader().history(VM)} == {HOST1}


def test_a_destination_that_is_fenced_gets_no_ports_when_the_vm_stops_at_its_source() -> None:
    """It hangs, so it is fenced although it is connected; nobody would ever confirm what it is to hold."""
    site = running()
    request = site.start_vm(HOST2, OTHER)
    site.machines[HOST2].stuck = True
    site.run()
    site.migrate(VM, HOST2)
    site.run()
    wait(site, 15.0)
    site.ask(lambda manager: manager.fence(HOST2, site.now, fenced=True))
    site.left(VM, HOST1)
    site.run()
    assert site.manager is not None
    assert site.manager.fleet.nodes[HOST2].fenced
    assert request not in site.machines[HOST2].answers or site.machines[HOST2].answers[request]
    assert {each.state for each in site.manager.fleet.of(VM)} <= {AllocationState.DRAINING, AllocationState.HELD}
    wait(site, 5.0)
    assert VM not in site.manager.fleet.vms


def test_a_destination_of_before_the_managers_restart_counts_when_its_host_says_so_again() -> None:
    for is_lost in (True, False):
        site = running()
        site.migrate(VM, HOST2)
        site.run()
        site.crash_manager()
        if is_lost:
            site.kill_natd(HOST2)
            site.machines[HOST2].guests.pop(VM)
        site.start_manager()
        site.connect(HOST2)
        site.connect(HOST1)
        site.run()
        site.left(VM, HOST1)
        site.run()
        assert host_of(site) == (None if is_lost else HOST2)


def test_a_handover_that_takes_too_long_is_reported_and_only_once() -> None:
    claims = Claims()
    claims.on_claim(HOST2, Attach(VM, "web1"), 100.0)
    for now, reported in ((100.0 + HANDOVER_S - 0.5, []), (100.0 + HANDOVER_S, [VM]), (200.0, [])):
        assert [uuid for uuid, _ in claims.take_unreported(now, lambda *_: True)] == reported
