"""What a node found to be wrong with its machine, or with a VM's way, is shown for as long as it says so."""

from __future__ import annotations

from cpm.queries import vms as vms_queries
from cpm.queries.nodes import node_views
from tests.fakes.site import Site
from tests.unit.site.test_order import HOST1, VM, started


def warnings(site: Site) -> tuple[str, ...]:
    assert site.manager is not None
    return next(view.warnings for view in node_views(site.manager, site.now) if view.name == HOST1)


def say(site: Site, *words: str) -> None:
    machine = site.machines[HOST1]
    assert machine.node is not None
    machine.node.reports.send(1.0, {}, None, machine.node.in_force, {}, warnings=words)
    site._carry_out(machine)
    site.run()


def test_the_last_report_counts() -> None:
    site = Site()
    assert warnings(site) == ()
    say(site, "packets of VMs on br0 leave by wg0")
    assert warnings(site) == ("packets of VMs on br0 leave by wg0",)
    say(site)
    assert warnings(site) == ()


def test_a_vm_whose_packets_go_astray_is_misrouted_while_its_host_says_so() -> None:
    site = Site()
    started(site)

    def shown(problem: str) -> tuple[str, str]:
        machine = site.machines[HOST1]
        assert machine.node is not None
        assert site.manager is not None
        problems = {VM: problem} if problem else {}
        machine.node.reports.send(1.0, {}, None, machine.node.in_force, {}, way_problems=problems)
        site._carry_out(machine)
        site.run()
        view = vms_queries.detail(site.manager, site.now, VM).domain
        return view.state, view.problem

    assert shown("") == ("active", "")
    assert shown("leave by wg0, not to an edge") == ("misrouted", "its packets leave by wg0, not to an edge")
    assert shown("") == ("active", "")
