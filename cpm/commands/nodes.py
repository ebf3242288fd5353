"""
Changes to nodes.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Callable

from cpm.api import handlers, operations
from cpm.api.views import NodeView
from cpm.core.manager import Manager
from cpm.protocol.model import NodeName
from cpm.queries import nodes

_Answer = Callable[[Manager], NodeView]


@handlers.change(operations.FENCE)
def fence(manager: Manager, now: float, name: str) -> _Answer:
    """
    Record the operator's confirmation that a node no longer forwards packets.

    :raise NotFound: When there is no such node.
    :raise Conflict: When the node is connected and answers, hence alive.
    """
    manager.fence(NodeName(name), now, fenced=True)
    return _node_query(name, now)


@handlers.change(operations.UNFENCE)
def unfence(manager: Manager, now: float, name: str) -> _Answer:
    """
    Withdraw that confirmation.

    :raise NotFound: When there is no such node.
    """
    manager.fence(NodeName(name), now, fenced=False)
    return _node_query(name, now)


def _node_query(name: str, now: float) -> _Answer:
    return lambda manager: nodes.node_view(manager, manager.fleet.nodes[NodeName(name)], now)
