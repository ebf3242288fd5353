"""
A site in virtual time: the real deciding code of manager and nodes, over a fake network and fake kernels.

The manager is the real :class:`cpm.core.manager.Manager` over a real ledger in memory, the nodes are real
:class:`natctl.core.node.Node` objects. Messages wait in queues until delivered, kernel commands until carried out;
processes crash and come back with what survives a crash (ledger, kernel, the interfaces of VMs). After every step
:meth:`Site.check` looks for a port with two owners and for a connection that was cut.

The kernels are :class:`tests.fakes.kernel.FakeKernel`, checked against the real one. One that refuses without having
been told to (:attr:`Machine.failing`) ends the test: the manager has given a port to two VMs.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping
from ipaddress import IPv4Address, IPv4Interface

from cpm.core.invariants import Invariants
from cpm.core.manager import Manager, Outcome
from cpm.core.membership import ApprovalRequest
from cpm.ledger import SqliteLedger
from cpm.protocol import codec
from cpm.protocol.errors import KernelError, VirtPortsError
from cpm.protocol.intent import ExternalRange
from cpm.protocol.messages import GuestView, Hello, NodeMessage
from cpm.protocol.model import DomainUUID, ExternalAddress, NodeName, PortRange, Role, Wishes
from cpm.settings import PoolSettings, Settings
from natctl.core.domains import Listing, RunningDomain, Tap
from natctl.core.identity import Identity
from natctl.core.node import Node
from natctl.model.commands import Answer, Forget, Program, Prune, Remember, Replace, Send
from natctl.model.entries import EdgeSettings, HostSettings
from natctl.model.entries import Settings as NodeSettings
from natctl.model.guest_claims import Claims, Reach
from natctl.model.port_use import PortUse, VMPorts
from natctl.model.remembered import NOTHING, Remembered
from qga_agent.domain_list import Phase
from qga_agent.samples import Rates
from tests.fakes.kernel import FakeKernel

EXTERNAL = IPv4Address("203.0.113.1")
GUESTS = Reach((IPv4Interface("192.168.122.1/24"),), frozenset({IPv4Address("192.168.122.1")}))
"""What every VM's bridge has."""
BUSY = Rates(5000.0, 10.0)
IDLE = Rates(1.0, 0.0)
ROLES = {
    Role.HOST: NodeSettings(HostSettings(frozenset({"eth0"}))),
    Role.EDGE: NodeSettings(edge=EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"}))),
}


@dataclasses.dataclass(frozen=True)
class Connection:
    """A connection of a VM, as the world outside knows it."""

    domain: DomainUUID
    life: int
    host: NodeName
    internal: IPv4Address
    external: IPv4Address
    port: int


@dataclasses.dataclass
class Machine:
    """A node's machine: what it runs, what its kernel holds, and natd unless that is dead."""

    identity: Identity
    kernel: FakeKernel
    guests: dict[DomainUUID, frozenset[Tap]] = dataclasses.field(default_factory=dict)
    """The interfaces of each VM that runs here."""
    wishes: dict[DomainUUID, Wishes | None] = dataclasses.field(default_factory=dict)
    """What the XML of each VM says of its ports; None: natd has not seen it."""
    phases: dict[DomainUUID, Phase] = dataclasses.field(default_factory=dict)
    """What libvirt says of a guest; not there: it runs here."""
    libvirt: bool = True
    """Whether natd can ask libvirt."""
    node: Node | None = None
    remembered: Remembered = NOTHING
    """What natd keeps on disk."""
    entries: set[tuple[DomainUUID, IPv4Address, int]] = dataclasses.field(default_factory=set)
    """Connection tracking: whose connection it was, the internal address, the port. No entry ends by itself."""
    work: collections.deque[Program | Replace | Forget | Prune] = dataclasses.field(default_factory=collections.deque)
    to_manager: collections.deque[bytes] = dataclasses.field(default_factory=collections.deque)
    from_manager: collections.deque[bytes] = dataclasses.field(default_factory=collections.deque)
    connected: bool = False
    failing: bool = False
    """The kernel refuses the next command."""
    refusing: bool = False
    """The kernel refuses every command."""
    refused_vms: set[DomainUUID] = dataclasses.field(default_factory=set)
    """The kernel refuses each command that changes one of these VMs."""
    stuck: bool = False
    """natd keeps its session, and its kernel commands never end."""
    answers: dict[int, str] = dataclasses.field(default_factory=dict)


class Site:
    """Two hosts, two edges, one manager; VMs come and go."""

    def __init__(
        self,
        *,
        hold_down_s: float = 120.0,
        ports: PortRange | None = None,
        cap: int = 2048,
        start_reserve: float = 0.03,
    ) -> None:
        pool = PoolSettings(
            block=64, initial=256, floor=64, cap=cap, hold_down_s=hold_down_s, start_reserve=start_reserve
        )
        self.settings = Settings(pool=pool)
        self.now = 1_000_000.0
        self.ledger = SqliteLedger(":memory:")
        # Since Python 3.13 a connection that is collected while it is open is a warning.
        weakref.finalize(self, self.ledger.close)
        self.manager: Manager | None = None
        self.machines: dict[NodeName, Machine] = {}
        self.on_outcome: Callable[[Outcome], None] | None = None
        """Is told of all that the manager decides, before it is committed."""
        self.connections: set[Connection] = set()
        self.lives: collections.Counter[DomainUUID] = collections.Counter()
        self._let_through: set[tuple[Connection, NodeName]] = set()
        self._given_up: set[NodeName] = set()
        """Nodes that were fenced, until they have everything again: what they hold may be others' by now."""
        self._requests = 0
        self._taps = 0
        for name, role, number in (
            ("host1", Role.HOST, 11),
            ("host2", Role.HOST, 12),
            ("edge1", Role.EDGE, 21),
            ("edge2", Role.EDGE, 22),
        ):
            identity = Identity(NodeName(name), frozenset({role}), IPv4Address(f"172.30.0.{number}"), "test")
            self.machines[identity.name] = Machine(identity, FakeKernel(ROLES[role]))
        self.start_manager()
        usable = ports or PortRange(1024, 65535)
        reserved = PortRange(1024, 65535).minus(usable)
        self.ask(lambda manager: manager.pool.add_addresses([ExternalAddress(EXTERNAL, reserved)], self.now))
        for machine in self.machines.values():
            self.approve(machine.identity)
        for name in self.machines:
            self.start_natd(name)
            self.connect(name)
        self.run()

    @property
    def hosts(self) -> list[Machine]:
        return [machine for machine in self.machines.values() if Role.HOST in machine.identity.roles]

    @property
    def edges(self) -> list[Machine]:
        return [machine for machine in self.machines.values() if Role.EDGE in machine.identity.roles]

    # The manager

    def start_manager(self) -> None:
        epoch = self.ledger.next_epoch()
        self.manager = Manager(self.ledger.load(), self.settings.rules(), epoch, self.now)
        self.invariants = Invariants(self.ledger.load(), self.settings.rules().hold_down_s)

    def crash_manager(self) -> None:
        self.manager = None
        for name in self.machines:
            self.disconnect(name)

    def ask(self, act: Callable[[Manager], None]) -> None:
        """Do what cpmd's loop does: act, commit, then send."""
        if self.manager is None:
            return
        with contextlib.suppress(VirtPortsError):
            act(self.manager)
        outcome = self.manager.take(self.now)
        self._given_up |= {node.name for node in self.manager.fleet.nodes.values() if node.fenced}
        if self.on_outcome is not None:
            self.on_outcome(outcome)
        manager = self.manager
        found = self.invariants.check(outcome.changes, outcome.decided, manager.fleet.nodes, manager.sessions, self.now)
        assert not found, found
        self.ledger.commit(outcome.changes, self.now)
        for name, message in outcome.messages:
            if self.machines[name].connected:
                self.machines[name].from_manager.append(codec.encode(message))
        for name in outcome.ended:
            self.disconnect(name)

    def approve(self, identity: Identity) -> None:
        """Have the operator approve a node as what it is."""
        request = ApprovalRequest(roles=identity.roles, underlay=identity.underlay)
        self.ask(lambda manager: manager.membership.approve(identity.name, request, self.now))

    # The network

    def connect(self, name: NodeName) -> None:
        machine = self.machines[name]
        if machine.node is None or machine.connected or self.manager is None:
            return
        machine.connected = True
        machine.node.on_connected(self.now)
        self._carry_out(machine)

    def disconnect(self, name: NodeName) -> None:
        """What is under way is lost, in both directions."""
        machine = self.machines[name]
        if not machine.connected:
            return
        machine.connected = False
        machine.to_manager.clear()
        machine.from_manager.clear()
        if machine.node is not None:
            machine.node.on_disconnected(self.now)
            self._carry_out(machine)
        self.ask(lambda manager: manager.on_session_end(name, self.now))

    def deliver_up(self, name: NodeName) -> bool:
        machine = self.machines[name]
        if not machine.to_manager or self.manager is None:
            return False
        message = codec.decode_node_message(machine.to_manager.popleft())
        self.ask(lambda manager: _hear(manager, name, message, self.now))
        restoring = self.manager.restoring
        heard = self.manager.sessions if restoring is None else restoring.hellos
        if isinstance(message, Hello) and name not in heard:
            # Refused: cpmd keeps what that shows, and closes the session.
            self.ask(lambda manager: manager.refused.note())
            self.disconnect(name)
        return True

    def deliver_down(self, name: NodeName) -> bool:
        machine = self.machines[name]
        if not machine.from_manager or machine.node is None:
            return False
        machine.node.on_message(codec.decode_manager_message(machine.from_manager.popleft()), self.now)
        self._carry_out(machine)
        return True

    # Nodes

    def start_natd(self, name: NodeName) -> None:
        machine = self.machines[name]
        if machine.node is None:
            machine.node = Node(machine.identity, marks=1000, has_libvirt=True, remembered=machine.remembered)
            machine.kernel.restart_natd()
            found = machine.kernel.observe()
            hosted, mapped = found.host.values(), found.edge.values()
            machine.node.on_kernel_found(hosted, found.path, self._links(machine), self.now, mapped)
            self.list_domains(name)

    def kill_natd(self, name: NodeName) -> None:
        machine = self.machines[name]
        machine.node = None
        machine.work.clear()
        self.disconnect(name)

    def kernel_step(self, name: NodeName) -> bool:
        machine = self.machines[name]
        if not machine.work or machine.node is None or machine.stuck:
            return False
        command = machine.work.popleft()
        if isinstance(command, (Forget, Prune)):
            held = machine.node.held_ports(command.internal)
            if not held and isinstance(command, Prune):
                return True
            machine.entries = {
                entry
                for entry in machine.entries
                if entry[1] != command.internal or any(entry[2] in ports for ports in held)
            }
            return True
        if machine.failing or machine.refusing:
            machine.failing = False
            machine.node.on_kernel_refused(KernelError("program nftables", 12, "out of memory"), self.now)
        elif machine.refused_vms & _changed_by(machine.kernel, command):
            machine.node.on_kernel_refused(KernelError("set the route", 101, "network is unreachable"), self.now)
        else:
            _program(machine.kernel, command)
            if isinstance(command, Replace):
                self._given_up.discard(name)
            machine.node.on_kernel_programmed(self.now)
        self._carry_out(machine)
        return True

    def _carry_out(self, machine: Machine) -> None:
        assert machine.node is not None
        if machine.node.has_guests_to_find:
            unknown = machine.node.guests_to_find()
            machine.node.on_guest_addresses({uuid: Claims(GUESTS) for uuid in unknown})
        for command in machine.node.take():
            if isinstance(command, Send) and machine.connected:
                machine.to_manager.append(codec.encode(command.message))
            elif isinstance(command, Remember):
                machine.remembered = command.now
            elif isinstance(command, Answer):
                machine.answers[command.request] = command.code
            elif isinstance(command, (Program, Replace, Forget, Prune)):
                machine.work.append(command)

    # VMs

    def start_vm(
        self, name: NodeName, uuid: DomainUUID, wishes: Wishes | None = None, *, tap: str | None = None
    ) -> int:
        """Start a VM that runs nowhere, as the hook ``start`` tells of it; return the number of the hook's request."""
        assert not any(uuid in machine.guests for machine in self.machines.values())
        machine = self.machines[name]
        self.lives[uuid] += 1
        vm = _running(uuid, self._new_taps(uuid, tap), wishes)
        machine.guests[uuid], machine.wishes[uuid] = vm.taps, wishes
        request = self._request()
        if machine.node is not None:
            machine.node.on_links(self._links(machine), self.now)
            machine.node.on_domain_starting(request, vm, self.now)
            self._carry_out(machine)
        return request

    def stop_vm(self, uuid: DomainUUID, *, hook: bool = True) -> None:
        for machine in self.machines.values():
            if machine.guests.pop(uuid, None) is None:
                continue
            self.connections = {c for c in self.connections if c.domain != uuid}
            if machine.node is not None:
                if hook:
                    machine.node.on_domain_ended(None, uuid, "stopped", self.now)
                machine.node.on_links(self._links(machine), self.now)
                self._carry_out(machine)

    def plug(self, uuid: DomainUUID, *, taps: int) -> None:
        """Give a running VM another set of interfaces, 0 or 1; libvirt's event has natd ask for the list."""
        for machine in self.machines.values():
            if uuid not in machine.guests:
                continue
            machine.guests[uuid] = self._new_taps(uuid) if taps else frozenset()
            if machine.node is not None:
                machine.node.on_links(self._links(machine), self.now)
                self.list_domains(machine.identity.name)
                self._carry_out(machine)

    def migrate(self, uuid: DomainUUID, to: NodeName, *, hooks: bool = True) -> None:
        """Begin a live migration: the hooks ``migrate`` and ``start`` on the destination, whose tap exists then."""
        machine = self.machines[to]
        vm = _running(uuid, self._new_taps(uuid))
        machine.guests[uuid], machine.phases[uuid] = vm.taps, Phase.MIGRATING
        if machine.node is not None and hooks:
            machine.node.on_links(self._links(machine), self.now)
            machine.node.on_domain_incoming(self._request(), vm, self.now)
            machine.node.on_domain_starting(self._request(), vm, self.now)
            self._carry_out(machine)

    def resume(self, uuid: DomainUUID, to: NodeName) -> None:
        """The guest runs on the destination, which libvirt lists if natd can ask it. Old connections are gone."""
        self.connections = {c for c in self.connections if c.domain != uuid}
        machine = self.machines[to]
        machine.phases.pop(uuid, None)
        self.list_domains(machine.identity.name)

    def left(self, uuid: DomainUUID, source: NodeName) -> None:
        """The source's hook ``stopped``: like any other stop."""
        machine = self.machines[source]
        machine.guests.pop(uuid, None)
        if machine.node is not None:
            machine.node.on_domain_ended(None, uuid, "stopped", self.now)
            machine.node.on_links(self._links(machine), self.now)
            self._carry_out(machine)

    def _request(self) -> int:
        self._requests += 1
        return self._requests

    def list_domains(self, name: NodeName) -> None:
        """Tell natd what libvirt lists: at start, after an event of libvirt, and every few seconds."""
        machine = self.machines[name]
        if machine.node is None or not machine.libvirt:
            return
        running = (
            _running(uuid, taps, machine.wishes.get(uuid), machine.phases.get(uuid, Phase.HERE))
            for uuid, taps in machine.guests.items()
        )
        machine.node.on_domains_listed(Listing(self.now, tuple(running)), self.now)
        self._carry_out(machine)

    def _new_taps(self, uuid: DomainUUID, name: str | None = None) -> frozenset[Tap]:
        self._taps += 1
        return frozenset({Tap(name or f"vnet-{uuid[-4:]}", self._taps)})

    def _links(self, machine: Machine) -> dict[int, str]:
        return {tap.number: tap.name for taps in machine.guests.values() for tap in taps}

    def open(self, uuid: DomainUUID, offset: int) -> Connection | None:
        """The VM opens a connection, as its host's and the edges' kernels let it; None when it gets no port."""
        for machine in self.hosts:
            entry = machine.kernel.host.get(uuid)
            if uuid not in machine.guests or entry is None or entry.intent.ports is None or not entry.taps:
                continue
            port = entry.intent.ports.first + offset % entry.intent.ports.size
            ways = [self._at(address) for address in sorted(machine.kernel.path.edges)] if machine.kernel.path else []
            edge = ways[offset % len(ways)] if ways else None
            external = edge.kernel.maps(entry.intent.internal, port) if edge else None
            if external is None:
                return None
            internal = entry.intent.internal
            connection = Connection(uuid, self.lives[uuid], machine.identity.name, internal, external, port)
            self.connections.add(connection)
            machine.entries.add((uuid, internal, port))
            return connection
        return None

    def _at(self, address: IPv4Address) -> Machine:
        return next(machine for machine in self.machines.values() if machine.identity.underlay == address)

    # Time

    def report(self, name: NodeName, *, busy: bool, guests: Mapping[DomainUUID, GuestView] | None = None) -> None:
        machine = self.machines[name]
        if machine.node is None or not machine.connected:
            return
        use = self.port_use(name)
        rates = dict.fromkeys(machine.node.taps(), BUSY if busy else IDLE)
        machine.node.reports.send(1.0, rates, use, machine.node.in_force, {}, guests or {})
        self._carry_out(machine)

    def port_use(self, name: NodeName) -> PortUse:
        """Return what natd counts on a host."""
        ports: dict[IPv4Address, list[int]] = collections.defaultdict(list)
        for connection in self.connections:
            if connection.host == name:
                ports[connection.internal].append(connection.port)
        return PortUse({internal: VMPorts.of({6: found}) for internal, found in ports.items()})

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        for name, machine in self.machines.items():
            if machine.node is not None:
                machine.node.on_tick(self.now)
                self._carry_out(machine)
                self.list_domains(name)
        self.ask(lambda manager: manager.tick(self.now))

    def run(self) -> None:
        """Deliver and carry out everything until nothing moves."""
        steps = [
            (step, name) for name in self.machines for step in (self.deliver_up, self.deliver_down, self.kernel_step)
        ]
        while sum(step(name) for step, name in steps):
            self.check()

    def heal(self) -> None:
        """Bring everybody back and let it settle."""
        if self.manager is None:
            self.start_manager()
        for name, machine in self.machines.items():
            machine.libvirt, machine.refusing, machine.stuck = True, False, False
            self.start_natd(name)
            self.connect(name)
        for _ in range(4):
            self.run()
            self.pass_time(6.0)
            for machine in self.machines.values():
                if machine.node is not None:  # as natd does every monitor.ensure_s
                    machine.node.send_presence()
                    self._carry_out(machine)
        self.run()

    # What must never be seen

    def check(self) -> None:
        """
        :raise AssertionError: When an external port has two owners anywhere, a connection is cut, or a new one would be
            dropped by an edge.
        """
        self._check_no_overloading()
        self._check_nothing_cut()
        self._check_nothing_dropped()
        self._check_taps()

    def _check_no_overloading(self) -> None:
        # One external port leads to one VM, whichever edge a packet comes by; and leaves only from one.
        owners: list[tuple[IPv4Address, PortRange, DomainUUID]] = []
        for machine in self.edges:
            owners += [(external, ports, entry.domain) for external, ports, entry in machine.kernel.mapped()]
        owners.sort(key=lambda owner: (owner[0], owner[1]))
        reach: tuple[IPv4Address, PortRange, DomainUUID] | None = None
        for owner in owners:
            if reach is not None and owner[0] == reach[0] and owner[1].first <= reach[1].last:
                assert owner[2] == reach[2], f"two owners: {owner} and {reach}"
            if reach is None or owner[0] != reach[0] or owner[1].last > reach[1].last:
                reach = owner

    def _check_nothing_cut(self) -> None:
        # An edge that let a connection through once must do so until it ends. (One that was away when its range was
        # made learns of it when it is back.)
        for connection in self.connections:
            for machine in self.edges:
                found = machine.kernel.maps(connection.internal, connection.port)
                if found is not None:
                    self._let_through.add((connection, machine.identity.name))
                seen = (connection, machine.identity.name) in self._let_through
                assert found == connection.external or (found is None and not seen), (
                    f"{machine.identity.name} cut {connection}, maps it to {found}"
                )

    def _check_nothing_dropped(self) -> None:
        # What a host translates to a port passes whichever edge the host sends it to.
        for machine in self.hosts:
            if machine.identity.name in self._given_up:
                continue
            edges = [self._at(address) for address in machine.kernel.path.edges] if machine.kernel.path else []
            edges = [edge for edge in edges if edge.identity.name not in self._given_up]
            for uuid, entry in machine.kernel.host.items():
                ports, internal = entry.intent.ports, entry.intent.internal
                if ports is None:
                    continue
                for edge in edges:
                    known = next((each for each in edge.kernel.edge.values() if each.internal == internal), None)
                    assert known is not None and _cover(known.ranges, ports), (
                        f"{edge.identity.name} drops new connections of {uuid} from {ports}, knows {known}"
                    )

    def _check_taps(self) -> None:
        # What a guest sends is never taken for another VM's, also while natd is away.
        for machine in self.hosts:
            owners = {tap.number: uuid for uuid, taps in machine.guests.items() for tap in taps}
            for uuid, entry in machine.kernel.host.items():
                strangers = {owners[index] for index in entry.taps if index in owners} - {uuid}
                assert not strangers, f"{machine.identity.name} takes {strangers} for {uuid}"


def _running(
    uuid: DomainUUID, taps: frozenset[Tap], wishes: Wishes | None = None, phase: Phase = Phase.HERE
) -> RunningDomain:
    return RunningDomain(uuid, f"vm-{uuid[-4:]}", taps, wishes, phase=phase)


def _cover(ranges: Iterable[ExternalRange], ports: PortRange) -> bool:
    return any(each.ports.first <= ports.first and ports.last <= each.ports.last for each in ranges)


def _program(kernel: FakeKernel, command: Program | Replace) -> None:
    """As natd's daemon does."""
    if isinstance(command, Program):
        kernel.change(command.change)
    else:
        kernel.replace(command.host, command.edge, command.path)


def _changed_by(kernel: FakeKernel, command: Program | Replace) -> set[DomainUUID]:
    """Return the VMs of which the kernel would hold something else."""
    host: dict[DomainUUID, object] = {**(kernel.host if isinstance(command, Program) else {})}
    edge: dict[DomainUUID, object] = {**(kernel.edge if isinstance(command, Program) else {})}
    host |= command.change.host if isinstance(command, Program) else command.host
    edge |= command.change.edge if isinstance(command, Program) else command.edge
    at_host = {uuid for uuid in {*host, *kernel.host} if host.get(uuid) != kernel.host.get(uuid)}
    return at_host | {uuid for uuid in {*edge, *kernel.edge} if edge.get(uuid) != kernel.edge.get(uuid)}


def _hear(manager: Manager, name: NodeName, message: NodeMessage, now: float) -> None:
    if isinstance(message, Hello):
        manager.on_hello(message, "test", now)
    else:
        manager.on_message(name, message, now)
