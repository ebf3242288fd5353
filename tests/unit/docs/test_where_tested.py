"""Every product module has a test module of its name, or says in its docstring where it is tested."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
PACKAGES = ("cpm", "natctl", "qga_agent", "libvirt_hooks", "machine_doctor")
MODULES = [
    path.relative_to(REPOSITORY)
    for package in PACKAGES
    for path in sorted((REPOSITORY / package).rglob("*.py"))
    if path.name != "__init__.py"
]
TEST_FILE = re.compile(r"(?<![\w/])tests/[\w/]+/test_\w+\.py\b")


def has_test_module(module: Path) -> bool:
    """Say whether one of the folders of tests has, at the module's place, a test module of its name."""
    name = module.with_name(f"test_{module.name}")
    return any((REPOSITORY / "tests" / kind / name).is_file() for kind in ("unit", "netns", "e2e"))


def mentioned_test_files(source: str) -> list[str]:
    """Return the test files that a module's docstring mentions."""
    return TEST_FILE.findall(ast.get_docstring(ast.parse(source)) or "")


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_module_is_tested_in_its_own_module_or_says_where(module: Path) -> None:
    mentioned = mentioned_test_files((REPOSITORY / module).read_text())
    assert mentioned or has_test_module(module), f"no test_{module.name}: say in the docstring where it is tested"
    assert [file for file in mentioned if not (REPOSITORY / file).is_file()] == []


def test_both_ways_of_saying_are_found() -> None:
    assert has_test_module(Path("natctl/netlink/socket.py"))
    assert not has_test_module(Path("natctl/kernel/kernel.py"))
    assert mentioned_test_files('"""Tested in ``tests/unit/x/test_y.py``."""') == ["tests/unit/x/test_y.py"]
    assert mentioned_test_files('"""See tests/fakes/site.py."""') == []
    assert len(MODULES) > 100
