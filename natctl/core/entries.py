"""
What the kernel of this host should hold of each VM, joined from all that decides it. Pure.

Tested in ``tests/unit/site/test_faults.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address

from msgspec import structs

from cpm.protocol.intent import HostForward, HostIntent
from cpm.protocol.model import DomainUUID, Filtering
from natctl.arrivals.controller import Arrivals
from natctl.core.default_deny import DefaultDeny
from natctl.core.domains import Domains
from natctl.core.indexes import Indexes
from natctl.core.intent import Intent
from natctl.core.unshared import Unshared
from natctl.model.commands import Warn
from natctl.model.entries import MOST_STRANGERS, UNASSIGNED, HostEntry


class Entries:
    """
    Makes entries; reads all that it is given, and changes only the indexes: a VM that needs one gets it.

    :param intent: The manager's intent.
    :param domains: The VMs that run here, with their interfaces and the addresses of their guests.
    :param arrivals: Has the VMs' arrival budgets, which are programmed together with the ports.
    :param default_deny: Which VMs are marked without having ports.
    :param unshared: Which ports are offered to VMs with endpoint-independent filtering.
    """

    def __init__(
        self,
        intent: Intent,
        domains: Domains,
        arrivals: Arrivals,
        default_deny: DefaultDeny,
        unshared: Unshared,
        indexes: Indexes,
    ) -> None:
        self._intent = intent
        self._domains = domains
        self._arrivals = arrivals
        self._default_deny = default_deny
        self._unshared = unshared
        self._indexes = indexes
        self._warnings: list[Warn] = []

    def take_warnings(self) -> list[Warn]:
        """Return the warnings about entries since the last call."""
        warnings, self._warnings = self._warnings, []
        return warnings

    def entry(self, uuid: DomainUUID, before: HostEntry | None, *, keeps_ports: bool) -> HostEntry | None:
        """
        Return the entry that a VM should have; None: none.

        :param before: What the kernel holds of it.
        :param keeps_ports: It gets no other ports than it has in the kernel.
        """
        vm = self._intent_for(uuid, before, keeps_ports=keeps_ports)
        index = self._index(uuid) if vm is not None else None
        if vm is None or index is None:
            return None
        if vm.forwards:
            vm = self._with_guest(vm, before.intent.forwards if before is not None else ())
        return HostEntry(
            vm,
            index,
            self._domains.taps_of(uuid),
            self._arrivals.budget(uuid),
            self._arrivals.defer_after(uuid),
            self._arrivals.allowance(uuid),
            self._unshared.of(vm),
            self._strangers_of(uuid),
        )

    def _intent_for(self, uuid: DomainUUID, before: HostEntry | None, *, keeps_ports: bool) -> HostIntent | None:
        vm = self._intent.host.get(uuid)
        if vm is not None and not keeps_ports:
            return vm.programmed
        return before.intent if vm is not None and before is not None else self._denied_intent(uuid)

    def _denied_intent(self, uuid: DomainUUID) -> HostIntent | None:
        """Return what the kernel holds of a VM that has no ports: a mark, or nothing."""
        domain = self._domains.get(uuid)
        if domain is None or not domain.taps or not self._default_deny.denies(uuid):
            return None
        return HostIntent(uuid, domain.name, UNASSIGNED, None)

    def _index(self, uuid: DomainUUID) -> int | None:
        if (index := self._indexes.assign(uuid)) is None:
            why = f"host.mark_mask tells only {self._indexes.most} VMs apart"
            self._warnings.append(Warn(f"VM {uuid} gets no ports: {why}"))
        return index

    def _with_guest(self, vm: HostIntent, before: Sequence[HostForward]) -> HostIntent:
        """
        Return the same with the guest's address; nothing is let in to one whose address is not known, or not a guest's.

        :param before: What the kernel holds: until natd has looked for the guest, that stays.
        """
        claims, address = self._domains.claims_of(vm.domain), self._domains.address_of(vm.domain)
        wanted = self._intent.host.get(vm.domain)
        # natd has looked at the address when the guest asked from it.
        asked = {each.ports for each in wanted.forwards if each.external is not None} if wanted is not None else set()

        def guest_of(forward: HostForward) -> IPv4Address | None:
            held = {each.guest for each in before if each.ports.covers(forward.ports) and each.guest is not None}
            wished = {forward.guest} if forward.guest is not None else {address} if address is not None else held
            if forward.ports not in asked:
                wished = wished & held if claims is None else set(filter(claims.reach.has, wished))
            return min(wished, default=None)

        forwards = ((each, guest_of(each)) for each in vm.forwards)
        found = tuple(structs.replace(each, guest=guest) for each, guest in forwards if guest is not None)
        return structs.replace(vm, forwards=found)

    def _strangers_of(self, uuid: DomainUUID) -> int:
        """Return how many connections strangers may have to a VM: they leave half of its limit to the VM itself."""
        vm = self._intent.host.get(uuid)
        if vm is None or vm.connections is None or vm.filtering is not Filtering.ENDPOINT_INDEPENDENT:
            return MOST_STRANGERS
        return max(1, min(MOST_STRANGERS, vm.connections // 2))
