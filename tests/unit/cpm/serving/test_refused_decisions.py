"""A bug in what decides: the second opinion refuses the decision, and everything else goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest

from cpm.api.server import NodeConnection
from cpm.core import lifecycle
from cpm.core.journal import JournalEvent
from cpm.core.lifecycle import AllocationEvent
from cpm.core.refusals import FIRST_S, LONGEST_S, Refusals
from cpm.core.rollout import desired_state
from cpm.core.rollout.steps import Rollout
from cpm.protocol.messages import Attach, Detach, ManagerMessage
from cpm.protocol.model import AllocationState, PortRange
from cpm.protocol.walltime import WallTime
from cpm.queries import metrics, status
from tests.unit.cpm.serving.sites import DB, HOST1, WEB, Site

_State = AllocationState


async def _goes_on(site: Site) -> None:
    """Assert that the VM is set aside, that this is told, and that others get and give ports."""
    fleet = site.loop.manager.fleet
    assert list(fleet.refusals.set_aside) == [WEB]
    events = [entry.event for entry in site.ledger.reader().history(WEB)]
    assert events.count(JournalEvent.VIOLATION) == 1
    about = status.About("0", WallTime.of(0.0), "ledger.db")
    assert "broke a rule" in status.status(site.loop.manager, about, site.loop.clock.now()).problems[-1]
    assert b"virt_ports_refused_decisions_total 1" in metrics.exposition(site.loop.manager, site.now).body
    assert not site.connection.is_closed
    await site.say(Attach(DB, "db"))
    assert site.states(DB) == {_State.ACTIVE}
    await site.say(Detach(DB, "shutdown"))
    for _ in range(3):
        await site.tick(100.0)
        await site.apply()
    assert site.states(DB) == set()
    assert site.states(WEB) == {_State.HELD}
    assert fleet.refusals.count == 1


async def test_a_hold_down_that_ends_too_early(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Rollout.hold_down_end
    broken: Callable[..., float] = lambda self, held: 0.0 if held.domain == WEB else honest(self, held)  # noqa: E731
    monkeypatch.setattr(Rollout, "hold_down_end", broken)
    await site.say(Detach(WEB, "shutdown"))
    await site.apply()
    assert site.states() == {_State.HELD}
    await _goes_on(site)


async def test_a_vm_is_tried_again_and_goes_on_when_the_cause_is_gone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Rollout.lacks
    broken: Callable[..., Any] = lambda self, leaving, now: (honest(self, leaving, now)[0], ())  # noqa: E731
    await site.say(Detach(WEB, "shutdown"))
    await site.apply()
    with monkeypatch.context() as patch:
        patch.setattr(Rollout, "hold_down_end", lambda self, held: 0.0)
        patch.setattr(Rollout, "lacks", broken)
        await site.tick(1.0)
        refusals = site.loop.manager.fleet.refusals
        assert list(refusals.set_aside) == [WEB]
        about = status.About("0", WallTime.of(0.0), "ledger.db")
        problems = status.status(site.loop.manager, about, site.loop.clock.now()).problems
        assert "stay as they are for 10 min" in problems[-1]
        await site.tick(FIRST_S + 1.0)
        assert refusals.set_aside == {}, "the hold-down has passed meanwhile"
    assert site.states() == set()
    assert refusals.count == 1


def test_a_vm_that_fails_again_is_set_aside_for_twice_as_long_up_to_a_day_and_forgiven_after_one() -> None:
    refusals, now, pauses = Refusals(), 0.0, []
    for _ in range(10):
        assert refusals.set_vm_aside(WEB, "why", now)
        assert not refusals.set_vm_aside(WEB, "why", now)
        pauses.append(refusals.retry_at(WEB) - now)
        now = refusals.retry_at(WEB)
        assert refusals.take_due(now - 0.5) == []
        assert refusals.take_due(now) == [WEB]
    assert pauses[:3] == [FIRST_S, 2 * FIRST_S, 4 * FIRST_S]
    assert pauses[-1] == LONGEST_S
    refusals.set_vm_aside(WEB, "why", now + LONGEST_S)
    assert refusals.retry_at(WEB) == now + LONGEST_S + FIRST_S


async def test_a_step_that_is_left_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(state: AllocationState | None, event: AllocationEvent) -> AllocationState | None:
        return _State.HELD if event is AllocationEvent.RELEASED else honest(state, event)

    honest = lifecycle.step
    with monkeypatch.context() as patch:
        patch.setattr("cpm.core.moves.step", broken)
        await site.say(Detach(WEB, "shutdown"))
    assert site.states() == {_State.ACTIVE}
    assert not site.connection.is_closed
    assert list(site.loop.manager.fleet.refusals.set_aside) == [WEB]
    await site.say(Attach(DB, "db"))
    assert site.states(DB) == {_State.ACTIVE}


async def test_an_edge_that_was_not_asked(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = Rollout.lacks
    broken: Callable[..., Any] = lambda self, leaving, now: (honest(self, leaving, now)[0], ())  # noqa: E731
    monkeypatch.setattr(Rollout, "lacks", broken)
    await site.say(Detach(WEB, "shutdown"))
    site.now += 300.0
    await site.sessions.on_disconnected(HOST1, cast("NodeConnection", site.connection))
    await site.tick()
    assert site.states() == {_State.HELD}
    assert list(site.loop.manager.fleet.refusals.set_aside) == [WEB]


async def test_ports_of_another_vm_in_a_message(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = desired_state.edge_vm

    def broken(fleet: Any, uuid: Any, node: Any) -> Any:
        vm = honest(fleet, uuid, node)
        [web] = fleet.of(WEB)
        if uuid != DB or vm is None:
            return vm
        wrong = tuple(type(each)(each.external, PortRange(web.ports.first, each.ports.last)) for each in vm.ranges)
        return type(vm)(vm.domain, vm.name, vm.internal, vm.via, wrong)

    monkeypatch.setattr(desired_state, "edge_vm", broken)
    site.connection.sent.clear()
    await site.sessions.on_message(HOST1, cast("NodeConnection", site.connection), Attach(DB, "db"))
    told: list[ManagerMessage] = site.connection.sent
    assert not [each for message in told for each in getattr(message, "edge", ()) if each.domain == DB and each.ranges]
    assert DB in site.loop.manager.fleet.refusals.set_aside
