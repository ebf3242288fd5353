"""A short burst of connections takes a few ports for each of them, and gives them back soon."""

from __future__ import annotations

import dataclasses

from cpm.core.placement import USABLE
from cpm.protocol.messages import Need
from cpm.protocol.model import AllocationState, DomainUUID, NodeName, PortRange
from tests.fakes.site import Connection, Site

HOST1, HOST2, EDGE1, EDGE2 = (NodeName(name) for name in ("host1", "host2", "edge1", "edge2"))
VMS = [DomainUUID(f"00000000-0000-0000-0000-{number:012d}") for number in range(1, 5)]
BURST = 200
BURST_S = 0.012
STEP_S = 0.003


class Burst:
    """Four VMs of 64 ports each open 200 connections within 12 ms."""

    def __init__(self, ended_timeout_s: int | None = None) -> None:
        self.site = Site(ports=USABLE)
        host = self.site.machines[HOST1]
        self.site.kill_natd(HOST1)
        host.identity = dataclasses.replace(host.identity, ended_timeout_s=ended_timeout_s)
        self.site.start_natd(HOST1)
        self.site.connect(HOST1)
        self.site.run()
        self.opened: dict[DomainUUID, list[Connection]] = {uuid: [] for uuid in VMS}
        for uuid in VMS:
            self.site.start_vm(HOST1, uuid)
        self.site.run()
        for uuid in VMS:
            self._resize(uuid, 64)
        self.seconds(160)
        assert self.held() == 4 * 64

    def _resize(self, uuid: DomainUUID, ports: int) -> None:
        self.site.ask(lambda manager: manager.sizer.resize_to(uuid, ports, self.site.now))

    def held(self, *states: AllocationState) -> int:
        """Return the ports that the VMs hold, in these states or any."""
        assert self.site.manager is not None
        rows = [row for uuid in VMS for row in self.site.manager.fleet.of(uuid)]
        return sum(row.ports.size for row in rows if not states or row.state in states)

    def active(self, uuid: DomainUUID) -> PortRange:
        ports = self.site.machines[HOST1].kernel.host[uuid].intent.ports
        assert ports is not None
        return ports

    def burst(self) -> None:
        steps = round(BURST_S / STEP_S)
        for step in range(1, steps + 1):
            for uuid in VMS:
                self._open(uuid, BURST * step // steps)
            self.site.now += STEP_S
            self.site.run()

    def _open(self, uuid: DomainUUID, total: int) -> None:
        """Open connections until there are so many in all; those that find no port wait for the next step."""
        active, used = self.active(uuid), {each.port for each in self.opened[uuid]}
        free = [port - active.first for port in active if port not in used]
        lacking = total - len(self.opened[uuid])
        for offset in free[:lacking]:
            connection = self.site.open(uuid, offset)
            assert connection is not None
            self.opened[uuid].append(connection)
        in_active = sum(each.port in active for each in self.opened[uuid])
        need = Need(uuid, active, in_active + max(0, lacking - len(free)), BURST / BURST_S)
        self.site.ask(lambda manager: manager.on_message(HOST1, need, self.site.now))

    def seconds(self, count: int) -> None:
        for _ in range(count):
            for host in (HOST1, HOST2):
                self.site.report(host, busy=False)
            self.site.run()
            self.site.pass_time(1.0)
            self.site.run()


def test_a_burst_takes_a_few_ports_for_each_connection_and_none_goes_without() -> None:
    load = Burst()
    load.burst()
    assert [len(opened) for opened in load.opened.values()] == [BURST] * 4
    assert load.held() <= 4 * 6 * BURST
    assert load.held() < 27072 / 4


def test_two_minutes_after_a_burst_the_pool_is_whole_again() -> None:
    load = Burst()
    load.burst()
    load.seconds(1)
    load.site.connections.clear()
    assert load.held() > 4 * 64
    load.seconds(119)
    assert load.held() > 4 * 64, "the last connection ended less than the hold-down ago"
    load.seconds(3)
    assert load.held() == load.held(AllocationState.ACTIVE) == 4 * 64


def test_ports_rest_from_their_end_where_a_connection_can_be_forgotten_between_two_counts() -> None:
    load = Burst(ended_timeout_s=1)
    load.burst()
    load.seconds(1)
    load.site.connections.clear()
    load.seconds(122)
    assert load.held(AllocationState.HELD) > 0
    load.seconds(120)
    assert load.held() == load.held(AllocationState.ACTIVE) == 4 * 64


def test_ports_that_some_connection_still_used_rest_for_the_whole_hold_down() -> None:
    load = Burst()
    load.burst()
    load.seconds(1)
    kept = {load.opened[uuid][-1] for uuid in VMS}
    load.site.connections &= kept
    load.seconds(121)
    assert load.site.manager is not None
    rows = [row for uuid in VMS for row in load.site.manager.fleet.of(uuid)]
    assert {row.ports.first for row in rows if row.state is AllocationState.HELD}
    assert all(load.site.now - row.since < 120 for row in rows if row.state is AllocationState.HELD)


def test_ports_that_a_host_was_never_told_of_are_free_as_soon_as_the_edges_let_go() -> None:
    site = Site()
    site.start_vm(HOST1, VMS[0])
    site.deliver_up(HOST1)
    site.deliver_down(EDGE1)
    site.kernel_step(EDGE1)
    assert site.machines[EDGE1].kernel.edge
    site.stop_vm(VMS[0])
    site.deliver_up(HOST1)
    site.run()
    site.pass_time(1.0)
    site.run()
    assert not site.machines[EDGE1].kernel.edge
    assert site.manager is not None
    assert not site.manager.fleet.vms


def test_ports_that_a_host_may_have_handed_out_rest_though_it_never_confirmed_them() -> None:
    site = Site()
    site.start_vm(HOST1, VMS[0])
    site.deliver_up(HOST1)
    while any(step(edge) for edge in (EDGE1, EDGE2) for step in (site.deliver_down, site.kernel_step, site.deliver_up)):
        pass
    site.kill_natd(HOST1)
    site.stop_vm(VMS[0], hook=False)
    site.start_natd(HOST1)
    site.connect(HOST1)
    site.run()
    site.pass_time(100.0)
    site.run()
    assert site.manager is not None
    assert [row.state for row in site.manager.fleet.of(VMS[0])] == [AllocationState.HELD]


def test_ports_that_were_used_before_they_were_taken_back_rest_though_their_host_was_not_told() -> None:
    site = Site()
    site.start_vm(HOST1, VMS[0])
    site.run()
    site.stop_vm(VMS[0])
    site.run()
    site.start_vm(HOST1, VMS[0])
    site.deliver_up(HOST1)
    site.stop_vm(VMS[0])
    site.deliver_up(HOST1)
    site.run()
    site.pass_time(100.0)
    site.run()
    assert site.manager is not None
    assert {row.state for row in site.manager.fleet.of(VMS[0])} == {AllocationState.HELD}
