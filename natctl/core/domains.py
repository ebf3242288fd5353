"""
The domains (libvirt's) that run on this node, from hooks, libvirt's list and the interfaces of the machine: pure.

libvirt's list is a level: it says which domains there are and whether their guests run here, however many hooks and
events were missed. It alone says that a domain ended without a hook. Hooks are hints that make a change quick, and the
interfaces only say which packets to mark: a domain keeps what it has while it has none.

Domains that libvirt does not know (a hook announced them, the list has never had them) end when their interfaces do.

Tested in ``tests/unit/site/test_levels.py``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Container, Iterator, Mapping
from ipaddress import IPv4Address
from typing import NamedTuple

from cpm.protocol.bounds import cut
from cpm.protocol.messages import AddressSource, Presence, Unmanaged
from cpm.protocol.model import DomainUUID, Wishes
from natctl.model.guest_claims import Claims
from qga_agent.domain_list import Phase

TAP_GRACE_S = 3.0
"""Seconds for which a VM that libvirt does not list may be without interfaces before it counts as gone."""

START_GRACE_S = 60.0
"""Seconds between ``prepare`` and the first interface, the longest a VM may take to start where nothing is listed."""

LIST_GRACE_S = 10.0
"""Seconds after its last hook that a VM may be missing in libvirt's list: between two hooks libvirt may not list it."""


class Tap(NamedTuple):
    """An interface of a VM on this host."""

    name: str
    number: int
    """Its interface index, which no later interface gets; names are reused."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunningDomain:
    """A domain that runs here, as a hook or libvirt describes it."""

    domain: DomainUUID
    name: str
    taps: frozenset[Tap] = frozenset()
    wishes: Wishes | None = None
    """From its XML; None: not read."""
    phase: Phase = Phase.HERE
    """As libvirt lists it; of no meaning in a hook."""
    has_interface: bool = True
    """It has an interface that we care for, whether or not there is a tap yet."""
    why_not: str = ""
    """Why it has none although its XML names some."""


@dataclasses.dataclass(frozen=True, slots=True)
class Listing:
    """What libvirt listed."""

    asked_at: float
    """When libvirt was asked: what a hook said later is news to the list."""
    domains: tuple[RunningDomain, ...]
    absent: frozenset[DomainUUID] | None = None
    """Domains that do not run here; None: all that are not in ``domains``."""
    undescribed: frozenset[DomainUUID] = frozenset()
    """Domains that run here, whose XML cannot be read."""

    def is_without(self, uuid: DomainUUID) -> bool:
        """Whether it says that a domain does not run here."""
        if self.absent is not None:
            return uuid in self.absent
        return uuid not in self.undescribed and all(vm.domain != uuid for vm in self.domains)


@dataclasses.dataclass(slots=True)
class Domain:
    """What is known of a domain that runs here."""

    name: str
    taps: frozenset[Tap] = frozenset()
    wishes: Wishes | None = None
    is_incoming: bool = False
    """It migrates here and still runs elsewhere."""
    has_run: bool = False
    """Its guest was seen to run here; when it migrates then, it migrates away."""
    is_listed: bool = False
    """libvirt's list has had it."""
    had_taps: bool = False
    no_taps_since: float | None = None
    """Since when none of its interfaces exists; None: one does."""
    hook_at: float = -math.inf
    """When a hook told of it last."""
    claims: Claims | None = None
    """What is known of its guest's address; None: nobody has looked."""
    address: IPv4Address | None = None
    """Of the guest, as far as anything on this host tells; None: not known."""
    address_source: AddressSource | None = None
    """Who has said so."""


