"""Object files as clang makes them, whole and damaged."""

from __future__ import annotations

import pathlib
import random

import pytest

import natctl.bpf
from natctl.bpf import elf

FILES = sorted(pathlib.Path(natctl.bpf.__file__).parent.glob("*.bpf.o"))


def test_the_edges_program_has_what_its_source_says() -> None:
    (edge,) = (elf.read(path.read_bytes()) for path in FILES if path.name == "edge.bpf.o")
    assert edge.programs.keys() == {"edge"}
    assert edge.maps.keys() == {"owners", "homes", "hosts", "slots", "addresses", "passed"}
    assert edge.maps["owners"] == (2, 4, 64, 4096, 1 << 10)
    assert edge.settings_bytes == 6 * 4 + 2 * 8 * 4
    assert edge.license == "Dual BSD/GPL"
    named = {reference.to for reference in edge.programs["edge"].references}
    assert named == {*edge.maps, elf.SETTINGS}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_damaged_file_is_refused_or_read(path: pathlib.Path) -> None:
    data, chance = path.read_bytes(), random.Random(7)
    for _ in range(2000):
        damaged = bytearray(data)
        for _ in range(chance.randrange(1, 4)):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            elf.read(bytes(damaged[: chance.randrange(len(damaged))] if chance.random() < 0.3 else damaged))
        except ValueError:
            continue


def test_another_file_is_no_object_file() -> None:
    with pytest.raises(ValueError, match="no object file"):
        elf.read(b"\x7fELF\x01\x01" + bytes(100))
