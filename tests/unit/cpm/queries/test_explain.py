"""The sentences about a VM, for given facts."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address
from typing import Any

import pytest

from cpm.core.placement import NoRoom, Obstacle
from cpm.core.sizing import Decision, policies
from cpm.core.sizing.contention import FairShare, FewInUse, KeptForStarts, Want
from cpm.core.sizing.observation import GiveBack, NoInternalAddress, OverflowRange, Refusal
from cpm.core.wishes import Defaults, resolve
from cpm.protocol.model import PortRange, Wishes
from cpm.queries.explain import RULES, Facts, Holder, PoolFacts, give_back_text, lines, overflow_text, refusal_text

WISHES = resolve(Wishes(floor=256), Wishes(weight=200, cap=9), Defaults(policy="specification"), policies())
VM = Facts(
    name="web1", runs=True, external=IPv4Address("203.0.113.1"), ports=PortRange(1024, 1279), leaving=128, in_use=250,
    score=3503.4, decision=Decision(256, 512, "exhausted", 384), decided_s_ago=1.2, refusal="",
    give_back="", overflow="", want=None, waits_to_start=False, new_range=None, awaited=(), fair_share=None,
    wishes=WISHES, not_moved="", now=1000.0,
)  # fmt: skip
POOL = PoolFacts(
    name="default", total=64512, free=640, leaving=128, longest_free=320, addresses=1, short=False, waiting=0,
    holders=(Holder("db", 32768, 30000), Holder("web1", 256, None)), per_minute=-64.0, empty_in_s=600.0,
)  # fmt: skip


def test_an_explanation_has_ports_decision_bounds_pool_holders_and_trend() -> None:
    assert lines(VM, POOL) == (
        "web1 has 256 ports: 203.0.113.1 1024-1279, 250 of them in use. 128 more are draining or held.",
        (
            "1 s ago its policy, specification (score 3503), asked for 384 ports; 512 were decided (exhausted: the "
            "range is nearly full, so it grows whatever the policy wants)."
        ),
        (
            "Bounds: floor 256 (metadata), cap 32768 (pool), weight 200 (set), policy specification (pool), "
            "drain-limit never (pool), connections 65536 (pool), connection-rate 1000 (pool), "
            "filtering address-and-port-dependent (pool), pcp off (pool), pool default (pool), "
            "address any (pool)."
        ),
        "Ignored: set: cap 9: it is below floor 256 (metadata).",
        (
            "Pool default: 640 of 64512 ports are free (external addresses: 1, longest free run: 320), 128 are "
            "draining or held."
        ),
        "Largest holders: db 32768 (30000 in use), web1 256.",
        "At the present trend (-64 free ports a minute) the pool is empty in 10 minutes.",
    )


def test_an_explanation_of_a_vm_that_lacks_ports_has_refusal_waiting_time_and_fair_share() -> None:
    lacking = dataclasses.replace(
        VM, refusal="the pool is short", want=Want(512, 940.0, 999.0), fair_share=320, give_back="asked to give back"
    )
    text = lines(lacking, dataclasses.replace(POOL, free=0, short=True, waiting=3, empty_in_s=None))
    assert "Asked to give back." in text
    assert "Refused: the pool is short." in text
    assert "It has waited 60 s for 512 ports in total." in text
    assert "Ports are short: its fair share (floors first, the rest by weight) is 320 ports." in text
    assert text[-1] == "No port is free now."
    assert "New connections use other ports." in lines(
        dataclasses.replace(VM, overflow="new connections use other ports"), POOL
    )
    assert any(line.endswith("VMs that lack ports: 3.") for line in text)


@pytest.mark.parametrize(
    ("changes", "first_line"),
    [
        ({"waits_to_start": True}, "web1 has no ports: it waits for some."),
        ({"runs": False}, "web1 has no ports: it does not run."),
        ({}, "web1 has no ports: none were requested."),
        ({"refusal": "the host is at its quota"}, "web1 has no ports: they were refused."),
    ],
)
def test_a_vm_without_ports_has_the_reason_in_the_first_line(changes: dict[str, Any], first_line: str) -> None:
    bare = dataclasses.replace(VM, ports=None, external=None, in_use=None, leaving=0, decision=None, **changes)
    text = lines(bare, POOL)
    assert text[0] == first_line
    assert ("Nothing was measured yet, so nothing was decided." in text) == bare.runs


@pytest.mark.parametrize(
    ("rate", "empty", "words"),
    [
        (None, None, "too early to forecast"),
        (5.0, None, "does not run out"),
        (-1.0, 90.0, "empty in 90 seconds"),
        (-1.0, 7200.0, "empty in 2 hours"),
        (-1.0, 864000.0, "empty in 10 days"),
    ],
)
def test_the_last_line_is_the_trend_of_the_pool(rate: float | None, empty: float | None, words: str) -> None:
    assert words in lines(VM, dataclasses.replace(POOL, per_minute=rate, empty_in_s=empty))[-1]


def test_an_explanation_of_an_empty_pool_ends_in_the_remedy() -> None:
    assert lines(VM, dataclasses.replace(POOL, addresses=0))[-1].endswith("add one with `virt-ports pool add ADDRESS`.")


def test_a_decision_of_the_policy_is_explained_without_a_guard() -> None:
    kept = dataclasses.replace(VM, decision=Decision(256, 256, "specification", 256), score=None)
    assert lines(kept, POOL)[1] == "1 s ago its policy, specification, asked for 256 ports; it keeps its size."
    asked = dataclasses.replace(VM, decision=Decision(256, 1024, "arrivals", 1024))
    assert lines(asked, POOL)[1].startswith("1 s ago its host asked for 1024 ports; 1024 were decided (arrivals: ")
    assert not set(RULES) & set(policies())


NO_RUN = NoRoom(320, 256, Obstacle.NO_FREE_RUN, 2, IPv4Address("203.0.113.1"))
RUN_TOO_SHORT = (
    "cannot allocate 320 ports: the 2 addresses have no free run that long (longest free run: 256); "
    "add an address to its pool with `virt-ports pool add`"
)


@pytest.mark.parametrize(
    ("reason", "sentence"),
    [
        (FewInUse(100, 320), "the pool is short, and only 100 of the VM's 320 ports are in use"),
        (KeptForStarts(320, 256), "320 ports are free, 256 of them kept for VMs that start"),
        (FairShare(1408), "the pool is short, and the VM's fair share of it is 1408 ports"),
        (
            NoInternalAddress("100.64.0.0/30"),
            "no internal address is left in 100.64.0.0/30; set a larger pool.internal in cpmd.toml",
        ),
        (NO_RUN, RUN_TOO_SHORT),
        (
            dataclasses.replace(NO_RUN, searched=1),
            RUN_TOO_SHORT.replace("the 2 addresses have", "203.0.113.1 has"),
        ),
    ],
)
def test_every_refusal_has_a_sentence(reason: Refusal, sentence: str) -> None:
    assert refusal_text(reason) == sentence


@pytest.mark.parametrize(
    ("obstacle", "words"),
    [
        (Obstacle.NO_ADDRESS, "no external address in the pool"),
        (Obstacle.ADDRESS_GONE, "its address is gone"),
        (Obstacle.OWN_NUMBERS, "the VM's own draining ports have these numbers on another address"),
        (Obstacle.KEPT_FOR_STARTS, "the other free ports are kept for VMs that start"),
    ],
)
def test_every_obstacle_has_its_words(obstacle: Obstacle, words: str) -> None:
    assert refusal_text(NoRoom(64, 0, obstacle)).startswith(
        f"cannot allocate 64 ports: {words} (longest free run: 0); add "
    )


def test_a_give_back_request_and_an_overflow_range_have_a_sentence() -> None:
    assert give_back_text(GiveBack(192)) == "asked to give back all but 192 ports, because other VMs lack some"
    assert overflow_text(OverflowRange(None)) == (
        "new connections use an earlier range of this VM again, because ports are short"
    )
    assert overflow_text(OverflowRange(NO_RUN)) == (
        f"new connections use an overflow range until a larger range is available: {RUN_TOO_SHORT}"
    )
