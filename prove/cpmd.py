"""
cpmd of a simulated site: the real manager, decision loop and session handling, around a simulated ledger and network.

:class:`cpm.serving.decision_loop.DecisionLoop` and :class:`cpm.serving.node_sessions.NodeSessions` are asynchronous
only in that each input waits until it is decided. Here their coroutines are run by hand, so that what arrives together,
and what comes first, is for the story to say. cpmd can die between any two of its writes (:attr:`Cpmd.fuse`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from typing import Any, cast

from cpm.api.server import NodeConnection
from cpm.core.changes import AddAllocation, Change, EndRestoring
from cpm.core.journal import LedgerState
from cpm.core.manager import Manager
from cpm.core.sizing.rules import PoolRules
from cpm.ledger import SqliteLedger
from cpm.ledger.store import ResumedTime
from cpm.protocol import codec
from cpm.protocol.errors import VirtPortsError
from cpm.protocol.ledger_errors import LedgerError, LedgerFull, LedgerMistrusted
from cpm.protocol.messages import Hello, ManagerMessage, NodeMessage
from cpm.protocol.model import Role
from cpm.protocol.walltime import WallTime
from cpm.service import clock
from cpm.serving import ledger_writer
from cpm.serving.decision_loop import DecisionLoop
from cpm.serving.node_sessions import NodeConnections, NodeSessions
from cpm.serving.streams import ReportFollowers
from prove import words
from prove.judge import Judge, Violation
from prove.kept import KeptForwards
from prove.ledger import StoryLedger
from prove.machine import Session

Say = Callable[[str, str], None]
Call = Coroutine[Any, None, None]


class CpmdDied(BaseException):
    """cpmd dies between two writes. No handler of errors may hold that up."""


class _Answer:
    """Stands in for the future of an input: who waits for it is resumed by hand."""

    def __init__(self) -> None:
        self._result: Any = None
        self._error: BaseException | None = None

    def __await__(self) -> Generator[None, None, Any]:
        yield
        if self._error is not None:
            raise self._error
        return self._result

    def done(self) -> bool:
        return False

    def set_result(self, result: Any) -> None:
        self._result = result

    def set_exception(self, error: BaseException) -> None:
        self._error = error


class _EventLoop:
    """Stands in for the running event loop, of which cpmd's code asks no more than this."""

    def create_future(self) -> _Answer:
        return _Answer()

    def time(self) -> float:
        return _Clocks.since_boot_s


