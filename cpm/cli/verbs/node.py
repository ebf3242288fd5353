"""``virt-ports node``: hosts and edges. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.api.words import NODE_EVENT_NAMES, ROLES, node_state
from cpm.cli import asking, parsing, render
from cpm.protocol.bounds import MAX_QUOTA_PORTS, MAX_QUOTA_VMS
from cpm.protocol.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from ipaddress import IPv4Address

    from cpm.api.client import Client
    from cpm.api.requests import ApproveRequest
    from cpm.api.views import AskedView, NodeEventView, NodeView

HEADER = ("Name", "Roles", "Underlay", "State", "Synced", "Generation", "VMs", "Ports", "Dropped")

_LIST_ABOUT = """\
States: connected; away; fenced; 'out of service' (an edge that hosts do not
use); 'not answering' (connected, and confirms nothing); 'waiting for approval'
(it asks to be what 'Roles' and 'Underlay' say, see 'node approve'); revoked.
'Synced' is yes when the node has confirmed everything it was sent; 'Generation'
is the last one it confirmed and the last one it was sent. 'VMs' and 'Ports' have
what counts towards a host's quota, and the quota. 'Dropped' counts packets that
an edge dropped, by reason. Below the table is why a node is out of service or
does not answer, what it asks for that is not approved, how many ports wait for
it, and what it found to be wrong with its machine, for example that packets of
its VMs leave by a VPN and not to an edge."""

_SHOW_ABOUT = """\
'Fast path' has the interfaces of an edge at which a program in the kernel does
most packets of VMs, and the others with the reason why nftables does all there
('fast_path' under [edge] in natd.toml); of a host its uplinks, at which a
program sends VMs' packets to the edges, or why they need a routing rule
('fast_path' under [host])."""

_APPROVE_ABOUT = """\
A node is refused until it is approved, and while it asks for other roles or
another address than approved. Without --role and --underlay, this shows what the
node asks for, and approves exactly that, for the machine that asks, once you
confirm. With them you can approve a node before its natd runs; the first machine
that connects under that name is then the node. Every VM's traffic passes every
edge, so be careful with that role.

