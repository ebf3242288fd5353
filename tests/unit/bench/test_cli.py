"""What the bench of the command line measures: the real command, which gets every VM from the real server."""

from __future__ import annotations

import pytest

from bench import cli
from bench.figures import KEYS


def test_the_command_gets_all_vms(monkeypatch: pytest.MonkeyPatch) -> None:
    answered: list[int] = []

    class Counting(cli._Answers):
        async def answer(self, *arguments: object) -> object:
            found = await super().answer(*arguments)  # type: ignore[arg-type]
            assert isinstance(found, list)
            answered.append(len(found))
            return found

    monkeypatch.setattr(cli, "VMS", 100)
    monkeypatch.setattr(cli, "RUNS", 1)
    monkeypatch.setattr(cli, "WARM_UP", 0)
    monkeypatch.setattr(cli, "_Answers", Counting)
    found = cli.measure(lambda _: None)
    assert set(found.figures) == set(KEYS["cli"])
    assert found.figures["cli_ratio"] > 1
    assert answered == [100]
