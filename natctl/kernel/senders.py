"""
Which hardware addresses this edge's hosts have, for :mod:`natctl.ruleset.senders`.

Tested by ``tests/netns/test_senders.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Address

from natctl.model.entries import EdgeSettings, SenderCheck
from natctl.netlink.links import read_links
from natctl.netlink.neighbours import Neighbour, read_neighbours, resolve
from natctl.netlink.socket import Socket
from natctl.ruleset import senders
from natctl.ruleset.values import Fragment

Known = Mapping[IPv4Address, frozenset[bytes]]
"""The hardware addresses of each host by its underlay address; none: they are not known."""


class Senders:
    """
    The chains of the hosts, as last programmed.

    A host has one hardware address for each interface of the underlay at which it is a neighbour. Addresses that are no
    Ethernet ones cannot be compared, and count as unknown.
    """

    def __init__(self, settings: EdgeSettings | None) -> None:
        self._settings = settings if settings is not None and settings.checks_senders else None
        self._known: Known = {}
        self._unknown: frozenset[IPv4Address] = frozenset()
        self._warned: frozenset[IPv4Address] = frozenset()

    @property
    def is_checking(self) -> bool:
        """Whether senders are checked at all."""
        return self._settings is not None

    @property
    def known(self) -> Known:
        """The hardware addresses of the hosts, as last programmed."""
        return self._known

    @property
    def has_hosts(self) -> bool:
        """Whether any chain was programmed."""
        return bool(self._known)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Which hosts are checked by the interface only, a sentence; nothing when that is what the operator set."""
        unknown = sorted(self._warned)
        if not unknown or self._settings is None or self._settings.check_senders is not SenderCheck.MAC:
            return ()
        names = ", ".join(map(str, unknown[:5])) + (", …" if len(unknown) > 5 else "")
        sentence = (
            f"the hardware address of {len(unknown)} hosts is not known ({names}): packets of their VMs are taken from "
            "any machine behind the same interface; see `ip neigh`, or set check_senders to interface under [edge] in "
            "natd.toml where hosts are behind a router"
        )
        return (sentence,)

    def note_unknown(self) -> None:
        """Warn, from now on, of the hosts that are unknown now and were at the last call."""
        unknown = frozenset(via for via, known in self._known.items() if not known)
        self._warned, self._unknown = unknown & self._unknown, unknown

    def concerns(self, addresses: Collection[IPv4Address]) -> bool:
        """Say whether a change of these neighbours may matter; none: all may have changed."""
        return self.is_checking and (not addresses or any(address in self._known for address in addresses))

    def read(self, rtnl: Socket, hosts: Collection[IPv4Address]) -> Known:
        """
        Return what the neighbour table knows of these hosts; have the kernel ask for those that it does not know.

        :raise KernelError: When it cannot be read.
        """
        if self._settings is None:
            return {}
        if self._settings.check_senders is SenderCheck.INTERFACE or not hosts:
            return dict.fromkeys(hosts, frozenset())
        interfaces = self.interfaces(rtnl)
        found = _known(read_neighbours(rtnl), interfaces, hosts)
        for via in (via for via, known in found.items() if not known):
            for interface in interfaces:
                resolve(rtnl, via, interface)
        return found

    def interfaces(self, rtnl: Socket) -> frozenset[int]:
        """
        Return the indexes of the underlay's interfaces at which hardware addresses can be compared.

        :raise KernelError: When they cannot be read.
        """
        names = self._settings.underlay if self._settings is not None else frozenset[str]()
        return frozenset(link.number for link in read_links(rtnl).values() if link.name in names and link.is_ethernet)

    def news(self, known: Known) -> tuple[list[Fragment], list[Fragment]]:
        """Return the chains of hosts of which something else is known now: as they were, and as they are to be."""
        changed = [via for via, addresses in known.items() if self._known.get(via) != addresses]
        before = [senders.host_fragment(via, self._known[via]) for via in changed if via in self._known]
        return before, [senders.host_fragment(via, known[via]) for via in changed]

    def hosts(self, vias: Iterable[IPv4Address | None]) -> frozenset[IPv4Address]:
        """Return the hosts, those of this machine's own VMs left out, that must have a chain."""
        return frozenset(via for via in vias if via is not None) if self.is_checking else frozenset()

    def missing(self, vias: Iterable[IPv4Address | None]) -> frozenset[IPv4Address]:
        """Return those that have no chain yet."""
        return self.hosts(vias) - self._known.keys()

    def fragments(self) -> list[Fragment]:
        """Return the chains as last programmed."""
        return fragments(self._known)

    def on_programmed(self, known: Known) -> None:
        """These chains are in the kernel now, besides those that were."""
        self._known = {**self._known, **known}

    def replace(self, known: Known) -> None:
        """These chains are in the kernel now, and no others."""
        self._known = dict(known)


def fragments(known: Known) -> list[Fragment]:
    """Return the chains of all these hosts."""
    return [senders.host_fragment(via, addresses) for via, addresses in known.items()]


def _known(table: Iterable[Neighbour], interfaces: frozenset[int], hosts: Collection[IPv4Address]) -> Known:
    found: dict[IPv4Address, set[bytes]] = {via: set() for via in hosts}
    for neighbour in table:
        is_comparable = len(neighbour.hardware) == senders.HARDWARE_BYTES
        if neighbour.address in found and neighbour.interface in interfaces and is_comparable:
            found[neighbour.address].add(neighbour.hardware)
    return {via: frozenset(addresses) for via, addresses in found.items()}
