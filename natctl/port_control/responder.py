"""
Decides on requests of guests for ports (PCP, NAT-PMP): what is answered, what is dropped, what is mapped. Pure.

Which VM asks is known by its interface. What it asks is believed only about itself: it gets ports that lead to its own
addresses, as many as its wish allows.

- A request is answered when hosts and edges have the mapping, not before.
- A mapping ends when its lifetime does, the guest deletes it, or its VM may no longer ask; natd says so to the manager.
  The manager ends only what a host that it hears has not renewed in time, so neither of them being away ends a mapping.
- A natd that starts finds the mappings that its VMs have. It does not know who asked for them and for how long; the
  manager does know for how long. A new epoch begins, after which clients ask again (RFC 6887 section 8.5), and get the
  mapping that they have.
- The nonce keeps clients of one VM from changing each other's mappings by mistake (section 11.3).

Tested in ``tests/unit/natctl/port_control/test_responder.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Final

from cpm.protocol.model import DomainUUID
from natctl.model.flow import TCP, UDP
from natctl.port_control import nat_pmp, pcp
from natctl.port_control.guest import PATIENCE_S, Bucket, Guest, Mapping, MapRequest, Pending, nonce_of
from natctl.port_control.pcp import Fault, PortSet, Result
from natctl.port_control.values import (
    LEAST_LIFETIME_S,
    MOST_LIFETIME_S,
    RECORDED_LIFETIMES,
    Announce,
    Asked,
    Command,
    FindPeer,
    Key,
    Made,
    Map,
    Reply,
    Unmap,
    Wanted,
)

HOST_BURST: Final = 1000
"""Mappings that all VMs of a host together may begin at once."""
HOST_MAPPINGS_PER_S: Final = 1.0
"""Mappings a second that they may go on to begin. Each is several changes of the ledger, and the manager slows a host
down that causes ten a second for long (``cpm.core.change_rate``): its VMs' ranges would wait behind them."""
_MAPPED_PROTOCOLS: Final = frozenset({TCP, UDP})
_NAT_PMP_RESULTS: Final = {
    Result.NOT_AUTHORIZED: nat_pmp.Result.NOT_AUTHORIZED,
    Result.NETWORK_FAILURE: nat_pmp.Result.NETWORK_FAILURE,
}
"""All others: out of resources."""


