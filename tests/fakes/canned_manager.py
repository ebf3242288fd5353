"""A manager that says what a test told it to: HTTP over a unix socket, in a thread, standard library only."""

from __future__ import annotations

import contextlib
import http.server
import shutil
import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cpm.api.views import ErrorView
from cpm.protocol import codec

Answer = Callable[["Handler"], None]


class Handler(http.server.BaseHTTPRequestHandler):
    """Looks up ``METHOD target`` and does what is written there."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key = f"{self.command} {self.path}"
        self.server.asked.append((key, body))
        self.server.answers.get(key, refusal(404, "not-found", f"no {key}; see the test"))(self)

    do_POST = do_PUT = do_DELETE = do_PATCH = do_GET  # noqa: N815 - http.server looks these names up

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def send(self, status: int, body: bytes, content_type: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    answers: dict[str, Answer]
    asked: list[tuple[str, bytes]]

    def handle_error(self, *_: object) -> None:
        """Be quiet about clients that went away: some tests are about that."""


class CannedManager:
    """The running fake; ``on`` sets an answer, ``asked`` has every request with its body."""

    def __init__(self, server: _Server, path: str) -> None:
        self._server = server
        self.path = path

    @property
    def asked(self) -> list[tuple[str, bytes]]:
        return self._server.asked

    def on(self, key: str, answer: Answer | object) -> None:
        """Answer ``METHOD target`` with a view, or do what the function does."""
        self._server.answers[key] = answer if callable(answer) else view(answer)


def view(value: object, status: int = 200) -> Answer:
    return lambda handler: handler.send(status, codec.encode(value))


def refusal(status: int, code: str, message: str) -> Answer:
    return view(ErrorView(code, message), status)


def raw(status: int, body: bytes) -> Answer:
    return lambda handler: handler.send(status, body, "text/plain")


def lines(values: Sequence[object], *, then: Callable[[], object] = lambda: None) -> Answer:
    """Send newline-delimited values as chunks, each on its own; ``then`` runs before the stream ends."""

    def answer(handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Type", "application/x-ndjson")
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for value in values:
            handler.chunk(codec.encode(value) + b"\n")
        then()
        handler.chunk(b"")

    return answer


def hang_up(handler: Handler) -> None:
    """Close without a word."""
    handler.close_connection = True


def garbage(handler: Handler) -> None:
    """Speak something else."""
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
    handler.close_connection = True


@contextlib.contextmanager
def running() -> Iterator[CannedManager]:
    """Run one on a socket of its own; the directory is short because a socket's path may have 107 bytes only."""
    directory = tempfile.mkdtemp(prefix="vpt-")
    path = str(Path(directory) / "cpmd.sock")
    server = _Server(path, Handler)
    server.answers, server.asked = {}, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, name="canned-manager")
    thread.start()
    try:
        yield CannedManager(server, path)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        shutil.rmtree(directory)
