"""
The network of a lab: its machines, which are network namespaces, their addresses, and the links between them.

::

    host1 .11 ──┐                  ┌── edge1 .21 ── .11 ──┐
    host2 .12 ──┼── 172.30.0.0/24 ─┤                      ├── 198.51.100.0/24 ── .1 router ── 192.0.2.0/24 ── .2
    manager .2 ─┘     underlay     └── edge2 .22 ── .12 ──┘       uplink              1,300 bytes        internet

Both Ethernet segments are bridges in a namespace of their own (``switch``). Addresses are from documentation and
private ranges and are the same in every lab; namespaces have the lab's name in theirs, so that several labs can run.
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path

from lab.errors import LabError
from lab.process import Process
from lab.shell import ip_batch, namespace_path, run, sysctl

HOSTS = ("host1", "host2")
EDGES = ("edge1", "edge2")
MANAGER_ADDRESS = IPv4Address("172.30.0.2")
ROUTER_UPLINK = IPv4Address("198.51.100.1")
INTERNET_ADDRESS = IPv4Address("192.0.2.2")
INTERNET_MTU = 1300
EXTERNAL_ADDRESSES = tuple(IPv4Address("203.0.113.0") + offset for offset in range(1, 5))


@dataclass(frozen=True, slots=True)
class Port:
    """
    One interface of a machine and the segment (a bridge of the switch) that it is plugged into.

    :param device: Its name inside the machine.
    """

    device: str
    segment: str
    address: IPv4Interface


@dataclass(frozen=True, slots=True)
class Machine:
    """
    One network namespace with its interfaces.

    :param gateway: Its default route, if it has one.
    :param settings: Kernel parameters beyond those that every machine gets.
    """

    name: str
    ports: tuple[Port, ...] = ()
    gateway: IPv4Address | None = None
    settings: dict[str, int] = field(default_factory=dict)

    def address(self, segment: str) -> IPv4Address:
        """:return: The machine's address on a segment. :raise StopIteration: When it is not plugged in there."""
        return next(port.address.ip for port in self.ports if port.segment == segment)


def _underlay(last: int) -> Port:
    return Port("underlay", "underlay", IPv4Interface(f"172.30.0.{last}/24"))


def _uplink(last: int) -> Port:
    return Port("uplink", "uplink", IPv4Interface(f"198.51.100.{last}/24"))


_FORWARD = {"net.ipv4.ip_forward": 1}
# The lab is IPv4 only: router solicitations would show up in the guests' packet counters.
NO_IPV6: dict[str, int] = (
    {"net.ipv6.conf.all.disable_ipv6": 1, "net.ipv6.conf.default.disable_ipv6": 1}
    if Path("/proc/sys/net/ipv6").exists()
    else {}
)
_EVERYWHERE = NO_IPV6 | {
    # Both directions of a connection may pass through different edges.
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
}
_ROUTER = _FORWARD | {
    # By addresses alone: all fragments of one datagram take the same edge, which reassembles them.
    "net.ipv4.fib_multipath_hash_policy": 0,
    # An edge that no longer answers ARP gets no packets.
    "net.ipv4.fib_multipath_use_neigh": 1,
}

MACHINES: tuple[Machine, ...] = (
    Machine("manager", (Port("underlay", "underlay", IPv4Interface(f"{MANAGER_ADDRESS}/24")),)),
    Machine("host1", (_underlay(11),), settings=_FORWARD),
    Machine("host2", (_underlay(12),), settings=_FORWARD),
    Machine("edge1", (_underlay(21), _uplink(11)), gateway=ROUTER_UPLINK, settings=_FORWARD),
    Machine("edge2", (_underlay(22), _uplink(12)), gateway=ROUTER_UPLINK, settings=_FORWARD),
    Machine("router", (_uplink(1),), settings=_ROUTER),
    Machine("internet"),
)
SWITCH = "switch"
SEGMENTS = ("underlay", "uplink")
NODES = (SWITCH, *(machine.name for machine in MACHINES))

