"""
Which hosts say that a VM runs there although it is another host's: claims, and what becomes of them.

A VM belongs to the host that the ledger names until that host says that it is gone, or is fenced. Until then another
host that says "it runs here" has a claim and no more, because the VM's connections leave by its present host. A claim
counts only in the session in which it was made: a host that lost its power claims nothing.

Pure: no I/O and no clock. Tested in ``tests/unit/site/test_claims.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Iterator
from typing import Final

from cpm.protocol.messages import Attach
from cpm.protocol.model import DomainUUID, NodeName

HANDOVER_S: Final = 10.0
"""Seconds that a migration may take from "it runs here" to "it is gone": a claim that lasts longer is no handover."""


@dataclasses.dataclass(frozen=True, slots=True)
class Claim:
    """A host says that it runs a VM of another host."""

    node: NodeName
    attach: Attach
    """What it said last."""
    since: float
    """Ledger time."""
    is_reported: bool = False
    """The operator was told."""


class Claims:
    """The claims of all hosts, at most one a VM: the oldest. Hosts repeat theirs, so another one is not lost."""

    def __init__(self) -> None:
        self._claims: dict[DomainUUID, Claim] = {}

    def of(self, uuid: DomainUUID) -> Claim | None:
        """Return the claim on a VM, if there is one."""
        return self._claims.get(uuid)

    def claimed(self) -> tuple[DomainUUID, ...]:
        """Return the VMs on which there is a claim."""
        return tuple(self._claims)

    def on_claim(self, node: NodeName, attach: Attach, now: float) -> None:
        """Record that a host says that it runs a VM of another host."""
        known = self._claims.get(attach.domain)
        if known is None:
            self._claims[attach.domain] = Claim(node, attach, now)
        elif known.node == node:
            wishes = attach.wishes if attach.wishes is not None else known.attach.wishes
            attach = Attach(attach.domain, attach.name, wishes=wishes)
            self._claims[attach.domain] = dataclasses.replace(known, attach=attach)

    def withdraw(self, uuid: DomainUUID, node: NodeName) -> None:
        """Forget a host's claim on a VM: it has the VM now, or says that the VM is gone from there."""
        claim = self._claims.get(uuid)
        if claim is not None and claim.node == node:
            del self._claims[uuid]

    def keep_only(self, node: NodeName, domains: Container[DomainUUID]) -> None:
        """Forget a host's claims on all other VMs."""
        for uuid, claim in list(self._claims.items()):
            if claim.node == node and uuid not in domains:
                del self._claims[uuid]

    def take_unreported(
        self, now: float, is_handover: Callable[[DomainUUID, Claim], bool]
    ) -> Iterator[tuple[DomainUUID, Claim]]:
        """
        Yield every claim that the operator is to be told of, once.

        :param is_handover: Returns whether the VM is migrating to the claimant; its claim is reported only when it
            lasts longer than :data:`HANDOVER_S`.
        """
        for uuid, claim in list(self._claims.items()):
            if not claim.is_reported and not (is_handover(uuid, claim) and now - claim.since < HANDOVER_S):
                self._claims[uuid] = dataclasses.replace(claim, is_reported=True)
                yield uuid, claim
