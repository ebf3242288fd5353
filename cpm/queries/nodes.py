"""
Queries for nodes and their state.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from cpm.api import handlers, operations
from cpm.api.views import NodeView
from cpm.core.manager import Manager
from cpm.protocol.model import Node, Role
from cpm.queries import node_states
from cpm.queries.node_states import HeldUp


@handlers.query(operations.LIST_NODES)
def node_views(manager: Manager, now: float) -> list[NodeView]:
    """Return all nodes with their state, in order of name."""
    held = node_states.held_up(manager, now)
    return [_view(manager, node, held.get(node.name), now) for _, node in sorted(manager.fleet.nodes.items())]


def node_view(manager: Manager, node: Node, now: float) -> NodeView:
    """Return one node with its state."""
    return _view(manager, node, node_states.held_up(manager, now).get(node.name), now)


def _view(manager: Manager, node: Node, held: HeldUp | None, now: float) -> NodeView:
    node_sync = manager.sessions.get(node.name)
    behind_since = manager.edge_service.behind_since(node.name)
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
        warnings=node_sync.warnings if node_sync else (),
        answering=manager.edge_service.is_answering(node.name, now),
        behind_since=manager.fleet.utc(behind_since) if behind_since is not None else None,
        trouble=node_states.trouble(manager, node, now),
        held_ports=held.ports if held is not None else 0,
        held_since=manager.fleet.utc(held.since) if held is not None else None,
    )
