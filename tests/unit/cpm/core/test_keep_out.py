"""Pauses grow with each fault, and are forgotten after a time without one."""

from __future__ import annotations

from cpm.core.keep_out import FORGET_S, LONGEST_S, MOST_NODES, KeepOut
from cpm.protocol.model import NodeName

HOST, OTHER = NodeName("host1"), NodeName("host2")


def test_each_fault_doubles_the_pause_up_to_a_limit() -> None:
    keep_out = KeepOut()
    now, pauses = 0.0, []
    for _ in range(8):
        pauses.append(keep_out.on_fault(HOST, "nonsense", now))
        assert "nonsense" in keep_out.reason_of(HOST, now)
        assert keep_out.reason_of(OTHER, now) == ""
        now += pauses[-1]
        assert keep_out.reason_of(HOST, now) == ""
    assert pauses == [1, 2, 4, 8, 16, 32, LONGEST_S, LONGEST_S]


def test_a_time_without_a_fault_begins_anew() -> None:
    keep_out = KeepOut()
    keep_out.on_fault(HOST, "nonsense", 0.0)
    assert keep_out.on_fault(HOST, "nonsense", 5.0) == 2
    assert keep_out.on_fault(HOST, "nonsense", 5.0 + FORGET_S) == 1


def test_only_so_many_nodes_are_remembered() -> None:
    keep_out = KeepOut()
    for number in range(MOST_NODES + 1):
        keep_out.on_fault(NodeName(f"n{number}"), "nonsense", 0.0)
    assert keep_out.reason_of(NodeName("n0"), 0.5) == ""
    assert keep_out.reason_of(NodeName("n1"), 0.5) != ""
