"""
The machines of a simulated site, the sessions between nodes and manager, and the processes at both ends.

A session is ordered, and ends at any point, for each end at another time; several of one node can overlap.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Final

import msgspec

from cpm.core.manager import Manager
from cpm.core.membership import ApprovalRequest
from cpm.core.sizing.rules import PoolRules
from cpm.protocol import codec
from cpm.protocol.errors import VirtPortsError
from cpm.protocol.messages import PROTOCOL, Hello, ManagerMessage, NodeMessage
from cpm.protocol.model import DomainUUID, ExternalAddress, NodeName, PortRange, Role
from cpm.settings import PoolSettings, Settings
from natctl.core.identity import Identity
from prove import words
from prove.cpmd import Call, Cpmd
from prove.judge import BLOCK, Judge
from prove.ledger import new_ledger
from prove.machine import Machine, Session
from prove.sites import SITES, names
from prove.story import VMS, Story

HOLD_DOWN_S: Final = 30.0
BLOCKS: Final = 24
"""Blocks of the pool: about twice what the VMs start with, so that ports are short and change hands often."""
BEGIN: Final = 1_000_000.0
PASS_S: Final = (0.2, 0.5, 1.0, 1.0, 2.0, 2.0, 6.0, 6.0, 12.0, 31.0, 60.0, 130.0)
CLOCK_S: Final = (-3600.0, -60.0, -5.0, 5.0, 60.0, 3600.0)

ALL: Final = 1000
"""Messages: more than are ever under way."""
_RULES: Final[PoolRules] = Settings(
    pool=PoolSettings(block=BLOCK, initial=4 * BLOCK, floor=BLOCK, cap=12 * BLOCK, hold_down_s=HOLD_DOWN_S)
).rules()


def vm_of(number: int) -> DomainUUID:
    """Return the UUID of a VM of a story."""
    return DomainUUID(f"00000000-0000-0000-0000-{number:012d}")


ALL_VMS: Final = tuple(vm_of(number) for number in range(1, VMS + 1))


class Network:
    """
    The machines of a site, the sessions between them and the manager, and time.

    :param story: Says how the site is made; its events are for :meth:`do`.
    :param say: Takes who and what, for a transcript; None: nobody reads it.
    """

    def __init__(self, story: Story, say: Callable[[str, str], None] | None = None) -> None:
        self.now = BEGIN
        """True time."""
        self.judge = Judge(HOLD_DOWN_S, self.sends)
        self.externals = [IPv4Address(f"203.0.113.{1 + number}") for number in range(story.externals)]
        self.cpmd = Cpmd(new_ledger(), _RULES, self.judge, say)
        self.machines: dict[str, Machine] = {}
        self.ways: dict[DomainUUID, tuple[str, str]] = {}
        """Migrations under way: from where, and to where."""
        self.copies: dict[DomainUUID, str] = {}
        """Where a second VM runs that has the UUID of one."""
        self.cut_off: set[str] = set()
        """Nodes that cannot reach the manager, nor be reached."""
        self.nodes = names(story.site)
        """The names of all machines, and of those that are hosts and edges."""
        self.hosts, self.edges = names(story.site, Role.HOST), names(story.site, Role.EDGE)
        self._late = story.late
        self._sessions: dict[str, list[Session]] = {name: [] for name in self.nodes}
        """All sessions of which one end is still open."""
        self.is_given_up = False
        """The machine that is broken for good was switched off and fenced."""
        self.liars: set[str] = set()
        """Machines that said what is not so."""
        self.has_old_copy = False
        """An old copy of the ledger is in its place, until the operator accepts it."""
        self._has_restored = self._has_false_edge = False
        self._taps = 0
        self._requests = 0
        self._backup: tuple[sqlite3.Connection, int] | None = None
        """A copy of the ledger, and the highest number of a range in it."""
        self._own: dict[str, set[int]] = {name: set() for name in self.edges}
        self._say = say
        for number, (name, roles) in enumerate(SITES[story.site].items()):
            underlay = IPv4Address(f"172.30.0.{11 + number}")
            identity = Identity(NodeName(name), roles, underlay, "prove", machine=f"the machine {name}")
            self.machines[name] = Machine(identity, self.judge, say)
        self._begin()

    def sends(self, host: str, edge: str) -> bool:
        """Return whether a host's kernel sends packets to an edge; where it is one itself, to no other."""
        if self.machines[host].is_edge:
            return host == edge
        path = self.machines[host].kernel.path
        return path is not None and self.machines[edge].identity.underlay in path.edges

    def _begin(self) -> None:
        self.cpmd.start(self.now)
        each = BLOCKS // len(self.externals)
        usable = PortRange(1024, 1024 + each * BLOCK - 1)
        reserved = PortRange(1024, 65535).minus(usable)
        addresses = [ExternalAddress(address, reserved) for address in self.externals]
        self._ask(lambda manager, now: manager.pool.add_addresses(addresses, now))
        for name, machine in self.machines.items():
            if name != self._late:
                self._approve(name)
            machine.start(self.now)
            machine.carry_out()
            self.connect(name)
        self.settle()

    def _approve(self, name: str) -> bool:
        identity = self.machines[name].identity
        known = self.cpmd.manager.fleet.nodes.get(identity.name) if self.cpmd.manager is not None else None
        if known is not None and known.approval is not None:
            return False
        request = ApprovalRequest(roles=identity.roles, underlay=identity.underlay)
        return self._ask(lambda manager, now: manager.membership.approve(identity.name, request, now))

    # The ordinary run of things

    def first(self, who: str, act: Callable[[str], bool]) -> bool:
        """Do it with this node, or with the next one that has something to do."""
        at = self.nodes.index(who)
        return any(act(name) for name in (*self.nodes[at:], *self.nodes[:at]))

    def deliver_up(self, name: str, count: int, which: int = 0) -> bool:
        """The manager takes messages of one session one after the other, or sees its end."""
        for number in range(count):
            sessions = self._audible(name)
            if not sessions:
                return bool(number)
            self._decide([self._hear(sessions[which % len(sessions)])])
        return True

    def deliver_from_all(self) -> bool:
        """The manager takes the next message of every session, all in one batch."""
        calls = [self._hear(session) for name in self.nodes for session in self._audible(name)]
        self._decide(calls)
        return bool(calls)

    def _audible(self, name: str) -> list[Session]:
        """Return the sessions of a node in which the manager can take a message or see the end."""
        if self.cpmd.manager is None or name in self.cut_off:
            return []
        return [each for each in self._sessions[name] if each.at_manager and (each.up or not each.at_node)]

    def _hear(self, session: Session) -> Call:
        if not session.up:
            return self.cpmd.end(session)
        message = session.up.popleft()
        decoded: NodeMessage = codec.decode_node_message(message)
        if self._say is not None:
            self._say("manager", f"takes {session.node}'s {words.message(decoded)}")
        return self.cpmd.take(session, decoded)

    def _decide(self, calls: list[Call]) -> None:
        try:
            self.cpmd.decide(calls, self.now)
        finally:
            for name in self.nodes:
                self._forget_ended(name)

    def deliver_down(self, name: str, count: int) -> bool:
        """A node takes messages, or sees the end of its session."""
        machine = self.machines[name]
        session = machine.session
        if machine.node is None or machine.is_dying or session is None or name in self.cut_off:
            return False
        if not session.down:
            if session.at_manager:
                return False
            self._end_at_node(name)
            return True
        for _ in range(min(count, len(session.down))):
            message = session.down.popleft()
            decoded: ManagerMessage = codec.decode_manager_message(message)
            if self._say is not None:
                self._say(name, f"takes {words.message(decoded)}")
            try:
                machine.node.on_message(decoded, self._clock(machine))
            except VirtPortsError:
                self._end_at_node(name)
                return True
            machine.carry_out()
        return True

    def kernel(self, name: str) -> bool:
        """A node's kernel carries out its next command."""
        machine = self.machines[name]
        return machine.kernel_step(self._clock(machine), self.now)

    def pass_time(self, seconds: float) -> None:
        """Time passes, and everybody's timers run."""
        self.now += seconds
        for machine in self.machines.values():
            if machine.node is not None:
                now = self._clock(machine)
                machine.node.on_tick(now)
                if machine.is_host and seconds >= 1.0:
                    machine.list_domains(now)
                machine.carry_out()
        if self.cpmd.manager is not None:
            self.cpmd.ask(Manager.tick, self.now, is_change=False)

    def settle(self) -> bool:
        """Everything that is under way arrives; what reaches the manager at the same time is decided together."""
        has_moved = False
        while True:
            moved = self.deliver_from_all()
            for name in self.nodes:
                while self.deliver_down(name, ALL):
                    moved = True
                while self.kernel(name):
                    moved = True
            if not moved:
                return has_moved
            has_moved = True

    def _clock(self, machine: Machine) -> float:
        return self.now - machine.booted

    def _ask(self, act: Callable[[Manager, float], object]) -> bool:
        """An operator asks; a refusal is an answer."""
        if self.cpmd.manager is None:
            return False
        self.cpmd.ask(act, self.now)
        return True

    # Sessions and processes

    def connect(self, name: str) -> bool:
        """A node begins a session, if it has none and can reach the manager."""
        machine = self.machines[name]
        if machine.node is None or machine.session is not None or self.cpmd.manager is None or name in self.cut_off:
            return False
        machine.session = session = Session(machine.name)
        self._sessions[name].append(session)
        machine.node.on_connected(self._clock(machine))
        machine.carry_out()
        return True

    def _end_at_node(self, name: str) -> None:
        machine = self.machines[name]
        assert machine.session is not None
        machine.session.at_node = False
        machine.session.down.clear()
        machine.session = None
        if machine.node is not None:
            machine.node.on_disconnected(self._clock(machine))
            machine.carry_out()
        self._forget_ended(name)

    def _lose_at_node(self, name: str, kept: int) -> bool:
        session = self.machines[name].session
        if session is None:
            return False
        while len(session.up) > kept:
            session.up.pop()
        self._end_at_node(name)
        return True

    def _lose_at_manager(self, name: str, kept: int) -> bool:
        session = next((each for each in self._sessions[name] if each.at_manager and each.said_hello), None)
        if session is None or self.cpmd.manager is None:
            return False
        while len(session.down) > kept:
            session.down.pop()
        self._decide([self.cpmd.end(session)])
        return True

    def _impostor(self, name: str, *, is_same_machine: bool) -> bool:
        """Another machine says that it is this node; whatever the manager sends it is a violation."""
        identity, session = self.machines[name].identity, self.machines[name].session
        node = self.cpmd.manager.fleet.nodes.get(identity.name) if self.cpmd.manager is not None else None
        is_connected = session is not None and session.at_manager and session.said_hello and name not in self.cut_off
        # A machine that is known by nothing else is taken for that node if the node is not connected.
        if node is None or (not is_connected if is_same_machine else not node.machine):
            return False
        impostor = Session(identity.name, is_impostor=True)
        machine = identity.machine if is_same_machine else "another machine"
        hello = Hello(PROTOCOL, identity.name, identity.roles, identity.underlay, "prove", 0, ())
        hello = msgspec.structs.replace(hello, machine=machine, instance="impostor")
        if self._say is not None:
            self._say(name, f"{machine} says that it is this node")
        self._decide([self.cpmd.take(impostor, hello)])
        return True

    def _forget_ended(self, name: str) -> None:
        # One end may be open and have nothing to hear from any more.
        self._sessions[name] = [s for s in self._sessions[name] if s.at_node or s.at_manager]

    def _kill_natd(self, name: str, kept: int) -> bool:
        machine = self.machines[name]
        if machine.node is None:
            return False
        if self._say is not None:
            self._say(name, "natd dies")
        machine.die()
        session = machine.session
        if session is not None:
            while len(session.up) > kept:
                session.up.pop()
            session.at_node = False
            session.down.clear()
            machine.session = None
            self._forget_ended(name)
        return True

    def _start_natd(self, name: str) -> bool:
        machine = self.machines[name]
        if machine.node is not None or not machine.is_on:
            return False
        machine.start(self._clock(machine))
        machine.carry_out()
        return True

    def _kill_cpmd(self) -> bool:
        if self.cpmd.manager is None:
            return False
        if self._say is not None:
            self._say("manager", "cpmd dies")
        self.cpmd.die()
        for name, sessions in self._sessions.items():
            for session in sessions:
                session.at_manager = False
                session.up.clear()
            self._forget_ended(name)
        return True

    def _start_cpmd(self) -> bool:
        if self.cpmd.manager is not None:
            return False
        if self._say is not None:
            self._say("manager", "cpmd starts")
        self.judge.is_unaware = self.has_old_copy
        self.cpmd.start(self.now)
        return True
