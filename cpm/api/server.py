"""
The manager's HTTP side: operators' requests and nodes' sessions.

There are two kinds of listeners. Unix sockets serve operators and nodes, each peer as far as it may
(:mod:`cpm.api.access`). The TLS listener serves node sessions only, to peers whose certificate names them. The
interfaces that the server calls are declared here (:class:`OperatorRequests`, :class:`NodeSessions`) and implemented in
:mod:`cpm.serving`.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from aiohttp import WebSocketError, WSMsgType, web

from cpm.api import scraping, sending
from cpm.api.access import Access, Peer
from cpm.api.disconnects import Handler, ignore_disconnects, is_connected
from cpm.api.operations import OPERATIONS, Operation
from cpm.api.views import Document, ErrorView
from cpm.protocol import codec
from cpm.protocol.errors import Busy, InvalidRequest, NameInUse, NotApproved, VirtPortsError
from cpm.protocol.messages import NOT_APPROVED, Delta, Hello, ManagerMessage, NodeMessage, Snapshot
from cpm.protocol.model import NodeName

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
"""Seconds between pings on a session; a peer that does not answer within half of it counts as disconnected."""

HELLO_LIMIT_S = 10.0
"""Seconds within which hello must arrive on a new connection."""

SESSION = "/v1/session"
"""Path of nodes' sessions."""

MOST_OF_USER = 64
"""Requests of one user on unix sockets that are served at once."""

GONE_S = 2.0
"""Seconds between two looks whether the client of a stream without news is still there."""

_ACCESS = web.AppKey("access", Access)

MAX_REQUEST = 1024 * 1024
"""Bytes of an operator's request at most."""


class NodeConnection:
    """Sends messages to one connected node, in order; sending never waits for the node."""

    MOST_MESSAGES = 1_000
    MOST_ENTRIES = 200_000
    """What may be queued for a slow node: messages, and VMs in them, besides the oldest message. Beyond that its
    session is closed, and the next one begins with a snapshot."""

    def __init__(self, socket: web.WebSocketResponse, peer: str) -> None:
        self.peer = peer
        """Address of the machine."""
        self.instance = ""
        """Identity of its natd process, as in hello."""
        self._pong = asyncio.Event()
        self._socket = socket
        self._queue: collections.deque[ManagerMessage] = collections.deque()
        self._entries = 0
        self._has_work = asyncio.Event()
        self._is_closing = False

    def send(self, message: ManagerMessage) -> None:
        """Queue a message; when the queue is full, drop it and close the session instead."""
        if self._is_closing:
            return
        if len(self._queue) >= self.MOST_MESSAGES or (self._queue and self._entries >= self.MOST_ENTRIES):
            self._queue.clear()
            self.close()
            return
        self._queue.append(message)
        self._entries += _entries_of(message)
        self._has_work.set()

    def close(self) -> None:
        """End the session once the queued messages are sent; what is sent from now on is dropped."""
        self._is_closing = True
        self._has_work.set()

    async def is_alive(self, limit_s: float) -> bool:
        """Return whether the node answers a ping within so many seconds."""
        self._pong.clear()
        with contextlib.suppress(ConnectionError, RuntimeError, TimeoutError):
            async with asyncio.timeout(limit_s):
                await self._socket.ping()
                await self._pong.wait()
        return self._pong.is_set()

    async def on_control(self, frame: Any) -> bool:
        """Handle a frame of the websocket itself; return False when it is none, but a message."""
        if frame.type is WSMsgType.PING:
            # The peer may be gone: then the next frame says so.
            with contextlib.suppress(ConnectionError):
                await self._socket.pong(frame.data)
        elif frame.type is WSMsgType.PONG:
            self._pong.set()
        return frame.type in (WSMsgType.PING, WSMsgType.PONG)

    async def run(self) -> None:
        """Send until closed."""
        while self._queue or not self._is_closing:
            if not self._queue:
                self._has_work.clear()
                await self._has_work.wait()
                continue
            message = self._queue.popleft()
            self._entries -= _entries_of(message)
            await self._socket.send_bytes(codec.encode(message))
        await self._socket.close()


