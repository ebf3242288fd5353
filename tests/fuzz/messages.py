"""JSON between manager, nodes and operators."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

import aiohttp
from aiohttp._websocket.reader import WebSocketDataQueue, WebSocketReader
from aiohttp.http import WebSocketError

from cpm.api import client, server
from cpm.api.operations import OPERATIONS
from cpm.api.parameters import Flag, Parameter
from cpm.api.views import Document
from cpm.protocol import bounds, codec
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.walltime import WallTime
from tests.fuzz.mutation import Material
from tests.unit.cpm.protocol.test_wire_bytes import FROM_MANAGER
from tests.unit.cpm.protocol.test_wire_bytes import FROM_NODES as WRITTEN_BY_NODES

_TOKENS: Final = (
    *rb'''{ } [ ] [[[[ {"a": : , " null true -0 1e400 -1 18446744073709551616 NaN "\ud800" "\u0000"'''.split(),
    *b'''"type":"hello" "type":"delta" "type":"report" "0.0.0.0" "::1" "1.2.3.4/33"'''.split(),
    *b""""first":0 "last":65536 "protocol": "generation": "in_use":""".split(),
)

FROM_NODES: Final = Material([data for _, data in WRITTEN_BY_NODES], _TOKENS)
FROM_MANAGERS: Final = Material([data for _, data in FROM_MANAGER], _TOKENS)
BODIES: Final = Material(
    [
        b'{"addresses":["203.0.113.1","203.0.113.2"]}',
        b'{"addresses":[],"reserved":[{"first":5060,"last":5061}]}',
        b'{"ports":512}',
        b'{"floor":256,"cap":null,"weight":100,"policy":"occupancy","drain_limit_s":3600.5,"connections":1}',
        b'{"roles":["host","edge"],"underlay":"172.30.0.11","machine":"x","max_vms":100,"max_ports":0}',
    ],
    _TOKENS,
)
PARAMETERS: Final = Material(
    [b"203.0.113.1", b"6695eb01-f6a4-8304-79aa-97f2502e193f", b"web1", b"1763879880.5", b"1024", b"1", b"false"],
    (b"-", b".", b"0x", b"1e", b"inf", b"nan", b"_", "\N{ARABIC-INDIC DIGIT ONE}".encode(), b"9" * 20),
)


def _recorded() -> list[bytes]:
    path = Path(__file__).parents[1] / "unit/cpm/api/recorded_answers.json"
    answers = [each["answer"] for each in json.loads(path.read_text())]
    return [line.encode() for text in answers if text.startswith(("{", "[")) for line in text.splitlines()]


ANSWERS: Final = Material(_recorded(), _TOKENS)


def understands_node_message(data: bytes) -> bool:
    """Decode a node's message."""
    return _understands(codec.decode_node_message, data)


def understands_manager_message(data: bytes) -> bool:
    """Decode a manager's message."""
    return _understands(codec.decode_manager_message, data)


def understands_body(data: bytes) -> bool:
    """Decode the body of an operator's request, as each of the operations that have one."""
    understood = [_understands(partial(codec.decode, kind), data) for kind in _BODY_TYPES]
    return any(understood)


_BODY_TYPES: Final = tuple({each.body: None for each in OPERATIONS if each.body is not None})
_PARAMETERS: Final = tuple({each: None for operation in OPERATIONS for each in operation.parameters})
_ANSWER_TYPES: Final = tuple({each.answer: None for each in OPERATIONS if each.answer is not Document})


def understands_parameter(data: bytes) -> bool:
    """Read the text of a parameter, as each of all operations'."""
    text = data.decode("utf-8", "surrogateescape")
    understood = [_is_read(each, text) for each in _PARAMETERS]
    # Any text is a flag, or a name.
    return any(understood[number] for number, each in enumerate(_PARAMETERS) if type(each) not in (Parameter, Flag))


def _check_length(text: str | bytes, most: int) -> None:
    assert len(text) <= most


def _is_read(parameter: Parameter, text: str) -> bool:
    try:
        value = parameter.read(text)
    except InvalidRequest as error:
        _check_length(str(error), 600)
        return False
    assert not isinstance(value, str) or len(value) <= bounds.MAX_NAME
    assert not isinstance(value, int) or 0 <= value < 2**63
    assert not isinstance(value, WallTime) or 0 <= value.seconds <= bounds.MAX_UTC
    return True


def understands_answer(data: bytes) -> bool:
    """Decode an answer of the manager, as that of each operation, and as a refusal."""
    str(client._refusal(500, "x", data)).encode("utf-8", "surrogatepass")
    understood = [_is_answer(kind, data) for kind in _ANSWER_TYPES]
    return any(understood)


def _is_answer(kind: Any, data: bytes) -> bool:
    try:
        value = client._decode(kind, data)
    except client.RemoteError as error:
        _check_length(str(error), 1000)
        return False
    assert client._decode(kind, codec.encode(value)) == value
    return True


# Frames of a session


def _frame(payload: bytes, opcode: int = 2) -> bytes:
    """Return one frame as a node sends it (RFC 6455 section 5.2), with a mask of zeros."""
    size = len(payload)
    length = bytes((size | 0x80,)) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    return bytes((0x80 | opcode,)) + length + bytes(4) + payload


FRAMES: Final = Material(
    [
        *(_frame(data) for _, data in WRITTEN_BY_NODES),
        _frame(WRITTEN_BY_NODES[0][1], 1) + _frame(b"x", 9) + _frame(WRITTEN_BY_NODES[1][1]) + _frame(b"\3\xe8", 8),
    ],
    (b"\x82\xff" + b"\x7f" + bytes(7), b"\x82\xfe\xff\xff", b"\x02", b"\x80", b"\xc2", b"\x88\x80", *_TOKENS),
)


class _Protocol:
    """The connection, which is to be read no further."""

    _reading_paused = False

    def pause_reading(self) -> None:
        """Go on."""

    def resume_reading(self) -> None:
        """Go on."""


_loops: Final[list[asyncio.Runner]] = []


def understands_frames(data: bytes) -> bool:
    """Read frames as the manager's server does, in two pieces, and decode the messages in them."""
    if not _loops:
        _loops.append(asyncio.Runner())
    return _loops[0].run(_read_frames(data))


async def _read_frames(data: bytes) -> bool:
    queue = WebSocketDataQueue(cast("Any", _Protocol()), 2**16, loop=asyncio.get_running_loop())
    reader = WebSocketReader(queue, codec.MAX_NODE_MESSAGE, compress=False, decode_text=True)
    half = len(data) // 2
    is_over = reader.feed_data(data[:half])[0] or reader.feed_data(data[half:])[0]
    if not is_over:
        queue.feed_eof()
    understood = False
    # The server ends a session whose peer has closed it.
    with contextlib.suppress(WebSocketError, aiohttp.EofStream, server._PeerIsGone):
        while True:
            frame = await queue.read()
            if frame.type in (aiohttp.WSMsgType.PING, aiohttp.WSMsgType.PONG):
                continue
            try:
                codec.decode_node_message(server._text(frame))
            except InvalidRequest as error:
                _check_length(server._reason(error), 123)
                return False
            understood = True
    return understood


def _understands(decode: Callable[[bytes], Any], data: bytes) -> bool:
    try:
        message = decode(data)
    except InvalidRequest as error:
        str(error).encode()
        return False
    # What was understood can be said again, and means the same.
    assert decode(codec.encode(message)) == message
    return True
