"""Which VMs run where is what libvirt lists: hooks and events make it quick, and none of them is needed."""

from __future__ import annotations

import dataclasses

import pytest

from cpm.protocol.errors import Conflict
from cpm.protocol.model import DomainUUID, NodeName
from cpm.queries.vms import find, summaries
from natctl.core.domains import START_GRACE_S, Domains, Listing, RunningDomain, Tap
from natctl.model.commands import Prune
from qga_agent.domain_list import Phase
from tests.fakes.site import Machine, Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OTHER = DomainUUID("00000000-0000-0000-0000-000000000002")
TAP = Tap("vnet0", 4242)
HOST1, HOST2 = NodeName("host1"), NodeName("host2")


def started(site: Site, uuid: DomainUUID = VM, host: NodeName = HOST1, tap: str | None = None) -> None:
    request = site.start_vm(host, uuid, tap=tap)
    site.run()
    assert site.machines[host].answers[request] == ""
    pass_time(site)


def pass_time(site: Site, passes: int = 3, seconds: float = 6.0) -> None:
    """Let time pass, with all that natd does periodically."""
    for _ in range(passes):
        site.pass_time(seconds)
        for machine in site.hosts:
            if machine.node is not None:
                machine.node.send_presence()
                site._carry_out(machine)
        site.run()


def is_on(site: Site, uuid: DomainUUID, host: NodeName) -> bool:
    """Whether this host, and no other, hands out ports to a VM, as the manager knows."""
    holders = [name for name, machine in site.machines.items() if uuid in machine.kernel.host]
    assert site.manager is not None
    return holders == [host] and site.manager.present.get(uuid) == host


def node(machine: Machine):  # type: ignore[no-untyped-def]
    assert machine.node is not None
    return machine.node


def test_a_guest_that_was_resumed_unseen_gets_its_ports_from_the_next_list() -> None:
    site = Site()
    started(site)
    site.migrate(VM, HOST2)
    site.run()
    site.machines[HOST2].libvirt = False
    site.resume(VM, HOST2)
    site.left(VM, HOST1)
    pass_time(site)
    site.machines[HOST2].libvirt = True
    pass_time(site)
    assert is_on(site, VM, HOST2)


def test_a_migration_without_any_hook_leaves_the_ports_with_the_source_until_the_guest_runs_elsewhere() -> None:
    site = Site()
    started(site)
    site.migrate(VM, HOST2, hooks=False)
    pass_time(site)
    assert is_on(site, VM, HOST1)
    site.resume(VM, HOST2)
    site.left(VM, HOST1)
    pass_time(site)
    assert is_on(site, VM, HOST2)


def test_an_aborted_migration_without_any_hook_leaves_the_source_as_it_was() -> None:
    site = Site()
    started(site)
    connection = site.open(VM, 7)
    assert connection is not None
    before = site.machines[HOST1].kernel.host[VM]
    site.migrate(VM, HOST2, hooks=False)
    pass_time(site)
    site.machines[HOST2].guests.pop(VM)
    pass_time(site)
    assert is_on(site, VM, HOST1)
    assert site.machines[HOST1].kernel.host[VM] == before


def test_the_source_of_a_migration_runs_here_until_it_is_gone() -> None:
    site = Site()
    started(site)
    site.migrate(VM, HOST2)
    # The last moment: libvirt says the same of both.
    site.machines[HOST1].phases[VM] = Phase.MIGRATING
    pass_time(site)
    assert is_on(site, VM, HOST1)


def test_a_guest_that_has_run_here_is_not_expected_when_it_leaves() -> None:
    """In the last moment of a migration libvirt says the same of a guest that leaves and of one that comes."""
    domains = Domains()
    leaves, comes = (
        RunningDomain(uuid, "web", frozenset({Tap(f"vnet{n}", n)})) for n, uuid in enumerate((VM, OTHER), 1)
    )
    for vm, phases in (leaves, (Phase.HERE, Phase.MIGRATING)), (comes, (Phase.MIGRATING,)):
        for at, phase in enumerate(phases):
            listed = dataclasses.replace(vm, phase=phase)
            domains.on_listed(listed, Listing(at, (listed,)), at)
    assert [uuid for uuid, _ in domains.incoming_domains()] == [OTHER]
    assert list(domains.guests()) == [VM]


