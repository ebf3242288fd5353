"""Changes are committed before answers and messages are sent; what fails is refused alone, and the others go on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

import pytest

from cpm.core.changes import Change
from cpm.core.manager import Manager
from cpm.ledger import SqliteLedger
from cpm.protocol.errors import Conflict, NotFound, VirtPortsError
from cpm.protocol.ledger_errors import LedgerError
from cpm.protocol.messages import PROTOCOL, Hello, ManagerMessage
from cpm.protocol.model import ExternalAddress, NodeName, Role
from cpm.serving.decision_loop import DecisionLoop
from cpm.settings import Settings
from tests.fakes.approving import approve

EXTERNAL = ExternalAddress(IPv4Address("203.0.113.1"))
HOST1 = NodeName("host1")


class Outbox:
    """Keeps the messages sent, each with the number of commits before it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.sent: list[tuple[NodeName, ManagerMessage]] = []
        self.commits_before: list[int] = []
        self.dropped = 0
        self.resumed: list[Manager] = []
        self.failures: list[Exception] = []
        self.ending: list[NodeName] = []
        self.ended: list[NodeName] = []

    def send(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        for message in messages:
            self.sent.append(message)
            self.commits_before.append(self._ledger.commits)

    def hold(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        raise AssertionError("the ledger can be written")

    def release(self) -> None: ...

    def resume(self, manager: Manager, now: float) -> bool:
        self.resumed.append(manager)
        if self.failures:
            raise self.failures.pop()
        return not (self.ending and self.ending.pop())

    def drop(self, node: NodeName) -> None:
        self.ended.append(node)

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
    await site.loop.do(lambda manager, now: approve(manager, hello, now))
    await site.loop.do(lambda manager, now: manager.on_hello(hello, "0", now))
    assert {node for node, _ in site.outbox.sent} == {HOST1}
    assert set(site.outbox.commits_before) == {2}


async def test_a_session_ends_after_the_commit_of_what_ends_it(site: Site) -> None:
    await test_a_message_is_sent_after_the_commit_of_its_change(site)
    await site.loop.do(lambda manager, now: manager.membership.revoke(HOST1, now))
    assert site.outbox.ended == [HOST1]
    assert [node.approval for node in site.ledger.load().nodes] == [None]


async def test_a_refused_input_changes_nothing_and_does_not_affect_others(site: Site) -> None:
    refused, accepted = await asyncio.gather(
        site.loop.do(lambda manager, now: manager.pool.remove_addresses([EXTERNAL.address])),
        site.add(),
        return_exceptions=True,
    )
    assert isinstance(refused, NotFound)
    assert accepted is None
    assert site.ledger.commits == 1


async def test_a_failed_commit_leaves_the_state_before_its_inputs(site: Site) -> None:
    manager, epoch = site.loop.manager, site.loop.manager.epoch
    site.ledger.failure = LedgerError("disk full; make room")
    with pytest.raises(LedgerError, match="disk full"):
        await site.add()
    assert (site.addresses, site.outbox.dropped) == ([], 0)
    assert site.loop.manager is not manager
    assert site.outbox.resumed == [site.loop.manager]
    assert site.loop.manager.epoch == epoch
    await site.add()
    assert site.addresses == [EXTERNAL.address]


def _broken(manager: Manager, now: float) -> None:
    manager.pool.add_addresses([ExternalAddress(IPv4Address("203.0.113.9"))], now)
    raise ZeroDivisionError("a bug")


def _refused_halfway(manager: Manager, now: float) -> None:
    manager.pool.add_addresses([ExternalAddress(IPv4Address("203.0.113.9"))], now)
    raise Conflict("only a part is possible")


@pytest.mark.parametrize(
    ("act", "kind", "message"),
    [
        (_broken, VirtPortsError, "nothing was changed, because of ZeroDivisionError: a bug"),
        (_refused_halfway, Conflict, "only a part is possible"),
    ],
)
async def test_an_input_that_fails_is_refused_alone_and_nothing_of_it_is_done(
    site: Site, act: Callable[[Manager, float], None], kind: type[VirtPortsError], message: str
) -> None:
    others = [ExternalAddress(address) for address in IPv4Network("203.0.113.4/31")]
    first, failed, last = await asyncio.gather(
        site.add(others[0]), site.loop.do(act), site.add(others[1]), return_exceptions=True
    )
    assert (first, last) == (None, None)
    assert type(failed) is kind
    assert str(failed).startswith(message)
    assert site.addresses == [each.address for each in others]
    assert [each.address for each in site.ledger.load().addresses] == site.addresses
    assert site.outbox.dropped == 0


async def test_an_input_whose_commit_fails_is_refused_alone(site: Site) -> None:
    """An error that only the ledger finds cannot be attributed before the inputs are decided one by one."""
    ran: list[str] = []
    original = site.ledger.commit

    def commit(changes: Iterable[Change], now: float) -> None:
        if any("203.0.113.9" in str(change) for change in changes):
            raise Conflict("the ledger refused")
        original(changes, now)

    site.ledger.commit = commit  # type: ignore[method-assign]

    async def add(text: str) -> None:
        external = ExternalAddress(IPv4Address(text))
        await site.loop.do(lambda manager, now: manager.pool.add_addresses([external], now), lambda: ran.append(text))

    good, bad = await asyncio.gather(add("203.0.113.1"), add("203.0.113.9"), return_exceptions=True)
    assert good is None
    assert isinstance(bad, Conflict)
    assert ran == ["203.0.113.1"]
    assert site.addresses == [EXTERNAL.address]


async def test_a_session_that_cannot_go_on_ends_and_the_others_are_tried_again(site: Site) -> None:
    site.outbox.ending = [HOST1]
    with pytest.raises(VirtPortsError):
        await site.loop.do(_broken)
    assert len(site.outbox.resumed) == 2
    assert site.outbox.resumed[-1] is site.loop.manager
    assert site.outbox.dropped == 0


async def test_when_no_session_can_go_on_all_end(site: Site) -> None:
    site.outbox.failures = [KeyError("host1")]
    with pytest.raises(VirtPortsError):
        await site.loop.do(_broken)
    assert site.outbox.dropped == 1
    await site.add()
    assert site.addresses == [EXTERNAL.address]


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
