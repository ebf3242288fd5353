"""
The faults: one function a kind, a context manager. Entering injects it, leaving undoes what is not over by itself.

What natd has to mend (a flushed ruleset, its routes) is not undone here; what an operator has to (a link that is down,
an address that was taken away, the default route of the machine) is.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from ipaddress import IPv4Address

from chaos.observations import STRANGER
from chaos.plan import Fault
from chaos.site import Site, default_route, guest_name
from lab import net
from lab.daemons import CPMD, natd_of
from lab.errors import CommandFailed, LabError
from lab.guest import tap_name
from lab.node import BRIDGE
from lab.process import Process
from lab.shell import ip_batch
from lab.sites import CLUSTER

Injector = Callable[[Site, Fault], AbstractContextManager[None]]

INJECTORS: dict[str, Injector] = {}
"""By the name of the kind."""

_OUR_PROTOCOL = "74"
"""Routing protocol number of natd's routes and rules."""
_FOREIGN_TABLE = "5182"
_FOREIGN_PERIOD_S = 0.03
_RATE = 800
_ALL_PORTS = "1024-65535"


def inject(site: Site, fault: Fault) -> AbstractContextManager[None]:
    """Return the injection of a fault."""
    return INJECTORS[fault.kind.name](site, fault)


def _injects(*names: str) -> Callable[[Callable[[Site, Fault], Iterator[None]]], Injector]:
    def register(function: Callable[[Site, Fault], Iterator[None]]) -> Injector:
        injector = contextlib.contextmanager(function)
        INJECTORS.update(dict.fromkeys(names, injector))
        return injector

    return register


def _ip(site: Site, node: str, *lines: str) -> None:
    ip_batch(lines, site.lab.namespace(node))


@contextlib.contextmanager
def _changed(site: Site, node: str, command: str, *undo: str) -> Iterator[None]:
    """Carry out a command of ip on a node, and afterwards those that undo it."""
    _ip(site, node, command)
    try:
        yield
    finally:
        _ip(site, node, *undo)


@contextlib.contextmanager
def _stopped(process: Process) -> Iterator[None]:
    process.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.signal(signal.SIGCONT)


# Daemons


def _daemon(fault: Fault) -> str:
    return CPMD if fault.kind.name.endswith("cpmd") else natd_of(fault.target)


@_injects("kill-natd", "kill-cpmd")
def _kill(site: Site, fault: Fault) -> Iterator[None]:
    site.lab.daemons.end(_daemon(fault), signal.SIGKILL)
    yield
    site.lab.daemons.start(_daemon(fault))


@_injects("restart-natd", "restart-cpmd")
def _restart(site: Site, fault: Fault) -> Iterator[None]:
    site.lab.daemons.end(_daemon(fault))
    yield
    site.lab.daemons.start(_daemon(fault))


@_injects("freeze-natd", "freeze-cpmd")
def _freeze(site: Site, fault: Fault) -> Iterator[None]:
    with _stopped(site.lab.daemons.process(_daemon(fault))):
        yield


@_injects("kill-libvirtd", "restart-libvirtd")
def _end_libvirtd(site: Site, fault: Fault) -> Iterator[None]:
    host = site.lab.hosts[fault.target]
    host.end_libvirtd(signal.SIGKILL if fault.kind.name == "kill-libvirtd" else signal.SIGTERM)
    yield
    host.start_libvirtd()


@_injects("freeze-libvirtd")
def _freeze_libvirtd(site: Site, fault: Fault) -> Iterator[None]:
    with _stopped(site.lab.hosts[fault.target].libvirtd()):
        yield


# Rules


@_injects("flush-ruleset")
def _flush_ruleset(site: Site, fault: Fault) -> Iterator[None]:
    site.lab.run(fault.target, "nft", "flush", "ruleset")
    yield


@_injects("delete-tables")
def _delete_tables(site: Site, fault: Fault) -> Iterator[None]:
    families = ("ip", "bridge") if fault.target in CLUSTER.hosts else ("ip",)
    for family in families:
        site.lab.run(fault.target, "nft", "delete", "table", family, "virtports")
    yield


@_injects("flush-maps")
def _flush_maps(site: Site, fault: Fault) -> Iterator[None]:
    """Take the elements away that packets of VMs need, and leave the rules."""
    listed = site.lab.run(fault.target, "nft", "list", "maps").splitlines()
    names = [line.split()[1] for line in listed if line.split()[:1] == ["map"]]
    wanted = [name for name in names if name == "bindings" or name.startswith(("outbound", "inbound", "blocks"))]
    for name in random.Random(fault.seed).sample(wanted, min(2, len(wanted))):
        site.lab.run(fault.target, "nft", "flush", "map", "ip", "virtports", name)
    yield


