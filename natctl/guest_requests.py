"""
Receives what guests ask of gateways (PCP, NAT-PMP), and sends the answers; nothing here decides.

The kernel says by the packet's mark which VM asks (chain ``asks`` of :mod:`natctl.ruleset.host`), and an answer leaves
by an interface of that VM: what an address or a hardware address in the packet says can deceive its own VM only.

Tested in ``tests/netns/test_port_control.py``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from ipaddress import IPv4Address, IPv4Interface
from typing import Final, Protocol

from cpm.protocol.errors import KernelError
from cpm.protocol.model import DomainUUID
from cpm.service import clock
from natctl.kernel.frame_sender import FrameSender
from natctl.model.flow import Flow
from natctl.netlink.conntrack import Conntrack
from natctl.netlink.networks import is_of_network
from natctl.netlink.nflog import AskedPacket, watch_asked
from natctl.port_control import datagrams
from natctl.port_control.datagrams import Frame
from natctl.port_control.values import Announce, Asked, FindPeer, Reply
from natctl.ruleset.marks import Marks

log = logging.getLogger(__name__)

LISTEN_AGAIN_S: Final = 15.0
"""Seconds between two attempts to open our NFLOG group, if another process has it."""
NETWORKS_S: Final = 5.0
"""Seconds between two looks at this machine's addresses."""
_NO_BROADCAST: Final = 31
"""Networks of this prefix and longer have neither a network's nor a broadcast address (RFC 3021)."""
MOST_PEERS: Final = 64
"""Questions for connections to peers that may wait at once."""


class Decides(Protocol):
    """What answers."""

    def on_asked(self, index: int, asked: Asked, now: float) -> None:
        """A VM, named by the index in its mark, sent a datagram to port 5351 of a gateway."""

    def on_peer_found(self, find: FindPeer, port: int | None, lasting_s: int, now: float) -> None:
        """The connection to a peer was found."""

    def flow_of(self, find: FindPeer) -> Flow | None:
        """Return the connection that is looked for; None: its VM is gone."""

    def taps_of(self, domain: DomainUUID) -> frozenset[int]:
        """Return the indexes of a VM's interfaces."""


class GuestRequests:
    """
    The loop that receives; the owner runs it.

    :param decides: Gets all requests.
    :param carry_out: Called after each batch, to carry out what was decided.
    :param marks: Finds the VM in a packet's mark.
    :param on_error: Told of each request that the kernel refused.
    """

    def __init__(
        self,
        decides: Decides,
        carry_out: Callable[[], None],
        marks: Marks,
        on_error: Callable[[KernelError], None] = lambda _: None,
    ) -> None:
        self._decides = decides
        self._carry_out = carry_out
        self._marks = marks
        self._on_error = on_error
        self._sender: FrameSender | None = None
        self._networks: dict[int, list[IPv4Interface]] = {}
        self._networks_at = -NETWORKS_S
        self._peers: asyncio.Queue[FindPeer] = asyncio.Queue(MOST_PEERS)

    async def watch(self, group: int) -> None:
        """
        Receive requests without end; without this loop guests get no answers.

        :param group: NFLOG group.
        """
        while True:
            try:
                with contextlib.closing(FrameSender()) as self._sender:
                    async with contextlib.aclosing(watch_asked(group)) as batches:
                        async for packets in batches:
                            for packet in packets:
                                self._take(packet)
                            self._carry_out()
            except KernelError as error:
                self._on_error(error)
                log.warning("%s; guests that ask for ports (PCP, NAT-PMP) get no answer", error)
            finally:
                self._sender = None
            await asyncio.sleep(LISTEN_AGAIN_S)

    def _take(self, packet: AskedPacket) -> None:
        datagram, frame = datagrams.read(packet.packet), Frame(packet.frame[:6], packet.frame[6:12])
        if datagram is not None and frame.is_answerable and self._is_guest(datagram.source, packet.interface):
            asked = Asked(datagram, frame, packet.interface, packet.port)
            self._decides.on_asked(self._marks.index_in(packet.mark), asked, clock.now())

    def _is_guest(self, address: IPv4Address, interface: int) -> bool:
        """
        Whether an address is of a network of the interface that a request came by, and not this machine's own.

        What is mapped leads there. A guest can claim any source: nothing must be let in to what is no guest.
        """
        assert self._sender is not None
        if clock.now() - self._networks_at >= NETWORKS_S:
            self._networks, self._networks_at = self._sender.own_networks(), clock.now()
        own = self._networks.get(interface, ())
        ends = {each.network[number] for each in own for number in (0, -1) if each.network.prefixlen < _NO_BROADCAST}
        return is_of_network(address, interface, self._networks) and address not in ends

    async def serve_peers(self, conntrack: Conntrack) -> None:
        """Find connections to peers, without end, one after the other."""
        while True:
            find = await self._peers.get()
            flow, found = self._decides.flow_of(find), None
            try:
                found = await conntrack.find_translation(flow) if flow is not None else None
            except KernelError as error:
                self._on_error(error)
                log.warning("%s", error)
            port, lasting_s = (found.port, found.lasting_s) if found is not None else (None, 0)
            self._decides.on_peer_found(find, port, lasting_s, clock.now())
            self._carry_out()

    def send(self, commands: Iterable[Reply | Announce | FindPeer]) -> None:
        """Send answers and announcements; those to a VM that has no interface now are lost."""
        kept = []
        for command in commands:
            if not isinstance(command, FindPeer):
                kept.append(command)
            elif not self._peers.full():  # else the client asks again
                self._peers.put_nowait(command)
        self._send(kept)

    def _send(self, commands: Sequence[Reply | Announce]) -> None:
        sender = self._sender
        if sender is None:
            return
        try:
            for command in commands:
                taps = self._decides.taps_of(command.domain)
                if isinstance(command, Reply):
                    self._reply(sender, taps, command)
                else:
                    self._announce(sender, taps, command)
        except KernelError as error:
            self._on_error(error)
            log.warning("%s", error)

    def _reply(self, sender: FrameSender, taps: frozenset[int], reply: Reply) -> None:
        asked = reply.asked
        frame = datagrams.answer_frame(asked.datagram, asked.frame, reply.data)
        ways: Collection[int] = {asked.port} & taps or sender.on_bridge(taps, asked.bridge)
        for tap in ways:
            sender.send(tap, frame)

    def _announce(self, sender: FrameSender, taps: frozenset[int], announce: Announce) -> None:
        for tap, gateway in sender.gateways(taps).items():
            for data in announce.datagrams:
                sender.send(tap, datagrams.announcement_frame(gateway.hardware, gateway.address, data))
