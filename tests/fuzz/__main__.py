"""``python -m tests.fuzz [N] [--seed SEED] [--target NAME …]``: N inputs for each target, and how many a second."""

from __future__ import annotations

import argparse
import resource
import secrets
import sys

from tests.fuzz.running import PATIENCE_S, run
from tests.fuzz.targets import TARGETS

MEMORY_BYTES = 1 << 30
"""Address space beyond which reading an input fails; all targets together need less than half of it."""


def main() -> int:
    """Run the targets. :return: 1 when one failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("count", nargs="?", type=int, default=10_000, metavar="N", help="inputs for each target")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(1_000_000), help="default: a random one")
    parser.add_argument("--target", action="append", choices=sorted(TARGETS), help="only this one; may be repeated")
    args = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    print(f"seed {args.seed}, {args.count} inputs for each target", flush=True)
    failed = 0
    for name in args.target or TARGETS:
        try:
            tally = run(TARGETS[name], args.count, args.seed, patience_s=PATIENCE_S)
        except AssertionError as error:
            failed += 1
            print(f"FAILED {error}", flush=True)
        else:
            rate = args.count / max(tally.seconds, 1e-9)
            words = f"{tally.understood} understood, {tally.refused} refused, {rate:,.0f} a second"
            print(f"{name:16} {words}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
