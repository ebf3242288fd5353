"""
Guests that ask for ports (PCP, NAT-PMP), between this node's other parts and :mod:`natctl.port_control`. Pure.

What the manager makes of a request is a forward in its intent, like any other. A request is answered when the kernel of
this host holds that; then the edges hold it, too.

Tested in ``tests/unit/site/test_port_mappings.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import MapPorts, MapRefusal, MapRefused, NodeMessage, UnmapPorts
from cpm.protocol.model import DomainUUID, ForwardProtocol, PortRange
from natctl.core.domains import Domains
from natctl.core.intent import Intent
from natctl.core.programming import Programming
from natctl.model.flow import TCP, UDP, Flow
from natctl.port_control.pcp import Result
from natctl.port_control.responder import Responder
from natctl.port_control.values import Announce, Asked, FindPeer, Key, Made, Map, Reply, Unmap

_PROTOCOLS: Final = {TCP: ForwardProtocol.TCP, UDP: ForwardProtocol.UDP}
_NUMBERS: Final = {protocol: number for number, protocol in _PROTOCOLS.items()}
_RESULTS: Final = {
    MapRefusal.TAKEN: Result.CANNOT_PROVIDE_EXTERNAL,
    MapRefusal.QUOTA: Result.USER_EX_QUOTA,
    MapRefusal.SHORT: Result.NO_RESOURCES,
}


class PortControl:
    """
    Requests of guests. Methods named ``on_…`` are its inputs, as those of the node; :meth:`take` returns what to send.

    :param intent: What each VM of this host shall have.
    :param programming: What the kernel holds, and which VM has which mark.
    :param domains: The VMs' interfaces.
    :param send: Sends the manager a message.
    """

    def __init__(
        self, intent: Intent, programming: Programming, domains: Domains, send: Callable[[NodeMessage], None]
    ) -> None:
        self._intent = intent
        self._programming = programming
        self._domains = domains
        self._send = send
        self._responder = Responder()
        self._commands: list[Reply | Announce | FindPeer] = []
        self._known: set[DomainUUID] = set()
        self._now = 0.0

    @property
    def dropped(self) -> int:
        """Requests that were not answered: too many, or not to be answered."""
        return self._responder.dropped

    @property
    def answered(self) -> int:
        """Requests that were answered, with an error perhaps."""
        return self._responder.answered

    def take(self) -> list[Reply | Announce | FindPeer]:
        """Return what to send to guests, and what to find out for them, since the last call, in order."""
        commands, self._commands = self._commands, []
        return commands

    def taps_of(self, domain: DomainUUID) -> frozenset[int]:
        """Return the indexes of a VM's interfaces."""
        return self._domains.taps_of(domain)

    # Inputs

    def on_asked(self, index: int, asked: Asked, now: float) -> None:
        """
        A VM sent a datagram to port 5351 of a gateway.

        :param index: Of the VM, as its mark has it.
        """
        self._now = now
        if (domain := self._programming.indexes.owners.get(index)) is not None:
            self._responder.on_asked(domain, asked, now)
            self._carry_on()

    def on_peer_found(self, find: FindPeer, port: int | None, lasting_s: int, now: float) -> None:
        """
        The connection to a peer was found.

        :param port: Its port in the VM's range; None: there is no such connection.
        :param lasting_s: Seconds until it ends if no more packet comes.
        """
        self._now = now
        vm, found = self._intent.host.get(find.domain), None
        if (
            vm is not None
            and vm.external is not None
            and vm.ports is not None
            and port is not None
            and port in vm.ports
        ):
            found = vm.external, port, lasting_s
        self._responder.on_peer_found(find, found, now)
        self._carry_on()

    def flow_of(self, find: FindPeer) -> Flow | None:
        """Return the connection that is looked for; None: its VM is gone."""
        index, request = self._programming.indexes.get(find.domain), find.request
        if index is None:
            return None
        numbers = (request.internal_port, request.peer_port)
        return Flow(index, request.protocol, find.asked.datagram.source, request.peer, numbers)

    def on_programmed(self, uuids: Collection[DomainUUID] | None) -> None:
        """
        The kernel holds what it should of these VMs of this host.

        :param uuids: None: of all.
        """
        for uuid in uuids if uuids is not None else {*self._intent.host, *self._known}:
            self._follow(uuid)
        self._carry_on()

    def on_refused(self, refused: MapRefused, now: float) -> None:
        """The manager makes no such mapping."""
        self._now = now
        key = Key(refused.domain, _NUMBERS.get(refused.protocol, 0), refused.guest, refused.to)
        self._responder.on_refused(key, _RESULTS[refused.why], now)
        self._carry_on()

    def on_connected(self, now: float) -> None:
        """There is a session with the manager."""
        self._now = now
        self._responder.on_connected(now)
        self._carry_on()

    def on_disconnected(self, now: float) -> None:
        """There is none."""
        self._now = now
        self._responder.on_disconnected(now)
        self._carry_on()

    def on_tick(self, now: float) -> None:
        """Do what only time makes due."""
        self._now = now
        self._responder.on_tick(now)
        self._carry_on()

    # Inside

    def _follow(self, uuid: DomainUUID) -> None:
        vm = self._intent.host.get(uuid)
        if vm is None:
            if uuid in self._known:
                self._known.discard(uuid)
                self._responder.on_gone(uuid)
            return
        made = tuple(_made(vm, self._programming.let_in(uuid)))
        if vm.port_control or made or uuid in self._known:
            self._known.add(uuid)
            external = vm.external if vm.ports is not None else None
            self._responder.on_vm(uuid, vm.port_control, external, made, self._now)

    def _carry_on(self) -> None:
        for command in self._responder.take():
            if isinstance(command, Map):
                key, wanted = command.wanted.key, command.wanted
                self._send(
                    MapPorts(
                        key.domain,
                        key.address,
                        PortRange(key.port, key.port + wanted.size - 1),
                        _PROTOCOLS[key.protocol],
                        wanted.lifetime_s,
                        wanted.external_port,
                        wanted.is_exact,
                        wanted.keeps_parity,
                    )
                )
            elif isinstance(command, Unmap):
                key = command.key
                self._send(UnmapPorts(key.domain, key.address, key.port, _PROTOCOLS[key.protocol]))
            else:
                self._commands.append(command)


def _made(vm: HostIntent, let_in: Iterable[PortRange]) -> Iterator[Made]:
    """Yield what a guest has asked for and the kernel holds."""
    held = set(let_in)
    for forward in vm.forwards:
        if forward.external is not None and forward.guest is not None and forward.ports in held:
            for number in forward.protocol.numbers:
                key = Key(vm.domain, number, forward.guest, forward.to)
                yield Made(key, forward.ports.size, forward.external, forward.ports.first)
