"""``python -m prove``: run stories; print the seed first, then the progress; shrink and tell those that fail."""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
import time
from collections.abc import Iterable

from prove.faults import FAULTS, reverted
from prove.many import Failure, Progress, run_many
from prove.runner import run
from prove.shrink import shrink
from prove.story import ALL_KINDS, Kind, generate
from prove.transcript import transcript

_SHOWN = 3
"""Failures that are shrunk and told, each of another kind."""
_PROGRESS_S = 10.0
_LONGEST = 400
"""Characters of a violation."""


def main(arguments: list[str] | None = None) -> int:
    """
    Run.

    :return: 0 no story failed; 1 one did; 2 wrong usage; 130 interrupted.
    """
    options = _parser().parse_args(arguments)
    first = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000_000)
    kinds = ALL_KINDS - {Kind(word) for word in options.without}
    until = time.monotonic() + 60.0 * options.minutes if options.minutes else None
    seeds: Iterable[int] = itertools.count(first) if until else range(first, first + options.seeds)
    amount = f"{options.minutes:g} minutes" if until else f"{options.seeds} stories"
    print(f"prove: seed {first}, {amount}, {options.processes} processes", flush=True)
    try:
        done = run_many(seeds, kinds, options.processes, until, options.fault, _Teller())
    except KeyboardInterrupt:
        print("prove: interrupted", file=sys.stderr)
        return 130
    print(f"prove: {_summary(done)}", flush=True)
    with reverted(options.fault):
        _tell_failures(done.failures, kinds)
    return 1 if done.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m prove",
        description="Run random stories of a site in virtual time, judge every step, and shrink what fails.",
    )
    parser.add_argument("--seeds", type=int, default=1000, help="stories (default: 1000)")
    parser.add_argument("--seed", type=int, help="of the first story; the next ones have the next numbers")
    parser.add_argument("--minutes", type=float, help="go on for so long instead of a number of stories")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="at once (default: one a core)")
    parser.add_argument("--fault", choices=sorted(FAULTS), default="", help="with one mending reverted")
    every = f"of {', '.join(sorted(ALL_KINDS))}"
    parser.add_argument("--without", nargs="+", metavar="KIND", choices=sorted(ALL_KINDS), default=[], help=every)
    return parser


class _Teller:
    """Prints the progress from time to time."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _PROGRESS_S

    def __call__(self, done: Progress) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + _PROGRESS_S
            print(f"prove: {_summary(done)}", flush=True)


def _summary(done: Progress) -> str:
    failed = f"{len(done.failures)} failed" if done.failures else "none failed"
    return f"{done.stories} stories, {done.steps} steps, {failed}; {done.steps_per_s:.0f} steps/s a core"


def _tell_failures(failures: list[Failure], kinds: frozenset[Kind]) -> None:
    """Shrink and tell the first failure of each kind."""
    of_kind: dict[str, Failure] = {}
    for failure in failures:
        print(f"prove: seed {failure.seed}: {failure.verdict.violation[:_LONGEST]}")
        of_kind.setdefault(failure.verdict.kind, failure)
    for failure in list(of_kind.values())[:_SHOWN]:
        story = generate(failure.seed, kinds=kinds)
        short = shrink(story, lambda part, kind=failure.verdict.kind: run(part).kind == kind)  # type: ignore[misc]
        print(f"\nprove: seed {failure.seed}, shrunk from {len(story.events)} to {len(short.events)} events;")
        print(f"prove: again: make prove SEEDS=1 SEED={failure.seed}\n")
        print(transcript(short), flush=True)


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of texts have another order in each process otherwise, and a story does not go the same way again.
        again = [sys.executable, "-m", "prove", *sys.argv[1:]]
        os.execve(sys.executable, again, {**os.environ, "PYTHONHASHSEED": "0"})
    sys.exit(main())
