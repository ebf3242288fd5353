"""
The network of a lab: how the machines of a site, which are network namespaces, are made and wired.

Which machines a site has is data: :mod:`lab.sites`. Its Ethernet segments are bridges in a namespace of their own
(``switch``), or a cable where only two ports are plugged in. Namespaces have the lab's name in theirs, so that several
labs can run.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Literal

from lab.errors import LabError
from lab.process import Process
from lab.shell import ip_batch, namespace_path, run, sysctl

HOST, EDGE, MANAGER = "host", "edge", "manager"
"""Roles of machines, as natd and ``virt-ports install`` call them."""
UNDERLAY, UPLINK = "underlay", "uplink"
"""Segments: between hosts and edges, and towards the internet."""
INTERNET_ADDRESS = IPv4Address("192.0.2.2")
"""The server on the internet of every site."""
INTERNET, SWITCH = "internet", "switch"
"""Names of the machine that has this address, and of the namespace with the bridges."""


@dataclass(frozen=True, slots=True)
class Port:
    """
    One interface of a machine and the segment that it is plugged into.

    :param device: Its name inside the machine.
    """

    device: str
    segment: str
    address: IPv4Interface
    mtu: int = 1500


@dataclass(frozen=True, slots=True)
class Machine:
    """
    One network namespace with its interfaces.

    :param roles: What of virt-ports runs on it: :data:`HOST`, :data:`EDGE`, :data:`MANAGER`.
    :param gateway: Its default route, if it has one.
    :param routes: Further routes, in the words of ``ip route add``.
    :param settings: Kernel parameters beyond those that every machine gets.
    """

    name: str
    ports: tuple[Port, ...]
    roles: frozenset[str] = frozenset()
    gateway: IPv4Address | None = None
    routes: tuple[str, ...] = ()
    settings: Mapping[str, int] = field(default_factory=dict)

    def port(self, segment: str) -> Port | None:
        """:return: The interface that is plugged into a segment, if there is one."""
        return next((port for port in self.ports if port.segment == segment), None)

    def devices(self, segment: str) -> list[str]:
        """Return the names of its interfaces, one or none, that are plugged into a segment."""
        return [port.device for port in self.ports if port.segment == segment]

    def address(self, segment: str) -> IPv4Address:
        """:return: The machine's address on a segment. :raise LabError: When it is not plugged in there."""
        port = self.port(segment)
        if port is None:
            raise LabError(f"{self.name} is not plugged into {segment}; choose one of its segments")
        return port.address.ip

    @property
    def node_address(self) -> IPv4Address:
        """Its address for the other nodes: in the underlay, or that of its uplink if it has no other."""
        return self.address(UNDERLAY if self.port(UNDERLAY) else UPLINK)


@dataclass(frozen=True, slots=True)
class Site:
    """
    Everything that distinguishes one site from another.

    :param summary: What it consists of, in a few words.
    :param external_addresses: The pool: the addresses that its VMs share, in order and without a gap.
    :param guest_network: How libvirt forwards for guests: ``open`` (not its business) or ``nat`` (it masquerades).
    """

    name: str
    summary: str
    machines: tuple[Machine, ...]
    external_addresses: tuple[IPv4Address, ...]
    guest_network: Literal["open", "nat"] = "open"

    def machine(self, name: str) -> Machine:
        """:raise LabError: When there is no machine of this name."""
        for candidate in self.machines:
            if candidate.name == name:
                return candidate
        names = ", ".join(machine.name for machine in self.machines)
        raise LabError(f"there is no machine {name} in the lab; choose one of {names}")

    def with_role(self, role: str) -> tuple[str, ...]:
        """Return the names of the machines that have a role."""
        return tuple(machine.name for machine in self.machines if role in machine.roles)

    @property
    def hosts(self) -> tuple[str, ...]:
        """Names of the machines that run VMs."""
        return self.with_role(HOST)

    @property
    def edges(self) -> tuple[str, ...]:
        """Names of the machines that connect hosts to the internet."""
        return self.with_role(EDGE)

    @property
    def nodes(self) -> tuple[str, ...]:
        """Names of the machines on which natd runs."""
        return tuple(dict.fromkeys((*self.hosts, *self.edges)))

    @property
    def manager(self) -> Machine:
        """The machine on which cpmd runs."""
        return self.machine(*self.with_role(MANAGER))

    @property
    def sharers(self) -> tuple[Machine, ...]:
        """The machines that have an address of the pool themselves."""
        return tuple(
            machine
            for machine in self.machines
            if any(port.address.ip in self.external_addresses for port in machine.ports)
        )

    @property
    def pool(self) -> str:
        """Its external addresses in the words of ``virt-ports pool add``."""
        first, last = self.external_addresses[0], self.external_addresses[-1]
        return str(first) if first == last else f"{first}-{last}"

    @property
    def namespaces(self) -> tuple[str, ...]:
        """Names of all machines and of the switch."""
        return (SWITCH, *(machine.name for machine in self.machines))

    def plugged_into(self, segment: str) -> list[tuple[Machine, Port]]:
        """Return the ports that a segment connects, each with its machine."""
        return [(machine, port) for machine in self.machines if (port := machine.port(segment))]

    @property
    def segments(self) -> tuple[str, ...]:
        """Names of its Ethernet segments."""
        return tuple(dict.fromkeys(port.segment for machine in self.machines for port in machine.ports))


