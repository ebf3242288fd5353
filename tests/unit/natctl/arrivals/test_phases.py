"""The phases of a VM's arrivals: the tables are complete, the document shows them, and the controller keeps to them."""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import Need
from cpm.protocol.model import DomainUUID, PortRange
from natctl.arrivals import budget, deferral, phases, refusal, requests
from natctl.arrivals.controller import Arrivals
from natctl.arrivals.phases import (
    BUDGET,
    CAP,
    COUNT,
    DEFERRAL,
    REQUEST,
    BudgetEvent,
    BudgetPhase,
    CapEvent,
    CapPhase,
    CountEvent,
    CountPhase,
    DeferralEvent,
    DeferralPhase,
    IllegalTransition,
    RequestEvent,
    RequestPhase,
    Table,
    transition,
)
from natctl.model.commands import ArrivalCommand, CountPorts, Release, Send
from natctl.model.entries import Destination
from natctl.model.port_use import Filling
from tests.fakes.intents import host_entry

DOCUMENT = Path(__file__).parents[4] / "docs" / "design" / "0003-arrivals.md"
TABLES: Mapping[str, tuple[Table[Any, Any], type[enum.StrEnum], type[enum.StrEnum]]] = {
    "budget": (BUDGET, BudgetPhase, BudgetEvent),
    "request": (REQUEST, RequestPhase, RequestEvent),
    "count": (COUNT, CountPhase, CountEvent),
    "deferral": (DEFERRAL, DeferralPhase, DeferralEvent),
    "cap": (CAP, CapPhase, CapEvent),
}
CELLS = [
    pytest.param(table, phase, event, id=f"{name}: {phase} + {event}")
    for name, (table, phases_, events) in TABLES.items()
    for phase in phases_
    for event in events
]


@pytest.mark.parametrize("name", TABLES)
def test_a_table_has_every_phase_and_in_each_every_event(name: str) -> None:
    table, phases_, events = TABLES[name]
    assert set(table) == set(phases_)
    assert all(set(row) == set(events) for row in table.values())


@pytest.mark.parametrize(("table", "phase", "event"), CELLS)
def test_a_transition_follows_the_table_or_is_an_error(table: Table[Any, Any], phase: Any, event: Any) -> None:
    after = table[phase][event]
    if after is not None:
        assert transition(table, phase, event) == after
        return
    with pytest.raises(IllegalTransition) as caught:
        transition(table, phase, event)
    assert (caught.value.phase, caught.value.event) == (phase, event)


def test_an_illegal_transition_names_table_phase_and_event() -> None:
    error = IllegalTransition(BudgetPhase.ARMED, CapEvent.FULL)
    assert str(error).startswith("BudgetPhase 'armed' has no event 'full'; ")


@pytest.mark.parametrize("name", TABLES)
def test_the_document_shows_the_table(name: str) -> None:
    table, phases_, events = TABLES[name]
    lines = iter(DOCUMENT.read_text().splitlines())
    header = next(line for line in lines if line.startswith(f"| *{name}*"))
    assert _cells(header)[1:] == [event.value for event in events]
    next(lines)
    shown = [_cells(next(lines)) for _ in phases_]
    assert shown == [
        [phase.value, *(after.value if (after := table[phase][event]) else "–" for event in events)]
        for phase in phases_
    ]
    assert not next(lines).startswith("|")


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


VMS = [DomainUUID(f"{number}1111111-1111-4111-8111-111111111111") for number in range(2)]
RANGES = [
    PortRange(20000, 20255),
    PortRange(20000, 20511),
    PortRange(20000, 22047),
    PortRange(20256, 20511),
    PortRange(30000, 30255),
    PortRange(40000, 40015),
]
THERE = Destination(6, IPv4Address("192.0.2.2"), 443)
EVENTS = ["used up", "deferred", "counted", "count failed", "programmed", "periodic", "turned down", "vm", "found"]
RARE = ["gone", "tick", "connected", "disconnected"]


