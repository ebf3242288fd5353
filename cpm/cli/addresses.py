"""
Parses external addresses: ``203.0.113.1``, ``203.0.113.1-203.0.113.4``, ``203.0.113.0/29``.

Addresses that can never be external are refused before a request is sent.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import AddressValueError, IPv4Address, IPv4Network, NetmaskValueError

from cpm.protocol.model import PortRange, coalesce

MOST_AT_ONCE = 1024
"""Addresses; more in one command is more likely a wrong prefix length than intended."""

_HOWTO = "write 203.0.113.1, 203.0.113.1-203.0.113.4 or 203.0.113.0/29"

_NEVER_EXTERNAL = (
    (IPv4Network("0.0.0.0/8"), "means this host"),
    (IPv4Network("127.0.0.0/8"), "is loopback"),
    (IPv4Network("169.254.0.0/16"), "is link-local"),
    (IPv4Network("224.0.0.0/4"), "is multicast"),
    (IPv4Network("240.0.0.0/4"), "is reserved"),
)
"""Source: IANA IPv4 Special-Purpose Address Registry (RFC 6890). Private ones are allowed, for NAT behind NAT."""


def parse(words: Iterable[str]) -> tuple[IPv4Address, ...]:
    """
    Return the addresses in the order given, each once; of a network all, first and last included.

    :raise ValueError: When a word is no address, range or network, when an address cannot be external, or when there
        are more than :data:`MOST_AT_ONCE`. The message ends in a remedy.
    """
    found: dict[IPv4Address, None] = {}
    for word in words:
        first, last = _ends(word.strip())
        if int(last) - int(first) >= MOST_AT_ONCE - len(found):
            raise ValueError(f"{word}: more than {MOST_AT_ONCE} addresses at once; check it, or add them in parts")
        _check_usable(first, last)
        found.update(dict.fromkeys(IPv4Address(number) for number in range(int(first), int(last) + 1)))
    return tuple(found)


def parse_one(word: str) -> IPv4Address:
    """
    Return one address.

    :raise ValueError: When the word is none. The message ends in a remedy.
    """
    try:
        return IPv4Address(word)
    except AddressValueError:
        raise ValueError(f"not an IPv4 address: {word!r}; write 203.0.113.1") from None


def parse_reserved(text: str) -> tuple[PortRange, ...]:
    """
    Return the port ranges of ``5060,8000-8100``: in order, adjacent ones joined; no ports for ``none``.

    :raise ValueError: When a part is neither a port nor a range. The message ends in a remedy.
    """
    if text.strip() == "none":
        return ()
    parts = [part for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError("no ports given; write ports and ranges with commas, for example 5060,8000-8100, or none")
    return coalesce(map(PortRange.parse, parts))


def _ends(word: str) -> tuple[IPv4Address, IPv4Address]:
    if ":" in word:
        raise ValueError(f"not an IPv4 address: {word!r}; only IPv4 addresses are shared, {_HOWTO}")
    try:
        if "/" in word:
            return _network(word)
        first, dash, last = word.partition("-")
        ends = IPv4Address(first.strip()), IPv4Address((last if dash else first).strip())
    except (AddressValueError, NetmaskValueError):
        raise ValueError(f"not an IPv4 address, range or network: {word!r}; {_HOWTO}") from None
    if ends[0] > ends[1]:
        raise ValueError(f"{word}: the first address is above the last; write {ends[1]}-{ends[0]}")
    return ends


def _network(word: str) -> tuple[IPv4Address, IPv4Address]:
    network = IPv4Network(word, strict=False)
    if network.network_address != IPv4Address(word.partition("/")[0]):
        raise ValueError(f"{word} is an address within a network; write {network} for all of it, or the address alone")
    return network[0], network[-1]


def _check_usable(first: IPv4Address, last: IPv4Address) -> None:
    for network, why in _NEVER_EXTERNAL:
        if first <= network[-1] and network[0] <= last:
            raise ValueError(f"{max(first, network[0])} {why} and can be no external address; {_HOWTO}")
