"""
The traffic of one guest: ``talker.py LOG NUMBER ADDRESS`` talks to port ``9000 + NUMBER`` until SIGTERM.

- TCP connections that last and talk five times a second, one that talks only every 15 seconds, one UDP flow and one
  flow of pings: each silence is written down (``gap``), each end (``cut``), each change of a UDP flow's source as the
  server sees it (``moved``). What was cut is opened again.
- short TCP connections, one after the other has begun (``short``), and on SIGUSR1 a burst of them (``burst``).
- ``lag``: this process had to wait for a processor.

Ports 5001 and up are the sources of the flows that last, so that hostile neighbours can aim at them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Coroutine
from typing import Any, TextIO

FIRST = 9000
LASTING = 3
FIRST_SOURCE = 5001
UDP_SOURCE = 5000
PERIOD_S = 0.2
IDLE_S = 15.0
PING_S = 1.0
GAP_S = 0.3
CUT_S = 45.0
SHORT_S = 0.8
OPEN_S = 20.0
BURST = 150
BURST_HOLD_S = 3.0
LAG_S = 0.25
TCP_RTO_MAX_MS = 44
"""Linux 6.15; so that a connection goes on a second after its path does, however long it was away."""
TCP_USER_TIMEOUT = 18
TRIES = 30
PADDING = "x" * 100


class Talker:
    """One guest."""

    def __init__(self, log: TextIO, number: int, address: str) -> None:
        self._log = log
        self._number = number
        self._server = (address, FIRST + number)
        self._stopping = asyncio.Event()
        self._others: set[asyncio.Task[None]] = set()

    def write(self, kind: str, **facts: Any) -> None:
        """Append one object to the log."""
        self._log.write(json.dumps({"kind": kind, "guest": self._number, **facts}) + "\n")
        self._log.flush()

    def stop(self) -> None:
        """Begin to stop."""
        self._stopping.set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something beside."""
        task = asyncio.get_running_loop().create_task(work)
        self._others.add(task)
        task.add_done_callback(self._others.discard)

    async def run(self) -> None:
        """Talk until told to stop."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.stop)
        loop.add_signal_handler(signal.SIGUSR1, lambda: self.start(self.burst()))
        self.start(self.watch_lag())
        flows = [self.last(f"tcp{n}", FIRST_SOURCE + n, PERIOD_S) for n in range(LASTING)]
        flows += [self.last("idle", FIRST_SOURCE + LASTING, IDLE_S), self.datagrams(), self.ping()]
        tasks = [loop.create_task(flow) for flow in flows]
        short = loop.create_task(self.open_short())
        await self._stopping.wait()
        short.cancel()
        await asyncio.wait(tasks, timeout=CUT_S + 5.0)
        for task in (*tasks, *self._others):
            task.cancel()
        for task in tasks:
            if task.done() and not task.cancelled():
                task.result()

    # Connections that last

    async def last(self, flow: str, source: int, period_s: float) -> None:
        """Keep one connection; open another when it was cut."""
        while not self._stopping.is_set():
            opened = time.monotonic()
            try:
                reader, writer = await self.open(source)
            except (OSError, TimeoutError) as error:
                self.write("failed", flow=flow, begin=opened, end=time.monotonic(), why=_words(error))
                await asyncio.sleep(0.5)
                continue
            now = time.monotonic()
            if now - opened > GAP_S:
                self.write("gap", flow=f"{flow}-opening", begin=opened, end=now)
            await self._talk(flow, reader, writer, period_s, now)
            writer.close()

    async def _talk(
        self, flow: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, period_s: float, opened: float
    ) -> None:
        rounds, worst, sent = 0, 0.0, opened
        try:
            while not self._stopping.is_set() or rounds == 0:
                line = f"{self._number} {flow} {rounds} {PADDING}\n".encode()
                sent = time.monotonic()
                writer.write(line)
                heard = await asyncio.wait_for(reader.readline(), CUT_S)
                now = time.monotonic()
                if heard != line:
                    raise ConnectionError(f"said {line[:30]!r}, heard {heard[:30]!r}")
                worst, rounds = max(worst, now - sent), rounds + 1
                if now - sent > GAP_S:
                    self.write("gap", flow=flow, begin=sent, end=now)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), period_s)
            if period_s == IDLE_S:
                self.write("rounds", flow=flow, rounds=rounds)
        except (OSError, TimeoutError) as error:
            self.write("cut", flow=flow, begin=sent, end=time.monotonic(), opened=opened, why=_words(error))
        self.write("flow", flow=flow, begin=opened, end=time.monotonic(), rounds=rounds, worst=worst)

    async def open(self, source: int = 0) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Connect. :raise OSError: :raise TimeoutError: When it cannot be."""
        connection = socket.socket()
        try:
            connection.setblocking(False)  # noqa: FBT003
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            # So that the port is free for the next one at once.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            with contextlib.suppress(OSError):
                connection.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, 1000)
            # With it, fifteen tries take fifteen seconds only.
            connection.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, int(2000 * CUT_S))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT, TRIES)
            if source:
                connection.bind(("", source))
            try:
                await asyncio.wait_for(asyncio.get_running_loop().sock_connect(connection, self._server), OPEN_S)
            except TimeoutError:
                raise TimeoutError(f"from port {connection.getsockname()[1]}") from None
            return await asyncio.open_connection(sock=connection)
        except BaseException:
            connection.close()
            raise

    # Short connections

    async def open_short(self) -> None:
        """Begin one short connection after the other."""
        while True:
            self.start(self.short("short", 0.0))
            await asyncio.sleep(SHORT_S)

    async def burst(self) -> None:
        """Open many at once and hold them."""
        await asyncio.gather(*(self.short("burst", BURST_HOLD_S) for _ in range(BURST)))

    async def short(self, kind: str, hold_s: float) -> None:
        """Open one, say a line and hear it, hold it, close it."""
        began, writer, why = time.monotonic(), None, ""
        try:
            reader, writer = await self.open()
            line = f"{self._number} {kind} 0 {PADDING}\n".encode()
            writer.write(line)
            heard = await asyncio.wait_for(reader.readline(), OPEN_S)
            if heard != line:
                raise ConnectionError(f"said {line[:30]!r}, heard {heard[:30]!r}")
        except (OSError, TimeoutError) as error:
            why = _words(error)
        self.write(kind, begin=began, end=time.monotonic(), why=why)
        if writer is not None:
            await asyncio.sleep(hold_s)
            writer.close()

    # Datagrams

    async def datagrams(self) -> None:
        """Keep one UDP flow."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
            udp.setblocking(False)  # noqa: FBT003
            udp.bind(("", UDP_SOURCE))
            udp.connect(self._server)
            await self._exchange("udp", udp, PERIOD_S, self._datagram, self._datagram_heard)

    def _datagram(self, number: int) -> bytes:
        return f"{self._number} udp {number} -".encode()

    def _datagram_heard(self, data: bytes) -> tuple[int, str]:
        words = data.decode().split()
        return (int(words[2]), words[4]) if words[:2] == [str(self._number), "udp"] else (-1, "")

    async def ping(self) -> None:
        """Keep one flow of pings."""
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
            raw.setblocking(False)  # noqa: FBT003
            raw.connect((self._server[0], 0))
            await self._exchange("ping", raw, PING_S, self._echo_request, self._echo_reply)

    def _echo_request(self, number: int) -> bytes:
        body = struct.pack("!HHI", 4242, number & 0xFFFF, number) + f"{self._number} ping".encode()
        checksum = _checksum(struct.pack("!BBH", 8, 0, 0) + body)
        return struct.pack("!BBH", 8, 0, checksum) + body

    def _echo_reply(self, packet: bytes) -> tuple[int, str]:
        icmp = packet[(packet[0] & 15) * 4 :]
        if icmp[:1] != b"\0" or icmp[12:] != f"{self._number} ping".encode():
            return -1, ""
        return int(struct.unpack_from("!I", icmp, 8)[0]), ""

    async def _exchange(self, flow: str, sock: socket.socket, period_s: float, make: Any, read: Any) -> None:
        """Send number after number; write down how long none of them was answered, and changes of the source."""
        opened = time.monotonic()
        sent: dict[int, float] = {}
        place, rounds, worst, number = "", 0, 0.0, 0
        while not self._stopping.is_set() or (sent and time.monotonic() - max(sent.values()) < GAP_S):
            now = time.monotonic()
            if not self._stopping.is_set():
                with contextlib.suppress(OSError):
                    sock.send(make(number))
                sent[number] = now
                number += 1
            while (left := now + period_s - time.monotonic()) > 0:
                try:
                    loop = asyncio.get_running_loop()
                    data = await asyncio.wait_for(loop.sock_recv(sock, 2048), left)
                except TimeoutError:
                    break
                except OSError:
                    # An ICMP error about an earlier datagram.
                    await asyncio.sleep(0.01)
                    continue
                heard, where = read(data)
                if heard not in sent:
                    continue
                here = time.monotonic()
                oldest = min(sent.values())
                worst, rounds = max(worst, here - oldest), rounds + 1
                if here - oldest > GAP_S:
                    self.write("gap", flow=flow, begin=oldest, end=here)
                sent = {n: at for n, at in sent.items() if n > heard}
                if where and place and where != place:
                    self.write("moved", flow=flow, at=here, before=place, after=where)
                place = where
        if sent and (begin := min(sent.values())) < time.monotonic() - 2 * period_s - GAP_S:
            self.write("gap", flow=flow, begin=begin, end=time.monotonic())
        self.write("flow", flow=flow, begin=opened, end=time.monotonic(), rounds=rounds, worst=worst)

    async def watch_lag(self) -> None:
        """Write down when this process had to wait for a processor."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(LAG_S / 2)
            now = time.monotonic()
            if now - began > LAG_S:
                self.write("lag", begin=began, end=now)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__} {error}".strip()


def _checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


def main() -> None:
    """Run."""
    os.umask(0o022)
    with open(sys.argv[1], "a") as log:  # noqa: PTH123 - a program of its own
        asyncio.run(Talker(log, int(sys.argv[2]), sys.argv[3]).run())


if __name__ == "__main__":
    main()
