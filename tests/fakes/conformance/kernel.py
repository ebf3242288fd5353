"""
One node's kernel (:class:`natctl.kernel.kernel.Kernel`), in the words that the fake one of a site shares with it.

Each check is called with a factory of kernels by role and asserts. What natd reads back after a restart is compared
in full, since that is what a restarted node begins with.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Protocol

import msgspec
import pytest

from cpm.protocol.errors import KernelError
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID, PortRange
from cpm.protocol.timeouts import Timeouts, TimeoutsTable
from natctl.model.entries import Change, EdgeSettings, HostEntry, HostSettings, Path, Settings
from natctl.ruleset.readback import KernelState
from tests.fakes.intents import edge_intent, host_entry, with_intent, with_ranges

ONE, TWO = DomainUUID("11111111-1111-4111-8111-111111111111"), DomainUUID("22222222-2222-4222-8222-222222222222")
EXTERNAL, OTHER_EXTERNAL = IPv4Address("203.0.113.1"), IPv4Address("203.0.113.2")
POOL = IPv4Network("100.64.0.0/10")
EDGES = frozenset({IPv4Address("172.30.0.11"), IPv4Address("172.30.0.12")})
PATH = Path(POOL, EDGES, frozenset({EXTERNAL, OTHER_EXTERNAL}), Timeouts(udp_s=300))

HOST = Settings(HostSettings(frozenset({"eth1"})))
EDGE = Settings(edge=EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"})))
BOTH = Settings(HOST.host, EDGE.edge)

INTERNAL = IPv4Address("100.64.0.1")
HOSTED = host_entry(ONE, "web 1", 1, INTERNAL, PortRange(20000, 20063), frozenset({100, 101}), 33)
NEIGHBOUR = host_entry(TWO, "db", 2, IPv4Address("100.64.0.2"), PortRange(20064, 20127), frozenset({102}))
AT_EDGE = {
    ONE: edge_intent(ONE, "web 1", INTERNAL, None, ((EXTERNAL, PortRange(20000, 20063)),)),
    TWO: edge_intent(
        TWO, "db", IPv4Address("100.64.0.2"), IPv4Address("172.30.0.22"), ((EXTERNAL, PortRange(20064, 20127)),)
    ),
}


class NodeKernel(Protocol):
    """A kernel to check against, and natd's hold on it; its machine is 172.30.0.21/24."""

    def observe(self) -> KernelState:
        """Return what it holds."""

    def change(self, change: Change) -> object:
        """Make one change."""

    def replace(
        self, host: Mapping[DomainUUID, HostEntry], edge: Mapping[DomainUUID, EdgeIntent], path: Path
    ) -> object:
        """Make this all that it holds."""

    def ensure(self) -> object:
        """Make it hold again what was last applied."""

    def restart_natd(self) -> None:
        """Begin anew, with what the kernel holds."""

    def flush(self) -> None:
        """Remove all tables, as somebody else may."""


Make = Callable[[Settings], NodeKernel]


def _programmed(make: Make, settings: Settings = BOTH) -> NodeKernel:
    kernel = make(settings)
    kernel.replace({ONE: HOSTED}, AT_EDGE, PATH)
    return kernel


def _entries(kernel: NodeKernel) -> tuple[dict[DomainUUID, HostEntry], dict[DomainUUID, EdgeIntent]]:
    held = kernel.observe()
    return dict(held.host), dict(held.edge)


def a_new_kernel_holds_nothing(make: Make) -> None:
    held = make(BOTH).observe()
    assert (held.host, held.edge, held.path, held.connections, held.refused) == ({}, {}, None, {}, {})


def ensure_does_nothing_before_anything_was_applied(make: Make) -> None:
    kernel = make(BOTH)
    kernel.ensure()
    assert kernel.observe().path is None


def what_is_programmed_is_read_back_after_natd_restarts(make: Make) -> None:
    kernel = _programmed(make)
    kernel.restart_natd()
    held = kernel.observe()
    assert (held.host, held.edge, held.path) == ({ONE: HOSTED}, AT_EDGE, PATH)


def a_host_holds_its_vms_and_the_way_to_the_edges(make: Make) -> None:
    held = _programmed(make, HOST).observe()
    assert (held.host, held.edge) == ({ONE: HOSTED}, {})
    assert held.path == dataclasses.replace(PATH, externals=frozenset())


