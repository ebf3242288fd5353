from __future__ import annotations

import heapq
import random
from ipaddress import IPv4Address

import pytest

from cpm.protocol.messages import GuestState
from cpm.protocol.model import DomainUUID, PortRange
from qga_agent.announcement import Announcement
from qga_agent.guest_agent import AgentAbsent, AgentSilent, GuestFigures, GuestLies
from qga_agent.samples import InterfaceCounters
from qga_agent.visit_schedule import FIRST_S, LONGEST_PAUSE_S, SURE_S, Guests, Outcome, Visit
from tests.fakes.guest import UUID

PERIOD_S = 10.0
FIGURES = GuestFigures({"eth0": InterfaceCounters(1, 2, 3, 4), "eth1": InterfaceCounters(1, 2, 3, 4)}, 12, 9)
SMALL = Announcement(IPv4Address("203.0.113.1"), PortRange(20000, 20255))
LARGE = Announcement(IPv4Address("203.0.113.1"), PortRange(20000, 20511))


def numbered(number: int) -> DomainUUID:
    return DomainUUID(f"11111111-1111-1111-1111-{number:012}")


def visit(guests: Guests, outcome: Outcome, now: float) -> Visit:
    (begun,) = guests.take(now)
    guests.found(begun.domain, outcome, now)
    guests.returned(begun.domain, now)
    return begun


@pytest.fixture
def guests() -> Guests:
    guests = Guests(PERIOD_S)
    assert guests.running({UUID: SMALL}, 0.0)
    return guests


def answered(tried: Announcement | None = None, *refusals: str) -> Outcome:
    return Outcome(FIGURES, tried, refusals)


def test_a_guest_is_visited_soon_after_it_started_and_then_each_period(guests: Guests) -> None:
    assert guests.views() == {}
    assert guests.wait_s(0.0) == FIRST_S
    assert guests.take(0.0) == []
    assert visit(guests, answered(SMALL), FIRST_S) == Visit(UUID, SMALL)
    assert guests.wait_s(FIRST_S) == PERIOD_S
    assert visit(guests, answered(), FIRST_S + PERIOD_S) == Visit(UUID, None), "it knows"
    view = guests.views()[UUID]
    assert (view.state, view.since, view.why) == (GuestState.ANSWERING, FIRST_S, "")
    assert (view.connections, view.established, view.interfaces, view.rx_bytes, view.tx_bytes) == (12, 9, 2, 4, 8)
    assert (view.external, view.ports) == (SMALL.external, SMALL.ports)


def test_a_resize_is_told_at_once(guests: Guests) -> None:
    visit(guests, answered(SMALL), 1.0)
    assert guests.running({UUID: LARGE}, 2.0)
    assert visit(guests, answered(LARGE), 2.0) == Visit(UUID, LARGE)
    assert not guests.running({UUID: LARGE}, 2.5), "nothing new"
    assert guests.views()[UUID].ports == LARGE.ports


def test_a_resize_during_a_visit_is_told_by_the_next_which_follows_at_once(guests: Guests) -> None:
    assert guests.take(1.0) == [Visit(UUID, SMALL)]
    guests.running({UUID: LARGE}, 1.1)
    assert guests.take(1.1) == [], "never two at once"
    guests.found(UUID, answered(SMALL), 1.2)
    guests.returned(UUID, 1.2)
    assert guests.take(1.2) == [Visit(UUID, LARGE)]


def test_what_was_told_is_looked_after_now_and_then(guests: Guests) -> None:
    visit(guests, answered(SMALL), 1.0)
    assert visit(guests, answered(), 1.0 + SURE_S - 1).tell is None
    assert visit(guests, answered(SMALL), 1.0 + SURE_S + PERIOD_S).tell == SMALL


def test_what_a_guest_refused_is_shown_and_not_tried_at_every_visit(guests: Guests) -> None:
    visit(guests, answered(SMALL, "Invalid argument"), 1.0)
    assert visit(guests, answered(), 11.0).tell is None
    view = guests.views()[UUID]
    assert (view.state, view.why, view.ports) == (GuestState.ANSWERING, "Invalid argument", None)


def test_an_agent_that_comes_back_is_told_again(guests: Guests) -> None:
    visit(guests, answered(SMALL), 1.0)
    guests.vanished(UUID, 2.0)
    assert guests.views()[UUID].state is GuestState.ABSENT
    assert guests.views()[UUID].connections is None
    assert guests.take(3.0) == []
    guests.appeared(UUID, 4.0)
    assert visit(guests, answered(SMALL), 4.0) == Visit(UUID, SMALL)


