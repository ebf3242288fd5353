"""What the bench of the command line measures: the real command, which gets every VM from the real server."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from bench import cli
from bench.figures import KEYS

RULES = (Path(__file__).parents[3] / "debian/rules").read_text()
OF_PIP = r"""#!/usr/lib/virt-ports/bin/python3
# -*- coding: utf-8 -*-
import re
import sys
from cpm.cli.main import main
if __name__ == '__main__':
    sys.argv[0] = re.sub(r'(-script\.pyw|\.exe)?$', '', sys.argv[0])
    sys.exit(main())
"""
"""As pip makes it."""


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


def test_the_script_is_what_the_package_has(tmp_path: Path) -> None:
    [change] = re.findall(r"^\tsed -i (.*) \$\(VENV\)/bin/virt-ports ", RULES, re.M)
    script = tmp_path / "virt-ports"
    script.write_text(OF_PIP)
    command = f"sed -i {change.replace('$$', '$')} {script}"
    subprocess.run(["sh", "-euc", command], check=True)
    assert script.read_text() == f"#!/usr/lib/virt-ports/bin/python3\n{cli.SCRIPT}"
