"""``virt-ports show``: everything known of one VM. Tested in ``tests/unit/cpm/cli/test_verbs.py``."""

from __future__ import annotations

from cpm.cli import parsing, render

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from cpm.api.views import DomainDetail, GuestAgentView

HEADER = ("External address", "Ports", "State", "Connections", "Since")

_EXAMPLES = """\
  virt-ports show web1
  virt-ports show 6695eb01-f6a4-8304-79aa-97f2502e193f
  virt-ports show web1 -o json | jq .allocations"""

_ABOUT = """\
Ranges: 'active' is used by new connections; 'reserved' is being programmed;
'draining' is used by the connections it still has; 'held' is in its hold-down
and then free. 'Guest says' is what the guest agent reports; no decision depends
on it."""

VERB = parsing.Verb(20, "show one VM: its ranges, its demand, the last decision", about=_ABOUT, examples=_EXAMPLES)


def add_arguments(verb: parsing.Parser) -> None:
    """Add the verb's arguments."""
    verb.add_argument("vm", metavar="VM", help="name or UUID")


def run(args: argparse.Namespace) -> int:
    """Print the VM."""
    from cpm.api.operations import SHOW_VM

    detail = parsing.reader(args).call(SHOW_VM, name=args.vm)
    return parsing.print_answer(args, flat(detail), lambda: _facts(detail) + "\n" + ranges(detail))


def flat(detail: DomainDetail) -> dict[str, Any]:
    """Return a VM for JSON, with the keys of ``list`` on the top level, so that both verbs have the same keys."""
    plain = render.plain(detail)
    return {**plain["domain"], **{key: value for key, value in plain.items() if key != "domain"}}


def _facts(detail: DomainDetail) -> str:
    vm = detail.domain
    return render.fields((
        ("Name", vm.name),
        ("UUID", vm.uuid),
        ("State", vm.state),
        *((("Problem", vm.problem),) if vm.problem else ()),
        ("Node", vm.node),
        *((("Claimed by", f"{detail.claimed_by}, which says that it runs there"),) if detail.claimed_by else ()),
        *((("Leaving", vm.leaving),) if vm.leaving else ()),
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
        *((("Refused at its cap", f"{detail.refused_packets} attempts"),) if detail.refused_packets else ()),
        *((("Stopped by its limits", f"{detail.limited_packets} packets"),) if detail.limited_packets else ()),
        *guest(detail.guest),
    ))  # fmt: skip


def wishes(detail: DomainDetail) -> list[tuple[str, object]]:
    """Return the wishes in effect, with their origin, and those that are ignored."""
    known = [(_label(wish.key), f"{_wish_text(wish.key, wish.value)} ({wish.origin})") for wish in detail.wishes]
    return [*known, *(("Ignored", why) for why in detail.ignored)]


def guest(view: GuestAgentView | None) -> list[tuple[str, object]]:
    """Return the facts that the guest agent reports, and the range that was sent to it."""
    if view is None:
        return [("Guest agent", "not asked yet")]
    why = f": {view.why}" if view.why else ""
    state = ("Guest agent", f"{view.state}, since {render.moment(view.since)}{why}")
    if view.state != "answering":
        return [state]
    announced = render.ports(view.first_port, view.last_port)
    return [
        state,
        ("Guest says", _figures(view)),
        ("Guest was told", f"{view.external_address} {announced}" if announced is not None else None),
    ]


def _figures(view: GuestAgentView) -> str:
    figures = (
        (view.connections, "TCP sockets"), (view.established, "connections established"),
        (view.rx_bytes, "bytes received"), (view.tx_bytes, "bytes sent"),
    )  # fmt: skip
    return ", ".join(f"{figure} {what}" for figure, what in figures if figure is not None)


def _label(key: str) -> str:
    return "PCP" if key == "pcp" else key.replace("-", " ").capitalize()


def _wish_text(key: str, value: float | str | None) -> str:
    if key in ("floor", "cap"):
        return f"{value} ports"
    if key == "pcp":
        return f"{value} ports" if value else "off"
    if key == "drain-limit":
        return "never" if value is None else f"{value:g} s"
    if key == "address" and value is None:
        return "any of the pool"
    return f"{value}/s" if key == "connection-rate" else str(value)


def ranges(detail: DomainDetail) -> str:
    """Return the VM's ranges as a table."""
    return render.table(HEADER, (
        (each.external_address, render.ports(each.first_port, each.last_port), each.state, each.connections,
         render.moment(each.since))
        for each in detail.allocations
    ))  # fmt: skip