--max-vms and --max-ports are the node's quota: VMs that it may have, and ports
that they may hold in all; 0 stands for the numbers in cpmd.toml. For an approved
node they can be given alone."""

_REVOKE_ABOUT = """\
The node's session ends and it gets no other. An edge goes out of service first;
the only edge in service cannot be revoked. What the node has in its kernel stays
there: its VMs keep their ports, and nobody else gets these, until you have
switched it off and fenced it."""

_REMOVE_ABOUT = """\
This is refused while the node is connected, has VMs or ports, or is an edge that
is not fenced. A removed node whose natd still runs asks for approval again."""

_FENCE_ABOUT = """\
Fence a node only after you have made sure that it no longer forwards packets:
it is off, or cut from the network. From then on cpmd does not wait for its
confirmation, and the ports of its VMs may be given to others. If you fence a
machine that still runs, one external port can have two owners. A node that is
connected can be fenced only while it does not answer. The fence ends when the
node connects again, or has confirmed everything that it was sent."""

_UNFENCE_ABOUT = """\
A fence ends by itself when the node is back; this ends it before. A node that is
not fenced stays as it is."""

_EXAMPLES = """\
  virt-ports node list
  virt-ports node list --role edge --state away --state not-answering
  virt-ports node show edge1       all that is known of it
  virt-ports node approve host3    show what it asks for, and approve that
  virt-ports node approve host3 --role host --underlay 172.30.0.13
  virt-ports node approve host3 --max-vms 2000 --max-ports 500000
  virt-ports node revoke edge2     no longer trust it
  virt-ports node remove host2     it is gone for good
  virt-ports node fence host2      it is switched off: give its ports to others
  virt-ports node unfence host2    it is not dead: wait for it again
  virt-ports node events           when did edges leave service, and why?"""

EVENTS_HEADER = ("Time", "Node", "Event", "Why")

_EVENTS_ABOUT = """\
Edges that left service or are back, and fences, with the reason. The newest
10,000 are kept. 'virt-ports audit' has what operators did."""

_COLOURS = {
    "connected": render.Colour.GREEN,
    "away": render.Colour.YELLOW,
    "fenced": render.Colour.GREY,
    "out of service": render.Colour.RED,
    "not answering": render.Colour.RED,
    "waiting for approval": render.Colour.CYAN,
    "revoked": render.Colour.GREY,
}
_STATES = tuple(state.replace(" ", "-") for state in _COLOURS)

VERB = parsing.Verb(100, "list, approve, revoke, remove and fence hosts and edges", examples=_EXAMPLES)

_QUESTIONS = {
    "fence": (
        "The ports of its VMs may be given to others at once. If it still forwards packets, a port has two owners.",
        "is {} switched off, or cut from the network",
    ),
    "revoke": (
        "Its session ends, and its VMs keep the ports that they have and get no others.",
        "revoke {}",
    ),
}
"""What is asked on a terminal before an action: facts, and the question."""

_NODE = "name of the node, see `virt-ports node list`"


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    actions = verb.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    shown = parsing.add_action(actions, "list", "list the nodes, and machines that ask to be one", about=_LIST_ABOUT)
    shown.add_argument("patterns", metavar="PATTERN", nargs="*", help="only nodes with such a name: 'host*'")
    shown.add_argument("--role", action="append", choices=ROLES, dest="roles",
                       help="only nodes with this role")  # fmt: skip
    shown.add_argument("--state", metavar="STATE", action="append", choices=_STATES,
                       help=f"only nodes in this state; may be repeated: {', '.join(_STATES)}")  # fmt: skip
    parsing.add_page(shown, ("name", "state", "vms", "ports"), "NAME")
    one = parsing.add_action(actions, "show", "show one node", about=_SHOW_ABOUT, examples=_examples_of("show"))
    one.add_argument("node", metavar="NODE", help=_NODE)
    approve = parsing.add_action(
        actions, "approve", "say what a node may be", about=_APPROVE_ABOUT, examples=_examples_of("approve")
    )
    approve.add_argument("node", metavar="NODE", help=_NODE)
    approve.add_argument("--role", action="append", choices=ROLES, dest="roles",
                         help="a role that it may have; may be repeated")  # fmt: skip
    approve.add_argument("--underlay", metavar="ADDRESS", type=_address, help="its address between hosts and edges")
    approve.add_argument("--max-vms", metavar="N", type=parsing.count_to(MAX_QUOTA_VMS), help="VMs that it may have")
    approve.add_argument("--max-ports", metavar="N", type=parsing.count_to(MAX_QUOTA_PORTS),
                         help="ports that its VMs may hold in all")  # fmt: skip
    approve.add_argument("--yes", action="store_true", help="approve what it asks for without a question")
    for name, summary, about in (
        ("revoke", "end a node's session and give it no other", _REVOKE_ABOUT),
        ("remove", "forget a node that holds nothing", _REMOVE_ABOUT),
        ("fence", "confirm that a node no longer forwards packets", _FENCE_ABOUT),
        ("unfence", "remove a fence: wait for the node's confirmations again", _UNFENCE_ABOUT),
    ):
        action = parsing.add_action(actions, name, summary, about=about)
        action.add_argument("node", metavar="NODE", help=_NODE)
        if name in _QUESTIONS:
            action.add_argument("--yes", action="store_true", help="do not ask; without a terminal nothing is asked")
    events = parsing.add_action(actions, "events", "print what became of nodes, and why", about=_EVENTS_ABOUT)
    events.add_argument("patterns", metavar="PATTERN", nargs="*", help="only nodes with such a name: 'host*'")
    events.add_argument("--event", metavar="EVENT", action="append", choices=NODE_EVENT_NAMES,
                        help=f"only this event; may be repeated: {', '.join(NODE_EVENT_NAMES)}")  # fmt: skip
    events.add_argument("--limit", metavar="N", type=parsing.count, help="the newest N lines (default: 100)")
    parsing.add_time(events)


def run(args: argparse.Namespace) -> int:
    """Carry out one action and print the node or nodes."""
    from cpm.api.operations import APPROVE, FENCE, NODE_EVENTS, REMOVE_NODE, REVOKE, UNFENCE

    manager = parsing.reader(args) if args.action in ("list", "events") else parsing.client(args)
    if args.action == "events":
        asked = {"node": args.patterns, "event": args.event, **parsing.time_of(args)}
        events = manager.call(NODE_EVENTS, limit=args.limit, **asked)
        return parsing.print_answer(args, events, lambda: render.table(EVENTS_HEADER, map(_event_row, events)))
    if args.action == "list":
        return _list(args, manager)
    if args.action == "show":
        view = _node(args.node, manager)
        return parsing.print_answer(args, view, lambda: _facts(view))
    if args.action == "remove":
        return _print(args, manager.call(REMOVE_NODE, name=args.node))
    if args.action == "approve":
        view = manager.call(APPROVE, _request(args, manager), name=args.node)
    else:
        if args.action in _QUESTIONS and not args.yes and asking.has_terminal():
            _ask(args.action, args.node)
        view = manager.call({"revoke": REVOKE, "fence": FENCE, "unfence": UNFENCE}[args.action], name=args.node)
    return parsing.print_answer(args, view, lambda: render.table(HEADER, [_row(view)]))


def _list(args: argparse.Namespace, manager: Client) -> int:
    from cpm.api.operations import LIST_NODES

    asked = {
        "match": args.patterns, "role": args.roles, "state": args.state, "after": args.after,
        "sort": args.sort if args.sort != "name" else None,
    }  # fmt: skip
    views = manager.call(LIST_NODES, limit=parsing.one_more(args.limit), **asked)
    views, more = parsing.page_of(views, args.limit, lambda view: view.name)
    return _print(args, views, more if args.sort == "name" else "")


def _print(args: argparse.Namespace, views: list[NodeView], more: str = "") -> int:
    """Print nodes, and below the table what is wrong."""
    warnings = [f"{view.name}: {render.cell(text)}\n" for view in views for text in _problems(view)]
    return parsing.print_table(args, views, render.Table(HEADER, map(_row, views)), *warnings, more)


def _ask(action: str, node: str) -> None:
    facts, question = _QUESTIONS[action]
    asking.confirm(
        f"{facts}\n", question.format(render.cell(node)), otherwise="nothing was changed", without_terminal="add --yes"
    )


def _request(args: argparse.Namespace, manager: Client) -> ApproveRequest:
    """
    Return what to approve: what is named, or what the node asks for and the operator confirms.

    :raise VirtPortsError: When the node asks for nothing, or the operator does not confirm.
    """
    from cpm.api.requests import ApproveRequest
    from cpm.protocol.model import Role

    if args.roles is not None or args.underlay is not None or args.max_vms is not None or args.max_ports is not None:
        roles = tuple(dict.fromkeys(map(Role, args.roles))) if args.roles is not None else None
        return ApproveRequest(roles, args.underlay, None, args.max_vms, args.max_ports)
    asks = _asked(args.node, manager)
    if not args.yes:
        _confirm(args.node, asks)
    return ApproveRequest(asks.roles, asks.underlay, asks.machine)


def _node(name: str, manager: Client) -> NodeView:
    from cpm.api.operations import LIST_NODES

    view = next((view for view in manager.call(LIST_NODES) if view.name == name), None)
    if view is None:
        raise NotFound("node", name, "see `virt-ports node list`")
    return view


def _facts(view: NodeView) -> str:
    headed = zip(HEADER, _row(view), strict=True)
    paths = [(at.interface, at.reason or "in force") for at in view.fast_path]
    return render.fields((
        *headed,
        *((("Version", view.version),) if view.version else ()),
        *((f"Fast path at {interface}", text) for interface, text in paths),
        *(("Problem", text) for text in _problems(view)),
    ))  # fmt: skip


def _asked(node: str, manager: Client) -> AskedView:
    from cpm.api.operations import LIST_NODES

    view = next((view for view in manager.call(LIST_NODES) if view.name == node), None)
    if view is None:
        remedy = "start its natd and wait some seconds, or say what it may be with --role and --underlay"
        raise NotFound("node", node, remedy)
    if view.asks is None:
        remedy = "see `virt-ports node list`, or say what it may be with --role and --underlay"
        if view.approval is not None:
            roles, underlay = ",".join(view.approval.roles), view.approval.underlay
            remedy = f"it is approved as {roles} at {underlay}; to change that, name --role and --underlay"
        raise NotFound("request of node", node, remedy)
    return view.asks


def _confirm(node: str, asks: AskedView) -> None:
    machine = f", machine {render.cell(asks.machine)}" if asks.machine else ""
    asking.confirm(
        f"{render.cell(f'{node} {asks.why}')}{machine}\n",
        f"approve {render.cell(node)} as {','.join(asks.roles)} at {asks.underlay}",
        otherwise="nothing was approved; run the command again and answer y, or name --role and --underlay",
        without_terminal="add --yes, or --role and --underlay",
    )


def _address(text: str) -> IPv4Address:
    from ipaddress import IPv4Address

    try:
        return IPv4Address(text)
    except ValueError:
        raise parsing.not_of_that_type(f"not an IPv4 address: {text!r}; write for example 172.30.0.13") from None


def _problems(view: NodeView) -> Iterator[str]:
    if view.trouble:
        yield view.trouble
    if view.held_ports and view.held_since is not None:
        yield (
            f"{view.held_ports} ports have waited for it since {render.moment(view.held_since)}: start its natd; or, "
            f"if it forwards nothing any more, `virt-ports node fence {view.name}`"
        )
    yield from view.warnings


def _event_row(view: NodeEventView) -> tuple[object, ...]:
    return render.moment(view.at), view.node, view.event, view.why


def _row(view: NodeView) -> tuple[object, ...]:
    generation = f"{view.applied}/{view.generation}"
    dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(view.dropped.items()) if count)
    state = node_state(view)
    painted = render.Painted(state, _COLOURS.get(state))
    # One that was never connected has no roles yet.
    roles = ",".join(view.roles or (view.approval.roles if view.approval is not None else ()))
    use = (_of(view.vms, view.max_vms), _of(view.ports, view.max_ports))
    return view.name, roles, view.underlay, painted, view.synced, generation, *use, dropped


def _of(number: int, most: int | None) -> str | None:
    return None if most is None and not number else f"{number}/{render.cell(most)}"


def _examples_of(action: str) -> str:
    return "\n".join(line for line in _EXAMPLES.splitlines() if f"node {action}" in line)
