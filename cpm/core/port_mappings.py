"""
Ports that guests have mapped when they ask (PCP, NAT-PMP): each is a forward with an end (:mod:`cpm.core.forwards`).

A host says what its guests ask. It gets for them what the VM's wish allows, never a port below 1024, and never one that
somebody else has. The host renews what is to stay, and says what is to go; what it does not renew ends
by itself, but not while it is away: its guests may have renewed meanwhile.

Tested in ``tests/unit/site/test_port_mappings.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Final

from cpm.core.changes import PutForward
from cpm.core.fleet import Fleet
from cpm.core.forwards import ForwardRequest, Forwards
from cpm.core.wishes import EffectiveWishes
from cpm.protocol.bounds import FIRST_PORT, LAST_PORT
from cpm.protocol.errors import Conflict, InvalidRequest, PortsExhausted, QuotaReached
from cpm.protocol.ledger_errors import LedgerDoubted, LedgerUnwritable
from cpm.protocol.messages import MapPorts, MapRefusal, MapRefused, UnmapPorts
from cpm.protocol.model import VM, Allocation, DomainUUID, Forward, ForwardOrigin, ForwardProtocol, NodeName, PortRange

AWAY_S: Final = 60.0
"""Seconds that a host has, once it is back, to renew what has come to its end while it was away."""


class PortMappings:
    """
    Gives guests the ports that they ask for.

    :param epoch: Of the manager.
    :param running_on: Returns the host on which a VM runs, or None.
    :param wishes: Returns the wishes in effect for a VM.
    """

    def __init__(
        self,
        epoch: int,
        fleet: Fleet,
        forwards: Forwards,
        running_on: Callable[[DomainUUID], NodeName | None],
        wishes: Callable[[VM], EffectiveWishes],
    ) -> None:
        self._epoch = epoch
        self._fleet = fleet
        self._forwards = forwards
        self._running_on = running_on
        self._wishes = wishes

    def on_map(self, node: NodeName, asked: MapPorts, now: float) -> MapRefused | None:
        """
        Follow a host's message.

        :return: What to answer; None: the host sees by what it is sent, or the message is of a VM that is elsewhere.
        """
        vm = self._fleet.vms.get(asked.domain)
        if vm is None or vm.node != node or self._running_on(vm.uuid) != node:
            return None
        ends = now + asked.lifetime_s
        if (same := self._find(vm, asked)) is not None:
            assert same.forward is not None
            self._forwards.renew(same, max(ends, same.forward.ends or ends))
            return None
        why = self._add(vm, asked, ends, now)
        if why is None:
            return None
        return MapRefused(self._epoch, asked.domain, asked.guest, asked.to.first, asked.protocol, why)

    def on_unmap(self, node: NodeName, asked: UnmapPorts, now: float) -> None:
        """Follow a host's message."""
        vm = self._fleet.vms.get(asked.domain)
        if vm is None or vm.node != node:
            return
        for allocation, forward in self._of(vm):
            if (forward.guest, forward.to) != (asked.guest, asked.to):
                continue
            if forward.protocol is asked.protocol:
                self._forwards.remove(allocation, now)
            elif forward.protocol is ForwardProtocol.BOTH:
                self._fleet.record(PutForward(allocation.id, dataclasses.replace(forward, protocol=_other(asked))))

    def on_session_begin(self, node: NodeName, now: float) -> None:
        """Give a host time to renew what its guests have renewed while it was away."""
        for allocation in [*self._fleet.forwards.values()]:
            forward = allocation.forward
            if forward is not None and _is_asked_for(forward) and allocation.node == node:
                self._forwards.renew(allocation, max(now + AWAY_S, forward.ends or 0.0))

    def _of(self, vm: VM) -> Iterator[tuple[Allocation, Forward]]:
        """Yield what the guest of a VM has mapped."""
        for allocation in self._fleet.forwards_of(vm.uuid):
            if (forward := allocation.forward) is not None and _is_asked_for(forward) and forward.is_wanted:
                yield allocation, forward

    def _find(self, vm: VM, asked: MapPorts) -> Allocation | None:
        """Return the mapping that a guest has of just these ports."""
        for allocation, forward in self._of(vm):
            is_same = (forward.guest, forward.to, allocation.ports.size) == (asked.guest, asked.to.first, asked.to.size)
            if is_same and forward.protocol in (asked.protocol, ForwardProtocol.BOTH):
                return allocation
        return None

    def _add(self, vm: VM, asked: MapPorts, ends: float, now: float) -> MapRefusal | None:
        """Give a guest ports; return why it gets none, None: it does."""
        mapped = [*self._of(vm)]
        companion = next((each for each, forward in mapped if _is_companion(each, forward, asked)), None)
        # The other protocol of a port that it has takes no further one.
        taken = sum(each.ports.size for each, _ in mapped)
        if taken + asked.to.size > self._wishes(vm).pcp.value + (companion.ports.size if companion is not None else 0):
            return MapRefusal.QUOTA
        for ports in self._choices(asked, companion):
            request = ForwardRequest(
                to=asked.to,
                ports=ports,
                protocol=asked.protocol,
                guest=asked.guest,
                is_kept=False,
                origin=ForwardOrigin.PCP,
                ends=ends,
            )
            try:
                self._forwards.add(vm, request, now)
            except QuotaReached:
                return MapRefusal.QUOTA
            except (PortsExhausted, LedgerDoubted, LedgerUnwritable):
                return MapRefusal.SHORT
            except (Conflict, InvalidRequest):
                continue
            return None
        return MapRefusal.TAKEN if asked.is_exact else MapRefusal.SHORT

    def _choices(self, asked: MapPorts, companion: Allocation | None) -> Iterator[PortRange | None]:
        """Yield the external ports to try, in order; None: any."""
        size = asked.to.size
        if FIRST_PORT <= asked.first <= LAST_PORT + 1 - size and _keeps_parity(asked, asked.first):
            yield PortRange(asked.first, asked.first + size - 1)
        if asked.is_exact:
            return
        if companion is not None:
            yield companion.ports
        if not asked.keeps_parity:
            yield None
            return
        # One more than is needed has both parities.
        probe = self._forwards.free_ports(self._fleet.vms[asked.domain], size + 1)
        if probe is not None:
            first = probe.first if _keeps_parity(asked, probe.first) else probe.first + 1
            yield PortRange(first, first + size - 1)


def _is_asked_for(forward: Forward) -> bool:
    return forward.origin is ForwardOrigin.PCP


def _other(asked: UnmapPorts) -> ForwardProtocol:
    return ForwardProtocol.UDP if asked.protocol is ForwardProtocol.TCP else ForwardProtocol.TCP


def _is_companion(allocation: Allocation, forward: Forward, asked: MapPorts) -> bool:
    """Return whether it has the same ports of the guest for the other protocol."""
    has_same = (forward.guest, forward.to, allocation.ports.size) == (asked.guest, asked.to.first, asked.to.size)
    return has_same and forward.protocol is not asked.protocol and _keeps_parity(asked, allocation.ports.first)


def _keeps_parity(asked: MapPorts, first: int) -> bool:
    return not asked.keeps_parity or first % 2 == asked.to.first % 2
