"""A VM of a host whose VMs are managed gets ports or sends nothing, whether or not the manager is there."""

from __future__ import annotations

import pytest

from cpm.protocol.model import DomainUUID, NodeName, PortRange
from natctl.core.default_deny import DENIED_S
from natctl.core.domains import Listing, RunningDomain
from natctl.core.hook_waiters import RETURN_S
from natctl.model.entries import HostEntry
from tests.fakes.kernel import FakeKernel
from tests.fakes.site import Machine, Site

FIRST, VM = DomainUUID("00000000-0000-0000-0000-000000000001"), DomainUUID("00000000-0000-0000-0000-000000000002")
HOST1 = NodeName("host1")


def managed(site: Site) -> Machine:
    """Return a host that has a VM with ports, and whose manager has just gone."""
    site.start_vm(HOST1, FIRST)
    site.run()
    site.crash_manager()
    site.run()
    return site.machines[HOST1]


def is_denied(machine: Machine, uuid: DomainUUID) -> bool:
    """Whether the kernel marks what this VM sends, and gives it no port."""
    entry = machine.kernel.host.get(uuid)
    return entry is not None and entry.intent.ports is None and entry.taps == _taps(machine, uuid)


def has_ports(machine: Machine, uuid: DomainUUID) -> bool:
    return uuid in machine.kernel.host and machine.kernel.host[uuid].intent.ports is not None


def back(site: Site) -> None:
    site.start_manager()
    for name in site.machines:
        site.connect(name)
    settle(site)


def settle(site: Site) -> None:
    site.run()
    site.pass_time(6.0)
    site.run()
    for machine in site.hosts:
        if machine.node is not None:
            machine.node.send_presence()
            site._carry_out(machine)
    site.run()


def restart_natd(site: Site) -> None:
    site.kill_natd(HOST1)
    site.start_natd(HOST1)
    site.run()


def _taps(machine: Machine, uuid: DomainUUID) -> set[int]:
    return {tap.number for tap in machine.guests[uuid]}


def test_a_vm_that_starts_while_the_manager_is_away_sends_nothing_until_it_has_ports() -> None:
    site = Site()
    machine = managed(site)
    site.now += RETURN_S
    request = site.start_vm(HOST1, VM)
    # The guest runs once the hook is answered: its interface is marked by then.
    assert request not in machine.answers
    assert site.kernel_step(HOST1)
    assert machine.answers[request] == "unreachable"
    assert is_denied(machine, VM)
    assert machine.node is not None
    machine.node.on_tick(site.now)
    machine.node.on_tick(site.now + DENIED_S)
    assert machine.node.warnings == (
        "VMs without ports, whose packets are all dropped: vm-0002; `virt-ports list` says why",
    )
    back(site)
    assert has_ports(machine, VM)
    machine.node.on_tick(site.now)
    assert list(machine.node.warnings) == []


def test_it_stays_so_when_natd_is_restarted_meanwhile_and_holds_for_a_vm_that_no_hook_told_of() -> None:
    site = Site()
    machine = managed(site)
    site.start_vm(HOST1, VM)
    site.run()
    site.kill_natd(HOST1)
    unseen = DomainUUID("00000000-0000-0000-0000-000000000003")
    site.start_vm(HOST1, unseen)
    assert is_denied(machine, VM)
    site.start_natd(HOST1)
    site.run()
    assert is_denied(machine, VM)
    assert is_denied(machine, unseen)
    site.stop_vm(unseen)
    site.run()
    assert unseen not in machine.kernel.host
    back(site)
    assert has_ports(machine, VM)
    assert has_ports(machine, FIRST)


def test_it_holds_after_a_restart_of_the_machine() -> None:
    site = Site()
    machine = managed(site)
    path = machine.kernel.path
    site.kill_natd(HOST1)
    machine.guests.clear()
    machine.kernel = FakeKernel(machine.kernel._settings)
    site.start_natd(HOST1)
    site.start_vm(HOST1, VM)
    site.run()
    assert is_denied(machine, VM)
    assert machine.kernel.path == path
    back(site)
    assert has_ports(machine, VM)


