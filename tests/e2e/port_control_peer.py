"""Both ends of the tests with mapped ports: a server in a guest, a client outside, a question for a peer (RFC 6887)."""

from __future__ import annotations

import os
import socket
import struct
import sys

MAPPED = bytes(10) + b"\xff\xff"


def serve(port: int) -> None:
    """Answer every connection with what it says."""
    listening = socket.create_server(("0.0.0.0", port), backlog=256)
    print("ready", flush=True)
    while True:
        connection, _ = listening.accept()
        with connection:
            connection.sendall(connection.recv(100))


def reach(address: str, port: int, count: int) -> None:
    """Connect so often; print how often what came back was what was said."""
    good = 0
    for number in range(count):
        try:
            with socket.create_connection((address, port), timeout=1) as connection:
                connection.sendall(b"%d" % number)
                good += connection.recv(100) == b"%d" % number
        except OSError:
            pass
    print(good)


def peer(own: str, gateway: str, address: str, port: int) -> None:
    """Send a datagram to a peer, and ask the gateway about it; print result code, external port and lifetime."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as talking,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
    ):
        talking.bind((own, 0))
        talking.sendto(b"hello", (address, port))
        asking.bind((own, 0))
        asking.settimeout(5)
        header = struct.pack("!BBHI", 2, 2, 0, 600) + MAPPED + socket.inet_aton(own)
        ports = struct.pack("!HH", talking.getsockname()[1], 0) + MAPPED + bytes(4)
        body = os.urandom(12) + b"\x11\0\0\0" + ports + struct.pack("!HH", port, 0) + MAPPED + socket.inet_aton(address)
        asking.sendto(header + body, (gateway, 5351))
        reply = asking.recv(1100)
        print(reply[3], int.from_bytes(reply[42:44], "big"), int.from_bytes(reply[4:8], "big"))


if __name__ == "__main__":
    what, *words = sys.argv[1:]
    if what == "serve":
        serve(int(words[0]))
    elif what == "reach":
        reach(words[0], int(words[1]), int(words[2]))
    else:
        peer(words[0], words[1], words[2], int(words[3]))
