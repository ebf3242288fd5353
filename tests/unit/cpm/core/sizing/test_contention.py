"""When ports are short: who may grow how far, who is asked to give back, and when it is over."""

from __future__ import annotations

import copy
from ipaddress import IPv4Address

from cpm.core import moves
from cpm.core.fleet import Fleet
from cpm.core.journal import LedgerState
from cpm.core.sizing.contention import (
    CALM_S,
    DRAIN_HOPE_S,
    RELIEF_RETRY_S,
    WANT_S,
    Allowance,
    Contention,
    FairShare,
    FewInUse,
    KeptForStarts,
    LessThanWanted,
    Want,
)
from cpm.core.sizing.resizing import Situation, choose
from cpm.core.sizing.starters import Starters
from cpm.core.wishes import Defaults, Resolver
from cpm.protocol.model import (
    VM,
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    Node,
    NodeName,
    PortRange,
    Role,
    Wishes,
)

A = IPv4Address("203.0.113.1")
HOST = NodeName("host1")
NOW = 1000.0


class Pool:
    """An address with some blocks of 64 ports, and VMs that hold a number of them one after the other."""

    def __init__(self, blocks: int, held: dict[str, int], reserve: float = 0.0, **wishes: Wishes) -> None:
        reserved = PortRange(1024, 65535).minus(PortRange(1024, 1024 + blocks * 64 - 1))
        vms, allocations, first = [], [], 1024
        for number, (name, count) in enumerate(held.items(), 1):
            internal = IPv4Address("100.64.0.0") + number
            vms.append(VM(DomainUUID(name), name, HOST, internal, operator_wishes=wishes.get(name, Wishes())))
            if count:
                ports = PortRange(first, first + count * 64 - 1)
                allocations.append(
                    Allocation(AllocationId(number), DomainUUID(name), HOST, A, ports, AllocationState.ACTIVE, 0.0)
                )
                first = ports.last + 1
        node = Node(HOST, frozenset(Role), IPv4Address("172.30.0.1"))
        state = LedgerState(
            0, tuple(vms), (node,), (ExternalAddress(A, reserved),), tuple(allocations), AllocationId(99)
        )
        self.fleet = Fleet(state, 64)
        self.starting = Starters(64)
        self.in_use: dict[str, int] = {}
        self.resolver = Resolver(Defaults(floor=64, policy="spec"), ["spec"])
        self.contention = Contention(self.fleet, reserve, self.starting, self.resolver.resolve, self.in_use.get)

    def waits_to_start(self, name: str) -> None:
        vm = self.fleet.vms[DomainUUID(name)]
        self.starting.add(vm.uuid, self.resolver.resolve(vm).floor.value)

    def active(self, name: str) -> Allocation:
        active = self.fleet.one(DomainUUID(name), AllocationState.ACTIVE)
        assert active is not None
        return active

    def grows(self, name: str, blocks: int, now: float = NOW) -> tuple[int, LessThanWanted | None]:
        """Return how many blocks a VM may have that wants so many, and why they are fewer."""
        vm = self.fleet.vms[DomainUUID(name)]
        allowance = self.contention.assess(vm, self.active(name), blocks * 64, self.in_use.get(name), now)
        self.contention.note(vm.uuid, allowance, now)
        return allowance.ports // 64, allowance.reason

    def relief(self, now: float = NOW) -> dict[str, int]:
        self.contention.on_tick(now)
        if (relief := self.contention.relief(now)) is None:
            return {}
        self.contention.on_relief(relief, now)
        return {str(uuid): ports // 64 for uuid, ports in relief.requests}

    def resize(self, name: str, ports: int) -> None:
        active = self.active(name)
        situation = Situation(space=self.fleet.space, active=active, target=ports, allowed=ports)
        assert moves.record(self.fleet, active, choose(situation), NOW)


def test_with_plenty_everybody_grows_as_it_likes_and_nobody_is_asked() -> None:
    pool = Pool(100, {"a": 4, "b": 4})
    assert pool.grows("a", 64) == (64, None)
    assert not pool.contention.is_short(NOW)
    assert pool.relief() == {}


def test_growth_beyond_the_share_leaves_the_reserve_and_growth_within_it_may_use_it() -> None:
    pool = Pool(32, {"a": 20, "b": 2}, reserve=0.25)
    pool.in_use.update(a=1280, b=128)
    assert pool.grows("a", 40) == (22, FairShare(1408))
    assert pool.grows("b", 3) == (3, None)


def test_growth_leaves_the_reserve_though_nobody_lacks_ports_yet() -> None:
    pool = Pool(10, {"a": 6}, reserve=0.2)
    pool.in_use.update(a=384)
    assert not pool.contention.is_short(NOW)
    assert pool.grows("a", 9)[0] == 8


def test_what_a_vm_keeps_alive_on_ranges_that_leave_counts_in_its_share() -> None:
    pool = Pool(20, {"pinner": 12, "light": 4})
    pool.resize("pinner", 256)
    pool.in_use.update(pinner=256, light=256)
    pool.contention.on_refused(DomainUUID("light"), 640, NOW)
    assert pool.grows("pinner", 6) == (4, FairShare(256))
    assert pool.grows("light", 6) == (6, None)


def test_while_ports_are_short_a_vm_grows_by_what_it_uses_not_by_its_score() -> None:
    pool = Pool(10, {"a": 5, "b": 5})
    pool.in_use.update(a=320, b=100)
    assert pool.grows("a", 8)[0] == 5
    assert pool.contention.want(DomainUUID("a")) is not None
    assert pool.grows("b", 8) == (5, FewInUse(100, 320))
    assert pool.contention.want(DomainUUID("b")) is None


def test_starting_vms_go_before_growth() -> None:
    pool = Pool(10, {"a": 5, "new": 0}, new=Wishes(floor=256))
    pool.waits_to_start("new")
    pool.in_use.update(a=320)
    blocks, why = pool.grows("a", 20)
    assert blocks == 6
    assert why == KeptForStarts(320, 256) or isinstance(why, FairShare)


def test_a_start_leaves_the_floors_of_others() -> None:
    pool = Pool(10, {"a": 5, "b": 0, "c": 0}, b=Wishes(floor=128), c=Wishes(floor=192))
    pool.waits_to_start("b")
    pool.waits_to_start("c")
    b = pool.fleet.vms[DomainUUID("b")]
    assert pool.contention.start_allowance(b, 256, 128) == 128
    pool.starting.discard(DomainUUID("c"))
    assert pool.contention.start_allowance(b, 256, 128) == 256


def test_the_largest_idle_range_gives_back_for_a_vm_that_starts() -> None:
    pool = Pool(12, {"busy": 5, "idle": 4, "small": 3, "new": 0})
    pool.in_use.update(busy=320, idle=0, small=0)
    pool.waits_to_start("new")
    assert pool.relief() == {"idle": 3}


def test_who_has_more_than_its_share_yields_where_nothing_is_idle() -> None:
    pool = Pool(12, {"greedy": 10, "light": 2})
    pool.in_use.update(greedy=640, light=128)
    assert pool.grows("light", 4)[0] == 2
    assert pool.relief() == {"greedy": 9}


def test_those_without_a_figure_and_those_being_resized_are_left_alone() -> None:
    pool = Pool(12, {"unknown": 8, "growing": 3, "new": 0})
    pool.in_use.update(growing=0)
    pool.resize("growing", 256)
    pool.waits_to_start("new")
    assert pool.relief() == {}
    pool.in_use.update(unknown=0)
    assert pool.relief(NOW + RELIEF_RETRY_S) == {"unknown": 7}


def test_what_is_about_to_be_free_is_not_asked_for_twice_unless_it_never_comes() -> None:
    pool = Pool(12, {"idle": 6, "other": 6, "new": 0})
    pool.in_use.update(idle=0, other=0)
    pool.waits_to_start("new")
    assert pool.relief() == {"idle": 5}
    pool.resize("idle", 320)
    assert pool.relief(NOW + 1) == {}
    assert pool.relief(NOW + DRAIN_HOPE_S) == {"other": 5}


def test_vms_with_nothing_to_give_are_not_asked_again_at_once() -> None:
    pool = Pool(4, {"a": 2, "b": 2}, reserve=0.25)
    pool.in_use.update(a=128, b=128)
    assert pool.relief() == {}
    pool.in_use.update(b=0)
    assert pool.relief(NOW + RELIEF_RETRY_S - 1) == {}
    assert pool.relief(NOW + RELIEF_RETRY_S) == {"b": 1}


def test_a_range_gives_up_the_side_that_faces_one_who_lacks_ports() -> None:
    pool = Pool(12, {"low": 4, "middle": 4, "high": 4})
    pool.in_use.update(low=256, middle=256, high=256)
    assert pool.grows("low", 8)[0] == 4
    assert pool.contention.keeps_upper(pool.active("middle"))
    assert not pool.contention.keeps_upper(pool.active("high"))
    assert not pool.contention.keeps_upper(pool.active("low"))


def test_the_reserve_is_made_up_again() -> None:
    pool = Pool(10, {"idle": 10}, reserve=0.2)
    pool.in_use.update(idle=0)
    assert pool.relief() == {"idle": 8}


def test_the_poorest_for_its_weight_is_served_first() -> None:
    pool = Pool(20, {"a": 6, "b": 4, "c": 8}, c=Wishes(weight=1000))
    pool.in_use.update(a=384, b=256, c=512)
    for name in "abc":
        pool.contention.on_refused(DomainUUID(name), 4096, NOW)
    assert [uuid for uuid, _ in pool.contention.growth_queue()] == ["c", "b", "a"]


def test_it_is_over_a_while_after_the_last_who_waited_has_what_it_wants_or_says_no_more() -> None:
    pool = Pool(4, {"a": 2, "b": 2})
    pool.contention.on_refused(DomainUUID("a"), 512, NOW)
    assert pool.contention.is_short(NOW)
    pool.contention.on_tick(NOW)
    pool.contention.on_tick(NOW + WANT_S)
    assert pool.contention.want(DomainUUID("a")) is None
    assert pool.contention.is_short(NOW + CALM_S - 1)
    assert not pool.contention.is_short(NOW + CALM_S)
    pool.contention.on_refused(DomainUUID("a"), 512, NOW + 100)
    pool.contention.on_settled(DomainUUID("a"))
    assert not pool.contention.is_short(NOW + 100)


def test_one_shortage_after_another_is_another_one() -> None:
    pool = Pool(4, {"a": 2, "b": 2})
    assert pool.contention.shortage(NOW) is None
    pool.contention.on_refused(DomainUUID("a"), 512, NOW)
    first = pool.contention.shortage(NOW)
    assert first is not None
    pool.contention.on_tick(NOW)
    assert pool.contention.shortage(NOW + CALM_S - 1) == first
    pool.contention.on_settled(DomainUUID("a"))
    over = NOW + 2 * CALM_S
    assert pool.contention.shortage(over) is None
    pool.contention.on_refused(DomainUUID("b"), 512, over)
    assert pool.contention.shortage(over) not in (None, first)


def test_questions_change_nothing() -> None:
    pool = Pool(10, {"a": 5, "b": 5})
    pool.in_use.update(a=320, b=320)
    pool.contention.on_refused(DomainUUID("a"), 512, NOW)
    for now in (NOW, NOW + WANT_S, NOW + 2 * CALM_S):
        before = copy.copy(vars(pool.contention))
        for name in "ab":
            vm = pool.fleet.vms[DomainUUID(name)]
            pool.contention.assess(vm, pool.active(name), 640, 320, now)
            pool.contention.fair_share(vm, 640, now)
            pool.contention.start_allowance(vm, 256, 64)
            pool.contention.keeps_upper(pool.active(name))
            pool.contention.others_wait(vm.uuid)
        pool.contention.is_short(now)
        pool.contention.shortage(now)
        pool.contention.relief(now)
        pool.contention.growth_queue()
        assert vars(pool.contention) == before


def test_a_vm_that_is_tried_again_on_our_own_has_not_said_anew_that_it_waits() -> None:
    pool = Pool(10, {"a": 5, "b": 5})
    pool.in_use.update(a=320, b=320)
    vm = pool.fleet.vms[DomainUUID("a")]
    pool.contention.on_refused(vm.uuid, 512, NOW)
    allowance = pool.contention.assess(vm, pool.active("a"), 384, 320, NOW + 5)
    pool.contention.note(vm.uuid, allowance, NOW + 5, anew=False)
    assert pool.contention.want(vm.uuid) == Want(512, NOW, NOW)
    pool.contention.note(vm.uuid, Allowance(384), NOW + 6, placed=False, anew=False)
    assert pool.contention.want(vm.uuid) == Want(512, NOW, NOW)
    pool.contention.note(vm.uuid, allowance, NOW + 7)
    assert pool.contention.want(vm.uuid) == Want(384, NOW, NOW + 7)
    pool.contention.note(vm.uuid, Allowance(384), NOW + 8)
    assert pool.contention.want(vm.uuid) is None
