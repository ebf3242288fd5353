"""What guests say about themselves: seen by operators, obeyed by nobody."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Address

import pytest

from cpm.protocol.messages import GuestState, GuestView
from cpm.protocol.model import DomainUUID, NodeName, PortRange
from cpm.queries import overview
from tests.fakes.fleet import EXTERNAL, Fleet

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OTHER = DomainUUID("00000000-0000-0000-0000-000000000002")
HOST1 = NodeName("host1")
A_BILLION = 10**9


def lie(state: GuestState = GuestState.ANSWERING) -> GuestView:
    return GuestView(
        state, 0.0, "more, more", A_BILLION, A_BILLION, 4096, 2**63 - 1, 2**63 - 1, EXTERNAL, PortRange(1, 65535)
    )


def history(lies: dict[DomainUUID, GuestView]) -> list[object]:
    """An hour of a fleet, with and without load; every decision, and all that comes of it on the nodes."""
    fleet = Fleet(hold_down_s=5.0)
    for uuid in (VM, OTHER):
        fleet.start_vm(HOST1, uuid)
        fleet.run()
    seen: list[object] = []
    offsets = itertools.count()
    for minute in range(60):
        busy = minute % 20 < 8
        while busy and sum(c.domain == VM for c in fleet.connections) < 40 * (minute % 20):
            fleet.open(VM, next(offsets))
        if not busy:
            fleet.connections.clear()
        for _ in range(4):
            fleet.report(HOST1, busy=busy, guests=lies)
            fleet.run()
            fleet.pass_time(15.0)
        assert fleet.manager is not None
        seen.append([observation.decision for observation in fleet.manager.sizing.observed.values()])
        seen.append(sorted((a.domain, a.ports, a.state) for uuid in (VM, OTHER) for a in fleet.manager.view.of(uuid)))
        seen.append([machine.kernel for machine in fleet.machines.values()])
    return seen


@pytest.mark.parametrize("state", GuestState)
def test_a_guest_that_claims_a_billion_connections_changes_no_decision(state: GuestState) -> None:
    honest = history({})
    assert history({VM: lie(state), OTHER: lie(state)}) == honest
    assert len({str(each) for each in honest[1::3]}) > 3, "nothing ever changed: the load is no load"


def test_what_it_claims_is_shown_as_what_it_claims() -> None:
    fleet = Fleet()
    fleet.start_vm(HOST1, VM)
    fleet.run()
    assert fleet.manager is not None
    fleet.report(HOST1, busy=False)
    fleet.run()
    assert overview.domain(fleet.manager, VM).guest is None
    fleet.report(HOST1, busy=False, guests={VM: lie(), OTHER: lie()})
    fleet.run()
    detail = overview.domain(fleet.manager, VM)
    assert detail.guest is not None
    assert (detail.guest.state, detail.guest.connections) == ("answering", A_BILLION)
    assert (detail.guest.first_port, detail.guest.last_port) == (1, 65535)
    assert detail.domain.ports_in_use == 0
    fleet.report(HOST1, busy=False, guests={VM: GuestView(GuestState.ABSENT, 5.0, "no channel")})
    fleet.run()
    detail = overview.domain(fleet.manager, VM)
    assert detail.guest is not None
    assert (detail.guest.state, detail.guest.connections, detail.guest.last_port) == ("absent", None, None)


def test_a_host_knows_what_to_tell_its_guests_and_when_it_changes() -> None:
    fleet = Fleet()
    node = fleet.machines[HOST1].node
    assert node is not None
    assert node.guests() == {}
    fleet.start_vm(HOST1, VM)
    assert node.guests() == {VM: None}
    fleet.run()
    told = node.guests()[VM]
    assert told is not None
    assert (told.external, told.ports) == (EXTERNAL, fleet.machines[HOST1].kernel.host[VM].ports)
    fleet.ask(lambda manager: manager.sizing.resize(VM, 512, fleet.now))
    fleet.run()
    larger = node.guests()[VM]
    assert larger is not None
    assert larger.ports is not None
    assert larger.ports.size == 512
    assert isinstance(larger.external, IPv4Address)
    fleet.stop_vm(VM)
    assert node.guests() == {}


def test_a_vm_that_is_on_its_way_here_is_no_guest_yet() -> None:
    fleet = Fleet()
    host2 = NodeName("host2")
    fleet.start_vm(HOST1, VM)
    fleet.run()
    fleet.migrate(VM, host2)
    fleet.run()
    node = fleet.machines[host2].node
    assert node is not None
    assert VM not in node.guests()
    fleet.resume(VM, host2)
    assert VM in node.guests()
