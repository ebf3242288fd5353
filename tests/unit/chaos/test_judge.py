"""Verdicts of chaos: what faults explain, what they do not, and which fault is named."""

from __future__ import annotations

import dataclasses

import pytest

from chaos.judge import GROWTH_S, STARTS_S, TOO_LONG_S, Happened, Judge, Life, Verdict
from chaos.kinds import REPAIR_S, kind
from chaos.observations import CONTROL, Leak, Observations, Span, Use
from chaos.plan import Fault

LIVES = (Life(1, 1, "host1", 0.0), Life(2, 2, "host2", 0.0))
HOLD_DOWN_S = 5.0


def happened(name: str, target: str, began: float = 10.0, lasted: float = 0.0, number: int = 1) -> Happened:
    return Happened(Fault(number, began, kind(name), target, lasted, 0), began, began + lasted)


def verdict(seen: Observations, *faults: Happened) -> Verdict:
    return Judge(faults, LIVES, seen, HOLD_DOWN_S).verdict()


def gap(guest: int, begin: float, seconds: float, flow: str = "tcp0") -> Observations:
    return Observations(gaps=(Span(guest, flow, begin, begin + seconds),))


def broken(seen: Observations, *faults: Happened) -> list[tuple[str, str | None]]:
    return [(one.what, one.after.kind.name if one.after else None) for one in verdict(seen, *faults).broken]


def test_nothing_is_broken_where_nothing_was_seen() -> None:
    found = verdict(Observations(), happened("kill-cpmd", "manager"))
    assert found.broken == ()
    assert set(found.counts.values()) == {0}


@pytest.mark.parametrize("name", ["kill-cpmd", "freeze-cpmd", "restart-cpmd"])
def test_without_daemons_traffic_goes_on(name: str) -> None:
    fault = happened(name, "manager", lasted=8.0)
    assert broken(gap(1, 11.0, 0.9), fault) == []
    assert broken(gap(1, 11.0, 1.1), fault) == [("blocked", name)]


def test_a_cut_is_never_explained() -> None:
    seen = Observations(cuts=(Span(1, "tcp0", 11.0, 12.0, "ConnectionResetError"),))
    found = verdict(seen, happened("link-down", "host1", lasted=5.0))
    assert [one.what for one in found.broken] == ["cut"]
    assert "ConnectionResetError" in str(found.broken[0])
    assert "link-down host1" in str(found.broken[0])
    assert found.counts["cut"] == 1


def test_a_link_that_is_down_blocks_for_as_long_and_a_little() -> None:
    fault = happened("carrier-lost", "host1", lasted=4.0)
    assert broken(gap(1, 10.1, 4.0 + 3.9), fault) == []
    assert broken(gap(1, 10.1, 4.0 + 4.1), fault) == [("blocked", "carrier-lost")]


def test_only_the_guests_of_the_host_may_feel_it() -> None:
    fault = happened("carrier-lost", "host1", lasted=4.0)
    assert broken(gap(2, 10.1, 3.0), fault) == [("blocked", "carrier-lost")]


def test_a_fault_explains_nothing_before_or_long_after() -> None:
    fault = happened("flush-ruleset", "host1")
    assert broken(gap(1, 10.5, REPAIR_S), fault) == []
    assert broken(gap(1, 2.0, 7.9), fault) == [("blocked", None)]
    assert broken(gap(1, 10.1 + REPAIR_S, 2.0), fault) == [("blocked", "flush-ruleset")]


def test_two_faults_at_once_add_up() -> None:
    faults = (happened("flush-ruleset", "host1"), happened("carrier-lost", "edge1", 12.0, 3.0, 2))
    assert broken(gap(1, 10.1, 13.0), *faults) == []
    assert broken(gap(1, 10.1, 15.0), *faults) == [("blocked", "carrier-lost")]


def test_a_busy_machine_is_not_held_against_anybody() -> None:
    seen = dataclasses.replace(gap(1, 10.0, 4.0), lags=(Span(1, "lag", 10.5, 12.5), Span(-1, "lag", 11.5, 13.8)))
    assert broken(seen) == []
    others = dataclasses.replace(gap(1, 10.0, 4.0), lags=(Span(2, "lag", 10.5, 13.8),))
    assert [what for what, _ in broken(others)] == ["blocked"]
    control = dataclasses.replace(gap(1, 10.0, 4.0), gaps=(*gap(1, 10.0, 4.0).gaps, Span(CONTROL, "tcp0", 10.2, 13.5)))
    assert broken(control) == []


def test_a_new_connection_may_fail_only_while_packets_are_blocked() -> None:
    seen = Observations(opened=(Span(1, "short", 11.0, 11.1, "ConnectionRefusedError"),))
    assert broken(seen, happened("carrier-lost", "host1", lasted=4.0)) == []
    assert broken(seen, happened("kill-natd", "host1", lasted=4.0)) == [("failed", "kill-natd")]


def test_a_burst_may_wait_for_a_manager_that_is_away() -> None:
    seen = Observations(opened=(Span(1, "burst", 11.0, 16.0),))
    assert broken(seen, happened("burst", "1", 10.5, 4.0)) == [("blocked", "burst")]
    assert broken(seen, happened("burst", "1", 10.5, 4.0), happened("freeze-cpmd", "manager", 10.0, 5.0, 2)) == []
    assert broken(seen, happened("burst", "1", 10.5, 4.0), happened("freeze-natd", "host2", 10.0, 5.0, 2)) != []


