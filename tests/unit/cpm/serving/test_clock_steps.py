"""Somebody sets the wall clock, or the machine boots again: no duration changes, and the journal stays answerable."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from cpm.core.manager import Manager
from cpm.core.timeline import Timeline
from cpm.ledger import SqliteLedger
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Attach,
    Delta,
    Detach,
    Draining,
    Hello,
    ManagerMessage,
    Measured,
    Report,
    Snapshot,
)
from cpm.protocol.model import AllocationState, DomainUUID, ExternalAddress, NodeName, PortRange, Role
from cpm.protocol.walltime import WallTime
from cpm.queries import journal as journal_queries
from cpm.serving import streams
from cpm.serving.decision_loop import DecisionLoop
from cpm.serving.journal_thread import JournalThread
from cpm.settings import PoolSettings, Settings
from tests.fakes.approving import say_hello

HOUR, DAY = 3600.0, 86400.0
HOST1 = NodeName("host1")
WEB, DB = (DomainUUID(f"00000000-0000-0000-0000-00000000000{n}") for n in "12")
EXTERNAL = IPv4Address("203.0.113.1")
_State = AllocationState


class Clocks:
    """The clocks of the machine that cpmd runs on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.since_boot_s, self.utc, self.boot = 5000.0, 1763879880.0, "first"
        monkeypatch.setattr(time, "time", lambda: self.utc)
        monkeypatch.setattr(time, "clock_gettime", lambda _: self.since_boot_s)
        monkeypatch.setattr("cpm.service.clock.boot", lambda: self.boot, raising=False)

    def advance(self, seconds: float) -> None:
        self.since_boot_s += seconds
        self.utc += seconds

    def restart_machine(self, *, off_s: float) -> None:
        self.boot, self.since_boot_s = f"after {self.boot}", 20.0
        self.utc += off_s


