"""JSON between manager, nodes and operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from cpm.api.views import PoolRequest
from cpm.protocol import codec
from cpm.protocol.errors import InvalidRequest
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
BODIES: Final = Material([b'{"addresses":["203.0.113.1","203.0.113.2"]}', b'{"addresses":[]}'], _TOKENS)


def understands_node_message(data: bytes) -> bool:
    """Decode a node's message."""
    return _understands(codec.decode_node_message, data)


def understands_manager_message(data: bytes) -> bool:
    """Decode a manager's message."""
    return _understands(codec.decode_manager_message, data)


def understands_body(data: bytes) -> bool:
    """Decode the body of an operator's request."""
    return _understands(lambda body: codec.decode(PoolRequest, body), data)


def _understands(decode: Callable[[bytes], Any], data: bytes) -> bool:
    try:
        message = decode(data)
    except InvalidRequest as error:
        str(error).encode()
        return False
    # What was understood can be said again, and means the same.
    assert decode(codec.encode(message)) == message
    return True
