"""
The one loop that owns the :class:`~cpm.core.manager.Manager` and the ledger.

It takes what has arrived, up to the bound of a turn (:mod:`cpm.serving.turns`), lets the manager decide, commits the
changes to the ledger as one transaction, and only then sends messages and answers. The commit blocks the event loop:
nothing could be decided meanwhile, and a hand-over to a thread and back would take as long as the commit. Inputs that
arrive until then queue in the sockets, and the next turns commit many of them together.

An input that fails is attributed: when anything about a batch goes wrong, its inputs are decided again one by one, each
with a commit of its own, and only the one that fails alone is refused. A manager that may have followed an input
halfway is discarded; its successor begins with the content of the ledger and goes on with all sessions
(``docs/design/0019-faults-of-one-peer.md``).

While the ledger cannot be written, the sessions go on and what nodes say is followed, but nothing is sent that depends
on a change; VMs get no new ports, and operators' changes are refused (:mod:`cpm.serving.ledger_writer`).
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from cpm.core.changes import Notice
from cpm.core.invariants import Invariants, InvariantViolated
from cpm.core.journal import JournalEvent
from cpm.core.manager import Manager, Outcome
from cpm.core.refusals import Refusals
from cpm.core.sizing.rules import PoolRules
from cpm.core.tallies import Tallies
from cpm.ledger import SqliteLedger
from cpm.protocol.errors import VirtPortsError
from cpm.protocol.ledger_errors import LedgerError, LedgerUnwritable
from cpm.protocol.messages import ManagerMessage
from cpm.protocol.model import NodeName
from cpm.serving.ledger_clock import LedgerClock
from cpm.serving.ledger_writer import LedgerWriter
from cpm.serving.turns import Turns

log = logging.getLogger(__name__)

_T = TypeVar("_T")


class Sessions(Protocol):
    """The connected nodes."""

    def send(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        """Send each message to its node, in order; messages to nodes without a session are dropped."""

    def hold(self, messages: Iterable[tuple[NodeName, ManagerMessage]]) -> None:
        """Keep messages to be sent later, except for refusals, which follow from no change."""

    def release(self) -> None:
        """Send the messages that are kept, to the sessions that they were meant for."""

    def resume(self, manager: Manager, now: float) -> bool:
        """
        Have a new manager go on with the sessions.

        :return: False: one of them could not go on and has ended. The manager may have followed it halfway.
        """

    def drop(self, node: NodeName) -> None:
        """End a node's session, once its queued messages are sent; what still arrives on it is ignored."""

    def drop_all(self) -> None:
        """End all sessions; messages that still arrive on them are ignored."""


@dataclasses.dataclass(slots=True)
class _Input:
    act: Callable[[Manager, float], Any]
    then: Callable[[], None]
    answer: asyncio.Future[Any]
    is_change: bool
    result: Any = None
    error: VirtPortsError | None = None

    def finish(self) -> None:
        """Answer, now that the consequences are durable or, of what a node said, will be."""
        if self.error is None:
            self.then()
        if self.answer.done():
            return
        if self.error is None:
            self.answer.set_result(self.result)
        else:
            self.answer.set_exception(self.error)

    def fail(self, error: Exception) -> None:
        """Answer that it failed."""
        self.error = error if isinstance(error, VirtPortsError) else _unexpected(error)
        self.finish()


def _unexpected(error: Exception) -> VirtPortsError:
    detail = f"{type(error).__name__}: {error}"[:200]
    return VirtPortsError(f"nothing was changed, because of {detail}; please report this as a bug, with cpmd's log")


def _nothing() -> None:
    """Do nothing."""


