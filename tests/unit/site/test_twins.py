"""A VM that another host runs while its host is lost is served there, and the lost host's ports stay as they are."""

from __future__ import annotations

from cpm.core.changes import MoveAllocation
from cpm.core.manager import Manager
from cpm.core.presence import LOST_S
from cpm.core.twins import twin_of
from cpm.protocol.model import NodeName
from cpm.queries import vms as vms_queries
from tests.fakes.site import Connection, Site
from tests.unit.site.test_claims import HOST1, HOST2, VM, host_of, ports, running, start_beside, state, wait

TWIN = twin_of(VM, HOST2)


def is_mapped(site: Site, connection: Connection) -> bool:
    return all(
        edge.kernel.maps(connection.internal, connection.port) == connection.external
        for edge in site.edges
        if edge.connected
    )


def dies(site: Site, host: NodeName = HOST1) -> None:
    site.kill_natd(host)
    site.machines[host].guests.pop(VM)
    site.connections.clear()


def beside() -> Site:
    """A VM with a connection on a host that cannot reach the manager, and its twin, with ports."""
    site = running()
    assert site.open(VM, 7) is not None
    site.disconnect(HOST1)
    start_beside(site)
    wait(site, LOST_S + 1)
    assert ports(site, HOST2) is not None
    return site


def listed(site: Site) -> dict[NodeName, str]:
    assert site.manager is not None
    return {view.node: view.state for view in vms_queries.summaries(site.manager, site.now, all=False)}


def is_gone(site: Site, uuid: str) -> bool:
    assert site.manager is not None
    return uuid not in site.manager.fleet.vms


def test_a_vm_that_was_restarted_elsewhere_while_cpmd_was_away_gets_ports() -> None:
    site = running()
    before = ports(site, HOST1)
    site.crash_manager()
    dies(site)
    site.start_manager()
    for name in site.machines:
        site.connect(name)
    request = start_beside(site)
    wait(site, LOST_S + 1)
    now = ports(site, HOST2)
    assert before is not None
    assert now is not None
    assert site.machines[HOST2].answers[request] == "", "the hook waits for them"
    assert now.ports is not None
    assert before.ports is not None
    assert not now.ports.overlaps(before.ports)
    assert now.internal != before.internal
    assert site.open(VM, 3) is not None
    wait(site, 60)
    assert listed(site) == {HOST1: "claimed", HOST2: "active"}
    assert state(site) == ("claimed", HOST2)


def test_a_host_that_only_cannot_reach_the_manager_keeps_its_ports_and_connections() -> None:
    site = running()
    before, connection = ports(site, HOST1), site.open(VM, 7)
    assert connection is not None
    site.disconnect(HOST1)
    start_beside(site)
    wait(site, LOST_S + 1)
    assert ports(site, HOST2) is not None
    assert is_mapped(site, connection)
    for _ in range(3):
        site.connect(HOST1)
        wait(site, 30)
        assert (host_of(site), ports(site, HOST1)) == (HOST1, before)
        assert ports(site, HOST2) is not None
        assert is_mapped(site, connection)
        assert state(site) == ("claimed", HOST2)
        site.disconnect(HOST1)
        site.check()


def test_an_absence_as_long_as_a_restart_makes_no_twin() -> None:
    site = running()
    site.disconnect(HOST1)
    request = start_beside(site)
    wait(site, LOST_S - 2)
    assert request not in site.machines[HOST2].answers
    site.connect(HOST1)
    wait(site, 30)
    assert is_gone(site, TWIN)
    assert (host_of(site), ports(site, HOST2)) == (HOST1, None)


def test_what_a_dead_host_held_is_free_when_it_is_back_without_the_vm_and_the_twin_stays() -> None:
    site = beside()
    twin = ports(site, HOST2)
    dies(site)
    site.start_natd(HOST1)
    site.connect(HOST1)
    wait(site, 30)
    assert is_gone(site, VM)
    assert ports(site, HOST2) == twin
    assert VM not in site.machines[HOST1].kernel.host
    assert listed(site) == {HOST2: "active"}


