"""Runs inputs through a target and says what came of them."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import signal
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

    from tests.fuzz.targets import Target

PATIENCE_S = 20
"""Seconds of processor time after which reading an input counts as endless."""


class Hangs(BaseException):
    """Reading an input did not end. No :class:`Exception`, so that no reader mistakes it for an error of its own."""


@dataclasses.dataclass(frozen=True)
class Tally:
    """What came of the inputs of one target."""

    understood: int
    refused: int
    seconds: float


def run(target: Target, count: int, seed: int, *, patience_s: float = 0) -> Tally:
    """
    Read many inputs.

    :param seed: The same seed makes the same inputs.
    :param patience_s: Seconds of processor time for one input; 0: any number. Takes SIGPROF, in the main thread only.
    :raise AssertionError: When an input is neither understood nor refused; it quotes the input.
    """
    rng = random.Random(f"{target.name} {seed}")
    target.begin()
    understood = 0
    began = time.monotonic()
    with _alarm() if patience_s else contextlib.nullcontext():
        for number in range(count):
            data = target.material.input(rng)
            if patience_s:
                signal.setitimer(signal.ITIMER_PROF, patience_s)
            try:
                understood += target.understands(data)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                raise AssertionError(
                    f"{target.name}, seed {seed}, input {number}: {type(error).__name__}: {str(error)[:300]}\n"
                    f"{len(data)} bytes: {data[:2000]!r}"
                ) from error
    return Tally(understood, count - understood, time.monotonic() - began)


@contextlib.contextmanager
def _alarm() -> Iterator[None]:
    def ring(_number: int, _frame: FrameType | None) -> None:
        raise Hangs

    before = signal.signal(signal.SIGPROF, ring)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
