"""The picture is XML with one panel for every result, on common axes."""

from __future__ import annotations

import random
from xml.etree import ElementTree as ET

import pytest

from cpm.simulation import Conditions, compete, contender, draw, generate

SVG = "{http://www.w3.org/2000/svg}"


def test_the_picture_has_a_panel_for_every_policy() -> None:
    trace = generate("flash-crowd", 5, 90, random.Random(1))
    results = [
        compete(contender(name, trace, Conditions()), trace, lambda: random.Random(1), packing=False)
        for name in ("static", "predictive")
    ]
    root = ET.fromstring(draw(results, "a <load> & more"))
    assert root.tag == f"{SVG}svg"
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert texts[0] == "a <load> & more"
    assert {result.outcome.policy for result in results} <= set(texts)
    assert len(list(root.iter(f"{SVG}path"))) == 4
    assert ("seconds" in texts, texts.count("ports")) == (True, 2)


def test_a_picture_without_results_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing"):
        draw([], "empty")
