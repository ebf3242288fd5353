"""
``virt-ports simulate``: compares policies on the same recorded or generated load. Needs no manager.

Tested in ``tests/unit/cpm/cli/test_simulate.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from cpm.cli import parsing, render
from cpm.protocol.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.cli.documents import PolicyDocument, SimulateDocument
    from cpm.simulation import Result, Trace

HEADER = ("Policy", "Refused", "Growths", "Moves", "Held mean", "Held peak", "Held/used", "VMs/address")

DEFAULT_SEED = 1

_EXAMPLES = """\
  virt-ports simulate monday.csv                          all policies on a recorded load
  virt-ports simulate --generate heavy-tailed --vms 100 --policy static --policy doubling
  virt-ports simulate monday.csv --svg monday.svg         and a picture
  virt-ports simulate --generate bursty --save bursty.csv --policy static:512
  virt-ports simulate monday.csv -o json | jq '.policies[] | {policy, refused}'"""

_ABOUT = """\
Replays a load in virtual time against the code that sizes and places ranges,
drain and hold-down included. cpmd is not involved, and nothing changes. Every
connection takes a port (all go to one destination, the worst case) and is
refused when no port is free at that moment.
Policies: static[:PORTS] (without PORTS: the smallest power of two that refuses
no connection), doubling (near exhaustion, as cloud providers do; without
overflow ranges), and the policies that a VM can have:
{policies}
VMs/address: how many share an external address in the smallest pool without a
refused connection; '-' when some are refused in every pool. The search takes
about ten replays per policy; --no-packing skips it.
A trace is written by `virt-ports record`."""


def _about() -> str:
    return _ABOUT.format(policies=parsing.policies(indent=2))


VERB = parsing.Verb(130, "compare policies on a recorded or generated load", about=_about, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    source = verb.add_mutually_exclusive_group(required=True)
    source.add_argument("trace", metavar="TRACE", nargs="?", help="a recorded load (CSV); - is standard input")
    source.add_argument("--generate", metavar="KIND", help="a generated load: steady, diurnal, bursty, heavy-tailed, "
                        "one-greedy or flash-crowd")  # fmt: skip
    verb.add_argument("--policy", metavar="NAME", action="append", help="may be repeated (default: all)")
    verb.add_argument("--vms", metavar="N", type=parsing.count, default=50, help="of a generated load (default: 50)")
    verb.add_argument("--seconds", metavar="N", type=parsing.count, default=1200,
                      help="of a generated load (default: 1200)")  # fmt: skip
    verb.add_argument("--seed", metavar="N", type=parsing.count, default=DEFAULT_SEED,
                      help=f"the same seed gives the same load and result (default: {DEFAULT_SEED})")  # fmt: skip
    verb.add_argument("--save", metavar="FILE", help="write the load as a trace")
    verb.add_argument("--svg", metavar="FILE", help="write a picture: ports held and used over time")
    verb.add_argument("--no-packing", action="store_true", help="do not search the smallest pool")


def run(args: argparse.Namespace) -> int:
    """Print the result of each policy."""
    import random  # noqa: TID251 - the only use; simulations get their randomness passed in

    from cpm import simulation
    from cpm.cli import progress

    def dice() -> simulation.Dice:
        return random.Random(args.seed)  # noqa: S311 - not for cryptography; the same seed gives the same result

    trace = _trace(args, dice())
    if args.save is not None:
        _write(args.save, "".join(simulation.trace_lines(trace)))
    # Check all names before the first replay, which may take minutes.
    names = args.policy or simulation.contenders()
    playing = [simulation.contender(name, trace, simulation.Conditions()) for name in names]
    results = []
    with progress.line() as say:
        for one in playing:
            said = _said(one.policy.name, say)
            results.append(simulation.compete(one, trace, dice, said, packing=not args.no_packing))
    if args.svg is not None:
        _write(args.svg, simulation.draw(results, _title(args, trace)))
    if parsing.wants_json(args):
        render.emit_document(_document(args, trace, results))
    else:
        render.emit(_title(args, trace) + "\n\n" + render.table(HEADER, map(_row, results)))
    return 0


def _trace(args: argparse.Namespace, dice: Any) -> Trace:
    from cpm import simulation

    if args.generate is not None:
        return simulation.generate(args.generate, args.vms, args.seconds, dice)
    try:
        if args.trace == "-":
            return simulation.read(sys.stdin, "standard input")
        with open(args.trace, encoding="utf-8", newline="") as file:  # noqa: PTH123 - importing pathlib costs 10 ms
            return simulation.read(file, args.trace)
    except UnicodeDecodeError:
        raise InvalidRequest(f"{args.trace} is not a trace: it is not text") from None
    except OSError as error:
        raise InvalidRequest(
            f"cannot read {args.trace}: {error.strerror}; name a file of `virt-ports record`"
        ) from None


def _write(path: str, text: str) -> None:
    try:
        with open(path, "w", encoding="utf-8") as file:  # noqa: PTH123
            file.write(text)
    except OSError as error:
        raise InvalidRequest(f"cannot write {path}: {error.strerror}; choose another folder") from None


def _title(args: argparse.Namespace, trace: Trace) -> str:
    what = f"{args.generate} load, seed {args.seed}" if args.generate else str(args.trace)
    return f"{what}: {len(trace.vms)} VMs, {trace.seconds:.0f} s, {trace.connections:,} connections"


def _row(result: Result) -> tuple[object, ...]:
    outcome = result.outcome
    return (
        outcome.policy,
        outcome.refused,
        outcome.grown,
        outcome.moved,
        round(outcome.mean_held),
        outcome.peak_held,
        f"{outcome.held_per_used:.2f}",
        result.vms_per_address,
    )


def _document(args: argparse.Namespace, trace: Trace, results: list[Result]) -> SimulateDocument:
    return {
        "trace": args.trace or args.generate,
        "seed": args.seed,
        "vms": len(trace.vms),
        "seconds": trace.seconds,
        "connections": trace.connections,
        "policies": [_plain(result) for result in results],
    }


def _plain(result: Result) -> PolicyDocument:
    outcome = result.outcome
    return {
        "policy": outcome.policy,
        "refused": outcome.refused,
        "refused_vms": outcome.refused_vms,
        "grown": outcome.grown,
        "moved": outcome.moved,
        "shrunk": outcome.shrunk,
        "denied": outcome.denied,
        "held_mean": round(outcome.mean_held, 1),
        "held_peak": outcome.peak_held,
        "used_mean": round(outcome.mean_used, 1),
        "used_peak": outcome.peak_used,
        "held_per_used": round(outcome.held_per_used, 3) if outcome.mean_used else None,
        "pool_ports": result.pool_ports,
        "vms_per_address": round(result.vms_per_address, 2) if result.vms_per_address is not None else None,
    }


def _said(name: str, say: Callable[[str], None]) -> Callable[[float], None]:
    """Return what says how far a policy is: the share of its first replay, then the number of the pool it tries."""
    pools = 0

    def told(share: float) -> None:
        nonlocal pools
        pools += share >= 1
        say(f"{name}: replay {share:.0%}" if share < 1 else f"{name}: pool {pools}")

    return told
