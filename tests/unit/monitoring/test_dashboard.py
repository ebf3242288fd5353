"""
The dashboard is one as Grafana's schema has it, and asks only for what the daemons serve.

No Grafana is started: Grafana's own types, generated from its schema (``grafana-foundation-sdk``), read the file and
write it again without loss, and Prometheus parses every expression.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests import promtool
from tests.unit.monitoring.test_alerts import unknown_metrics

FILE = Path(__file__).parents[3] / "monitoring" / "dashboard.json"
DOCUMENT: dict[str, Any] = json.loads(FILE.read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DOCUMENT["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module", autouse=True)
def _panel_types() -> None:
    plugins.register_default_plugins()


def as_grafana_has_it(document: dict[str, Any]) -> Any:
    return json.loads(JSONEncoder().encode(Dashboard.from_json(document)))


def lost(given: Any, kept: Any, path: str = "") -> Iterator[str]:
    """Yield what is in the first and not, or otherwise, in the second."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for key, value in given.items():
            yield from lost(value, kept[key], f"{path}.{key}") if key in kept else [f"{path}.{key}"]
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{path}[{number}]")
    elif given != kept:
        yield path


def test_grafanas_types_know_every_field() -> None:
    assert list(lost(DOCUMENT, as_grafana_has_it(DOCUMENT))) == []


def test_a_field_that_grafana_does_not_know_is_found() -> None:
    wrong = copy.deepcopy(DOCUMENT)
    wrong["panels"][1]["fieldConfig"]["defaults"]["treshold"] = 1
    wrong["panels"][1]["options"]["graphmode"] = "none"
    found = list(lost(wrong, as_grafana_has_it(wrong)))
    assert found == [".panels[1].options.graphmode", ".panels[1].fieldConfig.defaults.treshold"]


def test_prometheus_parses_every_expression(tmp_path: Path) -> None:
    expressions = [target["expr"] for panel in PANELS for target in panel["targets"]]
    filled = [each.replace("$__rate_interval", "1m").replace("$job", ".+") for each in expressions]
    assert not [each for each in filled if "$" in each]
    rules = [{"record": f"x:{number}", "expr": each} for number, each in enumerate(filled)]
    (tmp_path / "rules.json").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    assert f"{len(rules)} rules found" in promtool.run("check", "rules", tmp_path / "rules.json")


def test_it_asks_for_metrics_that_exist() -> None:
    expressions = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    assert unknown_metrics(expressions) == set()
    labels = re.findall(r"\{\{(\w+)\}\}", FILE.read_text())
    assert set(labels) <= {"use", "address", "kind", "reason", "name", "node", "instance", "error", "job"}


def test_panels_have_a_place_of_their_own_and_say_what_they_show() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DOCUMENT["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DOCUMENT["panels"]}) == len(DOCUMENT["panels"])
    assert all(panel["description"].endswith(".") for panel in PANELS)
