"""
Whether a node has followed this ledger, as it is: else the ledger is another one, an old copy, or in use twice.

Such a node is refused, because what the ledger says contradicts what kernels hold. While it is refused, no VM gets the
ports that it maps as an edge and that the ledger knows nothing of.

Pure. Tested in ``tests/unit/site/test_continuity.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

from cpm.core.changes import NoteSeen
from cpm.core.fleet import Fleet
from cpm.core.journal import LedgerState
from cpm.protocol.bounds import MAX_COUNT, MAX_GENERATION
from cpm.protocol.holdings import Held
from cpm.protocol.ledger_errors import LedgerMistrusted
from cpm.protocol.messages import Hello
from cpm.protocol.model import NodeName, PortRange, Role
from cpm.protocol.own_ports import KeptPorts, OwnUse

RESTORE = "stop cpmd, then put the latest ledger back or, if there is none, run `virt-ports restore --accept`"
"""What to do about a ledger that is not the one that nodes have followed."""


@dataclasses.dataclass(frozen=True, slots=True)
class Continuity:
    """What identifies a ledger, and how far it is."""

    ledger: str
    run: str
    epoch: int
    adopts: bool = False
    """It takes the place of any other ledger: what nodes hold is taken in."""

    @classmethod
    def of(cls, state: LedgerState, epoch: int) -> Continuity:
        """Return the continuity of a ledger."""
        return cls(state.identity, state.run, epoch, state.is_restored)

    def check(self, hello: Hello, grants: int) -> bool:
        """
        Return whether this ledger takes the place of the one that a node has followed: it holds nothing of that one.

        :param grants: The highest allocation id in this ledger.
        :raise LedgerMistrusted: When the node is to be refused.
        """
        follows, held = hello.follows, len({vm.domain for vm in (*hello.host_holds, *hello.edge_holds)})
        if follows.ledger not in ("", self.ledger):
            if held and not self.adopts:
                why = f"it follows ledger {follows.ledger} and holds ports of {held} VMs; this is ledger {self.ledger}"
                remedy = f"connect it to its own cpmd or, if this ledger is to take the place of that one, {RESTORE}"
                raise LedgerMistrusted(hello.node, why, remedy)
            return True
        if hello.epoch > self.epoch:
            why = f"it has seen epoch {hello.epoch}, this cpmd has epoch {self.epoch}: the ledger is an old copy"
            raise LedgerMistrusted(hello.node, f"{why}, or a later cpmd runs elsewhere", f"stop it, or {RESTORE}")
        if follows.grants > grants:
            why = f"it has seen range {follows.grants}, this ledger ends at {grants}: it is an old copy"
            raise LedgerMistrusted(hello.node, why, RESTORE)
        if hello.epoch == self.epoch and follows.run not in ("", self.run):
            why = "another cpmd runs in the same epoch, on a copy of this ledger"
            raise LedgerMistrusted(hello.node, why, "stop the one that is not in use")
        return False


class RefusedNodes:
    """
    The nodes that were refused because of their ledger.

    :param fleet: Keeps the ports that they map.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._hellos: dict[NodeName, tuple[Hello, str]] = {}
        self._noted = (0, 0)

    @property
    def sentences(self) -> dict[NodeName, str]:
        """Why each is refused, and what to do."""
        return {name: text for name, (_, text) in self._hellos.items()}

    def seen(self, ledger: str) -> tuple[int, int]:
        """Return the latest epoch, and the highest number of a range, that they have seen of a ledger."""
        of_it = [hello for hello, _ in self._hellos.values() if hello.follows.ledger == ledger]
        # From a host that lies, no number may leave too little room for a leap beyond it.
        epochs = (hello.epoch for hello in of_it if hello.epoch <= MAX_GENERATION // 2)
        highest = (hello.follows.grants for hello in of_it if hello.follows.grants <= MAX_COUNT // 2)
        return max(epochs, default=0), max(highest, default=0)

    def note_seen(self, ledger: str) -> None:
        """Have the ledger keep what they have seen of it, so that it leaps beyond that when it is restored."""
        if (seen := self.seen(ledger)) != self._noted:
            self._fleet.record(NoteSeen(*seen))
            self._noted = seen

    def add(self, hello: Hello, text: str) -> None:
        """Record that a node was refused; nobody gets the ports that only it knows of."""
        known = self._hellos.get(hello.node)
        self._hellos[hello.node] = hello, text
        if Role.EDGE in hello.roles and (known is None or known[0].edge_holds != hello.edge_holds):
            self._fleet.keep_from_vms(hello.node, self._unknown(hello.node, hello.edge_holds))

    def remove(self, node: NodeName) -> None:
        """Record that a node was accepted, or that the operator vouches that it forwards nothing."""
        if self._hellos.pop(node, None) is not None:
            self._fleet.keep_from_vms(node, ())

    def take_over(self, former: RefusedNodes) -> None:
        """Go on from those of a former manager."""
        for hello, text in former._hellos.values():
            self.add(hello, text)

    def _unknown(self, node: NodeName, holds: Iterable[Held]) -> Iterator[KeptPorts]:
        """Yield the ports that an edge maps for a VM to which the ledger did not give them."""
        for vm in holds:
            mine = [(each.external, each.ports) for each in self._fleet.of(vm.domain)]
            for held in vm.ranges:
                parts: list[PortRange] = [held.ports]
                for external, ports in mine:
                    if external == held.external:
                        parts = [rest for part in parts for rest in part.minus(ports)]
                for part in parts:
                    yield KeptPorts(node, held.external, part, OwnUse.CONNECTION)
