"""Judgements: pure functions from facts to verdicts, each registered as a check."""

from __future__ import annotations

from machine_doctor.checks import (
    addresses,
    capacity,
    filters,
    forwarding,
    hook,
    kernel,
    listeners,
    routing,
    services,
    setup,
    trust,
)
from machine_doctor.checks.registry import REGISTERED, Check

_ORDER = (setup, kernel, forwarding, routing, filters, listeners, capacity, addresses, hook, services, trust)


def all_checks() -> tuple[Check, ...]:
    """Return all checks, in the order in which they are shown."""
    modules = [module.__name__ for module in _ORDER]
    return tuple(sorted(REGISTERED.values(), key=lambda each: modules.index(each.judge.__module__)))


__all__ = ["Check", "all_checks"]
