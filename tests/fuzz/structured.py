"""Messages of the right types, made of numbers at their bounds and of what the reader knows already."""

from __future__ import annotations

import dataclasses
import enum
import random
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from ipaddress import IPv4Address, IPv4Network
from typing import Annotated, Any, Final, TypeAlias

from msgspec import UNSET, Meta, Struct, UnsetType

from cpm.protocol import codec
from tests.fuzz.mutation import Material

Make: TypeAlias = Callable[[random.Random], Any]

_TEXTS: Final = ("", "x", "vm-1", "a" * 255, "vm\x1b[2J\u202e", "\U0001f4a9", "none", "specification", "gap")
_MOST_ITEMS: Final = 5


class Structured(Material):
    """
    Makes messages field by field from their types, instead of damaging samples.

    :param kinds: The types of the messages.
    :param known: Values that mean something to the reader, by the type that has them.
    :param sample: A message that is understood.
    :param prefix: What comes before the JSON of the kind at a position.
    """

    def __init__(
        self,
        kinds: Sequence[Any],
        known: Mapping[Any, Sequence[Any]],
        sample: bytes,
        prefix: Callable[[int], bytes] = lambda position: b"",
    ) -> None:
        self._known = known
        self._made: dict[Any, Make] = {}
        self._makers = [self._maker(kind) for kind in kinds]
        self._prefix = prefix
        rng = random.Random("samples")
        super().__init__([sample, *(self._write(position, rng) for position in range(len(kinds)))])

    def input(self, rng: random.Random) -> bytes:
        """Return a message."""
        return self._write(int(rng.random() * len(self._makers)), rng)

    def _write(self, position: int, rng: random.Random) -> bytes:
        return self._prefix(position) + codec.encode(self._makers[position](rng))

    def _maker(self, kind: Any, metas: tuple[Meta, ...] = ()) -> Make:
        if kind in self._known:
            values = tuple(self._known[kind])
            return lambda rng: values[int(rng.random() * len(values))]
        if hasattr(kind, "__supertype__"):
            return self._maker(kind.__supertype__, metas)
        origin, args = typing.get_origin(kind), typing.get_args(kind)
        if origin is Annotated:
            return self._maker(args[0], (*metas, *(each for each in args[1:] if isinstance(each, Meta))))
        if origin in (typing.Union, types.UnionType):
            return _one_of([self._maker(each, metas) for each in args])
        if origin in (tuple, frozenset, dict):
            return self._collection(origin, args, metas)
        if isinstance(kind, type) and (issubclass(kind, Struct) or dataclasses.is_dataclass(kind)):
            return self._object(kind)
        return _plain(kind, metas)

    def _collection(self, origin: Any, args: tuple[Any, ...], metas: tuple[Meta, ...]) -> Make:
        most = min(_MOST_ITEMS, *(meta.max_length for meta in metas if meta.max_length is not None))
        parts = [self._maker(each) for each in args if each is not Ellipsis]

        def items(rng: random.Random) -> Any:
            made = [tuple(part(rng) for part in parts) for _ in range(int(rng.random() * (most + 1)))]
            return dict(made) if origin is dict else origin(item for (item,) in made)

        return items

    def _object(self, kind: type) -> Make:
        if kind not in self._made:
            fields: dict[str, Make] = {}
            self._made[kind] = lambda rng: _built(kind, fields, rng)
            fields |= {
                name: self._maker(hint)
                for name, hint in typing.get_type_hints(kind, include_extras=True).items()
                if not name.startswith("__") and typing.get_origin(hint) is not typing.ClassVar
            }
        return self._made[kind]


def _built(kind: type, fields: Mapping[str, Make], rng: random.Random) -> Any:
    while True:
        try:
            return kind(**{name: make(rng) for name, make in fields.items()})
        except ValueError:
            # A value that refuses itself, such as a range whose ends are out of order.
            continue


def _one_of(makers: Sequence[Make]) -> Make:
    return lambda rng: makers[int(rng.random() * len(makers))](rng)


def _plain(kind: Any, metas: Sequence[Meta]) -> Make:
    if kind is bool:
        return lambda rng: rng.random() < 0.5
    if kind in (int, float):
        return _number(kind, metas)
    if kind is str:
        most = min((meta.max_length for meta in metas if meta.max_length is not None), default=255)
        texts = tuple({text[:most] for text in _TEXTS} | {"y" * most})
        return lambda rng: texts[int(rng.random() * len(texts))]
    if kind is UnsetType:
        return lambda rng: UNSET
    if kind is type(None):
        return lambda rng: None
    if kind is IPv4Network:
        return lambda rng: IPv4Network("100.64.0.0/10")
    if kind is IPv4Address:
        return lambda rng: IPv4Address(int(rng.random() * 2**32))
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        members = tuple(kind)
        return lambda rng: members[int(rng.random() * len(members))]
    raise TypeError(f"no values of {kind}")


def _number(kind: Any, metas: Sequence[Meta]) -> Make:
    least = max(each for meta in metas for each in (meta.ge, meta.gt) if each is not None)
    most = min(meta.le for meta in metas if meta.le is not None)
    tiny = 5e-324 if kind is float else least
    edges = [least, least + 1, most, most - 1, (least + most) / 2, min(1, most), min(64, most), min(256, most), tiny]
    is_open = any(meta.gt is not None for meta in metas)
    values = tuple(kind(each) for each in edges if least < each <= most or (each == least and not is_open))

    def number(rng: random.Random) -> Any:
        if rng.random() < 0.3:
            return kind(min(most, max(values[-1], least + rng.expovariate(0.01))))
        return values[int(rng.random() * len(values))]

    return number
