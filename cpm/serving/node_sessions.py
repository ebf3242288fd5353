"""
The sessions of nodes: which nodes are connected, and the messages between them and the manager.

Tested in tests/unit/cpm/cli/test_with_cpmd.py.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
from collections.abc import Iterable
from functools import partial

from cpm.api.server import NodeConnection
from cpm.api.views import ReportView
from cpm.core.change_rate import ChangeRate
from cpm.core.keep_out import KeepOut
from cpm.core.manager import Manager
from cpm.core.membership import MOST_ASKING
from cpm.core.statements import Statements
from cpm.protocol.errors import Conflict, NameInUse, NotApproved, VirtPortsError
from cpm.protocol.ledger_errors import LedgerError, LedgerMistrusted
from cpm.protocol.messages import (
    Declined,
    Delta,
    Hello,
    ManagerMessage,
    NodeMessage,
    Present,
    Refused,
    Report,
    Snapshot,
    Welcome,
)
from cpm.protocol.model import NodeName, Role
from cpm.queries import measurements
from cpm.serving.decision_loop import DecisionLoop
from cpm.serving.streams import ReportFollowers
from cpm.serving.turns import TURN_VMS

log = logging.getLogger(__name__)

ALIVE_S = 2.0
"""Seconds within which a node that is connected answers a ping when another natd says that it is that node."""
MOST_HELD = 500
"""Messages that are held for one node; of more, the oldest are dropped."""


@dataclasses.dataclass(slots=True)
class _Session:
    connection: NodeConnection
    statements: Statements | None = None
    """None: the consequences of its hello are not durable yet."""
    generation: int = 0
    """Of the last message that was sent."""
    welcome: Welcome | None = None
    """The first message of the session, as long as it waits until the ledger can be written."""
    held: collections.deque[ManagerMessage] = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=MOST_HELD)
    )
    """Later messages that wait likewise. When some are dropped, the node finds a gap in the generations and gets a
    snapshot."""


class NodeConnections:
    """The connected nodes, as :class:`cpm.serving.decision_loop.Sessions`; at most one connection a node."""

    def __init__(self) -> None:
        self._sessions: dict[NodeName, _Session] = {}
        self._held_for: dict[NodeName, None] = {}
        """Nodes for which messages are kept. They are released after each decision, whatever the number of sessions."""

    def begin(self, node: NodeName, connection: NodeConnection) -> None:
        """Use this connection to a node from now on; a former one is closed. May be called again."""
        former = self._sessions.get(node)
        if former is None or former.connection is not connection:
            if former is not None:
                former.connection.close()
            self._sessions[node] = _Session(connection)

    def of(self, node: NodeName) -> NodeConnection | None:
        """Return a node's present connection; None: there is none."""
        session = self._sessions.get(node)
        return session.connection if session is not None else None

    def on_followed(self, node: NodeName, connection: NodeConnection, message: NodeMessage) -> None:
        """Keep what a node has said; the consequences of it are durable now."""
        session = self._sessions.get(node)
        if session is None or session.connection is not connection:
            return
        if isinstance(message, Hello):
            session.statements = Statements(message)
        elif session.statements is not None:
            session.statements.on_message(message)

    def remove(self, node: NodeName, connection: NodeConnection) -> None:
        """Forget a node's connection, unless it was replaced."""
        if self.is_current(node, connection):
            del self._sessions[node]

    def is_current(self, node: NodeName, connection: NodeConnection) -> bool:
        """Return whether this is the node's present connection, which was not replaced meanwhile."""
        session = self._sessions.get(node)
        return session is not None and session.connection is connection

    def send(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        """Send each message to its node, in order; messages to nodes without a session are dropped."""
        for node, message in messages:
            if (session := self._sessions.get(node)) is not None:
                session.connection.send(message)
                if isinstance(message, (Snapshot, Delta)):
                    session.generation = message.generation

    def hold(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        """
        Keep messages to be sent later, except for refusals, which follow from no change.

        Nothing overtakes the first message of a session: by that a node knows whom it follows.
        """
        for node, message in messages:
            if (session := self._sessions.get(node)) is None:
                continue
            self._held_for[node] = None
            if isinstance(message, Welcome):
                session.welcome = message
            elif session.welcome is None and isinstance(message, (Refused, Declined)):
                self.send([(node, message)])
            else:
                session.held.append(message)

    def release(self) -> None:
        """Send the messages that are kept, to the sessions that they were meant for."""
        held_for, self._held_for = self._held_for, {}
        for node in held_for:
            if (session := self._sessions.get(node)) is None:
                continue
            if session.welcome is not None:
                self.send([(node, session.welcome)])
                session.welcome = None
            while session.held:
                self.send([(node, session.held.popleft())])

    def resume(self, manager: Manager, now: float) -> bool:
        """
        Have a new manager go on with the sessions, as if each node repeated what it has said.

        It repeats all that was held, but for a node's Welcome, which is true of it as well and stays held.

        :return: False: one could not go on and has ended; the manager may have followed it halfway.
        """
        for node, session in list(self._sessions.items()):
            session.held.clear()
            if session.statements is None:
                continue
            try:
                said = session.statements
                manager.resume(said.hello, session.generation, now, said.detached, tuple(said.incoming()))
            except Exception:
                log.exception("the session with %s cannot go on", node)
                session.connection.close()
                del self._sessions[node]
                return False
        return True

    def close_all(self) -> None:
        """End all sessions, each once its queued messages are sent."""
        for session in self._sessions.values():
            session.connection.close()

    def drop(self, node: NodeName) -> None:
        """End a node's session, once its queued messages are sent; what still arrives on it is ignored."""
        if (session := self._sessions.pop(node, None)) is not None:
            session.connection.close()

    def drop_all(self) -> None:
        """End all sessions; messages that still arrive on them are ignored."""
        self.close_all()
        self._sessions.clear()


LONGEST_WAIT_S = 2.0
"""Seconds for which a node's next message is not read at most, so that its connection counts as alive."""

MOST_DEBT_S = 60.0
"""Seconds that a node would have to wait after which its session ends instead."""


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
        self._keep_out = KeepOut()
        self._rate = ChangeRate()
        self._told: dict[NodeName, str] = {}
        """What was logged of nodes that ask for approval."""

    async def on_connected(self, hello: Hello, connection: NodeConnection) -> None:
        """
        Begin a node's session; a former session of the same natd ends, and one of a natd that is no longer there.

        :raise NameInUse: When another natd is connected as this node, and alive.
        :raise VirtPortsError: When the manager refuses the node or it is kept out, or the changes cannot be committed.
        """
        if reason := self._keep_out.reason_of(hello.node, _monotonic()):
            raise Conflict(reason)
        if (debt_s := self._rate.debt_s(hello.node, _monotonic())) > MOST_DEBT_S:
            raise Conflict(_slow_down(hello.node, debt_s))
        await self._check_name(hello, connection)
        changes = 0

        def act(manager: Manager, now: float) -> None:
            nonlocal changes
            recorded = manager.fleet.recorded
            manager.on_hello(hello, self._version, now)
            changes = manager.fleet.recorded - recorded
            self._connections.begin(hello.node, connection)

        try:
            followed = partial(self._connections.on_followed, hello.node, connection, hello)
            await self._decisions.do(act, followed, vms=_vms_in(hello))
        except VirtPortsError as error:
            self._connections.remove(hello.node, connection)
            if isinstance(error, NotApproved):
                self._tell_once(error)
            if isinstance(error, LedgerMistrusted):
                await self._decisions.do(lambda manager, _: manager.refused.note())
            if type(error) is VirtPortsError:
                # Not a refusal, which may end at any time, but a failure of the manager.
                self.on_fault(hello.node, error)
            raise
        self._rate.spend(hello.node, changes, _monotonic())
        self._told.pop(hello.node, None)
        log.info("node %s connected (%s)", hello.node, ", ".join(sorted(hello.roles)))

    async def _check_name(self, hello: Hello, connection: NodeConnection) -> None:
        former = self._connections.of(hello.node)
        if former is None or former.instance == hello.instance or not await former.is_alive(ALIVE_S):
            return
        error = NameInUse(hello.node, former.peer, connection.peer)
        self._tell_once(error)
        await self._decisions.do(lambda manager, now: manager.membership.on_second(hello.node, connection.peer, now))
        raise error

    def _tell_once(self, error: NotApproved | NameInUse) -> None:
        """Log that a node was refused, which tries again every few seconds."""
        name, text = NodeName(error.node), str(error)
        if self._told.pop(name, "") != text:
            log.warning("%s", text)
        self._told[name] = text
        if len(self._told) > MOST_ASKING:
            del self._told[next(iter(self._told))]

    async def on_message(self, node: NodeName, connection: NodeConnection, message: NodeMessage) -> None:
        """
        Pass a message to the manager, unless the session was replaced meanwhile; wait when it changed too much lately.

        :raise VirtPortsError: When the message is not allowed, or the changes cannot be committed.
        :raise Conflict: When the node goes on changing too much, for it has to wait for longer than a session can.
        """
        view: ReportView | None = None
        changes = 0

        def act(manager: Manager, now: float) -> None:
            nonlocal view, changes
            if self._connections.is_current(node, connection):
                recorded = manager.fleet.recorded
                manager.on_message(node, message, now)
                changes = manager.fleet.recorded - recorded
                if isinstance(message, Report) and self._reports:
                    view = measurements.report_view(manager, node, message, now)

        def then() -> None:
            self._connections.on_followed(node, connection, message)
            if view is not None:
                self._reports.publish(view)

        await self._decisions.do(act, then, vms=_vms_in(message))
        debt_s = self._rate.spend(node, changes, _monotonic())
        if debt_s > MOST_DEBT_S:
            raise Conflict(_slow_down(node, debt_s))
        await asyncio.sleep(min(debt_s, LONGEST_WAIT_S))

    def on_fault(self, node: NodeName, error: VirtPortsError) -> None:
        """Keep a node out for some time: its session ends because what it says cannot be followed."""
        if not isinstance(error, LedgerError) and self._rate.debt_s(node, _monotonic()) <= MOST_DEBT_S:
            pause_s = self._keep_out.on_fault(node, str(error), _monotonic())
            log.warning("node %s is kept out for %g s", node, pause_s)

    async def on_disconnected(self, node: NodeName, connection: NodeConnection) -> None:
        """
        Pass the end of a session to the manager, unless it was replaced meanwhile.

        :raise LedgerError: When the changes cannot be committed.
        """

        def act(manager: Manager, now: float) -> None:
            if self._connections.is_current(node, connection):
                self._connections.remove(node, connection)
                manager.on_session_end(node, now)

        await self._decisions.do(act)
        log.info("node %s disconnected", node)


def _vms_in(message: NodeMessage) -> int:
    """Return how many VMs a message lists or measures; 0: it is about one, or none."""
    match message:
        case Hello(roles=roles, domains=domains):
            # An edge lists none, and is told of all.
            return TURN_VMS if Role.EDGE in roles else len(domains) + 1
        case Present(domains=domains):
            return len(domains) + 1
        case Report(vms=vms):
            return len(vms) + 1
    return 0


def _monotonic() -> float:
    return asyncio.get_running_loop().time()


def _slow_down(node: NodeName, debt_s: float) -> str:
    return (
        f"{node} has changed too much and may go on in {debt_s:.0f} s; what runs there goes on; "
        "see its journal for VMs that start, end or change their names without end"
    )
