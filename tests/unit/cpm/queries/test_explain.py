"""What is said about a VM, for facts as they come."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address
from typing import Any

import pytest

from cpm.core.sizing import Decision, policies
from cpm.core.sizing.contention import Want
from cpm.core.wishes import Defaults, resolve
from cpm.protocol.model import PortRange, Wishes
from cpm.queries.explain import RULES, Facts, Holder, PoolFacts, lines

WISHES = resolve(Wishes(floor=256), Wishes(weight=200, cap=9), Defaults(policy="specification"), policies())
VM = Facts(
    name="web1", runs=True, external=IPv4Address("203.0.113.1"), ports=PortRange(1024, 1279), leaving=128, in_use=250,
    score=3503.4, decision=Decision(256, 512, "exhausted", 384), decided_s_ago=1.2, refusal="", gave="", apart="",
    want=None, waits_to_start=False, fair_share=None, wishes=WISHES, now=1000.0,
)  # fmt: skip
POOL = PoolFacts(
    total=64512, free=640, leaving=128, longest_free=320, addresses=1, short=False, waiting=0,
    holders=(Holder("db", 32768, 30000), Holder("web1", 256, None)), per_minute=-64.0, empty_in_s=600.0,
)  # fmt: skip


def test_everything_in_a_few_lines() -> None:
    assert lines(VM, POOL) == (
        "web1 has 256 ports: 203.0.113.1 1024-1279, 250 of them in use. 128 more are on their way out.",
        (
            "1 s ago its policy, specification (score 3503), asked for 384 ports; it was to have 512 (exhausted: the "
            "range is as good as full, so it grows whatever the policy says)."
        ),
        (
            "Bounds: floor 256 (metadata), cap 32768 (pool), weight 200 (set), policy specification (pool), "
            "drain-limit never (pool)."
        ),
        "Ignored: set: cap 9: it is below floor 256 (metadata).",
        "Pool: 640 of 64512 ports are free (external addresses: 1, longest free run: 320), 128 are on their way out.",
        "Most is held by: db 32768 (30000 in use), web1 256.",
        "At the present trend (-64 free ports a minute) the pool is empty in 10 minutes.",
    )


def test_who_lacks_ports_is_told_what_was_refused_and_what_is_fair() -> None:
    lacking = dataclasses.replace(
        VM, refusal="the pool is short", want=Want(512, 940.0, 999.0), fair_share=320, gave="asked to give back"
    )
    said = lines(lacking, dataclasses.replace(POOL, free=0, short=True, waiting=3, empty_in_s=None))
    assert "Asked to give back." in said
    assert "Refused: the pool is short." in said
    assert "It waits for 512 ports in all, since 60 s." in said
    assert "Ports are short: its fair share (floors first, the rest by weight) is 320 ports." in said
    assert said[-1] == "No port is free now."
    assert "New connections use other ports." in lines(
        dataclasses.replace(VM, apart="new connections use other ports"), POOL
    )
    assert any(line.endswith("VMs that lack ports: 3.") for line in said)


@pytest.mark.parametrize(
    ("changes", "has"),
    [
        ({"waits_to_start": True}, "web1 has no ports: it waits for some."),
        ({"runs": False}, "web1 has no ports: it does not run."),
        ({}, "web1 has no ports: none were asked for."),
    ],
)
def test_a_vm_without_ports(changes: dict[str, Any], has: str) -> None:
    bare = dataclasses.replace(VM, ports=None, external=None, in_use=None, leaving=0, decision=None, **changes)
    said = lines(bare, POOL)
    assert said[0] == has
    assert ("Nothing was measured yet, so nothing was decided." in said) == bare.runs


@pytest.mark.parametrize(
    ("pace", "empty", "says"),
    [
        (None, None, "too early to say"),
        (5.0, None, "does not run out"),
        (-1.0, 90.0, "empty in 90 seconds"),
        (-1.0, 7200.0, "empty in 2 hours"),
        (-1.0, 864000.0, "empty in 10 days"),
    ],
)
def test_the_trend(pace: float | None, empty: float | None, says: str) -> None:
    assert says in lines(VM, dataclasses.replace(POOL, per_minute=pace, empty_in_s=empty))[-1]


def test_a_pool_without_addresses_says_what_to_do() -> None:
    assert lines(VM, dataclasses.replace(POOL, addresses=0))[-1].endswith("add one with `virt-ports pool add`.")


def test_a_decision_by_the_policy_needs_no_guard_to_explain_it() -> None:
    kept = dataclasses.replace(VM, decision=Decision(256, 256, "specification", 256), score=None)
    assert lines(kept, POOL)[1] == "1 s ago its policy, specification, asked for 256 ports; it keeps what it has."
    asked = dataclasses.replace(VM, decision=Decision(256, 1024, "arrivals", 1024))
    assert lines(asked, POOL)[1].startswith("1 s ago its host asked for 1024 ports; it was to have 1024 (arrivals: ")
    assert not set(RULES) & set(policies())