def test_a_host_that_cannot_name_its_twin_yet_is_told_of_it_when_it_has() -> None:
    """Nobody knows what it calls the twin: natd has lost what it knew, and so has cpmd."""
    site = beside()
    twin, machine = ports(site, HOST2), site.machines[HOST2]
    site.kill_natd(HOST2)
    machine.libvirt = False
    machine.kernel.flush()
    site.crash_manager()
    site.start_manager()
    site.start_natd(HOST2)
    for name in site.machines:
        if name != HOST1:
            site.connect(name)
    wait(site, 10)
    assert site.manager is not None
    assert TWIN in site.manager.running.on(HOST2)
    assert not machine.kernel.host
    machine.libvirt = True
    site.list_domains(HOST2)
    site.run()
    assert ports(site, HOST2) == twin
    assert machine.kernel.host[VM].taps


def test_a_manager_that_is_built_anew_knows_what_hosts_call_their_twins() -> None:
    site = beside()
    assert site.manager is not None
    manager = Manager(site.ledger.load(), site.settings.rules(), site.manager.epoch, site.now)
    manager.go_on_from(site.manager)
    assert manager.twins.common(TWIN, HOST2) == VM


def test_what_a_dead_host_held_is_free_when_it_is_fenced_and_the_twin_stays() -> None:
    site = beside()
    twin = ports(site, HOST2)
    dies(site)
    site.ask(lambda manager: manager.fence(HOST1, site.now, fenced=True))
    wait(site, 30)
    assert is_gone(site, VM)
    assert ports(site, HOST2) == twin


def test_a_twin_lives_on_in_the_next_session_and_with_the_next_manager() -> None:
    site = beside()
    twin = ports(site, HOST2)
    connection = next(iter(site.connections))
    site.disconnect(HOST2)
    site.connect(HOST2)
    wait(site, 10)
    assert ports(site, HOST2) == twin
    site.crash_manager()
    site.start_manager()
    changed: list[object] = []
    site.on_outcome = lambda outcome: changed.extend(outcome.changes)
    for name in site.machines:
        if name != HOST1:
            site.connect(name)
    wait(site, 30)
    assert not any(isinstance(each, MoveAllocation) for each in changed), "its ranges stay as they are"
    assert ports(site, HOST2) == twin
    assert is_mapped(site, connection)
    assert state(site) == ("claimed", HOST2)
    site.left(VM, HOST2)
    wait(site, 30)
    assert is_gone(site, TWIN)
    assert ports(site, HOST2) is None
    assert host_of(site) == HOST1


def test_a_twin_is_measured_and_resized_as_any_other_vm() -> None:
    site = beside()
    before = ports(site, HOST2)
    assert before is not None
    assert before.ports is not None
    for offset in range(before.ports.size):
        assert site.open(VM, offset) is not None
    mine = {connection for connection in site.connections if connection.host == HOST2}
    assert mine or site.machines[HOST2].guests
    for _ in range(3):
        site.report(HOST2, busy=True)
        wait(site, 1)
    assert site.manager is not None
    observation = site.manager.sizer.observed[TWIN]
    assert observation.measured is not None
    assert VM not in site.manager.sizer.observed or site.manager.sizer.observed[VM].measured is None


def test_a_migration_whose_source_is_lost_ends_with_a_twin_and_releases_the_source_when_it_is_back() -> None:
    site = running()
    site.migrate(VM, HOST2)
    site.run()
    site.disconnect(HOST1)
    site.connections.clear()
    site.resume(VM, HOST2)
    wait(site, LOST_S + 1)
    assert ports(site, HOST2) is not None
    site.left(VM, HOST1)
    site.connect(HOST1)
    wait(site, 30)
    assert is_gone(site, VM)
    assert ports(site, HOST2) is not None
    assert ports(site, HOST1) is None


def test_a_migration_whose_target_forgets_it_leaves_nothing() -> None:
    for is_restarted in (False, True):
        site = running()
        site.migrate(VM, HOST2)
        site.run()
        if is_restarted:
            site.kill_natd(HOST2)
        site.machines[HOST2].guests.pop(VM)
        site.machines[HOST2].phases.pop(VM)
        if is_restarted:
            site.start_natd(HOST2)
            site.connect(HOST2)
        wait(site, 130)
        assert site.manager is not None
        assert site.manager.fleet.vms[VM].destination is None
        site.stop_vm(VM)
        wait(site, 10)
        assert is_gone(site, VM)
        assert site.manager.fleet.space.taken_ports() == 0
        assert all(VM not in host.kernel.host for host in site.hosts)