def _entries_of(message: ManagerMessage) -> int:
    return len(message.host) + len(message.edge) if isinstance(message, (Snapshot, Delta)) else 1


class OperatorRequests(Protocol):
    """Answers the operations of :mod:`cpm.api.operations`."""

    async def answer(self, operation: Operation[Any], arguments: Mapping[str, Any], peer: Peer) -> object:
        """
        Return the answer to one request.

        :param arguments: By parameter, parsed and checked; ``body`` has the request's body.
        :param peer: The process that asks; it may.
        :raise VirtPortsError: When it is refused.
        """

    def stream(self, operation: Operation[Any], arguments: Mapping[str, Any]) -> AsyncIterator[object]:
        """
        Return the lines of a streamed answer.

        :raise VirtPortsError: When it is refused.
        """


class NodeSessions(Protocol):
    """Receives the events of nodes' sessions."""

    async def on_connected(self, hello: Hello, connection: NodeConnection) -> None:
        """
        Begin a node's session; messages to the node go through the connection from now on.

        :raise VirtPortsError: When the node is refused; the session is then closed.
        """

    async def on_message(self, node: NodeName, connection: NodeConnection, message: NodeMessage) -> None:
        """
        Handle a message that a node sent on that connection.

        :raise VirtPortsError: When the message is not allowed; the session is then closed.
        """

    def on_fault(self, node: NodeName, error: VirtPortsError) -> None:
        """Handle that a message of the node could not be followed; its session ends."""

    async def on_disconnected(self, node: NodeName, connection: NodeConnection) -> None:
        """Handle the end of the session on that connection."""


