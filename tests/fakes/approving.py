"""The operator of a test, who approves a node as what it says it is."""

from __future__ import annotations

from cpm.core.manager import Manager
from cpm.core.membership import ApprovalRequest
from cpm.protocol.messages import Hello


def say_hello(manager: Manager, hello: Hello, now: float) -> None:
    """Have a node begin a session; one that is new is approved first."""
    if hello.node not in manager.fleet.nodes:
        approve(manager, hello, now)
    manager.on_hello(hello, "test", now)


def approve(manager: Manager, hello: Hello, now: float) -> None:
    """Approve a node as what it says it is."""
    request = ApprovalRequest(roles=hello.roles, underlay=hello.underlay)
    manager.membership.approve(hello.node, request, now)
