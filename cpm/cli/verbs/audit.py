"""``virt-ports audit``: who changed what. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.cli import parsing, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_ABOUT = """\
Oldest first. The user is that of the process that asked for the change, as the
kernel says. Changes that were refused are not listed."""

_EXAMPLES = """\
  virt-ports audit
  virt-ports audit --user alice --since -1d
  virt-ports audit --limit 1000 -o json"""

VERB = parsing.Verb(95, "show what operators changed, when, and who that was", about=_ABOUT, examples=_EXAMPLES)

HEADER = ("Seq", "Time", "User", "PID", "Request", "Body")


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("--limit", metavar="N", type=parsing.count, help="only the latest N lines (default: 100)")
    verb.add_argument("--user", metavar="PATTERN", action="append", help="only by such users; may be repeated")
    verb.add_argument("--request", metavar="PATTERN", action="append",
                      help="only such requests, method and path: '* /v1/domains/web1*'; may be repeated")  # fmt: skip
    parsing.add_time(verb)


def run(args: argparse.Namespace) -> int:
    """Print the newest changes."""
    from cpm.api.operations import AUDIT

    asked = {"user": args.user, "request": args.request, **parsing.time_of(args)}
    views = parsing.reader(args).call(AUDIT, limit=args.limit, **asked)
    rows = ((view.seq, render.moment(view.at), view.user, view.pid, view.request, view.body) for view in views)
    return parsing.print_answer(args, views, lambda: render.table(HEADER, rows))
