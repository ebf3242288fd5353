"""
Who has a say about a VM, and what comes of it. Pure.

Three may speak, and the nearest wins, value by value: the domain's XML (``<metadata>``), then ``virt-ports set``, then
the pool's defaults. What makes no sense never keeps a VM from running: the value is passed over as if it had not been
said, and :attr:`Effective.ignored` says why.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Generic, TypeVar

from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import FIRST_PORT, LAST_PORT, UNLIMITED, VM, DomainUUID, Wishes

MOST_PORTS: Final = LAST_PORT - FIRST_PORT + 1
HEAVIEST: Final = 10_000
"""Largest weight: enough to tell VMs apart, small enough that nobody's part rounds to nothing."""

NONE: Final = "none"
"""As a drain limit: never."""

KEYS: Final = {
    "floor": "floor",
    "cap": "cap",
    "weight": "weight",
    "policy": "policy",
    "drain-limit": "drain_limit_s",
}
"""How people write each wish (attribute in the XML, key of ``virt-ports set``), and the field of :class:`Wishes`."""

_T = TypeVar("_T")


class Origin(enum.StrEnum):
    """Who said it."""

    METADATA = "metadata"
    """The domain's XML."""
    SET = "set"
    """The operator, by ``virt-ports set``."""
    POOL = "pool"
    """The defaults in cpmd's settings."""


@dataclasses.dataclass(frozen=True, slots=True)
class Chosen(Generic[_T]):
    """A value that holds, and who said it."""

    value: _T
    origin: Origin


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Effective:
    """What holds for a VM; the floor is never above the cap."""

    floor: Chosen[int]
    """Ports."""
    cap: Chosen[int]
    """Ports."""
    weight: Chosen[int]
    policy: Chosen[str]
    drain_limit_s: Chosen[float | None]
    """Seconds; None: never."""
    ignored: tuple[str, ...] = ()
    """Why something that was said does not hold, a sentence each."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What the pool says; made of checked settings, so it makes sense."""

    floor: int = 64
    cap: int = 32768
    weight: int = 100
    policy: str
    drain_limit_s: float | None = None
    """Seconds; None: never."""


class Resolver:
    """
    Finds out what holds for a VM; remembers the answers, since most VMs wish the same: nothing.

    :param defaults: What the pool says.
    :param policies: Names of the policies there are.
    """

    REMEMBERED = 100_000
    """VMs remembered; then all are forgotten."""

    def __init__(self, defaults: Defaults, policies: Collection[str]) -> None:
        self._defaults = defaults
        self._policies = frozenset(policies)
        self._answers: dict[tuple[Wishes, Wishes], Effective] = {}
        self._of: dict[DomainUUID, tuple[VM, Effective]] = {}

    def effective(self, vm: VM) -> Effective:
        """Return what holds for a VM."""
        known = self._of.get(vm.uuid)
        if known is not None and known[0] is vm:  # the same value as last time, without looking at it
            return known[1]
        if len(self._of) >= self.REMEMBERED:
            self._of.clear()
            self._answers.clear()
        said = (vm.metadata, vm.set)
        if (answer := self._answers.get(said)) is None:
            answer = self._answers[said] = effective(*said, self._defaults, self._policies)
        self._of[vm.uuid] = (vm, answer)
        return answer

    def checked(self, wishes: Wishes) -> Wishes:
        """
        Return wishes that make sense by themselves: what an operator types is refused rather than passed over.

        :raise InvalidRequest: When one does not, or the floor is above the cap.
        """
        for key, name in KEYS.items():
            value = getattr(wishes, name)
            if value is not None and (why := _objection(name, value, self._policies)) is not None:
                raise InvalidRequest(f"{key} {value}: {why}")
        if wishes.floor is not None and wishes.cap is not None and wishes.floor > wishes.cap:
            raise InvalidRequest(f"floor {wishes.floor} is above cap {wishes.cap}; use a floor that is not")
        return wishes