class Site:
    """cpmd's decision loop, and a machine that is host and edge and applies all that it is told."""

    def __init__(self, directory: Path, clocks: Clocks, pool: PoolSettings) -> None:
        self.clocks = clocks
        self._path = directory / "ledger.db"
        self._rules = Settings(pool=pool).rules()
        self._told: list[ManagerMessage] = []
        self.ledger: SqliteLedger
        self.loop: DecisionLoop
        self._running: asyncio.Task[None]

    def send(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        self._told += [message for _, message in messages]

    def hold(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        raise AssertionError("the ledger can be written")

    def release(self) -> None: ...

    def resume(self, manager: Manager, now: float) -> bool:
        raise AssertionError("the manager starts over")

    def drop(self, node: NodeName) -> None:
        raise AssertionError("no node is revoked")

    def drop_all(self) -> None:
        raise AssertionError("the manager starts over")

    async def start(self) -> None:
        self.ledger = SqliteLedger(self._path)
        self.loop = DecisionLoop(self.ledger, self._rules, self)
        self._running = asyncio.create_task(self.loop.run())

    async def stop(self) -> None:
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        self.ledger.close()

    async def connect(self, *domains: Attach) -> None:
        hello = Hello(PROTOCOL, HOST1, frozenset(Role), IPv4Address("172.30.0.11"), "0", 0, ())
        await self.loop.do(lambda manager, now: say_hello(manager, hello, now))
        await self.say(*domains)

    async def say(self, *messages: Attach | Detach | Report) -> None:
        for message in messages:
            await self.loop.do(lambda manager, now, message=message: manager.on_message(HOST1, message, now))  # type: ignore[misc]
        await self._apply()

    async def _apply(self) -> None:
        while self._told:
            message = self._told.pop(0)
            if isinstance(message, (Snapshot, Delta)):
                applied = Applied(message.epoch, message.generation)
                await self.loop.do(lambda manager, now, applied=applied: manager.on_message(HOST1, applied, now))  # type: ignore[misc]

    async def tick(self, seconds: float = 0.0) -> None:
        self.clocks.advance(seconds)
        await self.loop.do(Manager.tick)
        await self._apply()

    def states(self, uuid: DomainUUID = WEB) -> set[AllocationState]:
        return {allocation.state for allocation in self.loop.manager.fleet.of(uuid)}


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


@contextlib.asynccontextmanager
async def _site(directory: Path, clocks: Clocks, pool: PoolSettings) -> AsyncIterator[Site]:
    site = Site(directory, clocks, pool)
    await site.start()
    try:
        addresses = [ExternalAddress(EXTERNAL)]
        await site.loop.do(lambda manager, now: manager.pool.add_addresses(addresses, now))
        await site.connect(Attach(WEB, "web"))
        yield site
    finally:
        await site.stop()


@pytest.fixture
async def site(tmp_path: Path, clocks: Clocks) -> AsyncIterator[Site]:
    """A site with a VM."""
    async with _site(tmp_path, clocks, PoolSettings(hold_down_s=120.0)) as site:
        assert site.states() == {_State.ACTIVE}
        yield site


@pytest.mark.parametrize("step", [HOUR, -HOUR])
async def test_a_step_neither_ends_a_hold_down_nor_prolongs_it(site: Site, clocks: Clocks, step: float) -> None:
    await site.say(Detach(WEB, "shutdown"))
    assert site.states() == {_State.HELD}
    clocks.utc += step
    await site.tick(119.0)
    assert site.states() == {_State.HELD}
    await site.tick(1.0)
    assert site.states() == set()


async def test_events_say_between_which_entries_the_clock_was_set(site: Site, clocks: Clocks) -> None:
    last = site.ledger.reader().latest_seq()
    clocks.utc += HOUR
    await site.say(Detach(WEB, "shutdown"))
    clocks.utc -= 2 * HOUR
    await site.tick(1.0)
    thread = JournalThread(site.ledger.reader())
    feeds = streams.Feeds(thread, site.loop, streams.ReportFollowers())

    async def told(after: int | None, limit: int = 100) -> list[tuple[int, str, float | None]]:
        found = streams.events(feeds, after, limit, follow=False)
        return [(each.seq, each.event, each.clock_set_by_s) async for each in found]

    whole, forward, back = await told(None), (last, "clock-set", HOUR), (last + 2, "clock-set", -2 * HOUR)
    assert [each for each in whole if each[2] is not None] == [forward, back]
    assert whole[-4:] == [forward, (last + 1, "draining", None), (last + 2, "held", None), back]
    assert await told(last + 1) == [(last + 2, "held", None), back]
    assert await told(last, limit=1) == [forward, (last + 1, "draining", None)], "the next reading has the other one"

    async with contextlib.aclosing(streams.events(feeds, last + 2, 100, follow=True)) as following:  # type: ignore[type-var]
        assert (await anext(following)).clock_set_by_s == -2 * HOUR
        following_one = asyncio.ensure_future(anext(following))
        clocks.utc += 60.0
        await site.tick(1.0)
        assert (await following_one).clock_set_by_s == 60.0
    thread.stop()


@pytest.mark.parametrize("step", [DAY, -DAY])
async def test_a_step_cuts_no_connection(tmp_path: Path, clocks: Clocks, step: float) -> None:
    pool = PoolSettings(initial=256, cap=512, drain_limit_s=7200.0)
    async with _site(tmp_path, clocks, pool) as site:
        [whole] = site.loop.manager.fleet.of(WEB)
        await site.loop.do(lambda manager, now: manager.sizer.resize_to(WEB, 64, now))
        await site._apply()
        # Another VM lacks ports.
        await site.loop.do(lambda manager, now: manager.pool.add_addresses([_full_but(EXTERNAL, whole.ports)], now))
        await site.say(Attach(DB, "db"))
        [left] = [each for each in site.loop.manager.fleet.of(WEB) if each.state is _State.DRAINING]
        used = Measured(WEB, 1.0, 1.0, ports_in_use=1, draining=(Draining(left.ports, 5),))
        clocks.utc += step
        for _ in range(3):
            await site.tick(1.0)
            await site.say(Report(site.loop.manager.sessions[HOST1].generation, 1.0, (used,)))
        assert _State.DRAINING in site.states()
        assert set(site.loop.manager.waiting) == {DB}


def _full_but(external: IPv4Address, ports: PortRange) -> ExternalAddress:
    return ExternalAddress(external, PortRange(1024, 65535).minus(ports))


async def test_a_step_back_lets_nobody_wait(tmp_path: Path, clocks: Clocks) -> None:
    async with _site(tmp_path, clocks, PoolSettings(hold_down_s=1.0)) as site:
        [whole] = site.loop.manager.fleet.of(WEB)
        await site.loop.do(lambda manager, now: manager.pool.add_addresses([_full_but(EXTERNAL, whole.ports)], now))
        await site.say(Attach(DB, "db"))
        assert set(site.loop.manager.waiting) == {DB}
        clocks.utc -= HOUR
        await site.say(Detach(WEB, "shutdown"))
        for _ in range(4):
            await site.tick(3.0)
        assert (site.states(DB), set(site.loop.manager.waiting)) == ({_State.ACTIVE}, set())


async def test_what_passes_while_cpmd_is_away_counts_if_the_machine_stays_up(site: Site, clocks: Clocks) -> None:
    await site.say(Detach(WEB, "shutdown"))
    await site.tick(50.0)
    await site.stop()
    clocks.advance(60.0)
    clocks.utc += HOUR
    await site.start()
    await site.connect()
    await site.tick(9.0)
    assert site.states() == {_State.HELD}
    await site.tick(1.0)
    assert site.states() == set()


async def test_what_passes_while_the_machine_is_off_does_not_count(site: Site, clocks: Clocks) -> None:
    await site.say(Detach(WEB, "shutdown"))
    await site.tick(50.0)
    await site.tick(5.0)  # after the last checkpoint: lost
    await site.stop()
    clocks.restart_machine(off_s=600.0)
    await site.start()
    await site.connect()
    await site.tick(69.0)
    assert site.states() == {_State.HELD}
    await site.tick(1.0)
    assert site.states() == set()


async def test_a_step_is_shown_and_kept(site: Site, clocks: Clocks, caplog: pytest.LogCaptureFixture) -> None:
    before = clocks.utc
    clocks.utc -= HOUR
    await site.tick(0.0)
    await site.tick(1.0)
    timelines: list[Timeline] = [site.loop.manager.fleet.timeline, site.ledger.load().timeline]
    for timeline in timelines:
        [step] = timeline.steps
        assert (step.before.seconds, step.by_s, step.is_set) == (before, -HOUR, True)
    assert [record.message for record in caplog.records if "the wall clock was set back by 3600.0 s" in record.message]


async def _whois(site: Site, at: float) -> list[str | None]:
    reader = site.ledger.reader()
    now, wall = site.loop.clock.now(), WallTime.of(site.clocks.utc)
    port = next(iter(site.loop.manager.fleet.of(WEB) or site.loop.manager.fleet.of(DB))).ports.first
    view = journal_queries.whois(reader, now, wall, EXTERNAL, port, WallTime.of(at), None)
    assert bool(view.doubt) == bool(view.candidates) == (view.name is None)
    return [each.name for each in view.candidates] if view.doubt else [view.name]


async def _hand_over(site: Site) -> None:
    """Have the port go from one VM to the other."""
    await site.say(Detach(WEB, "shutdown"))
    await site.tick(120.0)
    await site.say(Attach(DB, "db"))
    assert site.states(DB) == {_State.ACTIVE}


async def test_a_time_that_came_twice_has_all_its_owners(tmp_path: Path, clocks: Clocks) -> None:
    async with _site(tmp_path, clocks, PoolSettings(hold_down_s=120.0)) as site:
        clocks.advance(HOUR)
        twice = clocks.utc - 1800.0
        clocks.utc -= HOUR
        await _hand_over(site)
        await site.tick(HOUR)
        assert await _whois(site, twice) == ["web", "db"]
        assert await _whois(site, twice + HOUR) == ["db"]


async def test_a_time_that_never_came_has_all_its_owners(tmp_path: Path, clocks: Clocks) -> None:
    async with _site(tmp_path, clocks, PoolSettings(hold_down_s=120.0)) as site:
        clocks.advance(HOUR)
        never = clocks.utc + 1800.0
        clocks.utc += HOUR
        await _hand_over(site)
        await site.tick(HOUR)
        assert await _whois(site, never) == ["web", "db"]
        assert await _whois(site, never - HOUR) == ["web"]
        assert await _whois(site, never + HOUR) == ["db"]


async def test_a_time_at_which_the_machine_was_off_has_the_owner_of_before(site: Site, clocks: Clocks) -> None:
    await site.tick(1.0)
    await site.stop()
    clocks.restart_machine(off_s=600.0)
    await site.start()
    off = clocks.utc - 300.0
    await site.connect(Attach(WEB, "web"))
    assert await _whois(site, off) == ["web"]
