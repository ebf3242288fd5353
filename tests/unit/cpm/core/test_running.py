"""Where VMs run is known from either side, and each change is noted."""

from __future__ import annotations

from cpm.core.running import RunningVMs
from cpm.protocol.model import DomainUUID, NodeName

A, B = DomainUUID("a"), DomainUUID("b")
HOST1, HOST2 = NodeName("host1"), NodeName("host2")


def test_a_vm_runs_on_one_host_and_each_host_knows_its_own() -> None:
    running = RunningVMs(set())
    running.put(A, HOST1)
    running.put(B, HOST1)
    running.put(A, HOST2)
    assert running.hosts == {A: HOST2, B: HOST1}
    assert (set(running.on(HOST1)), set(running.on(HOST2))) == ({B}, {A})
    running.remove(A)
    running.remove(A)
    assert running.hosts == {B: HOST1}
    assert set(running.on(HOST2)) == set()


def test_only_what_changes_is_noted() -> None:
    changed: set[DomainUUID] = set()
    running = RunningVMs(changed)
    running.put(A, HOST1)
    assert changed == {A}
    changed.clear()
    running.put(A, HOST1)
    running.remove(B)
    assert changed == set()
    running.put(A, HOST2)
    assert changed == {A}
    changed.clear()
    running.remove(A)
    assert changed == {A}
