from __future__ import annotations

import pytest

from lab.__main__ import _parser
from lab.net import Site
from lab.sites import SINGLE, SITES

every_site = pytest.mark.parametrize("site", SITES.values(), ids=lambda site: site.name)


@every_site
def test_no_two_ports_of_a_segment_have_the_same_address(site: Site) -> None:
    for segment in site.segments:
        addresses = [port.address for _, port in site.plugged_into(segment)]
        assert len(set(addresses)) == len(addresses) > 1
        assert len({address.network for address in addresses}) == 1


@every_site
def test_names_of_interfaces_fit_the_kernel(site: Site) -> None:
    for machine in site.machines:
        for port in machine.ports:
            assert len(port.device) <= 15
            assert len(f"{machine.name}-{port.device[:2]}") <= 15


@every_site
def test_every_part_of_virt_ports_runs_somewhere(site: Site) -> None:
    assert site.hosts
    assert site.edges
    assert "manager" in site.manager.roles
    assert set(site.nodes) == {*site.hosts, *site.edges}


@every_site
def test_the_pool_is_one_row_of_addresses(site: Site) -> None:
    pool = site.external_addresses
    assert [int(address) - int(pool[0]) for address in pool] == list(range(len(pool)))


@every_site
def test_up_and_demo_take_the_site_by_its_name(site: Site) -> None:
    for command in ("up", "demo"):
        assert _parser().parse_args([command, "--site", site.name]).site == site.name


def test_a_site_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["up", "--site", "triple"])
    assert "choose from" in capsys.readouterr().err


def test_the_single_server_has_no_address_but_the_pools() -> None:
    server = SINGLE.machine("server")
    assert [port.address.ip for port in server.ports] == list(SINGLE.external_addresses)
    assert server == SINGLE.manager
    assert (SINGLE.hosts, SINGLE.edges) == ((server.name,), (server.name,))
