"""
The measurements of one host, for clients that follow them.

Tested in tests/unit/cpm/api/test_recorded_answers.py.
"""

from __future__ import annotations

from cpm.api.views import MeasurementView, ReportView
from cpm.core.manager import Manager
from cpm.protocol.messages import Report
from cpm.protocol.model import NodeName


def report_view(manager: Manager, node: NodeName, report: Report, now: float) -> ReportView:
    """
    Return a host's report, without VMs that the manager does not know.

    :param now: Ledger time.
    """
    measurements = (
        MeasurementView(
            vm.name,
            vm.uuid,
            measured.packets_per_s,
            measured.megabits_per_s,
            measured.ports_in_use,
            sum(draining.connections for draining in measured.draining),
            measured.new_connections_per_s,
        )
        for measured in report.vms
        if (vm := manager.fleet.vms.get(measured.domain)) is not None
    )
    return ReportView(manager.fleet.utc(now), node, report.period_s, tuple(measurements))
