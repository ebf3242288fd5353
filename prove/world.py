"""
The simulated site: carries out the events of a story, one after the other.

Everything that happens is decided by the event and by the state of the site; there is no chance here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ipaddress import IPv4Address
from typing import Final

from cpm.core.forwards import ForwardRequest
from cpm.core.manager import Manager
from cpm.core.sizing.sizer import Target
from cpm.protocol import codec
from cpm.protocol.bounds import MAX_FORWARD_PORTS
from cpm.protocol.messages import MapPorts, Need
from cpm.protocol.model import AllocationId, DomainUUID, ForwardProtocol, NodeName, PortRange, Wishes
from natctl.model.own_ports import LocalSocket, OwnInterfaces, PortsInUse, SocketKind
from prove import lies, words
from prove.cpmd import CpmdDied
from prove.guests import Guests
from prove.judge import BLOCK
from prove.machine import Broken
from prove.network import ALL, ALL_VMS, BLOCKS, CLOCK_S, PASS_S, vm_of
from prove.story import Event, Kind
from qga_agent.domain_list import Phase

_BY_GUEST: Final = 3
"""Of four forwards, which the guest asks for."""
_LIFETIME_S: Final = 20
RESTORING_S: Final = 1.001
"""Seconds that it takes to put a copy of the ledger in place. With the milliseconds of other times it never becomes a
whole number of seconds, by which clocks are set: no two restorings show the same time."""
_GUEST: Final = IPv4Address("10.10.0.5")


def _remove_forward(number: AllocationId, manager: Manager, now: float) -> None:
    forward = manager.fleet.allocation(number)
    if forward is not None:
        manager.forwards.remove(forward, now)


class World(Guests):
    """A site to which the events of a story happen."""

    def do(self, event: Event) -> bool:
        """
        Carry out one event; return whether anything happened.

        :raise Violation: When what must never be seen was seen.
        """
        try:
            return _DO[event.kind](self, event)
        except CpmdDied:
            self._kill_cpmd()
            return True
        finally:
            for name, machine in self.machines.items():
                if machine.is_dying:
                    self._kill_natd(name, ALL)

    def mend(self) -> None:
        """Bring everything back but what is broken: machines, processes, libvirt; migrations end, and copies."""
        self._start_cpmd()
        for name, machine in self.machines.items():
            machine.false_hello = None
            machine.refuses, machine.fuse, machine.has_libvirt = 0, None, True
            self._power_on(name)
            self._start_natd(name)
        for uuid in list(self.ways):
            if not self._left(uuid):
                self._abort(uuid, hook=True)
        for number, uuid in enumerate(ALL_VMS):
            if uuid in self.copies:
                self._stop_vm(uuid, hook=True, which=number % 2)
            for name in self.where(uuid):
                if not self.machines[name].guests[uuid].taps:
                    self._plug(uuid)

    @property
    def broken(self) -> str:
        """The machine that is broken for good; empty: there is none."""
        return next((name for name, machine in self.machines.items() if machine.broken is not None), "")

    def give_up(self, name: str) -> None:
        """The operator switches a broken machine off, and says so."""
        self.is_given_up = True
        self.machines[name].broken = Broken.GONE
        self._power_off(name)
        self.settle()
        self._fence(name)

    def approve_all(self) -> None:
        """The operator approves what is not; refused while the ledger cannot be written."""
        for name in self.nodes:
            self._approve(name)

    def lose_session(self, name: str) -> None:
        """A node's session ends."""
        self._lose_at_node(name, ALL)

    def accept(self) -> None:
        """The operator has the ledger that is in place take in what kernels hold."""
        self._kill_cpmd()
        self.judge.on_restoring()
        self._has_restored, self.has_old_copy = True, False
        self.cpmd.ledger.restore(None, self.cpmd.wall(self.now))
        self._start_cpmd()
        if self.is_given_up:
            # That ended the fence.
            self._fence(self.broken)

    # Operators

    def _resize(self, uuid: DomainUUID, n: int) -> bool:
        manager = self.cpmd.manager
        if manager is None or uuid not in manager.fleet.vms:
            return False
        target = Target((n + 1) * BLOCK, manager.sizer.in_use(uuid))
        return self._ask(lambda manager, now: manager.sizer.resize(uuid, target, now))

    def _relocate(self, uuid: DomainUUID) -> bool:
        manager = self.cpmd.manager
        if manager is None or uuid not in manager.fleet.vms:
            return False
        return self._ask(lambda manager, now: manager.sizer.relocate(uuid, now))

    def _forward(self, uuid: DomainUUID, n: int) -> bool:
        manager = self.cpmd.manager
        if manager is None or uuid not in manager.fleet.vms:
            return False
        # A whole block, as all that is judged.
        to = PortRange(9000 + n * BLOCK, 9000 + (n + 1) * BLOCK - 1)
        if n % 4 == _BY_GUEST:
            return self._guest_asks(uuid, to, n)
        asked = ForwardRequest(to=to, guest=_GUEST, is_kept=n % 2 == 0)
        return self._ask(lambda manager, now: manager.forwards.add(manager.fleet.vms[uuid], asked, now))

    def _guest_asks(self, uuid: DomainUUID, to: PortRange, n: int) -> bool:
        """A guest asks for a forward by PCP, which its VM's wish allows from now on."""
        for machine in self.machines.values():
            if machine.session is not None and machine.node is not None and uuid in machine.node.guests():
                asked = MapPorts(uuid, _GUEST, to, ForwardProtocol.TCP, _LIFETIME_S * (n + 1))
                machine.session.up.append(codec.encode(asked))
                return self._ask(lambda manager, now: manager.set_wishes(uuid, Wishes(pcp=MAX_FORWARD_PORTS)))
        return False

    def end_forwards(self, uuid: DomainUUID, *, every: bool = False) -> bool:
        """The operator removes a forward of a VM, or all; return whether there was one."""
        manager = self.cpmd.manager
        of_vm = manager.fleet.forwards_of(uuid) if manager is not None else ()
        mine = [each.id for each in of_vm if each.is_wanted_forward]
        for number in mine if every else mine[:1]:
            self._ask(functools.partial(_remove_forward, number))
        return bool(mine)

    def _need(self, uuid: DomainUUID, n: int) -> bool:
        for machine in self.machines.values():
            if machine.session is None or machine.node is None:
                continue
            vm = machine.node.guests().get(uuid)
            if vm is not None and vm.ports is not None:
                need = Need(uuid, vm.ports, min(60 * n, vm.ports.size), 100.0 * n)
                machine.session.up.append(codec.encode(need))
                return True
        return False

    def _own_ports(self, name: str, n: int) -> bool:
        machine = self.machines[name]
        if machine.node is None:
            return False
        self._own[name] ^= {1024 + (n % BLOCKS) * BLOCK + 7}
        sockets = frozenset(
            LocalSocket(SocketKind.LISTENING, self.externals[0], port, port) for port in self._own[name]
        )
        read = PortsInUse(OwnInterfaces((self.externals[0],)), sockets)
        machine.node.on_own_ports(read, self._clock(machine))
        machine.carry_out()
        return True

    # Machines

    def _fence(self, name: str) -> bool:
        machine, manager = self.machines[name], self.cpmd.manager
        if machine.is_on:
            # Of a machine that answers, the manager does not believe it.
            if machine.broken is not Broken.HANGS or manager is None:
                return False
            if manager.edge_service.is_answering(NodeName(name), self.cpmd.ledger_now(self.now)):
                return False
            machine.isolate(self.now)
        return self._ask(lambda manager, now: manager.fence(NodeName(name), now, fenced=True))

    def _power_off(self, name: str) -> bool:
        machine = self.machines[name]
        if not machine.is_on:
            return False
        self._kill_natd(name, ALL)
        for uuid, guest in list(machine.guests.items()):
            if uuid in self.copies:
                # The other one goes on.
                del self.copies[uuid]
                continue
            source, target = self.ways.get(uuid, (name, name))
            if guest.phase is not Phase.HERE and target == name:
                # It came to nothing, and the guest goes on where it is.
                del self.ways[uuid]
            elif guest.phase is Phase.HERE:
                self._end_flows(uuid)
                if target == name and source != name:
                    self._left(uuid)
        machine.power_off(self.now)
        return True

    def _power_on(self, name: str) -> bool:
        machine = self.machines[name]
        if machine.is_on or machine.broken is Broken.GONE:
            return False
        machine.is_on, machine.booted = True, self.now
        if name in self._own:
            self._own[name].clear()
        return self._start_natd(name)

    def _restore(self, n: int) -> bool:
        if self._has_false_edge:
            return False
        if n % 3 == 2:
            self.accept()
            return True
        if self._backup is None:
            return False
        copy, highest = self._backup
        seen = [machine.remembered.follows.grants for machine in self.machines.values()]
        if n % 3 and highest < self.cpmd.ledger.highest() and highest >= min(seen):
            # Nobody could tell: a node that has seen nothing later takes the copy for the present ledger.
            return False
        self._kill_cpmd()
        self.now += RESTORING_S
        self._has_restored, self.has_old_copy = True, bool(n % 3)
        self.cpmd.kept.forget()
        if n % 3:
            self.cpmd.ledger.put_back(copy, with_lock_file=n % 2 == 1)
        else:
            self.judge.on_restoring()
            self.cpmd.ledger.restore(copy, self.cpmd.wall(self.now))
        return self._start_cpmd()

    def _copy_ledger(self) -> bool:
        self._backup = self.cpmd.ledger.copy(), self.cpmd.ledger.highest()
        return True

    def _set_clock(self, n: int) -> bool:
        self.cpmd.wall_ahead_s += CLOCK_S[n % len(CLOCK_S)]
        return True

    def _reload(self) -> bool:
        if self.cpmd.manager is None:
            return False
        self.cpmd.reload(self.now)
        return True

    def _reboot_manager(self, n: int) -> bool:
        self._kill_cpmd()
        self.now += PASS_S[n]
        self.cpmd.booted = self.now
        return True

    def _lie(self, name: str, uuid: DomainUUID, n: int) -> bool:
        machine = self.machines[name]
        if machine.session is None or machine.node is None:
            return False
        if n % lies.LIES == lies.FALSE_HELLO:
            if machine.is_edge and not self._may_deceive():
                return False
            self._note_liar(name)
            machine.false_hello = lambda truth: lies.hello(truth, uuid)
            self._lose_at_node(name, ALL)
            return self.connect(name)
        tell = lies.tell if machine.is_host else lies.tell_of_edge
        message = tell(n, uuid, machine, self.cpmd.manager)
        if machine.is_edge and lies.is_confirmation(message):
            if not self._may_deceive():
                return False
            self.judge.on_lie_of_edge(name)
        self._note_liar(name)
        if self._say is not None:
            self._say(name, f"lies: {words.message(message)}")
        machine.session.up.append(codec.encode(message))
        return True

    def _may_deceive(self) -> bool:
        """Return whether an edge may lie of what it maps: a restored ledger takes that in, and edges are trusted."""
        self._has_false_edge = not self._has_restored
        return self._has_false_edge

    def _note_liar(self, name: str) -> None:
        """A machine lies; what a host's own VMs suffer from that is not counted."""
        self.liars.add(name)
        if self.machines[name].is_host:
            self.judge.liars.add(name)

    def _refuse(self, name: str, n: int, which: int) -> bool:
        vms = (None, *ALL_VMS)
        self.machines[name].refuses, self.machines[name].refused_vm = n + 1, vms[which % len(vms)]
        return True

    def _break(self, name: str, n: int) -> bool:
        roles = self.machines[name].identity.roles
        others = [machine.identity.roles for other, machine in self.machines.items() if other != name]
        if self.broken or any(all(role not in each for each in others) for role in roles):
            return False
        how = list(Broken)[n % len(Broken)]
        self.machines[name].broken = how
        if how is Broken.GONE:
            self._power_off(name)
        return True

    def _light_natd(self, name: str, n: int) -> bool:
        machine = self.machines[name]
        if machine.node is None:
            return False
        machine.fuse = n
        return True

    def _light_cpmd(self, n: int) -> bool:
        if self.cpmd.manager is None:
            return False
        self.cpmd.fuse = n
        return True

    def _partition(self, name: str) -> bool:
        self.cut_off.add(name)
        return True

    def _heal(self) -> bool:
        had = bool(self.cut_off)
        self.cut_off.clear()
        return had

    def _let_disk_fail(self, n: int, *, is_full: bool) -> bool:
        self.cpmd.fails, self.cpmd.is_full = n + 1, is_full
        return True

    def _let_libvirt(self, name: str, n: int) -> bool:
        self.machines[name].has_libvirt = bool(n % 2)
        return True

    def _flush(self, name: str) -> bool:
        machine = self.machines[name]
        if not machine.is_on:
            return False
        machine.flush()
        return True

    def _measure(self, name: str, n: int) -> bool:
        return self.machines[name].measure(0 if n < 2 else 1 + n % 3, self.now)

    def _present(self, name: str) -> bool:
        machine = self.machines[name]
        machine.ensure(self.now)
        return machine.node is not None

    def _list(self, name: str, n: int) -> bool:
        machine = self.machines[name]
        now = self._clock(machine)
        if n == 0:
            machine.list_domains(now)
            return machine.node is not None
        if n % 2:
            machine.ask_list(now)
            return machine.node is not None
        return machine.take_list(now)

    def _pass(self, n: int) -> bool:
        self.pass_time(PASS_S[n])
        return True


