"""
Determines which wishes take effect for a VM. Pure.

There are three origins, in order of precedence: the domain's XML (``<metadata>``), then ``virt-ports set``, then the
pool's defaults. Precedence is decided value by value. A wish that is invalid never keeps a VM from running: it is
skipped as if it had not been made, and :attr:`EffectiveWishes.ignored` has the reason.

The syntax of wishes is in :mod:`cpm.protocol.wishes`.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Collection, Mapping
from ipaddress import IPv4Address
from types import MappingProxyType
from typing import Any, Final, Generic, TypeVar

from cpm.protocol.bounds import MAX_FORWARD_PORTS
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.model import DEFAULT_POOL, UNLIMITED, VM, DomainUUID, Filtering, Wishes
from cpm.protocol.wishes import KEYS, MAXIMUM_PORTS, MAXIMUM_WEIGHT, NONE, pool_name

_T = TypeVar("_T")


class Origin(enum.StrEnum):
    """The source of a value."""

    METADATA = "metadata"
    """The domain's XML."""
    SET = "set"
    """The operator, by ``virt-ports set``."""
    POOL = "pool"
    """The defaults in ``cpmd.toml``."""


LIMIT_BOUNDS: Final[Mapping[str, tuple[int, int]]] = MappingProxyType(
    {"connections": (1024, 1_048_576), "connection_rate": (20, 100_000)}
)
"""The bounds of a VM's limits unless configured otherwise."""

_PRECEDENCE: Final = {Origin.POOL: 0, Origin.SET: 1, Origin.METADATA: 2}


@dataclasses.dataclass(frozen=True, slots=True)
class EffectiveValue(Generic[_T]):
    """A value in effect, and its source."""

    value: _T
    origin: Origin


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EffectiveWishes:
    """The values in effect for one VM; the floor is never above the cap."""

    floor: EffectiveValue[int]
    """Ports."""
    cap: EffectiveValue[int]
    """Ports."""
    weight: EffectiveValue[int]
    policy: EffectiveValue[str]
    drain_limit_s: EffectiveValue[float | None]
    """Seconds; None: no limit."""
    connections: EffectiveValue[int]
    """Connections at once."""
    connection_rate: EffectiveValue[int]
    """New connections in a second."""
    filtering: EffectiveValue[Filtering]
    """Who reaches its sockets from outside."""
    pcp: EffectiveValue[int]
    """Ports that the guest may have mapped when it asks (PCP, NAT-PMP)."""
    pool: EffectiveValue[str]
    """Name of the pool that its ranges come from."""
    address: EffectiveValue[IPv4Address | None]
    """The only external address that its ranges are on; None: any of the pool."""
    ignored: tuple[str, ...] = ()
    """For each wish that is not in effect, the reason in a sentence."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """The pool's defaults, already checked."""

    floor: int = 64
    cap: int = 32768
    weight: int = 100
    policy: str
    drain_limit_s: float | None = None
    """Seconds; None: no limit."""
    connections: int = 65536
    """Connections at once."""
    connection_rate: int = 1000
    """New connections in a second."""
    filtering: Filtering = Filtering.DEFAULT
    """Who reaches its sockets from outside."""
    pcp: int = 0
    """Ports that a guest may have mapped when it asks: none, so that nothing is open that nobody wished."""
    pool: str = DEFAULT_POOL
    address: IPv4Address | None = None
    """The only external address; None: any of the pool."""
    bounds: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=lambda: LIMIT_BOUNDS)
    """The least and the greatest value that a wish may give to either of these two, by its field's name."""


class Resolver:
    """
    Resolves the wishes of VMs, and caches the results: most VMs have no wishes, so most results are the same.

    :param defaults: The pool's defaults.
    :param policies: Names of the existing policies.
    """

    CACHED_VMS = 100_000
    """VMs in the cache; when it is full it is emptied."""

    def __init__(self, defaults: Defaults, policies: Collection[str]) -> None:
        self._defaults = defaults
        self._policies = frozenset(policies)
        self._by_wishes: dict[tuple[Wishes, Wishes], EffectiveWishes] = {}
        self._by_vm: dict[DomainUUID, tuple[VM, EffectiveWishes]] = {}

    def resolve(self, vm: VM) -> EffectiveWishes:
        """Return the wishes in effect for a VM."""
        cached = self._by_vm.get(vm.uuid)
        if cached is not None and cached[0] is vm:  # the same object as before: no need to hash its wishes
            return cached[1]
        if len(self._by_vm) >= self.CACHED_VMS:
            self._by_vm.clear()
            self._by_wishes.clear()
        key = (vm.xml_wishes, vm.operator_wishes)
        if (answer := self._by_wishes.get(key)) is None:
            answer = self._by_wishes[key] = resolve(*key, self._defaults, self._policies)
        self._by_vm[vm.uuid] = (vm, answer)
        return answer

    def check(self, wishes: Wishes) -> None:
        """
        Check wishes that an operator typed. Invalid ones are refused, not skipped: the operator can correct them.

        :raise InvalidRequest: When a value is invalid, or the floor is above the cap.
        """
        for key, name in KEYS.items():
            value = getattr(wishes, name)
            if value is not None and (why := _invalid_reason(name, value, self._policies, self._defaults)) is not None:
                raise InvalidRequest(f"{key} {value}: {why}")
        if wishes.floor is not None and wishes.cap is not None and wishes.floor > wishes.cap:
            raise InvalidRequest(f"floor {wishes.floor} is above cap {wishes.cap}; lower the floor or raise the cap")