def test_a_pressed_guest_waits_no_longer_than_a_daemon_is_away() -> None:
    burst, away = happened("burst", "1", 10.5, 4.0), happened("kill-cpmd", "manager", 10.0, 5.0, 2)
    waits_s = away.ended + STARTS_S - 11.0
    for seconds, expected in ((waits_s + GROWTH_S - 0.1, []), (waits_s + GROWTH_S + 0.1, [("blocked", "burst")])):
        seen = Observations(opened=(Span(1, "short", 11.0, 11.0 + seconds, "TimeoutError"),))
        assert broken(seen, burst, away) == expected


def test_a_burst_explains_nothing_of_the_time_before_it() -> None:
    waited = Observations(opened=(Span(1, "short", 11.0, 31.0, "TimeoutError"),))
    faults = (happened("kill-cpmd", "manager", 11.0, 3.0), happened("burst", "1", 30.5, 4.0, 2))
    found = verdict(waited, *faults)
    assert (found.counts["blocked"], found.counts["blocked_too_long"]) == (1, 1)
    assert found.over_s == pytest.approx(20.0 - GROWTH_S)


def test_connections_that_time_out_are_blocked_and_others_fail() -> None:
    for why, expected in (("TimeoutError from port 40000", "blocked"), ("OSError [Errno 113]", "failed")):
        seen = Observations(opened=(Span(1, "short", 11.0, 31.0, why),))
        assert broken(seen) == [(expected, None)]


def test_a_little_too_long_is_not_much_too_long() -> None:
    allowed_s = REPAIR_S + 1.0
    for seconds, expected in ((allowed_s + TOO_LONG_S - 0.1, 0), (allowed_s + TOO_LONG_S + 0.1, 1)):
        found = verdict(gap(1, 10.1, seconds), happened("flush-ruleset", "host1"))
        assert (found.counts["blocked"], found.counts["blocked_too_long"]) == (1, expected)


def test_a_guest_that_forged_packets_in_its_own_name_has_made_its_ports_useless_itself() -> None:
    seen = Observations(opened=(Span(1, "short", 40.0, 60.0, "TimeoutError"),))
    flood = happened("flood", "1", 10.0, 4.0)
    assert broken(seen, flood) == []
    assert broken(seen, happened("flood", "2", 10.0, 4.0)) == [("blocked", "flood")]
    # What it has had before goes on.
    assert broken(gap(1, 40.0, 3.0), flood) == [("blocked", "flood")]


def uses(*of: tuple[int, float, float]) -> Observations:
    return Observations(uses=tuple(Use("203.0.113.1", 2000, sender, begin, end) for sender, begin, end in of))


def test_a_port_has_one_owner_until_it_has_rested() -> None:
    assert broken(uses((1, 10.0, 20.0), (1, 21.0, 22.0))) == []
    assert broken(uses((1, 10.0, 20.0), (2, 25.1, 30.0))) == []
    assert broken(uses((1, 10.0, 20.0), (2, 24.9, 30.0))) == [("two_owners", None)]


def test_an_owner_between_does_not_hide_the_first() -> None:
    found = broken(uses((1, 10.0, 20.0), (2, 21.0, 21.0), (1, 22.0, 23.0)))
    assert found == [("two_owners", None), ("two_owners", None)]


def test_untranslated_packets_are_excused_only_where_the_rules_are_gone() -> None:
    leak = Leak("host1-un", "10.10.0.10", "192.0.2.2", 11.0, 12.0, 7)
    seen = Observations(leaks=(leak,))
    assert broken(seen, happened("kill-natd", "host1")) == [("untranslated", "kill-natd")]
    assert broken(seen, happened("flush-ruleset", "host2")) == [("untranslated", "flush-ruleset")]
    excused = verdict(seen, happened("flush-ruleset", "host1"))
    assert (excused.broken, excused.counts["untranslated_without_rules"]) == ((), 7)
    late = Observations(leaks=(dataclasses.replace(leak, end=11.0 + REPAIR_S),))
    assert broken(late, happened("flush-ruleset", "host1")) == [("untranslated", "flush-ruleset")]


def test_a_changed_payload_or_source_is_broken() -> None:
    assert broken(Observations(wrong=(Span(1, "udp", 11.0, 11.0, "came from elsewhere"),))) == [("wrong", None)]


def test_the_table_names_the_likeliest_reason() -> None:
    faults = (happened("kill-cpmd", "manager", lasted=3.0), happened("carrier-lost", "host1", 11.0, 4.0, 2))
    felt = verdict(gap(1, 11.1, 4.5), *faults).by_kind
    assert felt["kill-cpmd"].longest_s == 0.0
    assert felt["carrier-lost"].longest_s == pytest.approx(4.5)


def test_the_distribution_is_over_connections() -> None:
    flows = {(1, f"tcp{number}", 0.0): number / 100 for number in range(100)} | {(CONTROL, "tcp0", 0.0): 9.0}
    found = verdict(Observations(worst=flows))
    assert (found.connections, found.blocked_s) == (100, (0.5, 0.99, 0.99))


def test_a_vm_that_starts_while_a_daemon_is_away_waits_for_it_and_leaks_nothing() -> None:
    fault = happened("kill-cpmd", "manager", lasted=8.0)
    lives = (Life(1, 1, "host1", 11.0), Life(2, 2, "host1", 9.0))

    def found(seen: Observations) -> list[str]:
        return [one.what for one in Judge([fault], lives, seen, HOLD_DOWN_S).verdict().broken]

    until = fault.ended + STARTS_S
    assert found(gap(1, 11.0, until - 11.0 + 0.9)) == []
    assert found(gap(1, 11.0, until - 11.0 + 1.1)) == ["blocked"]
    # The other one had its ports already.
    assert found(gap(2, 11.0, 1.1)) == ["blocked"]
    assert found(Observations(leaks=(Leak("host1-un", "10.10.0.5", "192.0.2.2", 12.0, 12.5, 3),))) == ["untranslated"]
