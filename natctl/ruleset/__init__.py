"""
Pure: the nftables ruleset that a node should have.

:func:`base` is everything but the VMs and depends on the settings, the path and the layout only; a VM adds a fragment
(:func:`natctl.ruleset.host_maps.fragment`, :func:`natctl.ruleset.edge_maps.fragment`), so that changing a VM changes
its fragment only.
"""

from __future__ import annotations

from natctl.model.entries import Path, Settings
from natctl.ruleset import edge, edge_maps, host, own_ports, shared_pool
from natctl.ruleset.values import Ruleset


def base(settings: Settings, path: Path | None, layout: edge_maps.Layout) -> Ruleset:
    """
    Return tables, chains, sets and their elements for the node's roles, without any VM.

    :raise ValueError: When the mark mask is not at least 4 bits side by side.
    """
    parts = []
    if settings.host is not None:
        parts.append(
            host.base(
                settings.host,
                path,
                settings.edge.underlay if settings.edge is not None else (),
                gateways=settings.gateways,
            )
        )
    if settings.edge is not None:
        parts.append(
            edge.base(settings.edge, path, layout, is_host=settings.host is not None, shares_pool=settings.shares_pool)
        )
    if settings.own_targets:
        parts.append(own_ports.base(settings, path))
    if settings.shares_pool:
        parts.append(Ruleset({shared_pool.RETURNING: shared_pool.returning(settings, path)}, {}, {}))
    result = Ruleset({}, {}, {})
    for part in parts:
        # Both roles share the table ip virtports.
        result = Ruleset(
            {**result.chains, **part.chains},
            {**result.sets, **part.sets},
            {**result.elements, **part.elements},
            {**result.ct_timeouts, **part.ct_timeouts},
        )
    return result


__all__ = ["base"]
