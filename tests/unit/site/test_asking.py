"""Asking changes nothing: a site on which operators look all the time decides as one on which nobody does."""

from __future__ import annotations

import random
from collections.abc import Callable

from cpm.core.manager import Manager, Outcome
from cpm.protocol import codec
from cpm.queries import explain_facts, metrics, nodes, pool, vms
from tests.unit.site.test_fairness import GREEDY, HOST1, HOST2, LIGHT, NEWCOMERS, Load

ROUNDS, ASKED_EACH = 250, 4

Ask = Callable[[Manager, float], None]


def nothing(manager: Manager, now: float) -> None:
    """Nobody asks."""


def everything(manager: Manager, now: float) -> None:
    for vm in vms.summaries(manager, now, all=True):
        explain_facts.explanation(manager, vm.uuid, now)
        vms.detail(manager, now, vm.uuid)
    pool.addresses(manager)
    nodes.node_views(manager, now)
    assert metrics.exposition(manager, now).body


def decisions(ask: Ask) -> tuple[list[str], int]:
    """
    Let VMs contend for a pool, and ask between the steps.

    :return: All ledger changes and messages in order, and how often ports began or ceased to be short.
    """
    log: list[str] = []
    load, draw, turns, short = Load(blocks=32), random.Random(4), 0, False

    def note(outcome: Outcome) -> None:
        now = load.site.now
        log.extend(f"{now} {change}" for change in outcome.changes)
        log.extend(f"{now} {name} {codec.encode(message)!r}" for name, message in outcome.messages)

    load.site.on_outcome = note
    for number, uuid in enumerate((GREEDY, LIGHT, *NEWCOMERS)):
        load.start(uuid, (HOST1, HOST2)[number % 2], wanted=draw.randrange(50, 400))
    for _ in range(ROUNDS):
        load.seconds(1)
        manager = load.site.manager
        assert manager is not None
        turns, short = turns + (manager.sizer.contention_in("default").is_short(load.site.now) is not short), not short
        short = manager.sizer.contention_in("default").is_short(load.site.now)
        for number in range(ASKED_EACH):
            ask(manager, load.site.now + 0.9 * number / ASKED_EACH)
        for uuid in load.wanted:
            if draw.random() < 0.05:
                load.wanted[uuid] = draw.choice([5, 20, 100, 500])
    return log, turns


def test_asking_a_thousand_times_changes_no_decision() -> None:
    unasked, turns = decisions(nothing)
    assert turns >= 4, "ports are short at times, not always"
    assert len(unasked) > 300
    assert decisions(everything)[0] == unasked
