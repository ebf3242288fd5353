"""The command line against the server that cpmd runs, with a backend that has canned answers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import pytest

from cpm.api import operations
from cpm.api.access import Access, Peer
from cpm.api.client import Client
from cpm.api.operations import Operation
from cpm.api.parameters import Patterns
from cpm.api.requests import PoolRemoval, PoolRequest, ResizeRequest, WishesRequest
from cpm.api.server import NodeConnection, Server
from cpm.api.views import EventView, StatusView
from cpm.cli import main
from cpm.protocol.errors import AddressInUse, Ambiguous, InternalPoolExhausted, NotFound, PortsExhausted, VirtPortsError
from cpm.protocol.ledger_errors import LedgerError
from cpm.protocol.messages import Hello, NodeMessage
from cpm.protocol.model import NodeName
from cpm.protocol.walltime import WallTime
from tests.unit.cpm.cli.conftest import NOW, WEB, Result, domain
from tests.unit.cpm.cli.test_verbs import ADDRESS, ADDRESS_DETAIL, DETAIL, EVENTS, EXPLAINED, NODES, whois_view

ANSWERS: dict[Operation[Any], object] = {
    operations.LIST_VMS: [domain()],
    operations.SHOW_VM: DETAIL,
    operations.SET_WISHES: DETAIL,
    operations.RESIZE: DETAIL,
    operations.RELOCATE: DETAIL,
    operations.EXPLAIN: EXPLAINED,
    operations.HISTORY: EVENTS,
    operations.WHOIS: whois_view(NOW),
    operations.LIST_POOL: [ADDRESS],
    operations.SHOW_ADDRESS: ADDRESS_DETAIL,
    operations.ADD_TO_POOL: [ADDRESS],
    operations.REMOVE_FROM_POOL: [],
    operations.NODE_EVENTS: [],
    operations.AUDIT: [],
    operations.LIST_NODES: NODES,
    operations.FENCE: NODES[0],
    operations.UNFENCE: NODES[0],
    operations.STATUS: StatusView("0.1.0", 1, NOW, 1, 2, 2, "ledger.db"),
}


class SaysWhatItIsTold:
    """Both backends of a server; ``failure`` is raised by every request, ``asked`` has the arguments of each."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.asked: list[object] = []
        self.more: asyncio.Queue[EventView] = asyncio.Queue()

    def _hear(self, operation: Operation[Any], arguments: Mapping[str, Any]) -> None:
        self.asked.append((operation, arguments))
        if self.failure is not None:
            raise self.failure

    async def answer(self, operation: Operation[Any], arguments: Mapping[str, Any], peer: Peer) -> object:
        self._hear(operation, arguments)
        return ANSWERS[operation]

    def stream(self, operation: Operation[Any], arguments: Mapping[str, Any]) -> AsyncIterator[object]:
        self._hear(operation, arguments)
        return self._events(follow=arguments["follow"])

    async def _events(self, *, follow: bool) -> AsyncIterator[EventView]:
        for event in EVENTS[: 0 if follow else None]:
            yield event
        while follow:
            yield await self.more.get()

    async def on_connected(self, hello: Hello, connection: NodeConnection) -> None: ...

    async def on_message(self, node: NodeName, connection: NodeConnection, message: NodeMessage) -> None: ...

    def on_fault(self, node: NodeName, error: VirtPortsError) -> None:
        """Nobody is kept out."""

    async def on_disconnected(self, node: NodeName, connection: NodeConnection) -> None: ...


class Running:
    """A server in a thread of its own, as the blocking client needs it."""

    def __init__(self, backend: SaysWhatItIsTold, loop: asyncio.AbstractEventLoop, path: str) -> None:
        self.backend = backend
        self.path = path
        self._loop = loop

    def wait(self, work: Coroutine[Any, Any, Any]) -> None:
        self.start(work).result(60)

    def start(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)


