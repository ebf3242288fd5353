"""
A single server whose only public address is an external address of the pool, with VMs that hold all other ports.

::

    m eth0 203.0.113.10/24 ───────── eth0 203.0.113.1 internet (192.0.2.2)
      br0 10.10.0.1/24     ── vnet0… ── eth0 10.10.0.10… VMs
      virbr9 192.168.122.1 ── eth0 192.168.122.5 a guest that other software masquerades
"""

from __future__ import annotations

import contextlib
import select
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Address

from cpm.protocol.intent import EdgeIntent
from cpm.protocol.model import DomainUUID, PortRange
from natctl.model.entries import EdgeSettings, HostEntry, HostSettings, Path, Settings
from tests.fakes.intents import edge_intent, host_entry
from tests.netns.topology import INTERNET, POOL, KernelIn, Namespace

OWN = IPv4Address("203.0.113.10")
EPHEMERAL = PortRange(32768, 60999)
SSH, WEB = 22, 8443
OTHERS = """
table ip libvirt_network {
  chain guest_nat { type nat hook postrouting priority srcnat;
    ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 meta l4proto { tcp, udp } masquerade to :1024-65535
    ip saddr 192.168.122.0/24 ip daddr != 192.168.122.0/24 masquerade
  }
}
"""
"""What libvirt does for its own network."""


class Answerer:
    """Answers TCP connections and UDP datagrams to one port of an address, in a thread; close it when done."""

    def __init__(self, where: Namespace, address: str, port: int) -> None:
        self._tcp = where.socket(socket.SOCK_STREAM, bind=(address, port))
        self._tcp.listen(1024)
        self._udp = where.udp(address, port)
        self.sources: set[tuple[str, int]] = set()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._tcp, self._udp, self._woken], [], [])
            if self._woken in ready:
                return
            if self._tcp in ready:
                accepted, source = self._tcp.accept()
                self.sources.add(source)
                with accepted, contextlib.suppress(OSError):
                    accepted.sendall(b"answer")
            if self._udp in ready:
                data, source = self._udp.recvfrom(64)
                self.sources.add(source)
                self._udp.sendto(data, source)

    def close(self) -> None:
        self._wake.send(b"x")
        self._thread.join()
        for each in (self._tcp, self._udp, self._wake, self._woken):
            each.close()


class OwnAddressMachine:
    """The server, the internet and guests. Nothing is programmed at first."""

    def __init__(self, vms: Sequence[Sequence[PortRange]], *, keep_apart: bool = True) -> None:
        self.machine, self.internet, self.guest = Namespace("m"), Namespace("inet"), Namespace("um")
        self.guests = [Namespace(f"g{number}") for number in range(len(vms))]
        self.ranges = vms
        self.machine.sysctl(ip_forward=1)
        self.machine.ip(
            f"link add eth0 type veth peer name eth0 netns {self.internet.name}",
            "link set eth0 up",
            f"addr add {OWN}/24 dev eth0",
            "link add br0 type bridge",
            "link set br0 up",
            "addr add 10.10.0.1/24 dev br0",
            "link add virbr9 type bridge",
            "link set virbr9 up",
            "addr add 192.168.122.1/24 dev virbr9",
            f"link add v-um type veth peer name eth0 netns {self.guest.name}",
            "link set v-um master virbr9 up",
            *(
                line
                for number, guest in enumerate(self.guests)
                for line in (
                    f"link add vnet{number} index {1000 + number} type veth peer name eth0 netns {guest.name}",
                    f"link set vnet{number} master br0 up",
                )
            ),
        )
        self.internet.ip(
            "link set eth0 up",
            "addr add 203.0.113.1/24 dev eth0",
            f"addr add {INTERNET}/32 dev lo",
            f"route replace 203.0.113.0/24 dev eth0 src {INTERNET}",
        )
        self.machine.ip("route add default via 203.0.113.1")
        self.guest.ip("link set eth0 up", "addr add 192.168.122.5/24 dev eth0", "route add default via 192.168.122.1")
        for number, guest in enumerate(self.guests):
            guest.ip(
                "link set eth0 up", f"addr add 10.10.0.{10 + number}/24 dev eth0", "route add default via 10.10.0.1"
            )
        self.machine.nft(OTHERS)
        uplinks = frozenset({"eth0"})
        settings = Settings(HostSettings(uplinks), EdgeSettings(uplinks, frozenset(), keep_apart))
        self.kernel = KernelIn(self.machine, settings)
        self.answerer = Answerer(self.internet, INTERNET, 8080)

    def program(self, ranges: Sequence[Sequence[PortRange]] | None = None) -> None:
        """Give each VM its ranges; new connections get the first of them."""
        host: dict[DomainUUID, HostEntry] = {}
        edge: dict[DomainUUID, EdgeIntent] = {}
        for number, held in enumerate(self.ranges if ranges is None else ranges):
            domain = DomainUUID(f"00000000-0000-4000-8000-{number:012}")
            internal = POOL.network_address + 1 + number
            host[domain] = host_entry(domain, f"g{number}", 1 + number, internal, held[0], frozenset({1000 + number}))
            edge[domain] = edge_intent(domain, f"g{number}", internal, None, tuple((OWN, ports) for ports in held))
        self.kernel.replace(host, edge, Path(POOL, externals=frozenset({OWN})))

    def close(self) -> None:
        self.kernel.close()
        self.answerer.close()
        for namespace in (self.machine, self.internet, self.guest, *self.guests):
            namespace.close()


