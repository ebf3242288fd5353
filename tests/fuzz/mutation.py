"""Damaged copies of real input: flipped bits, cuts, splices, huge numbers, deep nesting, repeated parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

LONGEST: Final = 65_536
"""Bytes of one input; nesting needs no more, and longer inputs only take longer."""

_NUMBERS: Final = tuple(
    value.to_bytes(size, order)
    for size in (1, 2, 4, 8)
    for value in (0, 1, 3, 4, 5, 127, 128, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
    if value < 256**size
    for order in ("little", "big")
)
_TEXTS: Final = (b"9" * 5000, b"-1", b"1e999", b"nan", b"\xff\xfe", b"\0", b"\xed\xa0\x80", b"\xf0\x9f\x92\xa9", b"")

Step = Callable[[random.Random, bytearray, "Material"], None]


class Material:
    """
    What inputs are made from.

    :param samples: Real input.
    :param tokens: Parts that mean something in it.
    """

    def __init__(self, samples: Sequence[bytes], tokens: Sequence[bytes] = ()) -> None:
        self.samples = tuple(samples)
        self.tokens = (*tokens, *_NUMBERS, *_TEXTS)

    def input(self, rng: random.Random) -> bytes:
        """Return one sample, damaged in one or more places; seldom as it is."""
        data = bytearray(rng.choice(self.samples))
        steps = 0 if rng.random() < 0.01 else 1 + int(rng.expovariate(0.7))
        for _ in range(min(steps, 12)):
            _STEPS[int(rng.random() * len(_STEPS))](rng, data, self)
        return bytes(data[:LONGEST])


def _place(rng: random.Random, data: bytearray) -> int:
    return int(rng.random() * (len(data) + 1))


def _part(rng: random.Random, data: bytearray) -> tuple[int, int]:
    start = _place(rng, data)
    return start, min(len(data), start + 1 + int(rng.expovariate(0.08)))


def _flip(rng: random.Random, data: bytearray, _: Material) -> None:
    if data:
        data[int(rng.random() * len(data))] ^= 1 << int(rng.random() * 8)


def _set_byte(rng: random.Random, data: bytearray, _: Material) -> None:
    if data:
        data[int(rng.random() * len(data))] = int(rng.random() * 256)


def _cut(rng: random.Random, data: bytearray, _: Material) -> None:
    del data[_place(rng, data) :]


def _delete(rng: random.Random, data: bytearray, _: Material) -> None:
    start, end = _part(rng, data)
    del data[start:end]


def _insert(rng: random.Random, data: bytearray, material: Material) -> None:
    at = _place(rng, data)
    data[at:at] = rng.choice(material.tokens)


def _overwrite(rng: random.Random, data: bytearray, material: Material) -> None:
    token, at = rng.choice(material.tokens), _place(rng, data)
    data[at : at + len(token)] = token


def _overwrite_word(rng: random.Random, data: bytearray, _: Material) -> None:
    # Lengths and types of binary formats are at multiples of four.
    at, number = _place(rng, data) & ~3, rng.choice(_NUMBERS)
    data[at : at + len(number)] = number


def _repeat(rng: random.Random, data: bytearray, _: Material) -> None:
    start, end = _part(rng, data)
    data[end:end] = data[start:end] * (1 + int(rng.expovariate(0.3)))


def _nest(rng: random.Random, data: bytearray, material: Material) -> None:
    if rng.random() < 0.03:
        token, at = rng.choice(material.tokens), _place(rng, data)
        data[at:at] = token * min(LONGEST // (len(token) or 1), int(rng.expovariate(0.001)))


def _splice(rng: random.Random, data: bytearray, material: Material) -> None:
    other = rng.choice(material.samples)
    at = int(rng.random() * (len(other) + 1))
    data[_place(rng, data) :] = other[at:]


def _move(rng: random.Random, data: bytearray, _: Material) -> None:
    start, end = _part(rng, data)
    part = data[start:end]
    del data[start:end]
    at = _place(rng, data)
    data[at:at] = part


_STEPS: Final[tuple[Step, ...]] = (
    _flip, _set_byte, _cut, _delete, _insert, _overwrite, _overwrite_word, _repeat, _nest, _splice, _move,
)  # fmt: skip
