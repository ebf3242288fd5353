"""Writes TOML: the subset that the daemons' configuration files need."""

from __future__ import annotations

import json
from collections.abc import Mapping

Value = str | int | float | bool | list[str]
Table = Mapping[str, Value]
Document = Mapping[str, "Value | Table"]


def dumps(document: Document) -> str:
    """Return the document as TOML: plain values first, then its tables."""
    plain = [f"{key} = {_value(value)}" for key, value in document.items() if not isinstance(value, Mapping)]
    for name, table in document.items():
        if isinstance(table, Mapping):
            plain += ["", f"[{name}]", *(f"{key} = {_value(value)}" for key, value in table.items())]
    return "\n".join(plain) + "\n"


def merge(document: Document, changes: Document) -> Document:
    """Return the document with the values of ``changes`` merged into it, table by table."""
    result = dict(document)
    for key, change in changes.items():
        old = result.get(key)
        result[key] = {**old, **change} if isinstance(old, Mapping) and isinstance(change, Mapping) else change
    return result


def _value(value: Value) -> str:
    # JSON is TOML here, but for characters beyond 16 bits (as they are, no pairs of escapes) and DEL (never as it is).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
