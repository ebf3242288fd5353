"""
The alert rules: Prometheus' own evaluation raises each for the case that it is for, and clears it afterwards.

``tests/unit/monitoring/test_prometheus.py`` has a Prometheus that scrapes a cpmd.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from cpm.service.metrics import cpmd, natd
from tests import promtool

REPOSITORY = Path(__file__).parents[3]
RULES = REPOSITORY / "monitoring" / "alerts.yaml"
RUNBOOKS = REPOSITORY / "docs" / "how-to" / "alerts.md"
NAMES = re.findall(r"^      - alert: (\w+)$", RULES.read_text(), re.M)


class Case(NamedTuple):
    """Series over 30 s steps, a time at which the alert is raised, and one at which it is not any more."""

    series: dict[str, str]
    raised_min: int
    cleared_min: int
    quiet: dict[str, str]
    """Series for which it must never be raised."""


def node(metric: str, labels: str = 'node="edge1"') -> str:
    return f'virt_ports_node_{metric}{{instance="m",job="cpmd",{labels}}}'


def site(metric: str, labels: str = "") -> str:
    return f'virt_ports_{metric}{{instance="m",job="cpmd"{"," if labels else ""}{labels}}}'


DAY = 86400
FREE, TAKEN = (site("external_ports", f'address="203.0.113.1",use="{use}"') for use in ("free", "allocated"))
BUCKETS = [site("resize_seconds_bucket", f'le="{le}",of="start"') for le in ("1", "10", "+Inf")]

CASES = {
    "VirtPortsManagerDown": Case({site("epoch"): "1x10 _x20 1x30"}, 13, 20, {site("epoch"): "1x60"}),
    "VirtPortsLedgerUnwritable": Case(
        {site("ledger_writable"): "1x4 0x10 1x30"}, 4, 8, {site("ledger_writable"): "1x60"}
    ),
    "VirtPortsLedgerRestoring": Case(
        {site("ledger_restoring"): "1x30 0x30"}, 12, 17, {site("ledger_restoring"): "1x4 0x60"}
    ),
    "VirtPortsDecisionRefused": Case(
        {site("refused_decisions_total"): "0x4 1x200"}, 4, 65, {site("refused_decisions_total"): "7x60"}
    ),
    "VirtPortsClockStep": Case({site("clock_steps_total"): "3x4 4x100"}, 4, 20, {site("clock_steps_total"): "3x60"}),
    "VirtPortsEventsNotDelivered": Case(
        {site("events_failing", 'to="webhook"'): "1x30 0x30"}, 12, 17, {site("events_failing", 'to="webhook"'): "0x60"}
    ),
    "VirtPortsEventsLost": Case(
        {site("events_lost_total", 'to="file"'): "0x4 9x200"}, 4, 65, {site("events_lost_total", 'to="file"'): "9x60"}
    ),
    "VirtPortsPoolNearlyGone": Case(
        {FREE: "1000x20 9000x40", TAKEN: "63512x20 55512x40"}, 7, 12, {FREE: "4000x60", TAKEN: "60512x60"}
    ),
    "VirtPortsDomainsLackPorts": Case(
        {
            site("domains_lacking_ports", 'want="start"'): "2x10 0x30",
            site("domains_lacking_ports", 'want="growth"'): "0x40",
        },
        3, 8, {site("domains_lacking_ports", 'want="start"'): "0x60"},
    ),
    "VirtPortsDomainsAtCap": Case(
        {site("domains_short", 'event="exhausted"'): "1x10 0x30"}, 3, 8,
        {site("domains_short", 'event="exhausted"'): "0x60", site("domains_short", 'event="short"'): "3x60"},
    ),
    "VirtPortsDomainsLimited": Case(
        {site("domains_short", 'event="limited"'): "1x10 0x30"}, 3, 8,
        {site("domains_short", 'event="exhausted"'): "3x60"}
    ),
    "VirtPortsDuplicateUUID": Case(
        {site("domains", 'state="claimed"'): "1x10 _x30"}, 3, 12, {site("domains", 'state="active"'): "9x60"}
    ),
    "VirtPortsResizesSlow": Case(
        {BUCKETS[0]: "0x60", BUCKETS[1]: "0+10x30 300x60", BUCKETS[2]: "0+10x30 300x60"}, 14, 30,
        {BUCKETS[0]: "0+10x60", BUCKETS[1]: "0+10x60", BUCKETS[2]: "0+10x60"},
    ),
    "VirtPortsNodeAway": Case(
        {node("connected"): "1x4 0x12 1x30", node("fenced"): "0x60"}, 6, 9,
        {node("connected"): "0x60", node("fenced"): "1x60"},
    ),
    "VirtPortsNodeNotSynced": Case(
        {node("synced"): "0x12 1x30", node("connected"): "1x60"}, 4, 8,
        {node("synced"): "0x60", node("connected"): "0x60"}
    ),
    "VirtPortsEdgeOutOfService": Case(
        {node("in_service"): "0x12 1x30", node("fenced"): "0x60"}, 4, 8,
        {node("in_service"): "0x60", node("fenced"): "1x60"},
    ),
    "VirtPortsNodeHoldsPortsBack": Case({node("held_ports"): "256x20 0x30"}, 7, 12, {node("held_ports"): "256x6 0x60"}),
    "VirtPortsNodeFenced": Case({node("fenced"): "1x4 0x30"}, 1, 4, {node("fenced"): "0x60"}),
    "VirtPortsNodeSilent": Case(
        {node("report_age_seconds"): "0+30x10 1x30"}, 5, 8, {node("report_age_seconds"): "5x60"}
    ),
    "VirtPortsNodeWarnings": Case({node("warnings"): "1x30 0x30"}, 12, 17, {node("warnings"): "1x4 0x60"}),
    "VirtPortsMachineWaitsForApproval": Case(
        {site("nodes_waiting_for_approval"): "1x20 0x30"}, 7, 12, {site("nodes_waiting_for_approval"): "0x60"}
    ),
    "VirtPortsCertificateEnds": Case(
        {site("certificate_end_timestamp_seconds", 'of="listen"'): f"{20 * DAY}x30 {700 * DAY}x60"}, 12, 17,
        {site("natd_certificate_end_timestamp_seconds", 'of="manager"'): f"{40 * DAY}x60"},
    ),
    "VirtPortsCertificateEndsVerySoon": Case(
        {site("natd_certificate_end_timestamp_seconds", 'of="manager-ca"'): f"{6 * DAY}x30 {700 * DAY}x60"}, 12, 17,
        {site("certificate_end_timestamp_seconds", 'of="page"'): f"{20 * DAY}x60"},
    ),
    "VirtPortsNatdDisconnected": Case(
        {site("natd_manager_connected"): "0x10 1x30"}, 4, 8, {site("natd_manager_connected"): "1x60"}
    ),
    "VirtPortsConnectionTableNearlyFull": Case(
        {site("natd_conntrack_entries"): "95x10 20x30", site("natd_conntrack_entries_limit"): "100x60"}, 4, 8,
        {site("natd_conntrack_entries"): "80x60", site("natd_conntrack_entries_limit"): "100x60"},
    ),
    "VirtPortsKernelRepaired": Case(
        {site("natd_kernel_repairs_total"): "0+3x8 24x100"}, 4, 25, {site("natd_kernel_repairs_total"): "9x60"}
    ),
    "VirtPortsKernelErrors": Case(
        {site("natd_kernel_errors_total", 'error="EBUSY"'): "0+3x8 24x100"}, 4, 25,
        {site("natd_kernel_errors_total", 'error="EBUSY"'): "9x60"},
    ),
}  # fmt: skip


def test_promtool_accepts_the_rules() -> None:
    assert f"{len(NAMES)} rules found" in promtool.run("check", "rules", RULES)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_raised_for_its_case_and_clears(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    firing = f'ALERTS{{alertname="{name}",alertstate="firing"}}'

    def expect(minute: int, *, is_raised: bool) -> dict[str, object]:
        samples = [{"labels": "{}", "value": 1}] if is_raised else []
        return {"expr": f"count({firing})", "eval_time": f"{minute}m", "exp_samples": samples}

    def story(series: dict[str, str], *expected: dict[str, object]) -> dict[str, object]:
        values = [{"series": each, "values": value} for each, value in series.items()]
        return {"interval": "30s", "input_series": values, "promql_expr_test": expected}

    stories = [
        story(
            case.series,
            expect(case.raised_min, is_raised=True),
            expect(case.cleared_min, is_raised=False),
        ),
        story(case.quiet, *(expect(minute, is_raised=False) for minute in (1, 3, 7, 12, 20))),
    ]
    test = {"rule_files": [str(RULES)], "evaluation_interval": "30s", "tests": stories}
    (tmp_path / "test.json").write_text(json.dumps(test))
    promtool.run("test", "rules", tmp_path / "test.json")


def test_each_has_a_runbook_and_each_runbook_an_alert() -> None:
    sections = re.findall(r"^## (\w+)$", RUNBOOKS.read_text(), re.M)
    assert sections == NAMES == list(CASES)
    linked = re.findall(r"^          runbook: docs/how-to/alerts.md#(\w+)$", RULES.read_text(), re.M)
    assert linked == [name.lower() for name in NAMES]


def test_the_severity_and_time_of_a_runbook_are_those_of_its_alert() -> None:
    rules = re.findall(r"- alert: (\w+)\n.*?\n +for: (\w+)\n +labels:\n +severity: (\w+)", RULES.read_text())
    stated = re.findall(r"^## (\w+)\n\n\*(\w+)\*, (?:after (\w+)|at once)\.$", RUNBOOKS.read_text(), re.M)
    assert [(name, time or "0m", severity) for name, severity, time in stated] == rules


def test_rules_use_only_metrics_that_exist() -> None:
    assert unknown_metrics(RULES.read_text()) == set()


def unknown_metrics(text: str) -> set[str]:
    """Return names of ours in expressions that no daemon serves."""
    used = set(re.findall(r"\bvirt_ports_\w+", text))
    known = {metric.name for metric in (*cpmd.ALL, *natd.ALL)}
    known |= {f"{name}{end}" for name in known if name.endswith("_seconds") for end in ("_bucket", "_sum", "_count")}
    return used - known
