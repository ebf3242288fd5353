"""
The operator's choices for this machine, completed with facts about the machine. Pure.

Tested in ``tests/unit/cpm/install/test_install.py``.
"""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address, IPv4Network

from cpm.install.machine import MachineFacts
from cpm.protocol import overlaps
from cpm.protocol.errors import InvalidRequest
from cpm.protocol.overlaps import Use

HOST, EDGE, MANAGER = "host", "edge", "manager"
ROLES = (HOST, EDGE, MANAGER)
DEFAULT_POOL = overlaps.SHARED
"""The manager's default for ``pool.internal``."""
LOCAL_MANAGER = "unix:///run/virt-ports/cpmd.sock"


@dataclasses.dataclass(frozen=True, slots=True)
class Choices:
    """Everything that the installed files depend on."""

    roles: frozenset[str]
    name: str
    manager_url: str
    uplink: str | None
    """Interface to the internet; None: neither given nor detected."""
    underlay: str | None
    """Interface between hosts and edges; None: not given."""
    underlay_address: IPv4Address | None
    forward: str = "all"
    """What an edge forwards between hosts and the internet: ``all``, or ``vms``."""
    pool_uses: tuple[Use, ...] = ()
    """What this machine uses of the default internal pool."""
    internal_pool: IPv4Network | None = DEFAULT_POOL
    """An internal pool that this machine does not use; None: none was found."""

    @property
    def is_node(self) -> bool:
        """Whether natd runs on this machine."""
        return bool(self.roles & {HOST, EDGE})

    @property
    def host_uplinks(self) -> tuple[str, ...]:
        """Interfaces through which packets of VMs leave this host; empty: not known."""
        if EDGE not in self.roles:
            return tuple(filter(None, [self.underlay or self.uplink]))
        return tuple(filter(None, dict.fromkeys([self.uplink, self.underlay])))

    @property
    def edge_underlay(self) -> tuple[str, ...]:
        """Interfaces to hosts; empty on a machine that is its own edge."""
        return tuple(filter(None, [self.underlay]))


def parse_roles(text: str) -> frozenset[str]:
    """
    Parse ``host,edge``.

    :raise InvalidRequest: When it is empty, or has a word that is no role.
    """
    roles = frozenset(word.strip() for word in text.split(",") if word.strip())
    if not roles or not roles <= set(ROLES):
        raise InvalidRequest(f"not roles: {text!r}; use one or more of {','.join(ROLES)}, with commas between them")
    return roles


def parse_manager(url: str) -> str:
    """
    Return a manager's URL.

    :raise InvalidRequest: When it is none.
    """
    if not url.startswith(("unix:///", "https://")):
        raise InvalidRequest(f"not a manager's URL: {url!r}; use https://ADDRESS:PORT or unix:///PATH")
    return url


def parse_pool(text: str, machine: MachineFacts) -> IPv4Network:
    """
    Parse an internal pool for a machine.

    :raise InvalidRequest: When it is no network of IPv4, or the machine uses a part of it.
    """
    try:
        pool = IPv4Network(text)
    except ValueError as error:
        raise InvalidRequest(f"not a network: {text!r} ({error}); use for example {DEFAULT_POOL}") from None
    if uses := overlaps.overlapping(pool, machine.uses):
        fitting = overlaps.fitting_pool(DEFAULT_POOL, machine.uses)
        remedy = f"for example {fitting}" if fitting else "a network that no machine uses"
        raise InvalidRequest(f"this machine uses {overlaps.words(uses)} of {pool}; use {remedy}")
    return pool


def complete(
    machine: MachineFacts,
    roles: frozenset[str],
    *,
    name: str | None = None,
    manager: str | None = None,
    uplink: str | None = None,
    underlay: str | None = None,
    underlay_address: IPv4Address | None = None,
    internal_pool: IPv4Network | None = None,
    forward: str = "all",
) -> Choices:
    """
    Return the choices, with what was not given filled in from facts about the machine.

    :raise InvalidRequest: When the manager runs on another machine and its URL is missing or invalid.
    """
    if manager is None and MANAGER not in roles:
        raise InvalidRequest(
            "the manager's address is missing; use --manager https://ADDRESS:PORT, or add the role manager"
        )
    if manager is not None:
        parse_manager(manager)
    uplink = uplink or machine.default_interface
    return Choices(
        roles=roles,
        name=name or machine.hostname,
        manager_url=manager or LOCAL_MANAGER,
        uplink=uplink,
        underlay=underlay,
        underlay_address=underlay_address or machine.addresses.get(underlay or uplink or ""),
        pool_uses=() if internal_pool else overlaps.overlapping(DEFAULT_POOL, machine.uses),
        internal_pool=internal_pool or overlaps.fitting_pool(DEFAULT_POOL, machine.uses),
        forward=forward,
    )
