from __future__ import annotations

import heapq
import random
from ipaddress import IPv4Address

import pytest

from cpm.protocol.messages import GuestState
from cpm.protocol.model import DomainUUID, PortRange
from cpm.protocol.walltime import WallTime
from qga_agent.announcement import Announcement
from qga_agent.guest_agent import AgentAbsent, AgentSilent, GuestFigures, InvalidReply
from qga_agent.samples import InterfaceCounters
from qga_agent.visit_schedule import FIRST_VISIT_S, MAX_PAUSE_S, RECHECK_S, Visit, VisitResult, VisitSchedule
from tests.fakes.guest import UUID

PERIOD_S = 10.0
FIGURES = GuestFigures({"eth0": InterfaceCounters(1, 2, 3, 4), "eth1": InterfaceCounters(1, 2, 3, 4)}, 12, 9)
SMALL = Announcement(IPv4Address("203.0.113.1"), PortRange(20000, 20255))
LARGE = Announcement(IPv4Address("203.0.113.1"), PortRange(20000, 20511))


def numbered(number: int) -> DomainUUID:
    return DomainUUID(f"11111111-1111-1111-1111-{number:012}")


def visit(schedule: VisitSchedule, outcome: VisitResult, now: float) -> Visit:
    (begun,) = schedule.start_due(now)
    schedule.on_result(begun.domain, outcome, now)
    schedule.on_visit_ended(begun.domain, now)
    return begun


@pytest.fixture
def schedule() -> VisitSchedule:
    schedule = VisitSchedule(PERIOD_S)
    assert schedule.on_vms({UUID: SMALL}, 0.0)
    return schedule


def answered(tried: Announcement | None = None, *refusals: str) -> VisitResult:
    return VisitResult(FIGURES, tried, refusals)


def test_a_guest_is_visited_soon_after_its_start_and_then_each_period(schedule: VisitSchedule) -> None:
    assert schedule.views(WallTime.of) == {}
    assert schedule.seconds_to_next(0.0) == FIRST_VISIT_S
    assert schedule.start_due(0.0) == []
    assert visit(schedule, answered(SMALL), FIRST_VISIT_S) == Visit(UUID, SMALL)
    assert schedule.seconds_to_next(FIRST_VISIT_S) == PERIOD_S
    assert visit(schedule, answered(), FIRST_VISIT_S + PERIOD_S) == Visit(UUID, None), "it has it"
    view = schedule.views(WallTime.of)[UUID]
    assert (view.state, view.since, view.why) == (GuestState.ANSWERING, FIRST_VISIT_S, "")
    assert (view.connections, view.established, view.interfaces, view.rx_bytes, view.tx_bytes) == (12, 9, 2, 4, 8)
    assert (view.external, view.ports) == (SMALL.external, SMALL.ports)


def test_a_resize_is_announced_at_once(schedule: VisitSchedule) -> None:
    visit(schedule, answered(SMALL), 1.0)
    assert schedule.on_vms({UUID: LARGE}, 2.0)
    assert visit(schedule, answered(LARGE), 2.0) == Visit(UUID, LARGE)
    assert not schedule.on_vms({UUID: LARGE}, 2.5), "nothing new"
    assert schedule.views(WallTime.of)[UUID].ports == LARGE.ports


def test_a_resize_during_a_visit_is_announced_by_the_next_at_once(schedule: VisitSchedule) -> None:
    assert schedule.start_due(1.0) == [Visit(UUID, SMALL)]
    schedule.on_vms({UUID: LARGE}, 1.1)
    assert schedule.start_due(1.1) == [], "one visit to a guest at a time"
    schedule.on_result(UUID, answered(SMALL), 1.2)
    schedule.on_visit_ended(UUID, 1.2)
    assert schedule.start_due(1.2) == [Visit(UUID, LARGE)]


def test_an_announcement_is_checked_again_after_a_while(schedule: VisitSchedule) -> None:
    visit(schedule, answered(SMALL), 1.0)
    assert visit(schedule, answered(), 1.0 + RECHECK_S - 1).announcement is None
    assert visit(schedule, answered(SMALL), 1.0 + RECHECK_S + PERIOD_S).announcement == SMALL


