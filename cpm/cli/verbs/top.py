"""``virt-ports top``: VMs and their ports, live. Tested in ``tests/unit/cpm/cli/top/test_terminal.py``."""

from __future__ import annotations

import sys

from cpm.cli import parsing, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.api.client import Client
    from cpm.cli.documents import TopDocument
    from cpm.cli.top.model import Model, Row

_SORTS = ("name", "node", "state", "used", "held", "cap", "%", "new/s", "pkt/s", "mbit/s")

_ABOUT = """\
Ports in use, held and allowed as numbers and bars, and what each VM does: new
connections, packets and 10^6 bit a second, and the trend of its ports in use.
Keys are those of top and htop: q quits, < and > choose the column to sort by,
/ filters, space pauses, h shows all keys. When cpmd is away the last numbers
stay, the screen says so, and goes on when it is back.
With -b, --once, -o json, or without a terminal, it prints all VMs instead, as
one table (or JSON document) every --delay seconds."""

_EXAMPLES = """\
  virt-ports top
  virt-ports top --sort new/s --filter web
  virt-ports top --once                     one table, for a pipe or a file
  virt-ports top -b -n 60 -o json           a JSON document a line, for a minute or two"""

VERB = parsing.Verb(15, "show VMs and their ports, live", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("-d", "--delay", metavar="SECONDS", type=parsing.count_from_1, default=2,
                      help="seconds between two lists, and two tables (default: 2)")  # fmt: skip
    verb.add_argument(
        "--sort",
        metavar="COLUMN",
        choices=_SORTS,
        default="used",
        help=f"the column: {', '.join(_SORTS).replace('%', '%%')} (default: used)",
    )
    verb.add_argument("--filter", metavar="TEXT", default="", help="only VMs with this in name, UUID, node or state")
    verb.add_argument("-b", "--batch", action="store_true", help="print tables, and read no keys")
    verb.add_argument("-n", "--iterations", metavar="N", type=parsing.count_from_1,
                      help="end after N tables (without a terminal: 1)")  # fmt: skip
    verb.add_argument("--once", action="store_true", help="the same as -b -n 1")


def run(args: argparse.Namespace) -> int:
    """Show VMs until the user quits, or print tables."""
    from cpm.api.operations import LIST_VMS
    from cpm.cli.top.model import Model

    manager = parsing.client(args)
    model = Model(args.sort.upper(), args.filter)
    model.on_list(manager.call(LIST_VMS))
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if args.batch or args.once or parsing.wants_json(args) or not is_terminal:
        _print(args, manager, model, 1 if args.once else args.iterations or (None if args.batch else 1))
        return 0
    from cpm.cli.top import terminal
    from cpm.cli.top.feed import Feed

    coloured = render.has_colours(args.color or render.AUTO)
    terminal.show(model, Feed(manager, args.delay), coloured=coloured, is_unicode=_has_unicode())
    return 0


def _has_unicode() -> bool:
    """Return whether the terminal is said to show Unicode."""
    return (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"


def _print(args: argparse.Namespace, manager: Client, model: Model, iterations: int | None) -> None:
    """
    Print tables, each after a while in which hosts have reported.

    :raise Unreachable: When the manager ends.
    """
    from cpm.api.operations import LIST_VMS
    from cpm.cli.top import drawing

    printed = 0
    while iterations is None or printed < iterations:
        _listen(manager, model, args.delay)
        model.on_list(manager.call(LIST_VMS))
        if parsing.wants_json(args):
            render.emit_exact(render.document([_facts(row) for row in model.shown()], pretty=False))
        else:
            render.emit(drawing.table(model, is_unicode=_has_unicode()))
        printed += 1


def _listen(manager: Client, model: Model, seconds: int) -> None:
    """Take the reports of some seconds."""
    import threading

    from cpm.api.operations import MEASUREMENTS
    from cpm.protocol.errors import Unreachable

    def follow() -> None:
        try:
            for report in manager.stream(MEASUREMENTS, follow=True):
                if over.is_set():
                    return
                model.on_report(report)
        except Unreachable:
            return  # the list after it says why

    over = threading.Event()
    listening = threading.Thread(target=follow, name="top", daemon=True)
    listening.start()
    listening.join(seconds)
    over.set()


def _facts(row: Row) -> TopDocument:
    measured = row.measured
    return {
        "name": row.vm.name,
        "uuid": row.vm.uuid,
        "node": row.vm.node,
        "state": row.vm.state,
        "ports_in_use": row.in_use,
        "ports_held": row.held,
        "ports": row.size,
        "cap": row.vm.cap,
        "new_connections_per_s": measured.new_connections_per_s if measured else None,
        "packets_per_s": measured.packets_per_s if measured else None,
        "megabits_per_s": measured.megabits_per_s if measured else None,
    }
