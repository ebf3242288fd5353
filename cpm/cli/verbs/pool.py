"""``virt-ports pool``: the external addresses VMs share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from cpm.cli import addresses, parsing, render
from cpm.protocol.errors import InvalidRequest

if TYPE_CHECKING:
    from cpm.api.views import AddressView

HEADER = ("Address", "Ports", "Allocated", "Leaving", "Longest free", "VMs", "Reserved")

_EXAMPLES = """\
  virt-ports pool list
  virt-ports pool add 203.0.113.1
  virt-ports pool add 203.0.113.0/29 --reserved 5060,8000-8100
  virt-ports pool remove 203.0.113.4"""

_ADD_ABOUT = """\
ADDRESS is one address, a range like 203.0.113.1-203.0.113.4, or a network like
203.0.113.0/29 (all of it, first and last included). The addresses must be
routed to the edges; ports below 1024 are never handed out."""

_LIST_ABOUT = """\
'Allocated' ports are active or reserved, 'Leaving' ones are draining or in their
hold-down; 'Longest free' is the largest range a VM could get."""

VERB = parsing.Verb(90, "list, add and remove external addresses", examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    actions = verb.add_subparsers(title="actions", dest="action", metavar="ACTION", required=True)
    parsing.add_action(actions, "list", "list the addresses and what is free on them", about=_LIST_ABOUT)
    add = parsing.add_action(actions, "add", "add addresses", about=_ADD_ABOUT, examples=_examples_of("add"))
    add.add_argument("addresses", metavar="ADDRESS", nargs="+", help="address, range or network")
    add.add_argument("--reserved", metavar="PORTS", help="never hand out these ports, for example 5060,8000-8100")
    remove = parsing.add_action(
        actions, "remove", "remove addresses on which no VM holds ports", examples=_examples_of("remove")
    )
    remove.add_argument("addresses", metavar="ADDRESS", nargs="+", help="address, range or network")


def run(args: argparse.Namespace) -> int:
    """Carry out one action and print the addresses of the pool."""
    try:
        views = _ACTIONS[args.action](args)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return parsing.answer(args, views, lambda: render.table(HEADER, map(_row, views)))


def _list(args: argparse.Namespace) -> list[AddressView]:
    from cpm.api.operations import LIST_POOL

    return parsing.client(args).call(LIST_POOL)


def _add(args: argparse.Namespace) -> list[AddressView]:
    from cpm.api.operations import ADD_TO_POOL
    from cpm.api.views import PoolRequest

    reserved = () if args.reserved is None else addresses.parse_reserved(args.reserved)
    request = PoolRequest(addresses=addresses.parse(args.addresses), reserved=reserved)
    return parsing.client(args).call(ADD_TO_POOL, request)


def _remove(args: argparse.Namespace) -> list[AddressView]:
    from cpm.api.operations import REMOVE_FROM_POOL

    left: list[AddressView] = []
    for address in addresses.parse(args.addresses):
        left = parsing.client(args).call(REMOVE_FROM_POOL, address=address)
    return left


_ACTIONS = {"list": _list, "add": _add, "remove": _remove}


def _row(view: AddressView) -> tuple[object, ...]:
    reserved = ",".join(str(part) if part.size > 1 else str(part.first) for part in view.reserved)
    return (
        view.address, view.ports_total, view.ports_allocated, view.ports_leaving, view.longest_free, view.domains,
        reserved,
    )  # fmt: skip


def _examples_of(action: str) -> str:
    return "\n".join(line for line in _EXAMPLES.splitlines() if f"pool {action}" in line)
