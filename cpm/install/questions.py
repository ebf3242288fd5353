"""
What an install has to be told and cannot find out, asked one question at a time.

Tested in ``tests/unit/cpm/install/test_questions.py``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from ipaddress import IPv4Network
from typing import Protocol, TypeVar

from cpm.install.choices import DEFAULT_POOL, EDGE, HOST, MANAGER, ROLES, parse_manager, parse_pool, parse_roles
from cpm.install.machine import MachineFacts
from cpm.protocol import overlaps
from cpm.protocol.errors import InvalidRequest

_T = TypeVar("_T")


class Ask(Protocol):
    """Asks one question until the answer is valid."""

    def __call__(self, question: str, default: str, parse: Callable[[str], _T]) -> _T:
        """
        Ask.

        :param default: The answer when the operator gives none; empty: there has to be one.
        :param parse: Returns the value; raises InvalidRequest for an answer that is none.
        """
        ...


@dataclasses.dataclass(frozen=True, slots=True)
class Given:
    """What the operator gave as options, or answered; None: neither."""

    roles: frozenset[str] | None = None
    manager: str | None = None
    uplink: str | None = None
    underlay: str | None = None
    internal_pool: IPv4Network | None = None


def ask_missing(given: Given, machine: MachineFacts, former: Iterable[str], ask: Ask) -> Given:
    """
    Return what was given, with answers to what is missing and cannot be found out.

    :param former: Roles of this machine at the install before; empty: there was none.
    """
    roles = given.roles
    if roles is None:
        words = "Roles of this machine: host (runs VMs), edge (connects to the internet), manager; several with commas"
        roles = ask(words, ",".join(sorted(former) or ROLES), parse_roles)
    manager = given.manager
    if manager is None and MANAGER not in roles:
        manager = ask("The manager's address, https://ADDRESS:PORT", "", parse_manager)
    uplink, underlay = given.uplink, given.underlay
    names = sorted(set(machine.addresses) - {"lo"})
    if roles & {HOST, EDGE}:
        if uplink is None and machine.default_interface is None:
            uplink = ask(f"Interface to the internet ({', '.join(names)})", "", _interface(names))
        if underlay is None and not roles >= {HOST, EDGE} and len(names) > 1:
            others = [name for name in names if name != (uplink or machine.default_interface)]
            underlay = ask(f"Interface between hosts and edges ({', '.join(names)})", others[0], _interface(names))
    pool = given.internal_pool
    uses = overlaps.overlapping(DEFAULT_POOL, machine.uses)
    if pool is None and MANAGER in roles and uses:
        words = f"Network for internal addresses of VMs (this machine uses {overlaps.words(uses)} of {DEFAULT_POOL})"
        fitting = overlaps.fitting_pool(DEFAULT_POOL, machine.uses)
        pool = ask(words, str(fitting or ""), lambda text: parse_pool(text, machine))
    return Given(roles, manager, uplink, underlay, pool)


def _interface(names: list[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in names:
            raise InvalidRequest(f"no interface {text!r} with an address is here; use one of {', '.join(names)}")
        return text

    return parse
