"""
Keeps the journal small: packs older entries, and deletes what is older than it has to be, once it is exported.

What takes long, reading and compressing, happens in the journal's thread. In the event loop there is one short
transaction for some two thousand entries.

Tested in tests/unit/cpm/serving/test_journal_keeper.py.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from cpm.ledger import JournalReader, SqliteLedger
from cpm.protocol.ledger_errors import LedgerError
from cpm.serving.journal_thread import JournalThread

log = logging.getLogger(__name__)

PASS_S: Final = 60.0
"""Seconds between two passes."""
EXPORT_S: Final = 86400.0
"""Seconds between two exports: each makes a file."""
DAY_S: Final = 86400.0


class JournalKeeper:
    """
    The task that keeps the journal small.

    :param ledger: Written to.
    :param journal: The thread that reads.
    :param keep_days: Days that entries are kept in the ledger; 0: for ever.
    :param folder: Gets the files with the others.
    """

    def __init__(self, ledger: SqliteLedger, journal: JournalThread, keep_days: int, folder: Path) -> None:
        self._ledger = ledger
        self._journal = journal
        self.keep_days = keep_days
        """Days that entries are kept in the ledger; 0: for ever."""
        self._folder = folder
        self._export_at = 0.0

    async def run(self, now: Callable[[], float]) -> None:
        """
        Pack and export until cancelled; what fails is tried again.

        :param now: Returns ledger time, so that nothing goes because somebody has set the wall clock.
        """
        while True:
            await asyncio.sleep(PASS_S)
            try:
                await self.pass_once(now())
            except LedgerError as error:
                log.warning("the journal stays as it is: %s", error)

    async def pass_once(self, now: float) -> None:
        """
        Pack what there is to pack, and once a day export and delete what is too old.

        :param now: Ledger time.
        :raise LedgerError: When something cannot be written; what was not exported is still there.
        """
        keep_s = self.keep_days * DAY_S if self.keep_days else math.inf
        timeline = await self._journal.read(JournalReader.timeline)
        older_than = timeline.wall(now - keep_s).seconds
        begin: IPv4Address | None = None
        while packing := await self._journal.read(JournalReader.next_packing, older_than, begin=begin):
            self._ledger.pack(packing)
            begin = packing.chunk.external
        if now < self._export_at or keep_s == math.inf:
            return
        plans = await self._journal.read(JournalReader.export_old, older_than, self._folder)
        self._export_at = now + EXPORT_S
        for plan in plans:
            self._ledger.give_up(plan)
            # Others have their turn between two transactions.
            await asyncio.sleep(0)
        if plans:
            log.info("exported the journal from before %.0f (UTC seconds) to %s", older_than, self._folder)
