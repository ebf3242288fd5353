"""
Which machines may be nodes: what the operator has approved, and what others ask for.

A node says in its Hello which roles, which underlay address and which machine it has. It gets a session only if the
operator has approved that; what another one asks is kept for the operator to see. Nobody but the operator gives a
machine a role: an edge gets every VM's traffic, and a host gets ports.

Pure: no I/O and no clock. Tested in ``tests/unit/site/test_membership.py``.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from ipaddress import IPv4Address
from typing import Final

from cpm.core.changes import DropNode, NoteNode, PutNode
from cpm.core.fleet import Fleet
from cpm.core.journal import NodeEvent
from cpm.core.rollout.node_sync import NodeSync
from cpm.core.rollout.steps import Rollout
from cpm.core.sizing.rules import PoolRules
from cpm.protocol.errors import Conflict, InvalidRequest, NameInUse, NotApproved, NotFound
from cpm.protocol.messages import Hello
from cpm.protocol.model import Approval, Node, NodeName, Role

MOST_ASKING: Final = 256
"""Machines that are remembered as asking for approval; beyond that, the one that has not asked for longest is not."""

ASKING_S: Final = 60.0
"""Seconds after which a machine that has not asked again is forgotten; natd asks every few seconds."""

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
"""A node's name is part of a command that operators copy to a shell."""


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """What a machine asks for that is not approved."""

    roles: frozenset[Role]
    underlay: IPv4Address
    machine: str
    why: str
    """Why it was refused; completes a sentence that begins with its name."""
    since: float
    """Ledger time of the first time."""
    at: float
    """Ledger time of the last time."""


