"""
``virt-ports events``: the journal of all VMs, existing entries or new ones as they are written.

Tested in ``tests/unit/cpm/cli/test_verbs.py``.
"""

from __future__ import annotations

from cpm.cli import journal, parsing, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from cpm.api.views import EventView

_EXAMPLES = """\
  virt-ports events --limit 20               the latest 20
  virt-ports events --follow                 and wait for more; Ctrl-C ends it
  virt-ports events --follow --after 1041    continue where a script stopped
  virt-ports events --vm 'web*' --event exhausted --event short --since -1d
  virt-ports events --follow -o json | jq -r 'select(.event=="active").name'"""

_ABOUT = """\
The newest lines, the oldest of them first; '--before SEQ' has those before a
page, '--after SEQ' the first ones after it. With -o json, prints one document;
with --follow as well, one per line."""

VERB = parsing.Verb(110, "print the journal: ranges given, resized and released", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("-f", "--follow", action="store_true", help="wait for more")
    verb.add_argument("--after", metavar="SEQ", type=parsing.count, help="only lines after this number")
    verb.add_argument("--limit", metavar="N", type=parsing.count, help="at most N existing lines (default: 100)")
    verb.add_argument("--vm", metavar="PATTERN", action="append", help="only VMs with such a name; may be repeated")
    verb.add_argument("--node", metavar="PATTERN", action="append", help="only hosts with such a name; may be repeated")
    journal.add_events(verb)
    parsing.add_time(verb)


def run(args: argparse.Namespace) -> int:
    """Print the journal."""
    from cpm.api.operations import EVENTS

    asked = {"vm": args.vm, "node": args.node, "event": args.event, **parsing.time_of(args)}
    views = parsing.reader(args).stream(EVENTS, after=args.after, limit=args.limit, follow=args.follow, **asked)
    if args.follow:
        _follow(views, json=parsing.wants_json(args))
    elif parsing.wants_json(args):
        render.emit_document([render.plain(view) for view in views])
    else:
        render.emit(render.table(journal.HEADER, map(journal.row, views)))
    return 0


def _follow(views: Iterator[EventView], *, json: bool) -> None:
    if not json:
        render.emit(journal.head())
    for view in views:
        if json:
            render.emit_exact(render.document(render.plain(view), pretty=False))
        else:
            render.emit(journal.line(view))
