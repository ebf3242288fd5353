"""
The ledger: the one durable truth about who owns which ports, and the journal of who ever did.

SQLite, written by one connection. :class:`SqliteLedger` commits changes, :class:`JournalReader` answers questions from
any other thread. Only this package touches SQLite, and only cpmd opens the file: everything else asks cpmd.
"""

from cpm.ledger.journal import JournalReader
from cpm.ledger.store import SqliteLedger

__all__ = ["JournalReader", "SqliteLedger"]
