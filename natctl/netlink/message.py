"""
Netlink messages as bytes: packing them, and walking through what the kernel sent.

A message is a header (``struct nlmsghdr``), a fixed header of its protocol, and attributes (``struct nlattr``), which
may be nested; headers and attributes begin at multiples of four bytes. See netlink(7) and linux/netlink.h. The fixed
header of all netfilter subsystems is here too (``struct nfgenmsg``, linux/netfilter/nfnetlink.h).

There are two rules for reading. A walk ends at the first header that does not fit into the rest of its buffer; it never
reads beyond the buffer, never raises, and always ends. And what is listed is read completely or not at all: a message
or nest of which a part would be left over (:func:`attribute_map`, :func:`attribute_payloads`) is a
:class:`MalformedMessage`, as is an object that lacks an attribute, and a list that is cut off
(:mod:`natctl.netlink.socket`).

Message types, flags and structured messages come from pyroute2; what is packed and read in bulk is done here, because
pyroute2's message classes take 13 to 122 µs for an object (``docs/design/0006-netlink.md``).
"""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from pyroute2.netlink import NLA_F_NESTED, NLM_F_ACK, NLM_F_REQUEST

from cpm.protocol.errors import KernelError

HEADER: Final = struct.Struct("=IHHII")
"""``struct nlmsghdr``: length, type, flags, sequence number, port id."""
NFGENMSG_BYTES: Final = 4
"""Size of ``struct nfgenmsg``: family, version, and a number of the subsystem's."""

_NETFILTER_HEADERS: Final = struct.Struct("=IHHIIBBH")
_FLAGS: Final = struct.Struct("=H")
_FLAGS_OFFSET: Final = 6
_NUMBERS: Final = struct.Struct("=II")
_NUMBERS_OFFSET: Final = 8
_ATTRIBUTE: Final = struct.Struct("=HH")
_TYPE_MASK: Final = 0x3FFF

Slice = tuple[bytes, int, int]
"""Part of a buffer: the buffer, where the part begins, where it ends."""

Message = tuple[int, int, int, int, int]
"""A message in a buffer: type, flags, sequence number, where its body (after the header) begins, where it ends."""


class MalformedMessage(KernelError):
    """The kernel sent something that this version cannot read: cut off, or without an attribute that must be there."""

    def __init__(self, action: str, detail: str) -> None:
        super().__init__(action, errno.EBADMSG, detail)


class Request(NamedTuple):
    """One message to the kernel: the encoded bytes, not numbered yet, and a description for errors."""

    data: bytes
    description: object
    """``str()`` of it is called only when the kernel refuses the message: there may be tens of thousands of them."""


# Packing


def aligned(length: int) -> int:
    """Round up to netlink's 4 bytes."""
    return (length + 3) & ~3


def message(kind: int, flags: int, body: bytes) -> bytes:
    """Pack a request of one type; ``NLM_F_REQUEST`` is added to the flags."""
    return HEADER.pack(HEADER.size + len(body), kind, NLM_F_REQUEST | flags, 0, 0) + body


def netfilter_message(kind: int, flags: int, family: int, body: bytes, number: int = 0) -> bytes:
    """
    Pack a request to a netfilter subsystem.

    :param kind: Subsystem and type in one number, see :func:`netfilter_type`.
    :param family: ``NFPROTO_*``.
    :param body: Attributes.
    :param number: ``nfgen_res_id``, whose meaning depends on the subsystem.
    """
    size = _NETFILTER_HEADERS.size + len(body)
    return _NETFILTER_HEADERS.pack(size, kind, NLM_F_REQUEST | flags, 0, 0, family, 0, socket.htons(number)) + body


def netfilter_type(subsystem: int, kind: int) -> int:
    """Return the message type of a netfilter subsystem (``NFNL_SUBSYS_*``)."""
    return subsystem << 8 | kind


def attribute(kind: int, payload: bytes) -> bytes:
    """Pack one attribute, padded."""
    return _ATTRIBUTE.pack(4 + len(payload), kind) + payload + bytes(-len(payload) & 3)


def nested(kind: int, *attributes_: bytes) -> bytes:
    """Pack attributes within an attribute."""
    return attribute(kind | NLA_F_NESTED, b"".join(attributes_))


def with_acknowledgement(request: Request) -> Request:
    """Return the request with ``NLM_F_ACK`` set."""
    data, begin, end = request.data, _FLAGS_OFFSET, _FLAGS_OFFSET + _FLAGS.size
    flags = _FLAGS.unpack_from(data, begin)[0] | NLM_F_ACK
    return Request(data[:begin] + _FLAGS.pack(flags) + data[end:], request.description)