def test_the_source_is_known_as_such_after_a_restart_of_natd_in_the_last_moment() -> None:
    site = Site()
    started(site)
    site.migrate(VM, HOST2)
    site.machines[HOST1].phases[VM] = Phase.MIGRATING
    site.kill_natd(HOST1)
    site.start_natd(HOST1)
    site.connect(HOST1)
    site.run()
    pass_time(site)
    assert is_on(site, VM, HOST1)


def test_a_vm_that_starts_up_is_not_taken_for_one_that_migrates() -> None:
    site = Site()
    request = site.start_vm(HOST1, VM)
    site.machines[HOST1].phases[VM] = Phase.STARTING
    pass_time(site)
    assert site.machines[HOST1].answers[request] == ""
    assert is_on(site, VM, HOST1)


def test_a_vm_keeps_its_ports_while_it_has_no_interface() -> None:
    site = Site()
    started(site)
    machine = site.machines[HOST1]
    taps, before = machine.guests[VM], machine.kernel.host[VM].intent
    machine.guests[VM] = frozenset()
    node(machine).on_links({}, site.now)
    pass_time(site)
    assert is_on(site, VM, HOST1)
    assert machine.kernel.host[VM].taps == frozenset()
    machine.guests[VM] = taps
    node(machine).on_links({tap.number: tap.name for tap in taps}, site.now)
    pass_time(site)
    assert machine.kernel.host[VM].taps == {tap.number for tap in taps}
    assert machine.kernel.host[VM].intent == before


def test_a_renamed_tap_is_the_same_tap() -> None:
    site = Site()
    started(site)
    machine = site.machines[HOST1]
    (tap,) = machine.guests[VM]
    node(machine).on_links({tap.number: "other0"}, site.now)
    # libvirt still has the former name, which no interface has.
    vm = RunningDomain(VM, "vm-0001", frozenset())
    site.pass_time(1.0)
    node(machine).on_domains_listed(Listing(site.now, (vm,)), site.now)
    site._carry_out(machine)
    site.run()
    assert machine.kernel.host[VM].taps == {tap.number}
    assert node(machine).taps() == {VM: frozenset({"other0"})}


def test_nothing_ends_by_itself_while_libvirt_cannot_be_asked() -> None:
    site = Site()
    started(site)
    machine = site.machines[HOST1]
    machine.libvirt = False
    site.stop_vm(VM, hook=False)
    pass_time(site, 20)
    assert is_on(site, VM, HOST1)
    machine.libvirt = True
    pass_time(site)
    assert VM not in machine.kernel.host
    assert site.manager is not None
    assert VM not in site.manager.present


def test_a_list_that_is_older_than_a_hook_ends_and_revives_nothing() -> None:
    site = Site()
    machine = site.machines[HOST1]
    asked_at = site.now
    site.pass_time(0.5)
    started_at_once = site.start_vm(HOST1, VM)
    node(machine).on_domains_listed(Listing(asked_at, ()), site.now)
    site.run()
    assert machine.answers[started_at_once] == ""
    pass_time(site)
    asked_at, listed = site.now, RunningDomain(VM, "vm-0001", machine.guests[VM])
    site.now += 0.5
    site.stop_vm(VM)
    node(machine).on_domains_listed(Listing(asked_at, (listed,)), site.now)
    assert VM not in node(machine).known_domains()


def test_a_list_that_lacks_a_blocked_domain_ends_only_what_it_looked_up() -> None:
    site = Site()
    started(site)
    started(site, OTHER)
    machine = site.machines[HOST1]
    site.pass_time(1.0)
    node(machine).on_domains_listed(Listing(site.now, (), frozenset({OTHER})), site.now)
    assert node(machine).known_domains() == {VM}
    node(machine).on_domains_listed(Listing(site.now, (), None, frozenset({VM})), site.now)
    assert node(machine).known_domains() == {VM}


def test_a_taps_name_that_another_vm_got_while_natd_was_away_is_not_the_former_vms() -> None:
    site = Site()
    started(site, VM, tap="vnet0")
    machine = site.machines[HOST1]
    (former,) = machine.kernel.host[VM].taps
    site.kill_natd(HOST1)
    site.stop_vm(VM)
    site.start_vm(HOST1, OTHER, tap="vnet0")
    site.start_natd(HOST1)
    (latter,) = machine.guests[OTHER]
    assert latter.number != former
    assert node(machine).known_domains() == {OTHER}
    site.connect(HOST1)
    site.run()
    pass_time(site)
    assert is_on(site, OTHER, HOST1)
    assert VM not in machine.kernel.host
    assert machine.kernel.host[OTHER].taps == {latter.number}


