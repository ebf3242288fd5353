"""Natd's hook socket: what goes in, and how the answer begins."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path

from libvirt_hooks.protocol import MAX_HEADER, HookOperation
from tests.fakes.hook_request import request_bytes

HANG_S = 30
UUID = "4dea22b3-1d52-48f3-a516-782e98ab3fa0"
NAME = "web-1"
XML = f"<domain type='qemu'><name>{NAME}</name><uuid>{UUID}</uuid></domain>".encode()
GOOD = request_bytes(xml=XML)


@dataclasses.dataclass(frozen=True)
class Exchange:
    """One connection of a hook to a natd that answers every well-formed request with ``ok`` and the VM's name."""

    pieces: tuple[bytes, ...]
    answer: bytes
    """How the answer begins: all of it, or its code."""
    hangs_up: bool = False
    """Whether the hook sends nothing after the pieces (SHUT_WR)."""


EXCHANGES = {
    "a request": Exchange((GOOD,), b"ok web-1\n"),
    "in two pieces": Exchange((GOOD[:9], GOOD[9:]), b"ok web-1\n"),
    "a byte at a time": Exchange(tuple(GOOD[at : at + 1] for at in range(len(GOOD))), b"ok web-1\n"),
    "any bytes in the name": Exchange(
        (request_bytes(HookOperation.STOPPED, "end", "\udcff\n\1", "\udcfe", XML),), b"ok web-1\n"
    ),
    **{
        f"operation {operation}": Exchange((request_bytes(operation, xml=XML),), b"ok web-1\n")
        for operation in HookOperation
    },
    "no XML": Exchange((request_bytes(xml=b""),), b"error domain-xml "),
    "XML of something else": Exchange((request_bytes(xml=b"<network/>"),), b"error domain-xml "),
    "a document type": Exchange((request_bytes(xml=b"<!DOCTYPE d>" + XML),), b"error domain-xml "),
    "more than announced": Exchange((GOOD + b"x",), b"error protocol "),
    "not a header": Exchange((b"GET / HTTP/1.1\r\n",), b"error protocol "),
    "a later version": Exchange((b"qemu 2 start begin 0 0 0\n",), b"error protocol "),
    "a header without end": Exchange((b"q" * MAX_HEADER,), b"error protocol "),
    "cut off in the header": Exchange((GOOD[:9],), b"error protocol ", hangs_up=True),
    "cut off in the XML": Exchange((GOOD[:-9],), b"error protocol ", hangs_up=True),
    "nothing": Exchange((), b"error protocol ", hangs_up=True),
}


def exchange(path: Path, pieces: tuple[bytes, ...], *, hangs_up: bool = False) -> bytes:
    """Send a request in pieces and return everything that comes back until the other side closes."""
    with socket.socket(socket.AF_UNIX) as hook:
        hook.settimeout(HANG_S)
        hook.connect(str(path))
        for piece in pieces:
            hook.sendall(piece)
        if hangs_up:
            hook.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: hook.recv(65536), b""))
