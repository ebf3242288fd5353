"""``virt-ports pool``: the external addresses that VMs share. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.api.words import RANGE_STATES
from cpm.cli import parsing, render
from cpm.protocol.bounds import LAST_PORT
from cpm.protocol.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from cpm.api.views import AddressDetail, AddressView, RangeView

HEADER = ("Address", "Pool", "Ports", "Allocated", "Leaving", "Longest free", "VMs", "Own", "Reserved")
RANGES_HEADER = ("Ports", "Name", "UUID", "Node", "State", "Since")
OWN_HEADER = ("Own ports", "Node", "For", "State")

_EXAMPLES = """\
  virt-ports pool list
  virt-ports pool show 203.0.113.1
  virt-ports pool add 203.0.113.1
  virt-ports pool add 203.0.113.0/29 --reserved 5060,9000-9100
  virt-ports pool add 203.0.113.8 --pool mail
  virt-ports pool list --pool mail
  virt-ports pool remove 203.0.113.4"""

_ADD_ABOUT = """\
ADDRESS is one address, a range like 203.0.113.1-203.0.113.4, or a network like
203.0.113.0/29 (all of it, first and last included). The router outside has to
deliver the addresses to an edge, by a route or by ARP: that is not checked here,
but `virt-ports doctor` on the edge looks at it. A VM gets ports below 1024 only
by a forward that names them. If one address cannot be added, none is. Without
--reserved, an address that is in the pool keeps its reserved ports;
'--reserved none' gives them back.

