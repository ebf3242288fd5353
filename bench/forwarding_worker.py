"""``python -m bench.forwarding_worker``: sends, answers, and changes ranges, for :mod:`bench.forwarding`."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from bench.edge_worker import PORTS, check_in_force, edge_settings
from bench.fleet import BIG, FIRST_EXTERNAL, fleet
from bench.worker import answer_lines
from cpm.protocol.intent import ExternalRange
from cpm.protocol.model import PortRange
from natctl.kernel.kernel import Kernel
from natctl.model.entries import Change, FastPathUse

FLOWS: Final = 64
"""Each from a port of its own to the same port, where a socket of the other end is."""
_PAYLOAD: Final = bytes(32)


class _Here:
    """What runs in one namespace."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._kernel: Kernel | None = None
        self._vms = 0
        self._held: list[socket.socket] = []
        self._is_over = threading.Event()
        self._asking: threading.Thread | None = None
        self._asked = self._lost = 0

    def sink(self, address: str) -> None:
        """Have sockets at the flows' ports that take packets and are never read."""
        for port in _flow_ports():
            made = _bound(address, port, shared=True)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            self._held.append(made)

    def received(self) -> int:
        """Return how many packets came to the interface so far."""
        return int(Path("/proc/thread-self/net/dev").read_text().partition("eth0:")[2].split()[1])

    def send_ns(self, source: str, to: str, count: int) -> float:
        """Send packets of all flows in turn. :return: Nanoseconds that one takes."""
        flows = []
        for port in _flow_ports():
            flow = _bound(source, port, shared=True)
            flow.connect((to, port))
            flows.append(flow)
        sends = [flow.send for flow in flows]
        processor = max(os.sched_getaffinity(0))
        before = os.sched_getaffinity(0), os.sched_getscheduler(0), os.sched_getparam(0)
        os.sched_setaffinity(0, {processor})
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        try:
            begin = time.perf_counter_ns()
            for send in itertools.islice(itertools.cycle(sends), count):
                send(_PAYLOAD)
            return (time.perf_counter_ns() - begin) / count
        finally:
            os.sched_setscheduler(0, before[1], before[2])
            os.sched_setaffinity(0, before[0])
            for flow in flows:
                flow.close()

    def program(self, use: str, vms: int) -> None:
        """Be an edge with these VMs."""
        self._vms = vms
        wanted, self._kernel = fleet(vms), Kernel(edge_settings(FastPathUse(use)))
        self._loop.run_until_complete(self._kernel.replace({}, wanted.edge, wanted.path))
        check_in_force(self._kernel, FastPathUse(use))
        # Its programs are at tcx from the next check on.
        self._loop.run_until_complete(self._kernel.ensure())

    def close(self) -> None:
        """Let go of the kernel, which goes on with what it holds."""
        if self._kernel is not None:
            self._loop.run_until_complete(self._kernel.close())

    def change(self, count: int, each: int) -> None:
        """Change the first VM's range: its tables of the fast path, and each so often nftables too."""
        assert self._kernel is not None
        first = next(iter(fleet(self._vms).edge.values()))
        shorter = ExternalRange(FIRST_EXTERNAL, PortRange(BIG.first, BIG.last - PORTS))
        states = itertools.cycle((msgspec.structs.replace(first, ranges=(shorter,)), first))
        fast_path, now = self._kernel._programmed.fast_path, first  # noqa: SLF001 - tables alone are no service of it
        for turn, state in zip(range(count), states, strict=False):
            if turn % each:
                with fast_path.changed([now], [state]):
                    pass
            else:
                self._loop.run_until_complete(self._kernel.change(Change(edge={first.domain: state})))
            now = state

    def answer(self, address: str, port: int) -> None:
        """Answer everything that comes, until this process ends."""
        made = _bound(address, port)

        def work() -> None:
            while True:
                made.sendto(*made.recvfrom(100))

        threading.Thread(target=work, daemon=True).start()

    def ask(self, source: str, port: int, to: str, to_port: int, patience_s: float) -> None:
        """Ask, and wait so long for the answer, again and again until :meth:`asked`."""
        made = _bound(source, port, shared=True)
        made.connect((to, to_port))
        made.settimeout(patience_s)

        def work() -> None:
            while not self._is_over.is_set():
                self._asked += 1
                made.send(self._asked.to_bytes(8, "big"))
                try:
                    while made.recv(100) != self._asked.to_bytes(8, "big"):
                        pass
                except TimeoutError:
                    self._lost += 1

        self._asking = threading.Thread(target=work)
        self._asking.start()

    def asked(self) -> tuple[int, int]:
        """Stop asking. :return: How many questions there were, and how many had no answer."""
        assert self._asking is not None
        self._is_over.set()
        self._asking.join()
        return self._asked, self._lost


def _flow_ports() -> range:
    return range(BIG.first + 100, BIG.first + 100 + FLOWS)


def _bound(address: str, port: int, *, shared: bool = False) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    if shared:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind((address, port))
    return made


if __name__ == "__main__":
    with contextlib.closing(_Here()) as here:
        calls: dict[str, Callable[..., Any]] = {
            name: getattr(here, name)
            for name in ("sink", "received", "send_ns", "program", "change", "answer", "ask", "asked")
        }
        answer_lines(lambda name, arguments: calls[name](*arguments))
