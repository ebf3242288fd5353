"""The command line against the server that cpmd runs, with a backend that says what it is told."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import itertools
import json
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from cpm.api.client import Client, RemoteError
from cpm.api.server import Channel, Server
from cpm.api.views import (
    AddressView,
    DomainDetail,
    DomainView,
    EventView,
    ExplainView,
    NodeView,
    PoolRequest,
    ReportView,
    ResizeRequest,
    StatusView,
    WhoisView,
    WishesRequest,
)
from cpm.cli import main
from cpm.protocol.errors import (
    AddressInUse,
    Ambiguous,
    InternalPoolExhausted,
    LedgerError,
    NotFound,
    PortsExhausted,
    VirtPortsError,
)
from cpm.protocol.messages import Hello, NodeMessage
from cpm.protocol.model import NodeName
from tests.unit.cpm.cli.conftest import NOW, WEB, Result, domain
from tests.unit.cpm.cli.test_verbs import ADDRESS, DETAIL, EVENTS, EXPLAINED, NODES, whois_view


class SaysWhatItIsTold:
    """A backend; ``trouble`` is raised by every call, ``asked`` remembers the arguments."""

    def __init__(self) -> None:
        self.trouble: Exception | None = None
        self.asked: list[object] = []
        self.more: asyncio.Queue[EventView] = asyncio.Queue()

    def _hear(self, *arguments: object) -> None:
        self.asked.append(arguments)
        if self.trouble is not None:
            raise self.trouble

    async def domains(self, *, everything: bool) -> Sequence[DomainView]:
        self._hear("domains", everything)
        return [domain()]

    async def domain(self, name: str) -> DomainDetail:
        self._hear("domain", name)
        return DETAIL

    async def set_wishes(self, name: str, request: WishesRequest) -> DomainDetail:
        self._hear("set", name, request)
        return DETAIL

    async def resize(self, name: str, request: ResizeRequest) -> DomainDetail:
        self._hear("resize", name, request)
        return DETAIL

    async def relocate(self, name: str) -> DomainDetail:
        self._hear("relocate", name)
        return DETAIL

    async def explain(self, name: str) -> ExplainView:
        self._hear("explain", name)
        return EXPLAINED

    async def history(self, name: str, limit: int) -> Sequence[EventView]:
        self._hear("history", name, limit)
        return EVENTS

    async def whois(self, address: IPv4Address, port: int, at: float | None) -> WhoisView:
        self._hear("whois", address, port, at)
        return whois_view(NOW if at is None else at)

    async def pool(self) -> Sequence[AddressView]:
        self._hear("pool")
        return [ADDRESS]

    async def pool_add(self, request: PoolRequest) -> Sequence[AddressView]:
        self._hear("pool_add", request)
        return [ADDRESS]

    async def pool_remove(self, address: IPv4Address) -> Sequence[AddressView]:
        self._hear("pool_remove", address)
        return []

    async def nodes(self) -> Sequence[NodeView]:
        self._hear("nodes")
        return NODES

    async def fence(self, name: str, *, fenced: bool) -> NodeView:
        self._hear("fence", name, fenced)
        return NODES[0]

    async def events(self, after: int | None, limit: int, *, follow: bool) -> AsyncIterator[EventView]:
        self._hear("events", after, limit, follow)
        for event in EVENTS[: 0 if follow else None]:
            yield event
        while follow:
            yield await self.more.get()

    async def measurements(self) -> AsyncIterator[ReportView]:
        self._hear("measurements")
        yield ReportView(NOW, NodeName("host1"), 1.0, ())

    async def status(self) -> StatusView:
        self._hear("status")
        return StatusView("0.1.0", 1, NOW, 1, 2, 2, "ledger.db")

    async def metrics(self) -> tuple[bytes, str]:
        return b"", "text/plain"

    async def opened(self, hello: Hello, channel: Channel) -> None: ...

    async def heard(self, node: NodeName, channel: Channel, message: NodeMessage) -> None: ...

    async def closed(self, node: NodeName, channel: Channel) -> None: ...


class Running:
    """A server in a thread of its own, as the blocking client needs it."""

    def __init__(self, backend: SaysWhatItIsTold, loop: asyncio.AbstractEventLoop, path: str) -> None:
        self.backend = backend
        self.path = path
        self._loop = loop

    def wait(self, work: Coroutine[Any, Any, Any]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(60)


@pytest.fixture
def server() -> Iterator[Running]:
    directory = Path(tempfile.mkdtemp(prefix="vpt-"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server")
    thread.start()
    backend = SaysWhatItIsTold()
    running, real = Running(backend, loop, str(directory / "cpmd.sock")), Server(backend)
    try:
        running.wait(real.listen_unix(directory / "cpmd.sock"))
        yield running
    finally:
        running.wait(real.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
        shutil.rmtree(directory)


@pytest.fixture
def run(server: Running, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*words: str) -> Result:
        code = main.execute(["--socket", server.path, *words], now=NOW)
        return Result(code, *capsys.readouterr())

    return run


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["list"], ("domains", False)),
        (["list", "--all"], ("domains", True)),
        (["show", "a/b?c#d é%2F"], ("domain", "a/b?c#d é%2F")),
        (
            ["set", "web 1", "floor=64", "drain-limit=2.5", "--unset", "cap"],
            ("set", "web 1", WishesRequest(floor=64, cap=None, drain_limit_s=2.5)),
        ),
        (["resize", "web 1", "512"], ("resize", "web 1", ResizeRequest(512))),
        (["relocate", "web/1"], ("relocate", "web/1")),
        (["explain", "web 1"], ("explain", "web 1")),
        (["history", "web 1", "--limit", "5"], ("history", "web 1", 5)),
        (["whois", "203.0.113.1", "20817"], ("whois", IPv4Address("203.0.113.1"), 20817, None)),
        (
            ["whois", "203.0.113.1", "7", "--at", "-10m", "--protocol", "icmp"],
            ("whois", IPv4Address("203.0.113.1"), 7, NOW - 600),
        ),
        (["pool", "list"], ("pool",)),
        (
            ["pool", "add", "203.0.113.1", "--reserved", "5060,8000-8100"],
            ("pool_add", PoolRequest((ADDRESS.address,), ADDRESS.reserved)),
        ),
        (["pool", "remove", "203.0.113.1"], ("pool_remove", IPv4Address("203.0.113.1"))),
        (["node", "list"], ("nodes",)),
        (["node", "fence", "host1"], ("fence", "host1", True)),
        (["node", "unfence", "host1"], ("fence", "host1", False)),
        (["events", "--after", "3", "--limit", "7"], ("events", 3, 7, False)),
        (["status"], ("status",)),
    ],
)
def test_every_verb_is_understood(server: Running, run: Any, words: list[str], asked: tuple[object, ...]) -> None:
    assert (run(*words).code, run(*words, "-o", "json").code) == (0, 0)
    assert server.backend.asked == [asked, asked]
    assert run("-o", "json", *words).json is not None


@pytest.mark.parametrize(
    ("trouble", "code"),
    [
        (NotFound("VM", "web1", "see `virt-ports list`"), 1),
        (Ambiguous("web1", (WEB, "x")), 1),
        (AddressInUse(IPv4Address("203.0.113.1"), 2), 1),
        (PortsExhausted(64, 0, "no external address in the pool"), 1),
        (InternalPoolExhausted("100.64.0.0/30"), 1),
        (LedgerError("disk full; make room"), 4),
    ],
)
def test_the_managers_sentence_arrives(server: Running, run: Any, trouble: VirtPortsError, code: int) -> None:
    server.backend.trouble = trouble
    assert run("show", "web1") == (code, "", f"error: {trouble}\n")
    assert json.loads(run("show", "web1", "-o", "json").err) == {"code": trouble.code, "message": str(trouble)}


def test_measurements_are_only_there_to_be_followed(server: Running) -> None:
    with pytest.raises(RemoteError, match="ask with follow=1"):
        next(Client(server.path).stream(ReportView, "/v1/measurements"))
    [report] = itertools.islice(Client(server.path).stream(ReportView, "/v1/measurements", follow=True), 1)
    assert (report.at, report.node) == (NOW, "host1")


def test_a_limit_the_manager_refuses_is_a_matter_of_usage(run: Any) -> None:
    assert run("history", "web1", "--limit", "0").code == 2


@pytest.mark.parametrize("ports", ["0", "65536"])
def test_a_size_that_no_range_can_have_is_a_matter_of_usage(server: Running, run: Any, ports: str) -> None:
    assert run("resize", "web1", ports).code == 2
    assert server.backend.asked == []


class KeepsItsConnection(Client):
    """Lets a test look at the socket."""

    def _connect(self) -> http.client.HTTPConnection:
        self.connection = super()._connect()
        return self.connection


def test_following_waits_without_limit_and_gets_each_event_at_once(server: Running) -> None:
    client = KeepsItsConnection(server.path)
    with contextlib.closing(client.stream(EventView, "/v1/events", follow=True)) as stream:  # type: ignore[type-var]
        for event in EVENTS:
            server.wait(server.backend.more.put(event))
            assert next(stream) == event
            assert client.connection.sock.gettimeout() is None