@pytest.mark.parametrize(
    ("trouble", "state"),
    [
        (AgentAbsent("no channel"), GuestState.ABSENT),
        (AgentSilent("no answer in time"), GuestState.SILENT),
        (GuestLies("count out of range"), GuestState.NONSENSE),
    ],
)
def test_trouble_makes_visits_rarer_until_the_agent_appears(
    guests: Guests, trouble: AgentAbsent | AgentSilent | GuestLies, state: GuestState
) -> None:
    visit(guests, answered(SMALL), 1.0)
    now, pauses = 11.0, []
    for _ in range(8):
        visit(guests, Outcome(trouble=trouble), now)
        wait_s = guests.wait_s(now)
        assert wait_s is not None
        pauses.append(wait_s)
        now += wait_s
    assert pauses == [10, 20, 40, 80, *[LONGEST_PAUSE_S] * 4]
    view = guests.views()[UUID]
    assert (view.state, view.since, view.why, view.connections) == (state, 11.0, trouble.why, None)
    guests.appeared(UUID, now)
    visit(guests, answered(SMALL), now)
    assert guests.wait_s(now) == PERIOD_S


def test_half_told_is_not_told(guests: Guests) -> None:
    visit(guests, Outcome(trouble=AgentSilent("no answer in time")), 1.0)
    guests.appeared(UUID, 2.0)
    assert visit(guests, answered(SMALL), 2.0).tell == SMALL


def test_who_stopped_is_forgotten_even_while_visited(guests: Guests) -> None:
    guests.take(1.0)
    guests.running({}, 1.5)
    guests.found(UUID, answered(SMALL), 2.0)
    guests.returned(UUID, 2.0)
    assert guests.views() == {}
    assert guests.wait_s(2.0) is None


def test_a_clock_that_was_set_back_puts_no_visit_off(guests: Guests) -> None:
    visit(guests, answered(SMALL), 1_000_000.0)
    guests.running({UUID: SMALL}, 500.0)
    assert guests.take(500.0) == [Visit(UUID, SMALL)]


def test_a_visit_that_was_broken_off_counts_as_no_answer(guests: Guests) -> None:
    guests.take(1.0)
    guests.returned(UUID, 2.0)
    assert guests.views()[UUID].state is GuestState.SILENT
    assert guests.wait_s(2.0) == PERIOD_S


@pytest.mark.parametrize("hung", [0, 50, 150, 400])
def test_hundreds_are_visited_in_time_however_many_others_hang(hung: int) -> None:
    """In virtual time: 400 that answer within 50 ms each, ``hung`` that take 1.2 s to be given up, an hour."""
    dice = random.Random(3)
    healthy = {numbered(number) for number in range(400)}
    guests = Guests(PERIOD_S)
    guests.running(dict.fromkeys([*(numbered(1000 + number) for number in range(hung)), *healthy]), 0.0)
    now, ends, last, gaps = 0.0, list[tuple[float, DomainUUID]](), dict[DomainUUID, float](), list[float]()
    seen_hung = 0
    while now < 600:
        for begun in guests.take(now):
            takes = dice.uniform(0.02, 0.05) if begun.domain in healthy else 1.2
            heapq.heappush(ends, (now + takes, begun.domain))
        assert len(ends) <= 8
        assert sum(domain not in healthy for _, domain in ends) <= 4
        wait_s = guests.wait_s(now)
        now = min([now + (wait_s if wait_s is not None else 5.0), *(end for end, _ in ends[:1])])
        while ends and ends[0][0] <= now:
            _, domain = heapq.heappop(ends)
            ok = domain in healthy
            seen_hung += not ok
            guests.found(domain, answered() if ok else Outcome(trouble=AgentSilent("no answer")), now)
            guests.returned(domain, now)
            if ok and now > 120:  # after the crowd at the start
                gaps += [now - last[domain]] if domain in last else []
                last[domain] = now
    assert max(gaps) < PERIOD_S * 1.5
    assert set(last) == healthy
    assert seen_hung >= hung * 4, "they are not given up either"
    states = guests.views()
    assert sum(view.state is GuestState.ANSWERING for view in states.values()) == len(healthy)
