"""
The one loop that owns the :class:`~cpm.core.manager.Manager` and the ledger.

It takes all inputs that have arrived, lets the manager decide, commits the changes to the ledger as one transaction,
and only then sends messages and answers. The commit blocks the event loop: nothing could be decided meanwhile, and a
hand-over to a thread and back would take as long as the commit. Inputs that arrive until then queue in the sockets and
are committed together.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from cpm.core.manager import Manager
from cpm.core.sizing.rules import PoolRules
from cpm.ledger import SqliteLedger
from cpm.protocol.errors import LedgerError, VirtPortsError
from cpm.protocol.messages import ManagerMessage
from cpm.protocol.model import NodeName
from cpm.service import clock

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Outbox(Protocol):
    """Sends messages to nodes."""

    def send(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        """Send each message to its node, in order; messages to nodes without a session are dropped."""

    def drop_all(self) -> None:
        """End all sessions; messages that still arrive on them are ignored."""


@dataclasses.dataclass(slots=True)
class _Input:
    act: Callable[[Manager, float], Any]
    answer: asyncio.Future[Any]
    result: Any = None

    def fail(self, error: VirtPortsError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class DecisionLoop:
    """
    Runs the manager.

    :param ledger: The durable state; the manager begins with its content and a new epoch.
    :param rules: Rules of the pool.
    :param outbox: Gets the messages once the changes that they are about are durable.
    :raise LedgerError: When the ledger cannot be read or written.
    """

    def __init__(self, ledger: SqliteLedger, rules: PoolRules, outbox: Outbox) -> None:
        self._ledger = ledger
        self._rules = rules
        self._outbox = outbox
        self._inputs: asyncio.Queue[_Input] = asyncio.Queue()
        self.next_commit = asyncio.Event()
        """Set by the next commit, which also replaces it. To miss no commit: get the event, read, then wait for it."""
        epoch = ledger.next_epoch()
        self.manager = Manager(ledger.load(), rules, epoch, clock.now())
        """For reading only; replaced by another one after a failed commit."""

    async def do(self, act: Callable[[Manager, float], _T]) -> _T:
        """
        Run a function on the manager; return its result once all changes that follow from it are durable.

        :param act: Called with the manager and UTC seconds.
        :raise VirtPortsError: The error of ``act``, or why its changes could not be committed; nothing has changed.
        """
        answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._inputs.put_nowait(_Input(act, answer))
        return await answer

    async def run(self) -> None:
        """Process inputs until cancelled."""
        while True:
            batch = [await self._inputs.get()]
            while not self._inputs.empty():
                batch.append(self._inputs.get_nowait())
            self._decide(batch)

    def _decide(self, batch: list[_Input]) -> None:
        now = clock.now()
        try:
            for item in batch:
                self._run_input(item, now)
            outcome = self.manager.take(now)
            if outcome.changes:
                self._ledger.commit(outcome.changes, now)
        except Exception as error:
            # The manager's state and the durable state may differ now: start again from the durable state.
            log.exception("cannot commit; starting over from the ledger")
            self._start_over()
            refusal = error if isinstance(error, VirtPortsError) else LedgerError(f"the change was not made: {error}")
            for item in batch:
                item.fail(refusal)
            return
        self._outbox.send(outcome.messages)
        for item in batch:
            if not item.answer.done():
                item.answer.set_result(item.result)
        if outcome.changes:
            self.next_commit.set()
            self.next_commit = asyncio.Event()

    def _run_input(self, item: _Input, now: float) -> None:
        try:
            item.result = item.act(self.manager, now)
        except VirtPortsError as error:
            # Refused before anything was recorded.
            item.fail(error)

    def _start_over(self) -> None:
        self.manager = Manager(self._ledger.load(), self._rules, self.manager.epoch, clock.now())
        self._outbox.drop_all()
