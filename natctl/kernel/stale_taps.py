"""
Removes taps that are not there from a ruleset that was saved before the last boot, and that ``nft`` loaded.

Tested by ``tests/netns/test_round_trip.py``.
"""

from __future__ import annotations

from natctl.netlink import links
from natctl.netlink.nftables import encode
from natctl.netlink.socket import Socket
from natctl.ruleset import host_maps, loaded
from natctl.ruleset.plan import DeleteElements
from natctl.ruleset.values import Reading


def forget(nft: Socket, rtnl: Socket, reading: Reading) -> None:
    """
    Remove them, if the ruleset was loaded by ``nft``.

    :raise KernelError: When the kernel refuses.
    """
    if not loaded.is_loaded(reading):
        return
    if stale := loaded.taps_without_interface(reading, links.read_links(rtnl)):
        nft.execute(encode.transaction((DeleteElements(host_maps.TAPS, stale),)), "forget taps of a saved ruleset")
