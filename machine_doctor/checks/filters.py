"""Checks of other software's packet filters. Tested in ``tests/unit/machine_doctor/test_checks_of_packets.py``."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

from machine_doctor.checks.registry import check, for_hosts, for_nodes
from machine_doctor.facts import Facts, FilterFacts, ForwardChain, NetworkFacts, Unread, known
from machine_doctor.findings import Fact, NotApplicable, Result, Trouble, Verdict, problem, warning
from natctl.ruleset import forward_filters
from natctl.ruleset.forward_filters import LEGACY, ForwardFilter, Way


def bridges_with_vms(facts: Facts, network: NetworkFacts) -> list[str]:
    """Return the bridges whose VMs natd manages; with no VM yet, those of libvirt's networks."""
    masters = {each.master for each in network.interfaces.values() if each.kind == "tun" and each.master}
    libvirts = {name for name in network.interfaces if name.startswith("virbr")}
    found = facts.setup.bridges or masters or libvirts
    return sorted(name for name in found if name in network.interfaces)


def _is_named(chain: ForwardChain, interface: str) -> bool:
    return any(name == interface or (name.endswith("*") and interface.startswith(name[:-1])) for name in chain.named)


def _ways(facts: Facts, network: NetworkFacts, named: ForwardChain | None) -> list[Way]:
    """Return the ways of VMs' packets on which no rule of a chain names the interface inside."""

    def unnamed(names: Iterable[str]) -> list[str]:
        return [name for name in sorted(names) if named is None or not _is_named(named, name)]

    ways: list[Way] = []
    if facts.setup.is_host:
        ways += forward_filters.ways_of_host(unnamed(bridges_with_vms(facts, network)))
    if (edge := facts.setup.kernel.edge) is not None:
        ways += forward_filters.ways_of_edge(unnamed(edge.underlay), edge.uplinks)
    return ways


@check(
    "forward-filters",
    "no filter of Docker, firewalld, ufw or others drops what VMs send",
    matters="packets of VMs are dropped in silence: every chain at the forward hook must accept them",
    remedy="the lines of the finding, and the same in the other software's own configuration",
)
def forward_filters_(facts: Facts) -> Verdict:
    """Judge the chains of others at the forward hook that drop what they do not accept."""
    for_nodes(facts)
    filters, network = known(facts.filters), known(facts.network)
    shown = [f"{each.family} {each.table} {each.chain} ({each.by})" for each in filters.chains]
    legacy = None if isinstance(filters.legacy, Unread) else filters.legacy
    return Verdict(
        {"dropping chains": shown, "iptables-legacy": legacy, "connections begun by VMs": filters.begun},
        (
            *_dropping(facts, filters, network),
            *_legacy(facts, filters, network),
            *_rejecting(filters, bridges_with_vms(facts, network) if facts.setup.is_host else ()),
        ),
    )


def _rejecting(filters: FilterFacts, bridges: Collection[str]) -> Iterator[Trouble]:
    """Yield the rules that reject what forwards let in: libvirt has one for each network with forward mode nat."""
    for rule in filters.closing if filters.forwards else ():
        if rule.interface not in bridges:
            continue
        place = f"{rule.family} {rule.table} {rule.chain}"
        if (rule.family, rule.table) == ("ip", "filter"):
            line = f"iptables -I {rule.chain} -o {rule.interface} -m conntrack --ctstate DNAT -j ACCEPT"
        else:
            line = f'nft insert rule {place} oifname "{rule.interface}" ct status dnat accept'
        yield warning(
            f"a rule of {place} rejects what forwards let in to VMs on {rule.interface} (libvirt has it for a network "
            "with forward mode nat)",
            f"`{line}`, unless it is there already; or give the network forward mode open",
        )


def _dropping(facts: Facts, filters: FilterFacts, network: NetworkFacts) -> Iterator[Trouble]:
    for chain in filters.chains:
        ways = _ways(facts, network, chain)
        if not ways:
            continue
        place = ForwardFilter(chain.family, chain.table, chain.chain)
        what, _, remedy = forward_filters.sentence(place, ways, has_docker=filters.has_docker).partition("; ")
        what = f"chain {place} drops what it does not accept ({chain.by}), and no rule there names " + ", ".join(
            sorted({name for way in ways for name in way if name and not _is_named(chain, name)})
        )
        remedy = remedy.partition("use ")[2]
        if filters.begun:
            yield Trouble(Result.WARNING, f"{what}; VMs have begun connections, so it may let them through", remedy)
        elif chain.has_sets:
            yield Trouble(Result.WARNING, f"{what}; it may do so in a set", remedy)
        else:
            yield problem(what, remedy)


def _legacy(facts: Facts, filters: FilterFacts, network: NetworkFacts) -> Iterator[Trouble]:
    ways = _ways(facts, network, None)
    if isinstance(filters.legacy, Unread) or not filters.legacy or not ways or filters.begun:
        return
    what, _, remedy = forward_filters.sentence(
        ForwardFilter(LEGACY, "filter", "FORWARD"), ways, has_docker=False
    ).partition("; ")
    yield Trouble(Result.WARNING, what, remedy)


@check(
    "ruleset",
    "our tables are in the kernel while natd runs",
    matters="nothing of VMs is translated",
    remedy="`journalctl -u natd` says what the kernel refuses; `virt-ports node list` whether the node is approved",
)
def ruleset(facts: Facts) -> Verdict:
    """Judge whether natd has programmed the kernel."""
    for_nodes(facts)
    families = known(facts.families)
    if facts.process("natd") is None and not families:
        raise NotApplicable("natd does not run, and has never programmed this kernel")
    wanted = {"ip", "bridge"} if facts.setup.is_host else {"ip"}
    missing = sorted(wanted - families)
    absent = problem(
        f"there is no table virtports of family {' and '.join(missing)}",
        "`virt-ports node list` on the manager says whether this node is approved and in step; `journalctl -u natd` "
        "what the kernel refuses",
    )
    return Verdict({"families": sorted(families)}, (absent,) if missing else ())


@check(
    "br-netfilter",
    "bridged packets do not pass the filters of iptables as well",
    matters="a filter for forwarded packets drops what VMs on one bridge send to each other",
    remedy="`sysctl -w net.bridge.bridge-nf-call-iptables=0`, unless Docker or Kubernetes here needs it",
)
def br_netfilter(facts: Facts) -> Verdict:
    """Judge br_netfilter, together with filters that would drop."""
    for_hosts(facts)
    value = facts.sysctl.get("net.bridge.bridge-nf-call-iptables")
    shown: dict[str, Fact] = {"bridge-nf-call-iptables": value}
    if value != "1":
        return Verdict(shown)
    bridges = bridges_with_vms(facts, known(facts.network))
    return Verdict(shown, tuple(_also_bridged(known(facts.filters).chains, bridges)))


def _also_bridged(chains: Iterable[ForwardChain], bridges: Iterable[str]) -> Iterator[Trouble]:
    for chain in chains:
        for bridge in bridges:
            if not _is_named(chain, bridge):
                yield warning(
                    f"br_netfilter sends what VMs on {bridge} send to each other through chain {chain.family} "
                    f"{chain.table} {chain.chain}, which drops what it does not accept",
                    "`sysctl -w net.bridge.bridge-nf-call-iptables=0`, or let that chain accept what is bridged",
                )
