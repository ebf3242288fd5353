"""The text format, read by promtool and by the parser of prometheus_client."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cpm.service.metrics import cpmd, natd
from cpm.service.metrics.values import BOUNDS_S, Histogram, Kind, Metric
from tests.promtool import check_metrics

GAUGE = Metric("virt_ports_things", Kind.GAUGE, 'A "help" with \\ and\na line.', ("name",))


@given(st.text())
def test_any_label_reads_back_as_its_printable_form(name: str) -> None:
    (family,) = text_string_to_metric_families(GAUGE.text([((name,), 7)]))
    (sample,) = family.samples
    assert sample.value == 7
    assert sample.labels["name"].isprintable()
    if name.isprintable():
        assert sample.labels["name"] == name


def test_what_needs_escaping_passes_promtool() -> None:
    text = GAUGE.text([(('a"b\\c\nd',), 1), (("\u202e",), True)])
    assert check_metrics(text) == ""
    assert text.endswith('{name="\\\\u202e"} 1\n')


def test_a_histogram_counts_each_observation_once_in_its_bucket() -> None:
    histogram = Histogram()
    for seconds in (-1.0, 0.001, 0.0011, 7.0, 31.0):
        histogram.observe(seconds)
    counts = dict(histogram.cumulative())
    assert (counts["0.001"], counts["0.0025"], counts["5"], counts["10"], counts["30"]) == (2, 3, 3, 4, 4)
    assert (counts["+Inf"], histogram.count) == (5, 5)
    assert histogram.sum_s == pytest.approx(38.0021)


def test_a_histogram_is_one_to_promtool_and_prometheus_client() -> None:
    metric = Metric("virt_ports_x_seconds", Kind.HISTOGRAM, "Help.", ("of",))
    first, second = Histogram(), Histogram()
    first.observe(0.2)
    text = metric.histograms({("b",): first, ("a",): second})
    assert check_metrics(text) == ""
    (family,) = text_string_to_metric_families(text)
    assert family.type == "histogram"
    assert len(family.samples) == 2 * (len(BOUNDS_S) + 3)


@pytest.mark.parametrize("metric", [*cpmd.ALL, *natd.ALL], ids=lambda metric: metric.name)
def test_names_and_helps_follow_the_conventions(metric: Metric) -> None:
    """https://prometheus.io/docs/practices/naming/; promtool sees only metrics that have samples."""
    assert metric.name.startswith("virt_ports_")
    assert metric.name.endswith("_total") == (metric.kind is Kind.COUNTER)
    assert metric.name.endswith("_seconds") or metric.kind is not Kind.HISTOGRAM
    assert metric.help.endswith(".")
    if metric.kind is Kind.HISTOGRAM:
        histogram = Histogram()
        assert check_metrics(metric.histograms({tuple("x" for _ in metric.labels): histogram})) == ""
    else:
        assert check_metrics(metric.text([([f"{label}1" for label in metric.labels], 3)])) == ""


def test_no_name_is_used_twice() -> None:
    names = [metric.name for metric in (*cpmd.ALL, *natd.ALL)]
    assert len(names) == len(set(names))
