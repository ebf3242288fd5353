"""The VMs of a simulated site: starts, ends and migrations in any order, and the connections that they open."""

from __future__ import annotations

import functools
from ipaddress import IPv4Address

from cpm.core.twins import twin_of
from cpm.protocol.model import DomainUUID, NodeName, PortRange
from natctl.core.domains import Tap
from prove.judge import BLOCK, Flow, Violation
from prove.machine import Guest, Machine
from prove.network import Network
from qga_agent.domain_list import Phase


class Guests(Network):
    """A site with VMs."""

    def where(self, uuid: DomainUUID) -> list[str]:
        """Return the machines that have a VM; two while it migrates. Where a copy of it is does not count."""
        copy = self.copies.get(uuid)
        return [name for name, machine in self.machines.items() if uuid in machine.guests and name != copy]

    def _new_taps(self, uuid: DomainUUID) -> frozenset[Tap]:
        self._taps += 1
        return frozenset({Tap(f"vnet{uuid[-1:]}", self._taps)})

    def _request(self) -> int:
        self._requests += 1
        return self._requests

    def _start_vm(self, name: str, uuid: DomainUUID) -> bool:
        machine = self.machines[name]
        if self.where(uuid) or not machine.is_on:
            return False
        return self._begin_guest(machine, uuid)

    def _copy(self, name: str, uuid: DomainUUID) -> bool:
        """A second VM with the same UUID begins."""
        machine, names = self.machines[name], self.where(uuid)
        if len(names) != 1 or name in names or uuid in self.copies or uuid in self.ways or not machine.is_on:
            return False
        self.copies[uuid] = name
        return self._begin_guest(machine, uuid)

    def _begin_guest(self, machine: Machine, uuid: DomainUUID) -> bool:
        machine.guests[uuid] = Guest(frozenset())
        machine.give_taps(uuid, self._new_taps(uuid), self._clock(machine))
        if machine.node is not None:
            vm = machine.running(uuid)
            machine.node.on_domain_starting(self._request(), vm, self._clock(machine))
            machine.carry_out()
        return True

    def _stop_vm(self, uuid: DomainUUID, *, hook: bool, which: int = 0) -> bool:
        """A VM ends; if there is a copy: which = 0, 3, …: the first one; 1, 4, …: the copy; 2, 5, …: both."""
        names, copy = self.where(uuid), self.copies.get(uuid)
        if copy is not None:
            names = {0: names, 1: [copy]}.get(which % 3, [*names, copy])
        self.ways.pop(uuid, None)
        for name in names:
            machine = self.machines[name]
            self._end_flows(uuid, name)
            machine.ended(uuid, self._clock(machine), hook=hook)
            self._forget_copy(uuid, name)
        return bool(names)

    def _forget_copy(self, uuid: DomainUUID, name: str) -> None:
        """A VM is gone from a machine: if there were two, there is one, which is no copy any more."""
        if self.copies.get(uuid) == name or not self.where(uuid):
            self.copies.pop(uuid, None)

    def _plug(self, uuid: DomainUUID) -> bool:
        names = self.where(uuid)
        if len(names) != 1:
            return False
        machine = self.machines[names[0]]
        taps = frozenset[Tap]() if machine.guests[uuid].taps else self._new_taps(uuid)
        machine.give_taps(uuid, taps, self._clock(machine))
        if machine.node is not None:
            machine.list_domains(self._clock(machine))
            machine.carry_out()
        return True

    def _migrate(self, uuid: DomainUUID, to: str, hooks: int) -> bool:
        names, machine = self.where(uuid), self.machines[to]
        if len(names) != 1 or to in names or uuid in self.copies or not machine.is_on:
            return False
        source = self.machines[names[0]].guests[uuid]
        if not source.taps or source.phase is not Phase.HERE:
            return False
        self.ways[uuid] = (names[0], to)
        machine.guests[uuid] = Guest(frozenset(), Phase.MIGRATING)
        machine.give_taps(uuid, self._new_taps(uuid), self._clock(machine))
        if machine.node is not None and hooks != 1:
            vm, now = machine.running(uuid), self._clock(machine)
            if hooks == 0:
                machine.node.on_domain_incoming(self._request(), vm, now)
            machine.node.on_domain_starting(self._request(), vm, now)
            machine.carry_out()
        return True

    def _resume(self, uuid: DomainUUID, *, is_seen: bool) -> bool:
        if (way := self.ways.get(uuid)) is None:
            return False
        machine = self.machines[way[1]]
        guest = machine.guests.get(uuid)
        if guest is None or guest.phase is Phase.HERE:
            return False
        self._end_flows(uuid)
        guest.phase = Phase.HERE
        if (source := self.machines[way[0]].guests.get(uuid)) is not None:
            source.phase = Phase.MIGRATING
        if is_seen:
            machine.list_domains(self._clock(machine))
            if machine.node is not None:
                machine.carry_out()
        return True

    def _left(self, uuid: DomainUUID) -> bool:
        if (way := self.ways.get(uuid)) is None:
            return False
        guest = self.machines[way[1]].guests.get(uuid)
        if guest is None or guest.phase is not Phase.HERE:
            return False
        del self.ways[uuid]
        source = self.machines[way[0]]
        if uuid in source.guests:
            source.ended(uuid, self._clock(source), hook=True)
        return True

    def _abort(self, uuid: DomainUUID, *, hook: bool) -> bool:
        if (way := self.ways.get(uuid)) is None:
            return False
        machine = self.machines[way[1]]
        guest = machine.guests.get(uuid)
        if guest is not None and guest.phase is Phase.HERE:
            return False
        del self.ways[uuid]
        if guest is not None:
            machine.ended(uuid, self._clock(machine), hook=hook)
        return True

    def _end_flows(self, uuid: DomainUUID, host: str = "") -> None:
        for flow in self.judge.flows(uuid):
            if host in ("", flow.host):
                self.judge.on_end(flow, self.now)

    def open(self, uuid: DomainUUID, offset: int, *, whole_range: bool = False) -> bool:
        """A VM opens a connection, as its host's and an edge's kernels let it; or connections on its whole range."""
        machines = list(self.machines.values())
        for machine in machines if offset % 2 else reversed(machines):
            entry = machine.kernel.host.get(uuid)
            guest = machine.guests.get(uuid)
            if guest is None or guest.phase is not Phase.HERE or entry is None or entry.intent.ports is None:
                continue
            if not any(tap.number in entry.taps for tap in guest.taps):
                continue
            ports = entry.intent.ports
            blocks = range(ports.first, ports.last + 1, BLOCK)
            if whole_range:
                guest.busy = True
                opened = [self._open_one(machine, uuid, PortRange(first, first + BLOCK - 1)) for first in blocks]
                if machine.node is not None and entry.budget is not None:
                    machine.node.arrival_events.on_budget_used_up(entry.index, self._clock(machine))
                    machine.carry_out()
                return any(opened)
            port = blocks[offset % len(blocks)] + offset % BLOCK
            return self._open_one(machine, uuid, PortRange(port, port))
        return False

    def _open_one(self, machine: Machine, uuid: DomainUUID, ports: PortRange) -> bool:
        entry = machine.kernel.host[uuid]
        of_vm = (flow for flow in machine.flows if flow.guest == uuid and flow.ended is None)
        if machine.is_isolated or any(flow.ports == ports for flow in of_vm):
            return False
        let_through: dict[str, tuple[DomainUUID, IPv4Address]] = {}
        for edge in self._edges_that_count():
            # One that sends to another host, as it did last, passes nothing that comes back.
            vm = edge.mapped_as(_names(uuid, machine.name), entry.intent.internal, machine.identity.underlay)
            found = next((each.external for each in vm.ranges if each.ports.covers(ports)), None) if vm else None
            if vm is not None and found is not None:
                let_through[edge.name] = vm.domain, found
        sent_to = [name for name, edge in self.machines.items() if edge.forwards and self.sends(machine.name, name)]
        passes = [name for name in sent_to if name in let_through]
        for name in sent_to:
            # Where no kernel has the VM, one that refuses it may be in service for others.
            is_refused = not let_through and not self.machines[name].refused.isdisjoint(_names(uuid, machine.name))
            if name not in passes and not is_refused and not self._may_drop(self.machines[name], machine, uuid):
                self.judge.on_not_mapped(machine.name, uuid, ports, name)
        if not passes:
            return False
        if len(set(let_through.values())) > 1:
            raise Violation(f"edges map ports {ports} of vm{uuid[-1:]} to {let_through}")
        (domain, external), via = let_through[passes[0]], machine.identity.underlay
        flow = Flow(domain, machine.name, via, entry.intent.internal, entry.index, external, ports, uuid)
        self.judge.on_begin(flow, passes, self.now)
        machine.flows.add(flow)
        return True

    def _edges_that_count(self) -> list[Machine]:
        """Return the machines through which packets pass if they map the ports."""
        return [each for each in self.machines.values() if each.forwards and each.name not in self.judge.lying_edges]

    def _may_drop(self, edge: Machine, host: Machine, uuid: DomainUUID) -> bool:
        """Return whether it is no fault of ours that an edge drops what a VM sends."""
        names = _names(uuid, host.name)
        if not edge.forgotten.isdisjoint(names):
            return True
        # What the host's kernel holds is from before the VM went elsewhere and came back; its natd does not run, or has
        # begun anew and knows no more.
        return (host.node is None or host.knows_kernel_only) and edge.mapped_at(names) not in (
            None,
            host.identity.underlay,
        )

    def close_flows(self, uuid: DomainUUID, some: int = 0) -> bool:
        """A VM closes its connections; ``some``: only those with an odd or even block."""
        flows = self.judge.flows(uuid)
        for flow in flows:
            if not some or (flow.ports.first // BLOCK) % 2 == some % 2:
                self.judge.on_end(flow, self.now)
        for machine in self.machines.values():
            if uuid in machine.guests:
                machine.guests[uuid].busy = False
        return bool(flows)


@functools.cache
def _names(uuid: DomainUUID, host: str) -> tuple[DomainUUID, DomainUUID]:
    """Return what edges may call a VM of a host."""
    return uuid, twin_of(uuid, NodeName(host))
