"""
Query for the record of operators' changes.

Tested in tests/unit/cpm/api/test_access.py.
"""

from __future__ import annotations

from cpm.api import handlers, operations
from cpm.api.views import AuditView
from cpm.ledger import JournalReader


@handlers.journal_query(operations.AUDIT)
def audit(journal: JournalReader, limit: int) -> list[AuditView]:
    """
    Return the newest changes that operators made, oldest first.

    :param limit: Entries at most.
    :raise LedgerError: When the ledger cannot be read.
    """
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
        for entry in journal.audit(limit)
    ]
