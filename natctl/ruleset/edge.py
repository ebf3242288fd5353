"""
The edge role: internal to external addresses and back, without a state per connection.

In nftables' notation, shortened::

    table ip virtports {
      map outbound { type ipv4_addr . inet_service : ipv4_addr; flags interval; }   # internal . ports : external
      map inbound  { type ipv4_addr . inet_service : ipv4_addr; flags interval; }   # external . ports : internal
      chain receive { type filter hook prerouting priority raw;
        iifname @underlay ip saddr @internals ip daddr @externals jump outward      # hairpin: the source first
        iifname @outside  ip daddr @externals jump inward
        iifname @underlay ip daddr @externals jump inward
        iifname @outside  ip daddr @externals fib daddr type != local counter drop  # nobody's port
        iifname @underlay ip daddr @externals fib daddr type != local counter drop
        ip daddr @locals accept                     # the host role on this machine needs connection tracking
        ip daddr @internals notrack accept
        iifname @underlay ip saddr @internals notrack }
      chain send { type filter hook postrouting priority 300;
        oifname @outside jump outward
        oifname @outside ip saddr @internals counter drop }      # a port that the VM does not own never leaves
      chain inward {
        meta l4proto @ported ip daddr set ip daddr . th dport map @inbound return
        icmp type @queries   ip daddr set ip daddr . @th,32,16 map @inbound return
        icmp type @errors …  both ip daddr and the embedded source … return }
      chain outward { … the mirror image … }
      chain reassembly { ct state untracked }
    }

- ``outbound`` is keyed by the ports too: a host with stale tables cannot use a port that has moved on. The edges are
  the fence.
- Replies for a VM of this very machine can come in through another edge, by the underlay. They must be tracked, because
  connection tracking undoes the host role's translation; hence ``@locals``, and hence only packets *from* an internal
  address are untracked on their way in from the underlay.
- ICMP has no ports: queries are told apart by their identifier, errors by what they carry. An embedded header with
  options, or a later fragment, has no port at a known place and is not translated.
- DCCP's checksum covers the addresses and nftables cannot mend it: DCCP is not carried (Linux 6.16 retired it).
- ``reassembly`` is never called. That a ``ct`` expression exists makes the kernel reassemble fragments before ``raw``
  (nf_defrag_ipv4, enabled by nft_ct.c), and only then have all of them ports.
- A pool address that is this machine's own is not dropped when it is nobody's port: then it is this machine's.
"""

from __future__ import annotations

from collections.abc import Iterable
from ipaddress import IPv4Address
from typing import Final

from cpm.model import PortRange
from natctl.desired import EdgeEntry, EdgeSettings, Path
from natctl.ruleset.common import (
    ADDRESS,
    ICMP_TYPE,
    INTERNALS,
    PORT,
    POSTROUTING,
    PREROUTING,
    PROTOCOL,
    address_in,
    described,
    filtering,
    from_interface,
    interface_elements,
    interfaces,
    looked_up,
    network_elements,
    networks,
    protocol,
    rule,
    to_interface,
)
from natctl.ruleset.expressions import (
    DESTINATION,
    SOURCE,
    TRANSPORT,
    compare,
    counter,
    ct,
    destination_kind,
    mapped,
    masked,
    member,
    meta,
    notrack,
    payload,
    word,
    write_address,
    write_embedded_address,
)
from natctl.ruleset.values import (
    ACCEPT,
    DROP,
    RETURN,
    Chain,
    Element,
    Expression,
    Family,
    Fragment,
    Place,
    Rule,
    Ruleset,
    SetSpec,
    indexed,
    jump,
)

OUTBOUND: Final[Place] = (Family.IPV4, "outbound")
INBOUND: Final[Place] = (Family.IPV4, "inbound")
LOCALS: Final[Place] = (Family.IPV4, "locals")
OUTSIDE: Final[Place] = (Family.IPV4, "outside")
UNDERLAY: Final[Place] = (Family.IPV4, "underlay")
EXTERNALS: Final[Place] = (Family.IPV4, "externals")
PORTED: Final[Place] = (Family.IPV4, "ported")
QUERIES: Final[Place] = (Family.IPV4, "queries")
ERRORS: Final[Place] = (Family.IPV4, "errors")

NOBODYS_PORT: Final = "nobodys-port"
"""Name of the counter of packets that came for a port of the pool that no VM holds, and were dropped."""
NOT_OWNED: Final = "not-owned"
"""Name of the counter of packets that a VM sent from a port it does not hold, and that were dropped."""

