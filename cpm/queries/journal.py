"""
Queries for the journal: the owner of a port at a moment, and the history of a VM.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from ipaddress import IPv4Address

from cpm.api import handlers, operations
from cpm.api.parameters import EVERYTHING, Patterns
from cpm.api.views import CandidateView, EventView, WhoisView
from cpm.core.journal import JournalEntry, PortOwner, Selection
from cpm.core.timeline import Step
from cpm.ledger import JournalReader
from cpm.protocol.errors import NotFound
from cpm.protocol.event_kinds import CLOCK_SET
from cpm.protocol.model import DomainUUID, NodeName
from cpm.protocol.walltime import UtcSeconds, WallTime
from cpm.queries import pages


@handlers.journal_query(operations.WHOIS)
def whois(
    journal: JournalReader,
    now: float,
    wall: WallTime,
    address: IPv4Address,
    port: int,
    at: WallTime | None,
    protocol: str | None,
) -> WhoisView:
    """
    Return the owner of a port at a moment, or all that may have been when the clock showed it twice or never.

    :param now: Ledger time.
    :param wall: What the wall clock shows.
    :param at: None: now.
    :raise NotFound: When the port had no owner then.
    :raise LedgerError: When the ledger cannot be read.
    """
    del protocol  # a range is one VM's for all protocols
    if at is None:
        owners, doubt = [journal.whois(address, port)], ""
    else:
        meaning = journal.timeline().meaning(at, now)
        owners = [journal.whois(address, port, position) for position in meaning.positions]
        doubt = _doubt(meaning.steps)
    moment = (at or wall).seconds
    if len({owner.domain if owner is not None else None for owner in owners}) > 1:
        return _doubtful(address, port, moment, owners, doubt)
    if (held := owners[-1]) is None:
        remedy = f"check the address and the time's zone; `virt-ports pool show {address}` has ports that are no VM's"
        raise NotFound("VM that held", f"{address} port {port}", remedy)
    return _owner(held, port, moment)


@handlers.journal_query(operations.HISTORY)
def history(
    journal: JournalReader,
    name: str,
    limit: int,
    event: Set[str],
    begin: WallTime | None,
    end: WallTime | None,
    before: int | None,
) -> list[EventView]:
    """
    Return the newest journal entries of a VM, oldest first; also of a VM that is gone.

    For the parameters see :data:`cpm.api.operations.HISTORY`.

    :raise NotFound: When no VM of that name or UUID ever held a range.
    :raise LedgerError: When the ledger cannot be read.
    """
    entries = journal.history(name, limit, Selection(before, begin, end, fitting(event=event)))
    if not entries and not journal.history(name, 1):
        raise NotFound("VM", name, "no VM of that name or UUID ever had ports; see `virt-ports list --all`")
    return events(entries)


def fitting(
    vm: Patterns = EVERYTHING, node: Patterns = EVERYTHING, event: Set[str] = frozenset()
) -> Callable[[JournalEntry], bool]:
    """Return the function that says whether an entry is of such VMs and nodes, and of such events."""
    return lambda entry: (
        pages.is_one_of(entry.event, event) and vm.fit(entry.name, entry.domain) and node.fit(entry.node)
    )


def events(entries: Sequence[JournalEntry]) -> list[EventView]:
    """Return journal entries as views."""
    return [
        EventView(
            entry.seq,
            entry.at.seconds,
            entry.event,
            entry.name,
            entry.domain,
            entry.node,
            entry.external,
            entry.ports.first,
            entry.ports.last,
            pool=entry.pool,
        )
        for entry in entries
    ]


def clock_set(before: int, step: Step) -> EventView:
    """Return a change of the wall clock as a line of the journal. :param before: Position of the entry before it."""
    nothing = (None, None, None)
    return EventView(before, step.after.seconds, CLOCK_SET, "", DomainUUID(""), NodeName(""), *nothing, step.by_s)


def _owner(held: PortOwner, port: int, at: UtcSeconds) -> WhoisView:
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
        held.since.seconds,
        pool=held.pool,
    )


def _doubtful(
    address: IPv4Address, port: int, at: UtcSeconds, owners: Iterable[PortOwner | None], doubt: str
) -> WhoisView:
    candidates = (
        CandidateView(owner.name, owner.domain, owner.node, owner.since.seconds)
        if owner is not None
        else CandidateView(None, None, None, None)
        for owner in owners
    )
    nobody = (None,) * 8
    return WhoisView(address, port, at, *nobody, doubt, tuple(candidates))


def _doubt(steps: Sequence[Step]) -> str:
    sets = "; ".join(
        f"the manager's clock was set {'forward' if step.by_s > 0 else 'back'} by {abs(step.by_s):.1f} s, "
        f"from {step.before} to {step.after}"
        for step in steps
    )
    is_repeated = any(step.by_s < 0 for step in steps)
    return f"{sets}: it {'showed this time more than once' if is_repeated else 'never showed this time'}"
