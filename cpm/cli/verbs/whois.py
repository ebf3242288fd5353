"""
``virt-ports whois``: the owner of an external port, now or earlier, for example to answer an abuse report.

Tested in ``tests/unit/cpm/cli/test_verbs.py``.
"""

from __future__ import annotations

from cpm.cli import parsing, render
from cpm.protocol.bounds import LAST_PORT, short, whole_number
from cpm.protocol.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.api.operations import Argument
    from cpm.api.views import WhoisView

_EXAMPLES = """\
  virt-ports whois 203.0.113.1 20817
  virt-ports whois 203.0.113.1 20817 --at 2026-11-23T06:38:00Z
  virt-ports whois 203.0.113.1 20817 --at '5 minutes ago'
  virt-ports whois 203.0.113.1 20999 --protocol icmp --at -2h"""

_ABOUT = """\
A range belongs to one VM for all protocols; for ICMP the port is the echo
identifier. TIME is ISO 8601 (in the local zone unless it has Z or an offset),
UTC seconds, relative like -10m or -1h30m, or like '5 minutes ago'. When the
manager's clock was set and showed that time twice, or never, all VMs that it may
have been are listed."""

VERB = parsing.Verb(70, "find the VM that holds, or held, an external port", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("address", metavar="ADDRESS", help="external IPv4 address")
    verb.add_argument("port", metavar="PORT", help="transport port, or ICMP echo identifier")
    verb.add_argument(
        "--protocol", choices=("tcp", "udp", "icmp", "sctp"), help="makes no difference: a range is for all protocols"
    )
    verb.add_argument("--at", metavar="TIME", help="when (default: now)")


def run(args: argparse.Namespace) -> int:
    """Print the owner."""
    from cpm.api.operations import WHOIS

    view = parsing.reader(args).call(WHOIS, **_arguments(args))
    return parsing.print_answer(args, view, lambda: _facts(view))


def _arguments(args: argparse.Namespace) -> dict[str, Argument]:
    from cpm.cli import addresses, times

    port = whole_number(args.port, LAST_PORT)
    if port is None:
        raise InvalidRequest(f"not a port: {short(args.port)}; use a number from 0 to {LAST_PORT}")
    try:
        address = addresses.parse_one(args.address)
        at = None if args.at is None else times.parse(args.at, parsing.now(args))
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return {"address": address, "port": port, "at": at, "protocol": args.protocol}


def _facts(view: WhoisView) -> str:
    return _candidates(view) if view.doubt else _owner(view)


def _owner(view: WhoisView) -> str:
    return render.fields((
        ("Name", view.name),
        ("UUID", view.uuid),
        ("Node", view.node),
        ("External address", view.address),
        ("Pool", view.pool),
        ("Port", view.port),
        ("At", render.moment(view.at)),
        ("Range", render.ports(view.first_port, view.last_port)),
        ("State", view.state),
        ("Since", render.moment(view.since) if view.since is not None else None),
        ("Internal address", view.internal_address),
    ))  # fmt: skip


def _candidates(view: WhoisView) -> str:
    rows = (
        (each.name, each.uuid, each.node, render.moment(each.since) if each.since is not None else None)
        for each in view.candidates
    )
    table = render.table(("Name", "UUID", "Node", "Since"), rows)
    return f"{table}Which one is not known: {render.cell(view.doubt)}.\n"
