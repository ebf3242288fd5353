"""
The one loop that owns the :class:`~cpm.core.manager.Manager` and the ledger.

It takes all inputs that have come, lets the manager decide, commits what was decided to the ledger as one transaction,
and only then sends messages and answers. It waits for the disk by itself: nothing could be decided meanwhile, and
handing the commit to a thread and back takes as long as the commit. What comes in until then waits in the sockets and
is then committed together.
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
    """Where messages to nodes go."""

    def send(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        """Send each to its node, in order; what is for a node without a session is dropped."""

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

    :param ledger: What is durable; the manager begins with its content and a new epoch.
    :param rules: How ports are dealt out.
    :param outbox: Where messages go once their reason is durable.
    :raise LedgerError: When the ledger cannot be read.
    """

    def __init__(self, ledger: SqliteLedger, rules: PoolRules, outbox: Outbox) -> None:
        self._ledger = ledger
        self._rules = rules
        self._outbox = outbox
        self._inputs: asyncio.Queue[_Input] = asyncio.Queue()
        self.next_commit = asyncio.Event()
        """Set by the next commit, which then puts a new event here. To miss none: take it, read, then wait for it."""
        epoch = ledger.next_epoch()
        self.manager = Manager(ledger.load(), rules, epoch, clock.now())
        """To be read only; another one after a failed commit."""

    async def do(self, act: Callable[[Manager, float], _T]) -> _T:
        """
        Let the manager do something; return its result once all that follows from it is durable.

        :param act: Is given the manager and UTC seconds.
        :raise VirtPortsError: What ``act`` raised, or why its changes could not be committed; nothing has changed.
        """
        answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._inputs.put_nowait(_Input(act, answer))
        return await answer

    async def run(self) -> None:
        """Decide for ever."""
        while True:
            batch = [await self._inputs.get()]
            while not self._inputs.empty():
                batch.append(self._inputs.get_nowait())
            self._decide(batch)

    def _decide(self, batch: list[_Input]) -> None:
        now = clock.now()
        try:
            for item in batch:
                self._take_in(item, now)
            outcome = self.manager.take(now)
            if outcome.changes:
                self._ledger.commit(outcome.changes, now)
        except Exception as error:
            # What the manager believes and what is durable may differ now: start again from what is durable.
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

    def _take_in(self, item: _Input, now: float) -> None:
        try:
            item.result = item.act(self.manager, now)
        except VirtPortsError as error:
            # Refused before anything was recorded.
            item.fail(error)

    def _start_over(self) -> None:
        self.manager = Manager(self._ledger.load(), self._rules, self.manager.epoch, clock.now())
        self._outbox.drop_all()