def an_edge_holds_ranges_and_external_addresses(make: Make) -> None:
    held = _programmed(make, EDGE).observe()
    assert (held.host, held.edge) == ({}, AT_EDGE)
    assert held.path == Path(POOL, externals=PATH.externals)


def the_external_addresses_of_ranges_count_as_the_pools(make: Make) -> None:
    kernel = make(EDGE)
    kernel.replace({}, AT_EDGE, Path(POOL))
    assert kernel.observe().path == Path(POOL, externals=frozenset({EXTERNAL}))


def without_timeouts_of_the_manager_the_floors_are_in_force(make: Make) -> None:
    kernel = make(HOST)
    kernel.replace({}, {}, Path(POOL))
    assert kernel.observe().path == Path(POOL, timeouts=Timeouts())


def a_hosts_own_timeouts_take_precedence(make: Make) -> None:
    assert HOST.host is not None
    kernel = make(Settings(dataclasses.replace(HOST.host, timeouts=TimeoutsTable(icmp_s=90))))
    kernel.replace({}, {}, PATH)
    path = kernel.observe().path
    assert path is not None
    assert path.timeouts == Timeouts(udp_s=300, icmp_s=90)


def a_host_that_is_an_edge_may_have_a_vm_beside_another_one_of_the_same_uuid(make: Make) -> None:
    # As an edge it knows its own by another UUID.
    elsewhere = edge_intent(
        ONE, "web 1", IPv4Address("100.64.0.9"), IPv4Address("172.30.0.22"), ((EXTERNAL, PortRange(30000, 30063)),)
    )
    here = edge_intent(TWO, "web 1", INTERNAL, None, ((EXTERNAL, PortRange(20000, 20063)),))
    kernel = make(BOTH)
    kernel.replace({}, {ONE: elsewhere}, PATH)
    kernel.change(Change(host={ONE: HOSTED}, edge={TWO: here}))
    assert _entries(kernel) == ({ONE: HOSTED}, {ONE: elsewhere, TWO: here})
    kernel.restart_natd()
    assert _entries(kernel) == ({ONE: HOSTED}, {ONE: elsewhere, TWO: here})
    kernel.change(Change(edge={ONE: None}))
    assert _entries(kernel) == ({ONE: HOSTED}, {TWO: here})
    kernel.change(Change(host={ONE: None}, edge={ONE: elsewhere, TWO: None}))
    assert _entries(kernel) == ({}, {ONE: elsewhere})


def a_change_leaves_all_others_alone(make: Make) -> None:
    kernel = _programmed(make)
    kernel.change(Change(host={TWO: NEIGHBOUR}, edge={ONE: None}))
    assert _entries(kernel) == ({ONE: HOSTED, TWO: NEIGHBOUR}, {TWO: AT_EDGE[TWO]})
    assert kernel.observe().path == PATH


def a_change_before_the_first_replace_is_made_to_what_the_kernel_holds(make: Make) -> None:
    kernel = _programmed(make)
    kernel.restart_natd()
    kernel.change(Change(host={TWO: NEIGHBOUR}))
    assert _entries(kernel) == ({ONE: HOSTED, TWO: NEIGHBOUR}, AT_EDGE)
    assert kernel.observe().path == PATH


def a_change_without_any_path_is_refused(make: Make) -> None:
    kernel = make(BOTH)
    with pytest.raises(KernelError):
        kernel.change(Change(host={ONE: HOSTED}))
    assert kernel.observe().path is None


def replace_removes_what_it_does_not_name(make: Make) -> None:
    kernel = _programmed(make)
    narrower = dataclasses.replace(PATH, edges=frozenset({IPv4Address("172.30.0.12")}))
    kernel.replace({}, {TWO: AT_EDGE[TWO]}, narrower)
    assert _entries(kernel) == ({}, {TWO: AT_EDGE[TWO]})
    assert kernel.observe().path == narrower


def a_path_is_replaced_by_a_change(make: Make) -> None:
    kernel = _programmed(make)
    alone = dataclasses.replace(PATH, edges=frozenset())
    kernel.change(Change(path=alone))
    assert kernel.observe().path == alone
    assert _entries(kernel) == ({ONE: HOSTED}, AT_EDGE)


