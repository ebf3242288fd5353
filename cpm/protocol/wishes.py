"""
The syntax of wishes about one VM, in the domain's XML and on the command line of ``virt-ports set``. Pure.

:mod:`cpm.core.wishes` decides which wishes take effect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from cpm.protocol.bounds import FIRST_PORT, LAST_PORT, MAX_SECONDS, MAX_WISHED, short, whole_number
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import UNLIMITED, Filtering, Wishes

MAXIMUM_PORTS: Final = LAST_PORT - FIRST_PORT + 1
MAXIMUM_WEIGHT: Final = 10_000
"""Large enough to differentiate VMs, and small enough that no VM's share rounds to nothing."""

NONE: Final = "none"
"""The text of a drain limit of never."""

KEYS: Final = {
    "floor": "floor",
    "cap": "cap",
    "weight": "weight",
    "policy": "policy",
    "drain-limit": "drain_limit_s",
    "connections": "connections",
    "connection-rate": "connection_rate",
    "filtering": "filtering",
}
"""Name of each wish as people write it (XML attribute, key of ``virt-ports set``), and its field of :class:`Wishes`."""


def parse(raw: Mapping[str, str]) -> Wishes:
    """
    Parse wishes; what cannot be parsed becomes a sentence in :attr:`Wishes.nonsense`.

    :param raw: Text of each wish, by the names in :data:`KEYS`.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, text in raw.items():
        if key not in KEYS:
            problems.append(f"{short(key)} is none of {', '.join(KEYS)}")
            continue
        try:
            values[KEYS[key]] = _PARSERS[key](text.strip())
        except ValueError as error:
            problems.append(f"{key} {short(text)}: {error}")
    return Wishes(**values, nonsense=tuple(problems))


def parse_strictly(raw: Mapping[str, str]) -> Wishes:
    """
    Parse wishes that an operator typed.

    :param raw: As for :func:`parse`.
    :raise InvalidRequest: When one of them cannot be parsed.
    """
    wishes = parse(raw)
    if wishes.nonsense:
        raise InvalidRequest("; ".join(wishes.nonsense))
    return wishes


def _whole_number(text: str) -> int:
    number = whole_number(text, MAX_WISHED)
    if number is None:
        raise ValueError(f"it is not a whole number up to {MAX_WISHED}")
    return number


def _drain_limit(text: str) -> float:
    if text == NONE:
        return UNLIMITED
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_SECONDS:
        raise ValueError(f"use seconds above 0, up to {MAX_SECONDS:g}, or {NONE}")
    return seconds


def _policy_name(text: str) -> str:
    if not text or len(text) > 64 or not text.isprintable():
        raise ValueError("it is not the name of a policy")
    return text


def _filtering(text: str) -> Filtering:
    try:
        return Filtering(text)
    except ValueError:
        raise ValueError(f"use {' or '.join(Filtering)}") from None


_PARSERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "floor": _whole_number,
    "cap": _whole_number,
    "weight": _whole_number,
    "policy": _policy_name,
    "drain-limit": _drain_limit,
    "connections": _whole_number,
    "connection-rate": _whole_number,
    "filtering": _filtering,
}
