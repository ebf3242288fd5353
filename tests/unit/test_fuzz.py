"""Some thousands of damaged inputs of each kind; ``make fuzz`` reads more. A failure says how to repeat it."""

from __future__ import annotations

import dataclasses
import random
import secrets

import pytest

from tests.fuzz.mutation import LONGEST
from tests.fuzz.running import run
from tests.fuzz.targets import TARGETS

COUNT = 2000
SLOW = {
    "agent-socket": 500,
    "node-believed": 500,
    "manager-believed": 1000,
    "request-believed": 500,
    "settings-before": 500,
}


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_input_is_understood_or_refused(name: str) -> None:
    tally = run(TARGETS[name], SLOW.get(name, COUNT), secrets.randbelow(1_000_000))
    assert tally.understood, "nothing is understood: the samples are outdated"
    assert tally.refused, "nothing is refused: the inputs are hardly damaged"


@pytest.mark.parametrize("name", TARGETS)
def test_real_input_is_understood(name: str) -> None:
    target = TARGETS[name]
    first, *others = target.material.samples
    target.begin()
    assert target.understands(first)
    # Others may be what is to be refused, such as an agent's error; but a kernel's answers are not.
    if name in {"conntrack", "links", "routes", "networks", "nftables"}:
        assert all(map(target.understands, others))


def test_the_same_seed_makes_the_same_inputs_of_limited_length() -> None:
    material = TARGETS["domain-xml"].material
    first, second = (random.Random("one seed") for _ in range(2))
    for _ in range(200):
        data = material.input(first)
        assert data == material.input(second)
        assert len(data) <= LONGEST


@pytest.mark.parametrize("name", [name for name in TARGETS if name.endswith("-believed")])
def test_what_was_read_before_makes_no_difference(name: str) -> None:
    first, _, second = (run(TARGETS[name], 150, seed) for seed in (1, 2, 1))
    assert (first.understood, first.refused) == (second.understood, second.refused)


def test_an_input_that_is_neither_is_quoted_with_its_seed() -> None:
    def raises(_: bytes) -> bool:
        raise KeyError("not a typed error")

    target = dataclasses.replace(TARGETS["hook-answer"], understands=raises)
    with pytest.raises(AssertionError, match=r"hook-answer, seed 5, input 0: KeyError"):
        run(target, 10, 5)
