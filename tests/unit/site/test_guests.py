"""What guests say about themselves: seen by operators, obeyed by nobody."""

from __future__ import annotations

import itertools
from ipaddress import IPv4Address

import pytest

from cpm.core.sizing.sizer import Target
from cpm.protocol.messages import GuestState, GuestView
from cpm.protocol.model import DomainUUID, NodeName, PortRange
from cpm.protocol.walltime import UtcSeconds
from cpm.queries import vms
from tests.fakes.site import EXTERNAL, Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
OTHER = DomainUUID("00000000-0000-0000-0000-000000000002")
HOST1 = NodeName("host1")
A_BILLION = 10**9


def lie(state: GuestState = GuestState.ANSWERING) -> GuestView:
    return GuestView(
        state,
        UtcSeconds(0.0),
        "more, more",
        A_BILLION,
        A_BILLION,
        4096,
        2**63 - 1,
        2**63 - 1,
        EXTERNAL,
        PortRange(1, 65535),
    )


def history(lies: dict[DomainUUID, GuestView]) -> list[object]:
    """An hour of a site, with and without load; every decision, and all that comes of it on the nodes."""
    site = Site(hold_down_s=5.0)
    for uuid in (VM, OTHER):
        site.start_vm(HOST1, uuid)
        site.run()
    seen: list[object] = []
    offsets = itertools.count()
    for minute in range(60):
        busy = minute % 20 < 8
        while busy and sum(c.domain == VM for c in site.connections) < 40 * (minute % 20):
            site.open(VM, next(offsets))
        if not busy:
            site.connections.clear()
        for _ in range(4):
            site.report(HOST1, busy=busy, guests=lies)
            site.run()
            site.pass_time(15.0)
        assert site.manager is not None
        seen.append([observation.decision for observation in site.manager.sizer.observed.values()])
        seen.append(sorted((a.domain, a.ports, a.state) for uuid in (VM, OTHER) for a in site.manager.fleet.of(uuid)))
        seen.append([machine.kernel.observe() for machine in site.machines.values()])
    return seen


@pytest.mark.parametrize("state", GuestState)
def test_a_guest_that_claims_a_billion_connections_changes_no_decision(state: GuestState) -> None:
    honest = history({})
    assert history({VM: lie(state), OTHER: lie(state)}) == honest
    assert len({str(each) for each in honest[1::3]}) > 3, "nothing ever changed: the load is no load"


def test_operators_see_a_guests_claims_apart_from_what_was_measured() -> None:
    site = Site()
    site.start_vm(HOST1, VM)
    site.run()
    assert site.manager is not None
    site.report(HOST1, busy=False)
    site.run()
    assert vms.detail(site.manager, site.now, VM).guest is None
    site.report(HOST1, busy=False, guests={VM: lie(), OTHER: lie()})
    site.run()
    detail = vms.detail(site.manager, site.now, VM)
    assert detail.guest is not None
    assert (detail.guest.state, detail.guest.connections) == ("answering", A_BILLION)
    assert (detail.guest.first_port, detail.guest.last_port) == (1, 65535)
    assert detail.domain.ports_in_use == 0
    site.report(HOST1, busy=False, guests={VM: GuestView(GuestState.ABSENT, UtcSeconds(5.0), "no channel")})
    site.run()
    detail = vms.detail(site.manager, site.now, VM)
    assert detail.guest is not None
    assert (detail.guest.state, detail.guest.connections, detail.guest.last_port) == ("absent", None, None)


def test_a_host_knows_what_to_tell_its_guests_and_when_it_changes() -> None:
    site = Site()
    node = site.machines[HOST1].node
    assert node is not None
    assert node.guests() == {}
    site.start_vm(HOST1, VM)
    assert node.guests() == {VM: None}
    site.run()
    told = node.guests()[VM]
    assert told is not None
    assert (told.external, told.ports) == (EXTERNAL, site.machines[HOST1].kernel.host[VM].intent.ports)
    site.ask(lambda manager: manager.sizer.resize(VM, Target(512), site.now))
    site.run()
    larger = node.guests()[VM]
    assert larger is not None
    assert larger.ports is not None
    assert larger.ports.size == 512
    assert isinstance(larger.external, IPv4Address)
    site.stop_vm(VM)
    assert node.guests() == {}


def test_a_vm_that_is_on_its_way_here_is_no_guest_yet() -> None:
    site = Site()
    host2 = NodeName("host2")
    site.start_vm(HOST1, VM)
    site.run()
    site.migrate(VM, host2)
    site.run()
    node = site.machines[host2].node
    assert node is not None
    assert VM not in node.guests()
    site.resume(VM, host2)
    assert VM in node.guests()
