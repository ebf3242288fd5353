"""
Query for the record of operators' changes.

Tested in tests/unit/cpm/api/test_access.py.
"""

from __future__ import annotations

from cpm.api import handlers, operations
from cpm.api.parameters import Patterns
from cpm.api.views import AuditView
from cpm.core.journal import Selection
from cpm.ledger import JournalReader
from cpm.protocol.walltime import WallTime


@handlers.journal_query(operations.AUDIT)
def audit(
    journal: JournalReader,
    limit: int,
    user: Patterns,
    request: Patterns,
    begin: WallTime | None,
    end: WallTime | None,
    before: int | None,
) -> list[AuditView]:
    """
    Return the newest changes that operators made, oldest first.

    For the parameters see :data:`cpm.api.operations.AUDIT`.

    :raise LedgerError: When the ledger cannot be read.
    """
    fits = lambda entry: user.fit(entry.act.user) and request.fit(entry.act.request)  # noqa: E731
    return [
        AuditView(
            entry.seq,
            entry.at.seconds,
            entry.act.user,
            entry.act.uid,
            entry.act.pid,
            entry.act.request,
            entry.act.body,
        )
        for entry in journal.audit(limit, Selection(before, begin, end, fits))
    ]