class Server:
    """
    Serves HTTP for operators and websocket sessions for nodes.

    :param operators: Answers the requests of operators.
    :param nodes: Receives the events of nodes' sessions.
    """

    def __init__(self, operators: OperatorRequests, nodes: NodeSessions) -> None:
        self._operators = operators
        self._nodes = nodes
        self._runners: list[web.AppRunner] = []
        self._under_way: collections.Counter[int] = collections.Counter()
        """Requests on unix sockets, by user."""

    async def listen_unix(self, path: Path, access: Access) -> None:
        """
        Serve operators and nodes on a unix socket (mode 0660).

        :param access: Who may do what there.
        :raise OSError: When the socket cannot be made.
        """
        runner = await self._runner(self._operator_app(access))
        path.unlink(missing_ok=True)
        await web.UnixSite(runner, str(path)).start()
        path.chmod(0o660)

    async def listen_tls(self, host: str, port: int, context: ssl.SSLContext) -> None:
        """
        Serve node sessions to peers with a certificate that our CA signed.

        :raise OSError: When the address cannot be bound.
        """
        app = web.Application(client_max_size=MAX_REQUEST, middlewares=[ignore_disconnects])
        app.router.add_get(SESSION, self._session)
        await web.TCPSite(await self._runner(app), host, port, ssl_context=context).start()

    async def stop(self) -> None:
        """Stop listening; close all connections."""
        for runner in self._runners:
            await runner.cleanup()

    async def _runner(self, app: web.Application) -> web.AppRunner:
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        self._runners.append(runner)
        return runner

    def _operator_app(self, access: Access) -> web.Application:
        app = web.Application(
            client_max_size=MAX_REQUEST, middlewares=[_errors_as_json, ignore_disconnects, self._limit]
        )
        app[_ACCESS] = access
        for operation in OPERATIONS:
            # add_get() also answers HEAD, add_route() does not.
            add = app.router.add_get if operation.method == "GET" else partial(app.router.add_route, operation.method)
            # Names have any characters; without a pattern aiohttp takes none with braces.
            path = re.sub(r"\{(\w+)\}", r"{\1:[^/]+}", operation.path)
            add(path, partial(self._stream if operation.streams else self._answer, operation))
        app.router.add_get(SESSION, self._session)
        return app

    # Operators

    @web.middleware
    async def _limit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """
        Serve a limited number of requests to one user at once, streams included; sessions of nodes are not counted.

        :raise Busy: When there are as many.
        """
        if request.path == SESSION:
            return await handler(request)
        uid = _process(request).uid
        if self._under_way[uid] >= MOST_OF_USER:
            raise Busy(f"user {uid} has {MOST_OF_USER} requests under way; end some of them, or wait")
        self._under_way[uid] += 1
        try:
            return await handler(request)
        finally:
            self._under_way[uid] -= 1
            if not self._under_way[uid]:
                del self._under_way[uid]

    async def _answer(self, operation: Operation[Any], request: web.Request) -> web.StreamResponse:
        peer = _process(request)
        if operation.changes:
            request.app[_ACCESS].check_change(peer)
        answer = await self._operators.answer(operation, await _arguments(operation, request), peer)
        if isinstance(answer, Document):
            sent = scraping.send(request, answer.content_type, answer.pieces)
        else:
            sent = sending.whole(request, _json(answer))
        return await sending.within(request, sending.SEND_S, sent)

    async def _stream(self, operation: Operation[Any], request: web.Request) -> web.StreamResponse:
        """Answer with one line for each value, as the values come."""
        arguments = await _arguments(operation, request)
        lines = self._operators.stream(operation, arguments)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        # A client ends a stream by closing the connection.
        with contextlib.suppress(ConnectionResetError):
            async with contextlib.aclosing(lines) as values:  # type: ignore[type-var]
                async for value in _while_connected(request, values) if arguments.get("follow") else values:
                    line = response.write(codec.encode(value) + b"\n")
                    await sending.within(request, sending.STALL_S, line)
            await response.write_eof()
        return response

    # Nodes

    async def _session(self, request: web.Request) -> web.StreamResponse:
        if (access := request.app.get(_ACCESS)) is not None:
            access.check_node(_process(request))
        socket = web.WebSocketResponse(
            heartbeat=HEARTBEAT_S, max_msg_size=codec.MAX_NODE_MESSAGE, compress=False, autoping=False
        )
        await socket.prepare(request)
        connection = NodeConnection(socket, _peer(request))
        sender = asyncio.create_task(connection.run(), name=f"session to {request.remote}")  # noqa: TID251
        try:
            await self._serve_session(request, socket, connection)
        except _PeerIsGone as gone:
            log.debug("session with %s ended: %s", connection.peer, gone)
        except (NotApproved, NameInUse) as error:
            # It tries again every few seconds; what listens for sessions tells the operator once.
            code = NOT_APPROVED if isinstance(error, NotApproved) else 1008
            await socket.close(code=code, message=_reason(error))
        except VirtPortsError as error:
            log.warning("session with %s ended: %s", connection.peer, error)
            await socket.close(code=1008, message=_reason(error))
        finally:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
        return socket

    async def _serve_session(
        self, request: web.Request, socket: web.WebSocketResponse, connection: NodeConnection
    ) -> None:
        try:
            async with asyncio.timeout(HELLO_LIMIT_S):
                while await connection.on_control(frame := await socket.receive()):
                    pass
        except TimeoutError:
            await socket.close(code=1008, message=b"no hello came; the first message of a session must be hello")
            raise _PeerIsGone(f"it said no hello within {HELLO_LIMIT_S:g} s") from None
        hello = codec.decode_node_message(_text(frame))
        if not isinstance(hello, Hello):
            raise InvalidRequest("the first message of a session must be hello")
        _check_identity(request, hello.node)
        connection.instance = hello.instance
        await self._nodes.on_connected(hello, connection)
        try:
            async for frame in socket:
                if await connection.on_control(frame):
                    continue
                await self._nodes.on_message(hello.node, connection, codec.decode_node_message(_text(frame)))
        except VirtPortsError as error:
            self._nodes.on_fault(hello.node, error)
            raise
        finally:
            await self._nodes.on_disconnected(hello.node, connection)


class _PeerIsGone(Exception):
    """The connection is lost, or the peer answers no ping, or says nothing; the message says which."""


