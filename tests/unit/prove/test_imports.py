"""``prove`` is made of what decides: it opens no socket, and knows no test and no other simulation."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import prove

ALLOWED = {
    "cpm": {"api", "core", "ledger", "protocol", "service", "serving", "settings"},
    "natctl": {"core", "model", "ruleset"},
    "qga_agent": {"domain_list", "samples"},
}
"""Parts of the product that the simulation runs or describes."""
NEVER = {"chaos", "tests", "socket", "subprocess", "threading", "aiohttp", "pyroute2", "libvirt"}


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            yield from (f"{node.module}.{each.name}" for each in node.names)


def test_it_imports_no_shell_and_no_test() -> None:
    files = sorted(Path(prove.__file__).parent.glob("*.py"))
    assert len(files) > 10
    for path in files:
        for name in imported(path):
            package, _, rest = name.partition(".")
            assert package not in NEVER, f"{path.name} imports {name}"
            if package in ALLOWED:
                assert rest.partition(".")[0] in ALLOWED[package], f"{path.name} imports {name}"
