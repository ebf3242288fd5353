"""
JSON on the wire <-> the vocabulary. Strict: a wrong type or a missing field names its path (``$.vms[3].domain``).

The only module that knows how addresses and networks are written.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any, TypeVar

import msgspec

from cpm.protocol.errors import InvalidRequest
from cpm.protocol.messages import ManagerMessage, NodeMessage

MAX_MESSAGE = 64 * 1024 * 1024
"""Bytes; a snapshot of 100,000 VMs is about 20 MB."""

_T = TypeVar("_T")


def _to_json(value: Any) -> Any:
    if isinstance(value, (IPv4Address, IPv4Network)):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def _from_json(kind: type, value: Any) -> Any:
    if kind not in (IPv4Address, IPv4Network):
        raise NotImplementedError(kind.__name__)
    if not isinstance(value, str):
        # ipaddress would take numbers and bytes too.
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return kind(value)


_encoder = msgspec.json.Encoder(enc_hook=_to_json)
_from_node: msgspec.json.Decoder[NodeMessage] = msgspec.json.Decoder(NodeMessage, dec_hook=_from_json)
_from_manager: msgspec.json.Decoder[ManagerMessage] = msgspec.json.Decoder(ManagerMessage, dec_hook=_from_json)


def encode(message: object) -> bytes:
    """Return the JSON of a message, view or request."""
    return _encoder.encode(message)


def _decode(decoder: msgspec.json.Decoder[_T], data: bytes | str) -> _T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"cannot understand message: {error}; both sides must run the same version") from error


def decode_node_message(data: bytes | str) -> NodeMessage:
    """
    Read what a node said.

    :raise InvalidRequest: When it is not JSON, not a known message, or a field is missing or wrong.
    """
    return _decode(_from_node, data)


def decode_manager_message(data: bytes | str) -> ManagerMessage:
    """
    Read what the manager said.

    :raise InvalidRequest: When it is not JSON, not a known message, or a field is missing or wrong.
    """
    return _decode(_from_manager, data)


def decode(kind: type[_T], data: bytes | str) -> _T:
    """
    Read any other value, such as a request's body.

    :raise InvalidRequest: When it is not JSON, or a field is missing or wrong.
    """
    return _decode(msgspec.json.Decoder(kind, dec_hook=_from_json), data)
