"""
The domains (libvirt's) that run on this node, from hooks, libvirt's list and the interfaces of the machine: pure.

:class:`Domains` has the interfaces of each and the wishes in its XML, and finds those that ended without a hook.

Tested in ``tests/unit/site/test_order.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from cpm.protocol.messages import Presence
from cpm.protocol.model import DomainUUID, Wishes

TAP_GRACE_S = 3.0
"""Seconds for which a VM may be without interfaces before it counts as gone: usually a hook comes earlier, and libvirt
re-creates the tap of a VM that is reset."""

START_GRACE_S = 60.0
"""Seconds between ``prepare`` and the first interface, the longest a VM may take to start."""


@dataclasses.dataclass(frozen=True, slots=True)
class RunningDomain:
    """A domain that runs here, as a hook or libvirt describes it."""

    domain: DomainUUID
    name: str
    taps: frozenset[str] = frozenset()
    wishes: Wishes | None = None
    """From its XML; None: not read."""


@dataclasses.dataclass(slots=True)
class Domain:
    """What is known of a domain that runs here."""

    name: str
    taps: frozenset[str] = frozenset()
    wishes: Wishes | None = None
    is_incoming: bool = False
    """It migrates here and still runs elsewhere."""
    had_taps: bool = False
    no_taps_since: float | None = None
    """Since when none of its interfaces exists; None: one does."""


class Domains:
    """The domains of this node."""

    def __init__(self) -> None:
        self._domains: dict[DomainUUID, Domain] = {}

    def __contains__(self, uuid: DomainUUID) -> bool:
        return uuid in self._domains

    def get(self, uuid: DomainUUID) -> Domain | None:
        """Return a domain; None: it does not run here."""
        return self._domains.get(uuid)

    def taps_of(self, uuid: DomainUUID) -> frozenset[str]:
        """Return the interfaces of a VM; none, when it does not run here."""
        domain = self._domains.get(uuid)
        return domain.taps if domain is not None else frozenset()

    def taps(self) -> dict[DomainUUID, frozenset[str]]:
        """Return the interfaces of each VM that has some."""
        return {uuid: domain.taps for uuid, domain in self._domains.items() if domain.taps}

    def guests(self) -> Iterator[DomainUUID]:
        """Yield the VMs whose guests run here."""
        return (uuid for uuid, domain in self._domains.items() if domain.taps and not domain.is_incoming)

    def incoming_domains(self) -> Iterator[tuple[DomainUUID, Domain]]:
        """Yield the domains that migrate here."""
        return ((uuid, domain) for uuid, domain in self._domains.items() if domain.is_incoming)

    def presences(self) -> Iterator[Presence]:
        """Yield what the manager is told of the domains that run here."""
        running = ((uuid, domain) for uuid, domain in self._domains.items() if not domain.is_incoming)
        return (Presence(uuid, domain.name, domain.wishes) for uuid, domain in running)

    def adopt(self, uuid: DomainUUID, name: str, taps: frozenset[str]) -> None:
        """Add a domain that ran here before natd did."""
        self._domains[uuid] = Domain(name, taps, had_taps=True)

    def update(self, vm: RunningDomain, now: float) -> tuple[Domain, set[DomainUUID]]:
        """
        Record what a hook or libvirt says of a domain that starts, runs or migrates here.

        :return: The domain, and those whose interfaces have changed: tap names are reused.
        """
        domain = self._domains.setdefault(vm.domain, Domain(vm.name, no_taps_since=now))
        domain.name = vm.name
        domain.wishes = vm.wishes if vm.wishes is not None else domain.wishes
        changed = self._give_taps(vm.domain, domain, vm.taps) if vm.taps and vm.taps != domain.taps else set()
        return domain, changed

    def update_wishes(self, vm: RunningDomain) -> bool:
        """Record the wishes in the XML of a domain that runs here; return whether they are news to the manager."""
        domain = self._domains.get(vm.domain)
        if domain is None or vm.wishes is None or vm.wishes == domain.wishes:
            return False
        domain.wishes = vm.wishes
        return True

    def remove(self, uuid: DomainUUID) -> bool:
        """Forget a domain; return whether it was known."""
        return self._domains.pop(uuid, None) is not None

    def on_links(self, links: frozenset[str], now: float) -> None:
        """The interfaces of this machine changed."""
        for domain in self._domains.values():
            alive = bool(domain.taps & links)
            domain.no_taps_since = None if alive else domain.no_taps_since or now

    def without_taps(self, now: float) -> list[DomainUUID]:
        """Return the domains that have been without interfaces for too long, and count as gone."""
        return [uuid for uuid, domain in self._domains.items() if _has_lost_taps(domain, now)]

    def _give_taps(self, uuid: DomainUUID, domain: Domain, taps: frozenset[str]) -> set[DomainUUID]:
        changed = {uuid}
        # Tap names are reused: a domain that had one of these before no longer has it.
        for other_uuid, other in self._domains.items():
            if other_uuid != uuid and other.taps & taps:
                other.taps -= taps
                changed.add(other_uuid)
        domain.taps = taps
        domain.had_taps = True
        domain.no_taps_since = None
        return changed


def _has_lost_taps(domain: Domain, now: float) -> bool:
    grace = TAP_GRACE_S if domain.had_taps and not domain.is_incoming else START_GRACE_S
    return domain.no_taps_since is not None and now - domain.no_taps_since >= grace
