"""
Labels of rules, sets and elements: nftables' user data, type-length-value with one byte for type and length.

Type 0 of rules and elements is the comment that ``nft list`` shows. Types from 126 up are ours; ``nft`` skips what it
does not know (libnftnl, ``udata.c``), the kernel keeps up to 256 bytes as they are.

Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

import functools
import struct

COMMENT = 0
DIGEST = 126
TAG = 127

_CONCATENATION = 13
"""``EXPR_CONCAT``"""
_MAXIMUM_COMMENT = 127
"""Bytes without the final zero: ``NFTNL_UDATA_COMMENT_MAXLEN`` is 128."""


def printable(text: str, limit: int = _MAXIMUM_COMMENT) -> bytes:
    """
    Return the text as ``nft`` can print and read again: no quotes, nothing unprintable, cut at a whole character.

    Names come from users; whatever is in them must not break a transaction or a listing.
    """
    if text.isprintable() and '"' not in text and "\\" not in text:
        clean = text
    else:
        clean = "".join(c if c.isprintable() and c not in '"\\' else "?" for c in text)
    encoded = clean.encode("utf-8", "replace")
    return encoded if len(encoded) <= limit else encoded[:limit].decode("utf-8", "ignore").encode()


def pack(comment: str = "", tag: str = "", digest: bytes = b"") -> bytes:
    """Return the user data; parts that are empty are left out."""
    parts: list[bytes] = []
    if comment:
        text = printable(comment)
        parts += _head(COMMENT, len(text) + 1), text, b"\0"
    if digest:
        parts += _head(DIGEST, len(digest)), digest
    if tag:
        owner = tag.encode("utf-8", "replace")[:96]
        parts += _head(TAG, len(owner)), owner
    return b"".join(parts)


def part(kind: int, value: bytes) -> bytes:
    """Return one part: type, length, value."""
    return _head(kind, len(value)) + value


def typeof(expression: int, *attributes: tuple[int, int]) -> bytes:
    """
    Return how ``nft`` describes, in a set's user data, the expression that gives the type of a key or of data.

    :param expression: ``EXPR_PAYLOAD`` (7), ``EXPR_META`` (9), ``EXPR_CT`` (12): ``nft``'s own numbers
        (include/expression.h).
    :param attributes: Type and value of each property (``NFTNL_UDATA_SET_KEY_TYPEOF_DATA``), 4 bytes in host order.
    """
    parts = b"".join(part(kind, struct.pack("=I", value)) for kind, value in attributes)
    return part(0, struct.pack("=I", expression)) + part(1, parts)


def typeof_concatenation(*expressions: bytes) -> bytes:
    """Return the same for a key of several parts, each as :func:`typeof` describes it."""
    parts = b"".join(part(number, expression) for number, expression in enumerate(expressions))
    return part(0, struct.pack("=I", _CONCATENATION)) + part(1, parts)


def unpack(userdata: bytes) -> dict[int, bytes]:
    """Return the parts by type; a part that is cut off is left out."""
    parts: dict[int, bytes] = {}
    offset = 0
    while offset + 2 <= len(userdata):
        kind, length = userdata[offset], userdata[offset + 1]
        value = userdata[offset + 2 : offset + 2 + length]
        if len(value) == length:
            parts[kind] = value
        offset += 2 + length
    return parts


def comment_of(userdata: bytes) -> str:
    """Return the comment, or nothing."""
    return unpack(userdata).get(COMMENT, b"").rstrip(b"\0").decode("utf-8", "replace")


def tag_of(userdata: bytes) -> str:
    """Return our tag, or nothing."""
    return unpack(userdata).get(TAG, b"").decode("utf-8", "replace")


def digest_of(userdata: bytes) -> bytes:
    """Return the digest, or nothing."""
    return unpack(userdata).get(DIGEST, b"")


@functools.cache
def _head(kind: int, length: int) -> bytes:
    return bytes((kind, length))
