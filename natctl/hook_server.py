"""
natd's side of the hook: a unix socket, with one request per connection, which the node answers when it is ready.

libvirt waits for every microsecond of this, so there are no tasks and no streams: a request is passed on in the call
that brings its last byte, and an answer is written when the node gives it.

Tested in ``tests/unit/libvirt_hooks/test_hook_natd.py``.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias, cast

from cpm.protocol.errors import ConfigError
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

_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH

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
        self._callers: set[_Caller] = set()
        self._reading: set[_Caller] = set()
        self._to_be_read: collections.deque[_Caller] = collections.deque()
        self._asking: dict[int, _Asked] = {}
        self._next = 0
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """
        Listen (mode 0600: libvirt runs hooks as root). A directory that is missing is made for this user alone.

        :raise OSError: When the socket cannot be made.
        :raise ConfigError: When another user could listen in its place, and say which VMs start.
        """
        domain_xml.check_parser()
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_others(self._path.parent.resolve())
        self._path.unlink(missing_ok=True)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(lambda: _Caller(self), self._path, backlog=256)
        self._path.chmod(0o600)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()
        with contextlib.suppress(OSError):
            self._path.unlink()

    def answer(self, request: int, code: str, text: str) -> None:
        """Answer a request; do nothing if its caller is gone."""
        if (asked := self._asking.pop(request, None)) is not None:
            asked.caller.finish(error_answer(code, text) if code else ok_answer(text))
            self._on_answered(asked.operation, time.monotonic() - asked.at)

    # Events of callers

    def on_caller(self, caller: _Caller) -> None:
        """Begin to read a new caller's request, or let it wait until another one's is read."""
        if len(self._callers) >= MOST_CALLERS:
            caller.finish(error_answer("busy", f"natd serves {MOST_CALLERS} calls of the hook already"))
            return
        self._callers.add(caller)
        if len(self._reading) < MOST_READING:
            self._read(caller)
        else:
            self._to_be_read.append(caller)
            caller.pause()

    def on_request(self, caller: _Caller, request: HookRequest) -> int:
        """
        Pass on what a caller asks; return its number.

        :raise DomainXMLError: When its XML is not that of a domain.
        """
        facts = domain_xml.parse(request.xml)
        number, self._next = self._next, self._next + 1
        self._asking[number] = _Asked(caller, request.operation, time.monotonic())
        self._on_request(number, request.operation, facts)
        return number

    def on_read(self, caller: _Caller) -> None:
        """Nothing more is read of a caller; read the next one's request."""
        if caller not in self._reading:
            return
        self._reading.remove(caller)
        while self._to_be_read and len(self._reading) < MOST_READING:
            waiting = self._to_be_read.popleft()
            if waiting in self._callers:
                self._read(waiting)
                waiting.resume()

    def on_gone(self, caller: _Caller, number: int | None) -> None:
        """Forget a caller."""
        self.on_read(caller)
        self._callers.discard(caller)
        if number is not None:
            self._asking.pop(number, None)

    def _read(self, caller: _Caller) -> None:
        self._reading.add(caller)
        caller.limit(READ_TIMEOUT_S)


class _Asked(NamedTuple):
    caller: _Caller
    operation: HookOperation
    at: float


class _Caller(asyncio.Protocol):
    """One connection."""

    def __init__(self, server: HookServer) -> None:
        self._server = server
        self._parser: RequestParser | None = RequestParser()
        self._number: int | None = None
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """There is a connection."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop's class does not inherit from it
        self._server.on_caller(self)

    def data_received(self, data: bytes) -> None:
        """Pass the request on when it is complete; what follows it in another piece is ignored."""
        if self._parser is None:
            return
        try:
            if (request := self._parser.feed(data)) is not None:
                self._end_reading()
                self._number = self._server.on_request(self, request)
        except (HookProtocolError, DomainXMLError) as error:
            log.warning("hook: %s", error)
            self.finish(error_answer(getattr(error, "code", "protocol"), str(error)))

    def eof_received(self) -> bool:
        """Return True, to keep the connection for the answer."""
        if self._parser is not None:
            self._on_incomplete()
        return True

    def connection_lost(self, _exc: Exception | None) -> None:
        """The connection is gone."""
        self._transport = None
        self._end_reading()
        self._server.on_gone(self, self._number)

    def limit(self, seconds: float) -> None:
        """Give the caller this long to send its request."""
        self._timer = asyncio.get_running_loop().call_later(seconds, self._on_incomplete)

    def pause(self) -> None:
        """Read nothing for now."""
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        """Go on reading."""
        if self._transport is not None:
            self._transport.resume_reading()

    def finish(self, answer: bytes) -> None:
        """Answer, and close the connection."""
        self._end_reading()
        if self._transport is not None:
            self._transport.write(answer)
            self._transport.close()

    def _on_incomplete(self) -> None:
        self.finish(error_answer("protocol", "the request is incomplete"))

    def _end_reading(self) -> None:
        if self._parser is None:
            return
        self._parser = None
        if self._timer is not None:
            self._timer.cancel()
        self._server.on_read(self)


def _refuse_others(folder: Path) -> None:
    """
    Refuse a directory in which a user besides root and this one can make a file, or which such a user can replace.

    Where a sticky directory is above it, only its owner can do that.
    """
    for each in (folder, *folder.parents):
        found = each.stat()
        others = found.st_mode & _WRITABLE_BY_OTHERS and not (each != folder and found.st_mode & stat.S_ISVTX)
        if found.st_uid not in (0, os.geteuid()) or others:
            remedy = f"users besides root can write to {each}, and answer libvirt's hook in natd's place"
            raise ConfigError("natd.toml", "listen.socket", f"{remedy}; name a file in a directory of root's own")
