"""The policy ``grow-only``."""

from __future__ import annotations

import pytest

from cpm.core.sizing import Demand
from cpm.core.sizing.policies import policy_named
from cpm.protocol.model import DomainUUID, NodeName, Wishes
from tests.fakes.site import Site

VM = DomainUUID("00000000-0000-0000-0000-000000000001")
HOST = NodeName("host1")


@pytest.mark.parametrize(
    ("in_use", "exhausted", "target"),
    [(0, False, 1000), (799, False, 1000), (800, False, 1500), (10, True, 1500), (None, False, 1000)],
)
def test_the_size_changes_only_when_the_range_is_nearly_full(in_use: int | None, exhausted: bool, target: int) -> None:
    demand = Demand(domain=VM, current=1000, ports_in_use=in_use, exhausted=exhausted)
    assert policy_named("grow-only").target(demand, None, 0.0) == (target, None)


def test_an_idle_vm_keeps_its_range() -> None:
    site = Site()
    site.start_vm(HOST, VM, Wishes(policy="grow-only"))
    site.run()
    before = site.machines[HOST].kernel.host[VM].intent.ports
    for _ in range(40):
        site.report(HOST, busy=False)
        site.run()
        site.pass_time(6.0)
        site.run()
    assert site.machines[HOST].kernel.host[VM].intent.ports == before
