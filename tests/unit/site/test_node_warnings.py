"""What a node found to be wrong with its machine is shown for as long as it says so."""

from __future__ import annotations

from cpm.queries.nodes import node_views
from tests.fakes.site import Site
from tests.unit.site.test_order import HOST1


def warnings(site: Site) -> tuple[str, ...]:
    assert site.manager is not None
    return next(view.warnings for view in node_views(site.manager) if view.name == HOST1)


def say(site: Site, *words: str) -> None:
    machine = site.machines[HOST1]
    assert machine.node is not None
    machine.node.report(1.0, {}, None, machine.node.applied_generation, {}, warnings=words)
    site._carry_out(machine)
    site.run()


def test_the_last_report_counts() -> None:
    site = Site()
    assert warnings(site) == ()
    say(site, "packets of VMs on br0 leave by wg0")
    assert warnings(site) == ("packets of VMs on br0 leave by wg0",)
    say(site)
    assert warnings(site) == ()