def lost_tcp(
    client: Namespace, count: int, *, sources: Iterable[int] = (), to: tuple[str, int] = (INTERNET, 8080)
) -> int:
    """Return how many of so many TCP connections, one after the other, are not answered; from these ports, if any."""
    ports = iter(sources)
    return sum(not _is_answered(client, socket.SOCK_STREAM, to, next(ports, 0)) for _ in range(count))


def lost_udp(client: Namespace, count: int, *, sources: Iterable[int] = ()) -> int:
    """Return how many of so many UDP exchanges are not answered."""
    ports = iter(sources)
    return sum(not _is_answered(client, socket.SOCK_DGRAM, (INTERNET, 8080), next(ports, 0)) for _ in range(count))


def lost_pings(client: Namespace, to: str, count: int) -> int:
    """Return how many of so many pings, each with an identifier of its own, are not answered."""
    script = (
        "import socket\nlost = 0\n"
        f"for number in range({count}):\n"
        "    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:\n"
        "        raw.settimeout(1)\n"
        "        identifier = (number * 65521 // " + str(count) + ").to_bytes(2, 'big')\n"
        "        head = b'\\x08\\0' + bytes(2) + identifier + bytes((0, 1))\n"
        "        total = sum(int.from_bytes(head[at:at + 2], 'big') for at in range(0, 8, 2))\n"
        "        while total >> 16: total = (total & 0xffff) + (total >> 16)\n"
        f"        raw.sendto(head[:2] + (~total & 0xffff).to_bytes(2, 'big') + head[4:], ('{to}', 0))\n"
        "        try:\n"
        "            while True:\n"
        "                data, source = raw.recvfrom(64)\n"
        "                answer = data[(data[0] & 15) * 4:]\n"
        f"                if source[0] == '{to}' and answer[0] == 0 and answer[4:6] == identifier: break\n"
        "        except TimeoutError: lost += 1\n"
        "print(lost)\n"
    )
    return int(client.run("python3", "-c", script))


def _is_answered(client: Namespace, kind: int, to: tuple[str, int], port: int) -> bool:
    with client.socket(kind) as made:
        made.settimeout(2.0)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            if port:
                made.bind(("0.0.0.0", port))
            made.connect(to)
            if kind == socket.SOCK_DGRAM:
                made.send(b"answer")
            return made.recv(64) == b"answer"
        except OSError:
            return False


@contextlib.contextmanager
def answering(where: Namespace, port: int, address: str = str(OWN)) -> Iterator[Answerer]:
    """Have something that answers there."""
    made = Answerer(where, address, port)
    try:
        yield made
    finally:
        made.close()
