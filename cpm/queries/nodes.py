"""
Queries for nodes: all of them, each with its state.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from cpm.api import handlers, operations
from cpm.api.views import NodeView
from cpm.core.manager import Manager
from cpm.protocol.model import Node, Role


@handlers.query(operations.LIST_NODES)
def nodes(manager: Manager) -> list[NodeView]:
    """Return the nodes in order of name."""
    return [node(manager, item) for _, item in sorted(manager.fleet.nodes.items())]


def node(manager: Manager, item: Node) -> NodeView:
    """Return one node."""
    session = manager.sessions.get(item.name)
    return NodeView(
        item.name,
        tuple(sorted(item.roles)),
        item.underlay,
        connected=session is not None,
        in_service=item.in_service if Role.EDGE in item.roles else session is not None,
        fenced=item.fenced,
        synced=session is not None and session.synced and session.applied == session.generation,
        generation=session.generation if session else 0,
        applied=session.applied if session else 0,
        domains=sum(where == item.name for where in manager.present.values()),
        dropped=session.dropped if session else {},
        warnings=session.warnings if session else (),
    )
