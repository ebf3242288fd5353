"""What the site in virtual time looks for after every step: it must see it when it is there."""

from __future__ import annotations

import pytest

from cpm.protocol.errors import KernelError
from cpm.protocol.model import DomainUUID, NodeName, PortRange
from natctl.model.commands import Program
from natctl.model.entries import Change
from tests.fakes.intents import with_ranges
from tests.fakes.site import EXTERNAL, Site
from tests.unit.site.test_order import EDGE1, EDGE2, HOST1, HOST2, OTHER, VM, started


def site_of_two() -> Site:
    site = Site()
    started(site, VM, HOST1)
    started(site, OTHER, HOST2)
    return site


def give(site: Site, uuid: DomainUUID, ports: PortRange, *, at: NodeName) -> None:
    """Have one edge map these ports to the VM, whatever the manager says."""
    kernel = site.machines[at].kernel
    kernel.change(Change(edge={uuid: with_ranges(kernel.edge[uuid], (EXTERNAL, ports))}))


def test_all_is_well_with_a_vm_on_each_host() -> None:
    site = site_of_two()
    assert site.open(VM, 0) is not None
    site.check()


@pytest.mark.parametrize("ports", [PortRange(1024, 1279), PortRange(1279, 1300), PortRange(1100, 1100)])
def test_a_port_with_two_owners_at_two_edges_is_seen(ports: PortRange) -> None:
    site = site_of_two()
    site.machines[EDGE2].kernel.change(Change(edge={VM: None}))
    give(site, OTHER, ports, at=EDGE2)
    with pytest.raises(AssertionError, match="two owners"):
        site.check()


def test_a_port_with_two_owners_at_one_edge_is_refused_by_its_kernel() -> None:
    site = site_of_two()
    machine = site.machines[EDGE1]
    twice = with_ranges(machine.kernel.edge[OTHER], (EXTERNAL, PortRange(1200, 1300)))
    machine.work.append(Program(Change(edge={OTHER: twice})))
    with pytest.raises(KernelError):
        site.kernel_step(EDGE1)


def test_a_connection_that_an_edge_lets_through_no_more_is_seen() -> None:
    site = site_of_two()
    assert site.open(VM, 200) is not None
    site.check()
    give(site, VM, PortRange(1024, 1087), at=EDGE1)
    with pytest.raises(AssertionError, match="edge1 cut"):
        site.check()
