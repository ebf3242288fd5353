"""A node that is connected and has stopped reporting is named, with an event."""

from __future__ import annotations

from cpm.core.journal import NodeEvent
from cpm.core.silence import SILENT_S
from cpm.protocol.model import NodeName
from cpm.queries import node_states
from tests.fakes.site import Site
from tests.unit.site.test_node_warnings import warnings
from tests.unit.site.test_order import HOST1

HOST2 = NodeName("host2")


def pass_time(site: Site, seconds: int, *reporting: NodeName) -> None:
    for _ in range(seconds):
        site.pass_time(1.0)
        site.run()
        for name in reporting:
            site.report(name, busy=False)
            site.run()


def events(site: Site) -> list[str]:
    entries = site.ledger.reader().node_events()
    return [entry.event.value for entry in entries if entry.node == HOST1 and entry.event is not NodeEvent.APPROVED]


def problems(site: Site) -> list[str]:
    assert site.manager is not None
    return list(node_states.problems(site.manager, site.now))


def test_a_frozen_natd_is_named_while_nothing_has_to_be_confirmed() -> None:
    site = Site()
    pass_time(site, 10, HOST1, HOST2)
    assert warnings(site) == ()
    pass_time(site, 4, HOST2)
    assert warnings(site) == ()
    pass_time(site, 3, HOST2)
    (text,) = warnings(site)
    assert text.startswith("no report for 7 seconds, although it is connected: its natd is frozen")
    assert problems(site) == [f"host1: {text}"]
    assert events(site) == ["silent"]
    pass_time(site, 60, HOST2)
    assert events(site) == ["silent"]
    pass_time(site, 1, HOST1, HOST2)
    assert warnings(site) == ()
    assert events(site) == ["silent", "reporting"]


def test_a_node_that_is_away_is_not_silent_as_well() -> None:
    site = Site()
    pass_time(site, 2, HOST1)
    pass_time(site, 8)
    site.disconnect(HOST1)
    pass_time(site, 2)
    assert warnings(site) == ()
    site.connect(HOST1)
    pass_time(site, 20)
    assert warnings(site) == ()


def test_a_manager_that_was_frozen_itself_blames_nobody() -> None:
    site = Site()
    pass_time(site, 2, HOST1)
    site.now += 10 * SILENT_S
    # Its tick comes first; the reports of the meantime are read then.
    site.pass_time(1.0)
    assert events(site) == []
    pass_time(site, 7)
    assert events(site) == ["silent"]
