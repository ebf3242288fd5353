"""Changes are committed before answers and messages are sent; after a failed commit the loop starts over."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from cpm.core.changes import Change
from cpm.core.manager import Manager
from cpm.ledger import SqliteLedger
from cpm.protocol.errors import LedgerError, NotFound
from cpm.protocol.messages import PROTOCOL, Hello, ManagerMessage
from cpm.protocol.model import ExternalAddress, NodeName, Role
from cpm.serving.decision_loop import DecisionLoop
from cpm.settings import Settings

EXTERNAL = ExternalAddress(IPv4Address("203.0.113.1"))
HOST1 = NodeName("host1")


class Outbox:
    """Keeps the messages sent, each with the number of commits before it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.sent: list[tuple[NodeName, ManagerMessage]] = []
        self.commits_before: list[int] = []
        self.dropped = 0

    def send(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        for message in messages:
            self.sent.append(message)
            self.commits_before.append(self._ledger.commits)

    def drop_all(self) -> None:
        self.dropped += 1


class Ledger(SqliteLedger):
    """Counts commits; raises ``failure`` instead, once."""

    commits = 0
    failure: Exception | None = None

    def commit(self, changes: Iterable[Change], now: float) -> None:
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        super().commit(tuple(changes), now)
        self.commits += 1


class Site:
    def __init__(self, path: Path) -> None:
        self.ledger = Ledger(path)
        self.outbox = Outbox(self.ledger)
        self.loop = DecisionLoop(self.ledger, Settings().rules(), self.outbox)

    async def add(self, external: ExternalAddress = EXTERNAL) -> None:
        await self.loop.do(lambda manager, now: manager.pool.add_addresses([external], now))

    @property
    def addresses(self) -> list[IPv4Address]:
        return [each.address for each in self.loop.manager.fleet.space.addresses]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path / "ledger.db")
    running = asyncio.create_task(site.loop.run())
    yield site
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    site.ledger.close()


async def test_an_answer_is_sent_after_its_change_is_durable(site: Site, tmp_path: Path) -> None:
    await site.add()
    assert site.ledger.commits == 1
    assert [each.address for each in site.ledger.load().addresses] == [EXTERNAL.address]


async def test_inputs_that_arrive_together_are_one_commit(site: Site) -> None:
    others = [ExternalAddress(address) for address in IPv4Network("203.0.113.8/29")]
    await asyncio.gather(*(site.add(other) for other in others))
    assert (site.ledger.commits, len(site.addresses)) == (1, 8)


async def test_a_message_is_sent_after_the_commit_of_its_change(site: Site) -> None:
    hello = Hello(PROTOCOL, HOST1, frozenset(Role), IPv4Address("172.30.0.11"), "0", 0, ())
    await site.loop.do(lambda manager, now: manager.on_hello(hello, "0", now))
    assert {node for node, _ in site.outbox.sent} == {HOST1}
    assert set(site.outbox.commits_before) == {1}


async def test_a_refused_input_changes_nothing_and_does_not_affect_others(site: Site) -> None:
    refused, accepted = await asyncio.gather(
        site.loop.do(lambda manager, now: manager.pool.remove_addresses([EXTERNAL.address])),
        site.add(),
        return_exceptions=True,
    )
    assert isinstance(refused, NotFound)
    assert accepted is None
    assert site.ledger.commits == 1


@pytest.mark.parametrize(
    ("failure", "message"),
    [(LedgerError("disk full; make room"), "disk full"), (RuntimeError("a bug"), "the change was not made: a bug")],
)
async def test_a_failed_commit_leaves_the_state_before_its_inputs(site: Site, failure: Exception, message: str) -> None:
    manager, epoch = site.loop.manager, site.loop.manager.epoch
    site.ledger.failure = failure
    with pytest.raises(LedgerError, match=message):
        await site.add()
    assert (site.addresses, site.outbox.dropped) == ([], 1)
    assert site.loop.manager is not manager
    assert site.loop.manager.epoch == epoch
    await site.add()
    assert site.addresses == [EXTERNAL.address]


async def test_an_unexpected_error_while_deciding_starts_over_from_the_ledger(site: Site) -> None:
    def act(manager: Manager, now: float) -> None:
        manager.pool.add_addresses([EXTERNAL], now)
        raise ZeroDivisionError

    with pytest.raises(LedgerError, match="the change was not made"):
        await site.loop.do(act)
    assert site.addresses == []


async def test_a_waiter_misses_no_commit(site: Site) -> None:
    first = site.loop.next_commit
    await site.add()
    assert first.is_set()
    second = site.loop.next_commit
    assert not second.is_set()
    await site.loop.do(lambda manager, now: None)
    assert not second.is_set()  # nothing was committed
    await site.add(ExternalAddress(IPv4Address("203.0.113.2")))
    assert second.is_set()
