"""One run: brings the site up, injects the plan's faults while guests talk, and returns what came out."""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from shutil import copy

from chaos import observations
from chaos.faults import inject
from chaos.judge import Happened, Judge, Verdict
from chaos.kinds import locks
from chaos.plan import Fault
from chaos.site import HOLD_DOWN_S, Site, wait_settled
from lab.errors import LabError
from lab.lab import Lab

Say = Callable[[str], None]

_WORKERS = 24
WITNESSES = 2


class Run:
    """
    One run of a plan.

    :param folder: Empty; gets the programs' logs, the plan and the daemons' logs.
    """

    def __init__(self, lab: Lab, folder: Path, plan: Sequence[Fault], seconds: float, slots: int, say: Say) -> None:
        self._lab = lab
        self._folder = folder
        self._plan = plan
        self._seconds = seconds
        self._slots = slots
        self._say = say
        self._stopping = threading.Event()
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        """What faults need for themselves: on a busy machine one takes longer than was planned."""
        self.happened: list[Happened] = []
        self.failures: list[str] = []
        """What went wrong with the run itself, and what did not recover after it."""

    def run(self) -> Verdict:
        """
        Run it. :return: What came out; see also :attr:`failures`.

        :raise LabError: When the site does not come up.
        """
        self._lab.down()
        try:
            self._lab.up()
            site = Site(self._lab, self._folder)
            try:
                site.prepare(self._slots)
                self._say(f"{self._slots} guests on two hosts talk")
                self._disturb(site)
                self.failures += wait_settled(site)
                self._keep_answers()
                site.finish()
            finally:
                with ignoring_signals():
                    site.kill()
        finally:
            with ignoring_signals():
                self._keep_logs()
                self._lab.down()
        seen = observations.read(self._folder)
        if len(seen.packets) < WITNESSES or not all(seen.packets):
            self.failures.append(f"of {WITNESSES} witnesses some saw no packet: {seen.packets}")
        return Judge(self.happened, site.lives, seen, HOLD_DOWN_S).verdict()

    def _disturb(self, site: Site) -> None:
        (self._folder / "plan.txt").write_text("".join(f"{fault}\n" for fault in self._plan))
        begin = time.monotonic()
        futures: list[Future[None]] = []
        with ThreadPoolExecutor(_WORKERS) as pool:
            try:
                for fault in self._plan:
                    time.sleep(max(0.0, begin + fault.at - time.monotonic()))
                    self._say(str(fault))
                    futures.append(pool.submit(self._inject, site, fault))
                time.sleep(max(0.0, begin + self._seconds - time.monotonic()))
            finally:
                # Whatever is under way is undone.
                self._stopping.set()
        for future in futures:
            future.result()
        happened = [{"fault": str(one.fault), "began": one.began, "ended": one.ended} for one in self.happened]
        (self._folder / "happened.json").write_text(json.dumps(happened, indent=1))

    def _inject(self, site: Site, fault: Fault) -> None:
        with contextlib.ExitStack() as stack:
            for need in sorted(locks(fault.kind, fault.target)):
                stack.enter_context(self._locks[need])
            self._inject_alone(site, fault)

    def _inject_alone(self, site: Site, fault: Fault) -> None:
        began = time.monotonic()
        try:
            with inject(site, fault):
                self._stopping.wait(fault.lasts)
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            self.failures.append(f"{fault}: {error}")
        self.happened.append(Happened(fault, began, time.monotonic()))

    def _keep_answers(self) -> None:
        for words in (("list", "--all"), ("node", "list"), ("pool", "list"), ("events",)):
            with contextlib.suppress(LabError):
                (self._folder / f"{'-'.join(words)}.txt").write_text(self._lab.operate(*words))

    def _keep_logs(self) -> None:
        for log in self._lab.state.glob("*.log"):
            with contextlib.suppress(OSError):
                copy(log, self._folder)


@contextlib.contextmanager
def ignoring_signals() -> Iterator[None]:
    """Ignore what asks to end while the site is removed."""
    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.signal(number, signal.SIG_IGN) for number in ends}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
