"""
Whether a node has followed this ledger, as it is: else the ledger is another one, an old copy, or in use twice.

Such a node is refused, because what the ledger says contradicts what kernels hold. When it is an edge, which is
trusted, it is also known that the ledger does not say who has which port of the pool: until it is restored, no VM gets
new ports. What an edge that was not heard yet knows better cannot be known
(``docs/explanation/limits.md``).

Pure. Tested in ``tests/unit/site/test_continuity.py``.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator

from cpm.core.changes import NoteOutdated, NoteSeen
from cpm.core.fleet import Fleet
from cpm.core.journal import LedgerState, Run
from cpm.protocol.bounds import MAX_COUNT, MAX_GENERATION
from cpm.protocol.ledger_errors import LedgerMistrusted
from cpm.protocol.messages import Hello
from cpm.protocol.model import NodeName, Role

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
    runs: tuple[Run, ...] = ()
    """The latest starts of a manager with this ledger, in order of their epochs."""

    @classmethod
    def of(cls, state: LedgerState, epoch: int) -> Continuity:
        """Return the continuity of a ledger."""
        return cls(state.identity, state.run, epoch, state.is_restored, state.runs)

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
        if hello.epoch == self.epoch and follows.run not in ("", self.run):
            why = "another cpmd runs in the same epoch, on a copy of this ledger"
            raise LedgerMistrusted(hello.node, why, "stop the one that is not in use", is_lasting=False)
        run, ends = self._in_epoch(hello.epoch, grants)
        if follows.grants > ends:
            # What was given later by this ledger has the same numbers, and other owners.
            when = "" if ends == grants else f" in epoch {hello.epoch}"
            why = f"it has seen range {follows.grants}{when}, this ledger ends at {ends}{when}: it is an old copy"
            raise LedgerMistrusted(hello.node, why, RESTORE)
        if "" not in (run, follows.run) and follows.run != run:
            why = f"in epoch {hello.epoch} it has followed another cpmd than this ledger knows: it is an old copy"
            raise LedgerMistrusted(hello.node, why, RESTORE)
        return False

    def _in_epoch(self, epoch: int, grants: int) -> tuple[str, int]:
        """
        Return the run of an epoch, and the highest allocation id at its end.

        :param grants: That of now.
        :return: The run is empty if it is not known; then the id is that of the end of the first later one known.
        """
        index = bisect.bisect_left(self.runs, (epoch,))
        mine = self.runs[index : index + 1]
        run = mine[0].run if mine and mine[0].epoch == epoch else ""
        later = self.runs[index + bool(run) :]
        return run, later[0].grants if later else grants


class RefusedNodes:
    """
    The nodes that were refused because of their ledger.

    An edge among them, which is trusted, shows that this ledger does not say who has which port of the pool: that it
    has seen a later state of it, or maps ports of the pool by another one. What else was given, and used until just
    now, nobody knows, so from then on nothing new is given, until the ledger is restored.

    :param fleet: The ledger's content.
    :param ledger: Which ledger it is.
    :param is_outdated: An edge has shown that before.
    """

    def __init__(self, fleet: Fleet, ledger: str, *, is_outdated: bool) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._is_outdated = is_outdated
        self._refused: dict[NodeName, tuple[Hello, LedgerMistrusted]] = {}
        self._noted = (0, 0)

    @property
    def sentences(self) -> dict[NodeName, str]:
        """Why each is refused, and what to do."""
        return {name: str(error) for name, (_, error) in self._refused.items()}

    @property
    def doubt(self) -> str:
        """Why nothing new is given by this ledger, and what to do; empty: it is given."""
        if (shown := next(self._shown(), None)) is not None:
            return str(shown)
        return f"an edge has shown that the ledger is an old copy, or another one; {RESTORE}" * self._is_outdated

    def _shown(self) -> Iterator[LedgerMistrusted]:
        """Yield what edges show."""
        for hello, error in self._refused.values():
            is_edge, is_of_it = Role.EDGE in hello.roles, hello.follows.ledger == self._ledger
            if is_edge and (is_of_it or self._maps_ports_of_the_pool(hello)):
                yield error

    def _maps_ports_of_the_pool(self, hello: Hello) -> bool:
        return any(self._fleet.space.has_address(each.external) for vm in hello.edge_holds for each in vm.ranges)

    def seen(self) -> tuple[int, int]:
        """Return the latest epoch, and the highest number of a range, that they have seen of this ledger."""
        of_it = [hello for hello, _ in self._refused.values() if hello.follows.ledger == self._ledger]
        # From a host that lies, no number may leave too little room for a leap beyond it.
        epochs = (hello.epoch for hello in of_it if hello.epoch <= MAX_GENERATION // 2)
        highest = (hello.follows.grants for hello in of_it if hello.follows.grants <= MAX_COUNT // 2)
        return max(epochs, default=0), max(highest, default=0)

    def note(self) -> None:
        """Have the ledger keep what they show: that it is outdated, and beyond what it leaps when it is restored."""
        if (seen := self.seen()) != self._noted:
            self._fleet.record(NoteSeen(*seen))
            self._noted = seen
        if not self._is_outdated and any(error.is_lasting for error in self._shown()):
            self._fleet.record(NoteOutdated())
            self._is_outdated = True

    def add(self, hello: Hello, error: LedgerMistrusted) -> None:
        """Record that a node was refused."""
        self._refused[hello.node] = hello, error

    def remove(self, node: NodeName) -> None:
        """Record that a node was accepted, or that the operator vouches that it forwards nothing."""
        self._refused.pop(node, None)

    def take_over(self, former: RefusedNodes) -> None:
        """Go on from those of a former manager."""
        self._refused.update(former._refused)
