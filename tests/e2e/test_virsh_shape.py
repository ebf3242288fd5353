"""Our tables and facts look like virsh's: compared with the real one, on libvirt's built-in test driver."""

from __future__ import annotations

import subprocess

import pytest

from cpm.cli import render

pytestmark = pytest.mark.e2e


def virsh(*words: str) -> str:
    done = subprocess.run(["virsh", "-c", "test:///default", *words], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.mark.parametrize("words", [["list", "--all"], ["net-list", "--all"], ["pool-list", "--all"]])
def test_tables(words: list[str]) -> None:
    header, _, *rows = [line.split() for line in virsh(*words).splitlines() if line]
    assert rows
    assert render.table(header, rows) == virsh(*words)


def test_facts() -> None:
    told = [line for line in virsh("dominfo", "test").splitlines() if line.partition(":")[2].strip()]
    assert len(told) > 5
    pairs = [(name, value.strip()) for name, _, value in (line.partition(":") for line in told)]
    assert render.fields(pairs).splitlines() == told
