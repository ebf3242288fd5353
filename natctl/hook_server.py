"""natd's side of the hook: a unix socket that reads one request a connection and answers it when the time has come."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

from libvirt_hooks import domain_xml
from libvirt_hooks.domain_xml import DomainFacts, DomainXMLError
from libvirt_hooks.protocol import HookOperation, HookProtocolError, HookRequest, RequestParser, error_answer, ok_answer

log = logging.getLogger(__name__)

READ_LIMIT_S = 10.0
"""Seconds a caller has to say what it wants."""

Called = Callable[[int, HookOperation, DomainFacts], None]
"""Who is told: request number, operation, what the XML says. Answers later by :meth:`HookServer.answer`."""


class HookServer:
    """
    Listens for the libvirt hook.

    :param path: Where.
    :param called: Who is told of each request.
    """

    def __init__(self, path: Path, called: Callable[[int, HookOperation, DomainFacts], None]) -> None:
        self._path = path
        self._called = called
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._next = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """
        Listen (mode 0600: libvirt runs hooks as root).

        :raise OSError: When the socket cannot be made.
        """
        domain_xml.check_parser()
        self._path.parent.mkdir(parents=True, exist_ok=True)
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
        """Answer a request; nothing happens when its caller is gone."""
        if (waiting := self._waiting.get(request)) is not None and not waiting.done():
            waiting.set_result(error_answer(code, text) if code else ok_answer(text))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(READ_LIMIT_S):
                request = await _read(reader)
            answer = await self._ask(request, domain_xml.parse(request.xml), reader)
        except (HookProtocolError, DomainXMLError) as error:
            log.warning("hook: %s", error)
            answer = error_answer(getattr(error, "code", "protocol"), str(error))
        except (TimeoutError, ConnectionError, EOFError):
            answer = error_answer("protocol", "the request never came to its end")
        with contextlib.suppress(ConnectionError):
            writer.write(answer)
            await writer.drain()
        writer.close()

    async def _ask(self, request: HookRequest, facts: DomainFacts, reader: asyncio.StreamReader) -> bytes:
        number, self._next = self._next, self._next + 1
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._called(number, request.operation, facts)
            return await answer
        finally:
            del self._waiting[number]


async def _read(reader: asyncio.StreamReader) -> HookRequest:
    parser = RequestParser()
    while data := await reader.read(65536):
        if (request := parser.feed(data)) is not None:
            return request
    raise EOFError
