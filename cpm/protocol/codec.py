"""
JSON encoding of messages, requests and views.

Decoding is strict about types and required fields, and an error names the JSON path (``$.vms[3].domain``). Unknown
fields are ignored, so that a newer peer may send more. How addresses and networks are written in JSON is known
here only.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network
from typing import Any, TypeVar

import msgspec

from cpm.protocol.errors import InvalidRequest
from cpm.protocol.messages import ManagerMessage, NodeMessage

MAX_MESSAGE = 64 * 1024 * 1024
"""Bytes of a message of the manager; a snapshot of 100,000 VMs is about 20 MB."""
MAX_NODE_MESSAGE = 16 * 1024 * 1024
"""Bytes of a message of a node; a report on 10,000 VMs is about 5 MB."""
_MAX_REASON = 400
"""Characters of a decoder's explanation, which may quote what it refuses."""

_T = TypeVar("_T")


def _to_json(value: Any) -> Any:
    if isinstance(value, (IPv4Address, IPv4Network)):
        return str(value)
    raise NotImplementedError(type(value).__name__)


def _from_json(kind: type, value: Any) -> Any:
    if kind not in (IPv4Address, IPv4Network):
        raise NotImplementedError(kind.__name__)
    if not isinstance(value, str):
        # ipaddress would accept numbers and bytes, too.
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    return kind(value)


_encoder = msgspec.json.Encoder(enc_hook=_to_json)
_from_node: msgspec.json.Decoder[NodeMessage] = msgspec.json.Decoder(NodeMessage, dec_hook=_from_json)
_from_manager: msgspec.json.Decoder[ManagerMessage] = msgspec.json.Decoder(ManagerMessage, dec_hook=_from_json)


def encode(message: object) -> bytes:
    """Return a message, view or request as JSON."""
    return _encoder.encode(message)


def _decode(decoder: msgspec.json.Decoder[_T], data: bytes | str) -> _T:
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        reason = str(error)[:_MAX_REASON]
        raise InvalidRequest(f"cannot understand message: {reason}; both sides must run the same version") from error


def decode_node_message(data: bytes | str) -> NodeMessage:
    """
    Decode a message from a node.

    :raise InvalidRequest: When it is not JSON, not a known message, a field is missing or has a wrong type, or
        something in it exceeds its bounds (:mod:`cpm.protocol.bounds`).
    """
    return _decode(_from_node, data)


def decode_manager_message(data: bytes | str) -> ManagerMessage:
    """
    Decode a message from the manager.

    :raise InvalidRequest: When it is not JSON, not a known message, a field is missing or has a wrong type, or
        something in it exceeds its bounds.
    """
    return _decode(_from_manager, data)


def decode(kind: type[_T], data: bytes | str) -> _T:
    """
    Decode any other value, such as the body of a request.

    :raise InvalidRequest: When it is not JSON, a field is missing or has a wrong type, or something in it exceeds its
        bounds.
    """
    return _decode(msgspec.json.Decoder(kind, dec_hook=_from_json), data)
