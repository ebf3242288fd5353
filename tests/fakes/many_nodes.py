"""A site as large as a test wants: the real manager, and nodes that confirm at once whatever they are told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address
from types import MappingProxyType

from cpm.core.changes import Change
from cpm.core.journal import LedgerState
from cpm.core.manager import Manager
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Delta,
    Draining,
    Hello,
    ManagerMessage,
    Measured,
    Presence,
    Present,
    Report,
    Snapshot,
)
from cpm.protocol.model import (
    Allocation,
    AllocationId,
    AllocationState,
    DomainUUID,
    ExternalAddress,
    NodeName,
    PortRange,
    Role,
)
from cpm.settings import PoolSettings, Settings
from tests.fakes.approving import say_hello

_POOL = PoolSettings()

EDGES = (NodeName("edge1"), NodeName("edge2"))


class ManyNodes:
    """
    Two edges, and hosts with the same number of VMs each, all in step.

    :param vms: On each host.
    :param ports: Usable ports on each external address; None: all of them.
    """

    def __init__(
        self, hosts: int, vms: int, *, addresses: int = 4, ports: int | None = None, pool: PoolSettings = _POOL
    ) -> None:
        self.now = 1_000_000.0
        self.hosts = tuple(NodeName(f"host{number}") for number in range(hosts))
        self.messages: list[tuple[NodeName, ManagerMessage]] = []
        """What the manager sent since :meth:`settle` was called last."""
        self.changes: list[Change] = []
        """What it recorded meanwhile."""
        reserved = PortRange(1024, 65535).minus(PortRange(1024, 1023 + ports)) if ports is not None else ()
        externals = tuple(
            ExternalAddress(IPv4Address("203.0.113.0") + number, tuple(reserved)) for number in range(addresses)
        )
        state = LedgerState(0, (), (), externals, (), AllocationId(1))
        self.manager = Manager(state, Settings(pool=pool).rules(), 1, self.now)
        self._vms = vms
        self._generations: dict[NodeName, int] = {}
        for name in (*EDGES, *self.hosts):
            self.hello(name)
            self.settle()

    def vms_of(self, host: NodeName) -> tuple[DomainUUID, ...]:
        """Return the VMs of a host."""
        return tuple(DomainUUID(f"{host}-{number}") for number in range(self._vms))

    def hello(self, name: NodeName) -> None:
        """Have a node begin a session."""
        number = (*EDGES, *self.hosts).index(name)
        role, domains = (Role.EDGE, ()) if name in EDGES else (Role.HOST, self._domains(name))
        underlay = IPv4Address("172.16.0.10") + number
        hello = Hello(PROTOCOL, name, frozenset({role}), underlay, "test", 0, domains)
        say_hello(self.manager, hello, self.now)

    def present(self, host: NodeName) -> None:
        """Have a host list its VMs, all of them."""
        self.manager.on_message(host, Present(self._domains(host)), self.now)

    def report(
        self,
        host: NodeName,
        in_use: int = 100,
        draining: int | None = None,
        limited: Mapping[DomainUUID, int] = MappingProxyType({}),
    ) -> None:
        """
        Have a host report that nothing is remarkable.

        :param draining: Connections on each draining range; None: they were not counted.
        """
        measured = tuple(
            Measured(uuid, 400.0, 5.0, in_use, 12.0, self._draining(uuid, draining)) for uuid in self.vms_of(host)
        )
        report = Report(self._generations[host], 1.0, measured, limited=dict(limited))
        self.manager.on_message(host, report, self.now)

    def _draining(self, uuid: DomainUUID, connections: int | None) -> tuple[Draining, ...]:
        ranges = self.manager.fleet.of(uuid) if connections is not None else ()
        return tuple(
            Draining(each.ports, connections or 0) for each in ranges if each.state is AllocationState.DRAINING
        )

    def active(self, uuid: DomainUUID) -> Allocation | None:
        """Return the active range of a VM, if it has one."""
        return self.manager.fleet.one(uuid, AllocationState.ACTIVE)

    def settle(self) -> None:
        """Send, and confirm what was sent, until nothing more follows."""
        self.messages, self.changes = [], []
        while (outcome := self.manager.take(self.now)).messages:
            self.changes += outcome.changes
            self.messages += outcome.messages
            self._confirm(outcome.messages)
        self.changes += outcome.changes

    def _confirm(self, messages: Sequence[tuple[NodeName, ManagerMessage]]) -> None:
        for name, message in messages:
            if isinstance(message, (Snapshot, Delta)):
                self._generations[name] = message.generation
                self.manager.on_message(name, Applied(1, message.generation), self.now)

    def _domains(self, host: NodeName) -> tuple[Presence, ...]:
        return tuple(Presence(uuid, uuid) for uuid in self.vms_of(host))
