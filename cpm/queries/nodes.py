"""
Queries for nodes and their state.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from types import MappingProxyType
from typing import Any, Final

from cpm.api import handlers, operations
from cpm.api.parameters import EVERYTHING, Patterns
from cpm.api.views import ApprovalView, AskedView, FastPathView, NodeEventView, NodeView
from cpm.core.journal import NodeEntry, Selection
from cpm.core.manager import Manager
from cpm.core.membership import Asked
from cpm.core.rollout.node_sync import NodeSync
from cpm.ledger import JournalReader
from cpm.protocol.errors import QuotaReached
from cpm.protocol.model import Approval, Node, NodeName, Role
from cpm.protocol.walltime import WallTime
from cpm.queries import node_states, pages
from cpm.queries.node_states import HeldUp

_ORDERS: Final[Mapping[str, Callable[[NodeView], Any]]] = MappingProxyType(
    {
        "name": lambda node: (),
        "state": lambda node: node.state,
        "vms": lambda node: -node.vms,
        "ports": lambda node: -node.ports,
    }
)


@handlers.query(operations.LIST_NODES)
def node_views(
    manager: Manager,
    now: float,
    match: Patterns = EVERYTHING,
    role: Set[str] = frozenset(),
    state: Set[str] = frozenset(),
    sort: str = "name",
    limit: int | None = None,
    after: tuple[str, str] | None = None,
) -> list[NodeView]:
    """
    Return the nodes with their state, in order of name; among them machines that only ask to be one.

    For the parameters see :data:`cpm.api.operations.LIST_NODES`.

    :raise InvalidRequest: When ``after`` is given with another order than that of names.
    """
    pages.check_order(sort, "name", after)
    views = (
        view
        for view in _every(manager, now)
        if match.fit(view.name)
        and (not role or not role.isdisjoint(_roles(view)))
        and pages.is_one_of(view.state, state)
        and (after is None or view.name > after[0])
    )
    return pages.page(views, lambda view: (_ORDERS[sort](view), view.name), limit)


def _roles(view: NodeView) -> tuple[Role, ...]:
    return view.roles or (view.approval.roles if view.approval is not None else ())


def _every(manager: Manager, now: float) -> list[NodeView]:
    held = node_states.held_up(manager, now)
    views = [_view(manager, node, held.get(node.name), now) for node in manager.fleet.nodes.values()]
    strangers = ((name, asked) for name, asked in manager.membership.asked.items() if name not in manager.fleet.nodes)
    return [*views, *(_stranger(manager, name, asked) for name, asked in strangers)]


@handlers.journal_query(operations.NODE_EVENTS)
def node_events(
    journal: JournalReader,
    limit: int,
    node: Patterns,
    event: Set[str],
    begin: WallTime | None,
    end: WallTime | None,
    before: int | None,
) -> list[NodeEventView]:
    """
    Return the newest entries of the record of nodes, oldest first.

    For the parameters see :data:`cpm.api.operations.NODE_EVENTS`.

    :raise LedgerError: When the ledger cannot be read.
    """
    fits = lambda entry: node.fit(entry.node) and (not event or entry.event in event)  # noqa: E731
    return event_views(journal.node_events(limit, Selection(before, begin, end, fits)))


def event_views(entries: Iterable[NodeEntry]) -> list[NodeEventView]:
    """Return entries of the record of nodes as views."""
    return [NodeEventView(each.seq, each.at.seconds, each.node, each.event, each.why) for each in entries]


def node_view(manager: Manager, node: Node, now: float) -> NodeView:
    """Return one node with its state."""
    return _view(manager, node, node_states.held_up(manager, now).get(node.name), now)


def _view(manager: Manager, node: Node, held: HeldUp | None, now: float) -> NodeView:
    node_sync = manager.sessions.get(node.name)
    behind_since = manager.edge_service.behind_since(node.name)
    is_host = Role.HOST in node.roles or (node.approval is not None and Role.HOST in node.approval.roles)
    quota = manager.quota(node)
    asked = manager.membership.asked.get(node.name)
    return NodeView(
        node.name,
        tuple(sorted(node.roles)),
        node.underlay,
        connected=node_sync is not None,
        in_service=node.in_service if Role.EDGE in node.roles else node_sync is not None,
        fenced=node.fenced,
        synced=node_sync is not None and node_sync.synced and node_sync.applied == node_sync.generation,
        generation=node_sync.generation if node_sync else 0,
        applied=node_sync.applied if node_sync else 0,
        domains=len(manager.running.on(node.name)),
        dropped=node_sync.dropped if node_sync else {},
        answering=manager.edge_service.is_answering(node.name, now),
        behind_since=manager.fleet.utc(behind_since) if behind_since is not None else None,
        trouble=node_states.trouble(manager, node, now),
        held_ports=held.ports if held is not None else 0,
        held_since=manager.fleet.utc(held.since) if held is not None else None,
        warnings=tuple(_warnings(manager, node, node_sync, now)),
        approval=_approval(node.approval) if node.approval is not None else None,
        asks=_asked(manager, asked) if asked is not None else None,
        machine=node.machine,
        vms=manager.fleet.use.vms(node.name),
        max_vms=quota.vms if is_host else None,
        ports=manager.fleet.use.ports(node.name),
        max_ports=quota.ports if is_host else None,
        version=node_sync.version if node_sync is not None else "",
        fast_path=_fast_path(node_sync) if node_sync is not None else (),
    )


def _warnings(manager: Manager, node: Node, node_sync: NodeSync | None, now: float) -> Iterator[str]:
    if (refused := manager.refused.sentences.get(node.name)) is not None:
        yield refused
    yield from node_states.refusals(manager, node.name)
    yield from node_states.refused_vms(manager, node.name, now)
    if silence := manager.silence.words(node.name, now):
        yield silence
    if node_sync is not None:
        if node_sync.is_over_quota:
            error = QuotaReached(node.name, "vms", manager.quota(node).vms)
            yield f"it has VMs without ports: {error}"
        yield from node_sync.warnings


def _fast_path(node_sync: NodeSync) -> tuple[FastPathView, ...]:
    return tuple(FastPathView(at.interface, at.reason) for at in node_sync.fast_path)


def _stranger(manager: Manager, name: NodeName, asked: Asked) -> NodeView:
    return NodeView(
        name,
        tuple(sorted(asked.roles)),
        asked.underlay,
        connected=False,
        in_service=False,
        fenced=False,
        synced=False,
        generation=0,
        applied=0,
        domains=0,
        warnings=tuple(node_states.refusals(manager, name)),
        asks=_asked(manager, asked),
        is_known=False,
    )


def _asked(manager: Manager, asked: Asked) -> AskedView:
    return AskedView(
        tuple(sorted(asked.roles)), asked.underlay, asked.machine, manager.fleet.utc(asked.since), asked.why
    )


def _approval(approval: Approval) -> ApprovalView:
    return ApprovalView(tuple(sorted(approval.roles)), approval.underlay)
