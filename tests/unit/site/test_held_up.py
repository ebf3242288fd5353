"""What a node that is away or does not answer keeps from others is named, with the node, the time and the remedy."""

from __future__ import annotations

from cpm.queries import explain_facts, metrics, node_states, nodes
from cpm.queries import vms as vms_queries
from tests.fakes.site import Site
from tests.unit.site.test_edge_service import (
    EDGE1,
    EDGE2,
    HOST1,
    HOST2,
    OTHER,
    VM,
    fence,
    resize,
    size,
    started,
    wait,
)

AWAY = "its natd has ended, or does not reach cpmd; see `systemctl status natd` there"
REMEDY = (
    "256 ports that were given back have waited 5 minutes for {node}: start its natd; or, if it forwards nothing any "
    "more, `virt-ports node fence {node}` (and `node remove`, if it is gone for good)"
)


def problems(site: Site) -> list[str]:
    assert site.manager is not None
    return list(node_states.problems(site.manager, site.now))


def metric(site: Site, name: str) -> dict[str, float]:
    """Return the values of a metric of nodes that are not 0."""
    assert site.manager is not None
    values = {}
    for line in metrics.exposition(site.manager, site.now).body.decode().splitlines():
        if line.startswith(f'virt_ports_node_{name}{{node="'):
            values[line.split('"')[1]] = float(line.split()[-1])
    return {node: value for node, value in values.items() if value}


def test_a_scrapped_edge_is_named_with_the_ports_that_wait_for_it_until_it_is_fenced() -> None:
    site = Site(hold_down_s=10.0)
    started(site)
    started(site, OTHER)
    site.kill_natd(EDGE2)
    site.stop_vm(VM)
    site.run()
    wait(site, 9.0)
    assert not metric(site, "held_ports"), "its hold-down has not passed"
    wait(site, 301.0)
    assert problems(site) == [
        f"edge2: out of service: it has been away for 5 minutes: {AWAY}; let the router outside send it no packets",
        REMEDY.format(node="edge2"),
    ]
    assert site.manager is not None
    view = next(view for view in nodes.node_views(site.manager, site.now) if view.name == EDGE2)
    assert (view.held_ports, view.held_since) == (256, site.now - 300.0)
    assert metric(site, "held_ports") == {"edge2": 256.0}
    assert metric(site, "behind_seconds") == {"edge2": 310.0}
    assert metric(site, "in_service") == {"edge1": 1.0}
    assert REMEDY.format(node="edge2") + "." in explain_facts.explanation(site.manager, OTHER, site.now).lines
    [gone] = [each for each in vms_queries.summaries(site.manager, site.now, all=True) if each.uuid == VM]
    assert (gone.state, gone.problem) == ("gone", "its ports wait for edge2; see `virt-ports node list`")
    fence(site, EDGE2)
    assert problems(site) == []
    assert not metric(site, "held_ports")


def test_a_host_that_is_away_is_named_with_the_ports_that_its_vm_has_left() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    site.ask(lambda manager: manager.sizer.relocate(VM, site.now))
    site.run()
    site.kill_natd(HOST1)
    wait(site, 300.0)
    assert problems(site) == [f"host1: it has been away for 5 minutes: {AWAY}", REMEDY.format(node="host1")]


def test_nodes_that_keep_up_are_not_named_however_long_a_range_leaves() -> None:
    site = Site(hold_down_s=600.0)
    started(site)
    started(site, OTHER)
    assert site.open(OTHER, 200) is not None
    site.stop_vm(VM)
    resize(site, 64, OTHER)
    wait(site, 300.0)
    assert problems(site) == []
    assert not metric(site, "held_ports")
    assert not metric(site, "behind_seconds")
    assert metric(site, "in_service") == {EDGE1: 1.0, EDGE2: 1.0}


def test_a_host_that_does_not_answer_is_named_and_nobody_else_notices() -> None:
    site = Site()
    started(site)
    started(site, OTHER, HOST2)
    site.machines[HOST1].stuck = True
    resize(site, 512)
    resize(site, 512, OTHER)
    wait(site, 9.0)
    assert problems(site) == [], "it has ten seconds"
    wait(site, 2.0)
    assert problems(site) == [
        "host1: it has not confirmed what it was sent for 10 seconds, see `journalctl -u natd` there"
    ]
    assert (size(site), size(site, OTHER)) == (256, 512)
    site.machines[HOST1].stuck = False
    wait(site, 1.0)
    assert problems(site) == []
    assert size(site) == 512


def test_a_revoked_edge_is_not_named() -> None:
    site = Site()
    started(site)
    site.ask(lambda manager: manager.membership.revoke(EDGE2, site.now))
    wait(site, 30.0)
    assert problems(site) == []


def test_explain_names_the_nodes_that_a_new_range_waits_for() -> None:
    site = Site()
    started(site)

    def explained() -> list[str]:
        assert site.manager is not None
        lines = explain_facts.explanation(site.manager, VM, site.now).lines
        return [line for line in lines if "yet: this waits for" in line]

    assert explained() == []
    site.machines[EDGE1].stuck = site.machines[EDGE2].stuck = True
    resize(site, 512)
    wait(site, 20.0)
    waits = "New connections do not get 1280-1535 yet: this waits for {}; see `virt-ports node list`."
    assert explained() == [waits.format("edge1, edge2")]
    site.machines[HOST1].stuck = True
    site.machines[EDGE1].stuck = site.machines[EDGE2].stuck = False
    wait(site, 1.0)
    assert explained() == [waits.format("host1")]
    site.machines[HOST1].stuck = False
    wait(site, 1.0)
    assert explained() == []
