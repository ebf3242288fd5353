"""The pool's timeouts on their way to the hosts, and what restarts do to them."""

from __future__ import annotations

import msgspec

from cpm.protocol.model import DomainUUID, NodeName
from cpm.protocol.timeouts import Timeouts, TimeoutsTable
from tests.fakes.site import Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
HOST1, HOST2, EDGE1 = (NodeName(name) for name in ("host1", "host2", "edge1"))


def told(site: Site, name: NodeName) -> Timeouts | None:
    path = site.machines[name].kernel.path
    assert path is not None
    return path.timeouts


def restart_manager(site: Site, timeouts: TimeoutsTable) -> None:
    """As an operator does after a change of cpmd.toml; the nodes are not connected yet."""
    site.crash_manager()
    pool = msgspec.structs.replace(site.settings.pool, timeouts=timeouts)
    site.settings = msgspec.structs.replace(site.settings, pool=pool)
    site.start_manager()


def test_hosts_get_the_pools_timeouts_and_edges_none() -> None:
    site = Site()
    assert told(site, HOST1) == told(site, HOST2) == Timeouts()
    assert told(site, EDGE1) is None


def test_other_timeouts_come_with_the_next_snapshot_and_ports_stay() -> None:
    site = Site()
    site.start_vm(HOST1, VM)
    site.run()
    connection = site.open(VM, 7)
    held = dict(site.machines[HOST1].kernel.host)
    restart_manager(site, TimeoutsTable(udp_s=300))
    site.heal()
    assert told(site, HOST1) == told(site, HOST2) == Timeouts(udp_s=300)
    assert site.machines[HOST1].kernel.host == held
    assert connection in site.connections


def test_a_host_keeps_what_its_kernel_holds_until_the_manager_speaks() -> None:
    site = Site()
    site.start_vm(HOST1, VM)
    site.run()
    restart_manager(site, TimeoutsTable(udp_s=300))
    site.heal()
    site.crash_manager()
    site.kill_natd(HOST1)
    site.start_natd(HOST1)
    # A VM that stops is something to be programmed, manager or not.
    site.stop_vm(VM)
    site.run()
    assert site.machines[HOST1].kernel.host == {}
    assert told(site, HOST1) == Timeouts(udp_s=300)
