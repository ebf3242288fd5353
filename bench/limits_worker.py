"""``python -m bench.limits_worker``: a guest that begins as many flows as it can, for :mod:`bench.limits` only."""

from __future__ import annotations

import contextlib
import itertools
import socket
import threading
import time
from typing import Final

from bench.worker import answer_lines

_SLICE_S: Final = 0.01
_FIRST: Final = 10_000


class Here:
    """The other side: sockets, and a thread that sends."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._is_resting = threading.Event()
        self._thread: threading.Thread | None = None
        self._next = itertools.cycle(range(_FIRST, 60_000))

    def fill(self, address: str, ports: int, destinations: int) -> None:
        """Send from so many ports to so many destinations each."""
        while len(self._sockets) < ports:
            self._sockets.append(_udp())
        for port in range(_FIRST, _FIRST + destinations):
            for each in self._sockets:
                _send(each, address, port)

    def flood(self, address: str, flows: int) -> None:
        """Begin so many flows as fast as possible."""
        for _ in range(flows // 5_000 + 1):
            with _udp() as one:
                for _ in range(5_000):
                    _send(one, address, next(self._next))

    def hammer(self, address: str, per_s: int) -> None:
        """Begin so many flows a second from now on, every second one to where :meth:`fill` sent."""
        self._is_resting.clear()
        self._thread = threading.Thread(target=self._hammer, args=(address, per_s))
        self._thread.start()

    def rest(self) -> None:
        """Stop hammering."""
        self._is_resting.set()
        if self._thread is not None:
            self._thread.join()

    def _hammer(self, address: str, per_s: int) -> None:
        due, begin, sent = 0, time.monotonic(), 0
        one = _udp()
        while not self._is_resting.wait(_SLICE_S):
            due = int((time.monotonic() - begin) * per_s)
            while sent < due:
                if sent % 2_000 == 0:
                    # Another port, so that what it sent to before is new again.
                    one.close()
                    one = _udp()
                _send(one, address, _FIRST + sent % 2_000 if sent % 2 else next(self._next))
                sent += 1
        one.close()


def _udp() -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
    return made


def _send(one: socket.socket, address: str, port: int) -> None:
    # An ICMP error for what was sent before.
    with contextlib.suppress(OSError):
        one.sendto(b"x", (address, port))


if __name__ == "__main__":
    here = Here()
    answer_lines(lambda name, arguments: getattr(here, name)(*arguments))
