"""The other side of :mod:`bench.pcp`: a PCP client in a guest, which measures."""

from __future__ import annotations

import os
import socket
import struct
import sys
import time

from bench.worker import answer_lines
from lab.errors import LabError

_MAPPED = bytes(10) + b"\xff\xff"
_PATIENCE_S = 3.0


class Client:
    """
    A client of one guest.

    :param address: Of the guest.
    :param gateway: Where it asks.
    """

    def __init__(self, address: str, gateway: str) -> None:
        self._own = _MAPPED + socket.inet_aton(address)
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind((address, 0))
        self._socket.connect((gateway, 5351))
        self._socket.settimeout(_PATIENCE_S)
        self._port = 1000

    def is_answered(self) -> bool:
        """Return whether somebody answers, with an external address."""
        self._socket.settimeout(0.2)
        try:
            self._socket.send(b"\0\0")
            return self._socket.recv(1100)[:4] == b"\0\x80\0\0"
        except OSError:
            return False
        finally:
            self._socket.settimeout(_PATIENCE_S)

    def map(self, count: int) -> list[float]:
        """Have so many ports mapped, one after the other. :return: Milliseconds of each."""
        return [self._map() for _ in range(count)]

    def _map(self) -> float:
        self._port += 1
        body = os.urandom(12) + b"\6\0\0\0" + struct.pack("!HH", self._port, 0) + _MAPPED + bytes(4)
        request = struct.pack("!BBHI", 2, 1, 0, 3600) + self._own + body
        begin = time.perf_counter()
        self._socket.send(request)
        reply = self._socket.recv(1100)
        end = time.perf_counter()
        if reply[1] != 0x81 or reply[3] or reply[24:36] != body[:12]:
            raise LabError(f"PCP answers {reply.hex()}")
        return (end - begin) * 1000


if __name__ == "__main__":
    client = Client(*sys.argv[1:])
    answer_lines(lambda name, arguments: getattr(client, name)(*arguments))
