"""Names in labels are escaped."""

from __future__ import annotations

from ipaddress import IPv4Address

from cpm.core.journal import LedgerState
from cpm.core.manager import Manager
from cpm.protocol.model import AllocationId, Node, NodeName, Role
from cpm.queries import metrics
from cpm.settings import Settings


def test_a_name_in_a_label_is_escaped() -> None:
    node = Node(NodeName("edge\x1b[2J\u202e1"), frozenset({Role.EDGE}), IPv4Address("172.30.0.21"))
    state = LedgerState(0, (), (node,), (), (), AllocationId(1))
    manager = Manager(state, Settings().rules(), 1, 0.0)
    text = metrics.exposition(manager, 1.0).body.decode()
    assert 'virt_ports_node_connected{node="edge\\\\x1b[2J\\\\u202e1"} 0.0' in text
    assert all(line.isprintable() for line in text.splitlines())
