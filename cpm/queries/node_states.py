"""
What is wrong with nodes: those that do not confirm what they were sent, and what waits for them. Pure.

Tested in ``tests/unit/site/test_edge_service.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Final

from cpm.core.manager import Manager
from cpm.core.rollout.node_sync import RefusedSince
from cpm.core.spans import span
from cpm.protocol.model import Allocation, DomainUUID, Node, NodeName, Role

_NAMED: Final = 5
"""VMs that a node's problems name."""
_AWAY: Final = "its natd has ended, or does not reach cpmd; see `systemctl status natd` there"
_HERE: Final = "it is connected, and gets a session when the ledger is restored; see `virt-ports status`"


@dataclasses.dataclass(frozen=True, slots=True)
class HeldUp:
    """Ports that were given back and that nobody else gets, because one node has not confirmed it."""

    ports: int
    since: float
    """Ledger time; of the first of them."""


def trouble(manager: Manager, node: Node, now: float) -> str:
    """Return why an edge is out of service, or a node is away or does not answer, as a sentence; empty: all is well."""
    if not node.roles:
        return "it has not connected yet"
    if manager.restoring is not None and not node.fenced and node.approval is not None:
        is_here = node.name in manager.restoring.hellos
        return _HERE if is_here else "it has not connected since the ledger was restored"
    service = manager.edge_service
    is_out = Role.EDGE in node.roles and not node.in_service
    if node.fenced or node.approval is None or (service.is_answering(node.name, now) and not is_out):
        return ""
    head, end = ("out of service: ", "; let the router outside send it no packets") if is_out else ("", "")
    remedy = "" if node.name in manager.sessions else f": {_AWAY}"
    return f"{head}it {service.lateness(node.name, now)}{remedy}{end}"


def held_up(manager: Manager, now: float) -> Mapping[NodeName, HeldUp]:
    """Return what the nodes hold up that are away or do not answer."""
    found: dict[NodeName, HeldUp] = {}
    for allocation in manager.fleet.leaving.values():
        since, names = waits_for(manager, allocation, now)
        for name in names:
            before = found.get(name, HeldUp(0, since))
            found[name] = HeldUp(before.ports + allocation.ports.size, min(before.since, since))
    return found


def waits_for(manager: Manager, leaving: Allocation, now: float) -> tuple[float, tuple[NodeName, ...]]:
    """
    Return which nodes a range that leaves waits for that are away or do not answer, and since when.

    A node that answers confirms within moments, and is not named unless its kernel refuses the VM.
    """
    service = manager.edge_service
    since, names = manager.lacking(leaving, now)
    refusing = {name: why.since for name in names if (why := _refused(manager, name).get(leaving.domain)) is not None}
    late = tuple(name for name in names if name in refusing or not service.is_answering(name, now))
    begun = [at for name in late if (at := refusing.get(name, service.behind_since(name))) is not None]
    return max(since, min(begun, default=since)), late


def _refused(manager: Manager, name: NodeName) -> Mapping[DomainUUID, RefusedSince]:
    session = manager.sessions.get(name)
    return session.refused if session is not None else {}


def refused_vms(manager: Manager, name: NodeName, now: float) -> Iterator[str]:
    """Yield which VMs the kernel of a node refuses, and why; to be read after the name."""
    refused = sorted(_refused(manager, name).items(), key=lambda item: item[1].since)
    for uuid, why in refused[:_NAMED]:
        vm = manager.fleet.vms.get(uuid)
        lasts = span(max(0.0, now - why.since))
        yield f"its kernel has refused VM {vm.name if vm is not None else uuid} for {lasts}: {why.reason}"
    if len(refused) > _NAMED:
        yield f"its kernel refuses {len(refused) - _NAMED} more VMs"


def refused_at(manager: Manager, uuid: DomainUUID) -> str:
    """Return which nodes' kernels refuse a VM, and why, as a sentence; empty: none does."""
    found = {
        name: why.reason
        for name, session in manager.sessions.items()
        if session.refused and (why := session.refused.get(uuid)) is not None
    }
    if not found:
        return ""
    name, reason = next(iter(sorted(found.items())))
    return f"refused by the kernel of {', '.join(sorted(found))}: {reason}; see `journalctl -u natd` on {name}"


def problems(manager: Manager, now: float) -> Iterator[str]:
    """Yield what holds the site up, a sentence each, in order of nodes."""
    if manager.restoring is not None:
        yield (
            "the ledger was restored: no range changes, and no VM gets ports, until every edge has said what it holds "
            f"and the hold-down has passed; cpmd waits for {manager.restoring.waits_for(now)}"
        )
        if manager.restoring.missing():
            yield "an edge that forwards nothing any more need not be waited for: `virt-ports node fence NODE`"
        for name in manager.restoring.unknown():
            yield f"{name} is an edge that is later than this ledger: `virt-ports node approve {name}` first"
    yield from manager.refused.sentences.values()
    if manager.restoring is None and (why := manager.fleet.why_no_new):
        is_said = why in manager.refused.sentences.values()
        yield "therefore no VM gets new ports" if is_said else f"no VM gets new ports: {why}"
    held, nodes = held_up(manager, now), manager.fleet.nodes
    for name in sorted({*nodes, *manager.membership.asked}):
        # While the ledger is being restored, no node has a session.
        if name in nodes and manager.restoring is None and (why := trouble(manager, nodes[name], now)):
            yield f"{name}: {why}"
        if name in held and manager.restoring is None:
            yield held_text(name, held[name], now)
        yield from (f"{name}: {why}" for why in refusals(manager, name))
        yield from (f"{name}: {why}" for why in refused_vms(manager, name, now))
        if silence := manager.silence.words(name, now):
            yield f"{name}: {silence}"


def refusals(manager: Manager, name: NodeName) -> Iterator[str]:
    """Yield which machines of that name are refused, and what to do; to be read after the name."""
    if (asked := manager.membership.asked.get(name)) is not None:
        yield f"{asked.why}; if it may: `virt-ports node approve {name}`"
    if (second := manager.membership.seconds.get(name)) is not None:
        yield (
            f"a second machine, {second.peer}, says that it is {name}, and is refused; "
            "give it another name and certificate"
        )


def held_text(name: NodeName, held: HeldUp, now: float) -> str:
    """Return what a node holds up and what to do, as a sentence."""
    return (
        f"{held.ports} ports that were given back have waited {span(max(0.0, now - held.since))} for {name}: start "
        f"its natd; or, if it forwards nothing any more, `virt-ports node fence {name}` (and `node remove`, if it is "
        "gone for good)"
    )
