"""What is said of other software's filters. Whether the lines help: tests/netns/test_forward_filters.py."""

from __future__ import annotations

import pytest

from natctl.ruleset.forward_filters import LEGACY, ForwardFilter, sentence, ways_of_edge, ways_of_host

IPTABLES, OWN = ForwardFilter("ip", "filter", "FORWARD"), ForwardFilter("inet", "firewall", "forward")
HOST = ways_of_host({"virbr0"})


@pytest.mark.parametrize(
    ("found", "has_docker", "line"),
    [
        (IPTABLES, False, "iptables -I FORWARD -i virbr0 -j ACCEPT"),
        (IPTABLES, True, "iptables -I DOCKER-USER -o virbr0 -j ACCEPT"),
        (OWN, True, 'nft insert rule inet firewall forward iifname "virbr0" accept'),
        (ForwardFilter(LEGACY, "filter", "FORWARD"), True, "iptables-legacy -I FORWARD -o virbr0 -j ACCEPT"),
    ],
)
def test_the_line_is_one_of_the_tool_that_made_the_chain(found: ForwardFilter, has_docker: bool, line: str) -> None:
    assert f"`{line}`" in sentence(found, HOST, has_docker=has_docker)


def test_an_edge_gets_lines_for_both_directions_between_its_interfaces() -> None:
    ways = ways_of_edge({"eth0"}, {"eth1"})
    assert ways == (("eth0", "eth1"), ("eth1", "eth0"))
    assert '`nft insert rule inet firewall forward iifname "eth1" oifname "eth0" accept`' in sentence(
        OWN, ways, has_docker=False
    )
    assert "`iptables -I FORWARD -i eth0 -o eth1 -j ACCEPT`" in sentence(IPTABLES, ways, has_docker=False)
