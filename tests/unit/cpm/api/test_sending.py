"""Clients that ask for much and read nothing: what is kept for them in memory, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from cpm.api import operations, sending
from cpm.api.access import Access, Peer
from cpm.api.operations import Operation
from cpm.api.server import MOST_OF_USER, Server
from cpm.api.views import Document, ReportView
from cpm.protocol.model import NodeName
from cpm.protocol.walltime import UtcSeconds
from cpm.serving.streams import MAX_QUEUED_REPORTS, ReportFollowers

MEGABYTES = 8
LINE = "x" * 65535 + "\n"


class Requests:
    """Answers everything with many megabytes."""

    def __init__(self) -> None:
        self.kept = 0
        self.streams = 0

    async def answer(self, operation: Operation[Any], arguments: Mapping[str, Any], peer: Peer) -> object:
        if operation is operations.METRICS:
            return Document("text/plain", self._pieces())
        return {"text": "x" * (MEGABYTES << 20)}

    def _pieces(self) -> Iterator[str]:
        self.kept += 1
        try:
            for _ in range(16 * MEGABYTES):
                yield LINE
        finally:
            self.kept -= 1

    async def stream(self, operation: Operation[Any], arguments: Mapping[str, Any]) -> AsyncIterator[object]:
        self.streams += 1
        try:
            for _ in range(16 * MEGABYTES):
                yield LINE
        finally:
            self.streams -= 1


@contextlib.asynccontextmanager
async def serving(tmp_path: Path, requests: Requests) -> AsyncIterator[tuple[Server, Path]]:
    server = Server(requests, nodes=None)  # type: ignore[arg-type]
    path = tmp_path / "s"
    await server.listen_unix(path, Access())
    try:
        yield server, path
    finally:
        await server.stop()


def ask(path: Path, target: str) -> socket.socket:
    """Ask, and read nothing."""
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    client.sendall(f"GET {target} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    return client


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("target", ["/metrics", "/v1/status", "/v1/events"])
async def test_an_answer_that_is_not_read_does_not_stay_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(sending, "SEND_S", 0.3)
    monkeypatch.setattr(sending, "STALL_S", 0.3)
    requests = Requests()
    async with serving(tmp_path, requests) as (server, path):
        clients = [ask(path, target) for _ in range(4)]
        await until(lambda: sum(server._under_way.values()) == 4)
        await until(lambda: not server._under_way)
        gc.collect()
        assert (requests.kept, requests.streams) == (0, 0)
        for client in clients:
            client.settimeout(30)
            taken = 0
            with contextlib.suppress(ConnectionError):
                while piece := await asyncio.to_thread(client.recv, 1 << 20):
                    taken += len(piece)
            assert taken < 2 << 20, "the rest was dropped"
            client.close()


@pytest.mark.parametrize("target", ["/metrics", "/v1/status", "/v1/events"])
async def test_one_that_reads_gets_all_of_it(tmp_path: Path, target: str) -> None:
    async with serving(tmp_path, Requests()) as (_, path):
        reader, writer = await asyncio.open_unix_connection(path)
        writer.write(f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        taken = 0
        while piece := await asyncio.wait_for(reader.read(1 << 20), 60):
            taken += len(piece)
        assert taken > MEGABYTES << 20
        writer.close()


async def test_clients_that_do_not_read_keep_nobody_else_out_for_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "SEND_S", 0.5)
    async with serving(tmp_path, Requests()) as (server, path):
        deaf = [ask(path, "/metrics") for _ in range(MOST_OF_USER)]
        await until(lambda: sum(server._under_way.values()) == MOST_OF_USER)
        await until(lambda: not server._under_way)
        for each in deaf:
            each.close()


def test_followers_that_do_not_read_hold_the_same_reports_however_many_they_are() -> None:
    """They differ in when they have begun to read nothing."""

    async def story() -> None:
        followers = ReportFollowers()
        streams = []
        for begin in range(8):
            stream = followers.follow()
            streams.append((stream, asyncio.ensure_future(anext(stream))))
            await asyncio.sleep(0)
            for number in range(MAX_QUEUED_REPORTS):
                followers.publish(ReportView(UtcSeconds(float(number)), NodeName(f"host{begin}"), 1.0, ()))
            await asyncio.sleep(0)
        held = {id(report) for queue in followers._queues for report in list(queue._queue)}  # type: ignore[attr-defined]
        assert len(held) == MAX_QUEUED_REPORTS
        for stream, first in streams:
            await first
            await stream.aclose()  # type: ignore[attr-defined]

    asyncio.run(story())
