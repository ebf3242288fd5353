"""
The ledger: the durable record of who owns which ports, and the journal of all former owners.

It is an SQLite file with one writing connection. :class:`SqliteLedger` commits changes; :class:`JournalReader` answers
queries, in another thread if need be. Only this package uses SQLite, and only cpmd opens the file.
"""

from cpm.ledger.journal import JournalReader
from cpm.ledger.store import SqliteLedger

__all__ = ["JournalReader", "SqliteLedger"]