class Cpmd:
    """
    The manager's process.

    :param ledger: Outlives it.
    :param rules: Rules of the pool.
    :param judge: Is told what the ledger gives.
    :param say: Takes a line of the transcript; None: nobody reads it.
    """

    def __init__(self, ledger: StoryLedger, rules: PoolRules, judge: Judge, say: Say | None) -> None:
        self.ledger = ledger
        self.fuse: int | None = None
        """It dies after so many more writes; None: it does not."""
        self.fails = 0
        """How many commits fail from now on."""
        self.is_full = True
        """Why they fail: the disk is full; otherwise it does not work."""
        self.wall_ahead_s = 0.0
        """How far the wall clock of its machine is ahead of the true time."""
        self.kept = KeptForwards()
        self.booted = 0.0
        """When its machine booted, true time."""
        self._rules = rules
        self._judge = judge
        self._say = say
        self._loop: DecisionLoop | None = None
        self._connections = NodeConnections()
        self._sessions: NodeSessions

    @property
    def manager(self) -> Manager | None:
        """The manager; None: cpmd does not run."""
        return self._loop.manager if self._loop is not None else None

    def start(self, true_now: float) -> None:
        """Start it; nobody is connected."""
        self._set_clocks(true_now)
        self._connections = NodeConnections()
        self._loop = DecisionLoop(cast("SqliteLedger", self), self._rules, self._connections)
        self._sessions = NodeSessions(self._loop, self._connections, "prove", ReportFollowers())

    def _set_clocks(self, true_now: float) -> None:
        _set_clocks(true_now - self.booted, true_now + self.wall_ahead_s, f"{self.booted}")

    def wall(self, true_now: float) -> WallTime:
        """Return what the wall clock of its machine shows."""
        return WallTime.of(true_now + self.wall_ahead_s)

    def die(self) -> None:
        """It is gone; the ledger stays."""
        self._loop, self.fuse = None, None

    def ledger_now(self, true_now: float) -> float:
        """Return the ledger's time."""
        assert self._loop is not None
        self._set_clocks(true_now)
        return self._loop.clock.now()

    # Decisions

    def decide(self, calls: Sequence[Call], true_now: float) -> None:
        """
        Decide what arrived together, commit it, then send what follows.

        :raise CpmdDied: When its time has come.
        :raise Violation: When the manager fails, or the ledger refuses what it should not.
        """
        loop = self._loop
        if loop is None:
            return
        self._set_clocks(true_now)
        waiting = list(calls)
        while waiting:
            # Each runs until it waits for an input of its own, or ends.
            waiting = [call for call in waiting if _runs_on(call)]
            while turn := loop._inputs.take():
                loop._decide(turn)
        if _Log.error and not self._judge.liars:
            raise Violation(f"cpmd failed: {_Log.error}")

    def ask(self, act: Callable[[Manager, float], object], true_now: float, *, is_change: bool = True) -> None:
        """An operator asks, or the timer runs (no ``is_change``); a refusal is an answer."""
        loop = self._loop
        if loop is None:
            return

        async def asking() -> None:
            with contextlib.suppress(VirtPortsError):
                await loop.do(act, is_change=is_change)

        self.decide([asking()], true_now)

    def reload(self, true_now: float) -> None:
        """
        The operator has it take its settings anew, which are what they were.

        :raise CpmdDied: When its time has come.
        """
        assert self._loop is not None
        self._set_clocks(true_now)
        self._loop.use(self._rules)

    # Sessions, as cpm.api.server serves them: each waits for its last message before it takes the next

    async def take(self, session: Session, message: NodeMessage) -> None:
        """Follow the next message of a session."""
        if not session.said_hello:
            session.said_hello = True
            assert isinstance(message, Hello)
            connection = cast("NodeConnection", _Connection(self, session, message.instance))
            session.connection = connection
            try:
                await self._sessions.on_connected(message, connection)
            except VirtPortsError as error:
                if isinstance(error, LedgerMistrusted) and Role.EDGE in message.roles:
                    self._judge.is_unaware = False
                self._refuse(session, message, error)
            return
        connection = cast("NodeConnection", session.connection)
        try:
            await self._sessions.on_message(session.node, connection, message)
        except VirtPortsError as error:
            self._refuse(session, message, error)
            self._sessions.on_fault(session.node, error)
            await self._on_disconnected(session)

    async def end(self, session: Session) -> None:
        """See the end of a session."""
        session.at_manager = False
        session.up.clear()
        if session.connection is not None:
            await self._on_disconnected(session)

    async def _on_disconnected(self, session: Session) -> None:
        with contextlib.suppress(VirtPortsError):  # which the server logs
            await self._sessions.on_disconnected(session.node, cast("NodeConnection", session.connection))

    def _refuse(self, session: Session, message: NodeMessage, error: VirtPortsError) -> None:
        session.at_manager = False
        session.up.clear()
        if self._say is not None:
            self._say("manager", f"ends the session with {session.node}: {error}")

    def send(self, session: Session, message: ManagerMessage) -> None:
        """Send a message to a node."""
        self._write()
        if session.is_impostor:
            raise Violation(f"an impostor is taken for {session.node}, and sent {type(message).__name__}")
        if self._say is not None:
            self._say("manager", f"sends {session.node} {words.message(message)}")
        session.down.append(codec.encode(message))

    # The ledger, as the decision loop uses it

    def next_epoch(self) -> int:
        """Commit and return a greater epoch."""
        return self.ledger.next_epoch()

    def resume_time(self, boot: str, since_boot_s: float) -> ResumedTime:
        """Let ledger time go on."""
        return self.ledger.resume_time(boot, since_boot_s)

    def load(self) -> LedgerState:
        """Return the ledger's content."""
        return self.ledger.load()

    def commit(self, changes: Sequence[Change], now: float) -> None:
        """
        Commit.

        :raise LedgerError: When the disk is full.
        :raise CpmdDied: Before or after it.
        """
        if self.fails:
            self.fails -= 1
            if self._say is not None:
                self._say("ledger", "the disk is full" if self.is_full else "the disk does not work")
            raise LedgerFull("database or disk is full") if self.is_full else LedgerError("disk I/O error")
        self._write()
        self.ledger.commit(changes, now)
        self.kept.on_commit(changes)
        for change in changes:
            if self._say is not None:
                self._say("ledger", words.change(change))
            if isinstance(change, EndRestoring):
                self._judge.is_restoring = False
            if isinstance(change, AddAllocation):
                added = change.allocation
                self._judge.on_given(added.domain, added.external, added.ports)
        self._write()

    def _write(self) -> None:
        if self.fuse is None:
            return
        if self.fuse <= 0:
            raise CpmdDied
        self.fuse -= 1


