"""Checks of routes, rules and marks. Tested in ``tests/unit/machine_doctor/test_checks_of_packets.py``."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Network
from typing import Final

from machine_doctor.checks.registry import check, for_hosts, for_nodes
from machine_doctor.facts import Facts, NetworkFacts, PolicyRule, known
from machine_doctor.findings import CannotTell, NotApplicable, Trouble, Verdict, problem, warning
from natctl.model.entries import HostSettings, Path
from natctl.ruleset import routing, way_check
from natctl.ruleset.marks import Marks
from natctl.ruleset.way_check import Bridge

_ANY_POOL: Final = IPv4Network("100.64.0.0/10")
"""For a question in which the pool does not matter."""


@check(
    "default-route",
    "there is a way to the internet, by an uplink",
    matters="packets of VMs go nowhere, and loose reverse path filters drop what comes from the internet",
    remedy="`ip route add default via GATEWAY dev UPLINK`, in the configuration of the network too",
)
def default_route(facts: Facts) -> Verdict:
    """Judge the way of the machine's own packets to the internet."""
    for_nodes(facts)
    network = known(facts.network)
    answer, edge = network.to_internet, facts.setup.kernel.edge
    uplinks_of_host = facts.setup.kernel.host.uplinks if facts.setup.kernel.host is not None else frozenset[str]()
    if answer.error:
        what = "there is no route to the internet (`ip route get 198.41.0.4`)"
        remedy = "add a default route: `ip route add default via GATEWAY`, and in the network's configuration"
        if facts.setup.is_edge:
            return Verdict({}, (problem(what, remedy),))
        filtered = [name for name in sorted(uplinks_of_host) if _filters(facts, name)]
        drops = warning(f"{what}: the reverse path filter of {', '.join(filtered)} drops what edges send back", remedy)
        return Verdict({}, (drops,) if filtered else ())
    name = network.name_of(answer.interface)
    shown = {"interface": name, "gateway": str(answer.gateway) if answer.gateway else None}
    if edge is not None and name not in edge.uplinks:
        uplinks = ", ".join(sorted(edge.uplinks))
        other = problem(
            f"packets to the internet leave by {name}, which is not in edge.uplinks ({uplinks})",
            f"add {name} to uplinks in natd.toml and restart natd, or see `ip route` for what sends them there",
        )
        return Verdict(shown, (other,))
    return Verdict(shown)


def _filters(facts: Facts, name: str) -> bool:
    keys = (f"net.ipv4.conf.{each}.rp_filter" for each in ("all", name))
    return any(facts.sysctl.get(key, "0") != "0" for key in keys)


@check(
    "ways",
    "the kernel would route a VM's packet to an edge, and the answer back",
    matters="packets of VMs leave by another way (a VPN's rule, a moved route) and are lost",
    remedy="as the finding says; `ip rule`, `ip route show table all` and rp_filter decide",
)
def ways(facts: Facts) -> Verdict:
    """Judge what the kernel answers for each bridge."""
    for_hosts(facts)
    network, host = known(facts.network), facts.setup.kernel.host
    assert host is not None
    if not network.ways:
        raise NotApplicable("no bridge has an address yet")
    way = network.routing.way
    if way is None and not facts.setup.is_edge:
        raise NotApplicable("natd has not programmed a way to an edge yet")
    path = Path(facts.internal_pool or _ANY_POOL, way[1] if way is not None else frozenset())
    return Verdict(
        {each.bridge: _direction(network, each.out.interface) for each in network.ways},
        tuple(_wrong_ways(network, host, path)),
    )


def _direction(network: NetworkFacts, interface: int) -> str:
    return f"leaves by {network.name_of(interface)}" if interface else "goes nowhere"


def _wrong_ways(network: NetworkFacts, host: HostSettings, path: Path) -> Iterator[Trouble]:
    names = {each.number: each.name for each in network.interfaces.values()}
    for each in network.ways:
        bridge = Bridge(each.bridge, each.number, each.guest)
        wrong = way_check.outward_problem(each.out, bridge, host, path, names)
        if not wrong and each.back is not None:
            wrong = way_check.inward_problem(each.back, bridge, names, each.out.interface)
        if wrong:
            what, _, remedy = wrong.partition("; ")
            yield problem(f"packets of VMs on {each.bridge} {what}", remedy)


