"""``virt-ports list``: VMs with their ports. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.cli import parsing, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.api.views import DomainView

HEADER = ("Name", "UUID", "Node", "External address", "Ports", "In use", "State")

_EXAMPLES = """\
  virt-ports list                  VMs that have ports or wait for some
  virt-ports list --all            also those that are gone and whose ports are not free yet
  virt-ports list 'web*' db        those with such names
  virt-ports list --node host1     those on one host
  virt-ports list --address 203.0.113.1 --state waiting
  virt-ports list --sort in-use --limit 10
  virt-ports list -o json | jq -r '.[] | select(.state=="waiting").name'"""

_ABOUT = """\
States: active; starting (being programmed); growing; waiting (no ports are
available); claimed (another host says that it runs there, too; see 'show');
misrouted (its packets do not go where they should; see 'show'); unreachable
(its host is not connected; its traffic goes on); gone; not managed, with the
reason: it gets no ports. 'leaving' says why a VM gets other ports than it
holds: a machine uses some of them itself, or its wishes name another pool or
address.
'In use' counts ports of the active range; '-' means not measured yet."""

_COLOURS = {
    "active": render.Colour.GREEN,
    "starting": render.Colour.CYAN,
    "growing": render.Colour.CYAN,
    "waiting": render.Colour.YELLOW,
    "unreachable": render.Colour.YELLOW,
    "claimed": render.Colour.RED,
    "misrouted": render.Colour.RED,
    "gone": render.Colour.GREY,
    "not managed": render.Colour.GREY,
}
_EXPLAINED = frozenset({"gone", "misrouted", "not managed", "waiting"})
_STATES = tuple(state.replace(" ", "-") for state in _COLOURS)

VERB = parsing.Verb(10, "list VMs and their ports", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("patterns", metavar="PATTERN", nargs="*", help="only VMs with such a name or UUID: 'web*'")
    verb.add_argument("--all", action="store_true", help="also VMs that are gone and whose ports are not free yet")
    verb.add_argument("--node", metavar="NODE", help="only VMs on this host")
    verb.add_argument("--address", metavar="ADDRESS", help="only VMs that hold ports of this external address")
    verb.add_argument("--state", metavar="STATE", action="append", choices=_STATES,
                      help=f"only VMs in this state; may be repeated: {', '.join(_STATES)}")  # fmt: skip
    parsing.add_page(verb, ("name", "node", "address", "ports", "in-use", "state"), "NAME[:UUID]")


def run(args: argparse.Namespace) -> int:
    """
    Print the VMs.

    :raise InvalidRequest: When the address is none.
    """
    from cpm.api.operations import LIST_VMS

    asked = {
        "all": args.all, "match": args.patterns, "node": args.node, "address": parsing.address_of(args.address),
        "state": args.state, "sort": args.sort if args.sort != "name" else None, "after": args.after,
    }  # fmt: skip
    views = parsing.reader(args).call(LIST_VMS, limit=parsing.one_more(args.limit), **asked)
    views, more = parsing.page_of(views, args.limit, lambda view: f"{view.name}:{view.uuid}")
    more = more if args.sort == "name" else ""
    return parsing.print_table(args, views, render.Table(HEADER, map(_row, views)), more)


def _row(view: DomainView) -> tuple[object, ...]:
    ports = render.ports(view.first_port, view.last_port)
    return view.name, view.uuid, view.node, view.external_address, ports, view.ports_in_use, _state(view)


def _state(view: DomainView) -> render.Painted:
    problem = view.problem.split(";")[0]
    state = f"{view.state}: {problem}" if problem and view.state in _EXPLAINED else view.state
    text = f"{state}, leaving: {view.leaving}" if view.leaving else state
    return render.Painted(text, _COLOURS.get(view.state))
