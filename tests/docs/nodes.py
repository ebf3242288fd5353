"""
Hosts and edges of a reader's site: real sessions with a real cpmd, and kernels that accept everything at once.

Each has a certain number of VMs, which report once a second that they use some ports.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from ipaddress import IPv4Address
from typing import Final

import msgspec

from cpm.api.session import Session
from cpm.protocol.intent import HostIntent
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Delta,
    Draining,
    GuestState,
    GuestView,
    Hello,
    ManagerMessage,
    Measured,
    Presence,
    Report,
    Snapshot,
    Welcome,
)
from cpm.protocol.model import DomainUUID, NodeName, Role
from cpm.protocol.own_ports import OwnAddresses
from cpm.protocol.walltime import UtcSeconds

SOCKET: Final = "/run/virt-ports/cpmd.sock"
PERIOD_S: Final = 0.5


WEB1: Final = DomainUUID("6695eb01-f6a4-8304-79aa-97f2502e193f")
DB: Final = DomainUUID("0c2b4d5e-1111-4222-8333-444455556666")
WEB2: Final = DomainUUID("3a7d5c1e-2222-4333-8444-999900001111")
GAME1: Final = DomainUUID("21b6f3ac-5d53-4f4e-8c37-777788889999")


class Machine:
    """
    One node, as :class:`cpm.api.session.Listener`.

    :param vms: Those that run on it, with their names; each uses 17 ports and says that by its guest agent, too.
    """

    def __init__(
        self,
        name: str,
        roles: frozenset[Role],
        underlay: str,
        vms: Sequence[tuple[DomainUUID, str]] = (),
        own: OwnAddresses = (),
    ) -> None:
        presences = tuple(Presence(uuid, name) for uuid, name in vms)
        self.hello = Hello(PROTOCOL, NodeName(name), roles, IPv4Address(underlay), "test", 0, presences, own)
        self._session = Session(f"unix://{SOCKET}", self, None, random.Random(1).random)
        self._generation = 0
        self._intents: dict[DomainUUID, HostIntent] = {}
        self._tasks: list[asyncio.Task[None]] = []

    def switch_on(self) -> None:
        """Have it connect as soon as cpmd lets it, and whenever cpmd is back."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._session.run()), asyncio.create_task(self._report())]

    async def switch_off(self) -> None:
        """End it as by a power failure."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            if self._generation and Role.HOST in self.hello.roles:
                vms = tuple(map(self._measured, self._intents.values()))
                self._session.send(Report(self._generation, PERIOD_S, vms))

    @staticmethod
    def _measured(intent: HostIntent) -> Measured:
        guest = GuestView(GuestState.ANSWERING, UtcSeconds(1767607212.0), "", 950, 948, 1, 81234, 40122,
                          intent.external, intent.ports)  # fmt: skip
        draining = tuple(Draining(ports, 0) for ports in intent.draining)
        return Measured(intent.domain, 400.0, 5.0, 17, 2.0, draining, guest)

    def on_connected(self) -> None:
        """Begin as natd does."""
        self._session.send(self.hello)

    def on_message(self, message: ManagerMessage) -> None:
        """Confirm everything."""
        match message:
            case Welcome(epoch=epoch):
                self.hello = msgspec.structs.replace(self.hello, epoch=epoch)
            case Snapshot():
                self._intents = {vm.domain: vm for vm in message.host}
                self._applied(message)
            case Delta():
                self._intents.update((vm.domain, vm) for vm in message.host)
                for uuid in message.host_gone:
                    self._intents.pop(uuid, None)
                self._applied(message)

    def on_disconnected(self, reason: str) -> None:
        """Report nothing until the next snapshot."""
        del reason
        self._generation = 0

    def _applied(self, message: Snapshot | Delta) -> None:
        self._generation = message.generation
        self._session.send(Applied(message.epoch, message.generation))
