"""``virt-ports history``: the ranges that a VM held, and when. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.cli import journal, parsing, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_EXAMPLES = """\
  virt-ports history web1
  virt-ports history web1 --limit 20
  virt-ports history web1 --event exhausted --since -7d
  virt-ports history 6695eb01-f6a4-8304-79aa-97f2502e193f -o json"""

VERB = parsing.Verb(80, "show which ranges a VM held, and when", about="Oldest first.", examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("vm", metavar="VM", help="name or UUID, also of a VM that is gone")
    verb.add_argument("--limit", metavar="N", type=parsing.count, help="only the latest N lines (default: 1000)")
    journal.add_events(verb)
    parsing.add_time(verb)


def run(args: argparse.Namespace) -> int:
    """Print the VM's entries in the journal."""
    from cpm.api.operations import HISTORY

    asked = {"event": args.event, **parsing.time_of(args)}
    views = parsing.reader(args).call(HISTORY, name=args.vm, limit=args.limit, **asked)
    return parsing.print_answer(args, views, lambda: render.table(journal.HEADER, map(journal.row, views)))
