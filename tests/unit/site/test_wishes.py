"""What a domain's XML says reaches the manager, wins over what the operator says, and is followed while the VM runs."""

from __future__ import annotations

import pytest

from cpm.core.journal import JournalEvent
from cpm.core.sizing.sizer import Target
from cpm.core.wishes import Origin
from cpm.protocol.errors import InvalidRequest, NotFound
from cpm.protocol.model import VM, DomainUUID, Filtering, NodeName, Wishes
from natctl.core.programming import InForce
from tests.fakes.site import Site

ONE = DomainUUID("00000000-0000-0000-0000-000000000001")
TWO = DomainUUID("00000000-0000-0000-0000-000000000002")
HOST1, HOST2 = NodeName("host1"), NodeName("host2")


def vm(site: Site) -> VM:
    assert site.manager is not None
    return site.manager.fleet.vms[ONE]


def floor(site: Site) -> tuple[int, str]:
    assert site.manager is not None
    chosen = site.manager.wishes(vm(site)).floor
    return chosen.value, chosen.origin


def size(site: Site) -> int:
    ports = site.machines[HOST1].kernel.host[ONE].intent.ports
    assert ports is not None
    return ports.size


def lists(site: Site, wishes: Wishes | None) -> None:
    """libvirt's list says this of the VM, as after an event METADATA_CHANGE."""
    site.machines[HOST1].wishes[ONE] = wishes
    site.list_domains(HOST1)
    site.run()


def reports(site: Site, count: int = 1) -> None:
    for _ in range(count):
        site.report(HOST1, busy=False)
        site.run()
        site.pass_time(6.0)
        site.run()


def started(wishes: Wishes | None = None) -> Site:
    site = Site()
    site.start_vm(HOST1, ONE, wishes)
    site.run()
    return site


def test_a_vm_starts_with_what_its_xml_says() -> None:
    site = started(Wishes(floor=512, nonsense=("weight 'x': it is not a whole number",)))
    assert size(site) == 512
    assert floor(site) == (512, Origin.METADATA)


def test_a_change_of_the_xml_of_a_running_vm_is_told_at_once_and_followed_with_the_next_report() -> None:
    site = started(Wishes())
    assert size(site) == 256
    lists(site, Wishes(floor=1024))
    assert vm(site).xml_wishes == Wishes(floor=1024)
    reports(site)
    assert size(site) == 1024
    lists(site, Wishes())
    assert floor(site) == (64, Origin.POOL)


def test_a_host_that_does_not_know_the_xml_changes_nothing() -> None:
    site = started(Wishes(floor=512))
    site.machines[HOST1].wishes.clear()
    site.kill_natd(HOST1)
    site.start_natd(HOST1)
    site.connect(HOST1)
    site.run()
    assert vm(site).xml_wishes == Wishes(floor=512)


def test_operator_wishes_survive_restarts_and_yield_to_the_xml() -> None:
    site = started(Wishes())
    site.ask(lambda manager: manager.set_wishes(ONE, Wishes(floor=320, cap=640)))
    reports(site)
    assert size(site) == 320
    site.crash_manager()
    site.heal()
    assert vm(site).operator_wishes == Wishes(floor=320, cap=640)
    assert floor(site) == (320, Origin.SET)
    lists(site, Wishes(floor=512))
    assert floor(site) == (512, Origin.METADATA)
    assert vm(site).operator_wishes == Wishes(floor=320, cap=640)


def test_a_host_hears_of_a_new_cap_at_once() -> None:
    site = started(Wishes())
    for cap, at_cap in ((256, True), (512, False)):
        site.ask(lambda manager, cap=cap: manager.set_wishes(ONE, Wishes(cap=cap)))  # type: ignore[misc]
        site.run()
        entry = site.machines[HOST1].kernel.host[ONE]
        assert (entry.intent.at_cap, entry.defer_after is None) == (at_cap, at_cap)


def test_nonsense_in_the_xml_never_keeps_a_vm_from_starting() -> None:
    site = started(Wishes(floor=999_999_999, cap=0, weight=0, policy="\x00", drain_limit_s=1e9))
    assert site.machines[HOST1].answers[1] == ""
    assert size(site) == 256
    assert site.manager is not None
    assert len(site.manager.wishes(vm(site)).ignored) == 4


def test_the_policy_of_a_vm_decides_about_it() -> None:
    # Much traffic through no ports at all: the specification's score asks for half as many again.
    for policy, asks_for_more in (("specification", True), ("occupancy", False)):
        site = started(Wishes(policy=policy))
        site.report(HOST1, busy=True)
        site.run()
        assert site.manager is not None
        decision = site.manager.sizer.observed[ONE].decision
        assert decision is not None
        assert (decision.asked > decision.current) is asks_for_more


