"""
Changes to nodes.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Callable

from cpm.api import handlers, operations
from cpm.api.requests import ApproveRequest
from cpm.api.views import NodeView
from cpm.core.manager import Manager
from cpm.core.membership import ApprovalRequest
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


@handlers.change(operations.APPROVE)
def approve(manager: Manager, now: float, name: str, body: ApproveRequest) -> _Answer:
    """
    Say what a node may be.

    :raise InvalidRequest: When the name is none, or roles or address are not known.
    :raise Conflict: When that contradicts another node, or what this one is at present.
    """
    request = ApprovalRequest(
        roles=frozenset(body.roles) if body.roles is not None else None,
        underlay=body.underlay,
        machine=body.machine,
        max_vms=body.max_vms,
        max_ports=body.max_ports,
    )
    manager.membership.approve(NodeName(name), request, now)
    return _node_query(name, now)


@handlers.change(operations.REVOKE)
def revoke(manager: Manager, now: float, name: str) -> _Answer:
    """
    Take back what is approved: the node's session ends, an edge's when hosts no longer send to it.

    :raise NotFound: When there is no such node.
    :raise Conflict: When it is the only edge in service.
    """
    manager.membership.revoke(NodeName(name), now)
    return _node_query(name, now)


@handlers.change(operations.REMOVE_NODE)
def remove(manager: Manager, now: float, name: str) -> Callable[[Manager], list[NodeView]]:
    """
    Forget a node that holds nothing.

    :raise NotFound: When there is no such node.
    :raise Conflict: When it is connected, has VMs or ports, or may still forward packets as an edge.
    """
    manager.membership.remove(NodeName(name))
    return lambda manager: nodes.node_views(manager, now)


def _node_query(name: str, now: float) -> _Answer:
    return lambda manager: nodes.node_view(manager, manager.fleet.nodes[NodeName(name)], now)
