"""
Pure: filters of other software that may drop what is forwarded, and the lines that have them let our packets through.

A packet passes only if every chain at the forward hook accepts it, so a chain whose policy is drop (Docker's FORWARD,
the forward chain of a firewall) drops VMs' packets unless one of its rules accepts them. Reading rules does not tell
that for certain; a connection that began does, since VMs' connections are counted after that hook. What is only
bridged, from one VM to another, passes a hook of the bridge family and is not our business.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Final, NamedTuple

LEGACY: Final = "legacy"
"""In place of a family: rules of ``iptables-legacy``, which nftables does not show."""

Way = tuple[str, str]
"""The interface where packets come in, and the one where they go out; an empty string: any."""


class ForwardFilter(NamedTuple):
    """A chain at the forward hook with policy drop."""

    family: str
    """``ip``, ``inet`` or :data:`LEGACY`."""
    table: str
    chain: str

    def __str__(self) -> str:
        return f"{self.family} {self.table} {self.chain}"


def ways_of_host(bridges: Iterable[str]) -> tuple[Way, ...]:
    """Return the ways through a host with VMs on these bridges."""
    return tuple(way for bridge in sorted(bridges) for way in ((bridge, ""), ("", bridge)))


def ways_of_edge(underlay: Collection[str], uplinks: Collection[str]) -> tuple[Way, ...]:
    """Return the ways through an edge."""
    return tuple(
        way for inside in sorted(underlay) for outside in sorted(uplinks)
        for way in ((inside, outside), (outside, inside))
    )  # fmt: skip


def sentence(found: ForwardFilter, ways: Collection[Way], *, has_docker: bool) -> str:
    """
    Return a sentence for the operator, with the commands.

    :param ways: Those that packets of VMs take; at least one.
    :param has_docker: Whether there is Docker's chain for rules of the operator.
    """
    lines = ", ".join(f"`{line}`" for line in _lines(found, ways, has_docker=has_docker))
    if found.family == LEGACY:
        return (
            "iptables-legacy is in use, and what it drops cannot be seen from here; unless it accepts packets of VMs "
            f"(`iptables-legacy -S FORWARD`), use {lines}"
        )
    return f"chain {found} drops what it does not accept (policy drop); unless it accepts packets of VMs, use {lines}"


def _lines(found: ForwardFilter, ways: Collection[Way], *, has_docker: bool) -> Iterator[str]:
    for inside, outside in ways:
        if found.family == LEGACY or (found.family, found.table, found.chain) == ("ip", "filter", "FORWARD"):
            command = "iptables-legacy" if found.family == LEGACY else "iptables"
            chain = "DOCKER-USER" if has_docker and found.family != LEGACY else "FORWARD"
            matches = (f"-i {inside} " if inside else "") + (f"-o {outside} " if outside else "")
            yield f"{command} -I {chain} {matches}-j ACCEPT"
        else:
            matches = (f'iifname "{inside}" ' if inside else "") + (f'oifname "{outside}" ' if outside else "")
            yield f"nft insert rule {found} {matches}accept"
