"""Resolvers and DHCP servers of this machine, from the files that name them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path
from typing import Final

from cpm.protocol.overlaps import Use

_FILES: Final = (
    ("etc", "resolv.conf", "resolver"),
    ("run/systemd/resolve", "resolv.conf", "resolver"),
    ("run/systemd/netif/leases", "*", "DHCP server"),
    ("var/lib/NetworkManager", "*.lease", "DHCP server"),
    ("var/lib/dhcp", "*.leases", "DHCP server"),
)
"""Of resolv.conf(5), systemd-resolved, systemd-networkd, NetworkManager and dhclient."""
_LINE: Final = re.compile(
    r"^\s*(?:nameserver\s+|SERVER_ADDRESS=|option\s+dhcp-server-identifier\s+)(\d+\.\d+\.\d+\.\d+)", re.MULTILINE
)


def network_services(root: Path = Path("/")) -> frozenset[Use]:
    """
    Return the IPv4 addresses of resolvers and DHCP servers; what cannot be read is left out.

    :param root: Below which the files are.
    """
    return frozenset(_services(root))


def _services(root: Path) -> Iterator[Use]:
    for folder, pattern, role in _FILES:
        for path in (root / folder).glob(pattern):
            try:
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            for match in _LINE.finditer(text):
                try:
                    yield Use.of(IPv4Address(match[1]), role)
                except ValueError:
                    continue
