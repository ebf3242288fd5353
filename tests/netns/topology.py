"""
Small networks out of namespaces: guests, hosts, edges, a router, and an internet behind a 1300-byte link.

::

    guest ── vnetN ─ br0 [host] eth0 ── underlay 172.30.0.0/24 ── eth0 [edge] eth1 ── uplink 198.51.100.0/24 ──
      eth0 [router] eth1 ── mtu 1300 ── eth0 [internet] 192.0.2.2

Sockets are made in a namespace and used from the test (:meth:`Namespace.socket`): a socket belongs to the namespace in
which it was made, whatever thread uses it. A kernel under test runs in a thread of its own namespace
(:class:`KernelIn`). The witnesses are iproute2, nft and conntrack, started here and never by the product.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import dataclasses
import itertools
import json
import os
import pathlib
import socket
import subprocess
import threading
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from ipaddress import IPv4Address, IPv4Network
from typing import Any, TypeVar

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID, Filtering, PortRange
from natctl.kernel.kernel import Kernel
from natctl.kernel.reacting import serve
from natctl.kernel.settings_before import SettingsBefore
from natctl.model.entries import Change, Destination, EdgeSettings, FastPathUse, HostEntry, HostSettings, Path, Settings
from natctl.ruleset.readback import Counted, KernelState
from tests.fakes.intents import edge_intent, host_entry, with_intent
from tests.netns.waiting import SLOWNESS

_T = TypeVar("_T")
Socket = socket.socket
"""Under this name within classes that have a method ``socket``."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNET = 0x40000000
_SERIAL = itertools.count()

INTERNET = "192.0.2.2"
EXTERNAL = IPv4Address("203.0.113.1")
OTHER_EXTERNAL = IPv4Address("203.0.113.2")
POOL = IPv4Network("100.64.0.0/10")
PATIENCE = 5.0 * SLOWNESS
"""Seconds after which a packet that was to come counts as lost; nothing waits that long when all is well."""


WITNESS = """
table ip witness {
  chain seen { type filter hook prerouting priority -400;
    ip saddr { 100.64.0.0/10, 10.0.0.0/8, 172.16.0.0/12 } counter
    ip daddr { 100.64.0.0/10, 10.0.0.0/8, 172.16.0.0/12 } counter
  }
}
"""
"""Counts, at the router, what must not be seen outside."""


def left_namespaces() -> list[str]:
    """Return the namespaces of test processes that are no more: one that is killed cannot remove its own."""
    found = pathlib.Path("/run/netns").glob("vpt*-*-*")
    return sorted(path.name for path in found if not pathlib.Path("/proc", _maker(path.name)).exists())


def own_namespaces() -> list[str]:
    """Return the namespaces that this process has made and not removed."""
    return sorted(path.name for path in pathlib.Path("/run/netns").glob(f"vpt{os.getpid()}-*-*"))


def remove_namespaces(names: Iterable[str]) -> None:
    """Remove namespaces; one that somebody else has removed meanwhile is no error."""
    for name in names:
        subprocess.run(["ip", "netns", "del", name], check=False)


def _maker(name: str) -> str:
    return name.removeprefix("vpt").split("-")[0]


