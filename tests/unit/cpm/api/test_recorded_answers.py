"""cpmd answers every request that operators can make with the recorded bytes."""

from __future__ import annotations

import json
from pathlib import Path

from tests.unit.cpm.api import recording

RECORDED = Path(__file__).with_name("recorded_answers.json")


async def test_every_answer_is_as_recorded() -> None:
    expected = json.loads(RECORDED.read_text())
    answers = await recording.record()
    for answer, recorded in zip(answers, expected, strict=True):
        assert answer == recorded, recorded["request"]