def effective(metadata: Wishes, said: Wishes, defaults: Defaults, policies: Collection[str]) -> Effective:
    """
    Return what holds, the nearest first: metadata, then ``said`` (by ``virt-ports set``), then the defaults.

    :param policies: Names of the policies there are.
    """
    ignored = [f"{Origin.METADATA}: {sentence}" for sentence in metadata.nonsense]
    ignored += [f"{Origin.SET}: {sentence}" for sentence in said.nonsense]
    layers = ((Origin.METADATA, metadata), (Origin.SET, said))
    chosen: dict[str, Chosen[Any]] = {}
    for key, name in KEYS.items():
        chosen[name] = Chosen(getattr(defaults, name), Origin.POOL)
        for origin, wishes in reversed(layers):
            value = getattr(wishes, name)
            if value is None:
                continue
            if (why := _objection(name, value, policies)) is not None:
                ignored.append(f"{origin}: {key} {value}: {why}")
            else:
                chosen[name] = Chosen(value, origin)
    if chosen["drain_limit_s"].value == UNLIMITED:
        chosen["drain_limit_s"] = Chosen(None, chosen["drain_limit_s"].origin)
    floor, cap, why_not = _reconciled(chosen["floor"], chosen["cap"], defaults)
    return Effective(**{**chosen, "floor": floor, "cap": cap}, ignored=(*ignored, *why_not))


def understood(raw: Mapping[str, str]) -> Wishes:
    """
    Read wishes as people write them; what cannot be read becomes a sentence in :attr:`Wishes.nonsense`.

    :param raw: By the names in :data:`KEYS`.
    """
    known: dict[str, Any] = {}
    nonsense: list[str] = []
    for key, text in raw.items():
        if key not in KEYS:
            nonsense.append(f"{_short(key)} is none of {', '.join(KEYS)}")
            continue
        try:
            known[KEYS[key]] = _READERS[key](text.strip())
        except ValueError as error:
            nonsense.append(f"{key} {_short(text)}: {error}")
    return Wishes(**known, nonsense=tuple(nonsense))


def strictly_understood(raw: Mapping[str, str]) -> Wishes:
    """
    Read wishes as people type them.

    :raise InvalidRequest: When one of them cannot be read.
    """
    wishes = understood(raw)
    if wishes.nonsense:
        raise InvalidRequest("; ".join(wishes.nonsense))
    return wishes


def _reconciled(floor: Chosen[int], cap: Chosen[int], defaults: Defaults) -> tuple[Chosen[int], Chosen[int], list[str]]:
    """Let a floor and a cap that contradict each other become two that do not; the nearer of them stays."""
    if floor.value <= cap.value:
        return floor, cap, []
    if _NEARNESS[floor.origin] > _NEARNESS[cap.origin]:
        # The floor is the nearer wish, so the cap gives way as far as it must.
        why = f"{cap.origin}: cap {cap.value}: it is below floor {floor.value} ({floor.origin})"
        return (
            floor,
            Chosen(max(defaults.cap, floor.value), Origin.POOL if defaults.cap >= floor.value else floor.origin),
            [why],
        )
    why = f"{floor.origin}: floor {floor.value}: it is above cap {cap.value} ({cap.origin})"
    return (
        Chosen(min(defaults.floor, cap.value), Origin.POOL if defaults.floor <= cap.value else cap.origin),
        cap,
        [why],
    )


_NEARNESS: Final = {Origin.POOL: 0, Origin.SET: 1, Origin.METADATA: 2}


def _objection(name: str, value: Any, policies: Collection[str]) -> str | None:
    """Say why a value makes no sense; None: it does."""
    if name in ("floor", "cap"):
        return None if 1 <= value <= MOST_PORTS else f"use 1 to {MOST_PORTS} ports"
    if name == "weight":
        return None if 1 <= value <= HEAVIEST else f"use 1 to {HEAVIEST}"
    if name == "policy":
        return None if value in policies else f"there is no such policy; use one of {', '.join(sorted(policies))}"
    return None if value >= 0 and math.isfinite(value) else f"use seconds, or {NONE}"


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ValueError("it is not a whole number")
    return int(text)


def _limit(text: str) -> float:
    if text == NONE:
        return UNLIMITED
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not (seconds > 0 and math.isfinite(seconds)):
        raise ValueError(f"use seconds above 0, or {NONE}")
    return seconds


def _word(text: str) -> str:
    if not text or len(text) > 64 or not text.isprintable():
        raise ValueError("it is not the name of a policy")
    return text


_READERS: Final[Mapping[str, Callable[[str], Any]]] = {
    "floor": _whole,
    "cap": _whole,
    "weight": _whole,
    "policy": _word,
    "drain-limit": _limit,
}


def _short(text: str) -> str:
    """Quote what somebody else wrote, within reason."""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