class Namespace:
    """A network namespace of this test run."""

    def __init__(self, role: str) -> None:
        self.name = f"vpt{os.getpid()}-{next(_SERIAL)}-{role}"
        _run("ip", "netns", "add", self.name)
        self.ip("link set lo up")

    def close(self) -> None:
        subprocess.run(["ip", "netns", "del", self.name], check=False)

    def run(self, *command: str, stdin: str | None = None) -> str:
        """Run a command inside; fail with what it said."""
        return _run("ip", "netns", "exec", self.name, *command, stdin=stdin)

    def ip(self, *lines: str) -> None:
        """Run lines of iproute2."""
        _run("ip", "-n", self.name, "-batch", "-", stdin="\n".join(lines) + "\n")

    def nft(self, text: str) -> None:
        """Load text of nftables."""
        self.run("nft", "-f", "-", stdin=text)

    def ruleset(self) -> list[dict[str, Any]]:
        """Return what ``nft -j list ruleset`` shows."""
        listed = json.loads(self.run("nft", "-j", "list", "ruleset"))
        return [item for item in listed["nftables"] if "metainfo" not in item]

    def connections(self) -> int:
        """Return how many connections the namespace tracks."""
        return int(self.run("conntrack", "-C").strip())

    def sysctl(self, **values: int | str) -> None:
        """Write switches under net.ipv4, dots as double underscores."""
        for name, value in values.items():
            self.run("sysctl", "-qw", f"net.ipv4.{name.replace('__', '.')}={value}")

    def inside(self, work: Callable[[], _T]) -> _T:
        """Call something in a thread that lives in this namespace."""
        with concurrent.futures.ThreadPoolExecutor(1, initializer=self.enter) as executor:
            return executor.submit(work).result()

    def enter(self) -> None:
        """Move the calling thread into this namespace."""
        with pathlib.Path("/run/netns", self.name).open("rb") as file:
            if _LIBC.setns(file.fileno(), _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {self.name}")

    def socket(self, kind: int, protocol: int = 0, *, bind: tuple[str, int] | None = None) -> Socket:
        """Return an IPv4 socket of this namespace that gives up after :data:`PATIENCE`."""
        made = self.inside(lambda: socket.socket(socket.AF_INET, kind, protocol))
        made.settimeout(PATIENCE)
        if bind is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            made.bind(bind)
        return made

    def udp(self, address: str = "0.0.0.0", port: int = 0) -> Socket:
        """Return a bound UDP socket."""
        return self.socket(socket.SOCK_DGRAM, bind=(address, port))

    def listener(self, address: str, port: int) -> Socket:
        """Return a TCP socket that listens."""
        made = self.socket(socket.SOCK_STREAM, bind=(address, port))
        made.listen(16)
        return made

    def tcp(self, to: tuple[str, int], *, source: tuple[str, int] | None = None) -> Socket:
        """Return a connected TCP socket."""
        made = self.socket(socket.SOCK_STREAM, bind=source)
        made.connect(to)
        return made

    def icmp(self) -> Socket:
        """Return a raw ICMP socket."""
        return self.socket(socket.SOCK_RAW, socket.IPPROTO_ICMP)


class KernelIn:
    """A kernel under test, in a thread and an event loop of its own inside a namespace; its calls block."""

    def __init__(self, namespace: Namespace, settings: Settings, noted: SettingsBefore | None = None) -> None:
        self.settings = settings
        self._kernel = Kernel(settings, noted)
        self._loop = asyncio.new_event_loop()
        self._following: list[concurrent.futures.Future[None]] = []
        self._thread = threading.Thread(target=self._serve, args=(namespace,), name=namespace.name)
        self._thread.start()

    def _serve(self, namespace: Namespace) -> None:
        namespace.enter()
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def observe(self) -> KernelState:
        return self.run(self._kernel.observe())

    def change(self, change: Change) -> None:
        self.run(self._kernel.change(change))

    def replace(
        self, host: Mapping[DomainUUID, HostEntry], edge: Mapping[DomainUUID, EdgeIntent], path: Path
    ) -> tuple[str, ...]:
        return self.run(self._kernel.replace(host, edge, path))

    def ensure(self) -> tuple[str, ...]:
        return self.run(self._kernel.ensure())

    def react(self) -> tuple[str, ...] | None:
        return self.run(self._kernel.react())

    def drops(self) -> Mapping[str, int]:
        return self.run(self._kernel.drops())

    def follow_changes(self) -> list[tuple[str, ...]]:
        """React to what others change, as natd does, until :meth:`close`; return the list of what each look mended."""
        looks: list[tuple[str, ...]] = []
        self._following.append(self.start(serve(self._kernel, looks.append)))
        return looks

    def close_sockets(self) -> None:
        self.run(self._kernel.close())

    @property
    def warnings(self) -> tuple[str, ...]:
        return self._kernel.warnings

    @property
    def way_problems(self) -> Mapping[DomainUUID, str]:
        return self._kernel.way_problems

    def counters(self) -> Counted:
        return self.run(self._kernel.counters())

    def refuse_connections(self, where: Mapping[DomainUUID, Collection[Destination]], for_s: float) -> None:
        self.run(self._kernel.refuse_connections(where, for_s))

    def remove(self) -> None:
        self.run(self._kernel.remove())

    @property
    def kernel(self) -> Kernel:
        """The kernel itself, for :meth:`start`."""
        return self._kernel

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Wait for something in the kernel's event loop."""
        return self.start(work).result(60 * SLOWNESS)

    def start(self, work: Coroutine[Any, Any, _T]) -> concurrent.futures.Future[_T]:
        """Begin something in the kernel's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def close(self) -> None:
        for each in self._following:
            each.cancel()
        self.run(self._kernel.close())
        self.run(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclasses.dataclass(eq=False)
class Node:
    """A machine with a kernel under test."""

    namespace: Namespace
    kernel: KernelIn
    number: int
    """Last part of its addresses in the underlay and, at an edge, in the uplink."""
    guests: int = 0

    @property
    def underlay(self) -> IPv4Address:
        return IPv4Address(f"172.30.0.{self.number}")

    def close(self) -> None:
        self.kernel.close()
        self.namespace.close()


@dataclasses.dataclass(eq=False)
class Guest:
    """A VM: a namespace whose veth stands where the tap would be."""

    namespace: Namespace
    host: Node
    tap: str
    tap_index: int
    address: str


class Site:
    """Hosts, edges, router and internet; close it when done."""

    def __init__(self) -> None:
        self._namespaces: list[Namespace] = []
        self.nodes: list[Node] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        self.wires = self._namespace("wires")
        self.wires.ip(
            "link add under0 type bridge", "link add up0 type bridge", "link set under0 up", "link set up0 up"
        )
        self.router = self._namespace("router")
        self.internet = self._namespace("internet")
        self._plug(self.router, "eth0", "up", "198.51.100.1/24")
        self.router.ip(
            f"link add eth1 type veth peer name eth0 netns {self.internet.name}",
            "link set eth1 mtu 1300 up",
            "addr add 192.0.2.1/24 dev eth1",
        )
        self.internet.ip(
            "link set eth0 mtu 1300 up", f"addr add {INTERNET}/24 dev eth0", "route add default via 192.0.2.1"
        )
        self.router.sysctl(ip_forward=1)
        self.router.nft(WITNESS)

    def close(self) -> None:
        """Remove everything."""
        for node in self.nodes:
            node.close()
        for namespace in self._namespaces:
            namespace.close()

    def host(self, number: int, **settings: Any) -> Node:
        """Add a host (first computing device) at 172.30.0.NUMBER."""
        return self._host(f"host{number}", number, Settings(HostSettings(frozenset({"eth0"}), **settings)))

    def edge(self, number: int, fast_path: FastPathUse = FastPathUse.AUTO) -> Node:
        """Add an edge (second computing device) at 172.30.0.NUMBER and 198.51.100.NUMBER."""
        settings = Settings(edge=EdgeSettings(frozenset({"eth1"}), frozenset({"eth0"}), fast_path=fast_path))
        namespace = self._namespace(f"edge{number}", keep=False)
        self._plug(namespace, "eth0", "under", f"172.30.0.{number}/24")
        self._plug(namespace, "eth1", "up", f"198.51.100.{number}/24")
        namespace.ip("route add default via 198.51.100.1")
        return self._node(namespace, settings, number)

    def both(self, number: int, **settings: Any) -> Node:
        """Add a machine that is host and edge."""
        uplink, underlay = frozenset({"eth1"}), frozenset({"eth0"})
        node = self._host(
            f"both{number}", number, Settings(HostSettings(uplink, **settings), EdgeSettings(uplink, underlay))
        )
        self._plug(node.namespace, "eth1", "up", f"198.51.100.{number}/24")
        node.namespace.ip("route replace default via 198.51.100.1")
        return node

    def guest(self, host: Node, address: str = "10.10.0.5") -> Guest:
        """Add a VM on a host."""
        namespace = self._namespace(f"guest{len(self._namespaces)}")
        tap, tap_index = f"vnet{host.guests}", 1000 + host.guests
        host.guests += 1
        host.namespace.ip(
            f"link add {tap} index {tap_index} type veth peer name eth0 netns {namespace.name}",
            f"link set {tap} master br0 up",
        )
        namespace.ip("link set eth0 up", f"addr add {address}/24 dev eth0", "route add default via 10.10.0.1")
        return Guest(namespace, host, tap, tap_index, address)

    def host_and_edge(self, fast_path: FastPathUse = FastPathUse.AUTO, **settings: Any) -> tuple[Node, Node]:
        """Add a host and an edge, the usual two, to which the router sends the external addresses."""
        host, edge = self.host(21, fast_path=fast_path, **settings), self.edge(11, fast_path)
        self.spread(edge)
        return host, edge

    def beside(self, role: str, address: str) -> Namespace:
        """Add a machine on the underlay that is neither host nor edge."""
        namespace = self._namespace(role)
        self._plug(namespace, "eth0", "under", address)
        return namespace

    def spread(self, *edges: Node) -> None:
        """Have the router send the external addresses to these edges."""
        hops = " ".join(f"nexthop via 198.51.100.{edge.number}" for edge in edges)
        self.router.ip(f"route replace 203.0.113.0/24 {hops}")

    def _host(self, role: str, number: int, settings: Settings) -> Node:
        namespace = self._namespace(role, keep=False)
        self._plug(namespace, "eth0", "under", f"172.30.0.{number}/24")
        namespace.ip(
            "link add br0 type bridge",
            "link set br0 up",
            "addr add 10.10.0.1/24 dev br0",
            "route add default via 172.30.0.254 onlink dev eth0",
        )
        return self._node(namespace, settings, number)

    def _node(self, namespace: Namespace, settings: Settings, number: int) -> Node:
        node = Node(namespace, KernelIn(namespace, settings), number)
        self.nodes.append(node)
        return node

    def _namespace(self, role: str, *, keep: bool = True) -> Namespace:
        namespace = Namespace(role)
        if keep:
            self._namespaces.append(namespace)
        return namespace

    def _plug(self, namespace: Namespace, name: str, bridge: str, address: str) -> None:
        port = f"p{next(_SERIAL)}"
        self.wires.ip(
            f"link add {port} type veth peer name {name} netns {namespace.name}", f"link set {port} master {bridge}0 up"
        )
        namespace.ip(f"link set {name} up", f"addr add {address} dev {name}")


@dataclasses.dataclass(frozen=True)
class VM:
    """What the manager would say about one VM."""

    number: int
    guest: Guest
    ranges: tuple[tuple[IPv4Address, PortRange], ...]
    ports: PortRange | None
    filtering: Filtering = Filtering.DEFAULT

    @classmethod
    def of(cls, number: int, guest: Guest, ports: PortRange, external: IPv4Address = EXTERNAL) -> VM:
        return cls(number, guest, ((external, ports),), ports)

    @property
    def domain(self) -> DomainUUID:
        return DomainUUID(f"00000000-0000-0000-0000-{self.number:012}")

    @property
    def internal(self) -> IPv4Address:
        return IPv4Address("100.64.0.0") + self.number

    def on_host(self) -> HostEntry:
        taps = frozenset({self.guest.tap_index})
        entry = host_entry(self.domain, f"web {self.number}", self.number, self.internal, self.ports, taps)
        return with_intent(entry, filtering=self.filtering)

    def at(self, edge: Node) -> EdgeIntent:
        via = None if edge is self.guest.host else self.guest.host.underlay
        return edge_intent(self.domain, f"web {self.number}", self.internal, via, self.ranges)


def program(
    nodes: list[Node],
    vms: list[VM],
    edges: Mapping[int, tuple[Node, ...]] | None = None,
    *,
    are_running: bool = False,
) -> None:
    """
    Give every node what a manager's snapshot would: edges first, hosts last.

    :param edges: Next hops by index of the host in ``nodes``; a host that is not named is its own edge.
    :param are_running: The VMs ran before they were managed; they are not programmed first without an interface.
    """
    order = sorted(range(len(nodes)), key=lambda index: nodes[index].kernel.settings.edge is None)
    for index in order:
        node = nodes[index]
        settings = node.kernel.settings
        hops = frozenset(edge.underlay for edge in (edges or {}).get(index, ()))
        path = Path(POOL, hops, frozenset({EXTERNAL, OTHER_EXTERNAL}))
        hosts = {vm.domain: vm.on_host() for vm in vms if vm.guest.host is node} if settings.host else {}
        at_edge = {vm.domain: vm.at(node) for vm in vms} if settings.edge else {}
        if not are_running:
            starting = {domain: dataclasses.replace(entry, taps=frozenset()) for domain, entry in hosts.items()}
            node.kernel.replace(starting, at_edge, path)
        node.kernel.replace(hosts, at_edge, path)


def checksum(data: bytes) -> int:
    """RFC 1071."""
    if len(data) % 2:
        data += b"\0"
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def echo_request(identifier: int, payload: bytes = b"hello", sequence: int = 1) -> bytes:
    """Return an ICMP echo request."""
    head = b"\x08\0" + b"\0\0" + identifier.to_bytes(2, "big") + sequence.to_bytes(2, "big")
    return head[:2] + checksum(head + payload).to_bytes(2, "big") + head[4:] + payload


def icmp_messages(listening: socket.socket) -> Iterator[tuple[str, bytes]]:
    """Yield source and ICMP message as they come."""
    while True:
        data, (source, _) = listening.recvfrom(65535)
        yield source, data[(data[0] & 15) * 4 :]


def _run(*command: str, stdin: str | None = None) -> str:
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.stderr.strip()}\n{stdin or ''}")
    return done.stdout