@_injects("foreign-transactions")
def _foreign_transactions(site: Site, fault: Fault) -> Iterator[None]:
    stopping = threading.Event()
    script = (
        "add table ip foreign; add chain ip foreign some; add rule ip foreign some counter; delete table ip foreign"
    )

    def work() -> None:
        while not stopping.wait(_FOREIGN_PERIOD_S):
            site.lab.run(fault.target, "nft", script)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


@_injects("forwarding-off")
def _forwarding_off(site: Site, fault: Fault) -> Iterator[None]:
    site.lab.run(fault.target, "sysctl", "-qw", "net.ipv4.ip_forward=0")
    yield


# Links


@_injects("carrier-lost", "uplink-carrier-lost")
def _carrier_lost(site: Site, fault: Fault) -> Iterator[None]:
    port = f"{fault.target}-{'up' if fault.kind.name.startswith('uplink') else 'un'}"
    with _changed(site, net.SWITCH, f"link set {port} down", f"link set {port} up"):
        yield


@_injects("link-down", "uplink-down", "bridge-down")
def _link_down(site: Site, fault: Fault) -> Iterator[None]:
    device = {"link-down": "underlay", "uplink-down": "uplink", "bridge-down": BRIDGE}[fault.kind.name]
    with _changed(site, fault.target, f"link set {device} down", f"link set {device} up", default_route(fault.target)):
        yield


def _guest(site: Site, fault: Fault) -> tuple[str, str]:
    """Return the host and the interface of a guest."""
    life = site.life(int(fault.target))
    return life.host, tap_name(guest_name(life.number))


@_injects("tap-down")
def _tap_down(site: Site, fault: Fault) -> Iterator[None]:
    host, tap = _guest(site, fault)
    with _changed(site, host, f"link set {tap} down", f"link set {tap} up"):
        yield


@_injects("tap-unbridged")
def _tap_unbridged(site: Site, fault: Fault) -> Iterator[None]:
    host, tap = _guest(site, fault)
    with _changed(site, host, f"link set {tap} nomaster", f"link set {tap} master {BRIDGE}"):
        yield


@_injects("tap-routed")
def _tap_routed(site: Site, fault: Fault) -> Iterator[None]:
    """Have the host itself take what the guest sends to its gateway: with the bridge's address at the tap."""
    host, tap = _guest(site, fault)
    before, bridge = (_hardware_address(site, host, name) for name in (tap, BRIDGE))
    _ip(site, host, f"link set {tap} nomaster", f"link set {tap} address {bridge}")
    try:
        yield
    finally:
        _ip(site, host, f"link set {tap} address {before}", f"link set {tap} master {BRIDGE}")


def _hardware_address(site: Site, node: str, interface: str) -> str:
    (link,) = json.loads(site.lab.run(node, "ip", "-json", "link", "show", interface))
    return str(link["address"])


@_injects("tap-renamed")
def _tap_renamed(site: Site, fault: Fault) -> Iterator[None]:
    host, tap = _guest(site, fault)
    other = f"rn-{fault.number}"
    with _changed(site, host, f"link set {tap} name {other}", f"link set {other} name {tap}"):
        yield


# Routes, rules, addresses


@_injects("flush-routes")
def _flush_routes(site: Site, fault: Fault) -> Iterator[None]:
    site.lab.run(fault.target, "ip", "route", "flush", "table", "all", "proto", _OUR_PROTOCOL)
    yield


@_injects("delete-rules")
def _delete_rules(site: Site, fault: Fault) -> Iterator[None]:
    site.lab.run(fault.target, "ip", "rule", "flush", "protocol", _OUR_PROTOCOL)
    yield


@_injects("foreign-rule")
def _foreign_rule(site: Site, fault: Fault) -> Iterator[None]:
    """A VPN's rule before ours takes what VMs send."""
    rule = f"pref 50 iif {BRIDGE} table {_FOREIGN_TABLE}"
    _ip(
        site,
        fault.target,
        f"route add default via {CLUSTER.manager.node_address} table {_FOREIGN_TABLE}",
        f"rule add {rule}",
    )
    try:
        yield
    finally:
        _ip(site, fault.target, f"rule del {rule}", f"route flush table {_FOREIGN_TABLE}")


@_injects("default-moved")
def _default_moved(site: Site, fault: Fault) -> Iterator[None]:
    _ip(site, fault.target, "link add elsewhere type bridge", "addr add 10.99.0.2/24 dev elsewhere")
    _ip(site, fault.target, "link set elsewhere up", "route replace default via 10.99.0.1 dev elsewhere")
    try:
        yield
    finally:
        _ip(site, fault.target, "link del elsewhere", default_route(fault.target))


