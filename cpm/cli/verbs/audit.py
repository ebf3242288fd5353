"""``virt-ports audit``: who changed what. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

import argparse

from cpm.cli import parsing, render

_ABOUT = """\
Oldest first. The user is that of the process that asked for the change, as the kernel says. What was refused is not
listed."""

_EXAMPLES = """\
  virt-ports audit
  virt-ports audit --limit 1000 -o json"""

VERB = parsing.Verb(95, "show what operators changed, when, and who that was", about=_ABOUT, examples=_EXAMPLES)

HEADER = ("Seq", "Time", "User", "PID", "Request", "Body")


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("--limit", metavar="N", type=parsing.count, help="only the latest N lines (default: 100)")


def run(args: argparse.Namespace) -> int:
    """Print the newest changes."""
    from cpm.api.operations import AUDIT

    views = parsing.client(args).call(AUDIT, limit=args.limit)
    rows = ((view.seq, render.moment(view.at), view.user, view.pid, view.request, view.body) for view in views)
    return parsing.print_answer(args, views, lambda: render.table(HEADER, rows))
