"""Steps that the simulation of a site takes per second on one core: ``make prove``, in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bench.figures import Measured, median
from prove.many import run_many

STORIES: Final = 50
RUNS: Final = 10


def measure(say: Callable[[str], None]) -> Measured:
    """Measure."""
    runs = [run_many(range(number * STORIES, (number + 1) * STORIES)) for number in range(RUNS + 1)][1:]
    stories_per_s = sum(run.stories for run in runs) / sum(run.busy_s for run in runs)
    per_s = [run.steps_per_s for run in runs]
    say(f"{STORIES} stories: median {median(per_s):.0f} steps/s, {stories_per_s:.0f} stories/s")
    return Measured({"prove_steps_per_s": median(per_s)}, {"prove_steps_per_s": per_s})
