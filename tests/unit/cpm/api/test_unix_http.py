"""HTTP as servers send it, whole and in pieces, and what is none."""

from __future__ import annotations

import random
import socket
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from cpm.api.unix_http import Exchange, NotHTTP

LENGTH = b"HTTP/1.1 200 OK\r\nContent-Type: x\r\nContent-Length: 5\r\n\r\nab\ncd"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: Chunked\r\n\r\n3;x=y\r\nab\n\r\n2\r\ncd\r\n0\r\nA: b\r\n\r\n"
TO_THE_END = b"HTTP/1.0 200 OK\n\nab\ncd"
INTERIM = b"HTTP/1.1 100 Continue\r\n\r\n" + LENGTH


class Peer:
    """Takes one connection and says what it is told, in pieces; then it closes."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.asked = b""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()

    def say(self, pieces: list[bytes]) -> Exchange:
        def serve() -> None:
            connection, _ = self._listener.accept()
            with connection:
                self.asked = connection.recv(1 << 16)
                for piece in pieces:
                    try:
                        connection.sendall(piece)
                    except OSError:
                        return

        threading.Thread(target=serve, daemon=True).start()
        return Exchange(self.path, 60)

    def close(self) -> None:
        self._listener.close()


def body_of(exchange: Exchange) -> bytes:
    with closing(exchange):
        exchange.request("GET", "/", None)
        return exchange.read()


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    with closing(Peer(tmp_path / "s")) as found:
        yield found


@pytest.mark.parametrize("answer", [LENGTH, CHUNKED, TO_THE_END, INTERIM])
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_is_the_same_in_pieces_of_any_size(peer: Peer, answer: bytes, size: int) -> None:
    for read in (lambda exchange: exchange.read(), lambda exchange: b"\n".join(exchange.lines())):
        pieces = [answer[start : start + size] for start in range(0, len(answer), size)]
        with closing(peer.say(pieces)) as exchange:
            exchange.request("GET", "/x?y", None)
            assert (exchange.status, exchange.reason, read(exchange)) == (200, "OK", b"ab\ncd")
    assert peer.asked == b"GET /x?y HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: identity\r\n\r\n"


def test_a_body_is_sent_with_its_length(peer: Peer) -> None:
    with closing(peer.say([LENGTH])) as exchange:
        exchange.request("POST", "/x", b"{}")
    assert peer.asked.endswith(b"Content-Length: 2\r\nContent-Type: application/json\r\n\r\n{}")
    with closing(peer.say([LENGTH])) as exchange:
        exchange.request("DELETE", "/x", None)
    assert peer.asked.endswith(b"\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("answer", [LENGTH, CHUNKED])
def test_an_answer_that_is_cut_is_incomplete(peer: Peer, answer: bytes) -> None:
    for end in range(len(answer) - 1):
        with pytest.raises(ConnectionError):
            body_of(peer.say([answer[:end]]))


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 2000 OK\r\n\r\n",
        b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"x" * 1_000_000,
    ],
)
def test_what_is_no_answer_is_refused(peer: Peer, answer: bytes) -> None:
    with pytest.raises(NotHTTP):
        body_of(peer.say([answer]))


def test_damaged_answers_are_understood_or_refused(peer: Peer) -> None:
    seed = random.randrange(1 << 32)
    chance = random.Random(seed)
    for _ in range(500):
        damaged = bytearray(chance.choice([LENGTH, CHUNKED, TO_THE_END, INTERIM]))
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.choice([chance.randrange(256), *b"\r\n0: "])
        with suppress(NotHTTP, ConnectionError):
            assert len(body_of(peer.say([bytes(damaged)]))) <= len(damaged), seed