_ICMP = 1
_EMBEDDED = 8
"""Transport offset of the header that an ICMP error carries."""

_SETS: Final = (
    SetSpec("outbound", (ADDRESS, PORT), data=(ADDRESS,), interval=True),
    SetSpec("inbound", (ADDRESS, PORT), data=(ADDRESS,), interval=True),
    SetSpec("locals", (ADDRESS,)),
    interfaces("outside"),
    interfaces("underlay"),
    SetSpec("externals", (ADDRESS,)),
    SetSpec("ported", (PROTOCOL,)),
    SetSpec("queries", (ICMP_TYPE,)),
    SetSpec("errors", (ICMP_TYPE,)),
    networks("internals"),
)


def base(settings: EdgeSettings, path: Path | None) -> Ruleset:
    """Return the table, chains and sets of the edge role, without any VM."""
    chains = (_receive(), _send(), _inward(), _outward(), _reassembly())
    elements = {(Family.IPV4, spec.name): indexed(()) for spec in _SETS} | {
        OUTSIDE: indexed(interface_elements(settings.uplinks)),
        UNDERLAY: indexed(interface_elements(settings.underlay)),
        PORTED: _numbers(6, 17, 132, 136),
        QUERIES: _numbers(0, 8, 13, 14),
        ERRORS: _numbers(3, 4, 11, 12),
        EXTERNALS: indexed(Element(address.packed) for address in sorted(path.externals if path else ())),
        INTERNALS: indexed(network_elements([path.internal_pool] if path else [])),
    }
    return Ruleset(
        {(Family.IPV4, chain.name): chain for chain in chains},
        {(Family.IPV4, spec.name): spec for spec in _SETS},
        elements,
    )


def fragment(entry: EdgeEntry, present: Iterable[Element] = ()) -> Fragment:
    """
    Return what one VM adds, in as many pieces as it takes to leave the present ones alone.

    A range that grows gets another element beside the one it has. Replacing it would be as atomic in its outcome, but
    on kernels before 6.17 a lookup during the commit could miss an element that is being replaced.

    :param present: The VM's elements of ``outbound`` as the kernel holds them now.
    """
    kept = _pieces(entry, present)
    label = described(entry.name, entry.domain)
    elements: list[tuple[Place, Element]] = []
    internal = entry.internal.packed
    if entry.via is None:
        elements.append((LOCALS, Element(internal, userdata=label)))
    for external, ports in entry.ranges:
        outside = external.packed
        for piece in (ports,) if not kept else covered(ports, kept.get(external, ())):
            first, last = _ends(piece)
            elements.append((OUTBOUND, Element(internal + first, internal + last, outside, "", label)))
            elements.append((INBOUND, Element(outside + first, outside + last, internal, "", label)))
    return Fragment((), tuple(elements))


def covered(ports: PortRange, present: Iterable[PortRange]) -> tuple[PortRange, ...]:
    """Return disjoint ranges, in order, that hold exactly these ports and keep each present one that is within them."""
    kept = sorted(piece for piece in present if ports.covers(piece))
    missing = [ports]
    for piece in kept:
        missing = [rest for run in missing for rest in run.minus(piece)]
    return tuple(sorted([*kept, *missing]))


def range_of(element: Element) -> tuple[IPv4Address, IPv4Address, PortRange]:
    """Return internal address, external address and ports of an element of ``outbound``."""
    ports = PortRange(int.from_bytes(element.key[4:6], "big"), int.from_bytes(element.key_end[4:6], "big"))
    return IPv4Address(element.key[:4]), IPv4Address(element.data), ports


def _pieces(entry: EdgeEntry, present: Iterable[Element]) -> dict[IPv4Address, list[PortRange]]:
    pieces: dict[IPv4Address, list[PortRange]] = {}
    for element in present:
        internal, external, ports = range_of(element)
        if internal == entry.internal:
            pieces.setdefault(external, []).append(ports)
    return pieces


def _ends(ports: PortRange) -> tuple[bytes, bytes]:
    return ports.first.to_bytes(2, "big") + b"\0\0", ports.last.to_bytes(2, "big") + b"\0\0"


def _numbers(*numbers: int) -> dict[tuple[bytes, bool], Element]:
    return indexed(Element(bytes((number,))) for number in numbers)