def a_range_may_pass_to_another_vm_within_one_change(make: Make) -> None:
    kernel = _programmed(make)
    mine, theirs = AT_EDGE[ONE], AT_EDGE[TWO]
    swapped = {
        ONE: msgspec.structs.replace(mine, ranges=theirs.ranges),
        TWO: msgspec.structs.replace(theirs, ranges=mine.ranges),
    }
    kernel.change(Change(edge=swapped))
    assert _entries(kernel) == ({ONE: HOSTED}, swapped)


def a_tap_and_an_index_may_pass_to_another_vm_within_one_change(make: Make) -> None:
    kernel = _programmed(make)
    heir = with_intent(HOSTED, domain=TWO, name="heir", internal=IPv4Address("100.64.0.9"))
    kernel.change(Change(host={ONE: None, TWO: heir}))
    assert _entries(kernel) == ({TWO: heir}, AT_EDGE)


def a_range_that_overlaps_another_vms_is_refused_and_nothing_of_the_change_is_in_force(make: Make) -> None:
    kernel = _programmed(make)
    for ports in (PortRange(20032, 20095), PortRange(20000, 20031), PortRange(20032, 20063), PortRange(20010, 20020)):
        overlapping = with_ranges(AT_EDGE[TWO], (EXTERNAL, ports))
        with pytest.raises(KernelError):
            kernel.change(Change(host={ONE: None}, edge={TWO: overlapping}))
        with pytest.raises(KernelError):
            kernel.replace({}, {ONE: AT_EDGE[ONE], TWO: overlapping}, PATH)
        assert _entries(kernel) == ({ONE: HOSTED}, AT_EDGE)
    kernel.change(Change(edge={TWO: None}))
    assert _entries(kernel) == ({ONE: HOSTED}, {ONE: AT_EDGE[ONE]})


def the_same_ports_on_another_address_do_not_overlap(make: Make) -> None:
    kernel = _programmed(make)
    elsewhere = with_ranges(AT_EDGE[TWO], (OTHER_EXTERNAL, PortRange(20000, 20063)))
    kernel.change(Change(edge={TWO: elsewhere}))
    assert _entries(kernel)[1] == {ONE: AT_EDGE[ONE], TWO: elsewhere}


def a_route_through_a_machine_that_is_not_in_the_underlay_is_refused(make: Make) -> None:
    kernel = _programmed(make)
    with pytest.raises(KernelError):
        kernel.change(Change(edge={TWO: msgspec.structs.replace(AT_EDGE[TWO], via=IPv4Address("192.0.2.99"))}))
    assert _entries(kernel) == ({ONE: HOSTED}, AT_EDGE)


def ranges_are_read_back_in_order_and_coalesced(make: Make) -> None:
    kernel = _programmed(make)
    pieces = ((OTHER_EXTERNAL, PortRange(5000, 5063)), (EXTERNAL, PortRange(20128, 20191)))
    kernel.change(Change(edge={TWO: with_ranges(AT_EDGE[TWO], *pieces, (EXTERNAL, PortRange(20064, 20127)))}))
    whole = with_ranges(AT_EDGE[TWO], (EXTERNAL, PortRange(20064, 20191)), (OTHER_EXTERNAL, PortRange(5000, 5063)))
    assert _entries(kernel)[1] == {ONE: AT_EDGE[ONE], TWO: whole}


def a_vm_without_ranges_is_not_at_the_edge(make: Make) -> None:
    kernel = _programmed(make)
    kernel.change(Change(edge={TWO: with_ranges(AT_EDGE[TWO])}))
    assert _entries(kernel)[1] == {ONE: AT_EDGE[ONE]}


def a_vm_without_ports_is_on_its_host_and_has_no_budget(make: Make) -> None:
    kernel = _programmed(make)
    kernel.change(Change(host={ONE: with_intent(HOSTED, ports=None, budget=5, defer_after=9, at_cap=True)}))
    assert _entries(kernel)[0] == {ONE: with_intent(HOSTED, ports=None, budget=None)}
    assert kernel.observe().connections == {}


def a_vm_without_interfaces_is_on_its_host(make: Make) -> None:
    kernel = _programmed(make)
    waiting = with_intent(HOSTED, taps=frozenset())
    kernel.change(Change(host={ONE: waiting}))
    assert _entries(kernel)[0] == {ONE: waiting}


