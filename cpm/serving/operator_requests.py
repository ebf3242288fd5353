"""
Answers the operations of :mod:`cpm.api.operations` with the functions that are registered for them.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from cpm import commands, queries, serving
from cpm.api import handlers
from cpm.api.access import Peer
from cpm.api.handlers import Kind
from cpm.api.operations import Operation
from cpm.core.changes import NoteAct
from cpm.core.journal import Act
from cpm.core.manager import Manager
from cpm.protocol import codec
from cpm.queries.status import About
from cpm.service import clock
from cpm.serving.live_settings import LiveSettings
from cpm.serving.streams import Feeds

USER_WAIT_S = 1.0
"""Seconds to wait for the name of a user."""

MOST_BODY = 1024
"""Characters of a request's body that are recorded."""


class OperatorRequests:
    """
    Runs handlers by their kind, as :class:`cpm.api.server.OperatorRequests`.

    :param feeds: The manager, the journal and the reports.
    :param about: Facts about this cpmd.
    :param live: Its settings.
    :raise LookupError: When an operation has no handler.
    """

    def __init__(self, feeds: Feeds, about: About, live: LiveSettings) -> None:
        self._feeds = feeds
        self._about = about
        self._live = live
        self._handlers = handlers.load((queries, commands, serving))

    async def answer(self, operation: Operation[Any], arguments: Mapping[str, Any], peer: Peer) -> object:
        """
        Return the answer to one request; a change is recorded with the one who made it, or neither is done.

        :param peer: The process that asks.
        :raise VirtPortsError: When it is refused.
        """
        handler, decisions = self._handlers[operation], self._feeds.decisions
        now = decisions.clock.now()
        if handler.kind is Kind.JOURNAL_QUERY:
            return await self._feeds.journal.read(
                lambda journal: handler.call({"journal": journal, "now": now, "wall": clock.wall(), **arguments})
            )
        if handler.kind is Kind.CHANGE:
            act = Act(peer.uid, await _user_of(peer), peer.pid, *_words(operation, arguments))

            def change(manager: Manager, now: float) -> Any:
                query = handler.call({"manager": manager, "now": now, "live": self._live, **arguments})
                manager.fleet.record(NoteAct(act))
                return query

            query = await decisions.do(change, is_change=True)
            return query(decisions.manager)
        available = {"manager": decisions.manager, "now": now, "about": self._about, "live": self._live}
        return handler.call({**available, **arguments})

    def stream(self, operation: Operation[Any], arguments: Mapping[str, Any]) -> AsyncIterator[object]:
        """
        Return the lines of a streamed answer.

        :raise VirtPortsError: When it is refused.
        """
        lines: AsyncIterator[object] = self._handlers[operation].call({"feeds": self._feeds, **arguments})
        return lines


async def _user_of(peer: Peer) -> str:
    """Return the name of a process's user; its number when a directory service takes long to say."""
    looking = asyncio.get_running_loop().run_in_executor(None, lambda: peer.user)
    try:
        return await asyncio.wait_for(looking, USER_WAIT_S)
    except TimeoutError:
        return str(peer.uid)


def _words(operation: Operation[Any], arguments: Mapping[str, Any]) -> tuple[str, str]:
    """Return a request as the record has it: method and path, and the body."""
    given = {name: value for name, value in arguments.items() if name != "body"}
    body = codec.encode(arguments["body"]).decode() if "body" in arguments else ""
    return f"{operation.method} {operation.target(given)}", body if len(body) <= MOST_BODY else f"{body[:MOST_BODY]}…"