def test_a_list_that_is_older_than_the_hook_of_another_vm_gives_nobody_its_tap() -> None:
    """The list has the former VM still, whose XML names a tap that is another VM's by now."""
    domains = Domains()
    domains.on_hook(RunningDomain(VM, "former", frozenset({Tap("vnet0", 1)})), 10.0)
    domains.on_hook(RunningDomain(OTHER, "latter", frozenset({Tap("vnet0", 2)})), 20.5)
    listed = RunningDomain(VM, "former", frozenset({Tap("vnet0", 2)}))
    assert domains.on_listed(listed, Listing(20.0, (listed,)), 21.0)[1] == set()
    assert [set(domains.taps_of(uuid)) for uuid in (VM, OTHER)] == [{1}, {2}]


def test_without_libvirt_the_former_vm_ends_as_well() -> None:
    site = Site()
    started(site, VM, tap="vnet0")
    machine = site.machines[HOST1]
    machine.libvirt = False
    site.kill_natd(HOST1)
    site.stop_vm(VM)
    site.start_vm(HOST1, OTHER, tap="vnet0")
    site.start_natd(HOST1)
    site.connect(HOST1)
    site.run()
    # Nobody says that it ended, but no interface is taken for its own.
    assert machine.kernel.host[VM].taps == frozenset()


def test_a_start_that_failed_unseen_holds_no_range_for_long() -> None:
    site = Site()
    machine = site.machines[HOST1]
    node(machine).on_domain_starting(None, RunningDomain(VM, "vm-0001"), site.now)
    site._carry_out(machine)
    site.run()
    assert VM in machine.kernel.host
    pass_time(site, 3)
    assert VM not in machine.kernel.host


def test_a_vm_whose_network_turns_out_to_have_no_bridge_holds_no_range() -> None:
    site = Site()
    machine = site.machines[HOST1]
    node(machine).on_domain_starting(None, RunningDomain(VM, "vm-0001"), site.now)
    site._carry_out(machine)
    site.run()
    node(machine).on_domain_unmanaged(2, VM, site.now)
    site._carry_out(machine)
    site.run()
    assert machine.answers[2] == ""
    assert VM not in machine.kernel.host


def test_an_expected_vm_is_forgotten_when_it_never_comes() -> None:
    site = Site()
    started(site)
    machine = site.machines[HOST2]
    node(machine).on_domain_incoming(1, RunningDomain(VM, "vm-0001"), site.now)
    site._carry_out(machine)
    pass_time(site, 3)
    assert VM in node(machine).known_domains()
    pass_time(site, 3, START_GRACE_S)
    assert VM not in node(machine).known_domains()
    assert is_on(site, VM, HOST1)


def test_a_vm_of_other_software_ends_with_its_interface() -> None:
    site = Site()
    machine = site.machines[HOST1]
    request = site.start_vm(HOST1, VM)
    guests, machine.guests = machine.guests, {}
    node(machine).on_links({tap.number: tap.name for tap in guests[VM]}, site.now)
    site.run()
    assert machine.answers[request] == ""
    pass_time(site, 10)
    assert VM in machine.kernel.host
    node(machine).on_links({}, site.now)
    pass_time(site)
    assert VM not in machine.kernel.host


def restored(site: Site) -> None:
    """The VM that stopped comes back on its host."""
    request = site.start_vm(HOST1, VM)
    site.run()
    assert site.machines[HOST1].answers[request] == ""


def test_connections_are_there_when_a_vm_comes_back_before_its_ports_are_free() -> None:
    site = Site(hold_down_s=120.0)
    started(site)
    assert site.open(VM, 7) is not None
    machine = site.machines[HOST1]
    entries, before = set(machine.entries), machine.kernel.host[VM].intent.ports
    site.stop_vm(VM)
    pass_time(site, 10)
    assert machine.entries == entries
    restored(site)
    assert machine.kernel.host[VM].intent.ports == before
    assert machine.entries == entries


