"""
The edge role: internal to external addresses and back, without a state per connection.

The elements that VMs have in its maps, and how many maps there are, are in :mod:`natctl.ruleset.edge_maps`.
In nftables' notation, shortened::

    table ip virtports {
      map blocks-1024 { type inet_service . ipv4_addr : ipv4_addr; }             # first port . internal : external
      map blocks-64 { type inet_service . ipv4_addr : ipv4_addr; }                      # the same
      map outbound { type ipv4_addr . inet_service : ipv4_addr; flags interval; }       # internal . ports : external
      map inbound-203.0.113.1 { type inet_service : ipv4_addr; flags interval; }        # ports : internal
      map icmp-outbound { typeof ip saddr . icmp id : ip saddr; flags interval; }       # the same
      map icmp-inbound-203.0.113.1 { typeof icmp id : ip saddr; flags interval; }       # the same
      map inbound { type ipv4_addr : verdict; elements = { 203.0.113.1 : goto inbound-203.0.113.1 } }
      chain receive { type filter hook prerouting priority raw;
        ip saddr POOL iifname "eth1" ip saddr vmap @senders          # nearly all that comes from VMs
        iifname "eth0" goto from-outside
        iifname "eth1" goto from-hosts
        ip daddr @locals accept                     # the host role on this machine needs connection tracking
        ip daddr POOL fib daddr type != local notrack accept }
      chain from-its-host {                         # from a VM, and its host has sent it
        ip daddr != @externals notrack accept
        goto from-hosts }
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
        ip saddr POOL oifname "eth0" goto of-vm
        oifname "eth0" goto of-others }
      chain of-vm {
        jump outward
        # A port that the VM does not own never leaves:
        ip saddr POOL fib saddr type != local counter drop }
      chain of-others {
        meta l4proto icmp jump quoting                            # errors that a machine on the way tells
        ip saddr @externals iif != 0 ip daddr != POOL fib saddr type != local goto forged
        # With forward = "vms":
        icmp type @errors return
        iifname "eth1" ip saddr != @externals ip daddr != POOL counter drop }
      chain inward { ip daddr vmap @inbound }
      chain inbound-203.0.113.1 {
        meta l4proto @ported ip daddr set th dport map @inbound-203.0.113.1 notrack accept
        meta l4proto icmp goto icmp-inbound-203.0.113.1 }
      chain icmp-inbound-203.0.113.1 {
        @th,0,8 @requests  fib daddr type local return     # somebody pings this machine
        @th,0,8 @queries   ip daddr set @th,32,16 map @icmp-inbound-203.0.113.1 notrack accept
        @th,0,8 @errors …  both ip daddr and the quoted source … notrack accept }
      chain outward { … ip saddr set th sport & 0xfc00 . ip saddr map @blocks-1024 return … }
      chain quoting { … }
      chain reassembly { meta l4proto tcp tproxy to :1 }
    }

- Every packet passes ``receive`` and ``send``. The rules that match most packets come first; addresses are compared
  before interfaces, names of interfaces are compared and not looked up, and sets of known size have that size declared,
  because each of these is several times as cheap as the alternative (``docs/design/0004-packet-path.md``).
- ``senders`` is in :mod:`natctl.ruleset.senders`, what ``outward`` and ``quoting`` do in :mod:`natctl.ruleset.outward`.
- What comes from anywhere but the internet never leaves with an external address that this edge did not write: its
  answers would go to a VM. A machine that has the address itself may use it.
- With ``forward = "vms"`` nothing passes between hosts and the internet but what was translated: also nothing to an
  internal address from outside (at the begin of ``from-outside``), and nothing else towards hosts (``to-hosts``).
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
- All this can be saved with ``nft list ruleset`` and loaded again (``docs/design/0009-a-ruleset-that-loads-again.md``).
  Therefore ICMP has maps and chains of its own, in which nothing says that a packet is ICMP: what ``nft`` cannot name
  it looks up only as a number.
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
  machine, and so are pings of it. See also :mod:`natctl.ruleset.own_ports`.

Tested in ``tests/unit/natctl/ruleset/test_ruleset.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from natctl.model.entries import EdgeSettings, Forwarding, Path
from natctl.model.flow import SCTP, TCP, UDP, UDP_LITE
from natctl.ruleset import icmp, outward, senders
from natctl.ruleset.common import (
    ADDRESS,
    ERROR_TYPES,
    ERRORS,
    LOCAL,
    POSTROUTING,
    PREROUTING,
    PROTOCOL,
    TYPEOF_OCTET,
    address_in,
    filtering,
    in_network,
    is_not_from_here,
    is_not_here,
    is_ported,
    number_elements,
    pool_of,
    protocol,
    rule,
    through,
)
from natctl.ruleset.edge_maps import ICMP, OUTBOUND, Layout, block_maps, inbound, inbound_maps, outbound_maps
from natctl.ruleset.expressions import (
    DESTINATION,
    NETWORK,
    QUOTED,
    SOURCE,
    TRANSPORT,
    compare,
    copy_address,
    counter,
    destination_kind,
    intercept,
    map_lookup,
    meta,
    notrack,
    payload,
    verdict,
    verdict_lookup,
    write_address,
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
QUOTED_PORTED: Final[Place] = (Family.IPV4, "quoted-ported")
QUERIES: Final[Place] = (Family.IPV4, "queries")
REQUESTS: Final[Place] = (Family.IPV4, "requests")

NOBODYS_PORT: Final = "nobodys-port"
"""Name of the counter of packets that came for a port of the pool that no VM holds, and were dropped."""
NOT_OWNED: Final = "not-owned"
"""Name of the counter of packets that a VM sent from a port it does not hold, and that were dropped."""

NOT_A_VMS: Final = "not-a-vms"
"""Name of the counter of packets between hosts and the internet that are no VM's, and were not forwarded."""

