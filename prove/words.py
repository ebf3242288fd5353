"""What messages, changes and entries say, in a few words: for transcripts."""

from __future__ import annotations

from collections.abc import Iterable

from cpm.core.changes import AddAllocation, Change, DropVM, FreeAllocation, MoveAllocation, Notice, PutNode, PutVM
from cpm.protocol.intent import EdgeIntent, HostIntent
from cpm.protocol.messages import (
    Applied,
    Attach,
    Declined,
    Delta,
    Detach,
    Freed,
    Hello,
    ManagerMessage,
    MapPorts,
    MapRefused,
    Need,
    NodeMessage,
    Presence,
    Present,
    Refused,
    Rejected,
    Report,
    Snapshot,
    UnmapPorts,
)
from cpm.protocol.model import DomainUUID

_MAYBE_OTHERS = ", and maybe others"


def vm(uuid: DomainUUID) -> str:
    """Return the short name of a VM."""
    return f"vm{uuid[-1:]}"


def message(sent: NodeMessage | ManagerMessage) -> str:
    """Return what a message says."""
    match sent:
        case Hello(domains=domains, epoch=epoch, is_partial=is_partial):
            return f"Hello (epoch {epoch} seen): {_vms(domains)}{_MAYBE_OTHERS * is_partial}"
        case Present(domains=domains, is_partial=is_partial):
            return f"Present: {_vms(domains)}{_MAYBE_OTHERS * is_partial}"
        case Attach(uuid, incoming=incoming):
            return f"Attach {vm(uuid)}{' incoming' if incoming else ''}"
        case Detach(uuid, reason):
            return f"Detach {vm(uuid)}: {reason}"
        case Applied(epoch, generation):
            return f"Applied {epoch}.{generation}"
        case Rejected(epoch, generation, code):
            return f"Rejected {epoch}.{generation}: {code}"
        case Report(generation, vms=vms):
            counts = ", ".join(
                f"{vm(each.domain)} {each.ports_in_use} in use"
                + "".join(f", {d.ports} draining {d.connections}" for d in each.draining)
                for each in vms
            )
            return f"Report under generation {generation}: {counts or 'no VMs'}"
        case Need(uuid, ports, in_use):
            return f"Need {vm(uuid)}: {in_use} of {ports} in use"
        case MapPorts(uuid, _, to, protocol, lifetime_s):
            return f"MapPorts {vm(uuid)}: {protocol} {to} for {lifetime_s} s"
        case UnmapPorts(uuid, _, to, protocol):
            return f"UnmapPorts {vm(uuid)}: {protocol} {to}"
        case MapRefused(_, uuid, _, to, protocol, why):
            return f"MapRefused {vm(uuid)}: {protocol} {to} {why}"
        case Snapshot(epoch, generation, host=host, edge=edge):
            return f"Snapshot {epoch}.{generation}: {_intents(host, edge)}"
        case Delta(epoch, generation, host=host, edge=edge, host_gone=host_gone, edge_gone=edge_gone):
            gone = "".join(f" without {vm(uuid)}" for uuid in (*host_gone, *edge_gone))
            return f"Delta {epoch}.{generation}: {_intents(host, edge)}{gone}"
        case Refused(_, uuid, code):
            return f"Refused {vm(uuid)}: {code}"
        case Declined(_, uuid) | Freed(_, uuid):
            return f"{type(sent).__name__} {vm(uuid)}"
    return type(sent).__name__


def change(made: Change) -> str:
    """Return what a change of the ledger does."""
    match made:
        case AddAllocation(a):
            return f"{vm(a.domain)} gets #{a.id} {a.external}:{a.ports} on {a.node}, {a.state}"
        case MoveAllocation(number, (before, state), after, now):
            return f"#{number} {before} {state} -> {after} {now}"
        case FreeAllocation(number, (ports, state), taken_over=taken_over):
            return f"#{number} {ports} {state} -> {'taken over' if taken_over else 'free'}"
        case PutVM(one):
            to = f", migrates to {one.destination}" if one.destination else ""
            return f"{vm(one.uuid)} is on {one.node}{to}"
        case DropVM(uuid):
            return f"{vm(uuid)} is dropped"
        case PutNode(node):
            states = [word for word, is_so in (("in service", node.in_service), ("fenced", node.fenced)) if is_so]
            return f"{node.name} is {' and '.join(states) or 'not in service'}"
        case Notice(number, event):
            return f"#{number}: {event}"
    return type(made).__name__


def edge_intent(held: EdgeIntent | None) -> str:
    """Return the ranges that an edge maps to a VM."""
    return "+".join(f"{each.external}:{each.ports}" for each in held.ranges) if held is not None else "nothing"


def _intents(host: Iterable[HostIntent], edge: Iterable[EdgeIntent]) -> str:
    here = [f"{vm(each.domain)} uses {each.ports}" + "".join(f", {d} drains" for d in each.draining) for each in host]
    return "; ".join([*here, *(f"map {edge_intent(each)} to {vm(each.domain)}" for each in edge)]) or "nothing"


def _vms(domains: Iterable[Presence]) -> str:
    return ", ".join(vm(each.domain) for each in domains) or "no VMs"