@dataclasses.dataclass(frozen=True, slots=True)
class Second:
    """A machine that says that it is a node which is another machine."""

    peer: str
    """Its address."""
    at: float
    """Ledger time of the last time."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalRequest:
    """What an operator approves; None: what is approved already."""

    roles: frozenset[Role] | None = None
    underlay: IPv4Address | None = None
    machine: str | None = None
    max_vms: int | None = None
    """0: as many as ``cpmd.toml`` says."""
    max_ports: int | None = None


class Membership:
    """
    Admits nodes, and changes what is approved.

    :param fleet: What is approved is recorded there.
    :param sessions: The nodes that have one; read.
    :param rollout: Is told when the edges change that hosts send to.
    :param rules: Rules of the pool.
    """

    def __init__(self, fleet: Fleet, sessions: Mapping[NodeName, NodeSync], rollout: Rollout, rules: PoolRules) -> None:
        self.asked: dict[NodeName, Asked] = {}
        """What machines ask for that is not approved; the name may be that of a node."""
        self.refused: Counter[str] = Counter()
        """How often a Hello was refused, by the code of the error."""
        self.seconds: dict[NodeName, Second] = {}
        """Machines that were refused because another one is connected under that node's name."""
        self._fleet = fleet
        self._sessions = sessions
        self._rollout = rollout
        self._rules = rules
        self._ending: dict[NodeName, float] = {}
        """Nodes that were revoked: their sessions end when no host sends to them any more, and at that time anyway."""

    # Nodes

    def admit(self, hello: Hello, now: float) -> Node:
        """
        Return the node that says hello, as it is from now on.

        :raise NotApproved: When the operator has not approved what it says it is; it is remembered as asking.
        :raise InvalidRequest: When nobody could approve it.
        """
        known = self._fleet.nodes.get(hello.node)
        approval = known.approval if known is not None else None
        if known is None or approval is None or (why := _excess(known, approval, hello)):
            why = _unapproved(known, hello) if approval is None else why
            self._remember(hello, why, now)
            raise NotApproved(hello.node, why)
        self.asked.pop(hello.node, None)
        return dataclasses.replace(
            known,
            roles=hello.roles,
            underlay=hello.underlay,
            fenced=False,
            machine=known.machine or hello.machine,
        )

    def _remember(self, hello: Hello, why: str, now: float) -> None:
        self.refused[NotApproved.code] += 1
        if not (_NAME.fullmatch(hello.node) and hello.roles):
            raise InvalidRequest(
                "a node needs a role, and a name of at most 253 letters, digits, dots, dashes and underscores; "
                "set roles and name in its natd.toml"
            )
        before = self.asked.pop(hello.node, None)
        since = before.since if before is not None else now
        self.asked[hello.node] = Asked(hello.roles, hello.underlay, hello.machine, why, since, now)
        if len(self.asked) > MOST_ASKING:
            # In order of the last time.
            del self.asked[next(iter(self.asked))]

    def on_second(self, name: NodeName, peer: str, now: float) -> None:
        """Record that a second machine said hello as a node, and was refused because the first is connected."""
        self.refused[NameInUse.code] += 1
        self.seconds[name] = Second(peer, now)

    def tick(self, now: float) -> None:
        """Forget machines that no longer ask."""
        for entries in (self.asked, self.seconds):
            for name in [name for name, entry in entries.items() if now - entry.at >= ASKING_S]:
                del entries[name]

    def take_ended(self, now: float) -> tuple[NodeName, ...]:
        """Return the nodes whose sessions end now because they were revoked; call it when all updates are queued."""
        ended = tuple(name for name, at in self._ending.items() if now >= at or self._is_unused(name))
        for name in ended:
            del self._ending[name]
        return ended

    def _is_unused(self, name: NodeName) -> bool:
        """Return whether all hosts have confirmed the edges of which this node is none any more."""
        hosts = (host for host, node in self._fleet.nodes.items() if Role.HOST in node.roles and host != name)
        return all(host not in self._sessions or self._sessions[host].is_path_confirmed for host in hosts)

    # Operators

    def approve(self, name: NodeName, request: ApprovalRequest, now: float) -> None:
        """
        Approve a node, or change what it may be. One that asks gets its session when it asks again.

        :param now: Ledger time.
        :raise InvalidRequest: When the name is none, or roles or address are not known.
        :raise Conflict: When another node has the address, the node is connected as more than that, or another machine
            is to have the name while the former may still forward packets.
        """
        if not _NAME.fullmatch(name):
            raise InvalidRequest(f"{name!r} is no node's name; use letters, digits, dots, dashes and underscores")
        known = self._fleet.nodes.get(name)
        approval = _merged(name, known.approval if known is not None else None, request)
        self._check_address(name, approval)
        machine = known.machine if request.machine is None and known is not None else request.machine or ""
        if known is None:
            new = Node(name, frozenset(), approval.underlay, in_service=False, approval=approval, machine=machine)
            self._put(new)
        else:
            self._check_change(known, approval, machine)
            self._put(dataclasses.replace(known, approval=approval, machine=machine))
            if self._ending.pop(name, None) is not None:
                # Its session goes on, and its confirmation puts it back into service.
                self._rollout.edge_service.on_fenced(name, now)
                self._rollout.queue_snapshot(name)
        self.asked.pop(name, None)
        words = f"as {_words(approval.roles)} at {approval.underlay}"
        self._fleet.record(NoteNode(name, NodeEvent.APPROVED, words))

    def _check_address(self, name: NodeName, approval: Approval) -> None:
        underlay = approval.underlay
        for other in self._fleet.nodes.values():
            if other.name != name and underlay in {other.underlay, other.approval and other.approval.underlay}:
                raise Conflict(
                    f"{other.name} has the underlay address {underlay}; give {name} another one, "
                    f"or remove that node: `virt-ports node remove {other.name}`"
                )
        if underlay in self._rules.internal:
            raise Conflict(
                f"{underlay} lies in the internal pool {self._rules.internal} of VMs; give {name} another address, "
                "or set another pool.internal in cpmd.toml"
            )
        if approval.roles == {Role.HOST} and any(each.address == underlay for each in self._fleet.space.addresses):
            raise Conflict(
                f"{underlay} is an external address of VMs, which edges receive; give {name} another address, "
                f"or take it out of the pool: `virt-ports pool remove {underlay}`"
            )

    def _check_change(self, node: Node, approval: Approval, machine: str) -> None:
        if node.name in self._sessions and (node.roles - approval.roles or node.underlay != approval.underlay):
            raise Conflict(
                f"{node.name} is connected as {_words(node.roles)} at {node.underlay}; change its natd.toml and "
                "restart its natd first, or revoke it"
            )
        is_other = node.machine not in ("", machine)
        if is_other and not node.fenced and (Role.EDGE in node.roles or self._holds(node)):
            raise Conflict(
                f"{node.name} is another machine until now, which may still forward packets; when it is switched off: "
                f"`virt-ports node fence {node.name}`, then approve this one"
            )

    def revoke(self, name: NodeName, now: float) -> None:
        """
        Take back what is approved: the node's session ends, and it gets no other.

        An edge is taken out of service first: its session ends when hosts no longer send to it. What it has in its
        kernel stays there until it is fenced, as for a node that is away.

        :param now: Ledger time.
        :raise NotFound: When there is no such node.
        :raise Conflict: When it is the only edge in service.
        """
        node = self._node(name)
        if node.in_service and Role.EDGE in node.roles and not node.fenced and not self._has_other_edge(name):
            raise Conflict(
                f"{name} is the only edge in service, and all VMs would be cut off; put another edge into service "
                f"first, or switch this one off and `virt-ports node fence {name}`"
            )
        if name in self._sessions and name not in self._ending:
            is_used = node.in_service and Role.EDGE in node.roles
            self._ending[name] = now + (self._rules.patience.edge_grace_s if is_used else 0.0)
        self._put(dataclasses.replace(node, approval=None, in_service=False))
        if node.approval is not None:
            self._fleet.record(NoteNode(name, NodeEvent.REVOKED, "by the operator"))
        if node.in_service and Role.EDGE in node.roles:
            self._fleet.record(NoteNode(name, NodeEvent.OUT_OF_SERVICE, "revoked by the operator"))

    def _has_other_edge(self, name: NodeName) -> bool:
        others = (other.name for other in self._rollout.edge_service.in_service() if other.name != name)
        return any(other in self._sessions and self._sessions[other].synced for other in others)

    def remove(self, name: NodeName) -> None:
        """
        Forget a node that holds nothing.

        :raise NotFound: When there is no such node.
        :raise Conflict: When it is connected, has VMs or ports, or may still forward packets as an edge.
        """
        node = self._node(name)
        if name in self._sessions:
            raise Conflict(f"{name} is connected; revoke it first: `virt-ports node revoke {name}`")
        if self._holds(node):
            vms, ports = self._fleet.use.vms(name), self._fleet.use.ports(name)
            raise Conflict(
                f"{vms} VMs and {ports} ports belong to {name}; stop or migrate its VMs, or, when it is switched off "
                f"for good, `virt-ports node fence {name}`, and wait until its ports are free"
            )
        if Role.EDGE in node.roles and not node.fenced:
            raise Conflict(
                f"{name} is an edge that may still forward packets; when it is switched off, "
                f"`virt-ports node fence {name}`, then remove it"
            )
        self._fleet.record(DropNode(name))
        self._fleet.record(NoteNode(name, NodeEvent.REMOVED, "by the operator"))
        self._rollout.edge_service.on_forgotten(name)

    def _holds(self, node: Node) -> bool:
        return bool(self._fleet.use.vms(node.name) or self._fleet.use.ports(node.name))

    def _node(self, name: NodeName) -> Node:
        node = self._fleet.nodes.get(name)
        if node is None:
            raise NotFound("node", name, "see `virt-ports node list`")
        return node

    def _put(self, node: Node) -> None:
        self._fleet.record(PutNode(node))


