"""Every number, text and list that another process sends has bounds, in all types that are decoded."""

from __future__ import annotations

import dataclasses
import enum
import json
import types
import typing
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, Any

import msgspec
import pytest
from msgspec import Meta, Struct, UnsetType

from cpm.api.operations import OPERATIONS
from cpm.protocol import bounded, bounds, codec
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.messages import ManagerMessage, NodeMessage
from cpm.protocol.model import PortRange

DECODED = (
    *typing.get_args(NodeMessage),
    *typing.get_args(ManagerMessage),
    *sorted({operation.body for operation in OPERATIONS if operation.body is not None}, key=str),
)
"""All that nodes, the manager and operators send."""

_BOUNDED_BY_THEMSELVES = (bool, type(None), UnsetType, IPv4Address, IPv4Network)


def unbounded(kind: Any, where: str, metas: tuple[Meta, ...] = ()) -> Iterator[str]:
    """Yield the places in a type that have no bounds: a kind of type that is not known here counts as one."""
    while hasattr(kind, "__supertype__"):  # NewType
        kind = kind.__supertype__
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        yield from unbounded(args[0], where, (*metas, *(meta for meta in args[1:] if isinstance(meta, Meta))))
    elif origin in (typing.Union, types.UnionType):
        for each in args:
            yield from unbounded(each, where, metas)
    elif kind in (int, float):
        if not any(m.ge is not None or m.gt is not None for m in metas) or not any(m.le is not None for m in metas):
            yield f"{where}: {kind.__name__}"
    elif kind is str:
        if not any(meta.max_length is not None for meta in metas):
            yield f"{where}: str"
    elif origin in (tuple, frozenset, dict):
        if not any(meta.max_length is not None for meta in metas):
            yield f"{where}: {origin.__name__}"
        for each in args:
            if each is not Ellipsis:
                yield from unbounded(each, f"{where}[]")
    elif isinstance(kind, type) and (issubclass(kind, Struct) or dataclasses.is_dataclass(kind)):
        for name, field in typing.get_type_hints(kind, include_extras=True).items():
            if not name.startswith("__") and typing.get_origin(field) is not typing.ClassVar:
                yield from unbounded(field, f"{where}.{name}")
    elif not (isinstance(kind, type) and (kind in _BOUNDED_BY_THEMSELVES or issubclass(kind, enum.StrEnum))):
        yield f"{where}: {kind}"


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.__name__)
def test_every_field_has_bounds(kind: type) -> None:
    assert list(unbounded(kind, kind.__name__)) == []


def test_a_field_without_bounds_is_found() -> None:
    class Inner(Struct):
        number: int
        text: str | None
        capped: Annotated[int, Meta(le=5)]
        texts: Annotated[tuple[str, ...], Meta(max_length=5)]
        by_name: Annotated[dict[str, bounded.Count], Meta(max_length=5)]
        anything: object
        fine: Annotated[tuple[bounded.Word, ...], Meta(max_length=5)]

    assert list(unbounded(Annotated[tuple[Inner, ...], Meta(max_length=1)], "m")) == [
        "m[].number: int",
        "m[].text: str",
        "m[].capped: int",
        "m[].texts[]: str",
        "m[].by_name[]: str",
        "m[].anything: <class 'object'>",
    ]


UUID = "6695eb01-f6a4-8304-79aa-97f2502e193f"
REPORT = {"type": "report", "generation": 1, "period_s": 1.0, "vms": []}
HUGE = int("9" * 401)


@pytest.mark.parametrize(
    "message",
    [
        REPORT | {"vms": [{"domain": UUID, "packets_per_s": 1, "megabits_per_s": 1, "ports_in_use": HUGE}]},
        REPORT | {"vms": [{"domain": UUID, "packets_per_s": -1, "megabits_per_s": 1}]},
        REPORT | {"dropped": {"x": HUGE}},
        REPORT | {"dropped": {"x": 2**63}},
        REPORT | {"dropped": {"x" * 256: 1}},
        REPORT | {"period_s": 0},
        REPORT | {"warnings": ["x"] * 257},
        REPORT | {"generation": HUGE},
        {"type": "need", "domain": UUID, "ports": {"first": 1024, "last": 1087}, "ports_in_use": 250,
         "arrivals_per_s": 1.7e308},
        {"type": "attach", "domain": UUID + "0", "name": "x"},
        {"type": "attach", "domain": UUID, "name": "x" * 4097},
        {"type": "attach", "domain": UUID, "name": "x", "wishes": {"floor": HUGE}},
        {"type": "attach", "domain": UUID, "name": "x", "wishes": {"drain_limit_s": 1e300}},
    ],
)  # fmt: skip
def test_a_message_beyond_its_bounds_is_refused(message: dict[str, object]) -> None:
    with pytest.raises(InvalidRequest, match="cannot understand message"):
        codec.decode_node_message(json.dumps(message))


def test_the_reason_of_a_refusal_is_short() -> None:
    with pytest.raises(InvalidRequest) as refused:
        codec.decode_node_message(json.dumps({"type": "x" * 100_000}))
    assert len(str(refused.value)) < 600


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0), ("65535", 65535), ("007", 7), ("65536", None), ("", None), ("-1", None), ("+1", None), ("1.0", None),
        ("²", None), ("١", None), (" 1", None), ("1_0", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_a_whole_number_is_ascii_digits_within_a_bound(text: str, number: int | None) -> None:
    assert bounds.whole_number(text, 65535) == number


def test_texts_and_numbers_of_others_are_made_to_fit() -> None:
    assert bounds.cut("x" * bounds.MAX_SENTENCE) == "x" * bounds.MAX_SENTENCE
    assert len(bounds.cut("x" * (bounds.MAX_SENTENCE + 1))) == bounds.MAX_SENTENCE
    assert [bounds.at_most(n, 5) for n in (-1, 0, 5, 6)] == [0, 0, 5, 5]
    assert bounds.at_most(1e300, 5.0) == 5.0
    assert bounds.short("x" * 100_000) == repr("x" * 40 + "...")
    assert bounds.short("\x1b[2J") == r"'\x1b[2J'"


def test_a_range_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(ValueError, match="not a port range"):
        PortRange.parse("9" * 5000)


def test_the_bounds_of_a_number_fit_where_it_is_kept() -> None:
    """msgspec compares in 64 bits, SQLite keeps as many."""
    assert msgspec.convert(bounds.MAX_COUNT, bounded.Count) < 2**63
