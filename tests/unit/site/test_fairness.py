"""A pool that is too small for what its VMs want: who gets what, second by second, and nothing is cut."""

from __future__ import annotations

import pytest

from cpm.protocol.model import AllocationState, DomainUUID, NodeName, PortRange, Wishes
from tests.fakes.site import EXTERNAL, Connection, Site

HOST1, HOST2 = NodeName("host1"), NodeName("host2")
GREEDY, LIGHT, *NEWCOMERS = (DomainUUID(f"00000000-0000-0000-0000-{number:012d}") for number in range(1, 7))
BLOCKS = 16
LIFETIME_S = 12.0


class Load:
    """Guests that keep as many connections open as they can get of those they want, each for a while."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        self.site = Site(hold_down_s=20.0, ports=PortRange(1024, 1024 + blocks * 64 - 1))
        self.wanted: dict[DomainUUID, int] = {}
        self.refused: dict[DomainUUID, int] = {}
        self._ends: dict[Connection, float] = {}
        self._next = 0

    def start(self, uuid: DomainUUID, host: NodeName, wanted: int = 0) -> str | None:
        """Return what the hook was told: empty when the VM has its ports, a code when not."""
        request = self.site.start_vm(host, uuid)
        self.site.run()
        self.wanted[uuid], self.refused[uuid] = wanted, 0
        return self.site.machines[host].answers.get(request)

    def stop(self, uuid: DomainUUID) -> None:
        self.site.stop_vm(uuid)
        del self.wanted[uuid]
        self._ends = {connection: end for connection, end in self._ends.items() if connection.domain != uuid}

    def seconds(self, count: int) -> None:
        for _ in range(count):
            self._second()

    def _second(self) -> None:
        site = self.site
        for connection in [each for each, end in self._ends.items() if end <= site.now]:
            del self._ends[connection]
            site.connections.discard(connection)
        for uuid, wanted in self.wanted.items():
            self._open(uuid, wanted - sum(each.domain == uuid for each in self._ends))
        for host in (HOST1, HOST2):
            site.report(host, busy=True)
        site.run()
        site.pass_time(1.0)
        site.run()

    def _open(self, uuid: DomainUUID, count: int) -> None:
        active = self.active(uuid)
        if active is None:
            return
        used = {each.port for each in self._ends if each.domain == uuid}
        free = [port - active.first for port in active if port not in used]
        for offset in free[: max(0, count)]:
            # Of a few lifetimes, so that ranges empty port by port.
            connection = self.site.open(uuid, offset)
            assert connection is not None
            self._next += 1
            self._ends[connection] = self.site.now + LIFETIME_S + self._next % 7
        self.refused[uuid] += max(0, count - len(free))

    def active(self, uuid: DomainUUID) -> PortRange | None:
        for machine in self.site.hosts:
            if uuid in machine.kernel.host:
                return machine.kernel.host[uuid].intent.ports
        return None

    def size(self, uuid: DomainUUID) -> int:
        active = self.active(uuid)
        return active.size if active is not None else 0


def test_every_newcomer_gets_its_floor_from_a_vm_that_would_take_everything() -> None:
    load = Load()
    load.start(GREEDY, HOST1, wanted=9999)
    load.seconds(60)
    assert load.size(GREEDY) == (BLOCKS - 1) * 64, "all but what is kept for VMs that start"
    assert load.start(NEWCOMERS[0], HOST2, wanted=9999) == ""
    for uuid in NEWCOMERS[1:]:
        load.start(uuid, HOST2, wanted=9999)
    # As long as connections take to end and ports to rest.
    load.seconds(60)
    assert all(load.size(uuid) >= 64 for uuid in NEWCOMERS)
    load.seconds(240)
    sizes = {uuid: load.size(uuid) for uuid in (GREEDY, *NEWCOMERS)}
    assert max(sizes.values()) - min(sizes.values()) <= 64, sizes
    assert sum(sizes.values()) >= (BLOCKS - 3) * 64, sizes


def test_a_light_vm_has_what_it_wants_although_a_greedy_one_has_nothing_left() -> None:
    load = Load()
    load.start(LIGHT, HOST2, wanted=20)
    load.start(GREEDY, HOST1, wanted=9999)
    load.seconds(60)
    load.wanted[LIGHT] = 150
    load.seconds(90)
    assert load.size(LIGHT) >= 192
    load.refused[LIGHT] = 0
    load.seconds(100)
    assert load.refused[LIGHT] == 0
    assert load.refused[GREEDY] > 0


def test_large_idle_ranges_give_back_and_busy_ones_keep_theirs() -> None:
    load = Load()
    load.start(GREEDY, HOST1, wanted=800)
    load.seconds(40)
    held = load.size(GREEDY)
    assert held >= 800
    load.start(LIGHT, HOST2, wanted=200)
    load.wanted[GREEDY] = 50
    load.seconds(20)
    load.wanted[LIGHT] = 400
    load.seconds(90)
    assert load.size(LIGHT) >= 400
    assert 64 <= load.size(GREEDY) < held


def test_weights_divide_what_is_above_the_floors() -> None:
    load = Load(blocks=18)
    manager = load.site.manager
    assert manager is not None
    load.start(GREEDY, HOST1, wanted=9999)
    load.start(LIGHT, HOST2, wanted=9999)
    load.site.ask(lambda manager: manager.set_wishes(LIGHT, Wishes(weight=300)))
    load.seconds(150)
    # Each within a block of its share, and a block of one is three of the other.
    assert load.size(LIGHT) == pytest.approx(64 + 3 * (load.size(GREEDY) - 64), abs=4 * 64)


def test_after_a_shortage_a_vm_grows_to_its_need() -> None:
    load = Load()
    load.start(GREEDY, HOST1, wanted=800)
    load.start(LIGHT, HOST2, wanted=800)
    load.seconds(150)
    assert load.size(GREEDY) < 800
    load.stop(LIGHT)
    load.seconds(120)
    assert load.size(GREEDY) >= 800
    assert load.site.manager is not None
    rows = load.site.manager.fleet.of(GREEDY)
    assert [row.state for row in rows] == [AllocationState.ACTIVE]
    assert rows[0].external == EXTERNAL