def test_what_a_guest_refused_is_shown_and_not_repeated_at_every_visit(schedule: VisitSchedule) -> None:
    visit(schedule, answered(SMALL, "Invalid argument"), 1.0)
    assert visit(schedule, answered(), 11.0).announcement is None
    view = schedule.views(WallTime.of)[UUID]
    assert (view.state, view.why, view.ports) == (GuestState.ANSWERING, "Invalid argument", None)


def test_a_guest_whose_agent_reconnects_gets_the_announcement_again(schedule: VisitSchedule) -> None:
    visit(schedule, answered(SMALL), 1.0)
    schedule.on_agent_disconnected(UUID, 2.0)
    assert schedule.views(WallTime.of)[UUID].state is GuestState.ABSENT
    assert schedule.views(WallTime.of)[UUID].connections is None
    assert schedule.start_due(3.0) == []
    schedule.on_agent_connected(UUID, 4.0)
    assert visit(schedule, answered(SMALL), 4.0) == Visit(UUID, SMALL)


@pytest.mark.parametrize(
    ("error", "state"),
    [
        (AgentAbsent("no channel"), GuestState.ABSENT),
        (AgentSilent("no answer in time"), GuestState.SILENT),
        (InvalidReply("count out of range"), GuestState.NONSENSE),
    ],
)
def test_errors_lengthen_the_pause_until_the_agent_connects(
    schedule: VisitSchedule, error: AgentAbsent | AgentSilent | InvalidReply, state: GuestState
) -> None:
    visit(schedule, answered(SMALL), 1.0)
    now, pauses = 11.0, []
    for _ in range(8):
        visit(schedule, VisitResult(error=error), now)
        wait_s = schedule.seconds_to_next(now)
        assert wait_s is not None
        pauses.append(wait_s)
        now += wait_s
    assert pauses == [10, 20, 40, 80, *[MAX_PAUSE_S] * 4]
    view = schedule.views(WallTime.of)[UUID]
    assert (view.state, view.since, view.why, view.connections) == (state, 11.0, error.reason, None)
    schedule.on_agent_connected(UUID, now)
    visit(schedule, answered(SMALL), now)
    assert schedule.seconds_to_next(now) == PERIOD_S


def test_an_announcement_that_was_interrupted_is_repeated(schedule: VisitSchedule) -> None:
    visit(schedule, VisitResult(error=AgentSilent("no answer in time")), 1.0)
    schedule.on_agent_connected(UUID, 2.0)
    assert visit(schedule, answered(SMALL), 2.0).announcement == SMALL


def test_a_vm_that_stops_is_forgotten_even_during_a_visit(schedule: VisitSchedule) -> None:
    schedule.start_due(1.0)
    schedule.on_vms({}, 1.5)
    schedule.on_result(UUID, answered(SMALL), 2.0)
    schedule.on_visit_ended(UUID, 2.0)
    assert schedule.views(WallTime.of) == {}
    assert schedule.seconds_to_next(2.0) is None


def test_a_clock_that_was_set_back_delays_no_visit(schedule: VisitSchedule) -> None:
    visit(schedule, answered(SMALL), 1_000_000.0)
    schedule.on_vms({UUID: SMALL}, 500.0)
    assert schedule.start_due(500.0) == [Visit(UUID, SMALL)]


def test_a_visit_that_was_cancelled_counts_as_no_answer(schedule: VisitSchedule) -> None:
    schedule.start_due(1.0)
    schedule.on_visit_ended(UUID, 2.0)
    assert schedule.views(WallTime.of)[UUID].state is GuestState.SILENT
    assert schedule.seconds_to_next(2.0) == PERIOD_S


def test_a_vm_without_a_channel_is_not_visited_until_it_has_one(schedule: VisitSchedule) -> None:
    schedule.on_vms({UUID: SMALL}, 0.5, {UUID})
    assert schedule.seconds_to_next(0.5) is None
    schedule.on_agents_reachable(3.0)
    schedule.on_agent_connected(UUID, 3.0)
    schedule.on_agent_disconnected(UUID, 3.0)
    assert schedule.start_due(1000.0) == []
    view = schedule.views(WallTime.of)[UUID]
    assert (view.state, view.since, view.why) == (GuestState.ABSENT, 0.5, "the VM has no agent channel")
    assert not schedule.on_vms({UUID: LARGE}, 1001.0, {UUID})
    assert schedule.on_vms({UUID: LARGE}, 1001.0)
    assert visit(schedule, answered(LARGE), 1001.0 + FIRST_VISIT_S) == Visit(UUID, LARGE)


