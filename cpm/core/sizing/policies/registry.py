"""The policies by name: what settings, per-VM wishes and ``virt-ports simulate`` may say."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from cpm.core.sizing.demand import Policy
from cpm.core.sizing.policies.occupancy import OccupancyPolicy
from cpm.core.sizing.policies.predictive import PredictivePolicy
from cpm.core.sizing.policies.specification import SpecificationPolicy
from cpm.protocol.errors import InvalidRequest

DEFAULT_POLICY: Final = SpecificationPolicy.name

_POLICIES: Final[Mapping[str, Policy]] = MappingProxyType(
    {policy.name: policy for policy in (SpecificationPolicy(), OccupancyPolicy(), PredictivePolicy())}
)
_ALIASES: Final[Mapping[str, str]] = MappingProxyType({"spec": DEFAULT_POLICY})


def policies() -> tuple[str, ...]:
    """Return the names of all policies, the default first."""
    return tuple(_POLICIES)


def policy_words() -> tuple[str, ...]:
    """Return every name that :func:`policy_named` knows, short forms included."""
    return (*_POLICIES, *_ALIASES)


def policy_named(name: str) -> Policy:
    """
    Return a policy; ``spec`` is short for ``specification``.

    :raise InvalidRequest: When there is none of that name.
    """
    try:
        return _POLICIES[_ALIASES.get(name, name)]
    except KeyError:
        raise InvalidRequest(f"there is no policy {name!r}; use {', '.join(_POLICIES)}") from None