def asks_for_acknowledgement(data: bytes) -> bool:
    """Return whether a packed message has ``NLM_F_ACK`` set."""
    return bool(_FLAGS.unpack_from(data, _FLAGS_OFFSET)[0] & NLM_F_ACK)


def numbered(messages_: Sequence[bytes], first: int) -> bytearray:
    """Join messages and number them, beginning with ``first``."""
    buffer = bytearray().join(messages_)
    offset = 0
    for sequence, data in enumerate(messages_, first):
        _NUMBERS.pack_into(buffer, offset + _NUMBERS_OFFSET, sequence, 0)
        offset += len(data)
    return buffer


def native_u32(value: int) -> bytes:
    """Pack a number in the byte order of this machine."""
    return value.to_bytes(4, sys.byteorder)


def network_u32(value: int) -> bytes:
    """Pack a number in network byte order, as netfilter has them."""
    return value.to_bytes(4, "big")


def terminated(text_: str) -> bytes:
    """Pack a string with its final zero."""
    return text_.encode() + b"\0"


# Reading


def messages(buffer: bytes) -> Iterator[Message]:
    """Yield the messages of a buffer."""
    unpack, least, size = HEADER.unpack_from, HEADER.size, len(buffer)
    offset = 0
    while offset + least <= size:
        length, kind, flags, sequence, _ = unpack(buffer, offset)
        end = offset + length
        if length < least or end > size:
            return
        yield kind, flags, sequence, offset + least, end
        offset = (end + 3) & ~3


def netfilter_bodies(buffer: bytes, kind: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of the attributes of every netfilter message of one type."""
    for found, _, _, start, end in messages(buffer):
        if found == kind and start + NFGENMSG_BYTES <= end:
            yield start + NFGENMSG_BYTES, end


def attributes(buffer: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield type (without its flags), start and end of the payload of every attribute between two offsets."""
    unpack = _ATTRIBUTE.unpack_from
    while start + 4 <= end:
        length, kind = unpack(buffer, start)
        stop = start + length
        if length < 4 or stop > end:
            return
        yield kind & _TYPE_MASK, start + 4, stop
        start += (length + 3) & ~3


def attribute_map(data: bytes, start: int = 0) -> dict[int, bytes]:
    """
    Return the payloads of all attributes from this offset on, by type; if a type occurs twice, the last.

    :raise MalformedMessage: When something is left over that is no attribute.
    """
    # As attributes(), without a generator: this is called several times for each of tens of thousands of elements.
    unpack, size = _ATTRIBUTE.unpack_from, len(data)
    found: dict[int, bytes] = {}
    while start + 4 <= size:
        length, kind = unpack(data, start)
        end = start + length
        if length < 4 or end > size:
            break
        found[kind & _TYPE_MASK] = data[start + 4 : end]
        start += (length + 3) & ~3
    if start < size:
        raise _left_over(size - start)
    return found


def attribute_payloads(data: bytes) -> Iterator[bytes]:
    """
    Yield the payloads of a list of attributes, whatever their types.

    :raise MalformedMessage: At the end, when something is left over that is no attribute.
    """
    behind = 0
    for _, begin, end in attributes(data, 0, len(data)):
        yield data[begin:end]
        behind = aligned(end)
    if behind < len(data):
        raise _left_over(len(data) - behind)


def _left_over(size: int) -> MalformedMessage:
    return MalformedMessage("read what the kernel sent", f"{size} bytes are no attribute")


def required(parts: Mapping[int, bytes], kind: int, size: int = 0) -> bytes:
    """
    Return the payload of an attribute that must be there.

    :param size: Bytes that it must have; 0: any number.
    :raise MalformedMessage: When there is none, or it has another size.
    """
    payload = parts.get(kind)
    if payload is None or (size and len(payload) != size):
        raise MalformedMessage("read what the kernel sent", f"attribute {kind} is missing or has another size")
    return payload


def sized(parts: Mapping[int, bytes], kind: int, size: int) -> bytes | None:
    """
    Return the payload of an attribute that may be missing; None: it is.

    :param size: Bytes that it must have.
    :raise MalformedMessage: When it has another size.
    """
    return required(parts, kind, size) if kind in parts else None


def network_number(payload: bytes) -> int:
    """Return a number in network byte order, of any size; 0 for nothing."""
    return int.from_bytes(payload, "big")


def native_number(payload: bytes) -> int:
    """Return a number in the byte order of this machine, of any size; 0 for nothing."""
    return int.from_bytes(payload, sys.byteorder)


def text(payload: bytes) -> str:
    """Return a zero-terminated string."""
    return payload.rstrip(b"\0").decode("utf-8", "replace")