def test_a_machine_that_has_handed_out_no_port_loses_nothing() -> None:
    site = Site()
    machine = site.machines[HOST1]
    site.crash_manager()
    site.start_vm(HOST1, VM)
    site.run()
    restart_natd(site)
    assert machine.kernel.host == {}
    back(site)
    assert has_ports(machine, VM)


def test_a_vm_of_before_goes_on_as_it_did_until_it_has_ports_or_starts_again() -> None:
    # There are ports for one VM only.
    site = Site(ports=PortRange(1024, 1087), start_reserve=0.0)
    machine = site.machines[HOST1]
    site.crash_manager()
    site.start_vm(HOST1, FIRST)
    site.start_vm(HOST1, VM)
    back(site)
    (served,) = machine.kernel.host
    other = next(uuid for uuid in (FIRST, VM) if uuid != served)
    assert has_ports(machine, served)
    restart_natd(site)
    assert other not in machine.kernel.host
    site.stop_vm(other)
    site.start_vm(HOST1, other)
    site.run()
    assert is_denied(machine, other)


def test_a_vm_for_which_there_are_no_ports_sends_nothing() -> None:
    site = Site(ports=PortRange(1024, 1087), start_reserve=0.0)
    machine = site.machines[HOST1]
    site.start_vm(HOST1, FIRST)
    site.run()
    request = site.start_vm(HOST1, VM)
    site.run()
    assert machine.answers[request] == "ports-exhausted"
    assert is_denied(machine, VM)


def test_a_vm_that_is_not_ours_is_left_alone() -> None:
    site = Site()
    machine = managed(site)
    assert machine.node is not None
    vm = RunningDomain(VM, "other", frozenset(), has_interface=False, why_not="its interface is on no Linux bridge")
    machine.node.on_domain_unmanaged(1, VM, site.now)
    machine.guests[VM] = vm.taps
    site.run()
    assert VM not in machine.kernel.host


def test_two_natds_one_after_the_other_give_the_same_mark() -> None:
    site = Site()
    machine = managed(site)
    site.start_vm(HOST1, VM)
    site.run()
    before: HostEntry = machine.kernel.host[VM]
    restart_natd(site)
    assert machine.kernel.host[VM] == before
    back(site)
    assert machine.kernel.host[VM].index == before.index


def test_what_changes_nothing_in_the_kernel_does_not_count_as_a_path() -> None:
    site = Site()
    machine = managed(site)
    site.kill_natd(HOST1)
    machine.guests.clear()
    machine.kernel = FakeKernel(machine.kernel._settings)
    site.start_natd(HOST1)
    assert machine.node is not None
    machine.node.on_domain_starting(None, RunningDomain(VM, "vm-0002"), site.now)
    machine.node.on_domain_ended(None, VM, "stopped", site.now)
    site._carry_out(machine)
    site.start_vm(HOST1, VM)
    site.run()
    assert is_denied(machine, VM)


@pytest.mark.parametrize("is_undescribed", [False, True])
def test_vms_that_libvirt_could_not_list_yet_when_the_first_got_ports_lose_nothing(
    monkeypatch: pytest.MonkeyPatch, *, is_undescribed: bool
) -> None:
    # There are ports for one VM only.
    site = Site(ports=PortRange(1024, 1087), start_reserve=0.0)
    machine = site.machines[HOST1]
    site.kill_natd(HOST1)
    site.start_vm(HOST1, VM)
    with monkeypatch.context() as patched:
        # libvirt is being restarted, and tells of one VM after the other by its hook.
        patched.setattr(site, "list_domains", lambda _: None)
        site.start_natd(HOST1)
        site.connect(HOST1)
        site.run()
        site.start_vm(HOST1, FIRST)
        site.run()
    assert has_ports(machine, FIRST)
    if is_undescribed:
        assert machine.node is not None
        first = RunningDomain(FIRST, "vm-0001", machine.guests[FIRST])
        machine.node.on_domains_listed(Listing(site.now, (first,), undescribed=frozenset({VM})), site.now)
    site.list_domains(HOST1)
    site.run()
    assert VM not in machine.kernel.host
    restart_natd(site)
    assert VM not in machine.kernel.host
    # From then on it is as always.
    site.stop_vm(VM)
    site.start_vm(HOST1, VM)
    site.run()
    assert is_denied(machine, VM)