def _receive() -> Chain:
    to_pool = address_in(DESTINATION, "externals")
    is_not_here = (destination_kind(), compare(word(2), "!="))
    nobodys = "nobody's port: would loop between here and the router"

    def drop(side: str) -> Rule:
        return rule(from_interface(side), to_pool, is_not_here, counter(), DROP, comment=nobodys, tag=NOBODYS_PORT)

    from_vm = from_interface("underlay") + address_in(SOURCE, "internals")
    rules = (
        rule(from_vm, to_pool, jump("outward"), comment="from VM to VM: the source becomes external too"),
        rule(from_interface("outside"), to_pool, jump("inward")),
        rule(from_interface("underlay"), to_pool, jump("inward")),
        drop("outside"),
        drop("underlay"),
        rule(address_in(DESTINATION, "locals"), ACCEPT, comment="the host role of this machine tracks it"),
        rule(address_in(DESTINATION, "internals"), notrack(), ACCEPT),
        rule(from_vm, notrack()),
    )
    return Chain("receive", filtering(PREROUTING, -300), rules)


def _send() -> Chain:
    leaves = to_interface("outside")
    not_owned = "the VM does not hold this port here"
    rules = (
        rule(leaves, jump("outward")),
        rule(leaves, address_in(SOURCE, "internals"), counter(), DROP, comment=not_owned, tag=NOT_OWNED),
    )
    return Chain("send", filtering(POSTROUTING, 300), rules)


def _inward() -> Chain:
    rewrite = write_address(DESTINATION)
    rewrite_both = (rewrite, write_embedded_address(SOURCE))
    rules = (
        rule(_is_ported(), looked_up("inbound", DESTINATION, 2), rewrite, RETURN),
        rule(_is_icmp("queries"), looked_up("inbound", DESTINATION, 4), rewrite, RETURN),
        rule(_is_error(), _carries_ports(), looked_up("inbound", DESTINATION, 28), rewrite_both, RETURN),
        rule(_is_error(), _carries_query(), looked_up("inbound", DESTINATION, 32), rewrite_both, RETURN),
    )
    return Chain("inward", None, rules)


def _outward() -> Chain:
    rewrite = write_address(SOURCE)
    embedded = write_embedded_address(DESTINATION)
    by_vm = _is_error() + address_in(SOURCE, "internals")
    underway = "told by a machine on the way, not by the VM"
    rules = (
        rule(_is_ported(), looked_up("outbound", SOURCE, 0), rewrite, RETURN),
        rule(_is_icmp("queries"), looked_up("outbound", SOURCE, 4), rewrite, RETURN),
        rule(by_vm, _carries_ports(), looked_up("outbound", SOURCE, 30), rewrite, embedded, RETURN),
        rule(by_vm, _carries_query(), looked_up("outbound", SOURCE, 32), rewrite, embedded, RETURN),
        rule(_is_error(), _carries_ports(), _looked_up_embedded(30), embedded, RETURN, comment=underway),
        rule(_is_error(), _carries_query(), _looked_up_embedded(32), embedded, RETURN, comment=underway),
    )
    return Chain("outward", None, rules)


def _reassembly() -> Chain:
    is_untracked = (ct("state"), masked(word(64)), compare(bytes(4), "!="))
    why = "never called: its presence makes the kernel reassemble fragments"
    return Chain("reassembly", None, (rule(is_untracked, comment=why),))


def _is_ported() -> tuple[Expression, ...]:
    return meta("l4proto"), member("ported")


def _is_icmp(types: str) -> tuple[Expression, ...]:
    return (*protocol(_ICMP), payload(TRANSPORT, 0, 1), member(types))


def _is_error() -> tuple[Expression, ...]:
    has_no_options = (payload(TRANSPORT, _EMBEDDED, 1), compare(b"\x45"))
    is_first_fragment = (payload(TRANSPORT, _EMBEDDED + 6, 2), masked(b"\x1f\xff"), compare(b"\0\0"))
    return _is_icmp("errors") + has_no_options + is_first_fragment


def _carries_ports() -> tuple[Expression, ...]:
    return payload(TRANSPORT, _EMBEDDED + 9, 1), member("ported")


def _carries_query() -> tuple[Expression, ...]:
    is_icmp = (payload(TRANSPORT, _EMBEDDED + 9, 1), compare(bytes((_ICMP,))))
    return (*is_icmp, payload(TRANSPORT, _EMBEDDED + 20, 1), member("queries"))


def _looked_up_embedded(port_offset: int) -> tuple[Expression, ...]:
    address = payload(TRANSPORT, _EMBEDDED + DESTINATION, 4)
    return address, payload(TRANSPORT, port_offset, 2, 9), mapped("outbound")
