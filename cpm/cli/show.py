"""``virt-ports show``: one VM with all we know."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from cpm.cli import parsing, render

if TYPE_CHECKING:
    from cpm.api.views import DomainDetail

HEADER = ("External address", "Ports", "State", "Connections", "Since")

_EXAMPLES = """\
  virt-ports show web1
  virt-ports show 6695eb01-f6a4-8304-79aa-97f2502e193f
  virt-ports show web1 -o json | jq .allocations"""

_ABOUT = """\
Ranges: 'active' is what new connections get; 'reserved' is on its way in;
'draining' serves the connections it still has; 'held' rests before its next
owner."""


def add_parser(subparsers: parsing.Subparsers) -> None:
    """Add the verb."""
    verb = parsing.add_verb(
        subparsers, "show", "show one VM: its ranges, its demand, the last decision", about=_ABOUT, examples=_EXAMPLES
    )
    verb.add_argument("vm", metavar="VM", help="name or UUID")


def run(args: argparse.Namespace) -> int:
    """Print the VM."""
    from cpm.api.client import path_of
    from cpm.api.views import DomainDetail

    detail = parsing.client(args).get(DomainDetail, path_of("domains", args.vm))
    if parsing.wants_json(args):
        render.emit_document(flat(render.plain(detail)))
    else:
        render.emit(_facts(detail) + "\n" + ranges(detail))
    return 0


def flat(detail: dict[str, Any]) -> dict[str, Any]:
    """Put what ``list`` says about a VM beside the rest, so that both verbs have the same keys."""
    return {**detail.pop("domain"), **detail}


def _facts(detail: DomainDetail) -> str:
    vm = detail.domain
    return render.fields((
        ("Name", vm.name),
        ("UUID", vm.uuid),
        ("State", vm.state),
        ("Node", vm.node),
        ("External address", vm.external_address),
        ("Ports", render.ports(vm.first_port, vm.last_port)),
        ("Ports in use", vm.ports_in_use),
        ("Internal address", detail.internal_address),
        *wishes(detail),
        ("Packets/s", detail.packets_per_s),
        ("Mbit/s", detail.megabits_per_s),
        ("New connections/s", detail.new_connections_per_s),
        ("Score", detail.score),
        ("Last decision", detail.decided),
    ))  # fmt: skip


def wishes(detail: DomainDetail) -> list[tuple[str, object]]:
    """Return what the VM shall have, with who said so, and what was said in vain."""
    known = [
        (wish.key.replace("-", " ").capitalize(), f"{_worded(wish.key, wish.value)} ({wish.origin})")
        for wish in detail.wishes
    ]
    return [*known, *(("Ignored", why) for why in detail.ignored)]


def _worded(key: str, value: float | str | None) -> str:
    if key in ("floor", "cap"):
        return f"{value} ports"
    if key == "drain-limit":
        return "never" if value is None else f"{value:g} s"
    return str(value)


def ranges(detail: DomainDetail) -> str:
    """Return what the VM holds, as a table."""
    return render.table(HEADER, (
        (each.external_address, render.ports(each.first_port, each.last_port), each.state, each.connections,
         render.moment(each.since))
        for each in detail.allocations
    ))  # fmt: skip