def resolve(xml: Wishes, operator: Wishes, defaults: Defaults, policies: Collection[str]) -> EffectiveWishes:
    """
    Return the wishes in effect.

    :param xml: From the domain's XML; takes precedence over ``operator``.
    :param operator: From ``virt-ports set``; takes precedence over ``defaults``.
    :param policies: Names of the existing policies.
    """
    ignored = [f"{Origin.METADATA}: {sentence}" for sentence in xml.nonsense]
    ignored += [f"{Origin.SET}: {sentence}" for sentence in operator.nonsense]
    layers = ((Origin.SET, operator), (Origin.METADATA, xml))
    values: dict[str, EffectiveValue[Any]] = {}
    for key, name in KEYS.items():
        values[name] = EffectiveValue(getattr(defaults, name), Origin.POOL)
        for origin, wishes in layers:
            value = getattr(wishes, name)
            if value is None:
                continue
            if (why := _invalid_reason(name, value, policies, defaults)) is not None:
                ignored.append(f"{origin}: {key} {value}: {why}")
            else:
                values[name] = EffectiveValue(value, origin)
    if values["drain_limit_s"].value == UNLIMITED:
        values["drain_limit_s"] = EffectiveValue(None, values["drain_limit_s"].origin)
    floor, cap, why_not = _fit_floor_and_cap(values["floor"], values["cap"], defaults)
    return EffectiveWishes(**{**values, "floor": floor, "cap": cap}, ignored=(*ignored, *why_not))


def _fit_floor_and_cap(
    floor: EffectiveValue[int], cap: EffectiveValue[int], defaults: Defaults
) -> tuple[EffectiveValue[int], EffectiveValue[int], list[str]]:
    """Return a floor that is not above the cap; of two that contradict, the one with higher precedence stays."""
    if floor.value <= cap.value:
        return floor, cap, []
    if _PRECEDENCE[floor.origin] > _PRECEDENCE[cap.origin]:
        # The cap is raised to the pool's default, or to the floor if that is higher.
        why = f"{cap.origin}: cap {cap.value}: it is below floor {floor.value} ({floor.origin})"
        origin = Origin.POOL if defaults.cap >= floor.value else floor.origin
        return floor, EffectiveValue(max(defaults.cap, floor.value), origin), [why]
    why = f"{floor.origin}: floor {floor.value}: it is above cap {cap.value} ({cap.origin})"
    origin = Origin.POOL if defaults.floor <= cap.value else cap.origin
    return EffectiveValue(min(defaults.floor, cap.value), origin), cap, [why]


def _why_no_name(pool: str) -> str | None:
    try:
        pool_name(pool)
    except ValueError as error:
        return str(error)
    return None


def _invalid_reason(name: str, value: Any, policies: Collection[str], defaults: Defaults) -> str | None:
    """Return why a value is invalid; None: it is valid."""
    if name in ("floor", "cap"):
        return None if 1 <= value <= MAXIMUM_PORTS else f"use 1 to {MAXIMUM_PORTS} ports"
    if name == "weight":
        return None if 1 <= value <= MAXIMUM_WEIGHT else f"use 1 to {MAXIMUM_WEIGHT}"
    if name == "policy":
        return None if value in policies else f"there is no such policy; use one of {', '.join(sorted(policies))}"
    if name in ("filtering", "address"):
        return None  # by its type
    if name == "pool":
        # Whether there is one of that name is asked where ports are chosen: it may come later (cpm.core.eligible).
        return _why_no_name(value)
    if name == "pcp":
        return None if 0 <= value <= MAX_FORWARD_PORTS else f"use on, off, or up to {MAX_FORWARD_PORTS} ports"
    if name in defaults.bounds:
        least, most = defaults.bounds[name]
        return None if least <= value <= most else f"use {least} to {most}"
    return None if value >= 0 and math.isfinite(value) else f"use seconds, or {NONE}"
