"""What the operator wants on this machine, completed by what the machine says about itself. Pure."""

from __future__ import annotations

import dataclasses
from ipaddress import IPv4Address

from cpm.install.machine import Machine
from cpm.protocol.errors import InvalidRequest

HOST, EDGE, MANAGER = "host", "edge", "manager"
ROLES = (HOST, EDGE, MANAGER)
LOCAL_MANAGER = "unix:///run/virt-ports/cpmd.sock"


@dataclasses.dataclass(frozen=True, slots=True)
class Choices:
    """Everything the files depend on."""

    roles: frozenset[str]
    name: str
    manager_url: str
    uplink: str | None
    """Interface to the internet; None: not given and not found."""
    underlay: str | None
    """Interface between hosts and edges; None: not given."""
    underlay_address: IPv4Address | None

    @property
    def is_node(self) -> bool:
        """Say whether natd runs here."""
        return bool(self.roles & {HOST, EDGE})

    @property
    def host_uplinks(self) -> tuple[str, ...]:
        """Interfaces through which VMs' packets leave this host; empty: not known."""
        if EDGE not in self.roles:
            return tuple(filter(None, [self.underlay or self.uplink]))
        return tuple(filter(None, dict.fromkeys([self.uplink, self.underlay])))

    @property
    def edge_underlay(self) -> tuple[str, ...]:
        """Interfaces to other hosts; empty on a machine that is its own edge."""
        return tuple(filter(None, [self.underlay]))


def parse_roles(text: str) -> frozenset[str]:
    """
    Read ``host,edge``.

    :raise InvalidRequest: When it names anything but roles, or none.
    """
    roles = frozenset(word.strip() for word in text.split(",") if word.strip())
    if not roles or not roles <= set(ROLES):
        raise InvalidRequest(f"not roles: {text!r}; use one or more of {','.join(ROLES)}, with commas between them")
    return roles


def complete(
    machine: Machine,
    roles: frozenset[str],
    *,
    name: str | None = None,
    manager: str | None = None,
    uplink: str | None = None,
    underlay: str | None = None,
    underlay_address: IPv4Address | None = None,
) -> Choices:
    """
    Fill in what was not given.

    :raise InvalidRequest: When the manager runs elsewhere and nobody said where, or its URL is none.
    """
    if manager is None and MANAGER not in roles:
        raise InvalidRequest(
            "where is the manager? give --manager https://ADDRESS:PORT, or add the role manager to run it here"
        )
    if manager is not None and not manager.startswith(("unix:///", "https://")):
        raise InvalidRequest(f"not a manager: {manager!r}; use https://ADDRESS:PORT or unix:///PATH")
    uplink = uplink or machine.default_interface
    return Choices(
        roles=roles,
        name=name or machine.hostname,
        manager_url=manager or LOCAL_MANAGER,
        uplink=uplink,
        underlay=underlay,
        underlay_address=underlay_address or machine.addresses.get(underlay or uplink or ""),
    )