# The lab is IPv4 only: router solicitations would show up in the guests' packet counters.
NO_IPV6: dict[str, int] = (
    {"net.ipv6.conf.all.disable_ipv6": 1, "net.ipv6.conf.default.disable_ipv6": 1}
    if Path("/proc/sys/net/ipv6").exists()
    else {}
)
_EVERYWHERE = NO_IPV6 | {"net.ipv4.conf.all.rp_filter": 0, "net.ipv4.conf.default.rp_filter": 0}

_NAME = re.compile(r"[a-z0-9]{1,12}")
_GUEST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")


def check_lab_name(name: str) -> None:
    """:raise LabError: When a lab cannot have this name (no dash: it ends the lab's part of a namespace's name)."""
    if not _NAME.fullmatch(name):
        raise LabError(f"a lab cannot be called {name!r}; use 1 to 12 lower-case letters and digits")


def check_guest_name(name: str, site: Site) -> None:
    """:raise LabError: When a guest of this site cannot have this name."""
    if not _GUEST_NAME.fullmatch(name):
        raise LabError(f"a guest cannot be called {name!r}; use up to 48 letters, digits, dots, dashes, underscores")
    if name in site.namespaces:
        raise LabError(f"a guest cannot be called {name}: the lab has a machine of that name; choose another")


def namespace(lab: str, node: str) -> str:
    """Return the network namespace of a machine or a light guest."""
    return f"{lab}-{node}"


def existing_namespaces(namespaces: list[str]) -> list[str]:
    """Return the namespaces of the list that exist, in order."""
    return [name for name in namespaces if namespace_path(name).exists()]


def create(lab: str, site: Site) -> None:
    """
    Create all machines of a lab, with links, addresses and routes.

    :raise CommandFailed: When the kernel refuses a step; earlier steps stay: call :func:`delete_with_processes`.
    """
    ip_batch(f"netns add {namespace(lab, name)}" for name in site.namespaces)
    _plug_in(lab, site)
    for one in site.machines:
        inside = namespace(lab, one.name)
        # Before the interfaces are up: they copy "default" when created, and get IPv6 addresses when they are up.
        sysctl(inside, {**_EVERYWHERE, **one.settings})
        ip_batch(_configure(one), inside)


def _plug_in(lab: str, site: Site) -> None:
    switch = namespace(lab, SWITCH)
    sysctl(switch, _EVERYWHERE)
    ip_batch(["link set lo up"], switch)
    for segment in site.segments:
        ports = site.plugged_into(segment)
        if len(ports) == 2:
            _lay_cable(lab, *ports)
        else:
            _make_bridge(lab, segment, ports)


def _lay_cable(lab: str, near: tuple[Machine, Port], far: tuple[Machine, Port]) -> None:
    ends = [f"{port.device} mtu {port.mtu} netns {namespace(lab, one.name)}" for one, port in (near, far)]
    ip_batch([f"link add {ends[0]} type veth peer name {ends[1]}"])


def _make_bridge(lab: str, segment: str, ports: list[tuple[Machine, Port]]) -> None:
    switch = namespace(lab, SWITCH)
    ip_batch([f"link add {segment} type bridge"], switch)
    ip_batch(
        f"link add {port.device} mtu {port.mtu} netns {namespace(lab, one.name)} type veth "
        f"peer name {one.name}-{port.device[:2]} netns {switch}"
        for one, port in ports
    )
    ip_batch((f"link set {one.name}-{port.device[:2]} master {segment} up" for one, port in ports), switch)
    ip_batch([f"link set {segment} up"], switch)


def _configure(one: Machine) -> list[str]:
    lines = ["link set lo up"]
    for port in one.ports:
        lines += [f"addr add {port.address} dev {port.device}", f"link set {port.device} up"]
    if one.gateway:
        lines.append(f"route add default via {one.gateway}")
    return [*lines, *(f"route add {route}" for route in one.routes)]


def processes_in(name: str) -> list[int]:
    """Return the ids of the processes whose network namespace is the one of this name."""
    return [int(pid) for pid in run("ip", "netns", "pids", name).split()]


def delete_with_processes(namespaces: list[str]) -> None:
    """
    Remove those of the namespaces that exist, with their interfaces and the processes in them.

    A namespace exists as long as a process is in it, also after ``ip netns del``.

    :raise LabError: When a process in one of them cannot be ended.
    """
    found = existing_namespaces(namespaces)
    processes = [process for name in found for pid in processes_in(name) if (process := Process.find(pid))]
    for process in processes:
        process.signal(signal.SIGTERM)
    for process in processes:
        process.end(grace_s=2.0)
    ip_batch(f"netns del {name}" for name in found)
