"""
What the edge's fast path would pass by, so that it must not be used.

Its packets do not meet what the kernel does between the ingress of one interface and the egress of another. So it
steps back, and leaves everything to nftables, where other software or the operator has something there: policies of
IPsec, rules of nftables or iptables, routing rules by a mark that it could not know, filters at the same interface. A
strict check of sources is none of it, since natd loosens it (:mod:`natctl.kernel.sysctl`).

Tested by ``tests/netns/test_fast_path.py``.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Final

from natctl.bpf.loading import knows_marks
from natctl.kernel import legacy_tables
from natctl.netlink import classifiers, policies, rules
from natctl.netlink.classifiers import Side
from natctl.netlink.links import Link
from natctl.netlink.nftables.filters import on_the_way
from natctl.netlink.socket import Socket

_COMPILED: Final = pathlib.Path("/proc/sys/net/core/bpf_jit_enable")
_LEGACY: Final = frozenset({"filter", "mangle", "raw", "security"})


def on_machine(nft: Socket, rtnl: Socket) -> Iterator[str]:
    """
    Yield why the fast path cannot be used on this machine at all.

    :raise KernelError: When something cannot be read.
    """
    if _number(_COMPILED) == 0:
        yield "net.core.bpf_jit_enable is 0, so that a program costs more than it saves; set it to 1"
    if count := policies.count_policies():
        yield f"there are {count} IPsec policies (ip xfrm policy), which it would pass by"
    for chain in on_the_way(nft):
        yield f"chain {chain} has rules, which it would pass by"
    if legacy := sorted(_LEGACY & legacy_tables.names()):
        yield f"iptables-legacy is in use (table {legacy[0]}), which it would pass by"
    if not knows_marks() and any(rule.mask and not rule.is_ours for rule in rules.read_rules(rtnl)):
        yield "there are routing rules by mark (ip rule), which a program knows from Linux 6.10 on only"


def at_interface(rtnl: Socket, link: Link | None) -> str:
    """
    Return why the fast path cannot be used at an interface; an empty string: it can.

    :raise KernelError: When something cannot be read.
    """
    if link is None:
        return "there is no such interface"
    if not link.is_ethernet:
        return "its packets have no Ethernet header"
    if link.master is not None:
        return "it is part of another interface (ip link show master); name that one in natd.toml"
    others = [each for each in classifiers.filters(rtnl, link.number, Side.INGRESS) if not each.is_ours]
    if others:
        return f"other software has filters there (tc filter show dev {link.name} ingress)"
    return ""


def _number(path: pathlib.Path) -> int:
    try:
        text = path.read_text().strip()
    except OSError:
        return -1
    return int(text) if text.isdecimal() else -1