def test_a_vm_that_stops_before_its_old_connections_were_looked_for_keeps_them() -> None:
    site = Site(hold_down_s=120.0)
    started(site)
    assert site.open(VM, 7) is not None
    machine = site.machines[HOST1]
    entries = set(machine.entries)
    site.stop_vm(VM)
    site.run()
    site.start_vm(HOST1, VM)
    steps = [(step, name) for name in site.machines for step in (site.deliver_up, site.deliver_down, site.kernel_step)]
    while not any(isinstance(command, Prune) for command in machine.work):
        done = [step(name) for step, name in steps if not any(isinstance(command, Prune) for command in machine.work)]
        assert any(done)
    site.stop_vm(VM)
    site.run()
    assert machine.entries == entries


def test_connections_end_when_the_last_port_of_a_vm_is_free() -> None:
    site = Site(hold_down_s=10.0)
    started(site)
    started(site, OTHER)
    assert site.open(VM, 7) is not None
    assert site.open(OTHER, 7) is not None
    site.stop_vm(VM)
    pass_time(site)
    assert {owner for owner, _, _ in site.machines[HOST1].entries} == {OTHER}


def test_connections_on_a_host_that_a_vm_has_left_end_when_its_ports_there_are_free() -> None:
    site = Site(hold_down_s=10.0)
    started(site)
    assert site.open(VM, 7) is not None
    site.migrate(VM, HOST2)
    site.run()
    site.resume(VM, HOST2)
    site.left(VM, HOST1)
    site.run()
    assert site.open(VM, 7) is not None
    assert site.machines[HOST1].entries
    pass_time(site)
    assert site.machines[HOST1].entries == set()
    assert site.machines[HOST2].entries


def test_connections_on_ports_that_a_vm_does_not_get_back_end_when_it_is_programmed() -> None:
    site = Site(hold_down_s=10.0)
    started(site)
    assert site.open(VM, 7) is not None
    machine = site.machines[HOST1]
    site.stop_vm(VM)
    site.run()
    # The word that its ports are free is lost; another VM gets them.
    site.disconnect(HOST1)
    for _ in range(3):
        site.pass_time(6.0)
        site.run()
    started(site, OTHER, HOST2)
    assert machine.entries
    site.connect(HOST1)
    site.run()
    restored(site)
    vm = machine.kernel.host[VM].intent
    assert vm.ports is not None
    assert all(port in vm.ports for _, internal, port in machine.entries if internal == vm.internal)


def test_a_vm_on_no_bridge_holds_no_ports_and_the_list_says_why() -> None:
    site = Site()
    machine = site.machines[HOST1]
    machine.libvirt = False  # what it lists is said below
    reason = "its interface vnet0 is on no Linux bridge"
    assert site.manager is not None
    lists(site, RunningDomain(VM, "web", frozenset({TAP}), has_interface=False, why_not=reason))
    (view,) = summaries(site.manager, site.now, all=False)
    assert (view.name, view.node, view.first_port, view.state) == ("web", HOST1, None, "not managed")
    assert view.problem == reason
    with pytest.raises(Conflict, match=f"VM web on host1 is not managed: {reason}"):
        find(site.manager, "web")
    assert VM not in machine.kernel.host
    # It joins a bridge, and leaves it again: what runs keeps its ports.
    lists(site, RunningDomain(VM, "web", frozenset({TAP})))
    assert is_on(site, VM, HOST1)
    lists(site, RunningDomain(VM, "web", frozenset({TAP}), has_interface=False, why_not=reason))
    assert is_on(site, VM, HOST1)
    (view,) = summaries(site.manager, site.now, all=False)
    assert view.state == "active"
    lists(site)
    assert VM not in machine.kernel.host
    assert summaries(site.manager, site.now, all=False) == []


def lists(site: Site, *domains: RunningDomain) -> None:
    """Have libvirt on the first host list these domains and no others."""
    machine = site.machines[HOST1]
    site.pass_time(1.0)
    node(machine).on_domains_listed(Listing(site.now, domains), site.now)
    site._carry_out(machine)
    site.run()


