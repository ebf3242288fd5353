"""
The manager's HTTP side: operators' requests, nodes' sessions, metrics.

Two doors. The unix socket serves everything; who may open it may do everything. The TLS door serves node sessions only,
to peers whose certificate names them. What is behind the doors is :class:`Backend`, owned here, implemented by cpmd.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, Protocol

from aiohttp import WSMsgType, web

from cpm.api.views import (
    AddressView,
    DomainDetail,
    DomainView,
    ErrorView,
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
from cpm.protocol import codec
from cpm.protocol.errors import InvalidRequest, VirtPortsError
from cpm.protocol.messages import Hello, ManagerMessage, NodeMessage
from cpm.protocol.model import LAST_PORT, NodeName

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
"""Seconds between pings on a session; a peer that does not answer within half of it is gone."""

HELLO_LIMIT_S = 10.0
"""Seconds a new connection has to say who it is."""

MAX_REQUEST = 1024 * 1024
"""Bytes of an operator's request."""


class Channel:
    """The way to one connected node; messages go out in order, without anybody waiting for a slow one."""

    LIMIT = 10_000
    """Messages that may wait for a slow node; then its session is closed, and it starts again with a snapshot."""

    def __init__(self, socket: web.WebSocketResponse) -> None:
        self._socket = socket
        self._queue: asyncio.Queue[ManagerMessage | None] = asyncio.Queue()

    def send(self, message: ManagerMessage) -> None:
        """Put a message in line."""
        if self._queue.qsize() >= self.LIMIT:
            self.close()
        else:
            self._queue.put_nowait(message)

    def close(self) -> None:
        """End the session after what is in line."""
        self._queue.put_nowait(None)

    async def run(self) -> None:
        """Send until closed."""
        while (message := await self._queue.get()) is not None:
            await self._socket.send_bytes(codec.encode(message))
        await self._socket.close()


class Backend(Protocol):
    """What cpmd does for its peers. Errors are of the family :class:`cpm.protocol.errors.VirtPortsError`."""

    async def domains(self, *, everything: bool) -> Sequence[DomainView]: ...  # noqa: D102
    async def domain(self, name: str) -> DomainDetail: ...  # noqa: D102
    async def set_wishes(self, name: str, request: WishesRequest) -> DomainDetail: ...  # noqa: D102
    async def resize(self, name: str, request: ResizeRequest) -> DomainDetail: ...  # noqa: D102
    async def relocate(self, name: str) -> DomainDetail: ...  # noqa: D102
    async def explain(self, name: str) -> ExplainView: ...  # noqa: D102
    async def history(self, name: str, limit: int) -> Sequence[EventView]: ...  # noqa: D102
    async def whois(self, address: IPv4Address, port: int, at: float | None) -> WhoisView: ...  # noqa: D102
    async def pool(self) -> Sequence[AddressView]: ...  # noqa: D102
    async def pool_add(self, request: PoolRequest) -> Sequence[AddressView]: ...  # noqa: D102
    async def pool_remove(self, address: IPv4Address) -> Sequence[AddressView]: ...  # noqa: D102
    async def nodes(self) -> Sequence[NodeView]: ...  # noqa: D102
    async def fence(self, name: str, *, fenced: bool) -> NodeView: ...  # noqa: D102
    def events(self, after: int | None, limit: int, *, follow: bool) -> AsyncIterator[EventView]: ...  # noqa: D102
    def measurements(self) -> AsyncIterator[ReportView]: ...  # noqa: D102
    async def status(self) -> StatusView: ...  # noqa: D102
    async def metrics(self) -> tuple[bytes, str]:
        """Return the exposition and its content type."""

    async def opened(self, hello: Hello, channel: Channel) -> None:
        """A node opened a session; from now on messages to it go through the channel."""

    async def heard(self, node: NodeName, channel: Channel, message: NodeMessage) -> None:
        """A node said something on that session."""

    async def closed(self, node: NodeName, channel: Channel) -> None:
        """That session is over."""


