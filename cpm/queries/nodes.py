"""
Queries for nodes and their state.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from cpm.api import handlers, operations
from cpm.api.views import NodeView
from cpm.core.manager import Manager
from cpm.protocol.model import Node, Role


@handlers.query(operations.LIST_NODES)
def node_views(manager: Manager) -> list[NodeView]:
    """Return all nodes with their state, in order of name."""
    return [node_view(manager, node) for _, node in sorted(manager.fleet.nodes.items())]


def node_view(manager: Manager, node: Node) -> NodeView:
    """Return one node with its state."""
    node_sync = manager.sessions.get(node.name)
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
    )
