"""VMs that keep a connection alive on every port they ever had: others can start, and get what is left by shares."""

from __future__ import annotations

from ipaddress import IPv4Address

from cpm.core.journal import JournalEvent
from cpm.core.manager import Manager
from cpm.ledger import SqliteLedger
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Attach,
    Delta,
    Draining,
    Hello,
    Measured,
    Need,
    Refused,
    Report,
    Snapshot,
)
from cpm.protocol.model import AllocationState, DomainUUID, ExternalAddress, NodeName, Role, Wishes
from cpm.settings import Settings
from tests.fakes.approving import say_hello

HOST, EDGE = NodeName("host1"), NodeName("edge1")
S = AllocationState


def uuid(number: int) -> DomainUUID:
    return DomainUUID(f"00000000-0000-0000-0000-{number:012d}")


class Pinned:
    """A manager, a host and an edge that confirm everything, and VMs whose every port always has a connection."""

    def __init__(self, addresses: int, hogs: int) -> None:
        pool = tuple(ExternalAddress(IPv4Address("203.0.113.0") + number) for number in range(1, addresses + 1))
        self.ledger = SqliteLedger(":memory:")
        self.now = 1_000_000.0
        self.epoch = self.ledger.next_epoch()
        self.manager = Manager(self.ledger.load(), Settings().rules(), self.epoch, self.now)
        self.manager.pool.add_addresses(pool, self.now)
        self.refused: list[DomainUUID] = []
        self._generation = 0
        self.hogs = [uuid(number) for number in range(1, hogs + 1)]
        self.others: list[DomainUUID] = []
        for name, role, number in ((EDGE, Role.EDGE, 21), (HOST, Role.HOST, 11)):
            hello = Hello(PROTOCOL, name, frozenset({role}), IPv4Address(f"172.30.0.{number}"), "0", 0, ())
            say_hello(self.manager, hello, self.now)
        self._settle()
        for hog in self.hogs:
            self.start(hog)

    def start(self, vm: DomainUUID) -> int:
        """Return the ports that a VM starts with."""
        self.manager.on_message(HOST, Attach(vm, f"vm{int(vm[-4:])}"), self.now)
        self._settle()
        return self.size(vm)

    def start_others(self, count: int) -> list[int]:
        new = [uuid(1000 + len(self.others) + number) for number in range(count)]
        self.others += new
        return [self.start(each) for each in new]

    def size(self, vm: DomainUUID) -> int:
        active = self.manager.fleet.one(vm, S.ACTIVE)
        return active.ports.size if active is not None else 0

    def held(self, vm: DomainUUID) -> int:
        return sum(each.ports.size for each in self.manager.fleet.of(vm))

    def seconds(self, count: int, *, greedy: bool = True) -> None:
        """Pass time; greedy VMs open as many connections as they can, and none ever ends."""
        for _ in range(count):
            vms = tuple(self._measured(hog) for hog in (*self.hogs, *self.others) if self.size(hog))
            self.manager.on_message(HOST, Report(self._generation, 1.0, vms), self.now)
            self._settle()
            for hog in self.hogs if greedy else ():
                for _ in range(4):
                    active = self.manager.fleet.one(hog, S.ACTIVE)
                    assert active is not None
                    self.manager.on_message(HOST, Need(hog, active.ports, active.ports.size, 4000.0), self.now)
                    self._settle()
            self.now += 1.0
            self.manager.tick(self.now)
            self._settle()

    def _measured(self, vm: DomainUUID) -> Measured:
        is_hog = vm in self.hogs
        draining = tuple(
            Draining(each.ports, each.ports.size if is_hog else 0)
            for each in self.manager.fleet.of(vm)
            if each.state is S.DRAINING
        )
        return Measured(vm, 1.0, 0.1, self.size(vm) if is_hog else 0, 1.0, draining)

    def _settle(self) -> None:
        while True:
            outcome = self.manager.take(self.now)
            self.ledger.commit(outcome.changes, self.now)
            self.refused += [each.domain for _, each in outcome.messages if isinstance(each, Refused)]
            if not outcome.messages:
                return
            for name, message in outcome.messages:
                if isinstance(message, (Snapshot, Delta)):
                    self._generation = message.generation if name == HOST else self._generation
                    self.manager.on_message(name, Applied(self.epoch, message.generation), self.now)

    def events(self) -> list[JournalEvent]:
        return [each.event for hog in self.hogs for each in self.ledger.reader().history(hog)]


def test_vms_start_with_their_floor_while_eight_others_keep_every_port_they_ever_had_alive() -> None:
    site = Pinned(addresses=4, hogs=8)
    site.seconds(40)
    reserve = site.manager.sizer.contention_in("default").reserve
    assert sum(map(site.held, site.hogs)) > 200_000, "they have taken what there is"
    assert site.manager.fleet.space.free_ports() >= reserve >= 60 * 64
    sizes = site.start_others(60)
    assert site.refused == []
    assert min(sizes) >= 64
    site.seconds(120)
    assert [site.size(each) >= 64 for each in site.others] == [True] * 60


def test_moves_of_full_ranges_do_not_eat_the_reserve() -> None:
    site = Pinned(addresses=1, hogs=5)
    site.seconds(20)
    for _ in range(12):
        site.seconds(20)
        free, reserve = site.manager.fleet.space.free_ports(), site.manager.sizer.contention_in("default").reserve
        assert free >= reserve


def test_no_vm_ever_holds_more_than_its_cap_leaving_ranges_included() -> None:
    site = Pinned(addresses=4, hogs=3)
    cap = 8192
    for hog in site.hogs:
        site.manager.set_wishes(hog, Wishes(cap=cap))
    for _ in range(40):
        site.seconds(1)
        assert max(map(site.held, site.hogs)) <= cap
    assert min(map(site.held, site.hogs)) > cap * 3 // 4


def test_a_vm_at_its_own_cap_is_no_shortage_for_others() -> None:
    site = Pinned(addresses=4, hogs=3)
    for hog in site.hogs:
        site.manager.set_wishes(hog, Wishes(cap=4096))
    site.seconds(60)
    assert not site.manager.sizer.contention_in("default").is_short(site.now)
    assert JournalEvent.SHORT not in site.events()
