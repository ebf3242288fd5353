"""A VM whose ports lie apart: no free run is long enough for all of them, and there are ports enough."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from lab.daemons import DaemonSettings
from lab.lab import Lab
from lab.traffic import hold, sink
from lab.witness import Ports
from tests.e2e.labs import running, unique_name
from tests.e2e.observing import assert_agree, facts, states

pytestmark = pytest.mark.e2e

EXTERNAL = IPv4Address("203.0.113.1")
PIECES = (Ports(EXTERNAL, 1024, 1279), Ports(EXTERNAL, 1344, 1599))
"""All that is free."""
SETTINGS = DaemonSettings(
    cpmd={"pool": {"initial": 256, "floor": 64, "start_reserve": 0.0}},
    natd={},
    hosts={"host.timeouts": {"tcp_reset_s": 1}},
)


@pytest.fixture
def lab() -> Iterator[Lab]:
    with running(unique_name("p"), SETTINGS) as site:
        site.operate("pool", "add", str(EXTERNAL), "--reserved", "1280-1343,1600-65535")
        site.operate("pool", "remove", "203.0.113.2-203.0.113.4")
        with sink(site):
            yield site


def held(lab: Lab) -> list[Ports]:
    return sorted((ports for found in states(lab, "a").values() for ports in found), key=lambda ports: ports.first)


def test_connections_go_to_where_ports_are_free_and_none_is_refused_or_cut(lab: Lab) -> None:
    lab.add_guest("a", "host1")
    assert states(lab, "a") == {"active": [PIECES[0]]}
    slowly = ("-r", "30", "-T", "30", "-R")
    with hold(lab, "a", 200, *slowly) as first, hold(lab, "a", 120, *slowly) as second:
        assert held(lab) == [*PIECES], "more connections than a piece has ports"
        assert_agree(lab)
        assert "new connections use" in facts(lab, "explain", "a")["apart"]
        ended = first.finish()
        # Together more than the piece has that the second are on: back to ports that the first have left.
        with hold(lab, "a", 200, *slowly) as third:
            assert held(lab) == [*PIECES]
            assert_agree(lab)
            tallies = (ended, third.finish(), second.finish())
    assert [(tally.ok, tally.alive, tally.fail, tally.late) for tally in tallies] == [
        (count, count, 0, 0) for count in (200, 200, 120)
    ]
