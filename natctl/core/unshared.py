"""
The ports that the next UDP sockets of a VM with endpoint-independent filtering get: pure.

Source NAT in the kernel may give two sockets of a VM one port to different destinations, and only one of them can be
reached by it. So the kernel is offered ports that no connection has, and gives them out one after the other
(:mod:`natctl.ruleset.mappings`). They are offered anew when some have been taken; those of the former offer come last,
since they may have been taken since the ports were counted.

Tested in ``tests/unit/natctl/core/test_unshared.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Final

from cpm.protocol.intent import HostIntent
from cpm.protocol.model import DomainUUID, Filtering
from natctl.model.entries import MOST_OFFERED
from natctl.model.flow import UDP
from natctl.model.port_use import PortUse, VMPorts

_MOST_LOOKED_AT: Final = 2048
"""Ports of a range from which an offer is chosen: large enough, and quickly looked through."""


class Unshared:
    """What is offered, by VM."""

    def __init__(self) -> None:
        self._offered: dict[DomainUUID, tuple[int, ...]] = {}
        self._round = 0

    def of(self, vm: HostIntent) -> tuple[int, ...]:
        """Return the ports that are offered to a VM; those that it does not have any more are left out."""
        return tuple(port for port in self._offered.get(vm.domain, ()) if vm.ports is not None and port in vm.ports)

    def on_port_use(self, use: PortUse, vms: Iterable[HostIntent]) -> list[DomainUUID]:
        """
        Take a reading of the ports in use.

        :param vms: All VMs of this host.
        :return: The VMs that are offered other ports now.
        """
        self._round += 1
        full_cone = (vm for vm in vms if vm.filtering is Filtering.ENDPOINT_INDEPENDENT)
        wanted = {vm.domain: vm for vm in full_cone if vm.ports is not None}
        self._offered = {domain: ports for domain, ports in self._offered.items() if domain in wanted}
        changed = []
        for domain, vm in wanted.items():
            taken = _taken(use.of(vm.internal))
            before = self.of(vm)
            if before and taken.isdisjoint(before):
                continue
            if (offer := self._choose(vm, taken, before)) != before:
                self._offered[domain] = offer
                changed.append(domain)
        return changed

    def _choose(self, vm: HostIntent, taken: frozenset[int], before: Sequence[int]) -> tuple[int, ...]:
        assert vm.ports is not None
        first, size = vm.ports.first, vm.ports.size
        # Where the search begins, and in which order ports are offered, differs from round to round.
        seed = f"{vm.domain} {self._round} ".encode()
        start = int.from_bytes(hashlib.blake2b(seed, digest_size=8).digest(), "big") % size
        looked_at = (first + (start + step) % size for step in range(min(size, _MOST_LOOKED_AT)))
        free = sorted(
            (port for port in looked_at if port not in taken),
            key=lambda port: (port in before, hashlib.blake2b(b"%s%d" % (seed, port), digest_size=8).digest()),
        )
        return tuple(free[:MOST_OFFERED])


def _taken(ports: VMPorts) -> frozenset[int]:
    udp = ports.protocols.get(UDP)
    return frozenset(udp.distinct) if udp is not None else frozenset()
