"""What is counted for metrics: changes of ranges, refusals once each, times; also over a manager that is replaced."""

from __future__ import annotations

from cpm.core.tallies import Tallies
from cpm.protocol.errors import QuotaReached
from tests.fakes.site import Site
from tests.unit.site.test_edge_service import HOST1, VM, started, wait


def tallies(site: Site) -> Tallies:
    assert site.manager is not None
    return site.manager.fleet.tallies


def test_a_start_and_a_growth_are_counted_with_their_times() -> None:
    site = Site()
    started(site)
    assert tallies(site).resize_s[("start",)].count == 1
    assert tallies(site).resize_s[("growth",)].count == 0
    site.ask(lambda manager: manager.sizer.resize_to(VM, 1024, site.now))
    site.run()
    assert (tallies(site).resizes["grow"], tallies(site).of_vm[VM].resizes["grow"]) == (1, 1)
    assert tallies(site).resize_s[("growth",)].count == 1
    assert 0 <= tallies(site).resize_s[("growth",)].sum_s < 1
    site.ask(lambda manager: manager.sizer.relocate(VM, site.now))
    site.run()
    assert tallies(site).resizes["relocate"] == 1
    assert tallies(site).resize_s[("replacement",)].count == 1
    site.ask(lambda manager: manager.sizer.resize_to(VM, 256, site.now))
    site.run()
    assert tallies(site).resizes["shrink"] == 1


def test_a_refusal_that_lasts_is_counted_once() -> None:
    site = Site()
    started(site)
    tally = tallies(site)

    def refuse() -> None:
        site.ask(lambda manager: manager.sizer.on_not_started(VM, QuotaReached(HOST1, "ports", 10)))

    refuse()
    refuse()
    assert tally.of_vm[VM].refusals == {"at-host-quota": 1}
    site.ask(lambda manager: manager.sizer.of(VM).on_enough())
    refuse()
    assert tally.refusals["at-host-quota"] == 2


def test_a_vm_that_is_gone_leaves_no_counts() -> None:
    site = Site(hold_down_s=1.0)
    started(site)
    site.ask(lambda manager: manager.sizer.resize_to(VM, 1024, site.now))
    site.run()
    site.stop_vm(VM)
    wait(site, 30.0)
    assert site.manager is not None
    assert VM not in site.manager.fleet.vms
    assert VM not in tallies(site).of_vm
    assert tallies(site).resizes["grow"] == 1