class Server:
    """
    Listens and translates.

    :param backend: Who answers.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._runners: list[web.AppRunner] = []

    async def listen_unix(self, path: Path) -> None:
        """
        Serve everything on a unix socket (mode 0660).

        :raise OSError: When the socket cannot be made.
        """
        runner = await self._runner(self._everything())
        path.unlink(missing_ok=True)
        await web.UnixSite(runner, str(path)).start()
        path.chmod(0o660)

    async def listen_tls(self, host: str, port: int, context: ssl.SSLContext) -> None:
        """
        Serve node sessions to peers with a certificate that our CA signed.

        :raise OSError: When the address cannot be bound.
        """
        app = web.Application(client_max_size=MAX_REQUEST)
        app.router.add_get("/v1/session", self._session)
        await web.TCPSite(await self._runner(app), host, port, ssl_context=context).start()

    async def stop(self) -> None:
        """Close doors and connections."""
        for runner in self._runners:
            await runner.cleanup()

    async def _runner(self, app: web.Application) -> web.AppRunner:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        self._runners.append(runner)
        return runner

    def _everything(self) -> web.Application:
        app = web.Application(client_max_size=MAX_REQUEST, middlewares=[_errors_as_json])
        app.add_routes(
            [
                web.get("/v1/domains", self._domains),
                web.get("/v1/domains/{name}", self._domain),
                web.patch("/v1/domains/{name}", self._set_wishes),
                web.post("/v1/domains/{name}/resize", self._resize),
                web.post("/v1/domains/{name}/relocate", self._relocate),
                web.get("/v1/domains/{name}/explain", self._explain),
                web.get("/v1/domains/{name}/history", self._history),
                web.get("/v1/whois", self._whois),
                web.get("/v1/pool", self._pool),
                web.post("/v1/pool", self._pool_add),
                web.delete("/v1/pool/{address}", self._pool_remove),
                web.get("/v1/nodes", self._nodes),
                web.post("/v1/nodes/{name}/fence", self._fence),
                web.delete("/v1/nodes/{name}/fence", self._unfence),
                web.get("/v1/events", self._events),
                web.get("/v1/measurements", self._measurements),
                web.get("/v1/status", self._status),
                web.get("/v1/session", self._session),
                web.get("/metrics", self._metrics),
            ]
        )
        return app

    # Operators

    async def _domains(self, request: web.Request) -> web.Response:
        return _json(await self._backend.domains(everything=_flag(request, "all")))

    async def _domain(self, request: web.Request) -> web.Response:
        return _json(await self._backend.domain(request.match_info["name"]))

    async def _set_wishes(self, request: web.Request) -> web.Response:
        wishes = codec.decode(WishesRequest, await request.read())
        return _json(await self._backend.set_wishes(request.match_info["name"], wishes))

    async def _resize(self, request: web.Request) -> web.Response:
        wanted = codec.decode(ResizeRequest, await request.read())
        return _json(await self._backend.resize(request.match_info["name"], wanted))

    async def _relocate(self, request: web.Request) -> web.Response:
        return _json(await self._backend.relocate(request.match_info["name"]))

    async def _explain(self, request: web.Request) -> web.Response:
        return _json(await self._backend.explain(request.match_info["name"]))

    async def _history(self, request: web.Request) -> web.Response:
        limit = _whole(request, "limit", 1000, 1, 100_000)
        return _json(await self._backend.history(request.match_info["name"], limit))

    async def _whois(self, request: web.Request) -> web.Response:
        at = request.query.get("at")
        port = _whole(request, "port", None, 0, LAST_PORT)
        return _json(
            await self._backend.whois(_address(request.query.get("address", "")), port, _time(at) if at else None)
        )

    async def _pool(self, request: web.Request) -> web.Response:
        return _json(await self._backend.pool())

    async def _pool_add(self, request: web.Request) -> web.Response:
        return _json(await self._backend.pool_add(codec.decode(PoolRequest, await request.read())))

    async def _pool_remove(self, request: web.Request) -> web.Response:
        return _json(await self._backend.pool_remove(_address(request.match_info["address"])))

    async def _nodes(self, request: web.Request) -> web.Response:
        return _json(await self._backend.nodes())

    async def _fence(self, request: web.Request) -> web.Response:
        return _json(await self._backend.fence(request.match_info["name"], fenced=True))

    async def _unfence(self, request: web.Request) -> web.Response:
        return _json(await self._backend.fence(request.match_info["name"], fenced=False))

    async def _status(self, request: web.Request) -> web.Response:
        return _json(await self._backend.status())

    async def _metrics(self, request: web.Request) -> web.Response:
        body, kind = await self._backend.metrics()
        return web.Response(body=body, headers={"Content-Type": kind})

    async def _events(self, request: web.Request) -> web.StreamResponse:
        after = _whole(request, "after", -1, 0, 2**62)
        events = self._backend.events(
            after if after >= 0 else None, _whole(request, "limit", 100, 0, 100_000), follow=_flag(request, "follow")
        )
        return await _streamed(request, events)

    async def _measurements(self, request: web.Request) -> web.StreamResponse:
        if not _flag(request, "follow"):
            raise InvalidRequest("measurements are not kept; ask with follow=1 for those to come")
        return await _streamed(request, self._backend.measurements())

    # Nodes

    async def _session(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(heartbeat=HEARTBEAT_S, max_msg_size=codec.MAX_MESSAGE)
        await socket.prepare(request)
        channel = Channel(socket)
        sender = asyncio.create_task(channel.run(), name=f"session to {request.remote}")  # noqa: TID251
        try:
            await self._converse(request, socket, channel)
        except VirtPortsError as error:
            log.warning("session with %s ended: %s", _peer(request), error)
            await socket.close(code=1008, message=_reason(error))
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        return socket

    async def _converse(self, request: web.Request, socket: web.WebSocketResponse, channel: Channel) -> None:
        async with asyncio.timeout(HELLO_LIMIT_S):
            hello = codec.decode_node_message(_text(await socket.receive()))
        if not isinstance(hello, Hello):
            raise InvalidRequest("a session begins with hello")
        _check_identity(request, hello.node)
        await self._backend.opened(hello, channel)
        try:
            async for frame in socket:
                await self._backend.heard(hello.node, channel, codec.decode_node_message(_text(frame)))
        finally:
            await self._backend.closed(hello.node, channel)


def _text(frame: Any) -> bytes | str:
    if frame.type in (WSMsgType.TEXT, WSMsgType.BINARY):
        data: bytes | str = frame.data
        return data
    raise InvalidRequest("the peer closed the session without a word")


def _reason(error: VirtPortsError) -> bytes:
    """Return why, as long as a close frame may be (RFC 6455: 123 bytes), and whole characters: else it is malformed."""
    return str(error).encode()[:123].decode(errors="ignore").encode()


def _peer(request: web.Request) -> str:
    return request.remote or "local peer"


def _check_identity(request: web.Request, name: NodeName) -> None:
    """
    Let a node in only under the name in its certificate; on the unix socket there is none, and its mode decides.

    :raise InvalidRequest: When the certificate does not name it.
    """
    transport = request.transport
    tls = transport.get_extra_info("ssl_object") if transport is not None else None
    if tls is None:
        return
    certificate = tls.getpeercert() or {}
    names = {value for kind, value in certificate.get("subjectAltName", ()) if kind == "DNS"}
    if name not in names:
        raise InvalidRequest(
            f"a node calls itself {name}, its certificate says {', '.join(sorted(names)) or 'nothing'}; "
            "set name in its natd.toml to a DNS name of its certificate"
        )


_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@web.middleware
async def _errors_as_json(request: web.Request, handler: _Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except VirtPortsError as error:
        return _json(ErrorView(error.code, str(error)), status=error.http_status)
    except web.HTTPException as error:
        code = "not-found" if error.status == 404 else "invalid-request"
        return _json(ErrorView(code, f"{request.method} {request.path}: {error.reason}"), status=error.status)
    except Exception:
        log.exception("request %s %s failed", request.method, request.path)
        return _json(
            ErrorView("error", "the manager failed to answer; see its journal: journalctl -u cpmd"), status=500
        )


async def _streamed(request: web.Request, values: AsyncIterator[object]) -> web.StreamResponse:
    """Answer with a value a line, as they come."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    async with contextlib.aclosing(values) as stream:  # type: ignore[type-var]
        async for value in stream:
            await response.write(codec.encode(value) + b"\n")
    await response.write_eof()
    return response


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=codec.encode(value), status=status, content_type="application/json")


def _flag(request: web.Request, name: str) -> bool:
    return request.query.get(name, "0") not in ("", "0", "false")


def _whole(request: web.Request, name: str, default: int | None, least: int, most: int) -> int:
    text = request.query.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isascii() or not text.isdigit() or not least <= int(text[:20]) <= most:
        raise InvalidRequest(f"{name} is {text!r}; use a whole number from {least} to {most}")
    return int(text)


def _time(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidRequest(f"at is {text!r}; use seconds since 1970 in UTC") from None


def _address(text: str) -> IPv4Address:
    try:
        return IPv4Address(text)
    except ValueError:
        raise InvalidRequest(f"{text!r} is not an IPv4 address; write it like 203.0.113.1") from None


def tls_context(certificate: str, key: str, ca: str) -> ssl.SSLContext:
    """
    Return a context that shows our certificate and demands one from the peer.

    :raise OSError: When a file cannot be read.
    :raise ssl.SSLError: When a file is not what it should be.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