def _unapproved(known: Node | None, hello: Hello) -> str:
    state = "is not approved" if known is None else "was revoked"
    return f"{state} and asks to be {_words(hello.roles)} at {hello.underlay}"


def _excess(known: Node, approval: Approval, hello: Hello) -> str:
    """Say what a node is beyond what is approved; empty: nothing."""
    if hello.roles - approval.roles:
        return f"is approved as {_words(approval.roles)} and asks to be {_words(hello.roles)}"
    if hello.underlay != approval.underlay:
        return f"is approved at {approval.underlay} and asks for {hello.underlay}"
    if known.machine and hello.machine != known.machine:
        return "is approved for another machine than this one"
    return ""


def _merged(name: NodeName, before: Approval | None, request: ApprovalRequest) -> Approval:
    roles = before.roles if request.roles is None and before is not None else request.roles
    underlay = before.underlay if request.underlay is None and before is not None else request.underlay
    if not roles or underlay is None:
        raise InvalidRequest(f"say what {name} may be: --role host or edge, or both, and --underlay ADDRESS")
    return Approval(
        frozenset(roles),
        underlay,
        _limit(before.max_vms if before is not None else None, request.max_vms),
        _limit(before.max_ports if before is not None else None, request.max_ports),
    )


def _limit(before: int | None, request: int | None) -> int | None:
    return before if request is None else request or None


def _words(roles: frozenset[Role]) -> str:
    return ",".join(sorted(roles))
