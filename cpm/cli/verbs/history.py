"""``virt-ports history``: what a VM held, and when."""

from __future__ import annotations

import argparse

from cpm.cli import journal, parsing, render

_EXAMPLES = """\
  virt-ports history web1
  virt-ports history web1 --limit 20
  virt-ports history 6695eb01-f6a4-8304-79aa-97f2502e193f -o json"""


def add_parser(subparsers: parsing.Subparsers) -> None:
    """Add the verb."""
    verb = parsing.add_verb(
        subparsers, "history", "show which ranges a VM held, and when", about="Oldest first.", examples=_EXAMPLES
    )
    verb.add_argument("vm", metavar="VM", help="name or UUID; a VM that is gone too")
    verb.add_argument("--limit", metavar="N", type=parsing.count, help="only the latest N lines (default: 1000)")


def run(args: argparse.Namespace) -> int:
    """Print the VM's lines of the journal."""
    from cpm.api.operations import HISTORY

    views = parsing.client(args).call(HISTORY, name=args.vm, limit=args.limit)
    if parsing.wants_json(args):
        render.emit_document(render.plain(views))
    else:
        render.emit(render.table(journal.HEADER, map(journal.row, views)))
    return 0