@pytest.fixture
def server() -> Iterator[Running]:
    directory = Path(tempfile.mkdtemp(prefix="vpt-"))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="server")
    thread.start()
    backend = SaysWhatItIsTold()
    running, real = Running(backend, loop, str(directory / "cpmd.sock")), Server(backend, backend)
    try:
        running.wait(real.listen_unix(directory / "cpmd.sock", Access()))
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
        (["list"], (operations.LIST_VMS, {"all": False})),
        (["list", "--all"], (operations.LIST_VMS, {"all": True})),
        (
            ["list", "web*", "d b", "--state", "waiting", "--state", "gone", "--limit", "5", "--after", f"é&:{WEB}"],
            (
                operations.LIST_VMS,
                {
                    "all": False,
                    "match": Patterns(["web*", "d b"]),
                    "state": frozenset(("waiting", "gone")),
                    "limit": 6,
                    "after": ("é&", WEB),
                },
            ),
        ),
        (["show", "a/b?c#d é%2F"], (operations.SHOW_VM, {"name": "a/b?c#d é%2F"})),
        (["show", "{a}b{"], (operations.SHOW_VM, {"name": "{a}b{"})),
        (["explain", "}{name}"], (operations.EXPLAIN, {"name": "}{name}"})),
        (
            ["set", "web 1", "floor=64", "drain-limit=2.5", "--unset", "cap"],
            (operations.SET_WISHES, {"name": "web 1", "body": WishesRequest(floor=64, cap=None, drain_limit_s=2.5)}),
        ),
        (["resize", "web 1", "512"], (operations.RESIZE, {"name": "web 1", "body": ResizeRequest(512)})),
        (["relocate", "web/1"], (operations.RELOCATE, {"name": "web/1"})),
        (["explain", "web 1"], (operations.EXPLAIN, {"name": "web 1"})),
        (["history", "web 1"], (operations.HISTORY, {"name": "web 1", "limit": 1000})),
        (["history", "web 1", "--limit", "5"], (operations.HISTORY, {"name": "web 1", "limit": 5})),
        (
            ["whois", "203.0.113.1", "20817"],
            (operations.WHOIS, {"address": ADDRESS.address, "port": 20817, "at": None, "protocol": None}),
        ),
        (
            ["whois", "203.0.113.1", "7", "--at", "-10m", "--protocol", "icmp"],
            (
                operations.WHOIS,
                {"address": ADDRESS.address, "port": 7, "at": WallTime.of(NOW - 600), "protocol": "icmp"},
            ),
        ),
        (["pool", "list"], (operations.LIST_POOL, {})),
        (["pool", "show", "203.0.113.1"], (operations.SHOW_ADDRESS, {"address": ADDRESS.address})),
        (
            ["pool", "add", "203.0.113.1", "--reserved", "5060,8000-8100"],
            (operations.ADD_TO_POOL, {"body": PoolRequest((ADDRESS.address,), ADDRESS.reserved)}),
        ),
        (
            ["pool", "add", "203.0.113.1"],
            (operations.ADD_TO_POOL, {"body": PoolRequest((ADDRESS.address,), None)}),
        ),
        (
            ["pool", "add", "203.0.113.1", "--reserved", "none"],
            (operations.ADD_TO_POOL, {"body": PoolRequest((ADDRESS.address,), ())}),
        ),
        (["pool", "remove", "203.0.113.1"], (operations.REMOVE_FROM_POOL, {"body": PoolRemoval((ADDRESS.address,))})),
        (["node", "list"], (operations.LIST_NODES, {})),
        (["node", "events", "--limit", "7"], (operations.NODE_EVENTS, {"limit": 7})),
        (["audit", "--limit", "7"], (operations.AUDIT, {"limit": 7})),
        (["node", "fence", "host1"], (operations.FENCE, {"name": "host1"})),
        (["node", "unfence", "host1"], (operations.UNFENCE, {"name": "host1"})),
        (["events"], (operations.EVENTS, {"after": None, "limit": 100, "follow": False})),
        (["events", "--after", "3", "--limit", "7"], (operations.EVENTS, {"after": 3, "limit": 7, "follow": False})),
        (["status"], (operations.STATUS, {})),
    ],
)
def test_the_server_understands_every_verb(
    server: Running, run: Any, words: list[str], asked: tuple[Operation[Any], dict[str, object]]
) -> None:
    assert (run(*words).code, run(*words, "-o", "json").code) == (0, 0)
    operation, arguments = asked
    optional = (each for each in operation.parameters if each.name not in arguments)
    asked = operation, {**arguments, **{each.name: each.read_all(()) for each in optional}}
    assert server.backend.asked == [asked, asked]
    assert run("-o", "json", *words).json is not None


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (NotFound("VM", "web1", "see `virt-ports list`"), 1),
        (Ambiguous("web1", (WEB, "x")), 1),
        (AddressInUse(IPv4Address("203.0.113.1"), 2), 1),
        (PortsExhausted(64, 0, "no external address in the pool"), 1),
        (InternalPoolExhausted("100.64.0.0/30"), 1),
        (LedgerError("disk full; make room"), 4),
    ],
)
def test_the_sentence_of_the_manager_is_printed(server: Running, run: Any, failure: VirtPortsError, code: int) -> None:
    server.backend.failure = failure
    assert run("show", "web1") == (code, "", f"error: {failure}\n")
    assert json.loads(run("show", "web1", "-o", "json").err) == {"code": failure.code, "message": str(failure)}


def test_a_limit_that_the_manager_refuses_is_a_usage_error(run: Any) -> None:
    assert run("history", "web1", "--limit", "0").code == 2


@pytest.mark.parametrize("ports", ["0", "65536"])
def test_a_size_that_no_range_can_have_is_a_usage_error(server: Running, run: Any, ports: str) -> None:
    assert run("resize", "web1", ports).code == 2
    assert server.backend.asked == []


def test_following_has_no_timeout_and_gets_each_event_at_once(server: Running) -> None:
    client = Client(server.path, timeout_s=0.05)

    async def add(event: EventView) -> None:
        await asyncio.sleep(0.1)
        await server.backend.more.put(event)

    with contextlib.closing(client.stream(operations.EVENTS, follow=True)) as stream:  # type: ignore[type-var]
        for event in EVENTS:
            server.start(add(event))
            assert next(stream) == event
