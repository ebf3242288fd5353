"""
natd's hook socket without natd: a real unix socket, the real request parser, and answers that the test chooses.

It speaks as natd does, or misbehaves in the ways a daemon can: hangs, dies in the middle of its answer, talks nonsense.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from libvirt_hooks.domain_xml import DomainXMLError, parse
from libvirt_hooks.protocol import HookProtocolError, HookRequest, RequestParser, error_answer, ok_answer


class Answer(enum.Enum):
    """What happens to a request."""

    OK = enum.auto()
    REFUSE = enum.auto()
    ERROR = enum.auto()
    HANG = enum.auto()
    """Nothing, and the connection stays open."""
    DIE = enum.auto()
    """The connection ends in the middle of the answer."""
    CLOSE = enum.auto()
    """The connection ends before anything is read."""
    NONSENSE = enum.auto()
    ENDLESS = enum.auto()
    """An answer without end."""
    DRIP = enum.auto()
    """An answer without end, a byte at a time."""
    PARSE = enum.auto()
    """What natd does: `ok` for a domain's XML, an error for anything else."""


class FakeNatd:
    """Serves one connection at a time until closed; `requests` are those that parsed, `errors` those that did not."""

    def __init__(self, path: Path, answer: Answer = Answer.OK) -> None:
        self.path = path
        self.answer = answer
        self.requests: list[HookRequest] = []
        self.errors: list[str] = []
        self._kept: list[socket.socket] = []
        self._closing = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(16)
        self._thread = threading.Thread(target=self._serve, name="fake natd", daemon=True)

    def __enter__(self) -> FakeNatd:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(30)
        for kept in (self._listener, *self._kept):
            kept.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with contextlib.suppress(OSError):
                self._one(connection)

    def _one(self, connection: socket.socket) -> None:
        if self.answer is Answer.CLOSE:
            connection.close()
            return
        if self.answer is Answer.HANG:
            self._kept.append(connection)
            return
        with connection:
            for piece in self._pieces(self._read(connection)):
                connection.sendall(piece)

    def _read(self, connection: socket.socket) -> HookRequest | None:
        parser = RequestParser()
        try:
            while data := connection.recv(65536):
                if request := parser.feed(data):
                    self.requests.append(request)
                    return request
            self.errors.append("cut off")
        except HookProtocolError as error:
            self.errors.append(str(error))
        return None

    def _pieces(self, request: HookRequest | None) -> Iterator[bytes]:
        fixed: dict[Answer, Callable[[], bytes]] = {
            Answer.OK: lambda: ok_answer("203.0.113.1 ports 20000-20255"),
            Answer.REFUSE: lambda: error_answer("refuse", "no free ports\x1b[31m for this VM"),
            Answer.ERROR: lambda: error_answer("ports-exhausted", "no free ports"),
            Answer.DIE: lambda: b"error ref",
            Answer.NONSENSE: lambda: b"\xff\xfe what?\n",
            Answer.PARSE: lambda: judge(request),
        }
        if self.answer in fixed:
            yield fixed[self.answer]()
        while self.answer is Answer.ENDLESS:
            yield b"ok " * 1000
        while self.answer is Answer.DRIP and not self._closing.wait(0.02):
            yield b"o"


def judge(request: HookRequest | None) -> bytes:
    """Answer as natd does as far as the XML goes."""
    if request is None:
        return error_answer("protocol", "not a request")
    try:
        return ok_answer(parse(request.xml).name)
    except DomainXMLError as error:
        return error_answer(error.code, str(error))
