"""
One TCP connection as fast as it goes; standard library only, runs in any namespace.

``bulk.py serve PORT`` takes connections one after the other, reads each to its end and answers one byte; it prints
``ready`` when it listens. ``bulk.py send ADDRESS PORT BYTES`` sends zeros and prints the seconds until that byte came.
"""

from __future__ import annotations

import socket
import sys
import time

_PIECE = 1 << 20


def serve(port: int) -> None:
    """Serve until killed."""
    buffer = bytearray(_PIECE)
    with socket.create_server(("", port)) as listener:
        print("ready", flush=True)
        while True:
            connection, _ = listener.accept()
            with connection:
                while connection.recv_into(buffer):
                    pass
                connection.sendall(b"\0")


def send(address: str, port: int, size: int) -> float:
    """:return: Seconds from the first byte sent to the receiver's confirmation that it has all."""
    piece = memoryview(bytes(_PIECE))
    with socket.create_connection((address, port)) as connection:
        begin = time.perf_counter()
        while size > 0:
            connection.sendall(piece[: min(size, _PIECE)])
            size -= _PIECE
        connection.shutdown(socket.SHUT_WR)
        connection.recv(1)
        return time.perf_counter() - begin


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(int(sys.argv[2]))
    else:
        print(send(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
