"""``virt-ports relocate``: move one VM to other ports. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.cli import parsing
from cpm.cli.verbs import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_ABOUT = """\
New connections get a range of the same size elsewhere, on the same external
address if it has room. Established connections keep their ports: the old range
drains until its last connection is gone.

The size stays as it is; `virt-ports resize` changes it. The next measurement may
change it, too; `virt-ports set VM floor=PORTS` or `cap=PORTS` prevents that."""

_EXAMPLES = """\
  virt-ports relocate web1"""

VERB = parsing.Verb(60, "move one VM to other ports", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("vm", metavar="VM", help="name or UUID")


def run(args: argparse.Namespace) -> int:
    """Request the move, and print the ranges of the VM."""
    from cpm.api.operations import RELOCATE

    detail = parsing.client(args).call(RELOCATE, name=args.vm)
    return parsing.print_answer(args, show.flat(detail), lambda: show.ranges(detail))
