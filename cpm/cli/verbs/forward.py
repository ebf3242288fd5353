"""``virt-ports forward``: what is let in to VMs from outside. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.cli import parsing, render
from cpm.protocol.errors import InvalidRequest

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from cpm.api.views import ForwardView

HEADER = ("External address", "Ports", "Protocol", "Name", "Node", "To", "Kept", "From", "State")

_EXAMPLES = """\
  virt-ports forward add web1 22                      any free port to the guest's port 22
  virt-ports forward add web1 22 --port 2222
  virt-ports forward add web1 443 --port 443 --address 203.0.113.1
  virt-ports forward add game1 8000-8010 --protocol both --port 8000-8010
  virt-ports forward add web1 53 --protocol udp --to 192.168.122.5
  virt-ports forward list
  virt-ports forward list 'web*' --state active
  virt-ports forward remove web1 2222"""

_ABOUT = """\
A forward lets connections from outside in to a VM, on ports of an external
address. These ports stay the VM's until you remove the forward: while its range
grows, shrinks or moves, and while the VM is stopped. The VM sees the client's
address."""

_ADD_ABOUT = """\
PORT is the guest's port, or a range of them like 8000-8010. Without --port, free
ports are chosen on the VM's external address. Ports below 1024 are only given by
number. The guest's address is the one that libvirt has leased to it, else the
one that its guest agent says, else the one that it is seen to use, and is
followed when it changes; --to names another. It must be in a network of the VM's
bridge, and not the host's own.

A forward that the VM has already stays as it is. If a port is not free, the
error says who has it, and until when."""

_REMOVE_ABOUT = """\
PORT is the external port, or a range: all forwards within it are removed.
Connections that are open stay; the ports are free when the last one has ended
and the hold-down has passed."""

_LIST_ABOUT = """\
States: starting (being programmed); active; resting (the VM does not run; its
ports stay its own); leaving (removed, and its ports are not free yet). 'From'
says who asked for it: 'set' (this command), 'metadata' (the domain's XML) or
'pcp' (the guest). 'To' has the guest's address as it is known, and by what: a
'lease' of libvirt's, the guest 'agent', or 'seen' on its bridge.

If one is active and nothing arrives, run `virt-ports doctor` on the VM's host: it
names filters of others that reject it, such as those of libvirt's NAT networks
and Docker's, with the line that lets it pass."""

_STATES = ("starting", "active", "resting", "leaving")
_COLOURS = {
    "active": render.Colour.GREEN,
    "starting": render.Colour.CYAN,
    "resting": render.Colour.GREY,
    "leaving": render.Colour.GREY,
}

VERB = parsing.Verb(65, "let connections from outside in to VMs", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    actions = verb.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    add = parsing.add_action(
        actions, "add", "let connections in to a VM", about=_ADD_ABOUT, examples=_examples_of("add")
    )
    add.add_argument("vm", metavar="VM", help="name or UUID")
    add.add_argument("guest_ports", metavar="PORT", help="port of the guest, or FIRST-LAST")
    add.add_argument("--protocol", choices=("tcp", "udp", "both"), default="tcp", help="what to let in (default: tcp)")
    add.add_argument("--port", metavar="PORT", help="external port, or FIRST-LAST with as many ports")
    add.add_argument("--address", metavar="ADDRESS", help="external address (default: the VM's)")
    add.add_argument("--to", metavar="GUEST-ADDRESS", help="address of the guest (default: found on its host)")
    add.add_argument("--keep", action="store_true", help="it stays the VM's while the VM does not run (default)")
    add.add_argument("--no-keep", action="store_true", help="it ends when the VM ends")
    remove = parsing.add_action(
        actions, "remove", "remove forwards of a VM", about=_REMOVE_ABOUT, examples=_examples_of("remove")
    )
    remove.add_argument("vm", metavar="VM", help="name or UUID")
    remove.add_argument("ports", metavar="PORT", help="external port, or FIRST-LAST")
    remove.add_argument("--address", metavar="ADDRESS", help="only on this external address")
    shown = parsing.add_action(actions, "list", "list what is let in", about=_LIST_ABOUT, examples=_examples_of("list"))
    shown.add_argument("patterns", metavar="PATTERN", nargs="*", help="only of VMs with such a name or UUID: 'web*'")
    shown.add_argument("--node", metavar="NODE", help="only of VMs on this host")
    shown.add_argument("--address", metavar="ADDRESS", help="only on this external address")
    shown.add_argument("--state", metavar="STATE", action="append", choices=_STATES,
                       help=f"only in this state; may be repeated: {', '.join(_STATES)}")  # fmt: skip
    shown.add_argument("--limit", metavar="N", type=parsing.count_from_1, help="at most this many")


def run(args: argparse.Namespace) -> int:
    """
    Carry out one action; print forwards.

    :raise InvalidRequest: When an address or a port is invalid.
    """
    try:
        if args.action == "add":
            view = _add(args)
            return parsing.print_answer(args, view, lambda: render.table(HEADER, [_row(view)]))
        views = _list(args) if args.action == "list" else _remove(args)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return parsing.print_table(args, views, render.Table(HEADER, map(_row, views)))


def _add(args: argparse.Namespace) -> ForwardView:
    from cpm.api.operations import ADD_FORWARD
    from cpm.api.requests import ForwardRequestBody
    from cpm.protocol.model import ForwardProtocol, PortRange

    if args.keep and args.no_keep:
        raise InvalidRequest("it is kept or not; use --keep or --no-keep")
    request = ForwardRequestBody(
        guest_ports=PortRange.parse(args.guest_ports),
        ports=None if args.port is None else PortRange.parse(args.port),
        address=parsing.address_of(args.address),
        protocol=ForwardProtocol(args.protocol),
        guest_address=parsing.address_of(args.to),
        kept=not args.no_keep,
    )
    return parsing.client(args).call(ADD_FORWARD, request, name=args.vm)


def _remove(args: argparse.Namespace) -> list[ForwardView]:
    from cpm.api.operations import REMOVE_FORWARDS
    from cpm.api.requests import ForwardRemoval
    from cpm.protocol.model import PortRange

    request = ForwardRemoval(PortRange.parse(args.ports), parsing.address_of(args.address))
    return parsing.client(args).call(REMOVE_FORWARDS, request, name=args.vm)


def _list(args: argparse.Namespace) -> list[ForwardView]:
    from cpm.api.operations import LIST_FORWARDS

    asked = {"match": args.patterns, "node": args.node, "address": parsing.address_of(args.address)}
    return parsing.reader(args).call(LIST_FORWARDS, state=args.state, limit=args.limit, **asked)


def _row(view: ForwardView) -> tuple[object, ...]:
    ports = render.ports(view.first_port, view.last_port)
    size = view.last_port - view.first_port
    to = render.ports(view.guest_port, view.guest_port + size)
    where = f"{view.guest_address}:{to}" if view.guest_address is not None else to
    if view.guest_address_from not in ("", "option"):
        where = f"{where} ({view.guest_address_from})"
    state = f"{view.state}: {view.problem.split(';')[0]}" if view.problem else view.state
    return (
        view.external_address, ports, view.protocol, view.name, view.node, where, "yes" if view.kept else "no",
        view.origin, render.Painted(state, _COLOURS.get(view.state)),
    )  # fmt: skip


def _examples_of(action: str) -> str:
    return "\n".join(line for line in _EXAMPLES.splitlines() if f"forward {action}" in line)
