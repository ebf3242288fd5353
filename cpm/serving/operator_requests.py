"""
Answers the operations of :mod:`cpm.api.operations` with the functions that are registered for them.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

from cpm import commands, queries, serving
from cpm.api import handlers
from cpm.api.handlers import Kind
from cpm.api.operations import Operation
from cpm.queries.status import About
from cpm.service import clock
from cpm.serving.streams import Feeds


class OperatorRequests:
    """
    Runs handlers by their kind, as :class:`cpm.api.server.OperatorRequests`.

    :param feeds: The manager, the journal and the reports.
    :param about: Facts about this cpmd.
    :raise LookupError: When an operation has no handler.
    """

    def __init__(self, feeds: Feeds, about: About) -> None:
        self._feeds = feeds
        self._about = about
        self._handlers = handlers.load((queries, commands, serving))

    async def answer(self, operation: Operation[Any], arguments: Mapping[str, Any]) -> object:
        """
        Return the answer to one request.

        :raise VirtPortsError: When it is refused.
        """
        handler, decisions = self._handlers[operation], self._feeds.decisions
        now = decisions.clock.now()
        if handler.kind is Kind.JOURNAL_QUERY:
            return await self._feeds.journal.read(
                lambda journal: handler.call({"journal": journal, "now": now, "wall": clock.wall(), **arguments})
            )
        if handler.kind is Kind.CHANGE:
            query = await decisions.do(
                lambda manager, now: handler.call({"manager": manager, "now": now, **arguments}), is_change=True
            )
            return query(decisions.manager)
        return handler.call({"manager": decisions.manager, "now": now, "about": self._about, **arguments})

    def stream(self, operation: Operation[Any], arguments: Mapping[str, Any]) -> AsyncIterator[object]:
        """
        Return the lines of a streamed answer.

        :raise VirtPortsError: When it is refused.
        """
        lines: AsyncIterator[object] = self._handlers[operation].call({"feeds": self._feeds, **arguments})
        return lines
