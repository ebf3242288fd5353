"""
The edge role: internal to external addresses and back, without a state per connection.

The elements that VMs have in its maps, and how many maps there are, are in :mod:`natctl.ruleset.edge_maps`.
In nftables' notation, shortened::

    table ip virtports {
      map outbound { type ipv4_addr . inet_service : ipv4_addr; flags interval; }       # internal . ports : external
      map inbound-203.0.113.1 { type inet_service : ipv4_addr; flags interval; }        # ports : internal
      map inbound { type ipv4_addr : verdict; elements = { 203.0.113.1 : goto inbound-203.0.113.1 } }
      chain receive { type filter hook prerouting priority raw;
        ip saddr POOL ip daddr != @externals iifname "eth1" notrack accept        # nearly all that comes from VMs
        iifname "eth0" goto from-outside
        iifname "eth1" goto from-hosts
        ip daddr @locals accept                     # the host role on this machine needs connection tracking
        ip daddr POOL fib daddr type != local notrack accept }
      chain from-hosts {
        ip saddr POOL ip daddr @externals jump outward                        # hairpin: the source first
        jump inward
        ip daddr @locals accept
        ip daddr POOL fib daddr type != local notrack accept
        ip daddr @externals fib daddr type != local counter drop                    # nobody's port
        ip saddr POOL notrack }
      chain from-outside {
        jump inward
        ip daddr @locals accept
        ip daddr POOL fib daddr type != local notrack accept
        ip daddr @externals fib daddr type != local counter drop }
      chain send { type filter hook postrouting priority 300;
        ip saddr POOL oifname "eth0" jump outward
        # A port that the VM does not own never leaves:
        ip saddr POOL oifname "eth0" fib saddr type != local counter drop
        meta l4proto icmp ip saddr != POOL oifname "eth0" jump outward }  # errors that a machine on the way tells
      chain inward { ip daddr vmap @inbound }
      chain inbound-203.0.113.1 {
        meta l4proto @ported ip daddr set th dport map @inbound-203.0.113.1 notrack accept
        icmp type @queries   ip daddr set icmp id map @inbound-203.0.113.1 notrack accept
        icmp type @errors …  both ip daddr and the embedded source … notrack accept }
      chain outward {
        meta l4proto @ported ip saddr set ip saddr . th sport map @outbound return
        … likewise, and errors that a machine on the way has to tell … }
      chain reassembly { meta l4proto tcp tproxy to :1 }
    }

- Every packet passes ``receive`` and ``send``. The rules that match most packets come first; addresses are compared
  before interfaces, names of interfaces are compared and not looked up, and sets of known size have that size declared,
  because each of these is several times as cheap as the alternative (``docs/design/0004-packet-path.md``).
- Where the machine has the host role too, packets for its own VMs must be tracked: ``inbound-…`` then returns instead
  of accepting, and ``receive`` does not touch packets from VM to VM.
- ``outbound`` is keyed by the ports too: the edges do not let a host with stale tables use a port that another VM has
  by now.
- The cost of one change must not grow with the number of VMs, and removing an element of a concatenated interval map
  takes time in proportion to the map. So ``inbound`` is one map of plain port intervals (a tree) for each external
  address, and where there are many VMs ``outbound`` becomes ``outbound-0`` … by the lowest bits of the internal
  address (``docs/design/0002-edge-maps.md``).
- Replies for a VM of this very machine can come in through another edge, by the underlay. They must be tracked, because
  connection tracking undoes the host role's translation; hence ``@locals``, and hence only packets *from* an internal
  address are untracked on their way in from the underlay.
- ICMP has no ports: queries are told apart by their identifier, errors by what they carry. An embedded header with
  options, or a later fragment, has no port at a known place and is not translated.
- DCCP's checksum covers the addresses and nftables cannot mend it: DCCP is not carried (Linux 6.16 retired it).
- ``reassembly`` is never called. That a ``tproxy`` expression exists makes the kernel reassemble fragments before
  ``raw`` (nf_defrag_ipv4, enabled by nft_tproxy.c), and only then have all of them ports. A ``ct`` expression would do
  that too, but it also sends every packet through connection tracking, which a machine that is only an edge can do
  without.
- This machine may have addresses in the internal pool: nothing that it sends or receives is dropped or goes untracked
  (``fib … type local``). See also :mod:`natctl.ruleset.shared_pool`.
- Packets for a pool address that is this machine's own are not dropped when no VM has the port: they are for this
  machine.

Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from natctl.model.entries import EdgeSettings, Path
from natctl.ruleset.common import (
    ADDRESS,
    ERROR_TYPES,
    ERRORS,
    ICMP_TYPE,
    POSTROUTING,
    PREROUTING,
    PROTOCOL,
    address_in,
    address_port_lookup,
    filtering,
    in_network,
    number_elements,
    pool_of,
    protocol,
    rule,
    through,
)
from natctl.ruleset.edge_maps import OUTBOUND, Layout, inbound, inbound_map, outbound_map
from natctl.ruleset.expressions import (
    DESTINATION,
    NETWORK,
    SECOND,
    SOURCE,
    TRANSPORT,
    bitwise,
    compare,
    counter,
    destination_kind,
    intercept,
    map_lookup,
    meta,
    native_u32,
    notrack,
    payload,
    set_lookup,
    source_kind,
    verdict,
    verdict_lookup,
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
    Place,
    Rule,
    Ruleset,
    SetSpec,
    by_identity,
    goto,
    jump,
)

INBOUND: Final[Place] = (Family.IPV4, "inbound")
EXTERNALS: Final[Place] = (Family.IPV4, "externals")
PORTED: Final[Place] = (Family.IPV4, "ported")
QUERIES: Final[Place] = (Family.IPV4, "queries")

NOBODYS_PORT: Final = "nobodys-port"
"""Name of the counter of packets that came for a port of the pool that no VM holds, and were dropped."""
NOT_OWNED: Final = "not-owned"
"""Name of the counter of packets that a VM sent from a port it does not hold, and that were dropped."""

_FROM_HOSTS = "from-hosts"
_FROM_OUTSIDE = "from-outside"
_UNDERWAY = "told by a machine on the way, not by the VM"
_ICMP = 1
_TCP = 6
_LOCAL = native_u32(2)
"""``RTN_LOCAL``: an address of this machine."""
_EMBEDDED = 8
"""Transport offset of the header that an ICMP error carries."""

_SETS: Final = (
    SetSpec("locals", (ADDRESS,)),
    SetSpec("ported", (PROTOCOL,)),
    SetSpec("queries", (ICMP_TYPE,)),
    ERROR_TYPES,
)


def base(
    settings: EdgeSettings, path: Path | None, layout: Layout, *, is_host: bool, shares_pool: bool = False
) -> Ruleset:
    """
    Return the table, chains and sets of the edge role, without any VM.

    :param is_host: This machine has the host role too: its own VMs need connection tracking.
    :param shares_pool: Neighbours of this machine have addresses of the pool: what they send to it must be tracked.
    """
    externals, pool = sorted(layout.externals), pool_of(path)
    for_vms = _for_vms(pool, is_host=is_host)
    chains = (
        _receive(settings, pool, for_vms, is_host=is_host, shares_pool=shares_pool),
        _from_hosts(pool, for_vms, shares_pool=shares_pool),
        _from_outside(for_vms),
        _send(settings, pool),
        _reassembly(),
        _inward(),
        *(_inbound(external, is_host=is_host) for external in externals),
        *_outward(layout, pool),
    )
    # With room to spare: the kernel refuses to add to a full set, and somebody else may have added to it.
    room = 2 * max(8, len(externals))
    by_external = SetSpec("inbound", (ADDRESS,), verdicts=True, room=room), SetSpec("externals", (ADDRESS,), room=room)
    sets = (
        *_SETS,
        *by_external,
        *(outbound_map(name) for name in layout.maps),
        *(inbound_map(address) for address in externals),
    )
    if layout.shards > 1:
        sets += (SetSpec(OUTBOUND, (ADDRESS,), verdicts=True, room=2 * layout.shards),)
    elements = {(Family.IPV4, spec.name): by_identity(()) for spec in sets} | {
        PORTED: number_elements(6, 17, 132, 136),
        QUERIES: number_elements(0, 8, 13, 14),
        ERRORS: number_elements(3, 4, 11, 12),
        EXTERNALS: by_identity(Element(address.packed) for address in externals),
        INBOUND: by_identity(Element(address.packed, chain=inbound(address)[1]) for address in externals),
    }
    if layout.shards > 1:
        ways = (Element(number.to_bytes(4, "big"), chain=name) for number, name in enumerate(layout.maps))
        elements[Family.IPV4, OUTBOUND] = by_identity(ways)
    return Ruleset(
        {(Family.IPV4, chain.name): chain for chain in chains},
        {(Family.IPV4, spec.name): spec for spec in sets},
        elements,
    )


def _receive(
    settings: EdgeSettings, pool: IPv4Network, for_vms: tuple[Rule, ...], *, is_host: bool, shares_pool: bool
) -> Chain:
    is_elsewhere = address_in(DESTINATION, "externals", negated=True)
    if is_host:
        is_elsewhere += in_network(DESTINATION, pool, negated=True)
    if shares_pool:
        is_elsewhere += _is_not_here()
    from_vms = in_network(SOURCE, pool) + is_elsewhere
    hosts = sorted(settings.underlay)
    # Where hosts and the internet are behind one interface, what is done for hosts covers both.
    rules = (
        *(
            rule(from_vms, through("iifname", name), notrack(), ACCEPT, comment="from a VM to the internet")
            for name in hosts
        ),
        *(rule(through("iifname", name), goto(_FROM_OUTSIDE)) for name in sorted(settings.uplinks - settings.underlay)),
        *(rule(through("iifname", name), goto(_FROM_HOSTS)) for name in hosts),
        *for_vms,
    )
    return Chain("receive", filtering(PREROUTING, -300), rules)


def _from_hosts(pool: IPv4Network, for_vms: tuple[Rule, ...], *, shares_pool: bool) -> Chain:
    from_vm = in_network(SOURCE, pool)
    rules = (
        rule(from_vm, _to_pool(), jump("outward"), comment="from VM to VM: the source becomes external too"),
        rule(jump("inward")),
        *for_vms,
        _unowned_port(),
        rule(from_vm, _is_not_here() if shares_pool else (), notrack()),
    )
    return Chain(_FROM_HOSTS, None, rules)


def _from_outside(for_vms: tuple[Rule, ...]) -> Chain:
    return Chain(_FROM_OUTSIDE, None, (rule(jump("inward")), *for_vms, _unowned_port()))


def _for_vms(pool: IPv4Network, *, is_host: bool) -> tuple[Rule, ...]:
    here = rule(address_in(DESTINATION, "locals"), ACCEPT, comment="the host role of this machine tracks it")
    # What is for this machine itself is tracked as its owner has it, also where its address lies in the pool.
    return (*((here,) if is_host else ()), rule(in_network(DESTINATION, pool), _is_not_here(), notrack(), ACCEPT))


def _unowned_port() -> Rule:
    why = "nobody's port: would loop between here and the router"
    return rule(_to_pool(), _is_not_here(), counter(), DROP, comment=why, tag=NOBODYS_PORT)


@functools.cache
def _is_not_here() -> tuple[Expression, ...]:
    return destination_kind(), compare(_LOCAL, "!=")


def _to_pool() -> tuple[Expression, ...]:
    return address_in(DESTINATION, "externals")


def _send(settings: EdgeSettings, pool: IPv4Network) -> Chain:
    return Chain("send", filtering(POSTROUTING, 300), tuple(_leaving(pool, sorted(settings.uplinks))))


def _leaving(pool: IPv4Network, names: Iterable[str]) -> Iterator[Rule]:
    by_vm, by_others = in_network(SOURCE, pool), in_network(SOURCE, pool, negated=True)
    not_owned = "the VM does not hold this port here"
    # This machine may have an address of its own in the pool: nothing that it sends is dropped.
    by_another = (source_kind(), compare(_LOCAL, "!="))
    for name in names:
        leaves = through("oifname", name)
        yield rule(by_vm, leaves, jump("outward"))
        yield rule(by_vm, leaves, by_another, counter(), DROP, comment=not_owned, tag=NOT_OWNED)
        # What the jump above translated passes here too, but no port of an external address is in the map.
        yield rule(protocol(_ICMP), by_others, leaves, jump("outward"), comment=_UNDERWAY)


def _inward() -> Chain:
    return Chain("inward", None, (rule(payload(NETWORK, DESTINATION, 4), verdict_lookup("inbound")),))


def _inbound(external: IPv4Address, *, is_host: bool) -> Chain:
    name = inbound(external)[1]
    done = (verdict(RETURN),) if is_host else (notrack(), verdict(ACCEPT))
    rewrite = write_address(DESTINATION)
    rewrite_both = (rewrite, write_embedded_address(SOURCE))
    rules = (
        # Nearly everything is TCP, and a comparison is quicker than a set.
        rule(protocol(_TCP), _port_in(2, name), rewrite, done),
        rule(_is_ported(), _port_in(2, name), rewrite, done),
        rule(_is_icmp("queries"), _port_in(4, name), rewrite, done),
        rule(_is_error(), _carries_ports(), _port_in(28, name), rewrite_both, done),
        rule(_is_error(), _carries_query(), _port_in(32, name), rewrite_both, done),
    )
    return Chain(name, None, rules)


def _outward(layout: Layout, pool: IPv4Network) -> tuple[Chain, ...]:
    if layout.shards == 1:
        return (_outward_through("outward", OUTBOUND, pool),)
    lowest_bits = bitwise((layout.shards - 1).to_bytes(4, "big"))
    by_vm = (payload(NETWORK, SOURCE, 4), lowest_bits, verdict_lookup(OUTBOUND))
    by_others = (
        *_is_error(),
        *in_network(SOURCE, pool, negated=True),
        payload(TRANSPORT, _EMBEDDED + DESTINATION, 4),
        lowest_bits,
        verdict_lookup(OUTBOUND),
    )
    return Chain("outward", None, (rule(by_others, comment=_UNDERWAY), rule(by_vm))), *(
        _outward_through(name, name, pool) for name in layout.maps
    )


def _outward_through(chain: str, name: str, pool: IPv4Network) -> Chain:
    rewrite = write_address(SOURCE)
    embedded = write_embedded_address(DESTINATION)
    by_vm = _is_error() + in_network(SOURCE, pool)
    rules = (
        rule(protocol(_TCP), address_port_lookup(name, SOURCE, 0), rewrite, RETURN),
        rule(_is_ported(), address_port_lookup(name, SOURCE, 0), rewrite, RETURN),
        rule(_is_icmp("queries"), address_port_lookup(name, SOURCE, 4), rewrite, RETURN),
        rule(by_vm, _carries_ports(), address_port_lookup(name, SOURCE, 30), rewrite, embedded, RETURN),
        rule(by_vm, _carries_query(), address_port_lookup(name, SOURCE, 32), rewrite, embedded, RETURN),
        rule(_is_error(), _carries_ports(), _embedded_lookup(name, 30), embedded, RETURN, comment=_UNDERWAY),
        rule(_is_error(), _carries_query(), _embedded_lookup(name, 32), embedded, RETURN, comment=_UNDERWAY),
    )
    return Chain(chain, None, rules)


def _reassembly() -> Chain:
    why = "never called: its presence makes the kernel reassemble fragments"
    return Chain("reassembly", None, (rule(protocol(_TCP), intercept(1), comment=why),))


@functools.cache
def _is_ported() -> tuple[Expression, ...]:
    return meta("l4proto"), set_lookup("ported")


@functools.cache
def _is_icmp(types: str) -> tuple[Expression, ...]:
    return (*protocol(_ICMP), payload(TRANSPORT, 0, 1), set_lookup(types))


@functools.cache
def _is_error() -> tuple[Expression, ...]:
    has_no_options = (payload(TRANSPORT, _EMBEDDED, 1), compare(b"\x45"))
    is_first_fragment = (payload(TRANSPORT, _EMBEDDED + 6, 2), bitwise(b"\x1f\xff"), compare(b"\0\0"))
    return _is_icmp("errors") + has_no_options + is_first_fragment


@functools.cache
def _carries_ports() -> tuple[Expression, ...]:
    return payload(TRANSPORT, _EMBEDDED + 9, 1), set_lookup("ported")


@functools.cache
def _carries_query() -> tuple[Expression, ...]:
    is_icmp = (payload(TRANSPORT, _EMBEDDED + 9, 1), compare(bytes((_ICMP,))))
    return (*is_icmp, payload(TRANSPORT, _EMBEDDED + 20, 1), set_lookup("queries"))


def _embedded_lookup(name: str, port_offset: int) -> tuple[Expression, ...]:
    address = payload(TRANSPORT, _EMBEDDED + DESTINATION, 4)
    return address, payload(TRANSPORT, port_offset, 2, SECOND), map_lookup(name)


def _port_in(offset: int, name: str) -> tuple[Expression, ...]:
    return payload(TRANSPORT, offset, 2), map_lookup(name)
