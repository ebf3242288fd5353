"""cpmd's metrics: all declared ones and no others, in pieces between which the manager changes."""

from __future__ import annotations

import re
from ipaddress import IPv4Address

import pytest

from cpm.core.journal import LedgerState
from cpm.core.manager import Manager
from cpm.protocol.messages import Measured, Report
from cpm.protocol.model import AllocationId, Node, NodeName, Role
from cpm.protocol.walltime import UtcSeconds, WallTime
from cpm.queries import metrics
from cpm.queries.status import About
from cpm.service.metrics import cpmd as declared
from cpm.settings import Settings
from tests.fakes.site import Site
from tests.promtool import check_metrics
from tests.unit.site.test_edge_service import EDGE2, HOST1, VM, started, wait

OF_THE_MANAGER = {metric for metric in declared.ALL if metric not in (*declared.EVENTS, declared.CERTIFICATE)}
"""The daemon adds the others."""
ABOUT = About("1.2.3", WallTime(UtcSeconds(0.0)), "/ledger.db")


def text_of(site: Site, about: About = ABOUT) -> str:
    assert site.manager is not None
    return "".join(metrics.pieces(site.manager, site.now, about))


def value(text: str, series: str) -> float:
    (found,) = re.findall(rf"^{re.escape(series)} (\S+)$", text, re.M)
    return float(found)


@pytest.fixture
def site() -> Site:
    """A VM at its cap that is measured, and an edge that is away."""
    site = Site()
    started(site)
    node = site.machines[HOST1].node
    assert node is not None
    vms = (Measured(VM, 10.0, 0.1, ports_in_use=256),)
    report = Report(
        node.in_force.generation, 1.0, vms, refused={VM: 7}, limited={VM: 9}, dropped={"unmapped": 3}, warnings=("hot",)
    )
    site.ask(lambda manager: manager.on_message(HOST1, report, site.now))
    site.run()
    site.kill_natd(EDGE2)
    site.run()
    return site


def test_promtool_finds_nothing_to_say(site: Site) -> None:
    assert check_metrics(text_of(site)) == ""


def test_all_that_is_declared_is_there_and_nothing_else(site: Site) -> None:
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text_of(site), re.M))
    assert types == {metric.name: metric.kind for metric in OF_THE_MANAGER}


def test_the_values_of_a_vm(site: Site) -> None:
    text, of = text_of(site), f'{{name="vm-0001",uuid="{VM}"}}'
    assert site.manager is not None
    assert value(text, f"virt_ports_domain_used_ports{of}") == 256
    grown = value(text, f"virt_ports_domain_range_ports{of}")
    assert grown > 256, "the manager saw a full range"
    assert value(text, f"virt_ports_domain_held_ports{of}") >= grown
    assert value(text, f"virt_ports_domain_cap_ports{of}") == site.manager.cap(site.manager.fleet.vms[VM])
    assert value(text, f"virt_ports_domain_connections_limit{of}") == 65536
    assert value(text, f"virt_ports_domain_refused_packets_total{of}") == 7
    assert value(text, f"virt_ports_domain_limited_packets_total{of}") == 9
    assert value(text, f'virt_ports_domain_resizes_total{{name="vm-0001",uuid="{VM}",kind="grow"}}') == 1
    assert f'virt_ports_domain_info{{name="vm-0001",uuid="{VM}",node="host1",address="' in text


def test_the_values_of_nodes(site: Site) -> None:
    text = text_of(site)
    assert value(text, 'virt_ports_node_connected{node="edge2"}') == 0
    assert value(text, 'virt_ports_node_synced{node="host1"}') == 1
    assert value(text, 'virt_ports_node_warnings{node="host1"}') == 1
    assert value(text, 'virt_ports_node_dropped_packets_total{node="host1",reason="unmapped"}') == 3
    assert 'virt_ports_node_report_age_seconds{node="edge2"}' not in text
    age = value(text, 'virt_ports_node_report_age_seconds{node="host1"}')
    site.pass_time(0.25)
    assert value(text_of(site), 'virt_ports_node_report_age_seconds{node="host1"}') >= age


def test_a_vm_that_is_exhausted_is_counted_until_a_minute_later(site: Site) -> None:
    exhausted = 'virt_ports_domains_short{event="exhausted"}'
    assert value(text_of(site), exhausted) == 0
    node = site.machines[HOST1].node
    assert node is not None
    report = Report(node.in_force.generation, 1.0, (Measured(VM, 10.0, 0.1, ports_in_use=256),), refused={VM: 8})
    site.ask(lambda manager: manager.on_message(HOST1, report, site.now))
    site.run()
    assert value(text_of(site), exhausted) == 1
    wait(site, 61.0)
    assert value(text_of(site), exhausted) == 0


def test_without_metrics_of_single_vms_the_number_of_lines_does_not_depend_on_them(site: Site) -> None:
    few = text_of(site, About("1", ABOUT.started, "", per_vm_metrics=False))
    assert str(VM) not in few
    missing = {metric.name for metric in OF_THE_MANAGER} - set(re.findall(r"^# TYPE (\S+) ", few, re.M))
    assert missing == {metric.name for metric in declared.PER_VM}
    assert 'virt_ports_domains{state="active"} 1' in few


def test_what_changes_between_two_pieces_breaks_nothing(site: Site) -> None:
    """A VM ends and an address goes while the text is being sent."""
    assert site.manager is not None
    unused = IPv4Address("203.0.113.250")
    before = len(list(metrics.pieces(site.manager, site.now)))
    for moment in range(before):
        again = Site()
        started(again)
        assert again.manager is not None
        pieces = metrics.pieces(again.manager, again.now)
        first = [next(pieces) for _ in range(min(moment, 4))]
        again.stop_vm(VM)
        again.pass_time(200.0)
        text = "".join([*first, *pieces])
        assert check_metrics(text) == ""
        assert str(unused) not in text


def test_a_name_in_a_label_is_escaped() -> None:
    node = Node(NodeName("edge\x1b[2J\u202e1"), frozenset({Role.EDGE}), IPv4Address("172.30.0.21"))
    state = LedgerState(0, (), (node,), (), (), AllocationId(1))
    manager = Manager(state, Settings().rules(), 1, 0.0)
    text = metrics.exposition(manager, 1.0).body.decode()
    assert 'virt_ports_node_connected{node="edge\\\\x1b[2J\\\\u202e1"} 0' in text
    assert all(line.isprintable() for line in text.splitlines())
