"""``python -m chaos``: one run; prints the seed first, one JSON object last, and exits with 1 when something broke."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from chaos import plan
from chaos.judge import JUDGED, Verdict
from chaos.kinds import KINDS
from chaos.run import Run
from chaos.site import SETTINGS, SLOTS
from lab.errors import LabError
from lab.lab import Lab
from lab.node import REPOSITORY
from lab.shell import require_root
from lab.sites import CLUSTER

NAME = "chaos"
ALL = [kind.name for kind in KINDS]
LOGS = REPOSITORY / "build/chaos"
_LOCK = Path("/run/lock/virt-ports-chaos")
_SHOWN = 40


def main(arguments: list[str] | None = None) -> int:
    """
    Run.

    :return: 0 nothing broke; 1 something did, or the run could not be made; 2 wrong usage; 130 interrupted.
    """
    options = _parser().parse_args(arguments)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
    again = f"make chaos MINUTES={options.minutes:g} SEED={seed}"
    print(f"chaos: seed {seed}, {options.minutes:g} minutes; again: {again}", flush=True)
    wanted = options.only or [kind.name for kind in KINDS]
    kinds = [kind for kind in KINDS if kind.name in wanted and kind.name not in options.without]
    folder = LOGS / f"seed-{seed}"
    try:
        require_root()
        with _exclusive_run(), _interruptible():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            seconds = 60.0 * options.minutes
            run = Run(
                Lab(NAME, site=CLUSTER, settings=SETTINGS),
                folder,
                plan.make(seed, seconds, SLOTS, kinds),
                seconds,
                SLOTS,
                Progress(),
            )
            return report(seed, run.run(), run.failures, folder, keep=options.keep, fail_on=options.fail_on)
    except LabError as error:
        print(f"chaos: {error}; logs are in {folder}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("chaos: interrupted; everything was removed", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m chaos",
        description="Disturb a site of this machine under traffic, and see whether anything breaks (root).",
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="length of the disturbance (default: 3)")
    parser.add_argument("--seed", type=int, help="the same seed gives the same plan (default: a random one)")
    parser.add_argument("--keep", action="store_true", help="keep the logs also when nothing broke")
    parser.add_argument("--only", nargs="+", metavar="KIND", choices=ALL, default=[], help=f"of {', '.join(ALL)}")
    parser.add_argument("--without", nargs="+", metavar="KIND", choices=ALL, default=[], help="leave these out")
    parser.add_argument(
        "--fail-on",
        nargs="+",
        metavar="KEY",
        choices=JUDGED,
        help=f"fail only on these keys of the result, of {', '.join(JUDGED)} (default: on anything that broke)",
    )
    return parser


class Progress:
    """Says what happens, with the seconds since the begin."""

    def __init__(self) -> None:
        self._begin = time.monotonic()

    def __call__(self, text: str) -> None:
        """Say it."""
        print(f"[{time.monotonic() - self._begin:5.1f} s] {text}", flush=True)


def report(
    seed: int, verdict: Verdict, failures: list[str], folder: Path, *, keep: bool, fail_on: Sequence[str] | None
) -> int:
    """
    Print the table, what broke and the JSON object.

    :param fail_on: Keys of the result that count for the exit status; None: all, and whatever could not be injected.
    :return: The exit status.
    """
    print(f"\n{'fault':<22} {'times':>5} {'blocked s':>10} {'allowed s':>10}")
    for name, felt in verdict.by_kind.items():
        print(f"{name:<22} {felt.times:>5} {felt.longest_s:>10.2f} {felt.budget_s:>10.2f}")
    median, most, longest = verdict.blocked_s
    print(
        f"\n{verdict.connections} connections that last, {verdict.opened} new ones; longest silence of each: "
        f"median {median:.2f} s, p99 {most:.2f} s, maximum {longest:.2f} s"
    )
    for broken in verdict.broken[:_SHOWN]:
        print(f"BROKEN {broken}")
    if len(verdict.broken) > _SHOWN:
        print(f"BROKEN … and {len(verdict.broken) - _SHOWN} more")
    for failure in failures:
        print(f"FAILED {failure}")
    is_fine = not verdict.broken and not failures
    if is_fine and not keep:
        shutil.rmtree(folder)
    else:
        (folder / "broken.txt").write_text("".join(f"{one.at:.3f} {one}\n" for one in verdict.broken))
        print(f"{'nothing broke' if is_fine else f'seed {seed} broke something'}; plan and logs are in {folder}")
    result = {
        "seed": seed,
        "faults": sum(felt.times for felt in verdict.by_kind.values()),
        "connections": verdict.connections,
        "new_connections": verdict.opened,
        "blocked_s_p50": median,
        "blocked_s_p99": most,
        "blocked_s_max": longest,
        "over_s_max": verdict.over_s,
        **verdict.counts,
        "failures": failures,
    }
    print(json.dumps(result), flush=True)
    return 0 if is_fine or (fail_on and not any(verdict.counts[key] for key in fail_on)) else 1


@contextlib.contextmanager
def _exclusive_run() -> Iterator[None]:
    """:raise LabError: When another run is under way: both would use the same lab."""
    with _LOCK.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise LabError("another chaos runs on this machine; wait for its end") from None
        yield


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C, so that the lab is removed."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    former = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
