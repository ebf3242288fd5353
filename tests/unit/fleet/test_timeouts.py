"""The pool's timeouts on their way to the hosts, and what restarts do to them."""

from __future__ import annotations

import msgspec

from cpm.protocol.model import DomainUUID, NodeName
from cpm.protocol.timeouts import Timeouts, TimeoutsTable
from tests.fakes.fleet import Fleet

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
HOST1, HOST2, EDGE1 = (NodeName(name) for name in ("host1", "host2", "edge1"))


def told(fleet: Fleet, name: NodeName) -> Timeouts | None:
    path = fleet.machines[name].kernel.path
    assert path is not None
    return path.timeouts


def restart_manager(fleet: Fleet, timeouts: TimeoutsTable) -> None:
    """As an operator does after a change of cpmd.toml; the nodes are not connected yet."""
    fleet.crash_manager()
    pool = msgspec.structs.replace(fleet.settings.pool, timeouts=timeouts)
    fleet.settings = msgspec.structs.replace(fleet.settings, pool=pool)
    fleet.start_manager()


def test_hosts_get_the_pools_timeouts_and_edges_none() -> None:
    fleet = Fleet()
    assert told(fleet, HOST1) == told(fleet, HOST2) == Timeouts()
    assert told(fleet, EDGE1) is None


def test_other_timeouts_come_with_the_next_snapshot_and_ports_stay() -> None:
    fleet = Fleet()
    fleet.start_vm(HOST1, VM)
    fleet.run()
    connection = fleet.open(VM, 7)
    held = dict(fleet.machines[HOST1].kernel.host)
    restart_manager(fleet, TimeoutsTable(udp_s=300))
    fleet.heal()
    assert told(fleet, HOST1) == told(fleet, HOST2) == Timeouts(udp_s=300)
    assert fleet.machines[HOST1].kernel.host == held
    assert connection in fleet.connections


def test_a_host_keeps_what_its_kernel_holds_until_the_manager_speaks() -> None:
    fleet = Fleet()
    fleet.start_vm(HOST1, VM)
    fleet.run()
    restart_manager(fleet, TimeoutsTable(udp_s=300))
    fleet.heal()
    fleet.crash_manager()
    fleet.kill_natd(HOST1)
    fleet.start_natd(HOST1)
    # A VM that stops is something to be programmed, manager or not.
    fleet.stop_vm(VM)
    fleet.run()
    assert fleet.machines[HOST1].kernel.host == {}
    assert told(fleet, HOST1) == Timeouts(udp_s=300)
