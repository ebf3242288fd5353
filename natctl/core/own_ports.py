"""
Which ports of this machine's addresses no VM should get, told from what uses them now. Pure.

Tested in ``tests/unit/natctl/core/test_own_ports.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from ipaddress import IPv4Address
from itertools import pairwise
from typing import Final

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import PortRange, coalesce
from cpm.protocol.own_ports import MOST_ADDRESSES, MOST_RANGES, OwnAddress, OwnRange, OwnUse
from natctl.model.own_ports import LocalSocket, PortsInUse, SocketKind

LASTING_S: Final = 15.0
"""Seconds after which a UDP socket counts as a service: resolvers bind one to a random port for each query."""

Held = Mapping[IPv4Address, Collection[PortRange]]
"""The ports of VMs by external address."""


def held_by(vms: Iterable[EdgeIntent]) -> Held:
    """Return the ports of these VMs."""
    held: dict[IPv4Address, list[PortRange]] = {}
    for vm in vms:
        for each in vm.ranges:
            held.setdefault(each.external, []).append(each.ports)
    return held


class OwnPorts:
    """The ports of this machine as of the last reading."""

    def __init__(self) -> None:
        self.told: tuple[OwnAddress, ...] = ()
        self._since: dict[int, float] = {}

    def on_read(self, read: PortsInUse, held: Held, now: float) -> bool:
        """
        Take a reading.

        A TCP listener counts at once. Of the others, what was the machine's in the reading before stays so, and new are

        - at the first reading of an address: everything on ports that no VM has;
        - later: TCP connections and, when they have lasted, UDP sockets; but not on ports from which the kernel picks,
          and connections not on ports of VMs, since these leave by another (:mod:`natctl.ruleset.own_ports`).

        :param held: Ports of VMs.
        :param now: Seconds.
        :return: Whether :attr:`told` changed.
        """
        self._since = {each.cookie: self._since.get(each.cookie, now) for each in read.sockets}
        addresses = read.interfaces.addresses[:MOST_ADDRESSES]
        told = tuple(self._ports_of(address, read, held.get(address, ()), now) for address in addresses)
        changed, self.told = told != self.told, told
        return changed

    def _ports_of(self, address: IPv4Address, read: PortsInUse, held: Collection[PortRange], now: float) -> OwnAddress:
        before = next((own.ranges for own in self.told if own.address == address), None)
        known = [each.ports for each in before or ()]

        def stays(port: int) -> bool:
            return _is_in(port, known) or (before is None and not _is_in(port, held))

        sockets = [each for each in read.sockets if each.address in (None, address)]
        services = [each for each in sockets if each.kind is not SocketKind.CONNECTED]
        listeners = {each.port for each in services if self._is_service(each, read, now) or stays(each.port)}
        connections = {each.port for each in sockets if each.kind is SocketKind.CONNECTED}
        translated = (*held, *read.interfaces.picked)
        connections = {port for port in connections if stays(port) or not _is_in(port, translated)}
        connections |= {port for own, port in read.translated if own == address and stays(port)}
        ranges = (
            *(OwnRange(ports, OwnUse.EPHEMERAL) for ports in read.interfaces.ephemeral),
            *(OwnRange(ports, OwnUse.LISTENER) for ports in _ranges(listeners)),
            *(OwnRange(ports, OwnUse.CONNECTION) for ports in _ranges(connections - listeners)),
        )
        return OwnAddress(address, _fewer(sorted(ranges, key=lambda each: each.ports)))

    def _is_service(self, each: LocalSocket, read: PortsInUse, now: float) -> bool:
        has_lasted = now >= self._since[each.cookie] + LASTING_S
        return each.kind is SocketKind.LISTENING or (has_lasted and not _is_in(each.port, read.interfaces.picked))


def _is_in(port: int, ranges: Iterable[PortRange]) -> bool:
    return any(port in ports for ports in ranges)


def _ranges(ports: Iterable[int]) -> tuple[PortRange, ...]:
    return coalesce(PortRange(port, port) for port in ports)


def _fewer(ranges: list[OwnRange]) -> tuple[OwnRange, ...]:
    """Close the smallest gaps, so that there are no more ranges than can be told."""
    if len(ranges) <= MOST_RANGES:
        return tuple(ranges)
    gaps = sorted(range(1, len(ranges)), key=lambda place: ranges[place - 1].ports.last - ranges[place].ports.first)
    starts = [0, *sorted(gaps[: MOST_RANGES - 1]), len(ranges)]
    return tuple(
        OwnRange(PortRange(ranges[first].ports.first, ranges[behind - 1].ports.last), ranges[first].use)
        for first, behind in pairwise(starts)
    )
