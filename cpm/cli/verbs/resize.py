"""``virt-ports resize``: give one VM more ports, or fewer, now. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.cli import parsing
from cpm.cli.verbs import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_ABOUT = """\
PORTS is rounded up to whole blocks and kept between the VM's floor and its cap.
If the adjacent ports are free the range grows in place; otherwise new
connections get a larger range elsewhere. Either way, established connections
keep their ports: old ports drain until their last connection is gone.

The next measurement may change the size again. To make it permanent, use
`virt-ports set VM floor=PORTS` or `cap=PORTS`."""

_EXAMPLES = """\
  virt-ports resize web1 1024
  virt-ports set web1 floor=1024    permanently, from the next measurement on"""

VERB = parsing.Verb(50, "give one VM more or fewer ports now", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("vm", metavar="VM", help="name or UUID")
    verb.add_argument("ports", metavar="PORTS", type=parsing.ports, help="size that its range should get")


def run(args: argparse.Namespace) -> int:
    """Request the resize, and print the ranges of the VM."""
    from cpm.api.operations import RESIZE
    from cpm.api.requests import ResizeRequest

    detail = parsing.client(args).call(RESIZE, ResizeRequest(args.ports), name=args.vm)
    return parsing.print_answer(args, show.flat(detail), lambda: show.ranges(detail))