def _text(frame: Any) -> bytes | str:
    """
    Return the text of a message.

    :raise _PeerIsGone: When there is none, and no other frame will come.
    :raise InvalidRequest: When what came is no frame, or is too large.
    """
    if frame.type in (WSMsgType.TEXT, WSMsgType.BINARY):
        data: bytes | str = frame.data
        return data
    if isinstance(frame.data, WebSocketError):
        raise InvalidRequest(f"a frame cannot be read: {frame.data}; both sides must run the same version")
    raise _PeerIsGone(str(frame.data) if frame.type is WSMsgType.ERROR else "the peer closed it")


def _reason(error: VirtPortsError) -> bytes:
    """Return the reason for a close frame, of 123 bytes at most (RFC 6455). Its end says what to do, and stays."""
    text = str(error).encode()
    if len(text) > 123:
        text = text[:40] + b"..." + text[-80:]
    return text.decode(errors="ignore").encode()


def _peer(request: web.Request) -> str:
    return request.remote or "local peer"


def _check_identity(request: web.Request, name: NodeName) -> None:
    """
    Check that a node's certificate has its name. On a unix socket there is none; its user was checked.

    :raise InvalidRequest: When the certificate does not name it.
    """
    transport = request.transport
    tls = transport.get_extra_info("ssl_object") if transport is not None else None
    if tls is None:
        return
    certificate = tls.getpeercert() or {}
    names = names_in(certificate)
    if name not in names:
        raise InvalidRequest(
            f"the certificate of node {name} is for {', '.join(sorted(names)) or 'no name'}; "
            "set name in its natd.toml to a name in its certificate"
        )


def names_in(certificate: Mapping[str, Any]) -> set[str]:
    """
    Return the names that a client's certificate proves, as :meth:`ssl.SSLSocket.getpeercert` has it.

    Its DNS names; if it has no subject alternative names at all, its common name (RFC 6125, section 6.4.4): libvirt's
    documentation has client certificates made in that way.
    """
    alternatives = certificate.get("subjectAltName", ())
    if alternatives:
        return {value for kind, value in alternatives if kind == "DNS"}
    return {value for part in certificate.get("subject", ()) for kind, value in part if kind == "commonName"}


async def _while_connected(request: web.Request, values: AsyncIterator[object]) -> AsyncIterator[object]:
    """Yield the values until the client is gone: aiohttp does not tell a handler that only waits."""
    while True:
        coming = asyncio.ensure_future(anext(values, _END))  # noqa: TID251
        try:
            while not (await asyncio.wait({coming}, timeout=GONE_S))[0]:
                if not is_connected(request):
                    return
            if (value := coming.result()) is _END:
                return
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        yield value


_END: Final = object()


def _process(request: web.Request) -> Peer:
    """
    Return the process that sent a request on a unix socket.

    :raise ConnectionResetError: When it closed the connection before the request was served.
    """
    if request.transport is None:
        raise ConnectionResetError("it was closed before the request was served")
    return Peer.of(request.transport.get_extra_info("socket"))


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
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


def _json(value: object, status: int = 200) -> web.Response:
    return web.Response(body=codec.encode(value), status=status, content_type="application/json")


async def _arguments(operation: Operation[Any], request: web.Request) -> dict[str, Any]:
    """
    Return the arguments for the handler of a request.

    :raise InvalidRequest: When one is missing or is not as declared.
    """
    arguments: dict[str, Any] = {}
    if operation.body is not None:
        arguments["body"] = codec.decode(operation.body, await request.read())
    for each in operation.parameters:
        in_path = request.match_info.get(each.name)
        arguments[each.name] = each.read_all([in_path] if in_path is not None else request.query.getall(each.name, []))
    return arguments


def tls_context(certificate: str, key: str, ca: str) -> ssl.SSLContext:
    """
    Return a context with our certificate that requires one from the peer.

    :raise OSError: When a file cannot be read.
    :raise ssl.SSLError: When a file has no certificate or key, or they do not match.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
    context.load_cert_chain(certificate, key)
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
