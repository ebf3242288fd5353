"""
Serves metrics to Prometheus, on a TCP address of its own: reads only, and nothing but ``/metrics``.

A connection serves one request and lives for a limited time, and there is a limited number of them: so a client that
sends slowly, reads slowly, or holds connections open costs a bounded amount of memory and keeps nobody out for long.
An address that cannot be used is tried again, and never keeps a daemon from its work.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Final

from aiohttp import web

from cpm.api.disconnects import ignore_disconnects
from cpm.service.metrics.settings import Listen, split_address
from cpm.service.metrics.values import CONTENT_TYPE
from cpm.service.tasks import Tasks

log = logging.getLogger(__name__)

PATH: Final = "/metrics"

MOST_CONNECTIONS: Final = 16
"""Connections at once; a further one is closed. A site has two Prometheus servers, and somebody with a browser."""

CONNECTION_S: Final = 30.0
"""Seconds after which a connection ends, whatever it does; Prometheus gives up after 10 by default."""

HANDSHAKE_S: Final = 5.0
"""Seconds that a client has for its TLS handshake; it counts as a connection meanwhile."""

STEP_S: Final = 0.002
"""Seconds of work on an answer after which others have their turn."""

STEP_BYTES: Final = 64 * 1024
"""Characters of an answer after which they are sent: encoding and sending megabytes takes long, too."""

AGAIN_S: Final = 10.0
"""Seconds between two attempts to listen on an address that cannot be used."""

ACCEPT_AGAIN_S: Final = 0.1
"""Seconds before the next connection is accepted when one could not be."""

BACKLOG: Final = 16

Pieces = Callable[[], Iterator[str]]
"""Returns the text in small pieces."""


async def send(
    request: web.Request, content_type: str, pieces: Iterator[str], *, is_last: bool = False
) -> web.StreamResponse:
    """
    Answer with a text that is made while it is sent; others have their turn every :data:`STEP_S` seconds
    and :data:`STEP_BYTES` characters.

    :param is_last: The connection ends after it.
    :raise ConnectionError: When the client is gone.
    """
    response = web.StreamResponse(headers={"Content-Type": content_type})
    if is_last:
        response.force_close()
    await response.prepare(request)
    made: list[str] = []
    size, until = 0, time.perf_counter() + STEP_S
    for piece in pieces:
        made.append(piece)
        size += len(piece)
        if size >= STEP_BYTES or time.perf_counter() >= until:
            if size:
                await response.write("".join(made).encode())
            made.clear()
            await asyncio.sleep(0)
            size, until = 0, time.perf_counter() + STEP_S
    if size:
        await response.write("".join(made).encode())
    await response.write_eof()
    return response


class Scraping:
    """
    Serves metrics on one address.

    :param daemon: The program and its settings file, for messages: ``cpmd.toml``.
    :param listen: Where.
    :param pieces: Makes the text.
    :raise OSError: When the certificate cannot be read or used.
    """

    def __init__(self, daemon: str, listen: Listen, pieces: Pieces) -> None:
        self._daemon = daemon
        self._listen = listen
        self._pieces = pieces
        self._context = tls_context(listen)
        self.address: tuple[str, int] | None = None
        """Where it listens; None: nowhere yet."""
        self._beginning = 0
        """Connections that have not said anything yet; with TLS: whose handshake is not done."""

    async def run(self) -> None:
        """Serve until cancelled; without an address in the settings, nothing."""
        if self._listen.address is None:
            await asyncio.get_running_loop().create_future()
            return
        host, port = split_address(self._daemon, "metrics.address", self._listen.address)
        app = web.Application(client_max_size=1024, middlewares=[ignore_disconnects])
        app.router.add_get(PATH, self._answer, allow_head=False)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        assert runner.server is not None
        tasks = Tasks()
        try:
            with await self._bind(host, port) as listening:
                self.address = listening.getsockname()[:2]
                await self._accept(listening, runner.server, tasks)
        finally:
            await tasks.stop()
            await runner.cleanup()

    async def _bind(self, host: str, port: int) -> socket.socket:
        family, said = socket.AF_INET6 if ":" in host else socket.AF_INET, ""
        while True:
            try:
                listening = socket.create_server((host, port), family=family, backlog=BACKLOG)
            except (OSError, UnicodeError) as error:
                if (text := (error.strerror if isinstance(error, OSError) else "") or str(error)) != said:
                    said = text
                    log.error(
                        "no metrics on %s, trying again every %g s: %s; stop the other program, or set another address "
                        "in [metrics] of %s",
                        self._listen.address, AGAIN_S, text, self._daemon,
                    )  # fmt: skip
            else:
                listening.settimeout(0.0)
                return listening
            await asyncio.sleep(AGAIN_S)

    async def _accept(self, listening: socket.socket, server: web.Server, tasks: Tasks) -> None:
        """Accept connections; not by asyncio's own server, which sees one only once its TLS handshake is done."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listening)
            except OSError:
                # The machine or the process has no file descriptor left, or the client is gone.
                await asyncio.sleep(ACCEPT_AGAIN_S)
                continue
            if len(server.connections) + self._beginning >= MOST_CONNECTIONS:
                accepted.close()
            else:
                self._beginning += 1
                tasks.start("metrics connection", self._begin(accepted, server))
            # A client that connects over and over is not to hold up the daemon.
            await asyncio.sleep(0)

    async def _begin(self, accepted: socket.socket, server: web.Server) -> None:
        handler, loop = server(), asyncio.get_running_loop()
        patience_s = HANDSHAKE_S if self._context is not None else None
        try:
            await loop.connect_accepted_socket(
                lambda: handler, accepted, ssl=self._context, ssl_handshake_timeout=patience_s
            )
        except OSError:
            # It says nothing, or not in TLS, or has no certificate that is asked for.
            accepted.close()
        else:
            loop.call_later(CONNECTION_S, _abort, handler)
        finally:
            self._beginning -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        return await send(request, CONTENT_TYPE, self._pieces(), is_last=True)


def _abort(handler: web.RequestHandler) -> None:
    if handler.transport is not None:
        handler.transport.abort()


def tls_context(listen: Listen) -> ssl.SSLContext | None:
    """
    Return a context with a certificate that is used for nothing else; None: plain HTTP.

    :raise OSError: When a file cannot be read.
    :raise ssl.SSLError: When a file has no certificate or key, or they do not match.
    """
    if listen.certificate is None or listen.key is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=listen.client_ca)
    context.load_cert_chain(listen.certificate, listen.key)
    if listen.client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
