"""A pool that is too small for what its VMs want: who gets what, second by second, and nothing is cut."""

from __future__ import annotations

import pytest

from cpm.protocol.model import AllocationState, DomainUUID, NodeName, PortRange, Wishes
from tests.fakes.fleet import EXTERNAL, Connection, Fleet

HOST1, HOST2 = NodeName("host1"), NodeName("host2")
GREEDY, LIGHT, *NEWCOMERS = (DomainUUID(f"00000000-0000-0000-0000-{number:012d}") for number in range(1, 7))
BLOCKS = 16
LIFETIME_S = 12.0


class Site:
    """Guests that keep as many connections open as they can get of those they want, each for a while."""

    def __init__(self, blocks: int = BLOCKS) -> None:
        self.fleet = Fleet(hold_down_s=20.0, ports=PortRange(1024, 1024 + blocks * 64 - 1))
        self.wanted: dict[DomainUUID, int] = {}
        self.refused: dict[DomainUUID, int] = {}
        self._ends: dict[Connection, float] = {}
        self._next = 0

    def start(self, uuid: DomainUUID, host: NodeName, wanted: int = 0) -> str | None:
        """Return what the hook was told: empty when the VM has its ports, a code when not."""
        request = self.fleet.start_vm(host, uuid)
        self.fleet.run()
        self.wanted[uuid], self.refused[uuid] = wanted, 0
        return self.fleet.machines[host].answers.get(request)

    def seconds(self, count: int) -> None:
        for _ in range(count):
            self._second()

    def _second(self) -> None:
        fleet = self.fleet
        for connection in [each for each, end in self._ends.items() if end <= fleet.now]:
            del self._ends[connection]
            fleet.connections.discard(connection)
        for uuid, wanted in self.wanted.items():
            self._open(uuid, wanted - sum(each.domain == uuid for each in self._ends))
        for host in (HOST1, HOST2):
            fleet.report(host, busy=True)
        fleet.run()
        fleet.pass_time(1.0)
        fleet.run()

    def _open(self, uuid: DomainUUID, count: int) -> None:
        active = self.active(uuid)
        if active is None:
            return
        used = {each.port for each in self._ends if each.domain == uuid}
        free = [port - active.first for port in active if port not in used]
        for offset in free[: max(0, count)]:
            # Of a few lifetimes, so that ranges empty port by port.
            connection = self.fleet.open(uuid, offset)
            assert connection is not None
            self._next += 1
            self._ends[connection] = self.fleet.now + LIFETIME_S + self._next % 7
        self.refused[uuid] += max(0, count - len(free))

    def active(self, uuid: DomainUUID) -> PortRange | None:
        for machine in self.fleet.hosts:
            if uuid in machine.kernel.host:
                return machine.kernel.host[uuid].ports
        return None

    def size(self, uuid: DomainUUID) -> int:
        active = self.active(uuid)
        return active.size if active is not None else 0


def test_every_newcomer_gets_its_floor_from_a_vm_that_would_take_everything() -> None:
    site = Site()
    site.start(GREEDY, HOST1, wanted=9999)
    site.seconds(60)
    assert site.size(GREEDY) == (BLOCKS - 1) * 64, "all but what is kept for VMs that start"
    assert site.start(NEWCOMERS[0], HOST2, wanted=9999) == ""
    for uuid in NEWCOMERS[1:]:
        site.start(uuid, HOST2, wanted=9999)
    # As long as connections take to end and ports to rest.
    site.seconds(60)
    assert all(site.size(uuid) >= 64 for uuid in NEWCOMERS)
    site.seconds(240)
    sizes = {uuid: site.size(uuid) for uuid in (GREEDY, *NEWCOMERS)}
    assert max(sizes.values()) - min(sizes.values()) <= 64, sizes
    assert sum(sizes.values()) >= (BLOCKS - 3) * 64, sizes


def test_a_light_vm_has_what_it_wants_although_a_greedy_one_has_nothing_left() -> None:
    site = Site()
    site.start(LIGHT, HOST2, wanted=20)
    site.start(GREEDY, HOST1, wanted=9999)
    site.seconds(60)
    site.wanted[LIGHT] = 150
    site.seconds(90)
    assert site.size(LIGHT) >= 192
    site.refused[LIGHT] = 0
    site.seconds(100)
    assert site.refused[LIGHT] == 0
    assert site.refused[GREEDY] > 0


def test_large_idle_ranges_give_back_and_busy_ones_keep_theirs() -> None:
    site = Site()
    site.start(GREEDY, HOST1, wanted=800)
    site.seconds(40)
    held = site.size(GREEDY)
    assert held >= 800
    site.start(LIGHT, HOST2, wanted=200)
    site.wanted[GREEDY] = 50
    site.seconds(20)
    site.wanted[LIGHT] = 400
    site.seconds(60)
    assert site.size(LIGHT) >= 400
    assert 64 <= site.size(GREEDY) < held


def test_weights_divide_what_is_above_the_floors() -> None:
    site = Site(blocks=18)
    manager = site.fleet.manager
    assert manager is not None
    site.start(GREEDY, HOST1, wanted=9999)
    site.start(LIGHT, HOST2, wanted=9999)
    site.fleet.ask(lambda manager: manager.set_wishes(LIGHT, Wishes(weight=300)))
    site.seconds(150)
    # Each within a block of its share, and a block of one is three of the other.
    assert site.size(LIGHT) == pytest.approx(64 + 3 * (site.size(GREEDY) - 64), abs=4 * 64)


def test_when_there_is_plenty_again_everybody_grows_as_it_likes() -> None:
    site = Site()
    site.start(GREEDY, HOST1, wanted=800)
    site.start(LIGHT, HOST2, wanted=800)
    site.seconds(150)
    assert site.size(GREEDY) < 800
    site.wanted[LIGHT] = 0
    site.fleet.stop_vm(LIGHT)
    del site.wanted[LIGHT]
    for connection in [each for each in site._ends if each.domain == LIGHT]:
        del site._ends[connection]
    site.seconds(120)
    assert site.size(GREEDY) >= 800
    assert site.fleet.manager is not None
    rows = site.fleet.manager.view.of(GREEDY)
    assert [row.state for row in rows] == [AllocationState.ACTIVE]
    assert rows[0].external == EXTERNAL