def a_hosts_kernel_holds_budgets_up_to_65535_and_only_what_it_programs(make: Make) -> None:
    kernel = _programmed(make)
    told = with_intent(
        HOSTED, budget=70_000, defer_after=80_000, draining=(PortRange(1024, 1087),), external=EXTERNAL, at_cap=True
    )
    kernel.change(Change(host={ONE: told}))
    assert _entries(kernel)[0] == {ONE: with_intent(HOSTED, budget=65535, defer_after=65535, at_cap=True)}


def connections_are_counted_for_vms_with_ports_and_refusals_for_those_at_their_cap(make: Make) -> None:
    kernel = _programmed(make)
    kernel.change(Change(host={TWO: with_intent(NEIGHBOUR, at_cap=True)}))
    held = kernel.observe()
    assert (held.connections, held.refused) == ({ONE: 0, TWO: 0}, {TWO: 0})


def a_flush_leaves_the_routes_and_ensure_brings_everything_back(make: Make) -> None:
    kernel = _programmed(make)
    kernel.flush()
    assert _entries(kernel) == ({}, {})
    assert kernel.observe().path == Path(POOL, EDGES)
    kernel.ensure()
    assert _entries(kernel) == ({ONE: HOSTED}, AT_EDGE)
    assert kernel.observe().path == PATH


def a_change_after_a_flush_brings_everything_back(make: Make) -> None:
    kernel = _programmed(make)
    kernel.flush()
    grown = with_intent(HOSTED, ports=PortRange(20000, 20127))
    kernel.change(Change(host={ONE: grown}, edge={TWO: None}))
    assert _entries(kernel) == ({ONE: grown}, {ONE: AT_EDGE[ONE]})


def what_was_flushed_is_gone_for_a_natd_that_starts_afterwards(make: Make) -> None:
    kernel = _programmed(make)
    kernel.flush()
    kernel.restart_natd()
    kernel.ensure()
    assert _entries(kernel) == ({}, {})
    kernel.change(Change(host={TWO: NEIGHBOUR}))
    assert _entries(kernel) == ({TWO: NEIGHBOUR}, {})


def what_was_observed_does_not_change_afterwards(make: Make) -> None:
    kernel = _programmed(make)
    before = kernel.observe()
    kernel.replace({}, {}, PATH)
    assert (before.host, before.edge) == ({ONE: HOSTED}, AT_EDGE)


CHECKS: list[Callable[[Make], None]] = [
    a_new_kernel_holds_nothing,
    ensure_does_nothing_before_anything_was_applied,
    what_is_programmed_is_read_back_after_natd_restarts,
    a_host_holds_its_vms_and_the_way_to_the_edges,
    an_edge_holds_ranges_and_external_addresses,
    the_external_addresses_of_ranges_count_as_the_pools,
    without_timeouts_of_the_manager_the_floors_are_in_force,
    a_hosts_own_timeouts_take_precedence,
    a_host_that_is_an_edge_may_have_a_vm_beside_another_one_of_the_same_uuid,
    a_change_leaves_all_others_alone,
    a_change_before_the_first_replace_is_made_to_what_the_kernel_holds,
    a_change_without_any_path_is_refused,
    replace_removes_what_it_does_not_name,
    a_path_is_replaced_by_a_change,
    a_range_may_pass_to_another_vm_within_one_change,
    a_tap_and_an_index_may_pass_to_another_vm_within_one_change,
    a_range_that_overlaps_another_vms_is_refused_and_nothing_of_the_change_is_in_force,
    the_same_ports_on_another_address_do_not_overlap,
    a_route_through_a_machine_that_is_not_in_the_underlay_is_refused,
    ranges_are_read_back_in_order_and_coalesced,
    a_vm_without_ranges_is_not_at_the_edge,
    a_vm_without_ports_is_on_its_host_and_has_no_budget,
    a_vm_without_interfaces_is_on_its_host,
    a_hosts_kernel_holds_budgets_up_to_65535_and_only_what_it_programs,
    connections_are_counted_for_vms_with_ports_and_refusals_for_those_at_their_cap,
    a_flush_leaves_the_routes_and_ensure_brings_everything_back,
    a_change_after_a_flush_brings_everything_back,
    what_was_flushed_is_gone_for_a_natd_that_starts_afterwards,
    what_was_observed_does_not_change_afterwards,
]
