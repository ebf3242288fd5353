"""
natd's side of the hook: a unix socket, with one request per connection, which the node answers when it is ready.

Tested in ``tests/unit/libvirt_hooks/test_hook_natd.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

from libvirt_hooks import domain_xml
from libvirt_hooks.domain_xml import DomainFacts, DomainXMLError
from libvirt_hooks.protocol import HookOperation, HookProtocolError, HookRequest, RequestParser, error_answer, ok_answer

log = logging.getLogger(__name__)

READ_TIMEOUT_S = 10.0
"""Seconds that a caller has to send its request."""

MOST_READING = 16
"""Requests that are read at once, each of up to :data:`~libvirt_hooks.protocol.MAX_REQUEST` bytes; others wait."""

MOST_CALLERS = 1024
"""Callers that are read from or wait for their answer; a further one is turned away at once."""

OnRequest: TypeAlias = Callable[[int, HookOperation, DomainFacts], None]
"""Is given the number of the request, the operation and the facts in the XML. Answer by :meth:`HookServer.answer`."""


class HookServer:
    """
    Listens for the libvirt hook.

    :param path: Path of the socket.
    :param on_request: Called for each request.
    :param on_answered: Told the operation of each request and the seconds from its arrival to its answer.
    """

    def __init__(
        self,
        path: Path,
        on_request: OnRequest,
        on_answered: Callable[[str, float], None] = lambda operation, seconds: None,
    ) -> None:
        self._path = path
        self._on_answered = on_answered
        self._on_request = on_request
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._next = 0
        self._callers = 0
        self._reading = asyncio.Semaphore(MOST_READING)
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """
        Listen (mode 0600: libvirt runs hooks as root). A directory that is missing is made for this user alone.

        :raise OSError: When the socket cannot be made.
        """
        domain_xml.check_parser()
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._path.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._path, backlog=256)
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def answer(self, request: int, code: str, text: str) -> None:
        """Answer a request; do nothing if its caller is gone."""
        if (future := self._answers.get(request)) is not None and not future.done():
            future.set_result(error_answer(code, text) if code else ok_answer(text))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._callers >= MOST_CALLERS:
            writer.write(error_answer("busy", f"natd serves {MOST_CALLERS} calls of the hook already"))
            writer.close()
            return
        self._callers += 1
        try:
            await self._serve_caller(reader, writer)
        finally:
            self._callers -= 1

    async def _serve_caller(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._reading, asyncio.timeout(READ_TIMEOUT_S):
                request = await _read(reader)
            answer = await self._ask(request, domain_xml.parse(request.xml), reader)
        except (HookProtocolError, DomainXMLError) as error:
            log.warning("hook: %s", error)
            answer = error_answer(getattr(error, "code", "protocol"), str(error))
        except (TimeoutError, ConnectionError, EOFError):
            answer = error_answer("protocol", "the request is incomplete")
        with contextlib.suppress(ConnectionError):
            writer.write(answer)
            await writer.drain()
        writer.close()

    async def _ask(self, request: HookRequest, facts: DomainFacts, reader: asyncio.StreamReader) -> bytes:
        number, self._next = self._next, self._next + 1
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        begin = time.monotonic()
        try:
            self._on_request(number, request.operation, facts)
            text = await answer
            self._on_answered(request.operation, time.monotonic() - begin)
            return text
        finally:
            del self._answers[number]


async def _read(reader: asyncio.StreamReader) -> HookRequest:
    parser = RequestParser()
    while data := await reader.read(65536):
        if (request := parser.feed(data)) is not None:
            return request
    raise EOFError
