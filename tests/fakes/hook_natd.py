"""
natd's hook socket without natd: a real unix socket, the real request parser, and answers that the test chooses.

It answers as natd does (tests/fakes/conformance/hook_socket.py), or misbehaves in the ways a daemon can: it hangs, dies
in the middle of its answer, or sends garbage.
"""

from __future__ import annotations

import contextlib
import enum
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from libvirt_hooks.domain_xml import DomainXMLError, parse
from libvirt_hooks.protocol import HookProtocolError, HookRequest, RequestParser, error_answer, ok_answer


class Answer(enum.Enum):
    """The answer to every well-formed request; a malformed one gets the error that natd gives."""

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
    """``ok`` and the VM's name for a domain's XML, an error for anything else."""


ANSWERS = {
    Answer.OK: ("", "203.0.113.1 ports 20000-20255"),
    Answer.REFUSE: ("refuse", "no free ports\x1b[31m for this VM"),
    Answer.ERROR: ("ports-exhausted", "no free ports"),
}
"""Code and text of those that are natd's own answers, as natd's node passes them to its hook server."""
_BROKEN = {Answer.DIE: b"error ref", Answer.NONSENSE: b"\xff\xfe what?\n"}


@contextlib.contextmanager
def _effective_user(uid: int) -> Iterator[None]:
    before = os.geteuid()
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)


class FakeNatd:
    """Serves one connection at a time until closed; `requests` are those that parsed, `errors` those that did not."""

    def __init__(self, path: Path, answer: Answer = Answer.OK, *, uid: int | None = None) -> None:
        """:param uid: The user that listens, for the kernel; None: that of this process."""
        self.path = path
        self.answer = answer
        self.requests: list[HookRequest] = []
        self.errors: list[str] = []
        self._kept: list[socket.socket] = []
        self._closing = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        # The kernel tells those who connect which user called listen().
        with _effective_user(uid) if uid is not None else contextlib.nullcontext():
            self._listener.listen(16)
        self._thread = threading.Thread(target=self._serve, name="fake natd", daemon=True)

    @property
    def hung(self) -> int:
        """How many calls were left without an answer."""
        return len(self._kept)

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
            try:
                request = self._read(connection)
            except HookProtocolError as error:
                self.errors.append(str(error))
                connection.sendall(error_answer("protocol", str(error)))
                return
            self.requests.append(request)
            for piece in self._pieces(request):
                connection.sendall(piece)

    def _read(self, connection: socket.socket) -> HookRequest:
        parser = RequestParser()
        while data := connection.recv(65536):
            if request := parser.feed(data):
                return request
        raise HookProtocolError("the request is incomplete")

    def _pieces(self, request: HookRequest) -> Iterator[bytes]:
        if self.answer in _BROKEN:
            yield _BROKEN[self.answer]
        elif self.answer is Answer.PARSE or self.answer in ANSWERS:
            yield self._answer(request)
        while self.answer is Answer.ENDLESS:
            yield b"ok " * 1000
        while self.answer is Answer.DRIP and not self._closing.wait(0.02):
            yield b"o"

    def _answer(self, request: HookRequest) -> bytes:
        try:
            code, text = ANSWERS.get(self.answer) or ("", parse(request.xml).name)
        except DomainXMLError as error:
            code, text = error.code, str(error)
        return error_answer(code, text) if code else ok_answer(text)
