"""
All events, each with what is said of it everywhere: pages, syslog, commands, requests and ``docs/reference/events.md``.

A new event is a line here and a member of :class:`cpm.core.journal.JournalEvent` or
:class:`~cpm.core.journal.NodeEvent`. Without imports: the command line waits for it.
Tested in ``tests/unit/cpm/protocol/test_event_kinds.py``.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Final


class Severity:
    """How urgent an event is, by the numbers of syslog (RFC 5424)."""

    ERROR = 3
    """Somebody has to act."""
    WARNING = 4
    """Somebody should look."""
    INFO = 6


class EventKind:
    """
    An event.

    :param meaning: Sentences for people.
    :param severity: One of :class:`Severity`.
    :param is_notice: It changes nothing about who has which ports.
    """

    def __init__(self, name: str, meaning: str, severity: int = Severity.INFO, *, is_notice: bool = False) -> None:
        self.name = name
        self.meaning = meaning
        self.severity = severity
        self.is_notice = is_notice

    @property
    def word(self) -> str:
        """The name as it is written in commands and requests: without spaces."""
        return self.name.replace(" ", "-")


CLOCK_SET: Final = "clock-set"
"""The event that is about no VM."""

_WARNING: Final = Severity.WARNING

JOURNAL: Final = (
    EventKind("reserved", "The VM gets these ports; no host uses them yet."),
    EventKind("active", "Its host uses them for new connections."),
    EventKind("draining", "Only connections that are open use them; new ones get other ports."),
    EventKind("held", "No connection is left on them; no other VM gets them before the hold-down has passed."),
    EventKind("resized", "The range has these bounds now."),
    EventKind("trimmed", "The range gave up these ports."),
    EventKind("merged", "Another range of the VM took these ports over; its own entry follows."),
    EventKind("freed", "They are free: any VM may get them."),
    EventKind("moved", "Another host uses them: the VM was migrated."),
    EventKind("updated", "The VM has another name or internal address."),
    EventKind(
        "exhausted", "The VM is at its cap with every port in use: new connections get an ICMP error. Raise its cap if "
        "it should have more.", _WARNING, is_notice=True,
    ),
    EventKind("recovered", "The VM has had free ports for a minute.", is_notice=True),
    EventKind(
        "short", "The VM should have more ports, and the pool has none. Add an address.", _WARNING, is_notice=True
    ),
    EventKind("supplied", "The VM has lacked no ports for a minute.", is_notice=True),
    EventKind(
        "limited", "The VM has as many connections as it may have, or begins too many in a second: packets of new ones "
        "are dropped. Raise its limits if it should have more.", _WARNING, is_notice=True,
    ),
    EventKind("within limits", "The VM has stayed within its limits for a minute.", is_notice=True),
    EventKind(
        "misplaced",
        "The VM's wishes name a pool, or an address, that does not exist or has no room: it stays where it is. "
        "Add an address, or change the wish.", _WARNING,
        is_notice=True,
    ),
    EventKind("placed", "For a minute the VM was not kept from where its wishes say.", is_notice=True),
    EventKind(
        "claimed", "Another host says that it runs this VM, too; its ports stay where they are. Stop one of the two.",
        _WARNING, is_notice=True,
    ),
    EventKind(
        "own-port", "An edge uses ports of the range itself: the VM gets others for new connections.", _WARNING,
        is_notice=True,
    ),
    EventKind(
        "violation", "The manager refused a decision of its own because it breaks a rule: a bug, please report it. "
        "Nothing has changed.", Severity.ERROR, is_notice=True,
    ),
    EventKind(
        "cut", "The drain limit withdrew these ports while VMs lacked some: connections on them are cut.", _WARNING,
        is_notice=True,
    ),
    EventKind(
        CLOCK_SET, "Somebody set the manager's wall clock, which gives the journal its times. It concerns no VM.",
        _WARNING, is_notice=True,
    ),
)  # fmt: skip
"""Those of the journal."""

NODES: Final = (
    EventKind("approved", "An operator said what this node may be."),
    EventKind("revoked", "An operator withdrew the approval: its session ends, and it gets no other.", _WARNING),
    EventKind("removed", "An operator removed it from the manager."),
    EventKind("in-service", "Hosts send packets to this edge."),
    EventKind("out-of-service", "Hosts send no packets to this edge any more.", _WARNING),
    EventKind("fenced", "An operator confirmed that it forwards nothing: its ports go to other VMs.", _WARNING),
    EventKind("unfenced", "The fence ended: its confirmations count again."),
    EventKind("silent", "It is connected, but has stopped reporting.", _WARNING),
    EventKind("reporting", "It reports again."),
)
"""Those of the record of nodes."""

WARNINGS: Final = frozenset(kind.name for kind in (*JOURNAL, *NODES) if kind.severity <= Severity.WARNING)
"""Events that somebody should look at."""

MEANINGS: Final = {kind.name: kind.meaning for kind in (*JOURNAL, *NODES)}


def clock_set_text(by_s: float) -> str:
    """Return what the event :data:`CLOCK_SET` says. :param by_s: Seconds by which it was set; negative: back."""
    return f"manager's clock {'forward' if by_s > 0 else 'back'} {abs(by_s):.1f} s"
