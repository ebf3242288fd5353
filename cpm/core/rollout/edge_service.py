"""
Which edges hosts send packets to, and for which edges a new range waits.

An edge that is *in service* is a next hop of every host. It drops what comes from ports that it does not know, so a
range is used only once every edge in service has confirmed it. No edge may hold up the site by that: one that is away,
or does not confirm, leaves service when another can do its work, and is back once it has confirmed everything. In
between it *joins*: it has its snapshot, and ranges wait for it again, but no host sends to it yet.

That an edge left service says nothing about what it holds. It may still pass packets on ports that it knows, and what
is withdrawn from a VM waits for its confirmation as before (:mod:`cpm.core.rollout.steps`).

Pure, and all but :attr:`~cpm.protocol.model.Node.in_service` is kept in memory only: a manager that begins knows of no
node whether it is in step. Tested in ``tests/unit/site/test_edge_service.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from cpm.core.changes import NoteNode, PutNode
from cpm.core.fleet import Fleet
from cpm.core.journal import NodeEvent
from cpm.core.rollout.node_sync import NodeSync
from cpm.core.spans import span
from cpm.protocol.model import AllocationState, DomainUUID, Node, NodeName

_USED: Final = frozenset((AllocationState.ACTIVE, AllocationState.DRAINING))
"""States of ranges that hosts use: every edge in service has confirmed them."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """How long nodes may take, in seconds. The fields are those of ``[nodes]`` in ``cpmd.toml``."""

    edge_grace_s: float
    """An edge that is away, or leaves something unconfirmed, leaves service after it."""
    edge_wait_s: float
    """The same while a range waits for that edge."""
    confirm_s: float
    """A connected node that leaves something unconfirmed counts as not answering after it."""


class EdgeService:
    """
    Follows which nodes are in step, and takes edges out of service and back.

    :param fleet: The fleet; whether an edge is in service is recorded in it.
    :param node_syncs: The connected nodes; the owner adds and removes them.
    :param patience: How long nodes may take.
    :param started: Ledger time at which this manager began.
    """

    def __init__(
        self, fleet: Fleet, node_syncs: Mapping[NodeName, NodeSync], patience: Patience, started: float
    ) -> None:
        self._fleet = fleet
        self._node_syncs = node_syncs
        self._patience = patience
        self._started = started
        self._out_of_step: dict[NodeName, float] = dict.fromkeys(fleet.nodes, started)
        """Ledger time since which a node has not been known to hold all that it should, until it is in step again."""
        self._joins_at: dict[NodeName, int] = {}
        """By node that has its snapshot: the generation with which it is in step. A range waits for edges in here."""

    # Queries

    def behind_since(self, name: NodeName) -> float | None:
        """Return since when a node lacks a confirmation or a session, in ledger time; None: it is in step."""
        node_sync = self._node_syncs.get(name)
        unconfirmed = node_sync.unconfirmed_since if node_sync is not None else None
        return min((at for at in (self._out_of_step.get(name), unconfirmed) if at is not None), default=None)

    def lateness(self, name: NodeName, now: float) -> str:
        """Return how long a node has not been in step, and how, as the rest of a sentence that begins with "it"."""
        since = self.behind_since(name)
        lasts = f" for {span(max(0.0, now - since))}" if since is not None else ""
        node_sync = self._node_syncs.get(name)
        if node_sync is None:
            return f"has been away{lasts}"
        if node_sync.refused and node_sync.unconfirmed_since is None:
            uuid, refused = next(iter(node_sync.refused.items()))
            vm = self._fleet.vms.get(uuid)
            return f"refuses {vm.name if vm is not None else uuid}{lasts}: {refused.reason}"
        if node_sync.refusal:
            return f"has refused what it was sent{lasts}: {node_sync.refusal}"
        return f"has not confirmed what it was sent{lasts}, see `journalctl -u natd` there"

    def is_answering(self, name: NodeName, now: float) -> bool:
        """Return whether a node is connected and has confirmed, or still has time to confirm, what it was sent."""
        node_sync = self._node_syncs.get(name)
        return node_sync is not None and not _is_late(node_sync.unconfirmed_since, self._patience.confirm_s, now)

    def in_service(self) -> Iterator[Node]:
        """Yield the edges that hosts send packets to."""
        return (node for node in self._fleet.edges.values() if node.in_service and not node.fenced)

    def needed(self, host: NodeName) -> set[NodeName]:
        """
        Return the edges that must know a range before a host uses it; none: there is no edge in service.

        Those in service, those that join, and the host itself where it is its own edge: its packets pass no other.
        """
        needed = {node.name for node in self.in_service()}
        if not needed:
            return needed
        if host in self._fleet.edges:
            needed.add(host)
        return needed | (self._fleet.edges.keys() & self._joins_at)

    # Inputs

    def on_session_begin(self, name: NodeName, now: float) -> None:
        """Record that a session of a node is about to take the place of any former one."""
        former = self._node_syncs.get(name)
        if former is None:
            self._out_of_step.setdefault(name, now)
        else:
            self._on_lost(former, now)

    def on_session_end(self, former: NodeSync, now: float) -> None:
        """Record that a session ended: what its node holds from now on is not known."""
        self._on_lost(former, now)

    def on_fenced(self, name: NodeName, now: float) -> None:
        """Record that the operator vouches for a node: it is in step again once it has confirmed everything."""
        self._out_of_step.setdefault(name, now)
        self._joins_at.pop(name, None)

    def on_forgotten(self, name: NodeName) -> None:
        """Forget a node that is removed."""
        self._out_of_step.pop(name, None)
        self._joins_at.pop(name, None)

    def on_applied(self, node_sync: NodeSync, now: float) -> None:
        """Record a confirmation of a node; put an edge that is in step now into service."""
        if node_sync.node in self._out_of_step:
            self._put_back(node_sync, now)

    def _put_back(self, node_sync: NodeSync, now: float) -> None:
        """Have a node join, or put it into service, if it may be."""
        name = node_sync.node
        if not self._may_join(node_sync, now) or self._lacks_what_others_have(node_sync, now):
            return
        if node_sync.applied < self._joins_at.setdefault(name, node_sync.generation):
            return
        del self._out_of_step[name], self._joins_at[name]
        node = self._fleet.nodes[name]
        if node.fenced:
            self._fleet.record(NoteNode(name, NodeEvent.UNFENCED, "it has confirmed everything that it should hold"))
        self._put(node, in_service=name in self._fleet.edges and node.approval is not None, fenced=False)

    def on_writable(self, now: float) -> None:
        """Record that messages are sent only now that could not be while the ledger could not be written."""
        for name, node_sync in self._node_syncs.items():
            node_sync.on_sent_late(now)
            if name in self._out_of_step:
                self._out_of_step[name] = now

    # Commands

    def check(self, now: float) -> None:
        """
        Take edges out of service that have been away, or have not confirmed something, for longer than they may; put
        those back that others were preferred to.
        """
        for name in [name for name in self._out_of_step if name in self._node_syncs]:
            self._put_back(self._node_syncs[name], now)
        for name in [name for name in self._joins_at if not self._may_join(self._node_syncs.get(name), now)]:
            del self._joins_at[name]
        behind = [node for node in self.in_service() if self._is_behind(node.name, self._patience.edge_grace_s, now)]
        self._take_out(behind, [node for node in self.in_service() if self._is_sound(node.name, now)], now)

    def relieve(self, missing: Iterable[NodeName], uuid: DomainUUID, now: float) -> None:
        """
        Take edges out of service for which a range has waited for long enough, if others in service know that range.

        :param missing: The edges that have not confirmed the range.
        :param uuid: Its VM.
        """
        waits_for = frozenset(missing)
        others = [node for node in self.in_service() if node.name not in waits_for]
        late = [
            node
            for node in self.in_service()
            if node.name in waits_for
            and (
                self._is_behind(node.name, self._patience.edge_wait_s, now)
                or _is_late(self._refuses_since(node.name, uuid), self._patience.edge_wait_s, now)
            )
        ]
        self._take_out(late, others, now)

    # Inside

    def _on_lost(self, former: NodeSync, now: float) -> None:
        since = self.behind_since(former.node)
        self._out_of_step[former.node] = now if since is None else since
        self._joins_at.pop(former.node, None)

    def _refuses_since(self, name: NodeName, uuid: DomainUUID) -> float | None:
        node_sync = self._node_syncs.get(name)
        refused = node_sync.refused.get(uuid) if node_sync is not None else None
        return refused.since if refused is not None else None

    def _lacks_what_others_have(self, node_sync: NodeSync, now: float) -> bool:
        """Return whether an edge refuses a VM that another edge in service has: it would drop what the VM sends."""
        others = [node.name for node in self.in_service() if node.name != node_sync.node]
        return any(
            any(self._may_have(name, uuid, now) for name in others)
            and any(range_.state is not AllocationState.HELD for range_ in self._fleet.all_of(uuid))
            for uuid in node_sync.refused
        )

    def _may_have(self, name: NodeName, uuid: DomainUUID, now: float) -> bool:
        """
        Return whether an edge in service may have of a VM what its host uses.

        One that was away for a moment may, and one that has not confirmed the VM's last change has what was before.
        """
        node_sync = self._node_syncs.get(name)
        if node_sync is not None and node_sync.is_confirmed(uuid):
            return True
        is_used = any(range_.state in _USED for range_ in self._fleet.all_of(uuid))
        is_away = node_sync is None or not node_sync.synced
        return (is_used or is_away) and not self._is_behind(name, self._patience.edge_grace_s, now)

    def _may_join(self, node_sync: NodeSync | None, now: float) -> bool:
        """Return whether a node has its snapshot, and is not late with what followed."""
        if node_sync is None or not node_sync.synced:
            return False
        return not _is_late(node_sync.unconfirmed_since, self._patience.edge_wait_s, now)

    def _is_behind(self, name: NodeName, for_s: float, now: float) -> bool:
        return _is_late(self.behind_since(name), for_s, now)

    def _is_sound(self, name: NodeName, now: float) -> bool:
        """Return whether an edge is connected and keeps up."""
        node_sync = self._node_syncs.get(name)
        return node_sync is not None and node_sync.synced and not self._is_behind(name, self._patience.edge_wait_s, now)

    def _take_out(self, late: Iterable[Node], others: Iterable[Node], now: float) -> None:
        """Take edges out of service, unless there is no other: packets that some edge may drop are lost with none."""
        if self._fleet.unwritable is not None:
            # They cannot confirm what is not sent to them.
            return
        names = {node.name for node in others}
        for node in late:
            if names - {node.name}:
                since = self.behind_since(node.name)
                self._out_of_step[node.name] = self._started if since is None else since
                self._joins_at.pop(node.name, None)
                self._put(node, in_service=False, fenced=node.fenced, why=f"it {self.lateness(node.name, now)}")

    def _put(self, node: Node, *, in_service: bool, fenced: bool, why: str = "") -> None:
        after = dataclasses.replace(node, in_service=in_service, fenced=fenced)
        if after != node:
            self._fleet.record(PutNode(after))
        if in_service != node.in_service:
            event = NodeEvent.IN_SERVICE if in_service else NodeEvent.OUT_OF_SERVICE
            self._fleet.record(NoteNode(node.name, event, why))


def _is_late(since: float | None, limit_s: float, now: float) -> bool:
    return since is not None and now - since >= limit_s
