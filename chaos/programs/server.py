"""
The far end: ``server.py LOG FIRST_PORT LAST_PORT`` echoes TCP lines and UDP datagrams on every port of a range.

A line or datagram is ``GUEST FLOW NUMBER PADDING``. The guest has to be the one of the port, and a flow has to count
by one over TCP; what does not is written down as ``wrong``. A datagram's echo is followed by the source that was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import socket
import sys
import time
from typing import Any, TextIO

FIRST = 9000
TCP_RTO_MAX_MS = 44
"""Linux 6.15; so that a connection goes on a second after its path does, however long it was away."""
TCP_USER_TIMEOUT = 18
LAG_S = 0.25


class Server:
    """All ports."""

    def __init__(self, log: TextIO) -> None:
        self._log = log

    def write(self, **facts: Any) -> None:
        """Append one object to the log."""
        self._log.write(json.dumps(facts) + "\n")
        self._log.flush()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Echo the lines of one connection."""
        connection: socket.socket = writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, TCP_RTO_MAX_MS, 1000)
            # With it, fifteen tries take fifteen seconds only.
            connection.setsockopt(socket.IPPROTO_TCP, TCP_USER_TIMEOUT, 120_000)
        number = connection.getsockname()[1] - FIRST
        expected = 0
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                words = line.split()
                if words[:1] != [b"%d" % number] or words[2:3] != [b"%d" % expected]:
                    self.write(kind="wrong", at=time.monotonic(), guest=number, text=repr(line[:60]))
                expected += 1
                writer.write(line)
                await writer.drain()
        writer.close()

    async def watch_lag(self) -> None:
        """Write down when this process had to wait for a processor."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(LAG_S / 2)
            now = time.monotonic()
            if now - began > LAG_S:
                self.write(kind="lag", guest=-1, begin=began, end=now)


class Datagrams(asyncio.DatagramProtocol):
    """One UDP port."""

    def __init__(self, server: Server, port: int) -> None:
        self._server = server
        self._number = port - FIRST

    def connection_made(self, transport: Any) -> None:
        """Keep the transport for answers."""
        self._transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Echo a datagram with the source that was seen."""
        if data.split()[:1] != [b"%d" % self._number]:
            # Hostile senders may send what they like, in their own name.
            if not data.startswith(b"FORGED"):
                self._server.write(kind="wrong", at=time.monotonic(), guest=self._number, text=repr(data[:60]))
            return
        self._transport.sendto(data + f" {addr[0]}:{addr[1]}".encode(), addr)


async def run(server: Server, ports: range) -> None:
    """Serve until SIGTERM."""
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    for port in ports:
        await asyncio.start_server(server.serve, "0.0.0.0", port, backlog=1024)
        await loop.create_datagram_endpoint(lambda port=port: Datagrams(server, port), ("0.0.0.0", port))  # type: ignore[misc]
    lag = loop.create_task(server.watch_lag())
    print("ready", flush=True)
    await stopping.wait()
    lag.cancel()


def main() -> None:
    """Run."""
    with open(sys.argv[1], "a") as log:  # noqa: PTH123 - a program of its own
        asyncio.run(run(Server(log), range(int(sys.argv[2]), int(sys.argv[3]) + 1)))


if __name__ == "__main__":
    main()
