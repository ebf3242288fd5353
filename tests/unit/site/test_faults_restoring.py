"""
The same faults, and backups that are restored at any time between them: what the ledger forgot, kernels know.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from cpm.ledger import SqliteLedger, copies
from cpm.protocol.walltime import WallTime
from tests.fakes.ledgers import copy_unmarked
from tests.unit.site.test_faults import NODES, Faults


class FaultsAndBackups(Faults):
    """As before; the ledger is put back by a backup, or by the one that is in place, whatever it has."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.copies = 0
        self.backup: Path | None = None

    def _new(self) -> Path:
        self.copies += 1
        return Path(self.folder.name) / f"{self.copies}.db"

    @rule()
    def back_up(self) -> None:
        self.backup = self._new()
        copy_unmarked(self.site.ledger, self.backup)

    @precondition(lambda self: self.backup is not None)
    @rule(is_waiting=st.booleans())
    def restore(self, is_waiting: bool) -> None:
        assert self.backup is not None
        self.site.crash_manager()
        path = self._new()
        # What the present ledger knows of epochs and ranges is lost: the leap has to be enough.
        copies.restore(path, self.backup, WallTime.of(1e6 + self.site.now + self.copies))
        self.site.ledger.close()
        self.site.ledger = SqliteLedger(path)
        self.site.start_manager()
        for name in NODES if is_waiting else ():
            self.site.connect(name)
            self.site.run()
        if is_waiting:
            self.site.pass_time(31.0)

    def teardown(self) -> None:
        site = self.site
        site.heal()
        for _ in range(20):
            if site.manager is not None and site.manager.restoring is None:
                break
            site.heal()
            site.pass_time(10.0)
            site.check()
        assert site.manager is not None
        assert site.manager.restoring is None
        super().teardown()
        self.folder.cleanup()


TestFaultsAndBackups = FaultsAndBackups.TestCase
TestFaultsAndBackups.settings = settings(
    max_examples=40,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),
    suppress_health_check=list(HealthCheck),
)
