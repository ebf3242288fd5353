"""
Pure: which routes to ask the kernel for, and what its answers mean.

That rules and routes are programmed does not say that they are followed: a rule of other software may come first, a
mark may mean something to it too, a default route may have moved, a reverse path filter may drop. So the kernel is
asked, without a packet, how it would route a packet of a VM that comes in at its bridge with the VM's mark, and how it
would route the answer that comes in where that packet left.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Interface
from typing import Final, NamedTuple

from natctl.model.entries import HostSettings, Path

INTERNET: Final = IPv4Address("198.41.0.4")
"""Stands for the internet: a.root-servers.net has had this address since 1995. Nothing is sent to it."""


class Question(NamedTuple):
    """How is a packet routed that comes in at this interface?"""

    source: IPv4Address
    to: IPv4Address
    interface: int
    """Index of the interface where it comes in."""
    mark: int = 0


class Answer(NamedTuple):
    """Where it goes; with an error number it goes nowhere."""

    interface: int = 0
    gateway: IPv4Address | None = None
    error: int = 0

    @property
    def is_filtered(self) -> bool:
        """Whether the reverse path filter of the interface drops it."""
        return self.error == errno.EXDEV


class Bridge(NamedTuple):
    """A bridge with VMs behind it."""

    name: str
    number: int
    """Its index."""
    guest: IPv4Address
    """An address that a VM could have."""


def guest_address(own: Iterable[IPv4Interface]) -> IPv4Address | None:
    """
    Return an address that a VM behind a bridge could have.

    :param own: The bridge's addresses; without any, its VMs are bridged, not routed, and not our business.
    :return: None when there is none.
    """
    addresses = list(own)
    taken = {address.ip for address in addresses}
    for address in addresses:
        if address.network.prefixlen < 31:
            return next((host for host in address.network.hosts() if host not in taken), None)
    return None


def outwards(bridge: Bridge, mark: int) -> Question:
    """Return the question for a VM's packet to the internet."""
    return Question(bridge.guest, INTERNET, bridge.number, mark)


def inwards(bridge: Bridge, came_in_at: int) -> Question:
    """Return the question for the answer; it carries no mark when it comes in."""
    return Question(INTERNET, bridge.guest, came_in_at)


def outward_problem(
    answer: Answer, bridge: Bridge, settings: HostSettings, path: Path, names: Mapping[int, str]
) -> str:
    """
    Return what is wrong with the way of a VM's packet, with the remedy; an empty string when nothing is.

    :param names: Of all interfaces, by index.
    """
    if answer.is_filtered:
        return _FILTERED_OUTWARDS
    if answer.error:
        return f"go nowhere ({_error(answer)}); see `ip rule`, `ip route` and net.ipv4.conf.{bridge.name}.forwarding"
    name = names.get(answer.interface, "an unknown interface")
    if path.edges and answer.gateway not in path.edges:
        via = f" via {answer.gateway}" if answer.gateway is not None else ""
        return (
            f"leave by {name}{via}, not to an edge; see `ip rule`: other software has a rule before priority "
            f"{settings.rule_priority}, or uses bits of host.mark_mask ({settings.mark_mask:#x})"
        )
    if name not in settings.uplinks:
        return (
            f"leave by {name}, which is not in host.uplinks ({', '.join(sorted(settings.uplinks))}); add it in "
            "natd.toml, or see `ip rule` and `ip route` for what sends them there"
        )
    return ""


def inward_problem(answer: Answer, bridge: Bridge, names: Mapping[int, str], came_in_at: int) -> str:
    """Return what is wrong with the way of the answers, as :func:`outward_problem`."""
    at = names.get(came_in_at, "an unknown interface")
    if answer.is_filtered:
        return (
            f"get no answers: the reverse path filter of {at} drops them; add a default route, or set "
            f"net.ipv4.conf.all.rp_filter and net.ipv4.conf.{at}.rp_filter to 0"
        )
    if answer.error:
        return (
            f"get no answers: what comes in at {at} goes nowhere ({_error(answer)}); see `ip rule`, `ip route` and "
            f"net.ipv4.conf.{at}.forwarding"
        )
    if answer.interface != bridge.number:
        goes = names.get(answer.interface, "an unknown interface")
        return f"get no answers: what comes in at {at} goes to {goes}; see `ip rule` and `ip route`"
    return ""


def _error(answer: Answer) -> str:
    return errno.errorcode.get(answer.error, str(answer.error))


_FILTERED_OUTWARDS: Final = (
    "are dropped by the bridge's reverse path filter; set its net.ipv4.conf.….rp_filter to 2, or "
    "net.ipv4.conf.all.src_valid_mark to 0"
)


def passing_rp_filter(everywhere: int, here: int) -> int | None:
    """
    Return what to write to an interface's ``rp_filter`` so that a packet passes that it drops now.

    The kernel takes the larger of both. Loose (2) still drops what comes from where there is no route to.

    :return: None when this interface's value does not help.
    """
    if max(everywhere, here) == 1:
        return 2
    return 0 if here == 2 and everywhere == 0 else None


def unbridged_problem(taps: Sequence[str]) -> str:
    """Return what is wrong with the packets of a VM whose interfaces were taken out of their bridge."""
    where = f"its interface {taps[0]} is" if len(taps) == 1 else f"its interfaces {', '.join(taps)} are"
    return f"are not translated: {where} on no Linux bridge; `ip link set {taps[0]} master BRIDGE` puts it back"


def sentences(problems: Iterable[tuple[str, str, str]], counts: Mapping[str, int]) -> Iterator[str]:
    """
    Yield a sentence for each problem of each bridge.

    :param problems: Bridge, VM, and problem of each VM that was asked for and has one.
    :param counts: By bridge, how many VMs were asked for.
    """
    grouped: dict[tuple[str, str], list[str]] = {}
    for bridge, vm, problem in problems:
        grouped.setdefault((bridge, problem), []).append(vm)
    for (bridge, problem), vms in grouped.items():
        if len(vms) == counts[bridge]:
            yield f"packets of VMs on {bridge} {problem}"
        else:
            yield f"packets of {len(vms)} VMs on {bridge} ({', '.join(sorted(vms)[:5])}) {problem}"
