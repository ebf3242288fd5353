"""``virt-ports node``: hosts and edges. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cpm.cli import parsing, render

if TYPE_CHECKING:
    from cpm.api.views import NodeView

HEADER = ("Name", "Roles", "Underlay", "State", "Synced", "Generation", "VMs", "Dropped")

_LIST_ABOUT = """\
States: connected; away; fenced; 'out of service' (an edge that hosts do not
use); 'not answering' (connected, and confirms nothing). 'Synced' is yes when
the node has confirmed everything it was sent; 'Generation' is the last one it
confirmed and the last one it was sent. 'Dropped' counts packets that an edge
dropped, by reason. Below the table is why a node is
out of service or does not answer, how many ports wait for it, and what a node
found to be wrong with its machine, for example that packets of its VMs leave by
a VPN and not to an edge."""

_FENCE_ABOUT = """\
Fence a node only after you have made sure that it no longer forwards packets:
it is off, or cut from the network. From then on cpmd does not wait for its
confirmation, and the ports of its VMs may be given to others. If you fence a
machine that still runs, one external port can have two owners. A node that is
connected can be fenced only while it does not answer. The fence ends when the
node connects again, or has confirmed everything that it was sent."""

_EXAMPLES = """\
  virt-ports node list
  virt-ports node fence host2      it is switched off: give its ports to others
  virt-ports node unfence host2    it was not dead: wait for it again"""

VERB = parsing.Verb(100, "list, fence and unfence hosts and edges", examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    actions = verb.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    parsing.add_action(actions, "list", "list the nodes", about=_LIST_ABOUT)
    fence = parsing.add_action(actions, "fence", "confirm that a node no longer forwards packets", about=_FENCE_ABOUT)
    fence.add_argument("node", metavar="NODE", help="name of the node, see `virt-ports node list`")
    unfence = parsing.add_action(actions, "unfence", "remove a fence: the node may serve again")
    unfence.add_argument("node", metavar="NODE", help="name of the node, see `virt-ports node list`")


def run(args: argparse.Namespace) -> int:
    """Carry out one action and print the node or nodes."""
    from cpm.api.operations import FENCE, LIST_NODES, UNFENCE

    manager = parsing.client(args)
    if args.action == "list":
        views = manager.call(LIST_NODES)
        return parsing.print_answer(args, views, lambda: _table(views))
    view = manager.call(FENCE if args.action == "fence" else UNFENCE, name=args.node)
    return parsing.print_answer(args, view, lambda: render.table(HEADER, [_row(view)]))


def _table(views: list[NodeView]) -> str:
    """Return the table, and below it what is wrong."""
    warnings = [f"{view.name}: {render.cell(text)}\n" for view in views for text in _problems(view)]
    return "".join([render.table(HEADER, map(_row, views)), *warnings])


def _problems(view: NodeView) -> Iterator[str]:
    if view.trouble:
        yield view.trouble
    if view.held_ports and view.held_since is not None:
        yield (
            f"{view.held_ports} ports have waited for it since {render.moment(view.held_since)}: start its natd; or, "
            f"if it forwards nothing any more, `virt-ports node fence {view.name}`"
        )
    yield from view.warnings


def _row(view: NodeView) -> tuple[object, ...]:
    generation = f"{view.applied}/{view.generation}"
    dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(view.dropped.items()) if count)
    roles = ",".join(view.roles)
    return view.name, roles, view.underlay, _state(view), view.synced, generation, view.domains, dropped


def _state(view: NodeView) -> str:
    if view.fenced:
        return "fenced"
    if not view.connected:
        return "away"
    if not view.in_service:
        return "out of service"
    return "connected" if view.answering else "not answering"
