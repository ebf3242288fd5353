"""A turn of the decision loop is bounded, single inputs go first, and none is put off for ever."""

from __future__ import annotations

import asyncio
from ipaddress import IPv4Address
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from cpm.ledger import SqliteLedger
from cpm.protocol.messages import PROTOCOL, Attach, Hello, Presence, Present, Report
from cpm.protocol.model import DomainUUID, NodeName, Role
from cpm.serving.decision_loop import DecisionLoop
from cpm.serving.node_sessions import NodeConnections, NodeSessions
from cpm.serving.streams import ReportFollowers
from cpm.serving.turns import TURN_SINGLE, TURN_VMS, Turns
from cpm.settings import Settings

INPUTS = st.lists(st.integers(0, 2 * TURN_VMS), max_size=50)


@given(INPUTS)
def test_every_input_has_its_turn_and_no_turn_is_longer_than_its_bounds(inputs: list[int]) -> None:
    turns: Turns[tuple[int, int]] = Turns()
    for number, vms in enumerate(inputs):
        turns.put((number, vms), vms)
    seen = []
    while turns:
        turn = turns.take()
        lists = [vms for _, vms in turn if vms]
        assert turn
        assert len(turn) - len(lists) <= TURN_SINGLE
        assert sum(lists) <= TURN_VMS or len(lists) == 1
        seen += turn
    assert turns.take() == []
    assert sorted(seen) == sorted((number, vms) for number, vms in enumerate(inputs))
    for is_list in (True, False):
        numbers = [number for number, vms in seen if bool(vms) is is_list]
        assert numbers == sorted(numbers)


def test_lists_go_on_while_single_inputs_keep_coming() -> None:
    turns: Turns[str] = Turns()
    for number in range(5):
        turns.put(f"list {number}", TURN_VMS)
    for number in range(5):
        turns.put("single")
        assert turns.take() == ["single", f"list {number}"]


async def test_a_request_that_comes_during_hundreds_of_hellos_is_decided_in_the_next_turn() -> None:
    with SqliteLedger(":memory:") as ledger:
        loop = DecisionLoop(ledger, Settings().rules(), NodeConnections())
        decided: list[str] = []
        hellos = [asyncio.ensure_future(_decide(loop, decided, "hello", vms=100)) for _ in range(500)]
        request = asyncio.get_running_loop().create_future()
        request.add_done_callback(lambda _: hellos.append(asyncio.ensure_future(_decide(loop, decided, "request"))))
        asyncio.get_running_loop().call_soon(lambda: asyncio.get_running_loop().call_soon(request.set_result, None))
        running = asyncio.ensure_future(loop.run())
        while len(decided) < 501:
            await asyncio.sleep(0)
        running.cancel()
        await asyncio.gather(*hellos, running, return_exceptions=True)
    assert decided.index("request") <= 3 * TURN_VMS // 100


async def _decide(loop: DecisionLoop, decided: list[str], what: str, vms: int = 0) -> None:
    await loop.do(lambda manager, now: decided.append(what), vms=vms)


class _Weights(DecisionLoop):
    """Records what it is told of each input, and decides nothing."""

    def __init__(self) -> None:
        self.vms: list[int] = []

    async def do(self, act: Any, then: Any = None, vms: int = 0, *, is_change: bool = False) -> Any:
        self.vms.append(vms)


async def test_what_lists_vms_or_asks_for_all_of_them_is_no_single_input() -> None:
    weights = _Weights()
    sessions = NodeSessions(weights, NodeConnections(), "test", ReportFollowers())
    domains = tuple(Presence(DomainUUID(str(number)), "web") for number in range(20))
    connection = cast("Any", None)
    hello = Hello(PROTOCOL, NodeName("host1"), frozenset({Role.HOST}), IPv4Address("172.30.0.11"), "0", 0, domains)
    edge = Hello(PROTOCOL, NodeName("edge1"), frozenset({Role.EDGE}), IPv4Address("172.30.0.21"), "0", 0, ())
    await sessions.on_connected(hello, connection)
    await sessions.on_connected(edge, connection)
    for message in (Present(domains), Present(()), Report(1, 1.0, ()), Attach(DomainUUID("1"), "web")):
        await sessions.on_message(NodeName("host1"), connection, message)
    assert weights.vms == [21, TURN_VMS, 21, 1, 1, 0]