@_injects("address-lost")
def _address_lost(site: Site, fault: Fault) -> Iterator[None]:
    port = CLUSTER.machine(fault.target).ports[0]
    with _changed(
        site,
        fault.target,
        f"addr del {port.address} dev {port.device}",
        f"addr add {port.address} dev {port.device}",
        default_route(fault.target),
    ):
        yield


@_injects("address-added")
def _address_added(site: Site, fault: Fault) -> Iterator[None]:
    """An address of the machine's own, in the internal pool or not, beside the others."""
    address = random.Random(fault.seed).choice(("10.77.0.1/24", "100.100.0.1/24", "100.64.0.200/32"))
    with _changed(site, fault.target, f"addr add {address} dev lo", f"addr del {address} dev lo"):
        yield


# VMs


@_injects("vm-restart")
def _vm_restart(site: Site, fault: Fault) -> Iterator[None]:
    site.stop_guest(int(fault.target))
    site.start_guest(int(fault.target), random.Random(fault.seed).choice(CLUSTER.hosts))
    yield


@_injects("vm-relocate", "vm-resize")
def _vm_change(site: Site, fault: Fault) -> Iterator[None]:
    name = guest_name(site.life(int(fault.target)).number)
    size = str(random.Random(fault.seed).choice((256, 320, 512, 768)))
    words = ("relocate", name) if fault.kind.name == "vm-relocate" else ("resize", name, size)
    # The manager may be away, or say that it cannot be just now.
    with contextlib.suppress(CommandFailed):
        site.lab.operate(*words)
    yield


@_injects("burst")
def _burst(site: Site, fault: Fault) -> Iterator[None]:
    site.signal_talker(int(fault.target), signal.SIGUSR1)
    yield


# Hostile senders


def _internals(site: Site) -> str:
    """Return the internal addresses of the VMs, or a few that may be theirs when the manager is away."""
    try:
        return ",".join(
            str(IPv4Address(site.facts("show", vm["uuid"])["internal_address"])) for vm in site.facts("list")
        )
    except LabError:
        return "100.64.0.0/27"


def _hostile(site: Site, fault: Fault, node: str, number: int, sources: str, **how: object) -> Iterator[None]:
    to = how.get("to", net.INTERNET_ADDRESS)
    ports, sports = how.get("ports", 9000 + number), how.get("sports", _ALL_PORTS)
    words = (number, fault.seed, fault.lasts, how.get("rate", _RATE), to, sources, ports, sports)
    with site.program(node, "hostile.py", *words):
        yield


@_injects("forge-neighbours", "forge-internals", "forge-underlay", "flood")
def _hostile_guest(site: Site, fault: Fault) -> Iterator[None]:
    life = site.life(int(fault.target))
    others = [other for other in site.living() if other.host == life.host and other.number != life.number]
    addresses = [site.lab.guest(guest_name(other.number)).address for other in others]
    victims = ",".join(str(9000 + other.number) for other in others)
    sources = {
        "forge-neighbours": lambda: ",".join(addresses),
        "forge-internals": lambda: _internals(site),
        "forge-underlay": lambda: f"172.30.0.0/27,198.51.100.0/27,203.0.113.0/30,{CLUSTER.manager.node_address}",
        "flood": lambda: site.lab.guest(guest_name(life.number)).address,
    }[fault.kind.name]()
    how: dict[str, object] = {"ports": f"{victims},{9000 + life.number}", "sports": f"5000-5004,{_ALL_PORTS}"}
    if fault.kind.name == "flood":
        how = {"rate": 2 * _RATE}
    yield from _hostile(site, fault, guest_name(life.number), life.number, sources or "10.10.0.99", **how)


@_injects("scan")
def _scan(site: Site, fault: Fault) -> Iterator[None]:
    """The internet tries every port, also with sources that it cannot have."""
    sources = "192.0.2.64/26,198.18.0.0/15,10.10.0.0/24,100.64.0.0/27"
    how = {"to": "203.0.113.1,203.0.113.2", "ports": "1-65535", "rate": 3 * _RATE}
    yield from _hostile(site, fault, "internet", STRANGER, sources, **how)


@_injects("forge-from-underlay")
def _forge_from_underlay(site: Site, fault: Fault) -> Iterator[None]:
    """A machine beside the hosts claims VMs' internal addresses, and external ones, at an edge."""
    edge = CLUSTER.machine(random.Random(fault.seed).choice(CLUSTER.edges)).address("underlay")
    route = f"{net.INTERNET_ADDRESS}/32"
    _ip(site, "manager", f"route add {route} via {edge}")
    sources = f"{_internals(site)},203.0.113.0/30"
    try:
        yield from _hostile(site, fault, "manager", STRANGER, sources, sports="1024-8191")
    finally:
        _ip(site, "manager", f"route del {route}")
