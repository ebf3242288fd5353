"""
The syntax of wishes about one VM, in the domain's XML and on the command line of ``virt-ports set``. Pure.

:mod:`cpm.core.wishes` decides which wishes take effect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from ipaddress import AddressValueError, IPv4Address
from typing import Any, Final

from cpm.protocol.bounds import (
    FIRST_PORT,
    LAST_PORT,
    MAX_FEW,
    MAX_FORWARDS,
    MAX_SECONDS,
    MAX_WISHED,
    short,
    whole_number,
)
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import UNLIMITED, Filtering, ForwardProtocol, PortRange, WishedForward, Wishes

MAXIMUM_PORTS: Final = LAST_PORT - FIRST_PORT + 1
MAXIMUM_WEIGHT: Final = 10_000
"""Large enough to differentiate VMs, and small enough that no VM's share rounds to nothing."""

MAPPED_PORTS: Final = 32
"""Ports that a guest may have mapped for it where the wish only says that it may ask."""
_SWITCH: Final = {"on": MAPPED_PORTS, "off": 0}

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
    "pcp": "pcp",
    "pool": "pool",
    "address": "address",
}
"""Name of each wish as people write it (XML attribute, key of ``virt-ports set``), and its field of :class:`Wishes`."""


def parse(raw: Mapping[str, str], forwards: Iterable[Mapping[str, str]] = ()) -> Wishes:
    """
    Parse wishes; what cannot be parsed becomes a sentence in :attr:`Wishes.nonsense`.

    :param raw: Text of each wish, by the names in :data:`KEYS`.
    :param forwards: Text of what each forward shall be, by the names in :data:`FORWARD_KEYS`.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for key, text in raw.items():
        if key not in KEYS:
            problems.append(f"there is no setting {short(key)}; use {', '.join(KEYS)}")
            continue
        try:
            values[KEYS[key]] = _PARSERS[key](text.strip())
        except ValueError as error:
            problems.append(f"{key} {short(text)}: {error}")
    found: list[WishedForward] = []
    for each in forwards:
        try:
            found.append(_forward(each))
        except ValueError as error:
            problems.append(f"forward {short(' '.join(f'{key}={text}' for key, text in each.items()))}: {error}")
    most = MAX_FEW - 1
    if len(problems) > most:
        problems[most:] = [f"and {len(problems) - most} more"]
    return Wishes(**values, forwards=tuple(found[:MAX_FORWARDS]), nonsense=tuple(problems))


FORWARD_KEYS: Final = ("port", "to", "protocol", "address", "guest", "keep")
"""What an element ``<forward>`` may say: external port, the guest's port, protocol, external address, the guest's
address, and whether it stays the VM's while the VM does not run."""


def _forward(raw: Mapping[str, str]) -> WishedForward:
    """:raise ValueError: When it makes no sense; the message says why."""
    for key in raw:
        if key not in FORWARD_KEYS:
            raise ValueError(f"there is no attribute {short(key)}; use {', '.join(FORWARD_KEYS)}")
    ports = PortRange.parse(raw["port"]) if "port" in raw else None
    to = PortRange.parse(raw["to"]) if "to" in raw else ports
    if to is None:
        raise ValueError("it has neither port nor to; name one of them")
    if ports is not None and ports.size != to.size:
        raise ValueError(f"port has {ports.size} ports and to has {to.size}; use ranges of one length")
    protocol, keep = raw.get("protocol", "tcp"), raw.get("keep", "yes")
    if protocol not in list(ForwardProtocol) or keep not in ("yes", "no"):
        raise ValueError("use protocol tcp, udp or both, and keep yes or no")
    address, guest = (_address(raw[key]) if key in raw else None for key in ("address", "guest"))
    return WishedForward(
        ports=ports, to=to, protocol=ForwardProtocol(protocol), address=address, guest=guest, is_kept=keep == "yes"
    )


def _address(text: str) -> IPv4Address:
    try:
        return IPv4Address(text.strip())
    except AddressValueError:
        raise ValueError(f"not an IPv4 address: {short(text)}; write it like 203.0.113.1") from None


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
        raise ValueError(f"use a whole number, at most {MAX_WISHED}")
    return number


def _mapped_ports(text: str) -> int:
    if (number := _SWITCH.get(text, whole_number(text, MAX_WISHED))) is None:
        raise ValueError("use on, off, or a number of ports")
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
        raise ValueError("it is not the name of a policy; `virt-ports set --help` lists them")
    return text


_POOL_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,62}", re.ASCII)


def pool_name(text: str) -> str:
    """
    Return the name of a pool: it is part of commands that operators copy to a shell, and no address looks like one.

    :raise ValueError: When it is none.
    """
    if not _POOL_NAME.fullmatch(text):
        raise ValueError("use a letter, then letters, digits, dots, dashes and underscores, at most 63")
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
    "pcp": _mapped_ports,
    "pool": pool_name,
    "address": _address,
}