class DecisionLoop:
    """
    Runs the manager.

    :param ledger: The durable state; the manager begins with its content and a new epoch.
    :param rules: Rules of the pool.
    :param sessions: Get the messages once the changes that they are about are durable.
    :raise LedgerError: When the ledger cannot be read or written.
    """

    def __init__(self, ledger: SqliteLedger, rules: PoolRules, sessions: Sessions) -> None:
        self._ledger = ledger
        self._rules = rules
        self._sessions = sessions
        self._inputs: Turns[_Input] = Turns()
        self._arrived = asyncio.Event()
        self.next_commit = asyncio.Event()
        """Set by the next commit, which also replaces it. To miss no commit: get the event, read, then wait for it."""
        epoch = ledger.next_epoch()
        self.clock = LedgerClock(ledger)
        state = ledger.load()
        self._refusals, self._tallies = Refusals(), Tallies()
        self._invariants = Invariants(state, rules.hold_down_s)
        self.manager = Manager(state, rules, epoch, self.clock.now())
        """For reading only; replaced by another one after a failed input or commit."""
        self.manager.fleet.refusals, self.manager.fleet.tallies = self._refusals, self._tallies
        self.writer = LedgerWriter(ledger, self.clock.compare(self.manager), self._tallies)

    async def do(
        self,
        act: Callable[[Manager, float], _T],
        then: Callable[[], None] = _nothing,
        vms: int = 0,
        *,
        is_change: bool = False,
    ) -> _T:
        """
        Run a function on the manager; return its result once all changes that follow from it are durable.

        While the ledger cannot be written, what follows from the word of a node is kept instead.

        :param act: Called with the manager and ledger time; again with another manager when the first failed because of
            something else.
        :param then: Called once when the changes are durable or kept, before any message about them is sent.
        :param vms: VMs that the input lists or measures; 0: it is about one, or none, and goes first.
        :param is_change: An operator asks for it: it is refused while the ledger cannot be written.
        :raise VirtPortsError: The error of ``act``, or why its changes could not be committed; nothing has changed.
        """
        answer: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._inputs.put(_Input(act, then, answer, is_change), vms)
        self._arrived.set()
        return await answer

    def use(self, rules: PoolRules) -> None:
        """
        Decide by other rules from now on. Sessions go on, and nothing is given back that VMs hold.

        The loop stands still for as long as it takes to read the ledger: about a second for 10,000 VMs.

        :param rules: With the block and the internal pool of the present ones.
        """
        self._rules = rules
        self._invariants.hold_down_s = rules.hold_down_s
        self._start_over(self.clock.compare(self.manager))

    async def run(self) -> None:
        """Process inputs until cancelled."""
        while True:
            await self._arrived.wait()
            self._decide(self._inputs.take())
            if self._inputs:
                # Read what has arrived meanwhile: some of it may be to go first.
                await asyncio.sleep(0)
            else:
                self._arrived.clear()

    def _decide(self, batch: list[_Input]) -> None:
        now = self.clock.compare(self.manager)
        try:
            for item in batch:
                self._run_input(item, now)
            outcome = self._commit(now)
        except LedgerUnwritable as problem:
            self.writer.on_failed(problem, now)
            self._start_over(now)
            self._decide(batch)
            return
        except InvariantViolated as error:
            self._on_violated(error, batch, now)
            return
        except Exception as error:
            # The manager's state and the durable state may differ now: start again from the durable state.
            self._start_over(now)
            if isinstance(error, LedgerError):
                log.exception("cannot commit")
                for item in batch:
                    item.fail(error)
            elif len(batch) > 1:
                for item in batch:
                    self._decide([item])
            else:
                log.exception("an input failed, and nothing of it was done")
                batch[0].fail(error)
            return
        for item in batch:
            item.finish()
        self._send(outcome)

    def _on_violated(self, error: InvariantViolated, batch: list[_Input], now: float) -> None:
        """Refuse a decision, set the VMs aside that it is about, and decide again without them."""
        is_news = self._set_aside(error, now)
        self._start_over(now)
        for violation in error.violations if is_news else ():
            of_vm = [each.id for each in self.manager.fleet.of(violation.domain)]
            about = violation.allocation if violation.allocation in of_vm else next(iter(of_vm), None)
            if about is not None:
                self.manager.fleet.record(Notice(about, JournalEvent.VIOLATION))
        if is_news:
            self._decide(batch)
        elif len(batch) > 1:
            for item in batch:
                self._decide([item])
        elif batch[0].is_change:
            batch[0].fail(error)
        else:
            # Not the fault of the node that sent it.
            batch[0].finish()

    def _set_aside(self, error: InvariantViolated, now: float) -> bool:
        """Count a refused decision; return whether a VM is set aside for it that was not yet."""
        self._refusals.count += 1
        log.error("a decision was refused because it breaks a rule, please report this as a bug: %s", error)
        new = [self._refusals.set_vm_aside(each.domain, each.reason, now) for each in error.violations]
        return any(new)

    def _run_input(self, item: _Input, now: float) -> None:
        recorded = self.manager.fleet.recorded
        item.error = self.writer.problem if item.is_change else None
        if item.error is not None:
            return
        try:
            item.result = item.act(self.manager, now)
        except VirtPortsError as error:
            if self.manager.fleet.recorded != recorded:
                # Refused when a part was done already.
                raise
            item.error = error

    def _commit(self, now: float) -> Outcome:
        outcome = self.manager.take(now)
        fleet = self.manager.fleet
        found = self._invariants.check(outcome.changes, outcome.decided, fleet.nodes, self.manager.sessions, now)
        if found:
            raise InvariantViolated(found)
        was_pending = self.writer.is_pending
        self.writer.commit(outcome.changes, now, is_time_passing=bool(self.manager.fleet.leaving))
        if fleet.unwritable is not None and self.writer.problem is None:
            self.manager.on_writable(now)
        fleet.unwritable = self.writer.problem
        if (outcome.changes or was_pending) and not self.writer.is_pending:
            self.next_commit.set()
            self.next_commit = asyncio.Event()
        return outcome

    def _send(self, outcome: Outcome) -> None:
        if self.writer.is_pending:
            self._sessions.hold(outcome.messages)
        else:
            self._sessions.release()
            self._sessions.send(outcome.messages)
        for node in outcome.ended:
            self._sessions.drop(node)

    def _start_over(self, now: float) -> None:
        """Replace the manager by one that begins with the content of the ledger, and goes on with the sessions."""
        while not self._resume(now):
            pass

    def _resume(self, now: float) -> bool:
        """:return: False: a session could not go on and has ended, or the ledger cannot be written: to be repeated."""
        self.manager = self._load(now)
        try:
            if not self._sessions.resume(self.manager, now):
                return False
            outcome = self._commit(now)
        except LedgerUnwritable as problem:
            self.writer.on_failed(problem, now)
            return False
        except InvariantViolated as error:
            if self._set_aside(error, now):
                return False
            self._end_all(now)
        except Exception:
            log.exception("cannot go on with the sessions, so all of them end")
            self._end_all(now)
        else:
            self._send(outcome)
        return True

    def _end_all(self, now: float) -> None:
        self.manager = self._load(now)
        self._sessions.drop_all()

    def _load(self, now: float) -> Manager:
        state = self._ledger.load()
        self._invariants.start_over(state)
        manager = Manager(state, self._rules, self.manager.epoch, now)
        manager.go_on_from(self.manager)
        manager.fleet.unwritable = self.writer.problem
        manager.fleet.refusals, manager.fleet.tallies = self._refusals, self._tallies
        self.writer.forget()
        return manager
