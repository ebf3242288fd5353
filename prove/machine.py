"""
One machine of a simulated site: natd (the real deciding half, unless dead), its kernel, its libvirt, its sessions.

Does what ``natctl.daemon`` does with the commands of :class:`natctl.core.node.Node`, one at a time and when told. natd
can die between any two of its writes (:attr:`Machine.fuse`).
"""

from __future__ import annotations

import collections
import dataclasses
import enum
from array import array
from collections.abc import Callable, Iterable
from ipaddress import IPv4Address, IPv4Interface
from types import MappingProxyType

import msgspec

from cpm.protocol import codec
from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.messages import Applied, Hello
from cpm.protocol.model import DomainUUID, NodeName, Role
from natctl.core.domains import Listing, RunningDomain, Tap
from natctl.core.identity import Identity
from natctl.core.node import Node
from natctl.core.programming import InForce
from natctl.model.commands import Answer, CountPorts, Forget, Program, Prune, Remember, Replace, Send
from natctl.model.entries import EdgeSettings, HostSettings
from natctl.model.entries import Settings as NodeSettings
from natctl.model.guest_claims import Claims, Reach
from natctl.model.port_use import PortUse, ProtocolPorts, VMPorts
from natctl.model.remembered import NOTHING
from natctl.ruleset.readback import Counted
from prove import words
from prove.judge import Flow, Judge
from prove.kernels import SimulatedKernel
from qga_agent.domain_list import Phase
from qga_agent.samples import Rates

