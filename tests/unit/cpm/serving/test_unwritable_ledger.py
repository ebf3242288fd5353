"""The ledger cannot be written: what is there goes on, nothing new is given, and it ends by itself."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address
from pathlib import Path
from typing import cast

import pytest

from cpm.api.server import NodeConnection
from cpm.core.membership import ApprovalRequest
from cpm.protocol.ledger_errors import LedgerError, LedgerFull, LedgerUnwritable
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Attach,
    Declined,
    Delta,
    Detach,
    Hello,
    Need,
    Refused,
    Snapshot,
    Welcome,
)
from cpm.protocol.model import AllocationState, NodeName, Role
from cpm.protocol.walltime import WallTime
from cpm.queries import explain_facts, metrics, status
from cpm.serving.node_sessions import MOST_HELD, NodeConnections
from tests.unit.cpm.serving.sites import DB, EXTERNAL, HOST1, OTHER, WEB, Connection, Site

_State = AllocationState


@pytest.mark.parametrize(
    ("statement", "name", "code"),
    [
        ("COMMIT", "SQLITE_FULL", "ledger-full"),
        ("COMMIT", "SQLITE_READONLY", "ledger-unwritable"),
        ("COMMIT", "SQLITE_IOERR_FSYNC", "ledger-unwritable"),
        ("BEGIN IMMEDIATE", "SQLITE_BUSY", "ledger-unwritable"),
    ],
)
async def test_a_start_is_refused_at_once_and_the_session_goes_on(
    site: Site, statement: str, name: str, code: str
) -> None:
    before = site.ledger.load()
    site.fill(statement, name)
    await site.sessions.on_message(HOST1, cast("NodeConnection", site.connection), Attach(DB, "db"))
    [refused] = [message for message in await site.apply() if isinstance(message, Refused)]
    assert (refused.domain, refused.code) == (DB, code)
    assert "ledger.db" in refused.message
    assert not site.connection.is_closed
    assert (site.states(), site.states(DB)) == ({_State.ACTIVE}, set())
    assert site.ledger.load() == before


async def test_it_is_over_by_itself(site: Site) -> None:
    site.fill()
    await site.say(Attach(DB, "db"))
    for _ in range(5):
        await site.tick()
    assert site.states(DB) == set()
    site.make_room()
    for _ in range(10):
        await site.tick()
        await site.apply()
    assert site.states(DB) == {_State.ACTIVE}
    assert {allocation.domain for allocation in site.ledger.load().allocations} == {WEB, DB}
    await site.add(OTHER)


async def test_explain_says_that_a_vm_waits_for_the_ledger_and_not_for_ports(site: Site) -> None:
    site.fill()
    await site.say(Attach(DB, "db"))
    lines = explain_facts.explanation(site.loop.manager, DB, site.now).lines
    assert any(line.startswith("No VM gets new ports at present: ledger ") for line in lines)
    assert not any("Ports are short" in line for line in lines)


async def test_operators_changes_are_refused_and_nothing_of_them_stays(site: Site) -> None:
    site.fill()
    for _ in range(2):  # the one that finds out, and a later one
        with pytest.raises(LedgerFull, match="free space on the filesystem of"):
            await site.add(OTHER)
        assert [each.address for each in site.loop.manager.fleet.space.addresses] == [EXTERNAL.address]
    site.make_room()
    await site.tick()
    assert site.loop.manager.fleet.unwritable is None
    assert [each.address for each in site.ledger.load().addresses] == [EXTERNAL.address]
    await site.add(OTHER)


async def test_what_arrives_with_a_refused_change_is_followed(site: Site) -> None:
    site.fill()
    answers = await asyncio.gather(
        site.add(OTHER),
        site.sessions.on_message(HOST1, cast("NodeConnection", site.connection), Detach(WEB, "shutdown")),
        return_exceptions=True,
    )
    assert isinstance(answers[0], LedgerFull)
    assert answers[1] is None
    assert site.states() <= {_State.DRAINING, _State.HELD}
    assert [each.address for each in site.loop.manager.fleet.space.addresses] == [EXTERNAL.address]


async def test_what_is_given_back_meanwhile_is_kept_and_given_to_nobody(site: Site) -> None:
    [web] = site.loop.manager.fleet.of(WEB)
    site.fill()
    # The manager finds out, starts over and sends a snapshot of what is there already.
    await site.say(Detach(WEB, "shutdown"))
    await site.apply()
    assert [allocation.state for allocation in site.ledger.load().allocations] == [_State.ACTIVE]
    for _ in range(300):
        await site.tick()
        assert not [message for message in await site.apply() if isinstance(message, Delta)]
    await site.say(Attach(DB, "db"))
    assert site.states(DB) == set()
    assert [allocation.state for allocation in site.ledger.load().allocations] == [_State.ACTIVE]
    site.make_room()
    await site.tick()
    told = await site.apply()
    assert [message for message in told if isinstance(message, Delta)]
    assert web.id in {each.id for each in site.ledger.load().allocations}
    # Its hold-down passes now: the node has confirmed only now that nothing uses it.
    for _ in range(119):
        await site.tick()
        await site.apply()
    assert _State.HELD in site.states()
    for _ in range(10):
        await site.tick()
        await site.apply()
    assert site.states() == set()


async def test_growth_is_declined(site: Site) -> None:
    [web] = site.loop.manager.fleet.of(WEB)
    site.fill()
    await site.say(Attach(DB, "db"))
    need = Need(WEB, web.ports, web.ports.size - 1, 500.0)
    await site.sessions.on_message(HOST1, cast("NodeConnection", site.connection), need)
    assert [message for message in await site.apply() if isinstance(message, Declined)] == [
        Declined(site.loop.manager.epoch, WEB, web.ports)
    ]


async def test_a_node_that_connects_meanwhile_is_told_when_it_is_over(site: Site) -> None:
    site.fill()
    await site.say(Detach(WEB, "shutdown"))
    former = site.connection
    await site.connect(WEB)
    assert former.is_closed
    assert not site.connection.sent
    site.make_room()
    await site.tick()
    assert [type(message) for message in await site.apply()][:2] == [Welcome, Snapshot]
    assert not former.sent
    for _ in range(10):
        await site.tick()
        await site.apply()
    # It said that the VM runs.
    assert _State.ACTIVE in site.states()


async def test_a_node_that_connects_meanwhile_is_welcomed_also_by_a_manager_that_had_to_start_over(site: Site) -> None:
    site.fill()
    await site.say(Detach(WEB, "shutdown"))
    await site.connect(WEB)
    manager = site.loop.manager
    site.fill(name="SQLITE_CORRUPT")
    with pytest.raises(LedgerError, match="damaged"):
        await site.tick()
    assert site.loop.manager is not manager
    assert not site.connection.sent
    site.make_room()
    await site.tick()
    assert [type(message) for message in await site.apply()][:2] == [Welcome, Snapshot]
    await site.tick()
    assert not [message for message in await site.apply() if isinstance(message, Welcome)]


async def test_a_cpmd_that_dies_meanwhile_has_done_nothing(site: Site, tmp_path: Path) -> None:
    before = site.ledger.load()
    site.fill()
    await site.say(Detach(WEB, "shutdown"))
    await site.say(Attach(DB, "db"))
    assert site.ledger.load() == before


async def test_it_is_shown(site: Site, caplog: pytest.LogCaptureFixture) -> None:
    about = status.About("0", WallTime.of(0.0), "ledger.db")
    assert status.status(site.loop.manager, about, site.loop.clock.now()).ledger_problem == ""
    site.fill()
    await site.say(Attach(DB, "db"))
    assert "free space" in status.status(site.loop.manager, about, site.loop.clock.now()).ledger_problem
    assert b"virt_ports_ledger_writable 0" in metrics.exposition(site.loop.manager, site.loop.clock.now()).body
    assert len([record for record in caplog.records if "no VM gets new ports" in record.message]) == 1
    site.make_room()
    await site.tick()
    assert b"virt_ports_ledger_writable 1" in metrics.exposition(site.loop.manager, site.loop.clock.now()).body
    assert [record for record in caplog.records if "can be written again" in record.message]


async def test_a_ledger_that_is_damaged_is_no_matter_of_waiting(site: Site) -> None:
    site.fill(name="SQLITE_CORRUPT")
    with pytest.raises(LedgerError, match="damaged") as refused:
        await site.add(OTHER)
    assert not isinstance(refused.value, LedgerUnwritable)


def test_of_too_many_messages_the_oldest_are_dropped() -> None:
    connections, connection = NodeConnections(), Connection()
    connections.begin(HOST1, cast("NodeConnection", connection))
    for generation in range(MOST_HELD + 10):
        connections.hold([(HOST1, Delta(1, generation))])
    connections.release()
    generations = [message.generation for message in connection.sent if isinstance(message, Delta)]
    assert generations == list(range(10, MOST_HELD + 10))


def test_a_welcome_is_not_among_the_messages_that_are_dropped() -> None:
    connections, connection = NodeConnections(), Connection()
    connections.begin(HOST1, cast("NodeConnection", connection))
    connections.hold([(HOST1, Welcome(PROTOCOL, 1, "0"))])
    connections.hold([(HOST1, Delta(1, generation)) for generation in range(MOST_HELD + 10)])
    connections.release()
    assert isinstance(connection.sent[0], Welcome)
    assert len(connection.sent) == 1 + MOST_HELD


async def test_no_edge_leaves_service_because_nothing_could_be_sent_to_it(site: Site) -> None:
    edge2 = NodeName("edge2")
    approval = ApprovalRequest(roles=frozenset({Role.EDGE}), underlay=IPv4Address("172.30.0.22"))
    await site.loop.do(lambda manager, now: manager.membership.approve(edge2, approval, now))
    second = Connection()
    hello = Hello(PROTOCOL, edge2, frozenset({Role.EDGE}), IPv4Address("172.30.0.22"), "0", 0, ())
    await site.sessions.on_connected(hello, cast("NodeConnection", second))

    async def apply_second() -> None:
        while second.sent:
            message = second.sent.pop(0)
            if isinstance(message, (Snapshot, Delta)):
                applied = Applied(message.epoch, message.generation)
                await site.sessions.on_message(edge2, cast("NodeConnection", second), applied)

    def in_service() -> list[bool]:
        return [node.in_service for node in site.loop.manager.fleet.edges.values()]

    for _ in range(3):
        await apply_second()
        await site.apply()
    assert in_service() == [True, True]
    site.fill()
    await site.say(Detach(WEB, "shutdown"))
    await apply_second()
    await site.apply()
    # One of both has confirmed everything, and could do the work of the other.
    for _ in range(120):
        await site.tick()
    site.make_room()
    await site.tick()
    await site.tick()
    assert in_service() == [True, True]
    await apply_second()
    await site.apply()
    assert in_service() == [True, True]
