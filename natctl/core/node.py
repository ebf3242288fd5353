"""
What a node decides: the pure half of natd.

:class:`Node` is told what happens (a hook calls, a message from the manager arrives, a tap vanishes, the kernel takes a
transaction) and puts commands in an outbox; ``natctl.daemon`` carries them out and reports the result. It never awaits,
logs or reads a clock, so that a whole fleet of these can be driven in virtual time.

What it knows, and its sources:

- *domains* that run here (:mod:`natctl.core.domains`): from hooks, libvirt's list, and at start from what the kernel
  already holds;
- the manager's intent for this host and edge (:mod:`natctl.core.intent`): from its snapshot and deltas;
- what the kernel holds (:mod:`natctl.core.programming`): from the answers to its own commands;
- hooks that wait for ports (:mod:`natctl.core.hook_waiters`): from their requests;
- connections that begin (:mod:`natctl.core.arrival_events`): from the kernel's signals, and from counts;
- ports that this machine, an edge, uses itself (:mod:`natctl.core.own_ports`): from readings.

The entries that the kernel should hold follow from domains, intent and arrivals. They are computed whenever one of
these changes; at most one kernel command is under way, and what changes meanwhile goes into the next one.

Tested in ``tests/unit/natctl/core/test_node_arrivals.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Address

from msgspec import structs

from cpm.protocol.bounds import cut
from cpm.protocol.errors import VirtPortsError
from cpm.protocol.intent import EdgeIntent, HostIntent
from cpm.protocol.messages import (
    PROTOCOL,
    Applied,
    Attach,
    Declined,
    Delta,
    Detach,
    Freed,
    ManagerMessage,
    MapRefused,
    NodeMessage,
    OwnPorts,
    Presence,
    Present,
    Refused,
    RefusedVM,
    Rejected,
    Snapshot,
)
from cpm.protocol.model import DomainUUID, Filtering, PortRange
from natctl.arrivals.controller import Arrivals
from natctl.core import own_ports
from natctl.core.arrival_events import ArrivalEvents
from natctl.core.default_deny import DefaultDeny
from natctl.core.domains import Domain, Domains, Listing, RunningDomain, Tap
from natctl.core.ended import Ended
from natctl.core.entries import Entries
from natctl.core.following import Following
from natctl.core.hook_waiters import HookWaiter, HookWaiters
from natctl.core.identity import Identity
from natctl.core.indexes import Indexes
from natctl.core.intent import Intent
from natctl.core.port_control import PortControl
from natctl.core.programming import InForce, Programming, Scope, is_empty
from natctl.core.reports import Reports
from natctl.core.signal_times import SignalTimes
from natctl.core.unshared import Unshared
from natctl.model.commands import (
    Answer,
    Command,
    Forget,
    Program,
    Prune,
    Send,
    Warn,
)
from natctl.model.entries import HostEntry, Path
from natctl.model.guest_claims import Claims
from natctl.model.own_ports import PortsInUse
from natctl.model.remembered import NOTHING, Remembered
from qga_agent.domain_list import Phase

NOT_LISTED = (
    "libvirt has not listed its domains since natd began: VMs that have ended keep their ports, and VMs of which natd "
    "has not heard get none; see natd's log"
)
"""What the operator should know."""


class Node:
    """
    One node. Methods named ``on_…`` are its inputs: they are given the time and fill the outbox, see :meth:`take`.

    :param identity: This node.
    :param marks: How many VMs the packet mark can distinguish on this host.
    :param has_libvirt: libvirt's list says which VMs end without a hook, and none does while libvirt cannot be asked.
        Otherwise their interfaces say so.
    :param remembered: Whom it follows, from before.
    """

    def __init__(
        self, identity: Identity, marks: int, *, has_libvirt: bool = False, remembered: Remembered = NOTHING
    ) -> None:
        self._outbox: list[Command] = []
        self._identity = identity
        self._has_libvirt = has_libvirt
        self._domains = Domains(are_listed=has_libvirt)
        self._reported_gone: set[DomainUUID] = set()
        self._ended = Ended()
        self._intent = Intent()
        self._arrivals = Arrivals()
        self._default_deny = DefaultDeny(remembered.charge, is_listed=not has_libvirt)
        unshared, indexes = Unshared(), Indexes(marks)
        entries = Entries(self._intent, self._domains, self._arrivals, self._default_deny, unshared, indexes)
        self._programming = Programming(self._intent, self._domains, self._default_deny, entries, indexes)
        self._hook_waiters = HookWaiters(self._domains, self._programming)
        self.signal_times = SignalTimes()
        """For metrics; the owner says when a request for more ports was sent."""
        self.arrival_events = ArrivalEvents(
            self._intent, self._programming, self._arrivals, self.signal_times, self._outbox
        )
        """Inputs: signals and counts of connections."""
        self.reports = Reports(self._intent, self._programming, self._domains, self._arrivals, unshared, self._send)
        """Tells the manager what was measured."""
        self.port_control = PortControl(self._intent, self._programming, self._domains, self._send)
        """Guests that ask for ports."""
        self._own_ports = own_ports.OwnPorts()
        self._is_connected = False
        self._is_synced = False
        self._following = Following(remembered)
        self._generation = 0

    # Queries

    @property
    def in_force(self) -> InForce:
        """The last generation that the kernel holds. What was counted under another one says nothing of this one."""
        return self._programming.in_force

    @property
    def epoch(self) -> int:
        """Highest epoch seen."""
        return self._following.epoch

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the operator should know about the VMs of this machine together, a sentence each."""
        unlisted = "" if self._domains.are_all_known else NOT_LISTED
        return tuple(filter(None, (unlisted, self.arrival_events.warning, self._default_deny.warning)))

    @property
    def is_connected(self) -> bool:
        """Whether there is a session with the manager."""
        return self._is_connected

    def taps(self) -> dict[DomainUUID, frozenset[str]]:
        """Return the interfaces of each VM that runs here."""
        return self._domains.taps()

    def known_domains(self) -> frozenset[DomainUUID]:
        """Return all domains that run here or migrate here."""
        return self._domains.known()

    def guests(self) -> dict[DomainUUID, HostIntent | None]:
        """Return the VMs that run here, each with what it shall have; None: the manager has not said."""
        return {uuid: self._intent.host.get(uuid) for uuid in self._domains.guests()}

    def guests_to_find(self) -> dict[DomainUUID, frozenset[int]]:
        """Return the interfaces of the VMs with forwards: where their guests are is to be found, and followed."""
        return {
            uuid: taps
            for uuid, vm in self._intent.host.items()
            if vm.forwards and (taps := self._domains.taps_of(uuid))
        }

    @property
    def has_guests_to_find(self) -> bool:
        """Whether there is a VM with forwards for whose guest nobody has looked yet."""
        return any(self._domains.claims_of(uuid) is None for uuid in self.guests_to_find())

    def held_ports(self, internal: IPv4Address) -> tuple[PortRange, ...]:
        """Return the ports on which connections of the VM with this internal address may be; none: there is none."""
        return next((vm.held for vm in self._intent.host.values() if vm.internal == internal), ())

    @property
    def has_leaving_mappings(self) -> bool:
        """Whether a socket that anybody reaches may have a port of a range that drains."""
        return any(vm.draining and vm.filtering is Filtering.ENDPOINT_INDEPENDENT for vm in self._intent.host.values())

    def take(self) -> list[Command]:
        """Return the commands to carry out now, in order, and empty the outbox."""
        self._begin_programming()
        commands = self._outbox.copy()
        self._outbox.clear()
        return commands

    # The kernel

    def on_kernel_found(
        self,
        entries: Iterable[HostEntry],
        path: Path | None,
        links: Mapping[int, str],
        now: float,
        at_edge: Iterable[EdgeIntent] = (),
    ) -> None:
        """
        Start from what the kernel already holds: VMs whose interfaces exist go on running.

        Their marks are kept, so that nothing they send is interrupted by a restart of natd. A VM without interfaces may
        run as well: that is for libvirt's list to say. So may one whose interfaces are all gone, and it may have ended
        and begun again.

        :param links: The interfaces of this machine, names by index.
        :param at_edge: The VMs whose ports this edge maps.
        """
        # The manager may be reached in a moment.
        self._hook_waiters.on_disconnected(now)
        self.port_control.on_disconnected(now)
        for vm in at_edge:
            self._programming.edge_holdings.adopt(vm)
            self._intent.adopt_at_edge(vm)
        if path is not None:
            self._intent.adopt_path(path)
            self._programming.adopt_path()
        elif (charge := self._default_deny.charge) is not None:
            # The machine was restarted, and VMs may start before the manager is there.
            self._intent.path = charge.path
        for entry in entries:
            self._programming.adopt(entry)
            taps = frozenset(Tap(links[index], index) for index in entry.taps if index in links)
            if not entry.is_denied:
                self._intent.adopt(entry, is_same_life=bool(taps))
            self._arrivals.on_found(entry, now)
            if taps or self._has_libvirt:
                self._domains.adopt(entry.intent.domain, entry.intent.name, taps, now)
            if len(taps) != len(entry.taps):
                self._programming.require_hosts([entry.intent.domain])
        self._note_charge()

    def on_guest_addresses(self, found: Mapping[DomainUUID, Claims]) -> None:
        """Record what is known of guests' addresses; one of which nothing is found keeps its address."""
        self._programming.require_hosts(
            uuid for uuid in self._domains.on_claims(found) if self._intent.host.get(uuid) is not None
        )

    def on_kernel_programmed(self, now: float) -> None:
        """The last kernel command is in force."""
        if (done := self._programming.on_programmed()) is None:
            return
        scope, in_force, begun = done
        # Before anything else: libvirt waits for it.
        self._outbox += self._hook_waiters.answer_ready()
        # Before any message about the ports that are in force now.
        self._confirm()
        for entry in in_force:
            self.arrival_events.on_programmed(entry, now)
        self.port_control.on_programmed(None if scope.replace else scope.host)
        for vm in filter(None, (self._intent.host.get(entry.intent.domain) for entry in begun)):
            # Connections of before it stopped may go on, on the ports that it got back; on others they never will.
            self._outbox.append(Prune(vm.internal))
        if begun or scope.replace or scope.path:
            self._note_charge()
        self._outbox += self._hook_waiters.answer_in_vain(now)

    def on_kernel_refused(self, error: VirtPortsError, now: float) -> None:
        """The kernel refused the last command; nothing of it is in force."""
        if (refusal := self._programming.on_refused(cut(str(error)), now)) is None:
            return
        scope, vms = refusal
        if vms is None:
            self._outbox.append(Warn(f"{error}"))
            if scope.generation is not None:
                # The manager must not believe it; it answers with a new snapshot.
                self._send(Rejected(self.epoch, scope.generation, error.code, cut(str(error))))
            self._outbox += self._hook_waiters.answer(error.code, str(error), None if scope.replace else scope.host)
            return
        for uuid in vms:
            self._outbox.append(Warn(f"the kernel refuses VM {uuid}, all others go on: {error}"))
        self._outbox += self._hook_waiters.answer(error.code, str(error), vms)
        self._confirm()

    # The manager

    def on_connected(self, now: float) -> None:
        """There is a session with the manager."""
        self._is_connected = True
        self._is_synced = False
        self._ended.on_connected()
        self._arrivals.on_connected()
        self._hook_waiters.on_connected()
        self._send(
            self._identity.hello(
                self._following.remembered,
                self._present(),
                self._own_ports.told,
                self._programming.held_by_host(),
                self._programming.edge_holdings.told(),
            )
        )
        self._programming.on_introduced()
        self.port_control.on_connected(now)
        for uuid, domain in self._domains.incoming_domains():
            self._request_ports(uuid, domain)

    def on_disconnected(self, now: float) -> None:
        """
        The session is gone, or an attempt to connect failed. Everything that runs goes on; hooks that wait for ports
        are answered unless the manager may be back in a moment.
        """
        self.arrival_events.emit(self._arrivals.on_disconnected(now))
        if self._is_connected:
            self._hook_waiters.on_disconnected(now)
        self._is_connected = False
        self._is_synced = False
        self.port_control.on_disconnected(now)
        # Generations count within a session: the next one must not be told of these.
        self._programming.drop_generations()
        self._outbox += self._hook_waiters.answer_in_vain(now)

    def on_message(self, message: ManagerMessage, now: float) -> None:
        """
        Follow a message of the manager.

        :raise VirtPortsError: When it is not of the manager that this node follows (:mod:`natctl.core.following`); the
            session is to be closed.
        """
        self._following.on_message(message)
        # Before anything of it reaches the kernel.
        self._outbox += self._following.take_changes()
        if isinstance(message, Snapshot):
            self._take_snapshot(message, now)
        elif isinstance(message, Delta):
            self._take_delta(message, now)
        elif isinstance(message, Refused):
            self._take_refusal(message, now)
        elif isinstance(message, Declined):
            self.arrival_events.on_turned_down(message.domain, now, message.ports)
        elif isinstance(message, MapRefused):
            self.port_control.on_refused(message, now)
        elif isinstance(message, Freed):
            self._outbox.append(Forget(message.internal))
            self._programming.indexes.on_freed(message.domain, now)
        elif message.protocol != PROTOCOL:
            self._outbox.append(
                Warn(f"the manager speaks protocol {message.protocol}, we {PROTOCOL}; upgrade the older")
            )
        self._outbox += self._hook_waiters.answer_ready()

    def _take_snapshot(self, snapshot: Snapshot, now: float) -> None:
        snapshot = structs.replace(snapshot, host=self._ended.of_this_life(snapshot.host, snapshot.detached))
        for uuid in self._intent.host.keys() - {vm.domain for vm in snapshot.host}:
            self._arrivals.on_gone(uuid)
        for vm in snapshot.host:
            self._arrivals.on_vm(vm, now)
        self._intent.replace(snapshot)
        self._is_synced = True
        self._reported_gone.clear()
        self._generation = snapshot.generation
        self._programming.on_snapshot()
        self._programming.require(Scope(replace=True, generation=snapshot.generation))

    def _take_delta(self, delta: Delta, now: float) -> None:
        if not self._is_synced or delta.generation != self._generation + 1:
            self._is_synced = False
            self._send(Rejected(self.epoch, delta.generation, "gap", f"generation {self._generation + 1} was expected"))
            return
        self._generation = delta.generation
        delta = structs.replace(delta, host=self._ended.of_this_life(delta.host, delta.detached))
        for vm in delta.host:
            self._arrivals.on_vm(vm, now)
        self._intent.apply(delta)
        for uuid in delta.host_gone:
            self._arrivals.on_gone(uuid)
            if (domain := self._domains.get(uuid)) is not None and uuid in self._reported_gone:
                # It stopped and started again before the manager knew of either. (One that we did not report as gone
                # has moved to another host; the hook follows soon.)
                self._request_ports(uuid, domain)
            self._reported_gone.discard(uuid)
        self._programming.require(
            Scope(
                host={vm.domain for vm in delta.host} | set(delta.host_gone),
                edge={vm.domain for vm in delta.edge} | set(delta.edge_gone),
                path=delta.path is not None,
                generation=delta.generation,
            )
        )

    def _take_refusal(self, refusal: Refused, now: float) -> None:
        self._outbox.append(Warn(f"VM {refusal.domain}: {refusal.message}"))
        self.arrival_events.on_turned_down(refusal.domain, now)
        self._outbox += self._hook_waiters.answer(refusal.code, refusal.message, {refusal.domain})

    # Domains

    def on_domain_starting(self, request: int | None, vm: RunningDomain, now: float) -> None:
        """
        A hook says that a domain starts or runs (``prepare``, ``start``, ``started``, ``attach``, ``reconnect``).

        Answers the request, when there is one, as soon as the kernels on the path hold its ports, and this one its
        taps; at once when it is migrating here (its ports follow when it runs) or when there is no session with a
        manager.
        """
        domain, changed = self._domains.on_hook(vm, now)
        self._programming.require_hosts(changed)
        if request is None:
            self._request_ports(vm.domain, domain)
        elif domain.is_incoming:
            self._outbox.append(Answer(request, "", "migrating; ports follow when it runs here"))
        else:
            self._hook_waiters.add(HookWaiter(request, vm.domain, now))
            self._request_ports(vm.domain, domain)
            self._outbox += self._hook_waiters.answer_ready()
            self._outbox += self._hook_waiters.answer_in_vain(now)

    def on_domain_incoming(self, request: int, vm: RunningDomain, now: float) -> None:
        """A domain is migrating here (hook ``migrate``); it still runs elsewhere."""
        domain, changed = self._domains.on_hook(vm, now)
        self._programming.require_hosts(changed)
        domain.is_incoming, domain.has_run = True, False
        self._request_ports(vm.domain, domain)
        self._outbox.append(Answer(request, "", "expected"))

    def on_domain_unmanaged(self, request: int, uuid: DomainUUID, now: float) -> None:
        """A hook says that a domain starts without an interface of ours; what it was given before it knew is free."""
        domain = self._domains.get(uuid)
        if domain is not None and not domain.had_taps and not domain.is_incoming:
            self.on_domain_ended(None, uuid, "it has no interface on our bridges", now)
        self._outbox.append(Answer(request, "", "no interface of ours"))

    def on_domain_ended(self, request: int | None, uuid: DomainUUID, reason: str, now: float) -> None:
        """A domain is gone from this host (hooks ``stopped`` and ``release``, or libvirt no longer lists it)."""
        self.signal_times.forget(uuid)
        is_named = not self._domains.are_all_known and uuid in self._intent.host
        if self._domains.remove(uuid, now) or is_named:
            self._default_deny.on_ended([uuid])
            self._keep_charge()
            # Host first: it stops handing the ports out before the manager and the edges know.
            if self._intent.host.pop(uuid, None) is not None:
                self._arrivals.on_gone(uuid)
                self._reported_gone.add(uuid)
            self._programming.require_hosts([uuid])
            if self._is_connected:
                self._ended.on_detach(uuid)
            self._send(Detach(uuid, cut(reason)))
        if request is not None:
            self._outbox.append(Answer(request, "", "released"))

    def on_domains_listed(self, listing: Listing, now: float) -> None:
        """
        Compare with libvirt's list, which has the last word on which domains there are and where their guests run.

        It makes up for hooks and events that were missed, and brings interfaces that were plugged in and wishes that
        changed.
        """
        unmanaged, were_all_known = self._domains.unmanaged(), self._domains.are_all_known
        self._domains.note_unmanaged(listing)
        has_news = False
        for vm in listing.domains:
            has_news |= self._domains.has_new_wishes(vm)
            self._take_listed(vm, listing, now)
        for uuid in self._domains.ended(listing):
            self.on_domain_ended(None, uuid, "libvirt no longer lists it", now)
        self._domains.note_listed(listing)
        self._default_deny.on_listed(listing)
        if self._default_deny.charge is None:
            self._note_charge()
        else:
            self._keep_charge()
        has_news |= self._domains.are_all_known and not were_all_known
        if has_news or self._domains.unmanaged() != unmanaged:
            self.send_presence()

    def _take_listed(self, vm: RunningDomain, listing: Listing, now: float) -> None:
        before = self._domains.get(vm.domain)
        was = (before.is_incoming, before.had_taps) if before is not None else None
        domain, changed = self._domains.on_listed(vm, listing, now)
        if domain is None:
            return
        self._programming.require_hosts(changed)
        if vm.phase is Phase.HERE and not vm.has_interface and not domain.had_taps:
            self.on_domain_ended(None, vm.domain, vm.why_not or "it has no interface on our bridges", now)
        elif was != (domain.is_incoming, domain.had_taps):
            self._request_ports(vm.domain, domain)

    def on_links(self, links: Mapping[int, str], now: float) -> None:
        """The network interfaces of this machine changed; ``links`` has all of them now, names by index."""
        self._programming.require_hosts(self._domains.on_links(links, now))

    def on_tick(self, now: float) -> None:
        """Do what only time makes due: VMs without interfaces, hooks that wait, a kernel that refused, arrivals."""
        for uuid in () if self._has_libvirt else self._domains.without_taps(now):
            self.on_domain_ended(None, uuid, "its interfaces are gone", now)
        self._outbox += self._hook_waiters.answer_late(now)
        self._outbox += self._hook_waiters.answer_in_vain(now)
        self._programming.on_tick(now)
        self._outbox += map(Warn, self._default_deny.on_tick(self._programming.denied(), now))
        self.arrival_events.emit(self._arrivals.on_tick(now))
        self.port_control.on_tick(now)

    def on_own_ports(self, read: PortsInUse, now: float) -> None:
        """The ports that this machine, an edge, uses itself were read; what changed is told to the manager."""
        if self._own_ports.on_read(read, own_ports.held_by(self._intent.edge.values()), now):
            self._send(OwnPorts(self._own_ports.told))

    def send_presence(self) -> None:
        """Tell the manager again which VMs run here."""
        self._send(self._present())

    # Inside

    def _present(self) -> Present:
        presences = tuple(self._domains.presences(self._intent.host))
        is_partial = not self._domains.are_all_known
        if is_partial:
            # What the manager has given them may be in use.
            given = (vm for uuid, vm in self._intent.host.items() if uuid not in self._domains)
            presences += tuple(Presence(vm.domain, vm.name) for vm in given)
        return Present(presences, self._domains.unmanaged(), is_partial)

    def _confirm(self) -> None:
        """Tell the manager what is in force now, if it does not know."""
        if (confirmation := self._programming.take_confirmation()) is not None:
            refused = tuple(RefusedVM(uuid, reason) for uuid, reason in sorted(confirmation.refused.items()))
            self._send(Applied(self.epoch, confirmation.generation, refused))

    def _send(self, message: NodeMessage) -> None:
        if self._is_connected:
            self._outbox.append(Send(message))

    def _request_ports(self, uuid: DomainUUID, domain: Domain) -> None:
        """Tell the manager of a domain that runs here and lacks ports, or that migrates here."""
        vm = self._intent.host.get(uuid)
        if domain.is_incoming:
            self._send(Attach(uuid, domain.name, incoming=True, wishes=domain.wishes))
        elif vm is None or vm.ports is None or not self._is_synced:
            self._send(Attach(uuid, domain.name, wishes=domain.wishes))

    def _note_charge(self) -> None:
        """Keep what the kernel holds now of which VMs may send nothing without ports depends."""
        self._default_deny.on_programmed(self._intent.path, self._programming.with_ports(), self._domains.known)
        self._keep_charge()

    def _keep_charge(self) -> None:
        self._following.on_charge(self._default_deny.charge)
        self._outbox += self._following.take_changes()

    def _begin_programming(self) -> None:
        """Emit the next kernel command, if one is needed, possible, and none is under way."""
        while commands := self._programming.begin():
            self._outbox += commands
            command = commands[-1]
            if not isinstance(command, Program) or not is_empty(command):
                return
            # No change for the kernel, for example ranges that now drain: confirm at once.
            self._outbox.pop()
            self.on_kernel_programmed(0.0)