_DO: Final[dict[Kind, Callable[[World, Event], bool]]] = {
    Kind.DELIVER_UP: lambda w, e: (
        w.deliver_from_all() if e.n % 2 else w.first(e.who, lambda name: w.deliver_up(name, e.n // 2 + 1, e.vm))
    ),
    Kind.DELIVER_DOWN: lambda w, e: w.first(e.who, lambda name: w.deliver_down(name, e.n + 1)),
    Kind.KERNEL: lambda w, e: w.first(e.who, lambda name: w.kernel(name)),
    Kind.PASS: lambda w, e: w._pass(e.n),
    Kind.SETTLE: lambda w, e: w.settle(),
    Kind.MEASURE: lambda w, e: w._measure(e.who, e.n),
    Kind.PRESENT: lambda w, e: w._present(e.who),
    Kind.LIST: lambda w, e: w._list(e.who, e.n),
    Kind.START: lambda w, e: w._start_vm(e.who, vm_of(e.vm)),
    Kind.STOP: lambda w, e: w._stop_vm(vm_of(e.vm), hook=True, which=e.n),
    Kind.STOP_UNSEEN: lambda w, e: w._stop_vm(vm_of(e.vm), hook=False, which=e.n),
    Kind.PLUG: lambda w, e: w._plug(vm_of(e.vm)),
    Kind.OPEN: lambda w, e: w.open(vm_of(e.vm), e.n),
    Kind.HOLD_ALL: lambda w, e: w.open(vm_of(e.vm), e.n, whole_range=True),
    Kind.CLOSE: lambda w, e: w.close_flows(vm_of(e.vm), e.n % 3),
    Kind.MIGRATE: lambda w, e: w._migrate(vm_of(e.vm), e.who, e.n % 3),
    Kind.RESUME: lambda w, e: w._resume(vm_of(e.vm), is_seen=e.n % 2 == 0),
    Kind.LEFT: lambda w, e: w._left(vm_of(e.vm)),
    Kind.ABORT: lambda w, e: w._abort(vm_of(e.vm), hook=e.n % 2 == 0),
    Kind.RESIZE: lambda w, e: w._resize(vm_of(e.vm), e.n),
    Kind.RELOCATE: lambda w, e: w._relocate(vm_of(e.vm)),
    Kind.NEED: lambda w, e: w._need(vm_of(e.vm), e.n),
    Kind.OWN_PORTS: lambda w, e: w._own_ports(e.who, e.n),
    Kind.LOSE_AT_NODE: lambda w, e: w._lose_at_node(e.who, e.n),
    Kind.LOSE_AT_MANAGER: lambda w, e: w._lose_at_manager(e.who, e.n),
    Kind.CONNECT: lambda w, e: w.first(e.who, lambda name: w.connect(name)),
    Kind.PARTITION: lambda w, e: w._partition(e.who),
    Kind.HEAL: lambda w, e: w._heal(),
    Kind.KILL_NATD: lambda w, e: w._light_natd(e.who, e.n) if e.n else w._kill_natd(e.who, e.vm),
    Kind.START_NATD: lambda w, e: w.first(e.who, lambda name: w._start_natd(name)),
    Kind.KILL_CPMD: lambda w, e: w._light_cpmd(e.n) if e.n else w._kill_cpmd(),
    Kind.START_CPMD: lambda w, e: w._start_cpmd(),
    Kind.REFUSE: lambda w, e: w._refuse(e.who, e.n % 3, e.n // 3),
    Kind.FLUSH: lambda w, e: w._flush(e.who),
    Kind.POWER_OFF: lambda w, e: w._power_off(e.who),
    Kind.POWER_ON: lambda w, e: w.first(e.who, lambda name: w._power_on(name)),
    Kind.FENCE: lambda w, e: w.first(e.who, w._fence),
    Kind.LIBVIRT: lambda w, e: w._let_libvirt(e.who, e.n),
    Kind.DISK_FULL: lambda w, e: w._let_disk_fail(e.n % 3, is_full=e.vm % 2 == 0),
    Kind.CLOCK: lambda w, e: w._set_clock(e.n),
    Kind.RELOAD: lambda w, e: w._reload(),
    Kind.REBOOT_MANAGER: lambda w, e: w._reboot_manager(e.n),
    Kind.BACKUP: lambda w, e: w._copy_ledger(),
    Kind.RESTORE: lambda w, e: w._restore(e.n),
    Kind.APPROVE: lambda w, e: w.first(e.who, w._approve),
    Kind.COPY: lambda w, e: w._copy(e.who, vm_of(e.vm)),
    Kind.IMPOSTOR: lambda w, e: w._impostor(e.who, is_same_machine=bool(e.n % 2)),
    Kind.BREAK: lambda w, e: w._break(e.who, e.n),
    Kind.FORWARD: lambda w, e: w._forward(vm_of(e.vm), e.n),
    Kind.END_FORWARD: lambda w, e: w.end_forwards(vm_of(e.vm)),
    Kind.LIE: lambda w, e: w._lie(e.who, vm_of(e.vm), e.n),
    Kind.EDGE_LIES: lambda w, e: w._lie(e.who, vm_of(e.vm), e.n),
}
