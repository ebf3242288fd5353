"""The sites of stories: which machines there are, and what each of them is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cpm.protocol.model import Role

Site = Mapping[str, frozenset[Role]]
"""The roles of each machine, by its name."""

_HOST, _EDGE, _BOTH = frozenset({Role.HOST}), frozenset({Role.EDGE}), frozenset({Role.HOST, Role.EDGE})

SITES: Final[Mapping[str, Site]] = {
    "apart": {"host1": _HOST, "host2": _HOST, "edge1": _EDGE, "edge2": _EDGE},
    "mixed": {"host1": _HOST, "both1": _BOTH, "edge1": _EDGE},
    "both": {"both1": _BOTH, "both2": _BOTH},
}
"""All of them, by name: hosts and edges apart, a machine that is both beside others, and nothing but such machines."""


def names(site: str, role: Role | None = None) -> tuple[str, ...]:
    """Return the machines of a site that have a role; None: all."""
    return tuple(name for name, roles in SITES[site].items() if role is None or role in roles)
