"""Modules, names and files that documentation, comments and docstrings mention exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PACKAGES = ("cpm", "natctl", "qga_agent", "libvirt_hooks", "machine_doctor")
TOOLS = ("lab", "bench", "chaos", "prove")
TEXTS = [
    *(REPOSITORY / name for name in ("README.md", "pyproject.toml", "setup.cfg")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *(path for name in (*PACKAGES, *TOOLS) for path in sorted((REPOSITORY / name).rglob("*.py"))),
]
DOTTED = re.compile(rf"(?<![\w./-])(?:{'|'.join(PACKAGES)})(?:\.\w+)+(?!\w)")
FILE = re.compile(
    r"(?<![\w./<-])(?:cpm|natctl|qga_agent|libvirt_hooks|machine_doctor|tests|docs|lab|bench|chaos|prove|systemd)/[\w/.-]+\.(?:py|md|service)\b"
)


def _exists(dotted: str) -> bool:
    """Say whether a dotted name is a module, or an attribute of one; the longest module that is found counts."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        path = REPOSITORY.joinpath(*parts[:end])
        if path.is_dir() or path.with_suffix(".py").is_file():
            found: object = importlib.import_module(".".join(parts[:end]))
            for name in parts[end:]:
                if not hasattr(found, name):
                    # A field with a default factory, or one that only has an annotation.
                    return name in getattr(found, "__annotations__", {})
                found = getattr(found, name)
            return True
    return False


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_what_is_mentioned_exists(path: Path) -> None:
    text = path.read_text()
    mentioned = {name for name in DOTTED.findall(text) if not name.endswith((".toml", ".md", ".service", ".sock"))}
    assert [name for name in sorted(mentioned) if not _exists(name)] == []
    files = set(FILE.findall(text))
    assert [name for name in sorted(files) if not (REPOSITORY / name).exists()] == []


def test_enough_is_looked_at() -> None:
    text = "\n".join(path.read_text() for path in TEXTS)
    assert len(set(DOTTED.findall(text))) > 50
    assert len(set(FILE.findall(text))) > 10
