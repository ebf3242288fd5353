"""Man pages: as generated, and without a warning of man."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from cpm.cli import manual

SHARE = Path(__file__).parents[4] / "share" / "man"


@pytest.mark.parametrize("name", manual.PAGES)
def test_a_page_is_generated(name: str) -> None:
    assert (SHARE / f"man{name[-1]}" / name).read_text() == manual.page(name), "run make manuals"


@pytest.mark.parametrize("name", manual.PAGES)
def test_man_has_no_complaint(name: str) -> None:
    assert shutil.which("man"), "a Debian package of the tests (make setup)"
    command = ["man", "-l", "--warnings", "-E", "UTF-8", "-P", "cat", str(SHARE / f"man{name[-1]}" / name)]
    environment = {"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LC_ALL": "C.UTF-8"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stderr == ""
    assert "SEE ALSO" in result.stdout


def _text(name: str) -> str:
    command = ["man", "-l", "-P", "cat", str(SHARE / f"man{name[-1]}" / name)]
    environment = {"PATH": "/usr/bin:/bin", "MANWIDTH": "100", "LC_ALL": "C.UTF-8"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout


def test_they_say_what_the_programs_say() -> None:
    assert "virt-ports list [-h]" in _text("virt-ports.1")
    assert "-o {table,json}" in _text("virt-ports.1")
    settings = _text("cpmd.toml.5")
    assert "[pool.timeouts]" in settings
    assert "default 120.0" in settings
    assert "``" not in settings
    assert "--config FILE" in _text("natd.8")
    assert "[manager]" in _text("natd.toml.5")