@check(
    "rules",
    "our routing rule and table are ours alone",
    matters="packets of VMs take the routes of others",
    remedy="give the other software another table or priority, or change host.route_table and host.rule_priority",
)
def rules(facts: Facts) -> Verdict:
    """Judge the routing rules."""
    for_hosts(facts)
    network, host = known(facts.network), facts.setup.kernel.host
    assert host is not None
    ours = [rule for rule in network.rules if rule.is_ours]
    troubles = [
        warning(
            f"a rule of other software has our priority {rule.priority}: which of both comes first is not defined",
            "give it another priority, or set host.rule_priority in natd.toml",
        )
        for rule in network.rules
        if not rule.is_ours and rule.priority == host.rule_priority
    ]
    troubles += [
        problem(
            f"the rule with priority {rule.priority} sends all packets to table {rule.table}, before our rule "
            f"({host.rule_priority})",
            f"give it a priority above {host.rule_priority}, or set host.rule_priority in natd.toml below "
            f"{rule.priority}, and restart natd",
        )
        for rule in network.rules
        if ours and _takes_all(rule) and 0 < rule.priority < host.rule_priority
    ]
    if network.foreign_in_table:
        troubles.append(
            problem(
                f"table {host.route_table}, which is ours, has {network.foreign_in_table} routes of other software",
                "give it another table, or set host.route_table in natd.toml, and restart natd",
            )
        )
    if network.routing.way is not None and network.routing.rule is None:
        troubles.append(
            problem(
                "the rule that sends packets of VMs to the edges is missing",
                "start natd, which adds it; see the check networkd for what may have removed it",
            )
        )
    return Verdict({"rules": len(network.rules), "ours": len(ours)}, tuple(troubles))


def _takes_all(rule: PolicyRule) -> bool:
    is_lookup_in_main = rule.table == routing.MAIN
    return (
        not rule.is_selective and not rule.mask and not rule.is_inverted and rule.table != 255 and not is_lookup_in_main
    )


@check(
    "marks",
    "no routing rule of other software matches marks of VMs",
    matters="packets of some VMs take the routes of a VPN or a mesh network",
    remedy="set host.mark_mask in natd.toml to bits that nothing else uses, and restart natd",
)
def marks(facts: Facts) -> Verdict:
    """Judge rules with a mark, before ours."""
    for_hosts(facts)
    network, host = known(facts.network), facts.setup.kernel.host
    assert host is not None
    try:
        mine = Marks.of_mask(host.mark_mask)
    except ValueError as error:
        raise CannotTell(str(error)) from None
    troubles = [
        problem(
            f"the rule with priority {rule.priority} (fwmark {rule.mark:#x}/{rule.mask:#x} lookup {rule.table}) "
            f"matches the marks of some VMs, which use the bits {host.mark_mask:#x}",
            "set host.mark_mask in natd.toml to other bits, at least 4 side by side, and restart natd",
        )
        for rule in network.rules
        if not rule.is_ours and rule.priority < host.rule_priority and may_match(rule, mine)
    ]
    return Verdict({"mask": f"{host.mark_mask:#x}"}, tuple(troubles))


def may_match(rule: PolicyRule, mine: Marks) -> bool:
    """Say whether a rule matches the mark of any VM, with no other bits set."""
    if not rule.mask or rule.is_inverted:
        return False
    wants = rule.mark & rule.mask
    if not rule.mask & mine.mask or wants & ~mine.mask:
        # No bit of ours, or bits that only others set.
        return False
    if rule.mask & mine.flag and not wants & mine.flag:
        return False
    index = (wants & mine.mask & ~mine.flag) >> mine.shift
    return index <= mine.highest_index


@check(
    "networkd",
    "systemd-networkd leaves routes and rules of others alone",
    matters="it removes natd's rule and routes whenever it restarts; natd mends it a moment later",
    remedy="ManageForeignRoutingPolicyRules=no and ManageForeignRoutes=no in /etc/systemd/networkd.conf",
)
def networkd(facts: Facts) -> Verdict:
    """Judge networkd.conf."""
    for_nodes(facts)
    daemon = facts.networkd
    if not daemon.runs:
        raise NotApplicable("systemd-networkd does not run")
    keys = {"ManageForeignRoutingPolicyRules": daemon.keeps_rules, "ManageForeignRoutes": daemon.keeps_routes}
    lines = [f"{key}=no" for key, is_kept in keys.items() if not is_kept]
    removes = warning(
        "systemd-networkd removes routes and rules that it has not made, ours among them, when it restarts or an "
        "interface changes",
        f"write [Network] and {' and '.join(lines)} into /etc/systemd/networkd.conf.d/virt-ports.conf, then "
        "`systemctl restart systemd-networkd`",
    )
    return Verdict(dict(keys), (removes,) if lines else ())
