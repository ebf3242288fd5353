"""
cpmd: the composition root of the manager. Builds its parts and owns its loops; decides nothing.

Tested in tests/unit/cpm/cli/test_with_cpmd.py.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpm import settings as settings_
from cpm.api.access import Access, group_number
from cpm.api.page_server import PageServer
from cpm.api.scraping import Scraping
from cpm.api.server import Server, tls_context
from cpm.core.manager import Manager
from cpm.ledger import SqliteLedger
from cpm.protocol.errors import VirtPortsError
from cpm.queries import metrics
from cpm.queries.status import About
from cpm.service import certificates, clock, notify, program
from cpm.service.certificates import Files, LiveContext
from cpm.service.metrics import cpmd as declared
from cpm.service.metrics.process import process_metrics
from cpm.service.tasks import Tasks
from cpm.serving import event_export
from cpm.serving.decision_loop import DecisionLoop
from cpm.serving.event_export import EventExport
from cpm.serving.journal_keeper import JournalKeeper
from cpm.serving.journal_thread import JournalThread
from cpm.serving.live_settings import LiveSettings
from cpm.serving.node_sessions import NodeConnections, NodeSessions
from cpm.serving.operator_requests import OperatorRequests
from cpm.serving.streams import Feeds, ReportFollowers

if TYPE_CHECKING:
    from cpm.serving.status_page import StatusPage

log = logging.getLogger(__name__)

TICK_S = 1.0
"""Seconds between two ticks, in which the manager does what is due because time has passed."""


class Cpmd:
    """
    The service.

    :param settings: Checked settings.
    :param file: Where they come from.
    """

    def __init__(self, settings: settings_.Settings, file: Path = settings_.DEFAULT_PATH) -> None:
        self._settings = settings
        self.live = LiveSettings(file, settings, self._follow)
        self._tasks = Tasks()
        self._connections = NodeConnections()
        self._ledger: SqliteLedger
        self._journal: JournalThread
        self._keeper: JournalKeeper
        self._about: About
        self.decisions: DecisionLoop
        self.operators: OperatorRequests
        self._server: Server
        self._scraping: Scraping
        self.page: PageServer | None = None
        """Serves the status page; None: it is off."""
        self.pages: StatusPage | None = None
        """Makes it."""
        self._certificates: list[LiveContext] = []
        self._exports: list[EventExport] = []

    async def start(self) -> None:
        """
        Open the ledger, begin an epoch, listen.

        :raise LedgerError: When the ledger cannot be opened.
        :raise OSError: When a socket cannot be created or a certificate cannot be read or used.
        """
        self._build()
        self._tasks.start("decide", self.decisions.run(), forever=True)
        self._tasks.start("tick", self._tick(), forever=True)
        journal = self._settings.journal
        self._keeper = JournalKeeper(self._ledger, self._journal, journal.keep_days, self._settings.export_folder())
        self._tasks.start("journal", self._keeper.run(self.decisions.clock.now), forever=True)
        for export in self._exports:
            self._tasks.start(f"events to {export.name}", export.run(), forever=True)
        await self._listen()
        self._tasks.start("metrics", self._scraping.run(), forever=True)
        self._start_page()
        listeners = (self._scraping, self.page)
        self._certificates += [each.tls for each in listeners if each is not None and each.tls is not None]
        if self._certificates:
            self._tasks.start("certificates", certificates.follow(self._certificates), forever=True)
        if (period := notify.watchdog_period()) is not None:
            self._tasks.start("watchdog", self._watchdog(period), forever=True)
        manager = self.decisions.manager
        log.info(
            "epoch %d, %d VMs, listening on %s", manager.epoch, len(manager.fleet.vms), self._settings.listen.socket
        )

    async def wait_failed(self) -> None:
        """Wait until one of the loops has failed."""
        await self._tasks.failed.wait()

    def on_hangup(self) -> None:
        """Follow the settings file, as far as that needs no restart, and certificates."""
        self.live.reload()
        for each in self._certificates:
            each.refresh()

    def _follow(self, settings: settings_.Settings) -> None:
        logging.getLogger().setLevel(settings.log_level.upper())
        self._keeper.keep_days = settings.journal.keep_days
        self.decisions.use(settings.rules())

    async def stop(self) -> None:
        """Stop listening, end all sessions and tasks, close the ledger."""
        self._connections.close_all()
        await self._server.stop()
        await self._tasks.stop()
        self._ledger.close()
        self._journal.stop()
        for path in filter(None, (self._settings.listen.socket, self._settings.listen.read_socket)):
            with contextlib.suppress(OSError):
                Path(path).unlink()

    def _build(self) -> None:
        path = Path(self._settings.ledger.path)
        path.parent.mkdir(parents=True, exist_ok=True)
        version, reports = program.version(), ReportFollowers()
        about = self._about = About(version, clock.wall(), self._settings.ledger.path, self._settings.metrics.per_vm)
        self._scraping = Scraping("cpmd.toml", self._settings.metrics, lambda: self._metrics(about))
        self._ledger = SqliteLedger(path)
        self._journal = JournalThread(self._ledger.reader())
        self.decisions = DecisionLoop(self._ledger, self._settings.rules(), self._connections)
        folder = self._settings.events_folder()
        told = event_export.exports(self._settings.events, folder, self._journal, lambda: self.decisions.next_commit)
        self._exports = list(told)
        self.operators = OperatorRequests(Feeds(self._journal, self.decisions, reports), about, self.live)
        self._server = Server(self.operators, self._node_sessions(version, reports))

    def _start_page(self) -> None:
        """
        Serve the status page, if it is on.

        :raise OSError: When its certificate cannot be read or used.
        """
        listen = self._settings.page
        if listen.address is None:
            return
        # Here, since most sites need no templates.
        from cpm.serving.status_page import StatusPage

        self.pages = StatusPage(lambda: self.decisions.manager, self.decisions.clock.now, self._journal, self._about)
        self.page = PageServer(listen, listen.names, self.pages)
        self._tasks.start("page", self.page.run(), forever=True)
        self._tasks.start("curves", self.pages.run(), forever=True)

    def _metrics(self, about: About) -> Iterator[str]:
        yield from metrics.pieces(self.decisions.manager, self.decisions.clock.now(), about)
        yield from event_export.metrics(self._exports)
        yield declared.CERTIFICATE.text(certificates.ends(self._certificates))
        yield process_metrics()

    def _node_sessions(self, version: str, reports: ReportFollowers) -> NodeSessions:
        return NodeSessions(self.decisions, self._connections, version, reports)

    async def _listen(self) -> None:
        listen = self._settings.listen
        admin_group = group_number("cpmd.toml", listen.admin_group)
        for path, access in ((listen.socket, Access(admin_group)), (listen.read_socket, Access(is_read_only=True))):
            if path:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                await self._server.listen_unix(Path(path), access)
        if listen.address is not None and listen.certificate and listen.key and listen.ca:
            host, port = settings_.split_address("cpmd.toml", listen.address)
            files = Files(listen.certificate, listen.key, listen.ca)
            build = functools.partial(tls_context, listen.certificate, listen.key, listen.ca)
            live = LiveContext("listen", files, build, is_server=True)
            self._certificates.append(live)
            await self._server.listen_tls(host, port, live.for_listener())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            try:
                await self.decisions.do(Manager.tick)
            except VirtPortsError:
                # The next tick does what this one did not.
                log.exception("a tick failed; the next one is in %g s", TICK_S)

    async def _watchdog(self, period_s: float) -> None:
        while True:
            # Through the decision loop, so that the watchdog notices when it hangs.
            await self.decisions.do(lambda manager, now: None)
            notify.notify("WATCHDOG=1")
            await asyncio.sleep(period_s)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run cpmd; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="cpmd",
        description="Centralized Port Manager of virt-ports: keeps the ledger and decides what hosts and edges hold.",
        epilog="The external addresses are not configured here: add them with `virt-ports pool add`.",
    )
    return program.run(parser, settings_.DEFAULT_PATH, settings_.load, Cpmd, arguments)


if __name__ == "__main__":
    sys.exit(main())
