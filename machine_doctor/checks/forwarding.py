"""Checks of settings on the way of packets. Tested in ``tests/unit/machine_doctor/test_checks_of_packets.py``."""

from __future__ import annotations

from machine_doctor.checks.registry import check, for_nodes
from machine_doctor.facts import Facts, known
from machine_doctor.findings import CannotTell, Trouble, Verdict, problem, warning
from natctl.ruleset import routing

_FORWARD = "net.ipv4.ip_forward"
_HARDENED = {"net.ipv4.ip_forward": "0", "net.ipv4.conf.all.forwarding": "0"}


def _value(facts: Facts, key: str) -> int:
    try:
        return int(facts.sysctl[key])
    except (KeyError, ValueError):
        raise CannotTell(f"cannot read {key}") from None


def _on_the_way(facts: Facts) -> list[str]:
    """Return the interfaces through which packets of VMs pass, of those that exist."""
    network = known(facts.network)
    names = set(routing.asymmetric_interfaces(facts.setup.kernel))
    if facts.setup.is_host:
        names |= {way.bridge for way in network.ways}
    return sorted(names & network.interfaces.keys())


@check(
    "forwarding",
    "the kernel forwards packets between interfaces",
    matters="no packet of a VM leaves this machine",
    remedy="`sysctl -w net.ipv4.ip_forward=1`, and remove what sets it to 0 from /etc/sysctl.d",
)
def forwarding(facts: Facts) -> Verdict:
    """Judge forwarding, everywhere and for each interface."""
    for_nodes(facts)
    everywhere = _value(facts, _FORWARD)
    off = [name for name in _on_the_way(facts) if facts.sysctl.get(f"net.ipv4.conf.{name}.forwarding") == "0"]
    if not everywhere:
        return Verdict({_FORWARD: everywhere}, (_not_forwarding(facts),))
    troubles = (
        problem(f"forwarding is off for {name} alone", f"sysctl -w net.ipv4.conf.{name}.forwarding=1") for name in off
    )
    return Verdict({_FORWARD: everywhere, "off for": off}, tuple(troubles))


def _not_forwarding(facts: Facts) -> Trouble:
    if facts.process("natd") is not None:
        return problem(
            f"{_FORWARD} is 0, although natd runs and sets it: something sets it back",
            f"`sysctl -w {_FORWARD}=1`; `grep -rs ip_forward /etc/sysctl.conf /etc/sysctl.d`",
        )
    return warning(f"{_FORWARD} is 0; natd sets it to 1 when it starts", f"start natd, or `sysctl -w {_FORWARD}=1`")


@check(
    "reverse-path",
    "reverse path filters let packets of VMs, and the answers, through",
    matters="the kernel drops packets in silence where answers come in by another way than packets leave",
    remedy="`sysctl -w net.ipv4.conf.INTERFACE.rp_filter=2` (loose), and remove what sets it to 1",
)
def reverse_path(facts: Facts) -> Verdict:
    """Judge rp_filter and src_valid_mark."""
    for_nodes(facts)
    everywhere = _value(facts, "net.ipv4.conf.all.rp_filter")
    by_mark = facts.sysctl.get("net.ipv4.conf.all.src_valid_mark") == "1"
    asymmetric = set(routing.asymmetric_interfaces(facts.setup.kernel))
    found: dict[str, int] = {}
    troubles = []
    for name in _on_the_way(facts):
        key = f"net.ipv4.conf.{name}.rp_filter"
        found[name] = max(everywhere, _value(facts, key))
        if found[name] == 1 and name in asymmetric:
            troubles.append(_strict(facts, name, key))
        elif found[name] == 1 and by_mark:
            troubles.append(
                problem(
                    f"the filter of {name} is strict and considers the mark of VMs' packets (src_valid_mark): it looks "
                    "for the way back in the table of the way to the edges, and drops",
                    f"`sysctl -w {key}=2`, or `sysctl -w net.ipv4.conf.all.src_valid_mark=0`",
                )
            )
    shown = [f"{name}: {value}" for name, value in found.items()]
    return Verdict({"all": everywhere, "in effect": shown, "src_valid_mark": by_mark}, tuple(troubles))


def _strict(facts: Facts, name: str, key: str) -> Trouble:
    what = f"the reverse path filter of {name} is strict (1)"
    if facts.process("natd") is not None:
        return problem(
            f"{what}, although natd runs and loosens it: something sets it back",
            f"`sysctl -w {key}=2`; `grep -rs rp_filter /etc/sysctl.conf /etc/sysctl.d`",
        )
    return warning(f"{what}; natd loosens it when it starts", f"start natd, or `sysctl -w {key}=2`")


@check(
    "sysctl-files",
    "no file in sysctl.d undoes what natd sets",
    matters="the next `sysctl --system`, or a boot in another order, stops packets of VMs until natd mends it",
    remedy="remove the line, or set the value that is named",
)
def sysctl_files(facts: Facts) -> Verdict:
    """Judge the lines that are in force at the next boot."""
    for_nodes(facts)
    strict = {f"net.ipv4.conf.{name}.rp_filter" for name in routing.asymmetric_interfaces(facts.setup.kernel)}
    strict |= {"net.ipv4.conf.all.rp_filter"}
    redirects = {
        f"net.ipv4.{switch.path.replace('/', '.')}": switch.value
        for switch in routing.switches(facts.setup.kernel)
        if switch.path != "ip_forward"
    }
    troubles = []
    for line in facts.sysctl_files:
        wanted = None
        if line.value == _HARDENED.get(line.key):
            wanted = "1"
        elif line.key in strict and line.value == "1":
            wanted = "2"
        elif line.key in redirects and line.value != redirects[line.key]:
            wanted = redirects[line.key]
        if wanted is not None:
            troubles.append(
                warning(
                    f"{line.file} sets {line.key} = {line.value}",
                    f"write {line.key} = {wanted} there, or remove the line",
                )
            )
    return Verdict({"lines": len(facts.sysctl_files)}, tuple(troubles))
