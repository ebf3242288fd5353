"""``python -m bench [PART …]``: measure, report progress on stderr, print one JSON object as the last line."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from bench import (
    burst,
    change,
    cli,
    cone,
    density,
    edge,
    forward,
    forwarding,
    hook,
    ledger,
    limits,
    machine,
    metrics,
    nft,
    page,
    path,
    pcp,
    prove,
    resize,
    scale,
    stats,
    tick,
)
from bench.figures import KEYS, Measured, missed_targets, report
from bench.waits import reason, time_limit
from lab.errors import LabError
from lab.shell import require_root

LOCK = Path("/run/lock/virt-ports-bench")

PARTS: dict[str, Callable[[Callable[[str], None]], Measured]] = {
    "ledger": ledger.measure,
    "density": density.measure,
    "tick": tick.measure,
    "metrics": metrics.measure,
    "page": page.measure,
    "scale": scale.measure,
    "prove": prove.measure,
    "stats": stats.measure,
    "nft": nft.measure,
    "change": change.measure,
    "edge": edge.measure,
    "forwarding": forwarding.measure,
    "hook": hook.measure,
    "cli": cli.measure,
    "cone": cone.measure,
    "forward": forward.measure,
    "resize": resize.measure,
    "pcp": pcp.measure,
    "burst": burst.measure,
    "limits": limits.measure,
    "path": path.measure,
}
"""In the order in which they run."""

PART_LIMIT_S = 900.0
"""Seconds after which a part counts as stuck; the longest takes about 150 s on the README's machine."""


def main(arguments: list[str] | None = None) -> int:
    """
    Run the parts.

    A part that fails is reported and left out of the figures; the others run all the same.

    :return: 0 all were measured, whatever the figures are; 1 one could not be, or none; 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure virt-ports on this machine (root). The last line of output is one JSON object.",
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all): " + "; ".join(map(_keys, PARTS))
    )
    chosen = parser.parse_args(arguments).parts
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"there is no part {unknown[0]}; choose of {', '.join(PARTS)}")
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        require_root()
        with _exclusive_run():
            # Our processes inherit the highest priority; the lab's daemons set their own.
            os.setpriority(os.PRIO_PROCESS, 0, -20)
            return _run([part for part in PARTS if part in chosen or not chosen])
    except LabError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; everything was removed", file=sys.stderr)
        return 130


def _run(parts: list[str]) -> int:
    facts = machine.facts()
    measured, failed = measure_all(parts)
    result = report(measured, facts, failed)
    for line in missed_targets(result):
        print(f"target missed: {line}", file=sys.stderr)
    for part, text in failed.items():
        print(f"not measured: {part}: {text}", file=sys.stderr)
    print(json.dumps(result), flush=True)
    return 1 if failed else 0


def measure_all(parts: list[str]) -> tuple[list[Measured], dict[str, str]]:
    """Run parts one after the other. :return: What was measured, and by part why it could not be."""
    measured: list[Measured] = []
    failed: dict[str, str] = {}
    for part in parts:
        begin = time.monotonic()
        print(f"{part} …", file=sys.stderr, flush=True)
        try:
            with time_limit(PART_LIMIT_S):
                measured.append(PARTS[part](_say))
        except Exception as error:
            traceback.print_exception(error)
            failed[part] = reason(error)
        _say(f"{'FAILED after ' if part in failed else ''}{time.monotonic() - begin:.0f} s")
    return measured, failed


def _say(text: str) -> None:
    print(f"    {text}", file=sys.stderr, flush=True)


def _keys(part: str) -> str:
    return f"{part} gives {', '.join(KEYS[part])}"


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _exclusive_run() -> Iterator[None]:
    """:raise LabError: When another bench runs: each would disturb the other, and both use the same namespaces."""
    with LOCK.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise LabError("another bench runs on this machine; wait for its end") from error
        yield


if __name__ == "__main__":
    sys.exit(main())
