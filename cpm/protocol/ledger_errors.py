"""
Errors of the ledger and of the journal that it keeps; a part of the tree in :mod:`cpm.protocol.errors`.

Tested in ``tests/unit/cpm/protocol/test_errors.py``.
"""

from __future__ import annotations

from cpm.protocol.errors import Conflict, ExitCode, VirtPortsError
from cpm.protocol.walltime import WallTime


class LedgerError(VirtPortsError):
    """The ledger cannot be read or written; the message has SQLite's error and what to check. Nothing changed."""

    code = "ledger"
    http_status = 503


class LedgerUnwritable(LedgerError):
    """
    The ledger can be read, but not written at the moment: its file system is read-only or broken, or another process
    has locked it. What is there goes on; nothing new is given until it can be written again. Nothing changed.
    """

    code = "ledger-unwritable"


class LedgerFull(LedgerUnwritable):
    """The file system of the ledger is full."""

    code = "ledger-full"
    http_status = 507


class SchemaTooNew(LedgerError):
    """
    The ledger was written by a newer version.

    :param found: Schema version in the file.
    :param known: Newest schema version that this program knows.
    """

    code = "schema-too-new"

    def __init__(self, found: int, known: int) -> None:
        super().__init__(found, known)
        self.found = found
        self.known = known

    def __str__(self) -> str:
        return (
            f"the ledger has schema {self.found}, this version knows {self.known}; "
            "install the newer virt-ports again, or take in a backup made before the upgrade with `virt-ports restore`"
        )


class LedgerMistrusted(Conflict):
    """
    A node has followed another ledger than the manager's, or a later state of it; it is refused.

    :param node: The node.
    :param why: What it has seen.
    :param remedy: What to do.
    :param is_lasting: The ledger itself is to blame, and not that it is in use twice.
    """

    code = "ledger-mistrusted"

    def __init__(self, node: str, why: str, remedy: str, *, is_lasting: bool = True) -> None:
        super().__init__(node, why, remedy)
        self.is_lasting = is_lasting
        self.node = node
        self.why = why
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.node} is refused: {self.why}; {self.remedy}"


class LedgerDoubted(Conflict):
    """
    The ledger was just restored, or an edge has shown that it is an old copy or another one: no VM gets new ports
    until the ledger has taken in what nodes hold. Nothing changed.
    """

    code = "ledger-doubted"


class JournalNotKept(VirtPortsError):
    """
    A question about a time of which the ledger no longer has the journal.

    :param since: The moment from which on it is complete.
    """

    code = "journal-not-kept"
    http_status = 404
    exit_code = ExitCode.REFUSED

    def __init__(self, since: WallTime) -> None:
        super().__init__(since)
        self.since = since

    def __str__(self) -> str:
        return (
            f"the journal is complete only from {self.since} on; older entries are in the files that cpmd exported, "
            "see docs/reference/journal.md"
        )


class JournalGap(VirtPortsError):
    """
    A question about a time of which nothing is known, because an earlier ledger was restored.

    :param begin: The moment of that ledger.
    :param end: The moment from which on the journal is complete again; None: it is not yet.
    """

    code = "journal-gap"
    http_status = 404
    exit_code = ExitCode.REFUSED

    def __init__(self, begin: WallTime, end: WallTime | None) -> None:
        super().__init__(begin, end)
        self.begin = begin
        self.end = end

    def __str__(self) -> str:
        until = f"until {self.end}" if self.end is not None else "until now, see `virt-ports status`,"
        return (
            f"the journal is lost from {self.begin} {until} because an earlier ledger was restored; the former ledger, "
            "if it is there, is beside the present one as *.before-restore-*"
        )
