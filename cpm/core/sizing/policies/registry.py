"""The policies by name, as settings, per-VM wishes and ``virt-ports simulate`` use them."""

from __future__ import annotations

import dataclasses

from cpm.core.sizing.demand import Policy
from cpm.protocol.errors import InvalidRequest


@dataclasses.dataclass(frozen=True, slots=True)
class Registration:
    """A policy as operators know it; each policy's module has one, as its ``POLICY``."""

    policy: Policy
    summary: str
    """A description in one line."""
    short: str | None = None
    """A shorter name that operators may use as well; None: there is none."""


_registered: dict[str, Registration] = {}


def register(registration: Registration) -> None:
    """
    Add a policy.

    :raise ValueError: When its name or its short name is in use.
    """
    names = {registration.policy.name, registration.short} - {None}
    if names & set(policy_words()):
        raise ValueError(f"a policy {registration.policy.name} or {registration.short} is registered already")
    _registered[registration.policy.name] = registration


def registrations() -> tuple[Registration, ...]:
    """Return all policies with their descriptions, the default first."""
    return tuple(_registered.values())


def policies() -> tuple[str, ...]:
    """Return the names of all policies, the default first."""
    return tuple(_registered)


def default_policy() -> str:
    """Return the name of the policy that VMs have unless a wish or a setting names another."""
    return next(iter(_registered))


def policy_words() -> tuple[str, ...]:
    """Return every name that :func:`policy_named` knows, short ones included."""
    return (*_registered, *(each.short for each in _registered.values() if each.short is not None))


def policy_named(name: str) -> Policy:
    """
    Return a policy by its name or its short name.

    :raise InvalidRequest: When there is none of that name.
    """
    if (known := _registered.get(name)) is not None:
        return known.policy
    for each in _registered.values():
        if each.short == name:
            return each.policy
    raise InvalidRequest(f"there is no policy {name!r}; use {', '.join(_registered)}")
