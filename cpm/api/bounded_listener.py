"""
Listens on a TCP address at which things may only be read, for Prometheus or browsers.

A connection serves one request and lives for a limited time, and there is a limited number of them: so a client that
sends slowly, reads slowly, or holds connections open costs a bounded amount of memory and keeps nobody out for long.
An address that cannot be used is tried again, and never keeps a daemon from its work.

Tested in ``tests/unit/cpm/api/test_scraping.py`` and ``tests/unit/cpm/api/test_page_server.py``.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from typing import Final

from aiohttp import web

from cpm.service.certificates import Files, LiveContext
from cpm.service.metrics.settings import Listen, split_address
from cpm.service.tasks import Tasks

log = logging.getLogger(__name__)

CONNECTION_S: Final = 30.0
"""Seconds after which a connection ends, whatever it does; Prometheus gives up after 10 by default."""

HANDSHAKE_S: Final = 5.0
"""Seconds that a client has for its TLS handshake; it counts as a connection meanwhile."""

STEP_S: Final = 0.002
"""Seconds of work on an answer after which others have their turn."""

AGAIN_S: Final = 10.0
"""Seconds between two attempts to listen on an address that cannot be used."""

ACCEPT_AGAIN_S: Final = 0.1
"""Seconds before the next connection is accepted when one could not be."""

BACKLOG: Final = 16


class BoundedListener:
    """
    Serves one address.

    :param daemon: The program's settings file, for messages: ``cpmd.toml``.
    :param table: The table of it that has the address.
    :param listen: Where.
    :param most_connections: Connections at once; a further one is closed.
    :param application: Makes what answers.
    :raise OSError: When the certificate cannot be read or used.
    """

    def __init__(
        self,
        daemon: str,
        table: str,
        listen: Listen,
        most_connections: int,
        application: Callable[[], web.Application],
    ) -> None:
        self._daemon = daemon
        self._table = table
        self._listen = listen
        self._most_connections = most_connections
        self._application = application
        self.tls = _live(table, listen)
        """Its certificate, which follows its files; None: plain HTTP."""
        self.address: tuple[str, int] | None = None
        """Where it listens; None: nowhere yet."""
        self._beginning = 0
        """Connections that have not said anything yet; with TLS: whose handshake is not done."""

    async def run(self) -> None:
        """Serve until cancelled; without an address in the settings, nothing."""
        if self._listen.address is None:
            await asyncio.get_running_loop().create_future()
            return
        host, port = split_address(self._daemon, f"{self._table}.address", self._listen.address)
        runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=1.0)
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
                        "no %s on %s, trying again every %g s: %s; stop the other program, or set another address "
                        "in [%s] of %s",
                        self._table, self._listen.address, AGAIN_S, text, self._table, self._daemon,
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
            if len(server.connections) + self._beginning >= self._most_connections:
                accepted.close()
            else:
                self._beginning += 1
                tasks.start(f"{self._table} connection", self._begin(accepted, server))
            # A client that connects over and over is not to hold up the daemon.
            await asyncio.sleep(0)

    async def _begin(self, accepted: socket.socket, server: web.Server) -> None:
        handler, loop = server(), asyncio.get_running_loop()
        context = self.tls.context if self.tls is not None else None
        patience_s = HANDSHAKE_S if context is not None else None
        try:
            await loop.connect_accepted_socket(lambda: handler, accepted, ssl=context, ssl_handshake_timeout=patience_s)
        except OSError:
            # It says nothing, or not in TLS, or has no certificate that is asked for.
            accepted.close()
        else:
            loop.call_later(CONNECTION_S, _abort, handler)
        finally:
            self._beginning -= 1


async def steps(pieces: Iterator[str]) -> bytes:
    """Return a text that is made in small pieces; others have their turn every :data:`STEP_S` seconds."""
    made: list[str] = []
    until = time.perf_counter() + STEP_S
    for piece in pieces:
        made.append(piece)
        if time.perf_counter() >= until:
            await asyncio.sleep(0)
            until = time.perf_counter() + STEP_S
    return "".join(made).encode()


def _abort(handler: web.RequestHandler) -> None:
    if handler.transport is not None:
        handler.transport.abort()


def _live(table: str, listen: Listen) -> LiveContext | None:
    if listen.certificate is None or listen.key is None:
        return None
    files = Files(listen.certificate, listen.key, listen.client_ca)
    return LiveContext(table, files, functools.partial(tls_context, *files), is_server=True)


def tls_context(certificate: str, key: str, client_ca: str | None) -> ssl.SSLContext:
    """
    Return a context with a certificate that is used for nothing else.

    :raise OSError: When a file cannot be read.
    :raise ssl.SSLError: When a file has no certificate or key, or they do not match.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=client_ca)
    context.load_cert_chain(certificate, key)
    if client_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
