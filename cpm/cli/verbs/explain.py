"""``virt-ports explain``: why a VM has the ports it has. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.cli import parsing, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_ABOUT = """\
Prints what it asked for, what was decided and by which rule, what was refused
and why, which VMs hold most of the pool, and when the pool runs out at the
trend of the last ten minutes."""

_EXAMPLES = """\
  virt-ports explain web1
  virt-ports explain web1 -o json | jq .fair_share"""

VERB = parsing.Verb(40, "explain why a VM has the ports it has", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("vm", metavar="VM", help="name or UUID")


def run(args: argparse.Namespace) -> int:
    """Print the explanation."""
    from cpm.api.operations import EXPLAIN

    view = parsing.reader(args).call(EXPLAIN, name=args.vm)
    return parsing.print_answer(args, view, lambda: "".join(f"{render.cell(line)}\n" for line in view.lines))
