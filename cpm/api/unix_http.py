"""
HTTP/1.1 (RFC 9112) over a unix socket, as much of it as a client of the manager needs: one request a connection.

It takes the place of :mod:`http.client`, because an operator waits for every import of ``virt-ports``: that module and
what it needs (``email``, ``ssl``, ``socket``) take longer to import than a bare Python takes to start.

Tested in ``tests/unit/cpm/api/test_unix_http.py``.
"""

from __future__ import annotations

import _socket  # what socket adds to it is not used, and takes 4 ms to import

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Final

_PART: Final = 1 << 18
"""Bytes that are read at once."""
_MAX_HEAD: Final = 1 << 16
"""Bytes of an answer's status line and header, and of the line that begins a chunk."""


class NotHTTP(Exception):
    """The peer says something that is not an answer in HTTP/1.1."""


class Exchange:
    """
    One request and its answer. Close it when it is no longer needed.

    Every method raises :class:`OSError` when the socket fails (``TimeoutError``: nothing came in time;
    ``ConnectionError``: the peer closed the connection before the end of its answer), and :class:`NotHTTP`.

    :param path: Path of the socket.
    :param timeout_s: Seconds to wait for each read and write.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        self._path = path
        self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        self._socket.settimeout(timeout_s)
        self._data = b""
        """What was read and is not used yet."""
        self._length: int | None = None
        """Bytes of the body that are not read yet; None: it ends with the connection."""
        self._is_chunked = False
        self.status = 0
        self.reason = ""

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def wait_for_ever(self) -> None:
        """Wait for what comes next without limit."""
        self._socket.settimeout(None)

    def request(self, method: str, target: str, body: bytes | None) -> None:
        """
        Connect, send a request, and read the head of its answer: :attr:`status` and :attr:`reason`.

        :param body: In JSON; None: there is none.
        """
        self._socket.connect(self._path)
        head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept-Encoding: identity\r\n"
        if body is not None:
            head += f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n"
        elif method != "GET":
            head += "Content-Length: 0\r\n"
        self._socket.sendall(head.encode("ascii") + b"\r\n" + (body or b""))
        while self._read_head():
            pass

    def read(self) -> bytes:
        """Return the body."""
        return b"".join(self.parts())

    def lines(self) -> Iterator[bytes]:
        """Yield the lines of the body as they come, without their ends; the last one may have had none."""
        rest = b""
        for part in self.parts():
            *lines, rest = (rest + part).split(b"\n")
            yield from lines
        if rest:
            yield rest

    def parts(self) -> Iterator[bytes]:
        """Yield the body in pieces, as they come."""
        if not self._is_chunked:
            yield from self._rest_of_piece()
            return
        while size := self._chunk_size():
            self._length = size
            yield from self._rest_of_piece()
            if self._line():
                raise NotHTTP("a chunk is longer than it says")
        while self._line():  # trailer fields
            pass

    def _rest_of_piece(self) -> Iterator[bytes]:
        """Yield :attr:`_length` bytes, or all until the end of the connection."""
        while self._length != 0:
            if not self._data and not self._receive():
                if self._length is None:
                    return
                raise ConnectionError("the answer is incomplete")
            part = self._data if self._length is None else self._data[: self._length]
            self._data = self._data[len(part) :]
            if self._length is not None:
                self._length -= len(part)
            yield part

    def _chunk_size(self) -> int:
        text = self._line().partition(b";")[0].strip()
        try:
            size = int(text, 16) if len(text) <= 16 else -1
        except ValueError:
            size = -1
        if size < 0:
            raise NotHTTP("not the size of a chunk")
        return size

    def _read_head(self) -> bool:
        """Read one head; return whether it is an interim one, after which another one comes."""
        version, _, rest = self._line().decode("iso-8859-1").partition(" ")
        code, _, self.reason = rest.partition(" ")
        if not version.startswith("HTTP/1.") or len(code) != 3 or not (code.isascii() and code.isdecimal()):
            raise NotHTTP("no status line")
        self.status = int(code)
        self._length, self._is_chunked = None, False
        left = _MAX_HEAD
        while line := self._line():
            left -= len(line)
            if left < 0:
                raise NotHTTP("too long a header")
            name, _, value = line.decode("iso-8859-1").partition(":")
            self._take_field(name.lower(), value.strip())
        if self.status in (204, 304):
            self._length = 0
        return 100 <= self.status < 200

    def _take_field(self, name: str, value: str) -> None:
        if name == "transfer-encoding":
            if value.lower() != "chunked":
                raise NotHTTP("an unknown transfer coding")
            self._is_chunked = True
        elif name == "content-length":
            if not (value.isascii() and value.isdecimal() and len(value) <= 16):
                raise NotHTTP("not a length")
            self._length = int(value)

    def _line(self) -> bytes:
        """Return the next line without its end."""
        while (end := self._data.find(b"\n")) < 0:
            if len(self._data) > _MAX_HEAD:
                raise NotHTTP("too long a line")
            if not self._receive():
                raise ConnectionError("the answer is incomplete")
        line, self._data = self._data[:end], self._data[end + 1 :]
        return line.removesuffix(b"\r")

    def _receive(self) -> bool:
        """Read what has come; return False at the end of the connection."""
        part = self._socket.recv(_PART)
        self._data += part
        return bool(part)
