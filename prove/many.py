"""Runs many stories, in several processes, and keeps those that fail."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from prove.faults import reverted
from prove.runner import Verdict, run
from prove.story import ALL_KINDS, Kind, generate

_STORIES = 25
"""Stories that a process runs at a time."""


class _Batch(NamedTuple):
    seeds: tuple[int, ...]
    kinds: frozenset[Kind]
    fault: str


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """A story that fails."""

    seed: int
    verdict: Verdict


@dataclasses.dataclass(slots=True)
class Progress:
    """What was run so far."""

    stories: int = 0
    steps: int = 0
    busy_s: float = 0.0
    """Processor seconds that the stories took."""
    failures: list[Failure] = dataclasses.field(default_factory=list)

    def add(self, other: Progress) -> None:
        """Add what another process ran."""
        self.stories += other.stories
        self.steps += other.steps
        self.busy_s += other.busy_s
        self.failures += other.failures

    @property
    def steps_per_s(self) -> float:
        """Steps in one second of one core."""
        return self.steps / self.busy_s if self.busy_s else 0.0


def run_many(
    seeds: Iterable[int],
    kinds: frozenset[Kind] = ALL_KINDS,
    processes: int = 1,
    until: float | None = None,
    fault: str = "",
    tell: Callable[[Progress], None] | None = None,
) -> Progress:
    """
    Run stories.

    :param seeds: Of the stories; may go on for ever with ``until``.
    :param kinds: What may happen.
    :param processes: At once; 1: this one.
    :param until: Monotonic seconds; no more stories are begun then.
    :param fault: The mending that is reverted (:mod:`prove.faults`); empty: none.
    :param tell: Is told of the progress after every batch.
    """
    done = Progress()
    in_time = itertools.takewhile(lambda _: until is None or time.monotonic() < until, _batches(seeds))
    batches = (_Batch(batch, kinds, fault) for batch in in_time)
    for result in _results(batches, processes):
        done.add(result)
        if tell is not None:
            tell(done)
    return done


def _results(batches: Iterator[_Batch], processes: int) -> Iterator[Progress]:
    if processes == 1:
        yield from map(run_batch, batches)
        return
    # spawn: a child of fork would inherit whatever threads and locks its parent has.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pending = [pool.apply_async(run_batch, (batch,)) for batch in itertools.islice(batches, 2 * processes)]
        while pending:
            result = pending.pop(0).get()
            pending += [pool.apply_async(run_batch, (batch,)) for batch in itertools.islice(batches, 1)]
            yield result


def run_batch(batch: _Batch) -> Progress:
    """Run some stories in this process."""
    done = Progress()
    begin = time.process_time()
    with reverted(batch.fault), _no_collection():
        for seed in batch.seeds:
            verdict = run(generate(seed, kinds=batch.kinds))
            done.stories += 1
            done.steps += verdict.steps
            if verdict.violation:
                done.failures.append(Failure(seed, verdict))
    done.busy_s = time.process_time() - begin
    return done


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Collect what stories leave at the end: that saves a tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        if was_enabled:
            gc.enable()


def _batches(seeds: Iterable[int]) -> Iterator[tuple[int, ...]]:
    rest = iter(seeds)
    while batch := tuple(itertools.islice(rest, _STORIES)):
        yield batch