class Responder:
    """The requests of all VMs of a host."""

    def __init__(self) -> None:
        self._guests: dict[DomainUUID, Guest] = {}
        self._commands: list[Command] = []
        self._is_connected = False
        self._beginnings: Bucket | None = None
        self.answered = 0
        """Answers, errors included."""
        self.dropped = 0
        """Requests that were not answered: too many, or not to be answered."""

    def take(self) -> list[Command]:
        """Return the commands since the last call, in order."""
        commands, self._commands = self._commands, []
        return commands

    # VMs and the manager

    def on_connected(self, now: float) -> None:
        """There is a session with the manager; what was renewed while there was none is told now."""
        self._is_connected = True
        for guest in self._guests.values():
            for mapping in guest.mappings.values():
                if mapping.expires_at < math.inf:
                    self._record(mapping, int(mapping.expires_at - now) + 1, now)

    def on_disconnected(self, now: float) -> None:
        """There is none: what is mapped stays, and nothing new can be."""
        self._is_connected = False
        for guest in self._guests.values():
            for key in tuple(guest.pending):
                self._fail(guest, key, Result.NETWORK_FAILURE, now)

    def on_vm(
        self, domain: DomainUUID, limit: int, external: IPv4Address | None, made: Iterable[Made], now: float
    ) -> None:
        """
        Follow what the manager says of a VM.

        :param limit: Ports that it may have mapped; 0: it may not ask.
        :param external: Its external address; None: it has no ports now.
        :param made: The mappings that it has.
        """
        there = {each.key: each for each in made}
        if not limit:
            self._guests.pop(domain, None)
            self._commands += map(Unmap, there)
            return
        guest = self._guests.get(domain)
        if guest is None:
            guest = self._guests[domain] = Guest(domain, limit, external, now)
            if there:
                guest.announce(now)
        guest.limit = limit
        if guest.external not in (None, external) and external is not None:
            guest.announce(now)
        guest.external = external if external is not None else guest.external
        self._compare(guest, there, now)

    def _compare(self, guest: Guest, there: dict[Key, Made], now: float) -> None:
        is_lost = False
        for key, mapping in tuple(guest.mappings.items()):
            made = there.get(key)
            if made is None or (made.external, made.external_port) != (
                mapping.made.external,
                mapping.made.external_port,
            ):
                del guest.mappings[key]
                is_lost = True
        if is_lost:
            guest.begin_epoch(now)
        for key, made in there.items():
            if (pending := guest.pending.pop(key, None)) is not None:
                until = pending.begun_at + RECORDED_LIFETIMES * pending.lifetime_s
                mapping = Mapping(made, nonce_of(pending.request), now + pending.lifetime_s, until)
                guest.mappings[key] = mapping
                self._reply_mapped(guest, mapping, pending, now)
            elif key not in guest.mappings:
                guest.mappings[key] = Mapping(made)

    def on_gone(self, domain: DomainUUID) -> None:
        """A VM is gone from this host: its mappings go with it, or stay its own elsewhere, as the manager decides."""
        self._guests.pop(domain, None)

    def on_refused(self, key: Key, result: Result, now: float) -> None:
        """The manager makes no such mapping."""
        if (guest := self._guests.get(key.domain)) is not None and key in guest.pending:
            self._fail(guest, key, result, now)

    def on_tick(self, now: float) -> None:
        """Do what only time makes due."""
        for guest in self._guests.values():
            for key, mapping in tuple(guest.mappings.items()):
                if mapping.expires_at <= now:
                    self._unmap(guest, key)
            for key, pending in tuple(guest.pending.items()):
                if pending.begun_at + PATIENCE_S <= now:
                    # It may have been made meanwhile; nobody knows whether the client still wants it.
                    del guest.pending[key]
                    self._commands.append(Unmap(key))
            if guest.is_announcement_due(now):
                epoch = guest.epoch(now)
                datagrams = [pcp.announcement(epoch)]
                if guest.external is not None:
                    datagrams.append(nat_pmp.address_answer(epoch, guest.external))
                self._commands.append(Announce(guest.domain, tuple(datagrams)))

    # Requests

    def on_asked(self, domain: DomainUUID, asked: Asked, now: float) -> None:
        """A VM sent a datagram to port 5351 of a gateway."""
        guest = self._guests.get(domain)
        if guest is None or not guest.takes_request(now):
            self.dropped += 1
            return
        data = asked.datagram.data
        if data[:1] == bytes((nat_pmp.VERSION,)):
            self._on_nat_pmp(guest, asked, now)
            return
        request = pcp.read(data, asked.datagram.source)
        if request is None:
            self.dropped += 1
        elif isinstance(request, Fault):
            self._reply(guest, asked, pcp.failure(data, request, guest.epoch(now)))
        elif isinstance(request, pcp.AnnounceRequest):
            self._reply(guest, asked, pcp.announcement(guest.epoch(now)))
        elif isinstance(request, pcp.PeerRequest):
            self._on_peer(guest, asked, request, now)
        elif request.lifetime_s:
            self._on_map(guest, asked, request, now)
        else:
            self._on_delete(guest, asked, request, now)

    def _on_nat_pmp(self, guest: Guest, asked: Asked, now: float) -> None:
        data, epoch = asked.datagram.data, guest.epoch(now)
        request = nat_pmp.read(data)
        if request is None:
            self.dropped += 1
        elif isinstance(request, nat_pmp.Result):
            self._reply(guest, asked, nat_pmp.failure(data, request, epoch))
        elif isinstance(request, nat_pmp.AddressRequest):
            if guest.external is None:
                self._reply(guest, asked, nat_pmp.failure(data, nat_pmp.Result.NETWORK_FAILURE, epoch))
            else:
                self._reply(guest, asked, nat_pmp.address_answer(epoch, guest.external))
        elif request.lifetime_s:
            self._on_map(guest, asked, request, now)
        else:
            self._on_nat_pmp_delete(guest, asked, request, now)

    # Mappings

    def _on_map(
        self,
        guest: Guest,
        asked: Asked,
        request: MapRequest,
        now: float,
    ) -> None:
        address = asked.datagram.source
        if request.protocol not in _MAPPED_PROTOCOLS:
            self._refuse(guest, asked, Result.UNSUPP_PROTOCOL, now)
        elif not request.internal_port:
            # All ports: of an address that others use, too.
            self._refuse(guest, asked, Result.NOT_AUTHORIZED, now)
        elif (mapping := guest.find(request.protocol, address, request.internal_port)) is not None:
            self._renew(guest, asked, request, mapping, now)
        elif guest.external is None or not self._is_connected:
            self._refuse(guest, asked, Result.NETWORK_FAILURE, now)
        else:
            self._begin(guest, asked, request, now)

    def _renew(
        self,
        guest: Guest,
        asked: Asked,
        request: MapRequest,
        mapping: Mapping,
        now: float,
    ) -> None:
        made, offset = mapping.made, request.internal_port - mapping.made.key.port
        if isinstance(request, pcp.MapRequest):
            if mapping.nonce not in (None, request.nonce):
                self._refuse(guest, asked, Result.NOT_AUTHORIZED, now, _remaining_s(mapping, now))
                return
            if request.prefers_failure and not _is_suggested(request, made, offset):
                self._refuse(guest, asked, Result.CANNOT_PROVIDE_EXTERNAL, now)
                return
            mapping.nonce = request.nonce
        lifetime_s = _granted_s(request.lifetime_s)
        if mapping.expires_at == math.inf or now + lifetime_s > mapping.recorded_until:
            self._record(mapping, lifetime_s, now)
        is_own = mapping.nonce == nonce_of(request)
        # A client without a nonce does not shorten what another one was promised.
        mapping.expires_at = now + lifetime_s if is_own else max(now + lifetime_s, mapping.expires_at)
        self._reply_mapped(guest, mapping, Pending(request, asked, made.size, lifetime_s, now), now)

    def _record(self, mapping: Mapping, lifetime_s: int, now: float) -> None:
        """Have the manager keep a mapping for long enough, whether or not natd is there then."""
        made, recorded_s = mapping.made, RECORDED_LIFETIMES * lifetime_s
        mapping.recorded_until = now + recorded_s
        self._commands.append(Map(Wanted(made.key, made.size, recorded_s, made.external_port)))

    def _begin(
        self,
        guest: Guest,
        asked: Asked,
        request: MapRequest,
        now: float,
    ) -> None:
        key = Key(guest.domain, request.protocol, asked.datagram.source, request.internal_port)
        if (pending := guest.pending.get(key)) is not None:
            if isinstance(request, nat_pmp.MapRequest) or nonce_of(pending.request) == request.nonce:
                pending.request, pending.asked = request, asked  # sent again
            else:
                self.dropped += 1
            return
        wish = request.port_set if isinstance(request, pcp.MapRequest) else None
        is_exact = isinstance(request, pcp.MapRequest) and request.prefers_failure
        size = wish.size if wish is not None else 1
        got = min(size, guest.free_ports(*key[1:]), guest.room())
        if got < 1:
            self._refuse(guest, asked, Result.USER_EX_QUOTA if guest.room() < 1 else Result.NO_RESOURCES, now)
            return
        external = request.external if isinstance(request, pcp.MapRequest) else None
        if is_exact and (got < size or external not in (None, guest.external)):
            self._refuse(guest, asked, Result.CANNOT_PROVIDE_EXTERNAL, now)
            return
        if self._beginnings is None:
            self._beginnings = Bucket(HOST_BURST, HOST_MAPPINGS_PER_S, now)
        if not guest.takes_mapping(now) or not self._beginnings.take(now):
            self._refuse(guest, asked, Result.NO_RESOURCES, now)
            return
        lifetime_s = _granted_s(request.lifetime_s)
        guest.pending[key] = Pending(request, asked, got, lifetime_s, now)
        keeps_parity = wish is not None and wish.keeps_parity
        recorded_s = RECORDED_LIFETIMES * lifetime_s
        self._commands.append(Map(Wanted(key, got, recorded_s, request.external_port, is_exact, keeps_parity)))

    def _on_delete(self, guest: Guest, asked: Asked, request: pcp.MapRequest, now: float) -> None:
        if others := self._delete(guest, asked, request):
            lasting_s = max(_remaining_s(mapping, now) for mapping in others)
            self._refuse(guest, asked, Result.NOT_AUTHORIZED, now, lasting_s)
            return
        # What is not there is deleted, too (section 15.1).
        external = request.external if request.external is not None else IPv4Address(0)
        done = pcp.answer(asked.datagram.data, 0, guest.epoch(now), external, request.external_port)
        self._reply(guest, asked, done + pcp.options_of(request, request.port_set))

    def _on_nat_pmp_delete(self, guest: Guest, asked: Asked, request: nat_pmp.MapRequest, now: float) -> None:
        if self._delete(guest, asked, request):
            self._refuse(guest, asked, Result.NOT_AUTHORIZED, now)
        else:
            self._reply(guest, asked, nat_pmp.map_answer(asked.datagram.data, guest.epoch(now), 0, 0))

    def _delete(self, guest: Guest, asked: Asked, request: MapRequest) -> list[Mapping]:
        """Delete what a client asks to have deleted; return what it may not delete, which is another client's."""
        wanted, nonce = (request.protocol, asked.datagram.source, request.internal_port), nonce_of(request)
        for key in guest.pending_of(*wanted, nonce):
            del guest.pending[key]
            self._commands.append(Unmap(key))
        others = []
        for mapping in guest.chosen(*wanted):
            if mapping.nonce in (None, nonce):
                self._unmap(guest, mapping.made.key)
            else:
                others.append(mapping)
        return others

    def _unmap(self, guest: Guest, key: Key) -> None:
        del guest.mappings[key]
        self._commands.append(Unmap(key))

    # Peers

    def _on_peer(self, guest: Guest, asked: Asked, request: pcp.PeerRequest, now: float) -> None:
        if request.protocol not in _MAPPED_PROTOCOLS:
            self._refuse(guest, asked, Result.UNSUPP_PROTOCOL, now)
        elif guest.external is None:
            self._refuse(guest, asked, Result.NETWORK_FAILURE, now)
        else:
            self._commands.append(FindPeer(guest.domain, asked, request))

    def on_peer_found(self, find: FindPeer, found: tuple[IPv4Address, int, int] | None, now: float) -> None:
        """
        Answer about a connection to one peer.

        :param found: The external address and port of the connection, and the seconds until it ends if no more packet
            comes; None: there is no such connection.
        """
        guest, request = self._guests.get(find.domain), find.request
        if guest is None:
            return
        if found is None:
            # It is mapped when the guest sends its first packet, which may be soon.
            self._refuse(guest, find.asked, Result.NO_RESOURCES, now)
            return
        external, port, lasting_s = found
        if request.external_port not in (0, port) or request.external not in (None, external):
            self._refuse(guest, find.asked, Result.CANNOT_PROVIDE_EXTERNAL, now)
            return
        data = find.asked.datagram.data
        self._reply(guest, find.asked, pcp.answer(data, lasting_s, guest.epoch(now), external, port))

    # Answers

    def _reply_mapped(self, guest: Guest, mapping: Mapping, pending: Pending, now: float) -> None:
        made, request, data = mapping.made, pending.request, pending.asked.datagram.data
        port = made.external_port + request.internal_port - made.key.port
        if isinstance(request, nat_pmp.MapRequest):
            # It may live longer, but no longer than asked for is offered (RFC 6886 section 3.3).
            lifetime_s = min(request.lifetime_s, pending.lifetime_s)
            done = nat_pmp.map_answer(data, guest.epoch(now), port, lifetime_s)
        else:
            done = pcp.answer(data, pending.lifetime_s, guest.epoch(now), made.external, port)
            wish = request.port_set
            port_set = PortSet(made.size, made.key.port, wish.keeps_parity) if wish is not None else None
            done += pcp.options_of(request, port_set)
        self._reply(guest, pending.asked, done)

    def _fail(self, guest: Guest, key: Key, result: Result, now: float) -> None:
        self._refuse(guest, guest.pending.pop(key).asked, result, now)

    def _refuse(
        self,
        guest: Guest,
        asked: Asked,
        result: Result,
        now: float,
        lasting_s: int | None = None,
    ) -> None:
        data, epoch = asked.datagram.data, guest.epoch(now)
        if data[0] == nat_pmp.VERSION:
            other = _NAT_PMP_RESULTS.get(result, nat_pmp.Result.OUT_OF_RESOURCES)
            self._reply(guest, asked, nat_pmp.failure(data, other, epoch))
        else:
            self._reply(guest, asked, pcp.failure(data, Fault(result, is_parsed=True), epoch, lasting_s))

    def _reply(self, guest: Guest, asked: Asked, data: bytes) -> None:
        self.answered += 1
        self._commands.append(Reply(guest.domain, asked, data))


def _granted_s(wished_s: int) -> int:
    return min(max(wished_s, LEAST_LIFETIME_S), MOST_LIFETIME_S)


def _remaining_s(mapping: Mapping, now: float) -> int:
    return max(1, int(mapping.expires_at - now))


def _is_suggested(request: pcp.MapRequest, made: Made, offset: int) -> bool:
    port = made.external_port + offset
    return request.external_port in (0, port) and request.external in (None, made.external)