_FROM_HOSTS = "from-hosts"
_FROM_OUTSIDE = "from-outside"
_OF_VM = "of-vm"
_OF_OTHERS = "of-others"
_TO_HOSTS = "to-hosts"

_SETS: Final = (
    SetSpec("locals", (ADDRESS,)),
    SetSpec("ported", (PROTOCOL,)),
    SetSpec("quoted-ported", (TYPEOF_OCTET,)),
    SetSpec("queries", (TYPEOF_OCTET,)),
    SetSpec("requests", (TYPEOF_OCTET,)),
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
    is_elsewhere = _is_elsewhere(pool, is_host=is_host, shares_pool=shares_pool)
    chains = (
        _receive(settings, pool, for_vms, is_elsewhere),
        *((_from_its_host(is_elsewhere),) if settings.checks_senders else ()),
        _from_hosts(pool, for_vms, shares_pool=shares_pool),
        _from_outside(settings, pool, for_vms, shares_pool=shares_pool),
        _send(settings, pool),
        *((_to_hosts(settings, pool),) if settings.forward is Forwarding.VMS else ()),
        _of_vm(pool),
        _of_others(settings, pool),
        senders.forged(),
        _reassembly(),
        _inward(),
        *(chain for external in externals for chain in _inbound(external, is_host=is_host)),
        *outward.chains(layout, pool),
    )
    # With room to spare: the kernel refuses to add to a full set, and somebody else may have added to it.
    room = 2 * max(8, len(externals))
    by_external = SetSpec("inbound", (ADDRESS,), verdicts=True, room=room), SetSpec("externals", (ADDRESS,), room=room)
    sets = (
        *_SETS,
        *by_external,
        *block_maps(),
        *(spec for name in layout.maps for spec in outbound_maps(name)),
        *(spec for address in externals for spec in inbound_maps(address)),
    )
    if settings.checks_senders:
        sets += tuple(senders.sets(layout.room).values())
    if layout.shards > 1:
        sets += (SetSpec(OUTBOUND, (ADDRESS,), verdicts=True, room=2 * layout.shards),)
    elements = {(Family.IPV4, spec.name): by_identity(()) for spec in sets} | {
        PORTED: number_elements(TCP, UDP, SCTP, UDP_LITE),
        QUOTED_PORTED: number_elements(TCP, UDP, SCTP, UDP_LITE),
        QUERIES: number_elements(0, 8, 13, 14),
        REQUESTS: number_elements(8, 13),
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


def _is_elsewhere(pool: IPv4Network, *, is_host: bool, shares_pool: bool) -> tuple[Expression, ...]:
    """The packet is neither for a VM nor for this machine."""
    is_elsewhere = address_in(DESTINATION, "externals", negated=True)
    if is_host:
        is_elsewhere += in_network(DESTINATION, pool, negated=True)
    if shares_pool:
        is_elsewhere += is_not_here()
    return is_elsewhere


def _receive(
    settings: EdgeSettings, pool: IPv4Network, for_vms: tuple[Rule, ...], is_elsewhere: tuple[Expression, ...]
) -> Chain:
    # Without an element in the map, the rules that follow decide.
    decision = senders.by_sender() if settings.checks_senders else (*is_elsewhere, notrack(), verdict(ACCEPT))
    hosts = sorted(settings.underlay)
    # Where hosts and the internet are behind one interface, what is done for hosts covers both.
    rules = (
        *(rule(in_network(SOURCE, pool), through("iifname", name), decision, comment="from a VM") for name in hosts),
        *(rule(through("iifname", name), goto(_FROM_OUTSIDE)) for name in sorted(settings.uplinks - settings.underlay)),
        *(rule(through("iifname", name), goto(_FROM_HOSTS)) for name in hosts),
        *for_vms,
    )
    return Chain("receive", filtering(PREROUTING, -300), rules)


def _from_its_host(is_elsewhere: tuple[Expression, ...]) -> Chain:
    rules = (
        rule(is_elsewhere, notrack(), ACCEPT, comment="from a VM to the internet"),
        rule(goto(_FROM_HOSTS)),
    )
    return Chain(senders.FROM_ITS_HOST, None, rules)


def _from_hosts(pool: IPv4Network, for_vms: tuple[Rule, ...], *, shares_pool: bool) -> Chain:
    from_vm = in_network(SOURCE, pool)
    rules = (
        rule(from_vm, _to_pool(), jump("outward"), comment="from VM to VM: the source becomes external too"),
        rule(jump("inward")),
        *for_vms,
        _unowned_port(),
        rule(from_vm, is_not_here() if shares_pool else (), notrack()),
    )
    return Chain(_FROM_HOSTS, None, rules)


def _from_outside(settings: EdgeSettings, pool: IPv4Network, for_vms: tuple[Rule, ...], *, shares_pool: bool) -> Chain:
    # Before it is translated, nothing from the internet is for an internal address; neighbours may have some.
    untranslated: tuple[Rule, ...] = ()
    if settings.forward is Forwarding.VMS and not shares_pool:
        untranslated = (_not_a_vms(in_network(DESTINATION, pool), is_not_here()),)
    return Chain(_FROM_OUTSIDE, None, (*untranslated, rule(jump("inward")), *for_vms, _unowned_port()))


def _not_a_vms(*matches: Expression | tuple[Expression, ...]) -> Rule:
    return rule(*matches, counter(), DROP, comment="forward = vms: no VM's", tag=NOT_A_VMS)


def _for_vms(pool: IPv4Network, *, is_host: bool) -> tuple[Rule, ...]:
    here = rule(address_in(DESTINATION, "locals"), ACCEPT, comment="the host role of this machine tracks it")
    # What is for this machine itself is tracked as its owner has it, also where its address lies in the pool.
    return (*((here,) if is_host else ()), rule(in_network(DESTINATION, pool), is_not_here(), notrack(), ACCEPT))


def _unowned_port() -> Rule:
    why = "nobody's port: would loop between here and the router"
    return rule(_to_pool(), is_not_here(), counter(), DROP, comment=why, tag=NOBODYS_PORT)


def _to_pool() -> tuple[Expression, ...]:
    return address_in(DESTINATION, "externals")


def _send(settings: EdgeSettings, pool: IPv4Network) -> Chain:
    rules = tuple(_leaving(pool, sorted(settings.uplinks)))
    if settings.forward is Forwarding.VMS:
        hosts = sorted(settings.underlay - settings.uplinks)
        rules += tuple(rule(through("oifname", name), goto(_TO_HOSTS)) for name in hosts)
    return Chain("send", filtering(POSTROUTING, 300), rules)


def _to_hosts(settings: EdgeSettings, pool: IPv4Network) -> Chain:
    outside = sorted(settings.uplinks - settings.underlay)
    is_no_vm = in_network(DESTINATION, pool, negated=True)
    return Chain(_TO_HOSTS, None, tuple(_not_a_vms(through("iifname", name), is_no_vm) for name in outside))


def _leaving(pool: IPv4Network, names: Iterable[str]) -> Iterator[Rule]:
    for name in names:
        leaves = through("oifname", name)
        yield rule(in_network(SOURCE, pool), leaves, goto(_OF_VM))
        yield rule(leaves, goto(_OF_OTHERS))


def _of_vm(pool: IPv4Network) -> Chain:
    not_owned = "the VM does not hold this port here"
    rules = (
        rule(jump("outward")),
        rule(in_network(SOURCE, pool), is_not_from_here(), counter(), DROP, comment=not_owned, tag=NOT_OWNED),
    )
    return Chain(_OF_VM, None, rules)


def _of_others(settings: EdgeSettings, pool: IPv4Network) -> Chain:
    # From the internet to the internet an address passes as anybody's; what has no interface is of this machine.
    not_from_outside = (
        part for name in sorted(settings.uplinks - settings.underlay) for part in through("iifname", name, negated=True)
    )
    is_forwarded = (meta("iif"), compare(bytes(4), "!="))
    # With one interface for both sides, a packet from VM to VM leaves by it with its external source.
    is_out = in_network(DESTINATION, pool, negated=True)
    claims_external = (
        *address_in(SOURCE, "externals"),
        *is_forwarded,
        *not_from_outside,
        *is_out,
        *is_not_from_here(),
    )
    rules: tuple[Rule, ...] = (
        rule(protocol(icmp.NUMBER), jump("quoting"), comment=outward.UNDERWAY),
        rule(claims_external, goto(senders.FORGED), comment="an external address that was not translated here"),
    )
    if settings.forward is Forwarding.VMS:
        untranslated = (*address_in(SOURCE, "externals", negated=True), *is_out)
        rules += (
            rule(protocol(icmp.NUMBER), icmp.is_error(), RETURN, comment="about a packet that was forwarded"),
            *(_not_a_vms(through("iifname", name), untranslated) for name in sorted(settings.underlay)),
        )
    return Chain(_OF_OTHERS, None, rules)


def _inward() -> Chain:
    return Chain("inward", None, (rule(payload(NETWORK, DESTINATION, 4), verdict_lookup("inbound")),))


def _inbound(external: IPv4Address, *, is_host: bool) -> tuple[Chain, Chain]:
    name = inbound(external)[1]
    done = (verdict(RETURN),) if is_host else (notrack(), verdict(ACCEPT))
    rewrite = write_address(DESTINATION)
    rewrite_both = (rewrite, copy_address((NETWORK, DESTINATION), (TRANSPORT, QUOTED + SOURCE)))
    rules = (
        # Nearly everything is TCP, and a comparison is quicker than a set.
        rule(protocol(TCP), _number_in(2, name), rewrite, done),
        rule(is_ported(), _number_in(2, name), rewrite, done),
        rule(protocol(icmp.NUMBER), goto(ICMP + name)),
    )
    of_icmp = (
        rule(icmp.has_type("requests"), destination_kind(), compare(LOCAL), RETURN, comment="for this machine"),
        rule(icmp.has_type("queries"), _number_in(4, ICMP + name), rewrite, done),
        rule(icmp.is_error(), icmp.quotes_ports(), _number_in(28, ICMP + name), *rewrite_both, done),
        rule(icmp.is_error(), icmp.quotes_query(), _number_in(32, ICMP + name), *rewrite_both, done),
    )
    return Chain(name, None, rules), Chain(ICMP + name, None, of_icmp)


def _reassembly() -> Chain:
    why = "never called: its presence makes the kernel reassemble fragments"
    return Chain("reassembly", None, (rule(protocol(TCP), intercept(1), comment=why),))


def _number_in(offset: int, name: str) -> tuple[Expression, ...]:
    return payload(TRANSPORT, offset, 2), map_lookup(name)
