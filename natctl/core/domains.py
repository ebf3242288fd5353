"""
Which VMs run on this node, as hooks, libvirt and the interfaces of the machine tell: pure.

:class:`Domains` knows of each its interfaces and what its XML wishes, and says which have gone without a word.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from cpm.protocol.messages import Presence
from cpm.protocol.model import DomainUUID, Wishes

TAP_GRACE_S = 3.0
"""Seconds a VM may be without interfaces before it counts as gone: a hook usually says so earlier, and libvirt
re-creates the tap of a VM that is reset."""

START_GRACE_S = 60.0
"""Seconds between ``prepare`` and the first interface, the longest a VM may take to start."""


@dataclasses.dataclass(frozen=True, slots=True)
class Running:
    """A domain that runs here, as a hook or libvirt describes it."""

    domain: DomainUUID
    name: str
    taps: frozenset[str] = frozenset()
    wishes: Wishes | None = None
    """What its XML says; None: not looked at."""


@dataclasses.dataclass(slots=True)
class Domain:
    """What is known of one that runs here."""

    name: str
    taps: frozenset[str] = frozenset()
    wishes: Wishes | None = None
    incoming: bool = False
    """It migrates here and still runs elsewhere."""
    had_taps: bool = False
    bare_since: float | None = None
    """When its interfaces were gone, or it had none yet; None: one of them is there."""


class Domains:
    """The domains of this node."""

    def __init__(self) -> None:
        self._domains: dict[DomainUUID, Domain] = {}

    def __contains__(self, uuid: DomainUUID) -> bool:
        return uuid in self._domains

    def get(self, uuid: DomainUUID) -> Domain | None:
        """Return one of them; None: it does not run here."""
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
        return (uuid for uuid, domain in self._domains.items() if domain.taps and not domain.incoming)

    def incoming(self) -> Iterator[tuple[DomainUUID, Domain]]:
        """Yield those that migrate here."""
        return ((uuid, domain) for uuid, domain in self._domains.items() if domain.incoming)

    def presences(self) -> Iterator[Presence]:
        """Yield what the manager is told of those that run here."""
        running = ((uuid, domain) for uuid, domain in self._domains.items() if not domain.incoming)
        return (Presence(uuid, domain.name, domain.wishes) for uuid, domain in running)

    def found(self, uuid: DomainUUID, name: str, taps: frozenset[str]) -> None:
        """Take note: a VM ran here before natd did."""
        self._domains[uuid] = Domain(name, taps, had_taps=True)

    def seen(self, vm: Running, now: float) -> tuple[Domain, set[DomainUUID]]:
        """Take note of a VM that starts, runs or comes; return it, and whose interfaces are others now."""
        domain = self._domains.setdefault(vm.domain, Domain(vm.name, bare_since=now))
        domain.name = vm.name
        domain.wishes = vm.wishes if vm.wishes is not None else domain.wishes
        changed = self._give_taps(vm.domain, domain, vm.taps) if vm.taps and vm.taps != domain.taps else set()
        return domain, changed

    def wished(self, vm: Running) -> bool:
        """Take over what the XML of a VM that runs here says now; say whether the manager does not know it yet."""
        domain = self._domains.get(vm.domain)
        if domain is None or vm.wishes is None or vm.wishes == domain.wishes:
            return False
        domain.wishes = vm.wishes
        return True

    def ended(self, uuid: DomainUUID) -> bool:
        """Forget a VM; say whether it was known."""
        return self._domains.pop(uuid, None) is not None

    def linked(self, links: frozenset[str], now: float) -> None:
        """Take note of which interfaces this machine has."""
        for domain in self._domains.values():
            alive = bool(domain.taps & links)
            domain.bare_since = None if alive else domain.bare_since or now

    def vanished(self, now: float) -> list[DomainUUID]:
        """Return those that have been without interfaces for too long."""
        return [uuid for uuid, domain in self._domains.items() if _has_vanished(domain, now)]

    def _give_taps(self, uuid: DomainUUID, domain: Domain, taps: frozenset[str]) -> set[DomainUUID]:
        changed = {uuid}
        # Tap names are reused: whoever had one of these before has it no more.
        for other_uuid, other in self._domains.items():
            if other_uuid != uuid and other.taps & taps:
                other.taps -= taps
                changed.add(other_uuid)
        domain.taps = taps
        domain.had_taps = True
        domain.bare_since = None
        return changed


def _has_vanished(domain: Domain, now: float) -> bool:
    grace = TAP_GRACE_S if domain.had_taps and not domain.incoming else START_GRACE_S
    return domain.bare_since is not None and now - domain.bare_since >= grace
