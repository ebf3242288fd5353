"""Half a minute of chaos with a fixed seed: the harness itself, and that no connection breaks."""

from __future__ import annotations

from pathlib import Path

import pytest

from chaos import plan
from chaos.kinds import kind
from chaos.run import Run
from chaos.site import SETTINGS
from lab.lab import Lab
from lab.sites import CLUSTER
from tests.e2e.labs import NOTHING, traces, unique_name

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

SEED, SECONDS, SLOTS = 11, 35.0, 6
KINDS = [
    kind(name)
    for name in (
        *("kill-natd", "kill-cpmd", "freeze-natd", "freeze-cpmd", "restart-natd", "kill-libvirtd", "flush-ruleset"),
        *("foreign-transactions", "carrier-lost", "flush-routes", "vm-relocate", "burst", "forge-neighbours", "scan"),
    )
]


def test_half_a_minute_of_chaos_breaks_no_connection(tmp_path: Path) -> None:
    lab = Lab(unique_name("x"), site=CLUSTER, settings=SETTINGS)
    faults = plan.make(SEED, SECONDS, SLOTS, KINDS)
    run = Run(lab, tmp_path, faults, SECONDS, SLOTS, lambda _: None)
    verdict = run.run()
    assert traces(lab) == NOTHING
    # How long packets waited depends on how busy the machine is; these do not.
    never = ("cut", "wrong", "two_owners", "blocked_too_long")
    assert {key: verdict.counts[key] for key in never} == dict.fromkeys(never, 0), list(map(str, verdict.broken))
    assert run.failures == []
    # And there was something to break.
    assert sum(felt.times for felt in verdict.by_kind.values()) == len(faults) >= 8
    assert verdict.connections >= SLOTS * 6
    assert verdict.opened > SLOTS * SECONDS / 2
