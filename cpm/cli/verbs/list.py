"""``virt-ports list``: VMs with their ports. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cpm.cli import parsing, render

if TYPE_CHECKING:
    from cpm.api.views import DomainView

HEADER = ("Name", "UUID", "Node", "External address", "Ports", "In use", "State")

_EXAMPLES = """\
  virt-ports list                  VMs that have ports or wait for some
  virt-ports list --all            also those that are gone and whose ports are not free yet
  virt-ports list --node host1     those on one host
  virt-ports list -o json | jq -r '.[] | select(.state=="waiting").name'"""

_ABOUT = """\
States: active; starting (being programmed); growing; waiting (no ports are
available); claimed (another host says that it runs there, too; see 'show');
misrouted (its packets do not go where they should; see 'show'); unreachable
(its host is not connected; its traffic goes on); gone; not managed, with the
reason: it gets no ports. 'leaving' says why a VM gets other ports than it
holds: a machine uses some of them itself.
'In use' counts ports of the active range; '-' means not measured yet."""

VERB = parsing.Verb(10, "list VMs and their ports", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("--all", action="store_true", help="also VMs that are gone and whose ports are not free yet")
    verb.add_argument("--node", metavar="NODE", help="only VMs on this host")


def run(args: argparse.Namespace) -> int:
    """Print the VMs."""
    from cpm.api.operations import LIST_VMS

    views = parsing.client(args).call(LIST_VMS, all=args.all)
    if args.node is not None:
        views = [view for view in views if view.node == args.node] or _no_vms_on(args)
    return parsing.print_answer(args, views, lambda: render.table(HEADER, map(_row, views)))


def _row(view: DomainView) -> tuple[object, ...]:
    ports = render.ports(view.first_port, view.last_port)
    return view.name, view.uuid, view.node, view.external_address, ports, view.ports_in_use, _state(view)


def _state(view: DomainView) -> str:
    problem = view.problem.split(";")[0]
    state = f"{view.state}: {problem}" if problem and view.state in {"gone", "misrouted", "not managed"} else view.state
    return f"{state}, leaving: {view.leaving}" if view.leaving else state


def _no_vms_on(args: argparse.Namespace) -> list[DomainView]:
    """
    Return no VMs.

    :raise NotFound: When there is no such host: its name may be misspelt.
    """
    from cpm.api.operations import LIST_NODES
    from cpm.protocol.errors import NotFound

    if not any(node.name == args.node for node in parsing.client(args).call(LIST_NODES)):
        raise NotFound("node", args.node, "see `virt-ports node list`")
    return []