_NAME = re.compile(r"[a-z0-9]{1,12}")
_GUEST_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,47}")


def machine(name: str) -> Machine:
    """:raise LabError: When there is no machine of this name."""
    for candidate in MACHINES:
        if candidate.name == name:
            return candidate
    raise LabError(f"there is no machine {name} in the lab; choose one of {', '.join(m.name for m in MACHINES)}")


def check_lab_name(name: str) -> None:
    """:raise LabError: When a lab cannot have this name (no dash: it ends the lab's part of a namespace's name)."""
    if not _NAME.fullmatch(name):
        raise LabError(f"a lab cannot be called {name!r}; use 1 to 12 lower-case letters and digits")


def check_guest_name(name: str) -> None:
    """:raise LabError: When a guest cannot have this name."""
    if not _GUEST_NAME.fullmatch(name):
        raise LabError(f"a guest cannot be called {name!r}; use up to 48 letters, digits, dots, dashes, underscores")
    if name in NODES:
        raise LabError(f"a guest cannot be called {name}: the lab has a machine of that name; choose another")


def namespace(lab: str, node: str) -> str:
    """Return the network namespace of a machine or a light guest."""
    return f"{lab}-{node}"


def existing_namespaces(namespaces: list[str]) -> list[str]:
    """Return the namespaces of the list that exist, in order."""
    return [name for name in namespaces if namespace_path(name).exists()]


def create(lab: str) -> None:
    """
    Create all machines of a lab, with links, addresses and routes.

    :raise CommandFailed: When the kernel refuses a step; earlier steps stay: call :func:`delete_with_processes`.
    """
    ip_batch(f"netns add {namespace(lab, node)}" for node in NODES)
    _plug_in(lab)
    for one in MACHINES:
        inside = namespace(lab, one.name)
        # Before the interfaces are up: they copy "default" when created, and get IPv6 addresses when they are up.
        sysctl(inside, _EVERYWHERE | one.settings)
        ip_batch(_configure(one), inside)


def _plug_in(lab: str) -> None:
    switch = namespace(lab, SWITCH)
    sysctl(switch, _EVERYWHERE)
    ip_batch(["link set lo up", *(f"link add {segment} type bridge" for segment in SEGMENTS)], switch)
    ports = [(one, port) for one in MACHINES for port in one.ports]
    ip_batch(
        f"link add {port.device} netns {namespace(lab, one.name)} type veth "
        f"peer name {one.name}-{port.device[:2]} netns {switch}"
        for one, port in ports
    )
    ip_batch((f"link set {one.name}-{port.device[:2]} master {port.segment} up" for one, port in ports), switch)
    ip_batch((f"link set {segment} up" for segment in SEGMENTS), switch)
    router, internet = namespace(lab, "router"), namespace(lab, "internet")
    near, far = f"internet mtu {INTERNET_MTU} netns {router}", f"uplink mtu {INTERNET_MTU} netns {internet}"
    ip_batch([f"link add {near} type veth peer name {far}"])


def _configure(one: Machine) -> list[str]:
    lines = ["link set lo up"]
    for port in one.ports:
        lines += [f"addr add {port.address} dev {port.device}", f"link set {port.device} up"]
    if one.gateway:
        lines.append(f"route add default via {one.gateway}")
    if one.name == "router":
        hops = " ".join(f"nexthop via {machine(edge).address('uplink')} dev uplink" for edge in EDGES)
        lines += ["addr add 192.0.2.1/24 dev internet", "link set internet up"]
        lines += [f"route add {address}/32 {hops}" for address in EXTERNAL_ADDRESSES]
    if one.name == "internet":
        lines += [f"addr add {INTERNET_ADDRESS}/24 dev uplink", "link set uplink up"]
        lines.append("route add default via 192.0.2.1")
    return lines


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