A VM gets ports of the pool that it wishes ('virt-ports set VM pool=mail', or
metadata), else of 'default'; so an address of any other pool serves only VMs
that wish it. An address that is in a pool moves to another one with --pool: VMs
with ports on it that do not wish that pool get their next ones elsewhere, and no
connection is cut."""

_LIST_ABOUT = """\
'Allocated' ports are active or reserved, 'Leaving' ones are draining or in their
hold-down; 'Longest free' is the largest range a VM could get. 'Own' ports are in
use by an edge whose own address this is: no VM gets them ('pool show' has them)."""

VERB = parsing.Verb(90, "list, show, add and remove external addresses", examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    actions = verb.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    shown = parsing.add_action(actions, "list", "list the addresses and what is free on them", about=_LIST_ABOUT)
    shown.add_argument("patterns", metavar="PATTERN", nargs="*", help="only such addresses: '203.0.113.*'")
    shown.add_argument("--pool", metavar="NAME", help="only addresses of this pool")
    parsing.add_page(shown, ("address", "free", "allocated", "leaving", "vms"), "ADDRESS")
    show = parsing.add_action(
        actions, "show", "show which VMs hold which ports of one address", examples=_examples_of("show")
    )
    show.add_argument("address", metavar="ADDRESS", help="external IPv4 address")
    show.add_argument("patterns", metavar="PATTERN", nargs="*", help="only ranges of such VMs: 'web*', or a UUID")
    show.add_argument("--state", metavar="STATE", action="append", default=[], choices=RANGE_STATES,
                      help=f"only ranges in such a state: {', '.join(RANGE_STATES)}; may be repeated")  # fmt: skip
    show.add_argument("--limit", metavar="N", type=parsing.count_from_1, help="at most N ranges")
    show.add_argument("--after", metavar="PORT", type=parsing.count_to(LAST_PORT), help="only ranges above this port")
    add = parsing.add_action(actions, "add", "add addresses", about=_ADD_ABOUT, examples=_examples_of("add"))
    add.add_argument("addresses", metavar="ADDRESS", nargs="+", help="address, range or network")
    add.add_argument(
        "--reserved", metavar="PORTS", help="never hand out these ports, for example 5060,8000-8100; or none"
    )
    add.add_argument("--pool", metavar="NAME", help="the pool that they belong to from now on (default: default)")
    remove = parsing.add_action(
        actions, "remove", "remove addresses on which no VM holds ports", examples=_examples_of("remove")
    )
    remove.add_argument("addresses", metavar="ADDRESS", nargs="+", help="address, range or network")


def run(args: argparse.Namespace) -> int:
    """
    Carry out one action; print one address, or those of the pool.

    :raise InvalidRequest: When an address or port range is invalid.
    """
    try:
        if args.action == "show":
            return _show(args)
        if args.action == "list":
            return _list(args)
        views = _ACTIONS[args.action](args)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return parsing.print_answer(args, views, lambda: render.table(HEADER, map(_row, views)))


def _list(args: argparse.Namespace) -> int:
    from cpm.api.operations import LIST_POOL

    sort = args.sort if args.sort != "address" else None
    asked = {"match": args.patterns, "pool": args.pool, "sort": sort, "after": parsing.address_of(args.after)}
    views = parsing.reader(args).call(LIST_POOL, limit=parsing.one_more(args.limit), **asked)
    views, more = parsing.page_of(views, args.limit, lambda view: str(view.address))
    more = more if sort is None else ""
    return parsing.print_table(args, views, render.Table(HEADER, map(_row, views)), more)


def _add(args: argparse.Namespace) -> list[AddressView]:
    from cpm.api.operations import ADD_TO_POOL
    from cpm.api.requests import PoolRequest
    from cpm.cli import addresses

    reserved = None if args.reserved is None else addresses.parse_reserved(args.reserved)
    request = PoolRequest(addresses=addresses.parse(args.addresses), reserved=reserved, pool=args.pool)
    return parsing.client(args).call(ADD_TO_POOL, request)


def _remove(args: argparse.Namespace) -> list[AddressView]:
    from cpm.api.operations import REMOVE_FROM_POOL
    from cpm.api.requests import PoolRemoval
    from cpm.cli import addresses

    return parsing.client(args).call(REMOVE_FROM_POOL, PoolRemoval(addresses.parse(args.addresses)))


def _show(args: argparse.Namespace) -> int:
    from cpm.api.operations import SHOW_ADDRESS
    from cpm.cli import addresses

    asked = {"match": args.patterns, "state": args.state, "after": args.after}
    address = addresses.parse_one(args.address)
    limit = args.limit if parsing.wants_json(args) else parsing.one_more(args.limit)
    view = parsing.reader(args).call(SHOW_ADDRESS, address=address, limit=limit, **asked)
    ranges, more = parsing.page_of(list(view.ranges), args.limit, lambda each: str(each.first_port))
    return parsing.print_answer(args, view, lambda: _facts(view) + "\n" + _tables(view, ranges) + more)


_ACTIONS = {"add": _add, "remove": _remove}


def _row(view: AddressView) -> tuple[object, ...]:
    return (
        view.address, view.pool, view.ports_total, view.ports_allocated, view.ports_leaving, view.longest_free,
        view.domains, view.ports_own, _reserved_text(view),
    )  # fmt: skip


def _facts(view: AddressDetail) -> str:
    return render.fields(zip(HEADER, _row(view), strict=True))


def _tables(view: AddressDetail, ranges: list[RangeView]) -> str:
    own = (
        (render.ports(each.first_port, each.last_port), each.node, each.use, _own_state(each.gone)) for each in view.own
    )
    held = render.table(RANGES_HEADER, _ranges(ranges))
    return held + render.table(OWN_HEADER, own) if view.own else held


def _own_state(gone: float | None) -> str:
    return "in use" if gone is None else f"not used since {render.moment(gone)}"


def _ranges(ranges: list[RangeView]) -> Iterator[tuple[object, ...]]:
    for each in ranges:
        ports = render.ports(each.first_port, each.last_port)
        yield ports, each.name, each.uuid, each.node, each.state, render.moment(each.since)


def _reserved_text(view: AddressView) -> str:
    parts = ((part.first, part.last) for part in view.reserved)
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _examples_of(action: str) -> str:
    return "\n".join(line for line in _EXAMPLES.splitlines() if f"pool {action}" in line)
