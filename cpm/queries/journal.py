"""
Queries for the journal: the owner of a port at a moment, and the history of a VM.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address

from cpm.api import handlers, operations
from cpm.api.views import EventView, WhoisView
from cpm.core.journal import JournalEntry, PortOwner
from cpm.ledger import JournalReader
from cpm.protocol.errors import NotFound


@handlers.journal_query(operations.WHOIS)
def whois(
    journal: JournalReader, now: float, address: IPv4Address, port: int, at: float | None, protocol: str | None
) -> WhoisView:
    """
    Return the owner of a port at a moment.

    :param now: UTC seconds.
    :param at: UTC seconds; None: now.
    :raise NotFound: When the port had no owner then.
    :raise LedgerError: When the ledger cannot be read.
    """
    del protocol  # a range is one VM's for all protocols
    moment = at if at is not None else now
    held = journal.whois(address, port, moment)
    if held is None:
        raise NotFound("holder of", f"{address} port {port}", "no VM held that port then; see `virt-ports pool list`")
    return _owner(held, port, moment)


@handlers.journal_query(operations.HISTORY)
def history(journal: JournalReader, name: str, limit: int) -> list[EventView]:
    """
    Return the newest journal entries of a VM, oldest first; also of a VM that is gone.

    :param limit: Entries at most.
    :raise NotFound: When no VM of that name or UUID ever held a range.
    :raise LedgerError: When the ledger cannot be read.
    """
    entries = journal.history(name, limit)
    if not entries:
        raise NotFound("VM", name, "no VM of that name or UUID ever had ports; see `virt-ports list --all`")
    return events(entries)


def events(entries: Sequence[JournalEntry]) -> list[EventView]:
    """Return journal entries as views."""
    return [
        EventView(
            entry.seq,
            entry.at,
            entry.event,
            entry.name,
            entry.domain,
            entry.node,
            entry.external,
            entry.ports.first,
            entry.ports.last,
        )
        for entry in entries
    ]


def _owner(held: PortOwner, port: int, at: float) -> WhoisView:
    return WhoisView(
        held.external,
        port,
        at,
        held.name,
        held.domain,
        held.node,
        held.internal,
        held.ports.first,
        held.ports.last,
        held.state,
        held.since,
    )
