"""
Somebody else's nftables transactions: ``python -m bench.churn PERIOD_MS`` makes one each so many milliseconds.

They add and remove a chain of a table of its own, until stdin ends; then the table goes. Prints a line when it begins,
and as the last one how many there were. Standard library only: what the product has is not what makes it trouble.
"""

from __future__ import annotations

import select
import socket
import struct
import sys
import time
from itertools import count

TABLE = "somebody-elses"
_BEGIN, _END = 0x10, 0x11
_NEW_TABLE, _DELETE_TABLE, _NEW_CHAIN, _DELETE_CHAIN = 0xA00, 0xA02, 0xA03, 0xA05
_REQUEST, _CREATE = 1, 0x400
_IPV4, _NFTABLES = 2, 10


class Churn:
    """The transactions, from the calling thread's namespace; the table exists from the start."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 12)
        self._socket.bind((0, 0))
        self._turns = count()
        self._send(_message(_NEW_TABLE, _CREATE, _IPV4, _NAME))

    def one(self) -> None:
        """Make one transaction: a chain comes, or goes again."""
        chain = _NAME + _attribute(3, b"passing\0")
        kind, flags = (_DELETE_CHAIN, 0) if next(self._turns) % 2 else (_NEW_CHAIN, _CREATE)
        self._send(_message(kind, flags, _IPV4, chain))

    def end(self) -> None:
        """Remove the table."""
        self._send(_message(_DELETE_TABLE, 0, _IPV4, _NAME))
        self._socket.close()

    def _send(self, message: bytes) -> None:
        self._socket.send(_message(_BEGIN, 0, 0, b"", _NFTABLES) + message + _message(_END, 0, 0, b"", _NFTABLES))


def _message(kind: int, flags: int, family: int, body: bytes, resource: int = 0) -> bytes:
    head = struct.pack("=IHHIIBBH", 20 + len(body), kind, _REQUEST | flags, 0, 0, family, 0, socket.htons(resource))
    return head + body


def _attribute(kind: int, payload: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(payload), kind) + payload + bytes(-len(payload) & 3)


_NAME = _attribute(1, TABLE.encode() + b"\0")


def main() -> int:
    """Run until stdin ends."""
    period_s = float(sys.argv[1]) / 1000
    churn, due = Churn(), time.monotonic()
    print("begun", flush=True)
    for made in count():
        due = max(due + period_s, time.monotonic())
        if select.select([sys.stdin], [], [], max(0.0, due - time.monotonic()))[0]:
            churn.end()
            print(made, flush=True)
            break
        churn.one()
    return 0


if __name__ == "__main__":
    sys.exit(main())
