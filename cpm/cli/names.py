"""
``virt-ports __complete SHELL KIND PREFIX``: names for the completion of shells, one a line.

A key press waits for it, so it imports little, waits for cpmd half a second at most, and prints nothing when anything
goes wrong. Tested in ``tests/unit/cpm/cli/test_completion.py``.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from typing import Any, Final

from cpm.cli import render

WORD: Final = "__complete"
"""The verb, which no help shows."""

_WAIT_S: Final = 0.5
_MOST: Final = 200
"""Names that are offered."""
_MOST_BYTES: Final = 1 << 20
_KINDS: Final = {"vms": ("/v1/domains", "name"), "nodes": ("/v1/nodes", "name"), "addresses": ("/v1/pool", "address")}
_SPECIAL: Final = re.compile(r"([^\w@%+=:,./-])")


def run(words: Sequence[str], socket_path: str) -> int:
    """
    Print the names that begin with a prefix.

    :param words: Shell (``bash``: names are quoted for it; any other quotes them itself), kind, and the prefix.
    :return: 0, whatever happens.
    """
    try:
        shell, kind, prefix = (*words, "")[:3]
        wanted = re.sub(r"\\(.)", r"\1", prefix) if shell == "bash" else prefix
        for name in _names(kind, wanted, socket_path):
            render.emit_exact((_SPECIAL.sub(r"\\\1", name) if shell == "bash" else name) + "\n")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    return 0


def _names(kind: str, prefix: str, socket_path: str) -> Iterator[str]:
    path, key = _KINDS[kind]
    pattern = re.sub(r"([*?\[])", r"[\1]", prefix) + "*"
    query = "".join(f"%{byte:02X}" for byte in os.fsencode(pattern))
    answer = json.loads(_get(f"{path}?match={query}&limit={_MOST}", socket_path))
    names = {str(each[key]) for each in answer}
    # What is not printable would be a key for the shell, or two names.
    yield from sorted(name for name in names if name.startswith(prefix) and name.isprintable())[:_MOST]


def _get(target: str, socket_path: str) -> bytes:
    """
    Return the body of an answer.

    :raise OSError: When cpmd does not answer in time.
    :raise ValueError: When it answers something else.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(_WAIT_S)
        connection.connect(socket_path)
        connection.sendall(f"GET {target} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        data: Any = bytearray()
        while part := connection.recv(1 << 16):
            data += part
            if len(data) > _MOST_BYTES:
                raise ValueError("too long")
    head, _, body = bytes(data).partition(b"\r\n\r\n")
    if head.split(b" ", 2)[1:2] != [b"200"]:
        raise ValueError("refused")
    return body
