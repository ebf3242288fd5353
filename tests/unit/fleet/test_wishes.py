"""What a domain's XML says reaches the manager, wins over what the operator says, and is followed while the VM runs."""

from __future__ import annotations

from cpm.protocol.errors import InvalidRequest, NotFound
from cpm.protocol.model import VM, DomainUUID, NodeName, Wishes
from cpm.protocol.wishes import Origin
from natctl.core.domains import Running
from tests.fakes.fleet import Fleet

ONE = DomainUUID("00000000-0000-0000-0000-000000000001")
HOST1, HOST2 = NodeName("host1"), NodeName("host2")


def vm(fleet: Fleet) -> VM:
    assert fleet.manager is not None
    return fleet.manager.view.vms[ONE]


def floor(fleet: Fleet) -> tuple[int, str]:
    assert fleet.manager is not None
    chosen = fleet.manager.wishes(vm(fleet)).floor
    return chosen.value, chosen.origin


def size(fleet: Fleet) -> int:
    ports = fleet.machines[HOST1].kernel.host[ONE].ports
    assert ports is not None
    return ports.size


def lists(fleet: Fleet, wishes: Wishes | None) -> None:
    """libvirt's list says this of the VM, as after an event METADATA_CHANGE."""
    machine = fleet.machines[HOST1]
    assert machine.node is not None
    machine.node.listed([Running(ONE, "vm-0001", machine.guests[ONE], wishes)], fleet.now)
    fleet._carry_out(machine)
    fleet.run()


def reports(fleet: Fleet, count: int = 1) -> None:
    for _ in range(count):
        fleet.report(HOST1, busy=False)
        fleet.run()
        fleet.pass_time(6.0)
        fleet.run()


def started(wishes: Wishes | None = None) -> Fleet:
    fleet = Fleet()
    machine = fleet.machines[HOST1]
    assert machine.node is not None
    machine.guests[ONE] = frozenset({"vnet0"})
    machine.node.linked(frozenset({"vnet0"}), fleet.now)
    machine.node.starting(1, Running(ONE, "vm-0001", frozenset({"vnet0"}), wishes), fleet.now, wait_for_taps=True)
    fleet._carry_out(machine)
    fleet.run()
    return fleet


def test_a_vm_starts_with_what_its_xml_says() -> None:
    fleet = started(Wishes(floor=512, nonsense=("weight 'x': it is not a whole number",)))
    assert size(fleet) == 512
    assert floor(fleet) == (512, Origin.METADATA)


def test_a_change_of_the_xml_of_a_running_vm_is_told_at_once_and_followed_with_the_next_report() -> None:
    fleet = started(Wishes())
    assert size(fleet) == 256
    lists(fleet, Wishes(floor=1024))
    assert vm(fleet).metadata == Wishes(floor=1024)
    reports(fleet)
    assert size(fleet) == 1024
    lists(fleet, Wishes())
    assert floor(fleet) == (64, Origin.POOL)


def test_a_host_that_does_not_know_the_xml_changes_nothing() -> None:
    fleet = started(Wishes(floor=512))
    fleet.kill_natd(HOST1)
    fleet.start_natd(HOST1)
    fleet.connect(HOST1)
    fleet.run()
    assert vm(fleet).metadata == Wishes(floor=512)


def test_what_the_operator_says_is_kept_over_restarts_and_gives_way_to_the_xml() -> None:
    fleet = started(Wishes())
    fleet.ask(lambda manager: manager.set_wishes(ONE, Wishes(floor=320, cap=640)))
    reports(fleet)
    assert size(fleet) == 320
    fleet.crash_manager()
    fleet.heal()
    assert vm(fleet).set == Wishes(floor=320, cap=640)
    assert floor(fleet) == (320, Origin.SET)
    lists(fleet, Wishes(floor=512))
    assert floor(fleet) == (512, Origin.METADATA)
    assert vm(fleet).set == Wishes(floor=320, cap=640)


def test_a_host_hears_of_a_new_cap_at_once() -> None:
    fleet = started(Wishes())
    for cap, at_cap in ((256, True), (512, False)):
        fleet.ask(lambda manager, cap=cap: manager.set_wishes(ONE, Wishes(cap=cap)))  # type: ignore[misc]
        fleet.run()
        entry = fleet.machines[HOST1].kernel.host[ONE]
        assert (entry.at_cap, entry.defer_after is None) == (at_cap, at_cap)


def test_nonsense_in_the_xml_never_keeps_a_vm_from_starting() -> None:
    fleet = started(Wishes(floor=2**63, cap=-5, weight=0, policy="\x00", drain_limit_s=float("1e300")))
    assert fleet.machines[HOST1].answers[1] == ""
    assert size(fleet) == 256
    assert fleet.manager is not None
    assert len(fleet.manager.wishes(vm(fleet)).ignored) == 4


def test_the_policy_of_a_vm_decides_about_it() -> None:
    # Much traffic through no ports at all: the specification's score asks for half as many again.
    for policy, asks_for_more in (("specification", True), ("occupancy", False)):
        fleet = started(Wishes(policy=policy))
        fleet.report(HOST1, busy=True)
        fleet.run()
        assert fleet.manager is not None
        decision = fleet.manager.sizing.observed[ONE].decision
        assert decision is not None
        assert (decision.asked > decision.current) is asks_for_more


def test_a_drain_limit_of_its_own_ends_what_the_pool_would_let_drain_for_ever() -> None:
    fleet = started(Wishes(drain_limit_s=30.0))
    for offset in range(200, 256):
        assert fleet.open(ONE, offset) is not None
    fleet.ask(lambda manager: manager.sizing.resize(ONE, 64, fleet.now))
    reports(fleet, 4)
    assert fleet.manager is not None
    assert "draining" in {row.state.value for row in fleet.manager.view.of(ONE)}
    fleet.connections.clear()  # the limit is there to cut them
    fleet.machines[HOST1].node.report(1.0, {}, None, 0, {})  # type: ignore[union-attr]
    fleet.pass_time(30.0)
    fleet.run()
    assert "draining" not in {row.state.value for row in fleet.manager.view.of(ONE)}


def test_an_operator_who_says_nonsense_is_told() -> None:
    fleet = started()
    assert fleet.manager is not None
    for wishes, uuid, error in (
        (Wishes(floor=99, cap=64), ONE, InvalidRequest),
        (Wishes(policy="magic"), ONE, InvalidRequest),
        (Wishes(), DomainUUID("none"), NotFound),
    ):
        try:
            fleet.manager.set_wishes(uuid, wishes)
        except error:
            continue
        raise AssertionError(wishes)
    assert vm(fleet).set == Wishes()