LINGERS_S = 12.0
"""Seconds for which the kernel keeps the entry of a connection after its end; 10 at least."""
IDLE, BUSY = Rates(1.0, 0.0), Rates(5000.0, 10.0)
_TCP = 6
_GUESTS = Reach((IPv4Interface("10.10.0.1/24"),))
"""What every VM's bridge has."""
_SETTINGS = {
    frozenset({Role.HOST}): NodeSettings(HostSettings(frozenset({"eth0"}))),
    frozenset({Role.EDGE}): NodeSettings(edge=EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"}))),
    frozenset({Role.HOST, Role.EDGE}): NodeSettings(
        HostSettings(frozenset({"eth0"})), EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"}))
    ),
}


@dataclasses.dataclass(slots=True, eq=False)
class Session:
    """One connection between a node and the manager: ordered in both directions, and ending at any point."""

    node: NodeName
    up: collections.deque[bytes] = dataclasses.field(default_factory=collections.deque)
    down: collections.deque[bytes] = dataclasses.field(default_factory=collections.deque)
    at_node: bool = True
    """The node has not seen its end."""
    at_manager: bool = True
    """The manager has not seen its end."""
    said_hello: bool = False
    """The manager has taken the first message."""
    connection: object = None
    """What the manager knows it by."""
    is_impostor: bool = False
    """The other end is a machine that is not this node."""


class Broken(enum.StrEnum):
    """How a machine is broken for good."""

    REFUSES = "refuses"
    """Its kernel refuses every change."""
    HANGS = "hangs"
    """Its natd goes on, and its kernel is never changed."""
    GONE = "gone"
    """It has no power."""


@dataclasses.dataclass(slots=True)
class Guest:
    """A VM on a machine, as libvirt knows it."""

    taps: frozenset[Tap]
    phase: Phase = Phase.HERE
    busy: bool = False


class Machine:
    """
    A machine.

    :param identity: Of its natd.
    :param judge: Is told what the kernel takes.
    :param say: Takes a line of the transcript; None: nobody reads it.
    """

    def __init__(self, identity: Identity, judge: Judge, say: Callable[[str, str], None] | None) -> None:
        self.identity = identity
        self.name = identity.name
        self.is_host = Role.HOST in identity.roles
        self.is_edge = Role.EDGE in identity.roles
        self.kernel = SimulatedKernel(_SETTINGS[identity.roles])
        self.is_on = True
        self.remembered = NOTHING
        """What natd keeps on disk."""
        self.node: Node | None = None
        self.session: Session | None = None
        self.booted = 0.0
        """When it booted, true time; natd reads the clock that began then."""
        self.guests: dict[DomainUUID, Guest] = {}
        self.flows: set[Flow] = set()
        """The table of connections; those that ended stay for a while."""
        self.has_libvirt = True
        self.refuses = 0
        """How many changes the kernel refuses from now on."""
        self.refused_vm: DomainUUID | None = None
        """It refuses only those of this VM; None: any."""
        self.broken: Broken | None = None
        """How it is broken to the end of the story; None: it is not."""
        self.has_forgotten = False
        """Its kernel lost its tables, by no act of ours, and natd has not put them back yet."""
        self.forgotten: set[DomainUUID] = set()
        """The VMs of which this edge lost what it mapped, by no act of ours, and which it does not map again yet."""
        self.knows_kernel_only = False
        """Its natd has begun, and its kernel has taken nothing of what the manager says since."""
        self.refused: frozenset[DomainUUID] = frozenset()
        """The VMs that its natd has said last that the kernel refuses."""
        self.is_isolated = False
        """Somebody took its cables out, but for that of its session: it forwards nothing."""
        self.false_hello: Callable[[Hello], Hello] | None = None
        """Makes a lie of the first message of the next session."""
        self.fuse: int | None = None
        """natd dies after so many more writes; None: it does not."""
        self.is_dying = False
        """natd is dead, and nothing that it does has an effect; who runs the story clears it away."""
        self.work: collections.deque[Program | Replace | Forget | Prune | CountPorts] = collections.deque()
        self._later: collections.deque[Forget | Prune] = collections.deque()
        self._listing: Listing | None = None
        self._in_force: InForce | None = None
        self._use: PortUse | None = None
        self._starts = 0
        self._judge = judge
        self._say = say

    @property
    def forwards(self) -> bool:
        """Whether packets that are sent here arrive."""
        return self.is_on and not self.is_isolated

    # natd

    def start(self, now: float) -> None:
        """Start natd, which reads what the kernel holds and asks libvirt."""
        self._starts += 1
        self.knows_kernel_only = True
        identity = dataclasses.replace(self.identity, instance=f"{self.name} {self._starts}")
        self.node = node = Node(identity, 1000, has_libvirt=True, remembered=self.remembered)
        self.kernel.restart_natd()
        found = self.kernel.observe()
        node.on_kernel_found(found.host.values(), found.path, self._links(), now, found.edge.values())
        self.list_domains(now)

    def die(self) -> None:
        """Natd is gone; what the kernel holds stays."""
        self.node, self.fuse, self.is_dying = None, None, False
        self.work.clear()
        self._later.clear()
        self._listing = self._in_force = self._use = None

    def carry_out(self) -> None:
        """Carry out natd's commands."""
        assert self.node is not None
        if self.node.has_guests_to_find:
            self.node.on_guest_addresses({uuid: Claims(_GUESTS) for uuid in self.node.guests_to_find()})
        for command in self.node.take():
            if isinstance(command, Send):
                if self.session is not None and self._write():
                    message = command.message
                    if isinstance(message, Hello) and self.false_hello is not None:
                        message, self.false_hello = self.false_hello(message), None
                    if self._say is not None:
                        self._say(self.name, f"sends {words.message(message)}")
                    if isinstance(message, Applied):
                        self.refused = frozenset(vm.domain for vm in message.refused)
                        if not self.refused:
                            # What it does not map by now is not to be mapped.
                            self.forgotten.clear()
                            self.knows_kernel_only = False
                    self.session.up.append(codec.encode(message))
            elif isinstance(command, (Program, Replace, Forget, Prune, CountPorts)):
                self.work.append(command)
            elif isinstance(command, Remember):
                if self._write():
                    self.remembered = command.now
            elif isinstance(command, Answer) and self._say is not None:
                self._say(self.name, f"answers a hook: {command.code or 'ok'} {command.text}")

    def _write(self) -> bool:
        """Return whether natd lives to make this write."""
        if self.fuse is not None:
            self.is_dying |= self.fuse <= 0
            self.fuse -= 1
        return not self.is_dying

    # The kernel

    def kernel_step(self, now: float, true_now: float) -> bool:
        """Carry out the first command that is queued, deletions last; return whether there was one."""
        node = self.node
        if node is None or self.is_dying or self.broken is Broken.HANGS:
            return False
        while self.work and isinstance(self.work[0], (Forget, Prune)):
            deletion = self.work.popleft()
            assert isinstance(deletion, (Forget, Prune))
            self._later.append(deletion)
        if not self.work:
            if not self._later:
                return False
            self._delete(self._later.popleft(), node)
            return True
        command = self.work.popleft()
        if isinstance(command, CountPorts):
            filling = self.port_use(true_now).filling(command.internal, command.ports)
            node.arrival_events.on_ports_counted(command, filling, frozenset(), now)
        elif isinstance(command, (Program, Replace)):
            self._program(command, node, now, true_now)
        self.carry_out()
        return True

    def _program(self, command: Program | Replace, node: Node, now: float, true_now: float) -> None:
        is_refused = self.refused_vm is None or self._changes(command, self.refused_vm)
        if self.broken is Broken.REFUSES or (self.refuses and is_refused):
            self.refuses = max(0, self.refuses - 1)
            if self._say is not None:
                self._say(self.name, "its kernel refuses")
            node.on_kernel_refused(KernelError("program nftables", 12, "out of memory"), now)
            return
        if not self._write():
            return
        before_host, before_edge = dict(self.kernel.host), dict(self.kernel.edge)
        if isinstance(command, Program):
            self.kernel.change(command.change)
        else:
            self.kernel.replace(command.host, command.edge, command.path)
            self.has_forgotten = False
        self._tell_judge(before_host, before_edge, true_now)
        if self._write():
            node.on_kernel_programmed(now)

    def _changes(self, command: Program | Replace, uuid: DomainUUID) -> bool:
        """Return whether the kernel would hold something else of a VM."""
        if isinstance(command, Program):
            host, edge = command.change.host, command.change.edge
            before: tuple[object, object] = (self.kernel.host.get(uuid), self.kernel.edge.get(uuid))
            return (host.get(uuid, before[0]), edge.get(uuid, before[1])) != before
        return (command.host.get(uuid), command.edge.get(uuid)) != (
            self.kernel.host.get(uuid),
            self.kernel.edge.get(uuid),
        )

    def _tell_judge(self, before_host: dict, before_edge: dict, true_now: float) -> None:  # type: ignore[type-arg]
        if self.is_edge:
            edge = self.kernel.edge
            self.forgotten -= edge.keys()
            changed = {
                uuid: self._with_host(edge.get(uuid))
                for uuid in before_edge.keys() | edge.keys()
                if before_edge.get(uuid) != edge.get(uuid)
            }
            if self._say is not None:
                for uuid, vm in sorted(changed.items()):
                    self._say(self.name, f"its kernel maps to {words.vm(uuid)}: {words.edge_intent(vm)}")
            self._judge.on_edge(self.name, changed, true_now)
        if self.is_host:
            for uuid in sorted(before_host.keys() | self.kernel.host.keys()):
                entry = self.kernel.host.get(uuid)
                if entry != before_host.get(uuid):
                    if self._say is not None:
                        ports = entry.intent.ports if entry is not None else "nothing"
                        self._say(self.name, f"its kernel hands out to {words.vm(uuid)}: {ports}")
                    self._judge.on_host(self.name, uuid, entry)

    def _with_host(self, vm: EdgeIntent | None) -> EdgeIntent | None:
        """Return what an edge maps, with the host's address also where it is this machine."""
        if vm is None or vm.via is not None:
            return vm
        return msgspec.structs.replace(vm, via=self.identity.underlay)

    def mapped_as(self, uuids: Iterable[DomainUUID], internal: IPv4Address, via: IPv4Address) -> EdgeIntent | None:
        """Return what this edge maps to a VM: which is one of these, by its internal address and its host's."""
        for uuid in uuids if self.is_edge else ():
            vm = self.kernel.edge.get(uuid)
            if vm is not None and (vm.internal, vm.via or self.identity.underlay) == (internal, via):
                return vm
        return None

    def mapped_at(self, uuids: Iterable[DomainUUID]) -> IPv4Address | None:
        """Return the host to which this edge sends what is for the VM that is one of these; None: to none."""
        found = (vm for uuid in uuids if (vm := self.kernel.edge.get(uuid)) is not None)
        return next((vm.via or self.identity.underlay for vm in found), None)

    def ensure(self, true_now: float) -> None:
        """Natd's periodic check: make the kernel hold again what was last applied; tell the manager of the VMs."""
        if self.node is None:
            return
        if not self.work and self.broken is None:
            # natd does one thing at a time with the kernel.
            before_host, before_edge = dict(self.kernel.host), dict(self.kernel.edge)
            self.has_forgotten = self.has_forgotten and not self.kernel.ensure()
            self._tell_judge(before_host, before_edge, true_now)
        if self.is_host:
            self.node.send_presence()
        self.carry_out()

    def flush(self) -> None:
        """Somebody removes all tables."""
        self._forget()
        self.kernel.flush()
        self._judge.on_edge_lost(self.name)
        self._judge.on_host_lost(self.name)

    def _forget(self) -> None:
        self.has_forgotten = True
        self.forgotten |= self.kernel.edge.keys()

    def isolate(self, true_now: float) -> None:
        """Nothing is forwarded here any more, whatever the kernel holds; the session stays."""
        self.is_isolated = True
        for flow in [flow for flow in self.flows if flow.ended is None]:
            self._judge.on_end(flow, true_now)
        self._judge.on_edge_lost(self.name)

    def power_off(self, true_now: float) -> None:
        """Everything that runs here ends, and the kernel forgets."""
        self.is_on = self.is_isolated = False
        self._forget()
        for flow in [flow for flow in self.flows if flow.ended is None]:
            self._judge.on_end(flow, true_now)
        self.flows.clear()
        self.guests.clear()
        self.die()
        self.refuses = 0
        self.kernel.reboot()
        self._judge.on_edge_lost(self.name)

    def _delete(self, command: Forget | Prune, node: Node) -> None:
        held = node.held_ports(command.internal)
        if not held and isinstance(command, Prune):
            return
        for flow in list(self.flows):
            if flow.internal == command.internal and not any(flow.ports.overlaps(ports) for ports in held):
                self.flows.discard(flow)
                self._judge.on_deleted(flow)

    # Guests and libvirt

    def give_taps(self, uuid: DomainUUID, taps: frozenset[Tap], now: float) -> None:
        """The interfaces of a guest are these now."""
        self.guests[uuid].taps = taps
        if self.node is not None:
            self.node.on_links(self._links(), now)

    def running(self, uuid: DomainUUID) -> RunningDomain:
        """Return a guest as libvirt describes it."""
        guest = self.guests[uuid]
        return RunningDomain(uuid, f"vm{uuid[-1:]}", guest.taps, phase=guest.phase)

    def ask_list(self, now: float) -> None:
        """Libvirt makes its list; natd gets it later."""
        if self.has_libvirt and self.node is not None:
            self._listing = Listing(now, tuple(self.running(uuid) for uuid in self.guests))

    def take_list(self, now: float) -> bool:
        """Natd gets the list. Return whether there was one."""
        if self._listing is None or self.node is None:
            return False
        listing, self._listing = self._listing, None
        self.node.on_domains_listed(listing, now)
        self.carry_out()
        return True

    def list_domains(self, now: float) -> None:
        """Libvirt makes its list, and natd gets it at once."""
        self.ask_list(now)
        self.take_list(now)

    def ended(self, uuid: DomainUUID, now: float, *, hook: bool) -> None:
        """A guest is gone from this machine."""
        self.guests.pop(uuid, None)
        if self.node is not None:
            if hook:
                self.node.on_domain_ended(None, uuid, "stopped", now)
            self.node.on_links(self._links(), now)
            self.carry_out()

    def _links(self) -> dict[int, str]:
        return {tap.number: tap.name for guest in self.guests.values() for tap in guest.taps}

    # Measuring

    def measure(self, stage: int, true_now: float) -> bool:
        """
        Go on with measuring.

        :param stage: 0 all, 1 remember what is in force, 2 count, 3 report.
        :return: Whether this stage could be taken.
        """
        node = self.node
        if node is None:
            return False
        if stage in (0, 1):
            self._in_force, self._use = node.in_force, None
        if stage in (0, 2):
            if self._in_force is None:
                return False
            self._use = self.port_use(true_now)
        if stage in (0, 3):
            if self._in_force is None or self._use is None:
                return False
            self._report(node, self._in_force, self._use)
            self._in_force = None
        return True

    def _report(self, node: Node, in_force: InForce, use: PortUse) -> None:
        rates = {uuid: BUSY if self.guests[uuid].busy else IDLE for uuid in node.taps() if uuid in self.guests}
        node.reports.send(1.0, rates, use, in_force, {}, counted=Counted())
        self.carry_out()

    def port_use(self, true_now: float) -> PortUse:
        """Return what natd counts; entries of connections that ended long ago are gone."""
        if not self.flows:
            return _NO_USE
        self.flows = {f for f in self.flows if f.ended is None or true_now - f.ended < LINGERS_S}
        ports: dict[IPv4Address, list[int]] = {}
        for flow in self.flows:
            ports.setdefault(flow.internal, []).extend(range(flow.ports.first, flow.ports.last + 1))
        return PortUse(MappingProxyType({internal: _vm_ports(found) for internal, found in ports.items()}))


_NO_USE = PortUse()


def _vm_ports(found: Iterable[int]) -> VMPorts:
    flows = sorted(found)
    both = ProtocolPorts(array("H", flows), array("H", sorted(set(flows))))
    return VMPorts(MappingProxyType({_TCP: both}))
