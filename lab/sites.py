"""
The sites that a lab can be, as values. Data only.

Addresses are from documentation and private ranges and are the same in every lab.
"""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface

from lab.net import EDGE, HOST, INTERNET, INTERNET_ADDRESS, MANAGER, UNDERLAY, UPLINK, Machine, Port, Site

_INTERNET_GATEWAY = IPv4Address("192.0.2.1")
_INTERNET_MTU = 1300
_FORWARD = {"net.ipv4.ip_forward": 1}
# As Debian sets it by default (systemd's sysctl.d/50-default.conf); libvirt turns forwarding on.
_AS_IT_COMES = {"net.ipv4.conf.default.rp_filter": 2}


def _underlay(last: int) -> Port:
    return Port("underlay", UNDERLAY, IPv4Interface(f"172.30.0.{last}/24"))


def _uplink(last: int) -> Port:
    return Port("uplink", UPLINK, IPv4Interface(f"198.51.100.{last}/24"))


def _internet(device: str, address: IPv4Address) -> Port:
    return Port(device, INTERNET, IPv4Interface(f"{address}/24"), mtu=_INTERNET_MTU)


_EXTERNAL = tuple(IPv4Address("203.0.113.0") + offset for offset in range(1, 5))
_ROUTER = _uplink(1)
_EDGES = tuple(
    Machine(name, (_underlay(underlay), uplink), frozenset({EDGE}), gateway=_ROUTER.address.ip, settings=_FORWARD)
    for name, underlay, uplink in (("edge1", 21, _uplink(11)), ("edge2", 22, _uplink(12)))
)
_EDGE_HOPS = " ".join(f"nexthop via {edge.address(UPLINK)} dev uplink" for edge in _EDGES)

CLUSTER = Site(
    "cluster",
    "2 hosts with libvirtd, 2 edges, cpmd, 4 natds, 4 addresses",
    (
        Machine("manager", (_underlay(2),), frozenset({MANAGER})),
        Machine("host1", (_underlay(11),), frozenset({HOST}), settings=_FORWARD),
        Machine("host2", (_underlay(12),), frozenset({HOST}), settings=_FORWARD),
        *_EDGES,
        Machine(
            "router",
            (_ROUTER, _internet("internet", _INTERNET_GATEWAY)),
            routes=tuple(f"{address}/32 {_EDGE_HOPS}" for address in _EXTERNAL),
            settings=_FORWARD
            | {
                # By addresses alone: all fragments of one datagram take the same edge, which reassembles them.
                "net.ipv4.fib_multipath_hash_policy": 0,
                # An edge that no longer answers ARP gets no packets.
                "net.ipv4.fib_multipath_use_neigh": 1,
            },
        ),
        Machine(INTERNET, (_internet("uplink", INTERNET_ADDRESS),), gateway=_INTERNET_GATEWAY),
    ),
    _EXTERNAL,
)
"""
Hosts, edges and the manager are machines of their own, and the pool's addresses are routed to the edges::

    host1 .11 ──┐                  ┌── edge1 .21 ── .11 ──┐
    host2 .12 ──┼── 172.30.0.0/24 ─┤                      ├── 198.51.100.0/24 ── .1 router ── 192.0.2.0/24 ── .2
    manager .2 ─┘     underlay     └── edge2 .22 ── .12 ──┘       uplink              1,300 bytes        internet

Both directions of a connection may pass through different edges.
"""

_OWN = Port("uplink", UPLINK, IPv4Interface("203.0.113.2/24"))
_PROVIDER = Port("uplink", UPLINK, IPv4Interface("203.0.113.1/24"))

SINGLE = Site(
    "single",
    "1 server with libvirtd, cpmd, natd as host and edge, and 1 address, its own",
    (
        Machine(
            "server", (_OWN,), frozenset({HOST, EDGE, MANAGER}), gateway=_PROVIDER.address.ip, settings=_AS_IT_COMES
        ),
        Machine("router", (_PROVIDER, _internet("internet", _INTERNET_GATEWAY)), settings=_FORWARD),
        Machine(INTERNET, (_internet("uplink", INTERNET_ADDRESS),), gateway=_INTERNET_GATEWAY),
    ),
    (_OWN.address.ip,),
    guest_network="nat",
)
"""
One server with one public address, which is its own and the whole pool::

    server .2 ── 203.0.113.0/24 ── .1 router ── 192.0.2.0/24 ── .2 internet
                     uplink             1,300 bytes

It is configured as by ``virt-ports install --role host,edge,manager``, and its guests are in a network like libvirt's
own ``default``.
"""

SITES = {site.name: site for site in (CLUSTER, SINGLE)}
