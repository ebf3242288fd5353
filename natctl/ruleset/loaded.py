"""
Pure: tables that ``nft`` made from a saved ruleset, not natd.

``nft`` keeps neither digests nor tags (:mod:`natctl.ruleset.labels`), so nobody can say which VMs are meant, and
interfaces have other indexes after a boot. The first comparison makes such tables anew
(``docs/design/0009-a-ruleset-that-loads-again.md``).

Tested by ``tests/netns/test_round_trip.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Container

from natctl.ruleset import host_maps
from natctl.ruleset.expressions import NO_INTERFACE
from natctl.ruleset.values import Element, Reading


def is_loaded(reading: Reading) -> bool:
    """Whether ``nft`` made what was read: no chain of a VM says whose it is."""
    return bool(reading.vm_rules) and not any(host_maps.vm_in(userdata) for userdata in reading.vm_rules.values())


def taps_without_interface(reading: Reading, interfaces: Container[int]) -> tuple[Element, ...]:
    """Return the elements for taps that are not there: one that gets such an index is another VM's."""
    elements = reading.holdings.elements.get(host_maps.TAPS, {}).values()
    return tuple(
        element for element in elements if int.from_bytes(element.key, sys.byteorder) & ~NO_INTERFACE not in interfaces
    )
