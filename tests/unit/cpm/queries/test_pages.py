"""Lists in pages: what comes and goes meanwhile moves nothing from one page to another."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.tick import Fleet
from cpm.api import views, words
from cpm.api.parameters import Patterns
from cpm.protocol.errors import InvalidRequest, NotFound
from cpm.protocol.messages import Attach
from cpm.protocol.model import DomainUUID, NodeName, Role
from cpm.queries import nodes, pages, pool, vms

NAMES = st.sets(st.text("ab:", max_size=2), max_size=12)


@pytest.fixture(scope="module")
def fleet() -> Fleet:
    """VMs vm0 to vm299 on 20 hosts, 100 on an address."""
    return Fleet(300)


@given(NAMES, NAMES, st.integers(1, 3))
def test_what_is_there_all_the_time_is_on_exactly_one_page(always: set[str], comes: set[str], limit: int) -> None:
    seen: list[str] = []
    for number in range(30):
        there = always | {name for each, name in enumerate(sorted(comes - always)) if (number + each) % 2}
        after = seen[-1] if seen else None
        found = pages.page([name for name in there if after is None or name > after], str, limit)
        seen += found
        if not found:
            break
    assert [name for name in seen if name in always] == sorted(always)
    assert len(seen) == len(set(seen))


def test_pages_of_vms_together_are_the_list(fleet: Fleet) -> None:
    every = vms.summaries(fleet.manager, fleet.now, all=True)
    found: list[views.DomainView] = []
    while more := vms.summaries(
        fleet.manager, fleet.now, all=True, limit=7, after=(found[-1].name, found[-1].uuid) if found else None
    ):
        assert len(more) <= 7
        found += more
    assert found == every
    assert len(every) == 300


def test_several_vms_of_one_name_are_told_apart_by_uuid() -> None:
    site = Fleet(2)
    twins = [DomainUUID(f"00000000-0000-0000-0001-00000000000{number}") for number in range(3)]
    for uuid in twins:
        site.manager.on_message(NodeName("host0"), Attach(uuid, "vm0"), site.now)
    after = vms.summaries(site.manager, site.now, all=True, after=("vm0", twins[0]), limit=2)
    assert [view.uuid for view in after] == twins[1:]
    assert [view.name for view in vms.summaries(site.manager, site.now, all=True, after=("vm0", "~"))] == ["vm1"]


def test_vms_are_chosen_by_name_uuid_node_address_and_state(fleet: Fleet) -> None:
    def names(**asked: object) -> list[str]:
        return [view.name for view in vms.summaries(fleet.manager, fleet.now, all=False, **asked)]  # type: ignore[arg-type]

    uuid = "00000000-0000-0000-0000-000000000007"
    assert names(match=Patterns(["vm1?", uuid])) == [*(f"vm1{digit}" for digit in range(10)), "vm7"]
    assert names(node="host3", match=Patterns(["vm?", "vm2?"])) == ["vm23", "vm3"]
    assert (
        len(names(address=IPv4Address("203.0.113.0")))
        + len(names(address=IPv4Address("203.0.113.1")))
        + len(names(address=IPv4Address("203.0.113.2")))
        == 300
    )
    assert names(state={"waiting"}) == []
    assert len(names(state={"active", "not-managed"})) == 300
    with pytest.raises(NotFound, match="no node 'host99'"):
        names(node="host99")
    with pytest.raises(NotFound, match="external address"):
        names(address=IPv4Address("192.0.2.1"))


def test_other_orders_have_a_first_page_and_no_second(fleet: Fleet) -> None:
    fleet.pass_ms()
    for sort, key in vms._ORDERS.items():
        found = vms.summaries(fleet.manager, fleet.now, all=True, sort=sort, limit=40)
        every = vms.summaries(fleet.manager, fleet.now, all=True, sort=sort)
        assert found == every[:40] == sorted(every, key=lambda view: (key(view), view.name))[:40]
    busiest = vms.summaries(fleet.manager, fleet.now, all=True, sort="in-use")
    assert (busiest[0].ports_in_use or 0) == max(view.ports_in_use or 0 for view in busiest) > 0
    for ask in (
        lambda: vms.summaries(fleet.manager, fleet.now, all=True, sort="ports", after=("a", "~")),
        lambda: nodes.node_views(fleet.manager, fleet.now, sort="vms", after=("a", "~")),
        lambda: pool.addresses(fleet.manager, sort="free", after=IPv4Address(1)),
    ):
        with pytest.raises(InvalidRequest, match="only; leave out sort="):
            ask()


def test_nodes_are_chosen_sorted_and_come_in_pages(fleet: Fleet) -> None:
    def names(**asked: object) -> list[str]:
        return [view.name for view in nodes.node_views(fleet.manager, fleet.now, **asked)]  # type: ignore[arg-type]

    assert names(role={"edge"}) == ["edge1", "edge2"]
    assert names(match=Patterns(["*1"]), limit=2) == ["edge1", "host1"]
    assert names(after=("host7", "~")) == ["host8", "host9"]
    assert names(state={"away", "not-answering"}) == []
    assert set(names(sort="ports", limit=2)) <= {f"host{number}" for number in range(20)}


def test_addresses_are_chosen_sorted_and_come_in_pages(fleet: Fleet) -> None:
    def found(**asked: object) -> list[str]:
        return [str(view.address) for view in pool.addresses(fleet.manager, **asked)]  # type: ignore[arg-type]

    assert found() == ["203.0.113.0", "203.0.113.1", "203.0.113.2"]
    assert found(match=Patterns(["*.1"])) == ["203.0.113.1"]
    assert found(limit=1, after=IPv4Address("203.0.113.0")) == ["203.0.113.1"]
    for sort, key in pool._ORDERS.items():
        sorted_views = pool.addresses(fleet.manager, sort=sort)
        assert [key(view) for view in sorted_views] == sorted(key(view) for view in sorted_views)


def test_the_command_line_has_the_same_words() -> None:
    from cpm.cli.verbs import list as list_verb
    from cpm.cli.verbs import node

    assert {role.value for role in Role} == set(words.ROLES)
    assert set(list_verb._STATES) == set(words.hyphenated(words.VM_STATES))
    assert set(node._STATES) == set(words.hyphenated(words.NODE_STATES))
