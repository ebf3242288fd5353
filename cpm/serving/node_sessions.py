"""
The sessions of nodes: which nodes are connected, and the messages between them and the manager.

Tested in tests/unit/cpm/cli/test_with_cpmd.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from cpm.api.server import NodeConnection
from cpm.core.manager import Manager
from cpm.protocol.messages import Hello, ManagerMessage, NodeMessage, Report
from cpm.protocol.model import NodeName
from cpm.queries import measurements
from cpm.serving.decision_loop import DecisionLoop
from cpm.serving.streams import ReportFollowers

log = logging.getLogger(__name__)


class NodeConnections:
    """The connected nodes, as :class:`cpm.serving.decision_loop.Outbox`; at most one connection a node."""

    def __init__(self) -> None:
        self._connections: dict[NodeName, NodeConnection] = {}

    def add(self, node: NodeName, connection: NodeConnection) -> None:
        """Use this connection to a node from now on; a former one is closed."""
        if (former := self._connections.get(node)) is not None:
            former.close()
        self._connections[node] = connection

    def remove(self, node: NodeName) -> None:
        """Forget a node's connection, which is closed."""
        del self._connections[node]

    def is_current(self, node: NodeName, connection: NodeConnection) -> bool:
        """Return whether this is the node's present connection, which was not replaced meanwhile."""
        return self._connections.get(node) is connection

    def send(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        """Send each message to its node, in order; messages to nodes without a session are dropped."""
        for node, message in messages:
            if (connection := self._connections.get(node)) is not None:
                connection.send(message)

    def close_all(self) -> None:
        """End all sessions, each once its queued messages are sent."""
        for connection in self._connections.values():
            connection.close()

    def drop_all(self) -> None:
        """End all sessions; messages that still arrive on them are ignored."""
        self.close_all()
        self._connections.clear()


class NodeSessions:
    """
    Passes the messages of nodes to the manager, as :class:`cpm.api.server.NodeSessions`.

    :param decisions: Runs the manager.
    :param connections: The connected nodes.
    :param version: Version of cpmd, which is sent to nodes.
    :param reports: The clients that follow hosts' measurements.
    """

    def __init__(
        self,
        decisions: DecisionLoop,
        connections: NodeConnections,
        version: str,
        reports: ReportFollowers,
    ) -> None:
        self._decisions = decisions
        self._connections = connections
        self._version = version
        self._reports = reports

    async def on_connected(self, hello: Hello, connection: NodeConnection) -> None:
        """
        Begin a node's session; a former session of the same node ends.

        :raise VirtPortsError: When the manager refuses the node, or the changes cannot be committed.
        """

        def act(manager: Manager, now: float) -> None:
            manager.on_hello(hello, self._version, now)
            self._connections.add(hello.node, connection)

        await self._decisions.do(act)
        log.info("node %s connected (%s)", hello.node, ", ".join(sorted(hello.roles)))

    async def on_message(self, node: NodeName, connection: NodeConnection, message: NodeMessage) -> None:
        """
        Pass a message to the manager, unless the session was replaced meanwhile.

        :raise VirtPortsError: When the message is not allowed, or the changes cannot be committed.
        """

        def act(manager: Manager, now: float) -> None:
            if self._connections.is_current(node, connection):
                manager.on_message(node, message, now)
                if isinstance(message, Report) and self._reports:
                    self._reports.publish(measurements.report_view(manager, node, message, now))

        await self._decisions.do(act)

    async def on_disconnected(self, node: NodeName, connection: NodeConnection) -> None:
        """
        Pass the end of a session to the manager, unless it was replaced meanwhile.

        :raise LedgerError: When the changes cannot be committed.
        """

        def act(manager: Manager, now: float) -> None:
            if self._connections.is_current(node, connection):
                self._connections.remove(node)
                manager.on_session_end(node, now)

        await self._decisions.do(act)
        log.info("node %s disconnected", node)
