"""Every piece of `cpmd.toml` or `natd.toml` on a page is one that a daemon reads."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cpm.settings
import natctl.settings
from cpm.protocol.errors import ConfigError

REPOSITORY = Path(__file__).parents[3]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
INDENTED = re.compile(r"(?:^ {4}.*\n)+", re.M)
TABLE = re.compile(r"^\[([\w.]+)\]$", re.M)
UPLINKS = 'uplinks = ["eth0"]\n'


def pieces() -> list[tuple[str, str]]:
    """What looks like TOML: a block with the header of a table; units of systemd say that they are."""
    found = []
    for page in PAGES:
        text = page.read_text()
        blocks = [block for language, block in FENCED.findall(text) if language in ("", "toml")]
        blocks += [re.sub(r"^ {4}", "", block, flags=re.M) for block in INDENTED.findall(FENCED.sub("", text))]
        found += [(str(page.relative_to(REPOSITORY)), block) for block in blocks if TABLE.search(block)]
    return found


def as_natd(piece: str) -> str:
    """Return a whole natd.toml with this piece in it."""
    given = piece
    for role in ("host", "edge"):
        if re.search(rf"^\[{role}\]$", given, re.M) is None:
            piece += f"\n[{role}]\n{UPLINKS}"
        elif "uplinks" not in given:
            piece = re.sub(rf"^\[{role}\]$\n", f"[{role}]\n{UPLINKS}", piece, flags=re.M)
    return f'underlay_address = "172.30.0.11"\n{piece}'


def mistakes(piece: str, folder: Path) -> list[str]:
    """Return what each of the two daemons finds wrong; less than two: one of them reads it."""
    found = []
    for load, text in ((cpm.settings.load, piece), (natctl.settings.load, as_natd(piece))):
        path = folder / "piece.toml"
        path.write_text(text)
        try:
            load(path)
        except ConfigError as error:
            found.append(str(error))
    return found


@pytest.mark.parametrize(("page", "piece"), pieces(), ids=lambda value: value.strip().split("\n")[0])
def test_a_daemon_reads_it(page: str, piece: str, tmp_path: Path) -> None:
    assert len(mistakes(piece, tmp_path)) < 2, page


def test_a_wrong_key_would_be_found(tmp_path: Path) -> None:
    assert len(mistakes("[pool]\nhold_down = 120\n", tmp_path)) == 2


def test_enough_is_looked_at() -> None:
    assert len(pieces()) >= 11