def test_a_vms_own_drain_limit_ends_draining_that_the_pool_does_not_limit() -> None:
    site = started(Wishes(drain_limit_s=30.0))
    for offset in range(200, 256):
        assert site.open(ONE, offset) is not None
    site.ask(lambda manager: manager.sizer.resize(ONE, Target(64), site.now))
    reports(site, 4)
    assert site.manager is not None
    assert "draining" in {row.state.value for row in site.manager.fleet.of(ONE)}
    assert JournalEvent.CUT not in events(site)
    site.machines[HOST1].node.reports.send(1.0, {}, None, InForce(0, 0), {})  # type: ignore[union-attr]
    site.pass_time(30.0)
    site.run()
    assert "draining" in {row.state.value for row in site.manager.fleet.of(ONE)}, "no other VM lacks ports"
    site.connections.clear()  # the limit is there to cut them
    lack_ports(site)
    assert "draining" not in {row.state.value for row in site.manager.fleet.of(ONE)}
    assert events(site).count(JournalEvent.CUT) == 1


def test_without_a_drain_limit_nothing_is_cut_although_other_vms_lack_ports() -> None:
    site = started()
    for offset in range(200, 256):
        assert site.open(ONE, offset) is not None
    site.ask(lambda manager: manager.sizer.resize(ONE, Target(64), site.now))
    reports(site, 4)
    for _ in range(5):
        lack_ports(site)
        site.pass_time(3600.0)
        reports(site, 1)
    assert site.manager is not None
    assert "draining" in {row.state.value for row in site.manager.fleet.of(ONE)}
    assert JournalEvent.CUT not in events(site)


def test_a_range_whose_connections_all_ended_is_not_cut_by_its_limit() -> None:
    site = started(Wishes(drain_limit_s=30.0))
    site.ask(lambda manager: manager.sizer.resize(ONE, Target(64), site.now))
    reports(site, 4)
    lack_ports(site)
    assert JournalEvent.CUT not in events(site)


def lack_ports(site: Site) -> None:
    """Another VM wants more ports than it can get, for a second."""
    if not any(TWO in machine.guests for machine in site.machines.values()):
        site.start_vm(HOST2, TWO)
        site.run()
    site.ask(lambda manager: manager.sizer.contention_in("default").on_refused(TWO, 9999, site.now))
    site.pass_time(1.0)
    site.run()


def events(site: Site) -> list[JournalEvent]:
    return [entry.event for entry in site.ledger.reader().history(ONE)]


def test_invalid_operator_wishes_are_refused() -> None:
    site = started()
    assert site.manager is not None
    for wishes, uuid, error in (
        (Wishes(floor=99, cap=64), ONE, InvalidRequest),
        (Wishes(policy="magic"), ONE, InvalidRequest),
        (Wishes(), DomainUUID("none"), NotFound),
    ):
        try:
            site.manager.set_wishes(uuid, wishes)
        except error:
            continue
        raise AssertionError(wishes)
    assert vm(site).operator_wishes == Wishes()


def test_limits_of_connections_reach_the_kernel_and_follow_the_wishes() -> None:
    site = started(Wishes(connection_rate=50))
    held = site.machines[HOST1].kernel.host[ONE]
    assert held.intent.connection_rate == 50
    assert held.allowance is not None
    assert 50_000 < sum(held.allowance) <= 65536
    assert site.manager is not None
    site.ask(lambda manager: manager.set_wishes(ONE, Wishes(connections=2000)))
    site.run()
    held = site.machines[HOST1].kernel.host[ONE]
    assert held.allowance is not None
    assert sum(held.allowance) <= 2000


def test_a_limit_outside_the_pools_bounds_is_ignored_or_refused() -> None:
    site = started(Wishes(connections=5))
    assert site.manager is not None
    effective = site.manager.wishes(vm(site))
    assert effective.connections.value == 65536
    assert effective.ignored == ("metadata: connections 5: use 1024 to 1048576",)
    with pytest.raises(InvalidRequest, match="connection-rate 5: use 20 to 100000"):
        site.manager.set_wishes(ONE, Wishes(connection_rate=5))


@pytest.mark.parametrize(("connections", "strangers"), [(1024, 512), (65536, 4096)])
def test_half_of_a_full_cone_vms_connections_may_begin_outside(connections: int, strangers: int) -> None:
    site = started(Wishes(filtering=Filtering.ENDPOINT_INDEPENDENT, connections=connections))
    assert site.machines[HOST1].kernel.host[ONE].strangers == strangers
