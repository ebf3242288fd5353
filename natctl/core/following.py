"""
Whom a node follows: which ledger, and the latest state of it that the node has seen. Pure.

A node refuses a manager with another ledger, or with an earlier state of its own: what that one says contradicts what
the kernels hold. The natd daemon keeps it on disk, so that it outlives natd and the machine.

Tested in ``tests/unit/natctl/core/test_following.py``.
"""

from __future__ import annotations

import dataclasses

from msgspec import structs

from cpm.protocol.errors import VirtPortsError
from cpm.protocol.messages import Delta, Follows, ManagerMessage, Snapshot, Welcome
from natctl.model.commands import Remember
from natctl.model.remembered import Charge, Remembered


class StaleEpoch(VirtPortsError):
    """
    A message from a manager that is not the present one.

    :param said: The message's epoch.
    :param seen: The highest epoch that this node has seen.
    """

    code = "stale-epoch"

    def __init__(self, said: int, seen: int) -> None:
        super().__init__(said, seen)
        self.said = said
        self.seen = seen

    def __str__(self) -> str:
        return f"a manager of epoch {self.said} speaks, epoch {self.seen} was seen; stop the older cpmd"


class OtherLedger(VirtPortsError):
    """
    A manager with another ledger than that of the manager whom this node follows.

    :param theirs: Its ledger.
    :param ours: The ledger that this node follows.
    """

    code = "other-ledger"

    def __init__(self, theirs: str, ours: str) -> None:
        super().__init__(theirs, ours)
        self.theirs = theirs
        self.ours = ours

    def __str__(self) -> str:
        return (
            f"the manager has the ledger {self.theirs}, this node follows {self.ours}; set [manager] url to the right "
            "manager or, if its ledger was lost, see 'The ledger is lost' in docs/how-to/operate.md"
        )


class OtherManager(VirtPortsError):
    """
    Another cpmd runs on a copy of the same ledger.

    :param epoch: The epoch of both.
    """

    code = "other-manager"

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self.epoch = epoch

    def __str__(self) -> str:
        return f"two cpmd run on copies of one ledger, both in epoch {self.epoch}; stop the one that is not in use"


class NotWelcomed(VirtPortsError):
    """
    A message from a manager that this node does not follow, because that one has not said which ledger it has.

    :param epoch: The message's epoch.
    """

    code = "not-welcomed"

    def __init__(self, epoch: int) -> None:
        super().__init__(epoch)
        self.epoch = epoch

    def __str__(self) -> str:
        return (
            f"a manager of epoch {self.epoch} speaks without having said which ledger it has; the node connects again; "
            "if this is repeated, please report it as a bug of cpmd"
        )


class Following:
    """
    Whom this node follows.

    :param remembered: What is on disk.
    """

    def __init__(self, remembered: Remembered) -> None:
        self.remembered = remembered
        """What is to be on disk."""
        self._kept = remembered

    @property
    def epoch(self) -> int:
        """Highest epoch seen."""
        return self.remembered.epoch

    @property
    def told(self) -> Follows:
        """What the manager is told."""
        return self.remembered.follows

    def on_message(self, message: ManagerMessage) -> None:
        """
        Follow the manager that sent a message. By its Welcome alone a node takes another ledger, epoch or run.

        :raise StaleEpoch: When this node has seen a later manager of the same ledger.
        :raise OtherManager: When it has seen another manager of the same epoch.
        :raise OtherLedger: When it follows another ledger, which this one does not take the place of.
        :raise NotWelcomed: When a manager of a later epoch says something else before its Welcome.
        """
        follows = self.told
        if isinstance(message, Welcome) and message.adopts and message.ledger != follows.ledger:
            # The edges stay, until this one has said which there are.
            self._follow(message.epoch, Follows(message.ledger, message.run, edges=follows.edges))
            return
        if isinstance(message, Welcome) and follows.ledger not in ("", message.ledger):
            raise OtherLedger(message.ledger, follows.ledger)
        if message.epoch < self.epoch:
            raise StaleEpoch(message.epoch, self.epoch)
        if isinstance(message, Welcome):
            if message.epoch == self.epoch and follows.run not in ("", message.run):
                raise OtherManager(self.epoch)
            follows = structs.replace(follows, ledger=message.ledger, run=message.run)
        elif message.epoch > self.epoch:
            raise NotWelcomed(message.epoch)
        if isinstance(message, (Snapshot, Delta)):
            follows = structs.replace(follows, grants=max(follows.grants, message.grants))
            if message.path is not None and message.path.edge_names:
                follows = structs.replace(follows, edges=message.path.edge_names)
        if (message.epoch, follows) != (self.epoch, self.told):
            self._follow(message.epoch, follows)

    def on_charge(self, charge: Charge | None) -> None:
        """Which VMs may send nothing without ports depends on this from now on."""
        self.remembered = dataclasses.replace(self.remembered, charge=charge)

    def take_changes(self) -> list[Remember]:
        """Return the command to keep what changed since the last call; nothing did: no command."""
        before, self._kept = self._kept, self.remembered
        return [Remember(self.remembered, before)] if self.remembered != before else []

    def _follow(self, epoch: int, follows: Follows) -> None:
        self.remembered = dataclasses.replace(self.remembered, epoch=epoch, follows=follows)
