"""Checks of addresses that two may use. Tested in ``tests/unit/machine_doctor/test_checks_of_services.py``."""

from __future__ import annotations

from cpm.protocol import overlaps
from machine_doctor.checks.registry import check
from machine_doctor.facts import Facts, ManagerFacts, known
from machine_doctor.findings import NotApplicable, Trouble, Verdict, problem, warning
from natctl.model.own_ports import SocketKind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ipaddress import IPv4Address, IPv4Network


@check(
    "internal-pool",
    "nothing here uses addresses of the internal pool (100.64.0.0/10 by default)",
    matters="VMs whose internal address is also somebody else's cannot be reached (VPNs such as Tailscale, providers)",
    remedy="another network for [pool] internal in cpmd.toml, before VMs have ports",
)
def internal_pool(facts: Facts) -> Verdict:
    """Judge the machine's networks against the internal pool."""
    network = known(facts.network)
    pool = facts.internal_pool or overlaps.SHARED
    uses = overlaps.overlapping(pool, network.uses)
    used = warning(
        f"this machine uses addresses of the internal pool {pool}: {overlaps.words(uses)}",
        overlaps.remedy(pool, uses),
    )
    return Verdict({"pool": str(pool)}, (used,) if uses else ())


@check(
    "pool-address",
    "public addresses of the pool end here only where natd shares their ports",
    matters="packets for VMs end in the machine instead of being translated, or a service gets what is meant for a VM",
    remedy="remove the address here (`ip addr del`), or let this machine be an edge with `keep_apart`",
)
def pool_address(facts: Facts) -> Verdict:
    """Judge addresses of the machine that are in the pool."""
    network, pool = known(facts.network), known(facts.external)
    if not pool:
        raise NotApplicable("the pool has no address yet: `virt-ports pool add ADDRESS`")
    own = {address: name for address, name in network.addresses.items() if address in pool}
    troubles: list[Trouble] = []
    if not facts.setup.is_edge:
        troubles += [
            problem(
                f"{name} has {address}, an address of the pool, and this machine is no edge",
                f"`ip addr del {address}/32 dev {name}`, in the network's configuration too",
            )
            for address, name in own.items()
        ]
    elif own and facts.setup.kernel.edge is not None and not facts.setup.kernel.edge.keep_apart:
        troubles.append(
            warning(
                f"{', '.join(map(str, own))} is this machine's and in the pool, and edge.keep_apart is false: the "
                "machine's other guests may get ports of VMs",
                "set keep_apart = true in natd.toml unless other software translates these guests to another address",
            )
        )
    listening = sorted(
        {
            each.port
            for each in (known(facts.sockets) if own else ())
            if each.kind is SocketKind.LISTENING and (each.address is None or each.address in own)
        }
    )
    return Verdict(
        {
            "own": [str(each) for each in own],
            "services on them": [str(port) for port in listening],
            "pool": [str(each) for each in sorted(pool)],
        },
        tuple(troubles),
    )


@check(
    "pool-delivery",
    "addresses of the pool that lie in an uplink's own network are delivered to this edge",
    matters="the router outside asks for them by ARP, nobody answers, and VMs with ports there get no answers",
    remedy="assign the address to the uplink (`ip addr add ADDRESS/32 dev UPLINK`), or take it out of the pool",
)
def pool_delivery(facts: Facts) -> Verdict:
    """Judge addresses of the pool that the router outside takes for its neighbours. Others are routed, or are not."""
    edge = facts.setup.kernel.edge
    if not facts.setup.is_edge or edge is None:
        raise NotApplicable("this machine is no edge")
    network, pool = known(facts.network), known(facts.external)
    gateway = network.to_internet.gateway
    assigned = network.addresses.keys() | _of_other_edges(facts)
    troubles: list[Trouble] = []
    silent: dict[tuple[str, IPv4Network], list[IPv4Address]] = {}
    for name in sorted(edge.uplinks & network.interfaces.keys()):
        for one in network.interfaces[name].addresses:
            for address in sorted(pool - assigned):
                if address not in one.network:
                    continue
                if address == gateway or address in _ends(one.network):
                    use = "the router's" if address == gateway else f"no address of a machine in {one.network}"
                    troubles.append(
                        problem(f"{address} is in the pool and {use}", f"`virt-ports pool remove {address}`")
                    )
                else:
                    silent.setdefault((name, one.network), []).append(address)
    for (name, around), addresses in silent.items():
        first, more = addresses[0], len(addresses) - 1
        others = f" and {more} more of the pool" if more else ""
        troubles.append(
            warning(
                f"{first}{others} {'are' if more else 'is'} in the network of {name}, {around}, and on no interface: "
                "unless the router has a route to an edge for that, it asks by ARP and nobody answers",
                f"`ip addr add {first}/32 dev {name}`, in the network's configuration too; or, if it was mistyped, "
                f"`virt-ports pool remove {first}`",
            )
        )
    return Verdict({"nobody answers for": sum(map(len, silent.values()))}, tuple(troubles))


def _of_other_edges(facts: Facts) -> frozenset[IPv4Address]:
    """Return the addresses of which the manager knows that an edge has them itself."""
    pool = facts.manager.pool if isinstance(facts.manager, ManagerFacts) else ()
    return frozenset(each.address for each in pool if each.ports_own)


def _ends(network: IPv4Network) -> tuple[IPv4Address, ...]:
    return (network.network_address, network.broadcast_address) if network.prefixlen < 31 else ()
