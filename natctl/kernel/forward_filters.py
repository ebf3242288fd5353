"""
Warns of other software's filters that may drop packets of VMs in silence (:mod:`natctl.ruleset.forward_filters`).

Tested by ``tests/netns/test_forward_filters.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from cpm.protocol.errors import KernelError
from natctl.kernel import legacy_tables
from natctl.model.entries import Settings
from natctl.netlink.nftables import read
from natctl.netlink.nftables.filters import forward_filters, names_interface
from natctl.netlink.socket import Socket
from natctl.ruleset import forward_filters as pure
from natctl.ruleset import host_maps
from natctl.ruleset.forward_filters import LEGACY, ForwardFilter


class ForwardFilters:
    """
    The filters of the last check, less those of which it is known that they let VMs' packets through.

    On a host that is known once a VM has begun a connection since the filter is there. An edge cannot know it, as it
    tracks no connections; there a rule that names an interface to the hosts is taken for one that lets them through.
    """

    def __init__(self) -> None:
        self.warnings: tuple[str, ...] = ()
        """A sentence each, with the commands."""
        self._begun_before: dict[ForwardFilter, Mapping[bytes, int]] = {}
        """Connections begun by VMs when the filter appeared; nothing for those that were there before us."""
        self._passed: set[ForwardFilter] = set()
        self._is_first = True

    def check(self, nft: Socket, settings: Settings, bridges: Collection[str]) -> None:
        """
        Look which filters there are. Never fails.

        :param bridges: With VMs behind them.
        """
        try:
            found, has_docker = forward_filters(nft)
            if "filter" in legacy_tables.names():
                found |= {ForwardFilter(LEGACY, "filter", "FORWARD")}
            warnings = [
                pure.sentence(each, ways, has_docker=has_docker)
                for each in sorted(found)
                if (ways := self._ways(nft, each, settings, bridges))
            ]
        except KernelError as error:
            self.warnings = (f"cannot check the filters of other software: {error}",)
            return
        for gone in self._begun_before.keys() - found:
            del self._begun_before[gone]
        self._passed &= found
        self._is_first = False
        self.warnings = tuple(warnings)

    def _ways(
        self, nft: Socket, found: ForwardFilter, settings: Settings, bridges: Collection[str]
    ) -> tuple[pure.Way, ...]:
        """Return the ways of VMs' packets on which the filter may drop them."""
        ways: tuple[pure.Way, ...] = ()
        if settings.host is not None and bridges and not self._lets_begin(nft, found):
            ways = pure.ways_of_host(bridges)
        edge = settings.edge
        if edge is not None and found.family != LEGACY:
            unnamed = [name for name in edge.underlay if not names_interface(nft, found, name)]
            ways += pure.ways_of_edge(unnamed, edge.uplinks)
        return ways

    def _lets_begin(self, nft: Socket, found: ForwardFilter) -> bool:
        if found not in self._passed:
            begun = read.counters(nft, host_maps.BINDINGS)
            before = self._begun_before.setdefault(found, {} if self._is_first else begun)
            if any(packets > before.get(key, 0) for key, packets in begun.items()):
                self._passed.add(found)
        return found in self._passed
