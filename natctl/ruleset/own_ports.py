"""
The difference at an edge whose own address is an external address of the pool: the machine's own connections and VMs'
never have a port in common.

What comes in is for a VM when its map of the address has the port, whatever sockets the machine has. So each connection
that the machine begins from such an address leaves by a port that no VM has. The manager keeps the machine's ephemeral
ports apart (``docs/design/0007-own-addresses.md``); here the few connections are translated that would have another. In
nftables' notation::

    set apart-203.0.113.1 { type inet_service; flags interval; elements = { VMs' ports } }
    chain keep-apart { type nat hook postrouting priority srcnat - 5;
      meta mark & FLAG == FLAG return               # on a host, too: a VM's
      oifname "eth0" ip saddr 203.0.113.1 jump own-203.0.113.1
      oifname "eth0" ip saddr @guests ip daddr != @inland jump guests-203.0.113.1 }
    chain own-203.0.113.1 {
      tcp sport >= 1024 snat to 203.0.113.1:32768-60999
      udp sport 32768-60999 snat to 203.0.113.1:32768-60999
      udp sport @apart-203.0.113.1 snat to 203.0.113.1:32768-60999
      … likewise SCTP, UDP-Lite
      meta l4proto icmp snat to 203.0.113.1:32768-60999 }
    chain guests-203.0.113.1 {
      meta l4proto tcp snat to 203.0.113.1:32768-60999
      … likewise UDP, SCTP, UDP-Lite, ICMP
      snat to 203.0.113.1 }

- A nat chain sees the first packet of a connection only, and no answers.
- A port that is in the target already stays as it is unless another connection has it. Then the kernel picks one from
  the target; without this rule it would pick any from 1024 on.
- UDP ports that are neither a VM's nor ephemeral stay as they are, since peers may insist on them (IKE, SIP). So do
  ports below 1024, which no VM gets. Other TCP ports are only where a connection begins: it has one of the target from
  the start, so that no VM can get its port later.
- Where the kernel picks from nearly all ports, as on many busy servers, only a part of these is the target.
- A ping's identifier is anything; identifiers are ports to a NAT (RFC 5508).
- The chain comes before other software's source NAT (``srcnat``), which picks from all ports. So guests of this machine
  that are not managed are translated here, unless ``edge.keep_apart`` is off. It applies to private sources on their
  way to public destinations.
- While VMs still hold ports of the ephemeral range, the target is its longest part without such.

Tested in ``tests/netns/test_own_ports.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from cpm.protocol.bounds import FIRST_PORT
from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import PortRange
from natctl.model.entries import DEFAULT_EXEMPT, Path, Settings
from natctl.model.flow import ICMP, SCTP, TCP, UDP, UDP_LITE
from natctl.model.own_ports import OwnInterfaces
from natctl.ruleset.common import (
    PORT,
    POSTROUTING,
    address_in,
    is_managed,
    network_elements,
    networks,
    pool_of,
    protocol,
    rule,
    through,
)
from natctl.ruleset.edge_maps import apart
from natctl.ruleset.expressions import (
    DESTINATION,
    NETWORK,
    SOURCE,
    TRANSPORT,
    compare,
    payload,
    set_lookup,
    source_nat_to,
)
from natctl.ruleset.marks import Marks
from natctl.ruleset.values import (
    RETURN,
    Chain,
    Elements,
    Expression,
    Family,
    Hook,
    Place,
    Rule,
    Ruleset,
    SetSpec,
    by_identity,
    jump,
)

_BEFORE_OTHERS: Final = 95
"""Priority between our own translation of VMs' connections (90) and everybody else's (``srcnat``, 100)."""
_GUESTS: Final[Place] = (Family.IPV4, "guests")
_INLAND: Final[Place] = (Family.IPV4, "inland")
_PORTED: Final = (TCP, UDP, SCTP, UDP_LITE)
_DEFAULT: Final = PortRange(32768, 60999)
"""``ip_local_port_range`` of a Linux that nobody has configured."""
_MOST_KEPT: Final = 32768
_FIRST_PORT: Final = FIRST_PORT.to_bytes(2, "big")
_PRIVATE: Final = tuple(map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")))
_NO_HOST: Final = IPv4Network("224.0.0.0/3")
"""Multicast, reserved and broadcast."""


def ephemeral_ports(local_range: str, reserved: str) -> tuple[PortRange, ...]:
    """
    Return the ports that the kernel picks from, given ``ip_local_port_range`` and ``ip_local_reserved_ports``.

    :raise ValueError: When these are not what the kernel writes there.
    """
    first, last = map(int, local_range.split())
    kept = map(PortRange.parse, filter(None, reserved.strip().split(",")))
    return tuple(PortRange(max(first, FIRST_PORT), last).without(kept))


def kept_part(picked: Collection[PortRange]) -> tuple[PortRange, ...]:
    """
    Return those of the ports that the kernel picks from which no VM gets.

    All, unless they are so many that VMs would get next to nothing: then those that Linux picks from by default. The
    machine's connections from the others leave by one of these.
    """
    if sum(ports.size for ports in picked) <= _MOST_KEPT:
        return tuple(picked)
    return tuple(
        PortRange(max(ports.first, _DEFAULT.first), min(ports.last, _DEFAULT.last))
        for ports in picked
        if ports.overlaps(_DEFAULT)
    )


def targets(
    own: OwnInterfaces, externals: Collection[IPv4Address], entries: Iterable[EdgeIntent]
) -> Mapping[IPv4Address, PortRange]:
    """
    Return, for each own address that is in the pool, the ports by which the machine's connections leave.

    An address on which VMs hold all ephemeral ports is left out.

    :param entries: The VMs.
    """
    shared = set(own.addresses) & set(externals)
    if not shared:
        return {}
    left = {address: list(own.ephemeral) for address in shared}
    for external, held in ((each.external, each.ports) for entry in entries for each in entry.ranges):
        if external in shared:
            left[external] = [rest for ports in left[external] for rest in ports.minus(held)]
    return {
        address: max(parts, key=lambda ports: (ports.size, ports.first)) for address, parts in left.items() if parts
    }


def base(settings: Settings, path: Path | None) -> Ruleset:
    """Return chains and sets of an edge with own addresses in the pool; nothing for any other machine."""
    edge, to = settings.edge, settings.own_targets
    if edge is None or not to:
        return Ruleset({}, {}, {})
    exempt = settings.host.exempt if settings.host is not None else DEFAULT_EXEMPT
    chains = [_keep_apart(settings)]
    for address, target in sorted(to.items()):
        chains += [_own(address, target, settings.own_picked), _guests(address, target)]
    sets = {apart(address): SetSpec(apart(address)[1], (PORT,), interval=True) for address in to}
    elements: dict[Place, Elements] = {apart(address): {} for address in to}
    pool = pool_of(path)
    sources = [rest for private in _PRIVATE for rest in _without(private, pool)]
    return Ruleset(
        {(Family.IPV4, chain.name): chain for chain in chains},
        sets | {place: networks(place[1]) for place in (_GUESTS, _INLAND)},
        elements
        | {
            _GUESTS: by_identity(network_elements(sources)),
            _INLAND: by_identity(network_elements([*exempt, _NO_HOST])),
        },
    )


def _without(network: IPv4Network, pool: IPv4Network) -> Iterator[IPv4Network]:
    if pool.subnet_of(network):
        yield from network.address_exclude(pool)
    elif not network.subnet_of(pool):
        yield network


def _keep_apart(settings: Settings) -> Chain:
    assert settings.edge is not None
    return Chain("keep-apart", Hook("nat", POSTROUTING, _BEFORE_OTHERS), tuple(_rules(settings)))


def _rules(settings: Settings) -> Iterator[Rule]:
    edge, to = settings.edge, settings.own_targets
    assert edge is not None
    if settings.host is not None:
        yield rule(is_managed(Marks.of_mask(settings.host.mark_mask)), RETURN)
    for name in sorted(edge.uplinks | edge.underlay):
        for address in sorted(to):
            from_here = (payload(NETWORK, SOURCE, 4), compare(address.packed))
            yield rule(through("oifname", name), from_here, jump(f"own-{address}"))
    for name in sorted(edge.uplinks) if edge.keep_apart else ():
        behind = settings.own_primary.get(name)
        if behind in to:
            inside = (*address_in(SOURCE, "guests"), *address_in(DESTINATION, "inland", negated=True))
            yield rule(through("oifname", name), inside, jump(f"guests-{behind}"))


def _own(address: IPv4Address, target: PortRange, picked: Iterable[PortRange]) -> Chain:
    is_picked = (
        (_source_port(), compare(ports.first.to_bytes(2, "big"), ">="), compare(ports.last.to_bytes(2, "big"), "<="))
        for ports in picked
    )
    sources = (*is_picked, (_source_port(), set_lookup(apart(address)[1])))
    rules = (
        rule(protocol(TCP), _source_port(), compare(_FIRST_PORT, ">="), source_nat_to(address, target)),
        *(
            rule(protocol(number), source, source_nat_to(address, target))
            for number in _PORTED
            if number != TCP
            for source in sources
        ),
        rule(protocol(ICMP), source_nat_to(address, target), comment="a ping's identifier is anything"),
    )
    return Chain(f"own-{address}", None, rules)


def _source_port() -> Expression:
    return payload(TRANSPORT, 0, 2)


def _guests(address: IPv4Address, target: PortRange) -> Chain:
    rules = (
        *(rule(protocol(number), source_nat_to(address, target)) for number in (*_PORTED, ICMP)),
        rule(source_nat_to(address, None)),
    )
    return Chain(f"guests-{address}", None, rules)
