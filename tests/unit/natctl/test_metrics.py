"""natd's metrics: all declared ones and no others, as promtool reads them."""

from __future__ import annotations

import errno
import re

import pytest

from cpm.protocol.errors import KernelError
from cpm.service.metrics import natd as declared
from cpm.service.metrics.values import Histogram
from natctl.metrics import Metrics, Now
from tests.promtool import check_metrics

NOW = Now(
    version="1.2.3",
    node="host1",
    is_connected=True,
    domains=3,
    warnings=0,
    dropped={"unmapped": 7},
    port_requests={"answered": 5, "dropped": 2},
    entries=100,
    entries_limit=262144,
    signal_s=Histogram(),
)


def test_all_that_is_declared_is_there_and_nothing_else_of_ours() -> None:
    metrics = Metrics()
    metrics.connections = 17
    text = "".join(metrics.pieces(NOW))
    assert check_metrics(text) == ""
    types = dict(re.findall(r"^# TYPE (virt_ports\S+) (\S+)$", text, re.M))
    # The daemon adds when its certificate ends.
    assert types == {each.name: each.kind for each in declared.ALL if each is not declared.CERTIFICATE}
    assert 'virt_ports_natd_dropped_packets_total{reason="unmapped"} 7' in text
    assert "process_resident_memory_bytes" in text


def test_what_is_not_known_is_left_out() -> None:
    text = "".join(Metrics().pieces(NOW))
    assert "virt_ports_natd_connections" not in text


def test_a_change_that_fails_is_measured_and_counted() -> None:
    metrics = Metrics()
    with pytest.raises(KernelError), metrics.programming("some"):
        raise KernelError("add an element", errno.EBUSY, "busy")
    with metrics.programming("all"):
        pass
    metrics.on_kernel_error(KernelError("read", 0, "no answer"))
    metrics.on_hook_answered("start", 0.02)
    text = "".join(metrics.pieces(NOW))
    for line in (
        'virt_ports_natd_kernel_errors_total{error="EBUSY"} 1',
        'virt_ports_natd_kernel_errors_total{error="other"} 1',
        'virt_ports_natd_programming_seconds_count{of="some"} 1',
        'virt_ports_natd_programming_seconds_count{of="all"} 1',
        'virt_ports_natd_hook_seconds_bucket{operation="start",le="0.025"} 1',
    ):
        assert f"{line}\n" in text