def test_a_guest_that_got_ports_before_it_was_known_to_migrate_here_keeps_them() -> None:
    site = Site()
    # Its source cannot tell the manager, and of the hooks here only the last one is seen.
    site.disconnect(HOST1)
    site.start_vm(HOST1, VM)
    site.migrate(VM, HOST2, hooks=False)
    here = site.machines[HOST2]
    vm = RunningDomain(VM, "vm-0001", here.guests[VM])
    node(here).on_domain_starting(99, vm, site.now)
    site._carry_out(here)
    site.run()
    assert here.answers[99] == ""
    # libvirt lists it as migrating here; it runs a moment later, and the session is lost before libvirt says so.
    site.now += 1.0
    site.list_domains(HOST2)
    site.disconnect(HOST2)
    site.connections.clear()
    here.phases.pop(VM)
    connection = site.open(VM, 7)
    site.connect(HOST2)
    site.run()
    assert connection in site.connections
    site.check()
    assert VM in here.kernel.host
    site.list_domains(HOST2)
    site.left(VM, HOST1)
    site.heal()
    assert is_on(site, VM, HOST2)


def flushed_while_libvirt_is_away(site: Site) -> Machine:
    """natd begins on a machine whose tables somebody has flushed, and cannot ask libvirt."""
    machine = site.machines[HOST1]
    site.kill_natd(HOST1)
    machine.libvirt = False
    machine.kernel.flush()
    site.start_natd(HOST1)
    site.connect(HOST1)
    site.run()
    return machine


def test_a_natd_that_cannot_know_which_vms_run_takes_none_for_gone() -> None:
    site = Site()
    started(site)
    before, connection = site.machines[HOST1].kernel.host[VM].intent, site.open(VM, 7)
    assert connection is not None
    machine = flushed_while_libvirt_is_away(site)
    pass_time(site)
    assert "libvirt has not listed its domains since natd began" in node(machine).warnings[0]
    machine.libvirt = True
    site.list_domains(HOST1)
    site.run()
    assert machine.kernel.host[VM].intent == before
    assert machine.kernel.host[VM].taps == {tap.number for tap in machine.guests[VM]}
    assert connection in site.connections
    assert not node(machine).warnings


def test_a_vm_that_ended_unseen_is_gone_once_libvirt_has_listed_the_others() -> None:
    site = Site()
    started(site)
    started(site, OTHER)
    machine = flushed_while_libvirt_is_away(site)
    site.stop_vm(VM, hook=False)
    pass_time(site)
    assert site.manager is not None
    assert set(site.manager.present) == {VM, OTHER}
    machine.libvirt = True
    site.list_domains(HOST1)
    site.run()
    assert set(site.manager.present) == {OTHER}


def test_a_vm_that_a_hook_ends_gives_its_ports_back_although_libvirt_has_not_listed_the_others() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    started(site, OTHER)
    flushed_while_libvirt_is_away(site)
    site.stop_vm(VM)
    pass_time(site)
    assert site.manager is not None
    assert set(site.manager.present) == {OTHER}
    assert site.manager.fleet.of(VM) == ()


def test_a_manager_that_starts_over_keeps_a_vm_that_its_host_cannot_know_yet() -> None:
    site = Site()
    started(site)
    flushed_while_libvirt_is_away(site)
    site.crash_manager()
    site.start_manager()
    site.connect(HOST1)
    pass_time(site)
    assert site.manager is not None
    assert set(site.manager.present) == {VM}


def test_a_list_that_was_asked_for_when_a_hook_called_does_not_end_the_vm() -> None:
    """The clock tells neither which of them came first."""
    site = Site()
    started(site)
    site.stop_vm(VM, hook=False)
    asked = Listing(site.now, ())
    site.start_vm(HOST1, VM)
    site.run()
    node(site.machines[HOST1]).on_domains_listed(asked, site.now)
    site._carry_out(site.machines[HOST1])
    site.run()
    assert is_on(site, VM, HOST1)


def test_a_vm_that_restarted_while_natd_was_dead_waits_for_the_manager() -> None:
    """natd may have said that it is gone, and forgotten that; the manager gives its ports to where it runs next."""
    site = Site()
    started(site)
    machine = site.machines[HOST1]
    before = machine.kernel.host[VM].intent
    site.stop_vm(VM)
    # The manager hears it; the kernel still has the VM.
    assert site.deliver_up(HOST1)
    site.kill_natd(HOST1)
    assert VM in machine.kernel.host
    site.start_vm(HOST1, VM)
    site.start_natd(HOST1)
    site.run()
    assert machine.kernel.host[VM].intent.ports is None
    assert machine.kernel.host[VM].taps
    site.connect(HOST1)
    site.run()
    assert machine.kernel.host[VM].intent == before