def _runs_on(call: Call) -> bool:
    try:
        call.send(None)
    except StopIteration:
        return False
    return True


class _Connection:
    """The manager's end of a session, as :class:`cpm.api.server.NodeConnection`."""

    def __init__(self, cpmd: Cpmd, session: Session, instance: str) -> None:
        self.peer = session.node
        self.instance = instance
        self._cpmd = cpmd
        self._session = session

    def send(self, message: ManagerMessage) -> None:
        self._cpmd.send(self._session, message)

    def close(self) -> None:
        self._session.at_manager = False

    async def is_alive(self, limit_s: float) -> bool:
        """Return whether the node answers a ping."""
        return self._session.at_node


class _Log(logging.Handler):
    """Keeps the first error that cpmd logs: one that it did not expect, unless the disk is full."""

    error = ""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR or _Log.error or record.name == ledger_writer.__name__:
            return
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, LedgerError):
            _Log.error = f"{record.getMessage()}: {error!r}" if error is not None else record.getMessage()


class _Clocks:
    """The clocks of the machine on which cpmd runs."""

    since_boot_s = 0.0
    wall = WallTime.of(0.0)
    boot = ""


def _set_clocks(since_boot_s: float, wall: float, boot: str) -> None:
    _Clocks.since_boot_s, _Clocks.wall, _Clocks.boot = since_boot_s, WallTime.of(wall), boot


@contextlib.contextmanager
def virtual() -> Iterator[None]:
    """Have cpmd's code read the story's clocks, and what it logs as an error be seen."""
    log, handler = logging.getLogger("cpm"), _Log()
    before = (log.propagate, log.level, clock.now, clock.wall, clock.both, clock.boot)
    _Log.error = ""
    log.addHandler(handler)
    log.propagate = False
    log.setLevel(logging.ERROR)
    clock.now = lambda: _Clocks.since_boot_s
    clock.wall, clock.boot = lambda: _Clocks.wall, lambda: _Clocks.boot
    clock.both = lambda: (_Clocks.since_boot_s, _Clocks.wall)
    running = asyncio._get_running_loop()
    asyncio._set_running_loop(cast("asyncio.AbstractEventLoop", _EventLoop()))
    try:
        yield
    finally:
        asyncio._set_running_loop(running)
        log.removeHandler(handler)
        log.propagate, level, clock.now, clock.wall, clock.both, clock.boot = before
        log.setLevel(level)