class Domains:
    """
    The domains of this node.

    :param are_listed: libvirt's list says which there are, and has not yet.
    """

    def __init__(self, *, are_listed: bool = False) -> None:
        self.are_all_known = not are_listed
        """No others run here. Until libvirt has listed all its domains once, some may that natd has not heard of."""
        self._domains: dict[DomainUUID, Domain] = {}
        self._ended_at: dict[DomainUUID, float] = {}
        self._unmanaged: dict[DomainUUID, Unmanaged] = {}

    def __contains__(self, uuid: DomainUUID) -> bool:
        return uuid in self._domains

    def get(self, uuid: DomainUUID) -> Domain | None:
        """Return a domain; None: it does not run here."""
        return self._domains.get(uuid)

    def taps_of(self, uuid: DomainUUID) -> frozenset[int]:
        """Return the indexes of a VM's interfaces; none, when it does not run here."""
        domain = self._domains.get(uuid)
        return frozenset(tap.number for tap in domain.taps) if domain is not None else frozenset()

    def taps(self) -> dict[DomainUUID, frozenset[str]]:
        """Return the names of the interfaces of each VM that has some."""
        return {
            uuid: frozenset(tap.name for tap in domain.taps) for uuid, domain in self._domains.items() if domain.taps
        }

    def known(self) -> frozenset[DomainUUID]:
        """Return all domains, those that migrate here included."""
        return frozenset(self._domains)

    def guests(self) -> Iterator[DomainUUID]:
        """Yield the VMs whose guests run here."""
        return (uuid for uuid, domain in self._domains.items() if domain.taps and not domain.is_incoming)

    def incoming_domains(self) -> Iterator[tuple[DomainUUID, Domain]]:
        """Yield the domains that migrate here."""
        return ((uuid, domain) for uuid, domain in self._domains.items() if domain.is_incoming)

    def presences(self, given: Container[DomainUUID]) -> Iterator[Presence]:
        """
        Yield what the manager is told of the domains that run here.

        :param given: The VMs to which it has given something here: it takes them for running here, and is right in a
            moment even of those that libvirt still lists as migrating here.
        """
        for uuid, domain in self._domains.items():
            if not domain.is_incoming or uuid in given:
                yield Presence(uuid, domain.name, domain.wishes)

    def unmanaged(self) -> tuple[Unmanaged, ...]:
        """Return the VMs that libvirt lists and that are not managed, each with the reason."""
        return tuple(vm for uuid, vm in sorted(self._unmanaged.items()) if uuid not in self._domains)

    def note_unmanaged(self, listing: Listing) -> None:
        """Record what libvirt's list says of VMs that have no interface of ours."""
        self._unmanaged = {uuid: vm for uuid, vm in self._unmanaged.items() if not listing.is_without(uuid)}
        for vm in listing.domains:
            self._unmanaged.pop(vm.domain, None)
            if vm.why_not:
                self._unmanaged[vm.domain] = Unmanaged(vm.domain, vm.name, cut(vm.why_not))

    def adopt(self, uuid: DomainUUID, name: str, taps: frozenset[Tap], now: float) -> None:
        """
        Add a domain that had ports here before natd began.

        :param taps: Those of its interfaces that still exist.
        """
        no_taps_since = None if taps else now - TAP_GRACE_S
        self._domains[uuid] = Domain(name, taps, has_run=True, had_taps=True, no_taps_since=no_taps_since)

    def note_listed(self, listing: Listing) -> None:
        """Record that libvirt has listed its domains, and that all of them are known now."""
        is_complete = listing.absent is None and listing.undescribed <= self._domains.keys()
        self.are_all_known = self.are_all_known or is_complete

    def on_hook(self, vm: RunningDomain, now: float) -> tuple[Domain, set[DomainUUID]]:
        """
        Record what a hook says of a domain that starts, runs or migrates here.

        :return: The domain, and those whose interfaces have changed.
        """
        domain = self._domains.setdefault(vm.domain, Domain(vm.name, no_taps_since=now))
        domain.hook_at = now
        self._describe(domain, vm)
        return domain, self._give_taps(vm.domain, domain, vm.taps) if vm.taps else set()

    def on_listed(self, vm: RunningDomain, listing: Listing, now: float) -> tuple[Domain | None, set[DomainUUID]]:
        """
        Record what libvirt's list says of a domain.

        :return: The domain, and those whose interfaces have changed; None: it is not ours, or a hook told later.
        """
        domain = self._domains.get(vm.domain)
        if domain is None:
            if not vm.has_interface or self._ended_at.get(vm.domain, 0.0) > listing.asked_at:
                return None, set()
            domain = self._domains[vm.domain] = Domain(vm.name, no_taps_since=now)
            domain.is_incoming = vm.phase is not Phase.HERE
        domain.is_listed = True
        if domain.hook_at > listing.asked_at:
            return None, set()
        if vm.phase is Phase.HERE:
            domain.is_incoming, domain.has_run = False, True
        elif vm.phase is Phase.MIGRATING and not domain.has_run:
            domain.is_incoming = True
        self._describe(domain, vm)
        # An interface that was renamed still exists, and the XML has its former name.
        taps = vm.taps | {tap for tap in domain.taps if all(tap.name != named.name for named in vm.taps)}
        # A name may be another's since libvirt was asked; the hook of that domain has said so.
        taps -= {tap for other in self._domains.values() if other.hook_at > listing.asked_at for tap in other.taps}
        return domain, self._give_taps(vm.domain, domain, frozenset(taps)) if taps else set()

    def has_new_wishes(self, vm: RunningDomain) -> bool:
        """Whether the wishes in the XML of a domain that runs here are news to the manager."""
        domain = self._domains.get(vm.domain)
        return domain is not None and vm.wishes is not None and vm.wishes != domain.wishes

    def on_claims(self, found: Mapping[DomainUUID, Claims]) -> set[DomainUUID]:
        """Record what is known of guests' addresses; return the VMs whose forwards may lead elsewhere now."""
        changed = set()
        for uuid, claims in found.items():
            if (domain := self._domains.get(uuid)) is None:
                continue
            before = domain.address, domain.claims and domain.claims.reach[:2]
            chosen, domain.claims = claims.choose(domain.address), claims
            if chosen is not None:
                domain.address, domain.address_source = chosen
            elif domain.address is not None and not claims.reach.has(domain.address):
                domain.address = domain.address_source = None
            if before != (domain.address, claims.reach[:2]):
                changed.add(uuid)
        return changed

    def claims_of(self, uuid: DomainUUID) -> Claims | None:
        """Return what is known of a guest's address; None: nobody has looked."""
        domain = self._domains.get(uuid)
        return domain.claims if domain is not None else None

    def address_source_of(self, uuid: DomainUUID) -> AddressSource | None:
        """Return who says which address a guest has; None: it is not known."""
        domain = self._domains.get(uuid)
        return domain.address_source if domain is not None else None

    def address_of(self, uuid: DomainUUID) -> IPv4Address | None:
        """Return the address of a guest; None: it is not known."""
        domain = self._domains.get(uuid)
        return domain.address if domain is not None else None

    def remove(self, uuid: DomainUUID, now: float) -> bool:
        """Forget a domain; return whether it was known."""
        self._ended_at = {other: at for other, at in self._ended_at.items() if now - at < START_GRACE_S}
        self._ended_at[uuid] = now
        return self._domains.pop(uuid, None) is not None

    def on_links(self, links: Mapping[int, str], now: float) -> set[DomainUUID]:
        """
        Record the interfaces of this machine, names by index; return the VMs of whose interfaces some are gone.

        Interfaces that were renamed are the same ones.
        """
        changed = set()
        for uuid, domain in self._domains.items():
            taps = frozenset(Tap(links[tap.number], tap.number) for tap in domain.taps if tap.number in links)
            if len(taps) != len(domain.taps):
                changed.add(uuid)
            domain.taps = taps
            domain.no_taps_since = None if taps else now if domain.no_taps_since is None else domain.no_taps_since
        return changed

    def ended(self, listing: Listing) -> list[DomainUUID]:
        """Return the domains that libvirt no longer runs, by its list."""
        return [
            uuid for uuid, domain in self._domains.items() if listing.is_without(uuid) and _has_ended(domain, listing)
        ]

    def without_taps(self, now: float) -> list[DomainUUID]:
        """Return the domains without interfaces for too long: they count as gone where libvirt is not asked."""
        return [uuid for uuid, domain in self._domains.items() if _has_lost_taps(domain, now)]

    def _describe(self, domain: Domain, vm: RunningDomain) -> None:
        domain.name = vm.name
        domain.wishes = vm.wishes if vm.wishes is not None else domain.wishes

    def _give_taps(self, uuid: DomainUUID, domain: Domain, taps: frozenset[Tap]) -> set[DomainUUID]:
        indexes = {tap.number for tap in taps}
        if indexes == {tap.number for tap in domain.taps}:
            return set()
        changed = {uuid}
        # An interface belongs to the domain that was named last.
        for other_uuid, other in self._domains.items():
            kept = frozenset(tap for tap in other.taps if tap.number not in indexes)
            if other_uuid != uuid and kept != other.taps:
                other.taps = kept
                changed.add(other_uuid)
        domain.taps = taps
        domain.had_taps = True
        domain.no_taps_since = None
        return changed


def _has_ended(domain: Domain, listing: Listing) -> bool:
    """Whether a domain that the list does not have is gone."""
    since_hook = listing.asked_at - domain.hook_at
    if domain.is_listed:
        # Of two that happened at the same time, nobody knows which came first.
        return since_hook > 0
    if domain.is_incoming:
        # libvirt lists it from ``prepare`` on; before, hooks of others may take their time.
        return since_hook >= START_GRACE_S
    if domain.taps:
        return False
    if domain.had_taps:
        return domain.no_taps_since is not None and listing.asked_at - domain.no_taps_since >= TAP_GRACE_S
    return since_hook >= LIST_GRACE_S


def _has_lost_taps(domain: Domain, now: float) -> bool:
    grace = TAP_GRACE_S if domain.had_taps and not domain.is_incoming else START_GRACE_S
    return domain.no_taps_since is not None and now - domain.no_taps_since >= grace