class Drive:
    """
    Tells a controller what happens, in any order, and looks at the phases after each event.

    :param choose: Returns one of the things that it is given.
    """

    def __init__(self, choose: Any) -> None:
        self._choose = choose
        self._arrivals = Arrivals()
        self._counts: list[CountPorts] = []
        self._held: list[int] = []
        self._packets = 0
        self._now = 1000.0

    def step(self) -> None:
        """Let time pass, and one thing happen."""
        self._now += self._choose([0.0, 0.0001, 0.002, 0.02, 0.3, 0.8, 1.2, 7.0, 400.0, -0.5, -400.0])
        event = self._choose(EVENTS * 3 + RARE)
        self._carry_out(self._happen(event, self._choose(VMS)))
        for uuid in VMS:
            self._check(uuid)

    def _happen(self, event: str, uuid: DomainUUID) -> list[ArrivalCommand]:
        arrivals, now, choose = self._arrivals, self._now, self._choose
        ports = choose(RANGES)
        match event:
            case "used up":
                return arrivals.on_budget_used_up(uuid, now)
            case "deferred":
                count = choose([1, 2, 50, 3000])
                self._packets += count
                packets = range(self._packets - count, self._packets)
                self._held += packets
                return arrivals.on_deferred(uuid, packets, now)
            case "counted" if self._counts:
                work = self._counts.pop()
                full = frozenset({THERE}) if work.at_cap and choose([True, False]) else frozenset()
                return arrivals.on_counted(work, _filling(work.ports, choose([0, 0.3, 0.8, 1])), full, now)
            case "count failed" if self._counts:
                arrivals.on_count_failed(self._counts.pop(0))
            case "programmed":
                budget_ = choose([arrivals.budget(uuid)] * 5 + [1])
                entry = host_entry(uuid, "vm", 1, IPv4Address("100.64.0.1"), ports, budget=budget_)
                return arrivals.on_programmed(entry, now)
            case "periodic":
                filling = _filling(ports, choose([0, 0.3, 0.8, 1]))
                return arrivals.on_periodic_count(uuid, ports, filling, choose([None, 0, 50, 500, 5000]), now)
            case "turned down":
                return arrivals.on_turned_down(uuid, now, choose([None, ports]))
            case "vm":
                at_cap = choose([False, False, True])
                arrivals.on_vm(HostIntent(uuid, "vm", IPv4Address("100.64.0.1"), ports, at_cap=at_cap), now)
            case "found" if arrivals.budget(uuid) is None:
                arrivals.on_found(
                    host_entry(
                        uuid, "vm", 1, IPv4Address("100.64.0.1"), ports, budget=choose([None, 9]), at_cap=False,
                        defer_after=choose([None, 90]),
                    ),
                    now,
                )  # fmt: skip
            case "gone":
                arrivals.on_gone(uuid)
            case "tick":
                return arrivals.on_tick(now)
            case "connected":
                arrivals.on_connected()
            case "disconnected":
                return arrivals.on_disconnected(now)
        return []

    def _carry_out(self, commands: list[ArrivalCommand]) -> None:
        for command in commands:
            if isinstance(command, CountPorts):
                self._counts.append(command)
            elif isinstance(command, Release):
                for packet in command.packets:
                    self._held.remove(packet)
            elif isinstance(command, Send):
                assert isinstance(command.message, Need)
                found = self._arrivals.phases(command.message.domain)
                assert found is not None
                assert found.request is RequestPhase.ASKED
                assert found.cap is CapPhase.BELOW_CAP

    def _check(self, uuid: DomainUUID) -> None:
        found = self._arrivals.phases(uuid)
        if found is None:
            assert self._arrivals.budget(uuid) is None
            return
        is_on = found.deferral in (DeferralPhase.READY, DeferralPhase.DEFERRING)
        assert is_on == (self._arrivals.defer_after(uuid) is not None)
        assert not is_on or found.cap is CapPhase.BELOW_CAP
        assert (uuid in self._arrivals.refusals()) == (found.cap is CapPhase.REFUSING)

    def end(self) -> None:
        """Every deferred connection goes on, once, at the latest when its VM is gone."""
        for uuid in VMS:
            self._arrivals.on_gone(uuid)
        self._carry_out(self._arrivals.on_tick(self._now))
        assert not self._held
        assert self._arrivals.deadline is None


def _filling(ports: PortRange, share: float) -> Filling:
    return Filling(int(ports.size * share), share)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_order_of_events_leads_to_an_illegal_transition(data: st.DataObject) -> None:
    drive = Drive(lambda things: data.draw(st.sampled_from(things)))
    for _ in range(data.draw(st.integers(1, 40))):
        drive.step()
    drive.end()


def test_every_transition_of_the_tables_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def note(table: Table[Any, Any], phase: Any, event: Any) -> Any:
        seen.add((phase, event))
        return phases.transition(table, phase, event)

    for module in (budget, deferral, refusal, requests):
        monkeypatch.setattr(module, "transition", note)
    for seed in range(60):
        drive = Drive(random.Random(seed).choice)
        for _ in range(400):
            drive.step()
        drive.end()
    legal = {
        (phase, event)
        for table, _, _ in TABLES.values()
        for phase, row in table.items()
        for event, after in row.items()
        if after is not None
    }
    assert seen == legal