def test_a_channel_that_is_unplugged_during_a_visit(schedule: VisitSchedule) -> None:
    assert schedule.start_due(1.0) == [Visit(UUID, SMALL)]
    schedule.on_vms({UUID: SMALL}, 1.1, {UUID})
    schedule.on_result(UUID, answered(SMALL), 1.2)
    schedule.on_visit_ended(UUID, 1.2)
    assert schedule.views(WallTime.of)[UUID].state is GuestState.ABSENT
    assert schedule.seconds_to_next(1.2) is None


def test_an_agent_that_comes_and_goes_is_visited_no_more_than_once_a_second(schedule: VisitSchedule) -> None:
    began = []
    for tenth_ms in range(0, 600_000, 5):
        now = tenth_ms / 10_000
        schedule.on_agent_connected(UUID, now)
        for begun in schedule.start_due(now):
            began.append(now)
            schedule.on_result(begun.domain, answered(SMALL), now)
            schedule.on_visit_ended(begun.domain, now)
        schedule.on_agent_disconnected(UUID, now)
    assert 55 <= len(began) <= 61
    assert sum(map(len, schedule._queues.values())) < 3000, "what it leaves behind is removed"


def test_guests_that_answer_now_and_then_take_no_more_than_half_of_the_slots() -> None:
    """Each of 20 answers one visit and hangs in the next, and its agent connects again and again."""
    schedule = VisitSchedule(PERIOD_S)
    hostile = [numbered(number) for number in range(20)]
    schedule.on_vms(dict.fromkeys(hostile), 0.0)
    turns: dict[DomainUUID, int] = {}
    ends: list[tuple[float, DomainUUID, bool]] = []
    most = 0
    for second in range(1, 400):
        now = float(second)
        for each in [each for each in ends if each[0] <= now]:
            ends.remove(each)
            _, domain, hangs = each
            schedule.on_result(domain, VisitResult(error=AgentSilent("late")) if hangs else answered(), now)
            schedule.on_visit_ended(domain, now)
        for domain in hostile:
            schedule.on_agent_disconnected(domain, now)
            schedule.on_agent_connected(domain, now)
        for begun in schedule.start_due(now):
            turns[begun.domain] = turns.get(begun.domain, 0) + 1
            hangs = turns[begun.domain] % 2 == 0
            ends.append((now + (8.0 if hangs else 0.5), begun.domain, hangs))
        most = max(most, sum(hangs for *_, hangs in ends))
    assert 0 < most <= 4


@pytest.mark.parametrize("hung", [0, 50, 150, 400])
def test_responsive_guests_are_visited_in_time_however_many_others_hang(hung: int) -> None:
    """In virtual time: 400 that answer within 50 ms each, ``hung`` whose visits time out after 1.2 s; ten minutes."""
    dice = random.Random(3)
    healthy = {numbered(number) for number in range(400)}
    schedule = VisitSchedule(PERIOD_S)
    schedule.on_vms(dict.fromkeys([*(numbered(1000 + number) for number in range(hung)), *healthy]), 0.0)
    now, ends, last, gaps = 0.0, list[tuple[float, DomainUUID]](), dict[DomainUUID, float](), list[float]()
    seen_hung = 0
    while now < 600:
        for begun in schedule.start_due(now):
            takes = dice.uniform(0.02, 0.05) if begun.domain in healthy else 1.2
            heapq.heappush(ends, (now + takes, begun.domain))
        assert len(ends) <= 8
        assert sum(domain not in healthy for _, domain in ends) <= 4
        wait_s = schedule.seconds_to_next(now)
        now = min([now + (wait_s if wait_s is not None else 5.0), *(end for end, _ in ends[:1])])
        while ends and ends[0][0] <= now:
            _, domain = heapq.heappop(ends)
            ok = domain in healthy
            seen_hung += not ok
            schedule.on_result(domain, answered() if ok else VisitResult(error=AgentSilent("no answer")), now)
            schedule.on_visit_ended(domain, now)
            if ok and now > 120:  # after the crowd at the start
                gaps += [now - last[domain]] if domain in last else []
                last[domain] = now
    assert max(gaps) < PERIOD_S * 1.5
    assert set(last) == healthy
    assert seen_hung >= hung * 4, "hung guests are still visited"
    states = schedule.views(WallTime.of)
    assert sum(view.state is GuestState.ANSWERING for view in states.values()) == len(healthy)
